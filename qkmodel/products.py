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


def forward_products(stored: Literal["bfloat16", "float32"]) -> Literal["bfloat16", "float32"]:
    """The element type of the model's own matrix products when its activations are stored as `stored`.

    Float32 activations are computed in float32. Bfloat16 ones in bfloat16 where this CPU multiplies it faster: on
    SmolLM2 the pattern then stays within KL 1e-3 · `kl_baseline` of the exact one (`kl_cache` says how near).
    """
    if stored == "float32":
        return "float32"
    return "bfloat16" if product_dtype("auto", torch.device("cpu")) == torch.bfloat16 else "float32"


def linear(
    x: Float[Tensor, "tokens width_in"], weight: Float[Tensor, "width_out width_in"], dtype: torch.dtype
) -> Float[Tensor, "tokens width_out"]:
    """x · weightᵀ in float32, multiplied in `dtype`, gradients too. `x` may come in `dtype` already."""
    if dtype == torch.float32:
        return torch.nn.functional.linear(x, weight)
    return _RoundedLinear.apply(x, weight, dtype)


class _RoundedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, dtype: torch.dtype
    ) -> Float[Tensor, "tokens width_out"]:
        rounded_x, rounded_weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(rounded_x, rounded_weight)
        return torch.nn.functional.linear(rounded_x, rounded_weight).float()

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: Float[Tensor, "tokens width_out"]
    ) -> tuple[Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.to(x.dtype)
        g_x = (gradient @ weight).float() if ctx.needs_input_grad[0] else None
        return g_x, (gradient.mT @ x).float(), None
