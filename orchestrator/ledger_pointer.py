"""The file in a sweep's folder that says where its ledger is, when that is not the folder itself."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from orchestrator.ledger_tables import LEDGER_FORMAT, refuse_other_format
from orchestrator.storage.shared import SHARED, Storage, StorageGivesOut
from qkmodel.errors import InputError
from qkmodel.files import create_atomically

POINTER_FILE = "ledger.json"


@dataclass(frozen=True)
class LedgerPointer:
    """`address` has no password. `identity` is in the ledger, too: it tells this folder's from a namesake's."""

    address: str
    schema: str
    identity: str

    @classmethod
    def read(cls, folder: Path, storage: Storage = SHARED) -> Self | None:
        """None where the folder, in `storage`, has none. Raises InputError when it cannot be read."""
        path = folder / POINTER_FILE
        shown = storage.shown(path)
        try:
            content = storage.read(path)
            if content is None:
                return None
            found = json.loads(content)
            values = [found[name] for name in ("address", "schema", "identity")]
            version = found["format"]
        except StorageGivesOut:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{shown}: does not say where the ledger is ({error}); put a copy of it there") from error
        refuse_other_format(shown, version)
        if not all(isinstance(value, str) for value in values):
            raise InputError(f"{shown}: does not say where the ledger is; put a copy of it there")
        return cls(*values)

    def create(self, folder: Path) -> None:
        """Raises FileExistsError when another process was quicker."""
        create_atomically(folder / POINTER_FILE, self._text)

    def remove(self, folder: Path) -> None:
        (folder / POINTER_FILE).unlink(missing_ok=True)

    def replace(self, folder: Path, storage: Storage = SHARED) -> None:
        storage.write(folder / POINTER_FILE, self._text)

    @property
    def _text(self) -> bytes:
        return (json.dumps({"format": LEDGER_FORMAT, **asdict(self)}, indent=1) + "\n").encode()
