"""How much memory a pack takes, from its shapes alone: what `pack: auto` is decided by.

`benchmarks/growth.py` sets these figures beside the measured peak.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from qkmodel.attention import AttentionGeometry
from qkmodel.forward_batch import forward_sequences
from qkmodel.hyperparameters import Hyperparameters, SideHyperparameters
from qkmodel.kernels.pattern_comparison_plain import compared_sequences
from qkmodel.kernels.pattern_kl_cpu import BLOCK_SCORES, blocks_of
from qkmodel.model_description import ModelDescription
from qkmodel.pack_graphs import STREAMS
from qkmodel.pattern_comparison import evaluation_batch, patched_batch
from qkmodel.sparse_code import SPARSE_SHARE
from qkmodel.transcode import MOST_ON_GPU

# For each weight: itself and two moments of the optimiser in float32, and a sixth for what the allocator cannot reuse.
LASTING_BYTES = 14
# For each weight while its member steps: a gradient in float32.
STEP_BYTES = 4
# For each pre-activation of a batch. Dense way: encoder's output, activation, penalty and the gradients of each, in
# float32; sparse way: only the output, which is gone before there are gradients. On a GPU, where graphs keep what they
# use, that is in the products' type and twice (measured in bfloat16).
DENSE_BYTES, SPARSE_BYTES = 36, 4
SPARSE_ON_GPU = 2
# For each candidate pair of a dictionary: its number, its saliency, its key feature, and what sorting them takes; and
# for each of a mask: itself, two moments, its sample and the gradients of each, in float32.
CANDIDATE_BYTES, MASKED_BYTES = 40, 32
# On a GPU, in evaluation, in float32: for each score of the sequences that are compared together, and for each feature
# of all its tokens.
COMPARED_BYTES, INFERRED_BYTES = 80, 12
# Two batches in use, the next one, and what making it takes.
BATCHES = 6
# On a CPU, while a member steps: seven blocks of scores of the loss, in float32.
LOSS_BYTES = 7 * 4 * BLOCK_SCORES
# What a process takes before its first pack, Ray's worker included; and machine code and buffers from then on.
LIBRARIES_BYTES = 700_000_000
RUNNING_BYTES = 210_000_000
# In a forward pass of the model: for each entry of the residual stream, and for each attention score of the layer that
# is at work (as multiplied, scaled, masked, normalised).
HIDDEN_BYTES, SCORE_BYTES = 40, 16


@dataclass(frozen=True)
class ModelUse:
    """What a pack runs the language model for: the activations it trains on, cross-entropies at the end, or both.

    `products` is the element type of the members' matrix products; `use` says what the model is run for, if it is.
    On a GPU as many step at once as there are streams, and each stream keeps its memory during evaluation. On a CPU
    evaluation, in batches of its own size, is reckoned as steps of that size. Cross-entropies follow it.
    """

    model: ModelDescription
    products: Literal["bfloat16", "float32"]
    streamed: bool
    patched: bool


def pack_bytes(
    members: Sequence[Hyperparameters],
    geometry: AttentionGeometry,
    batch: int,
    context: int,
    threads: int,
    device: str = "cpu",
    use: ModelUse | None = None,
    products: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes of a process that trains these members on batches of `batch` sequences, `threads` stepping at once.

    `products` is the element type of the members' matrix products; `use` says what the model is run for, if it is.
    On a GPU as many step at once as there are streams, and each stream keeps its memory during evaluation. On a CPU
    evaluation, in batches of its own size, is reckoned as steps of that size. Cross-entropies follow it.
    """
    forward = _forward_bytes(use.model, batch, context, device) if use is not None and use.streamed else 0
    batch = max(batch, evaluation_batch(context))
    lasting = sum(LASTING_BYTES * _parameters(member, geometry) for member in members)
    sparse_bytes = SPARSE_BYTES if device == "cpu" else SPARSE_ON_GPU * products.itemsize
    steps = [_step_bytes(member, geometry, batch * context, device, sparse_bytes) for member in members]
    at_once = threads if device == "cpu" else STREAMS
    training = (
        sum(sorted(steps, reverse=True)[:at_once]) + BATCHES * _shared_bytes(geometry, batch, context, device) + forward
    )
    if device == "cuda":
        training += sum(_evaluation_bytes(member, geometry, context) for member in members[:threads])
    patching = 0
    if use is not None and use.patched:
        patching = min(threads, len(members)) * _patched_bytes(use, context, device)
    weights = _weight_bytes(use.model) if use is not None else 0
    return LIBRARIES_BYTES + RUNNING_BYTES + weights + lasting + max(training, patching)


