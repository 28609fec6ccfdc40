"""The dictionary of a finished training, as its ledger records it, and what to do where it is another."""

from pathlib import Path

from orchestrator.ledger import Ledger
from orchestrator.ledger_tables import Training
from qkmodel.dictionary import Dictionary, load_dictionary
from qkmodel.errors import InputError


def load_trained(ledger: Ledger, training: Training) -> Dictionary:
    """Raises InputError, with the way out, when files are gone, damaged or not those that the ledger records.

    And on a machine that reads the ledger and does not have the sweep's folder.
    """
    ledger.require_folder()
    folder = ledger.folder / training.dictionary
    try:
        return load_dictionary(folder, training.dictionary_sha256)
    except InputError as error:
        # what may not be read may be whole
        if isinstance(error.__cause__, PermissionError):
            raise
        raise InputError(f"{error}; {way_to_train_anew(folder)}") from error


def way_to_train_anew(folder: Path) -> str:
    """For people; a start of the sweep looks whether files are there and reads no tensors."""
    again = "start the sweep again, which trains it anew"
    return f"delete {folder} and {again}" if folder.is_dir() else again
