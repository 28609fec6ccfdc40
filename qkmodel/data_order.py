"""Which sequences a training sees at which step: a function of the sweep's seed, never of the training."""

import numpy as np

from qkmodel.configs import TrainingConfig


def batch_sequences(step: int, size: int, available: int, seed: int) -> np.ndarray:
    """The numbers of the training sequences in batch `step` (int64, `[size]`).

    The first epoch takes sequences as the corpus orders them, which is already shuffled; every later
    one is reshuffled from the sweep's seed and the epoch's number. A batch may span two epochs.
    """
    positions = np.arange(step * size, (step + 1) * size)
    sequences = np.empty(size, dtype=np.int64)
    for epoch in np.unique(positions // available):
        here = positions // available == epoch
        offsets = positions[here] % available
        if epoch == 0:
            sequences[here] = offsets
        else:
            order = np.random.default_rng([seed, int(epoch)]).permutation(available)
            sequences[here] = order[offsets]
    return sequences


def sequences_per_epoch(training: TrainingConfig, context: int, available: int | None) -> int:
    """Training sequences that one epoch passes over.

    `available` is how many the corpus holds, None when it holds more than anyone has counted. A training
    that wants fewer than there are has no second epoch.
    """
    tokens_per_step = training.batch_sequences * context
    wanted = -(-training.tokens // tokens_per_step) * training.batch_sequences
    return wanted if available is None else min(wanted, available)
