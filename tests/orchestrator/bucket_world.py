"""A bucket whose objects lie in a folder, and which can be made to fail at an upload."""

from pathlib import Path

import pytest
from pyarrow import NativeFile, fs

from orchestrator.storage.address import BucketAddress
from orchestrator.storage.bucket import Bucket


class FolderAsStore:
    """What `Bucket` asks of pyarrow's file systems. `uploads` are the keys sent so far; one at `fails_at` fails."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem())
        self.uploads: list[str] = []
        self.fails_at: int | None = None
        self.reads: list[str] = []

    def open_output_stream(self, key: str) -> NativeFile:
        if self.fails_at is not None and len(self.uploads) >= self.fails_at:
            raise OSError("AWS Error NETWORK_CONNECTION during PutObject operation")
        self.uploads.append(key)
        (self._folder / key).parent.mkdir(parents=True, exist_ok=True)
        return self._files.open_output_stream(key)

    def open_input_stream(self, key: str) -> NativeFile:
        self.reads.append(key)
        return self._files.open_input_stream(key)

    def __getattr__(self, name: str) -> object:
        return getattr(self._files, name)

    def content(self, key: str) -> bytes:
        return (self._folder / key).read_bytes()

    def objects(self) -> set[str]:
        return {path.relative_to(self._folder).as_posix() for path in self._folder.rglob("*") if path.is_file()}


def bucket_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Bucket, FolderAsStore]:
    """s3://bucket/runs, with its objects and this machine's working copy below `folder`."""
    store = FolderAsStore(folder / "store")
    (folder / "store").mkdir(parents=True)
    monkeypatch.setattr(Bucket, "_connected", lambda self, attempts, seconds: store)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "home"))
    return Bucket(BucketAddress.parse("s3://bucket/runs")), store
