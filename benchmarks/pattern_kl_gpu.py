"""What the fused pattern loss gains on a GPU, on GPT-2-small shapes.

Times one training's loss and gradients, from q̂ and k̂ to dq̂ and dk̂, in bfloat16 products: the Triton form, replayed
from a CUDA graph as a pack does, and the plain form, float32 autograd through masked log-softmax and KLDiv. The true
pattern is computed once per batch for all trainings, so it is timed apart and in neither. Also says how far the
gradients are from float64, and which share of the GPU's matrix products (a large bfloat16 product, measured here)
the sixteen products of visible scores reach. About a minute. The last line is JSON; without a GPU {"device": null}.
"""

import json
import sys
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from qkmodel.attention import AttentionGeometry, AttentionLayer
from qkmodel.kernels.pattern_kl_triton import TruePattern, pattern_kl_gradients, true_pattern
from qkmodel.pattern_kl import reference_pattern_kl

BATCH, CONTEXT, HEADS, D_HEAD = 32, 256, 12, 64
PRODUCTS_PER_SCORE = 16
PEAK_SIZE = 8192
REPETITIONS = 50

Heads = Float[Tensor, "batch context n_heads d_head"]
Gradients = tuple[Heads, Heads]


def main() -> None:
    if not torch.cuda.is_available():
        print("pattern_kl_gpu: no CUDA device, nothing measured", file=sys.stderr)
        print(json.dumps({"device": None}))
        return
    layer = gpt2_like_layer().cuda()
    q_hat, k_hat, q, k = random_sides()
    true = true_pattern(layer, q, k, torch.bfloat16)
    plain = PlainForm(layer, q, k)
    results = {
        "device": torch.cuda.get_device_name(),
        "triton_ms": milliseconds(captured(lambda: pattern_kl_gradients(q_hat, k_hat, true))),
        "triton_launched_ms": milliseconds(lambda: pattern_kl_gradients(q_hat, k_hat, true)),
        "true_pattern_ms": milliseconds(lambda: true_pattern(layer, q, k, torch.bfloat16)),
        "plain_ms": milliseconds(lambda: plain.gradients(q_hat, k_hat)),
    }
    peak = peak_flops()
    results |= {
        "ratio": results["plain_ms"] / results["triton_ms"],
        "max_relative_gradient_error": gradient_error(layer, [q_hat, k_hat, q, k], true),
        "matmul_peak_tflops": peak / 1e12,
        "share_of_matmul_peak": useful_flops() / (results["triton_ms"] / 1e3) / peak,
    }
    print(json.dumps({name: value if isinstance(value, str) else round(value, 5) for name, value in results.items()}))


def gpt2_like_layer() -> AttentionLayer:
    """GPT-2 small's geometry; inputs of standard deviation 1 give scores of standard deviation 1."""
    geometry = AttentionGeometry(
        architecture="GPT2LMHeadModel",
        layer=0,
        d_model=HEADS * D_HEAD,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        d_head=D_HEAD,
        scale=D_HEAD**-0.5,
    )
    return AttentionLayer.from_tensors(
        geometry, {name: torch.randn(shape) / geometry.d_model**0.5 for name, shape in geometry.tensor_shapes().items()}
    )


def random_sides() -> tuple[Heads, Heads, Heads, Heads]:
    """q̂, k̂, q, k: scores of standard deviation 1, reconstructed with a fifth of noise."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    shape = (BATCH, CONTEXT, HEADS, D_HEAD)
    q, k, noise_q, noise_k = (torch.randn(shape, generator=generator, device="cuda") for _ in range(4))
    return q + 0.2 * noise_q, k + 0.2 * noise_k, q, k


class PlainForm:
    """The pattern loss as it is usually written: whole score matrices, autograd."""

    def __init__(self, layer: AttentionLayer, q: Heads, k: Heads) -> None:
        self.layer, self.q, self.k = layer, q, k
        self.hidden = ~layer.visible(CONTEXT)
        self.log_p = self._log_pattern(q, k)

    def gradients(self, q_hat: Heads, k_hat: Heads) -> Gradients:
        q_hat, k_hat = q_hat.detach().requires_grad_(), k_hat.detach().requires_grad_()
        loss = 3.0 * self._kl(q_hat, k_hat) + self._kl(q_hat, self.k) + self._kl(self.q, k_hat)
        return torch.autograd.grad(loss, (q_hat, k_hat))

    def _kl(self, q: Heads, k: Heads) -> Float[Tensor, ""]:
        divergence = torch.nn.functional.kl_div(self._log_pattern(q, k), self.log_p, reduction="sum", log_target=True)
        return divergence / (BATCH * HEADS * CONTEXT)

    def _log_pattern(self, q: Heads, k: Heads) -> Float[Tensor, "batch n_heads context context"]:
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * self.layer.geometry.scale
        # as usual, a large negative number: with −inf, KLDiv makes 0·(−inf + inf) of what no query sees
        return scores.masked_fill(self.hidden, -1e9).log_softmax(-1)


def captured(function: Callable[[], object]) -> Callable[[], None]:
    """The function's launches as a CUDA graph."""
    # compiles the kernels and fills the rotary tables, neither of which a graph can record
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def milliseconds(function: Callable[[], object]) -> float:
    """Median time of a call on the GPU."""
    for _ in range(5):
        function()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPETITIONS)]
    for start, stop in pairs:
        start.record()
        function()
        stop.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(stop) for start, stop in pairs)[REPETITIONS // 2]


def gradient_error(layer: AttentionLayer, sides: list[Heads], true: TruePattern) -> float:
    """Largest difference from the float64 gradient as a share of its largest value, in dq̂ or dk̂."""
    ours = pattern_kl_gradients(*sides[:2], true)[1:]
    q_hat, k_hat, q, k = (side.double() for side in sides)
    exact_layer = AttentionLayer.from_tensors(layer.geometry, layer.to_tensors()).to(q.device).double()
    loss = reference_pattern_kl(q_hat.requires_grad_(), k_hat.requires_grad_(), q, k, exact_layer)
    exact = torch.autograd.grad(loss.total, (q_hat, k_hat))
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, exact, strict=True))


def useful_flops() -> float:
    """Of the products of visible scores; what a block computes beyond them is waste."""
    visible = BATCH * HEADS * CONTEXT * (CONTEXT + 1) / 2
    return 2.0 * visible * D_HEAD * PRODUCTS_PER_SCORE


def peak_flops() -> float:
    """Measured rate of a large bfloat16 product."""
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2.0 * PEAK_SIZE**3 / (milliseconds(lambda: a @ b) / 1e3)


def copy_rate() -> float:
    """Measured bytes a second, read and written ones, of a large copy on the GPU."""
    a, b = (torch.empty(2**30, device="cuda", dtype=torch.int8) for _ in range(2))
    return 2.0 * a.numel() / (milliseconds(lambda: b.copy_(a)) / 1e3)


if __name__ == "__main__":
    main()
