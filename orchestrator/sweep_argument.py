"""What a person means by SWEEP on the command line: a folder, an address in a bucket, a sweep file or a name."""

import os
from pathlib import Path

from orchestrator.addresses import HIDDEN
from orchestrator.config import load_sweep
from orchestrator.ledger import Ledger
from orchestrator.ledger_connection import Place
from orchestrator.ledger_place import place_in, place_of
from orchestrator.report import REPORT_FILE
from orchestrator.storage.address import is_bucket
from orchestrator.storage.opened import local_root, open_in_bucket
from orchestrator.storage_check import check_bucket
from orchestrator.tracking_store import STORE_FILE
from orchestrator.versions import GIT_DIFF_FILE
from qkmodel.errors import InputError
from qkmodel.files import user_path


def open_ledger(sweep: str) -> Ledger:
    """Its ledger, to be read. Raises InputError."""
    place = _place(sweep)
    if place.storage.url is not None:
        for name in (GIT_DIFF_FILE, REPORT_FILE):
            # by which is told what MLflow lacks
            place.storage.fetch(place.folder / name)
    return Ledger.open_existing(place)


def _place(sweep: str) -> Place:
    if is_bucket(sweep):
        bucket, folder = open_in_bucket(sweep)
        check_bucket(bucket.url, is_written=False)
        place = place_in(folder, bucket)
        if place.storage is not bucket:
            raise InputError(f"{sweep}: no sweep is there; give the address of a sweep that was started")
        return place
    folder, path = _sweep_folder(sweep), user_path("SWEEP", sweep)
    if not path.is_file():
        return place_in(folder)
    # a sweep file knows it on machines, too, that do not have the folder
    config = load_sweep(path)
    if is_bucket(config.storage):
        check_bucket(config.storage, is_written=False)
    return place_of(config, folder, reading=True)


def shown_folder(ledger: Ledger) -> str:
    """By which people find the sweep again."""
    return ledger.storage.shown(ledger.folder)


def _sweep_folder(sweep: str) -> Path:
    """The folder on this machine that a folder, an address in a bucket, a sweep file or a name stands for."""
    if is_bucket(sweep):
        return open_in_bucket(sweep)[1]
    path = user_path("SWEEP", sweep).absolute()
    if path.is_file():
        config = load_sweep(path)
        return local_root(config.storage) / config.name
    if path.is_dir():
        return path
    default = Path("runs").absolute() / sweep
    if default.is_dir():
        return default
    raise InputError(
        f"{sweep}: no sweep of that name; give a sweep's folder or address, its sweep file, or a name below runs/"
    )


def tracking_of(sweep: str) -> tuple[str | None, Path]:
    """A sweep's `tracking`, whole, and its `storage`."""
    file = None if is_bucket(sweep) else user_path("SWEEP", sweep)
    if file is not None and file.is_file():
        config = load_sweep(file)
        return config.tracking, local_root(config.storage)
    tracking = open_ledger(sweep).sweep().config["tracking"]
    if tracking is not None and HIDDEN in tracking:
        raise InputError(f"{sweep}: the ledger keeps no password; give the sweep file in its place")
    return tracking, _storage_of(_sweep_folder(sweep))


def _storage_of(folder: Path) -> Path:
    """The storage that a sweep's folder lies in: where MLflow's store is, and else where the folder itself is.

    A link may lie outside the storage, and one in the storage may lead to a folder elsewhere.
    """
    named = Path(os.path.abspath(folder)).parent
    return named if (named / STORE_FILE).is_file() else folder.resolve().parent
