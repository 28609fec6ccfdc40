"""The dictionary of a finished training, as its ledger records it, and what to do where it is another."""

from pathlib import Path

from orchestrator.ledger import Ledger
from orchestrator.ledger_records import Training
from orchestrator.storage.shared import SHARED, Storage
from qkmodel.dictionary import Dictionary, find_damage, load_dictionary
from qkmodel.errors import InputError


def load_trained(ledger: Ledger, training: Training) -> Dictionary:
    """Raises InputError, with the way out, when files are gone, damaged or not those that the ledger records.

    And on a machine that reads the ledger and does not have the sweep's folder.
    """
    ledger.require_folder()
    folder = dictionary_folder(ledger, training)
    try:
        return load_dictionary(folder, training.dictionary_sha256)
    except InputError as error:
        # what may not be read may be whole
        if isinstance(error.__cause__, PermissionError):
            raise
        raise InputError(f"{error}; {way_to_train_anew(folder, ledger.storage)}") from error


def dictionary_folder(ledger: Ledger, training: Training) -> Path:
    """Where a finished training's dictionary lies on this machine, fetched where its sweep is kept in a bucket."""
    folder = ledger.folder / training.dictionary
    if ledger.storage.url is not None and find_damage(folder, training.dictionary_sha256) is not None:
        ledger.storage.fetch(folder)
    return folder


def way_to_train_anew(folder: Path, storage: Storage = SHARED) -> str:
    """For people; a start of the sweep looks whether files are there and reads no tensors."""
    again = "start the sweep again, which trains it anew"
    return f"delete {storage.shown(folder)} and {again}" if folder.is_dir() else again