def masks_bytes(
    candidates: Sequence[int],
    source: Hyperparameters,
    geometry: AttentionGeometry,
    batch: int,
    context: int,
    use: ModelUse | None = None,
) -> int:
    """Bytes of a process that trains masks of one dictionary, with so many candidates each."""
    forward = _forward_bytes(use.model, batch, context, "cpu") if use is not None and use.streamed else 0
    patching = _patched_bytes(use, context, "cpu") if use is not None and use.patched else 0
    weights = _weight_bytes(use.model) if use is not None else 0
    # each trained along, and a source of its own
    dictionaries = 2 * len(candidates) * (LASTING_BYTES + STEP_BYTES) * _parameters(source, geometry)
    pairs = (CANDIDATE_BYTES + MASKED_BYTES) * sum(candidates)
    # decoder rows of active features, rotated, and their gradients by head
    slots = context * max(
        side.k or SPARSE_SHARE * side.dictionary_size for side in (source.query_side, source.key_side)
    )
    rows = 4 * 4 * round(slots) * geometry.n_heads * geometry.d_head
    # both sides of one sequence before and after the activation, and their gradients
    rows += 4 * 4 * context * (source.query_side.dictionary_size + source.key_side.dictionary_size)
    # the true pattern, the bias terms, all terms, and their gradient
    scores = 4 * 4 * (batch + 1) * geometry.n_heads * context**2
    return LIBRARIES_BYTES + RUNNING_BYTES + weights + dictionaries + pairs + max(scores + rows + forward, patching)


def _weight_bytes(model: ModelDescription) -> int:
    """A language model's float32 weights; twelve d_model² weights a layer is what transformers have."""
    return 4 * model.d_model * (12 * model.n_layers * model.d_model + model.vocabulary_matrices * model.vocabulary_size)


def _forward_bytes(model: ModelDescription, batch: int, context: int, device: str) -> int:
    """Passes of `batch` sequences up to some layer, of as many at a time as is fast, and what they leave."""
    at_once = min(batch, forward_sequences(context, device, batch))
    left = 4 * batch * context * model.d_model
    return left + at_once * context * (HIDDEN_BYTES * model.d_model + SCORE_BYTES * model.n_heads * context)


def _patched_bytes(use: ModelUse, context: int, device: str) -> int:
    """A pass of an evaluation's sequences with a pattern patched in, and their cross-entropy.

    Logits come when no layer is at work any more; those of one sequence and their log-probabilities are in float32.
    """
    batch = patched_batch(context, device)
    model, tokens = use.model, batch * context
    logits = 2 * tokens + 8 * context if use.products == "bfloat16" else 4 * (tokens + context)
    pattern = 4 * tokens * model.n_heads * context
    hidden = HIDDEN_BYTES * tokens * model.d_model
    return pattern + max(_forward_bytes(model, batch, context, device), hidden + logits * model.vocabulary_size)


def _sides(member: Hyperparameters, geometry: AttentionGeometry) -> list[tuple[SideHyperparameters, int]]:
    """Each side with the width of what it writes."""
    return [
        (member.query_side, geometry.n_heads * geometry.d_head),
        (member.key_side, geometry.n_kv_heads * geometry.d_head),
    ]


def _parameters(member: Hyperparameters, geometry: AttentionGeometry) -> int:
    return sum(
        side.dictionary_size * (geometry.d_model + width + 1) + width for side, width in _sides(member, geometry)
    )


def _step_bytes(
    member: Hyperparameters, geometry: AttentionGeometry, tokens: int, device: str, sparse_bytes: int
) -> int:
    gradients, chosen_from, total = STEP_BYTES * _parameters(member, geometry), 0, 0
    for side, width in _sides(member, geometry):
        picked = ("topk", "batchtopk") if device == "cpu" else ("topk",)
        sparse = side.activation in picked and side.k <= SPARSE_SHARE * side.dictionary_size
        sparse &= device == "cpu" or side.dictionary_size <= MOST_ON_GPU
        pre_activations = tokens * side.dictionary_size * (sparse_bytes if sparse else DENSE_BYTES)
        if sparse and device == "cpu":
            chosen_from = max(chosen_from, pre_activations)
        else:
            total += pre_activations
        # outputs, their rotated differences and gradients
        total += 4 * tokens * width * 6
    return total + max(gradients, chosen_from) + (LOSS_BYTES if device == "cpu" else 0)


def _evaluation_bytes(member: Hyperparameters, geometry: AttentionGeometry, context: int) -> int:
    """Of a member on a GPU, where patterns are compared whole."""
    features = max(side.dictionary_size for side, _ in _sides(member, geometry))
    batch = evaluation_batch(context)
    compared = min(batch, compared_sequences(geometry.n_heads, context)) * geometry.n_heads * context**2
    return COMPARED_BYTES * compared + INFERRED_BYTES * batch * context * features


def _shared_bytes(geometry: AttentionGeometry, batch: int, context: int, device: str) -> int:
    """A batch's inputs (as they are and rounded, twice), true queries and keys likewise, and the true pattern."""
    widths = geometry.d_model + (geometry.n_heads + geometry.n_kv_heads) * geometry.d_head
    return 7 * batch * context * widths + _pattern_bytes(geometry, batch, context, device)


def _pattern_bytes(geometry: AttentionGeometry, batch: int, context: int, device: str) -> int:
    """p, log p and, with a soft-cap, raw scores of all blocks, in float32; on a GPU a number for each row."""
    rows = batch * geometry.n_heads
    if device != "cpu":
        return 4 * rows * context
    blocks = blocks_of(context, geometry.window)
    scores = sum((queries.stop - queries.start) * (keys.stop - keys.start) for queries, keys in blocks)
    return (8 if geometry.soft_cap is None else 12) * rows * scores
