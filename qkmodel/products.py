"""Matrix products of a training: in bfloat16 where the machine has instructions for it, weights stay float32."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Precision = Literal["auto", "float32", "bfloat16"]


def product_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The element type of matrix products. `auto`: bfloat16 where this machine multiplies it faster than float32."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    cpu = torch.cpu.get_capabilities()
    return torch.bfloat16 if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else torch.float32


def multiplies_int8(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products that only choose are made in int8, where others are in `dtype`: twice as fast as bfloat16."""
    cpu = torch.cpu.get_capabilities() if device.type == "cpu" and dtype == torch.bfloat16 else {}
    return bool(cpu.get("avx512_vnni") or cpu.get("amx_int8"))


def forward_products(stored: Literal["bfloat16", "float32"]) -> Literal["bfloat16", "float32"]:
    """The element type of the model's own matrix products when its activations are stored as `stored`.

    Float32 activations are computed in float32. Bfloat16 ones in bfloat16 where this CPU multiplies it faster: on
    SmolLM2 the pattern then stays within KL 1e-3 · `kl_baseline` of the exact one (`kl_cache` says how near).
    """
    if stored == "float32":
        return "float32"
    return "bfloat16" if product_dtype("auto", torch.device("cpu")) == torch.bfloat16 else "float32"


def product(a: Float[Tensor, "rows inner"], b: Float[Tensor, "inner columns"]) -> Float[Tensor, "rows columns"]:
    """a · b in float32, whatever the element type of the factors."""
    if a.device.type == "cuda" and a.dtype == torch.bfloat16:
        # sums are float32 anyhow, and need not be rounded on their way out
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def column_sums(a: Float[Tensor, "rows columns"]) -> Float[Tensor, "columns"]:
    """Sums over rows, in float32."""
    if a.device.type == "cuda":
        # as a product, which takes two thirds as long; tensor cores take eight columns or more
        return product(a.mT, a.new_ones(len(a), 8))[:, 0] if a.dtype == torch.bfloat16 else a.mT @ a.new_ones(len(a))
    return a.sum(0, dtype=torch.float32)


def linear(
    x: Float[Tensor, "tokens width_in"],
    weight: Float[Tensor, "width_out width_in"],
    bias: Float[Tensor, "width_out"],
    dtype: torch.dtype,
) -> Float[Tensor, "tokens width_out"]:
    """x · weightᵀ + bias in float32, multiplied in `dtype`, gradients too. `x` may come in `dtype` already."""
    return _Linear.apply(x, weight, bias, dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype
    ) -> Float[Tensor, "tokens width_out"]:
        rounded_x, rounded_weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(rounded_x, rounded_weight)
        return product(rounded_x, rounded_weight.mT).add_(bias)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: Float[Tensor, "tokens width_out"]
    ) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        rounded = gradient.to(x.dtype)
        g_x = product(rounded, weight) if ctx.needs_input_grad[0] else None
        return g_x, product(rounded.mT, x), column_sums(gradient), None
