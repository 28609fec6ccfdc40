"""A chosen dictionary as a folder that a model hub takes: its files as they are, and a model card."""

from pathlib import Path

from orchestrator.choice import Choice
from orchestrator.ledger import Ledger
from orchestrator.model_card import model_card
from orchestrator.trained_dictionary import load_trained
from qkmodel.dictionary import files_of
from qkmodel.files import new_folder, write_atomically

CARD_FILE = "README.md"


def export_dictionary(ledger: Ledger, choice: Choice, output: Path) -> None:
    """Write the folder `output` from the chosen dictionary: all of it, or nothing.

    Raises InputError when `output` is there and not an empty folder, or the dictionary is not the one that the ledger
    records, and OSError when the disk cannot take it.
    """
    config = load_trained(ledger, choice.training).config
    dictionary = ledger.folder / choice.training.dictionary
    with new_folder(output) as partial:
        for name in files_of(config):
            write_atomically(partial / name, (dictionary / name).read_bytes())
        write_atomically(partial / CARD_FILE, model_card(ledger.sweep(), choice, config).encode())
