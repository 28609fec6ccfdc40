"""One layer's query and key path, from the attention input to the attention pattern.

`AttentionLayer` holds copies of the frozen weights and everything that lies between the query/key projections
and the softmax: q/k norm, rotary embedding, grouped-query map, scale, soft-cap and visibility. It is read out of
a language model by `attention_extraction`, which proves it against the model's own pattern.
"""

from collections.abc import Mapping
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from qkmodel.errors import InputError
from qkmodel.schema import Schema

Heads = Float[Tensor, "batch context heads d_head"]


class AttentionGeometry(Schema):
    """Everything about one attention layer that is not a tensor.

    The scores are `rotate(q)·rotate(k)·scale`, then `soft_cap·tanh(score / soft_cap)`. Rotary turns the first
    `rotary_dim` entries of a head (0: none), pairing entry i with i + rotary_dim/2, or 2i with 2i + 1 when
    `rotary_interleaved`, and multiplies cosine and sine by `rotary_scaling`. With `qk_norm_eps` each head's q and
    k pass an RMS norm before rotary. Position i sees j when `0 <= i - j`, and `i - j < window` if there is one; with a
    window of 1 every pattern would be the same, and there would be nothing to reconstruct.
    """

    architecture: str
    layer: int = Field(ge=0)
    d_model: int = Field(ge=1)
    n_heads: int = Field(ge=1)
    n_kv_heads: int = Field(ge=1)
    d_head: int = Field(ge=1)
    scale: float = Field(gt=0)
    rotary_dim: int = Field(default=0, ge=0, multiple_of=2)
    rotary_interleaved: bool = False
    rotary_scaling: float = Field(default=1.0, gt=0)
    qk_norm_eps: float | None = Field(default=None, ge=0)
    soft_cap: float | None = Field(default=None, gt=0)
    window: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}")
        if self.rotary_dim > self.d_head:
            raise ValueError(f"rotary_dim {self.rotary_dim} is larger than d_head {self.d_head}")
        return self

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each tensor an `AttentionLayer` of this geometry holds."""
        queries, keys = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        shapes: dict[str, tuple[int, ...]] = {
            "w_q": (queries, self.d_model),
            "b_q": (queries,),
            "w_k": (keys, self.d_model),
            "b_k": (keys,),
        }
        if self.qk_norm_eps is not None:
            shapes |= {"q_norm": (self.d_head,), "k_norm": (self.d_head,)}
        if self.rotary_dim:
            shapes["inv_freq"] = (self.rotary_dim // 2,)
        return shapes


class AttentionLayer(nn.Module):
    """Frozen query and key projections of one layer and the attention pattern they make.

    Weights are float32 buffers. `w_q` and `w_k` are `[heads · d_head, d_model]`; families without biases have
    zero `b_q` and `b_k`; `q_norm` and `k_norm` are the factors that multiply the normalised head.
    """

    def __init__(self, geometry: AttentionGeometry, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.geometry = geometry
        for name in geometry.tensor_shapes():
            self.register_buffer(name, tensors[name].detach().to(torch.float32, copy=True).contiguous())
        self._rotary_tables: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_tensors(cls, geometry: AttentionGeometry, tensors: Mapping[str, Tensor]) -> Self:
        """The layer that `to_tensors` described.

        Raises:
            InputError: a tensor is missing, unknown, not of floating point, or has the wrong shape.
        """
        shapes = geometry.tensor_shapes()
        if missing := sorted(shapes.keys() - tensors.keys()):
            raise InputError(f"attention layer {geometry.layer}: tensor {missing[0]} is missing")
        if unknown := sorted(tensors.keys() - shapes.keys()):
            raise InputError(
                f"attention layer {geometry.layer}: unknown tensor {unknown[0]}; expected {', '.join(shapes)}"
            )
        for name, shape in shapes.items():
            if tuple(tensors[name].shape) != shape:
                raise InputError(
                    f"attention layer {geometry.layer}: tensor {name} has shape {list(tensors[name].shape)}, "
                    f"expected {list(shape)}"
                )
            if not tensors[name].is_floating_point():
                raise InputError(
                    f"attention layer {geometry.layer}: tensor {name} is {tensors[name].dtype}, expected floating point"
                )
        return cls(geometry, tensors)

    def to_tensors(self) -> dict[str, Tensor]:
        """Copies of all tensors, by the names of `AttentionGeometry.tensor_shapes`."""
        return {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}

    def project(self, x: Float[Tensor, "batch context d_model"]) -> tuple[Heads, Heads]:
        """Queries `[batch, context, n_heads, d_head]` and keys `[batch, context, n_kv_heads, d_head]`.

        They are what enters the rotary embedding: after the bias and after the q/k norm.
        """
        d_head, eps = self.geometry.d_head, self.geometry.qk_norm_eps
        q = nn.functional.linear(x, self.w_q, self.b_q).unflatten(-1, (-1, d_head))
        k = nn.functional.linear(x, self.w_k, self.b_k).unflatten(-1, (-1, d_head))
        if eps is not None:
            q, k = _rms_norm(q, self.q_norm, eps), _rms_norm(k, self.k_norm, eps)
        return q, k

    def rotate(self, y: Heads) -> Heads:
        """Rotary embedding of queries or keys at positions 0 … context − 1; linear in `y`."""
        return self._turn(y, *self.rotary_table(y.shape[1])) if self.geometry.rotary_dim else y

    def rotate_at(
        self, y: Float[Tensor, "rows heads d_head"], positions: Int[Tensor, "rows"], context: int
    ) -> Float[Tensor, "rows heads d_head"]:
        """Rotary embedding of each row at a position of its own, below `context`."""
        if not self.geometry.rotary_dim:
            return y
        cos, sin = self.rotary_table(context)
        return self._turn(y, cos[positions], sin[positions])

    def _turn(self, y: Tensor, cos: Float[Tensor, "rows 1 pairs"], sin: Float[Tensor, "rows 1 pairs"]) -> Tensor:
        rotary_dim = self.geometry.rotary_dim
        turned, rest = y[..., :rotary_dim], y[..., rotary_dim:]
        if self.geometry.rotary_interleaved:
            first, second = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
            return torch.cat((turned, rest), dim=-1)
        first, second = turned.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

    def visible(self, context: int) -> Bool[Tensor, "context context"]:
        """True where query position (row) sees key position (column)."""
        position = torch.arange(context, device=self.w_q.device)
        distance = position[:, None] - position[None, :]
        visible = distance >= 0
        return visible if self.geometry.window is None else visible & (distance < self.geometry.window)

    def scores(self, q: Heads, k: Heads) -> Float[Tensor, "batch n_heads context context"]:
        """Attention scores of the `q` and `k` that `project` gives; −inf where a key is not visible."""
        queries = self.rotate(q).unflatten(2, (self.geometry.n_kv_heads, -1)).permute(0, 2, 3, 1, 4)
        keys = self.rotate(k).transpose(1, 2).unsqueeze(2)
        scores = (queries @ keys.mT * self.geometry.scale).flatten(1, 2)
        if self.geometry.soft_cap is not None:
            scores = self.geometry.soft_cap * torch.tanh(scores / self.geometry.soft_cap)
        return scores.masked_fill(~self.visible(q.shape[1]), float("-inf"))

    def pattern(self, q: Heads, k: Heads) -> Float[Tensor, "batch n_heads context context"]:
        """Attention pattern of the `q` and `k` that `project` gives; each row sums to 1."""
        return self.scores(q, k).softmax(-1)

    def rotary_table(self, context: int) -> tuple[Float[Tensor, "context 1 pairs"], Float[Tensor, "context 1 pairs"]]:
        key = (context, self.inv_freq.device, self.inv_freq.dtype)
        if key not in self._rotary_tables:
            positions = torch.arange(context, device=key[1], dtype=key[2])
            angles = (positions[:, None] * self.inv_freq[None, :]).unsqueeze(1)
            scaling = self.geometry.rotary_scaling
            self._rotary_tables[key] = (angles.cos() * scaling, angles.sin() * scaling)
        return self._rotary_tables[key]


def _rms_norm(y: Heads, weight: Float[Tensor, " d_head"], eps: float) -> Heads:
    return weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps))
