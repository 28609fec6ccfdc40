"""What all forms of the pattern loss agree on."""

from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from qkmodel.attention import AttentionLayer

# How much the KL with both sides reconstructed weighs beside those with one (Wynroe & Sharkey 2024).
FULL_WEIGHT = 3.0

Queries = Float[Tensor, "batch context n_heads d_head"]
Keys = Float[Tensor, "batch context n_kv_heads d_head"]


class TruePattern(Protocol):
    """A batch's true side. Each form has its own, which only its own functions look into."""

    @property
    def layer(self) -> AttentionLayer:
        """The layer whose pattern it is."""
