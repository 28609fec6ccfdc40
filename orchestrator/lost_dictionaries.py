"""Which finished trainings lack their dictionaries by now."""

from collections.abc import Collection, Sequence
from pathlib import Path

from orchestrator.config import SweepConfig
from orchestrator.ledger_records import Training
from orchestrator.plan_figures import sweep_folder
from orchestrator.storage.opened import open_storage
from qkmodel.dictionary import FILES, PAIRS_FILE, find_loss


def find_losses(
    config: SweepConfig, trainings: Sequence[Training], in_bucket: Collection[Path] | None
) -> dict[str, str]:
    """By training, what is gone or another, in words.

    `in_bucket` are the files of the sweep's dictionaries where it is kept in a bucket: nothing in them is read then.
    """
    losses = {}
    for training in trainings:
        if training.state != "finished":
            continue
        folder = sweep_folder(config) / training.dictionary
        if in_bucket is None:
            loss = find_loss(folder, training.dictionary_sha256)
        else:
            names = (*FILES, PAIRS_FILE) if training.task == "pair_mask" else FILES
            gone = [folder / name for name in names if folder / name not in in_bucket]
            loss = f"{open_storage(config.storage).shown(gone[0])} is gone" if gone else None
        if loss is not None:
            losses[training.training_id] = loss
    return losses
