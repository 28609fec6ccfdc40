"""Where in a text a pair of features is most active: what its two features look for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qkmodel.attention import AttentionLayer
from qkmodel.transcoder import QKTranscoder


@dataclass(frozen=True)
class Context:
    """A sequence on which a pair is active, its features' activations there, and the places where they meet most.

    `query` and `key` are positions, of which the first sees the second.
    """

    sequence: int
    query: int
    key: int
    query_activations: Float[Tensor, "context"]
    key_activations: Float[Tensor, "context"]

    @property
    def strength(self) -> float:
        """The product of the two activations where they meet."""
        return (self.query_activations[self.query] * self.key_activations[self.key]).item()


@torch.no_grad()
def top_contexts(
    transcoder: QKTranscoder,
    layer: AttentionLayer,
    inputs: Iterable[tuple[int, Float[Tensor, "context d_model"]]],
    pairs: Sequence[tuple[int, int]],
    count: int,
) -> dict[tuple[int, int], list[Context]]:
    """For each (query feature, key feature) the `count` sequences on which the pair is most active, strongest first.

    `inputs` are sequences by number, gone through once. A pair that is active nowhere has none.
    """
    found: dict[tuple[int, int], list[Context]] = {pair: [] for pair in pairs}
    for sequence, x in inputs:
        f_query, f_key = transcoder.query.encode(x), transcoder.key.encode(x)
        visible = layer.visible(len(x))
        for pair in found:
            context = _strongest(sequence, f_query[:, pair[0]], f_key[:, pair[1]], visible)
            if context is not None:
                found[pair] = sorted([*found[pair], context], key=lambda one: (-one.strength, one.sequence))[:count]
    return found


def _strongest(
    sequence: int,
    query: Float[Tensor, "context"],
    key: Float[Tensor, "context"],
    visible: Bool[Tensor, "context context"],
) -> Context | None:
    products = torch.outer(query, key) * visible
    if products.max() <= 0:
        return None
    place = int(products.argmax())
    # copies: a column would keep all features of the sequence in memory
    return Context(sequence, place // len(key), place % len(key), query.clone(), key.clone())
