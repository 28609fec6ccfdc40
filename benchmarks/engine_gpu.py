"""How fast the engine trains on a GPU, against the loop that public code runs there, on GPT-2-small shapes.

Eight trainings (2,400 features a side, d_model 768, 12 heads of 64, batches of 32 sequences of 256 tokens) on the input
of layer 8 of a GPT-2 with random weights, which cost what real ones do, against

    plain   one training at a time; every batch goes through the model again; float32; three KLDivLoss of masked
            log-softmax by autograd; torch's fused Adam
    tf32    the same with float32 products on tensor cores
    bf16    the same under bfloat16 autocast, forward and training

`relu` are the paper's trainings (ReLU, sqrt penalty), `topk` TopK 16. Of the engine the median of five stretches of 60
steps counts, of the loops that of twelve steps. `ratio` compares training-tokens per second with activations from a
cache; `ratio_with_cache` adds the forward passes of one epoch, as if no other pack ever read them.
Says how near both come in KL, on the batches trained on; how near the step comes to what the card allows; and where
its time goes, by kernel. What it allows is measured: the rate of a large bfloat16 product and that of a large copy.
`share_of_matmul` counts the products alone, `share_of_roofline` also what must pass through memory at least. A minute.
The last line is JSON; without a GPU {"device": null}.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from pattern_kl_gpu import copy_rate, gpt2_like_layer, peak_flops
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

from qkmodel.configs import TrainingConfig
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.pack import PackTrainer
from qkmodel.reference import LayerReference
from qkmodel.transcoder import initialise_qk_transcoder

LAYER, D_MODEL, HEADS, D_HEAD, CONTEXT, BATCH, FEATURES = 8, 768, 12, 64, 256, 32, 2400
MEMBERS, WARM_STEPS, STRETCHES, STEPS, PLAIN_STEPS, SEQUENCES = 8, 5, 5, 60, 12, 1024
TOKENS = BATCH * CONTEXT
TRAINING = TrainingConfig(tokens=1000 * TOKENS, batch_sequences=BATCH)
KINDS = {
    "topk": Hyperparameters(dictionary_size=FEATURES, activation="topk", k=16, learning_rate=2e-3),
    "relu": Hyperparameters(
        dictionary_size=FEATURES, activation="relu", penalty="sqrt", sparsity_coefficient=1e-3, learning_rate=1e-3
    ),
}
LOOPS = {"plain": ("highest", None), "tf32": ("high", None), "bf16": ("highest", torch.bfloat16)}
# Dense products of tokens × features × d_model in a step: with TopK two choose and four are gradients of weights.
DENSE_PRODUCTS = {"topk": 6, "relu": 10}
PRODUCTS_PER_SCORE = 16
# Read or written once: weights, gradients and both of Adam's moments in float32, all read and written.
BYTES_PER_PARAMETER = 8 * 4
# Of a token's feature: pre-activation, activation and gradient in bfloat16, each written and read.
BYTES_PER_ACTIVATION = 6 * 2


@dataclass(frozen=True)
class Activations:
    """Inputs of the layer in memory, where a trainer expects an activation cache."""

    x: Tensor
    context: int = CONTEXT
    train_sequences_available: int = SEQUENCES

    def read_stored(self, _layer: int, _split: str, indices: Iterable[int]) -> Tensor:
        return self.x[torch.as_tensor(list(indices))]


class World:
    """A random GPT-2 up to the layer, random text, and everything that trainings of the layer start from."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = GPT2Config(n_layer=LAYER, n_positions=CONTEXT)
        # its last norm stands for the layer's first: what comes out is the layer's input
        self.model = GPT2Model(config).cuda().eval().requires_grad_(False)
        self.tokens = torch.randint(config.vocab_size, (SEQUENCES, CONTEXT), device="cuda")
        self.layer = gpt2_like_layer().cuda()
        self._cached()
        self.forward_seconds, x = seconds(self._cached)
        self.cache = Activations(x)
        some = x[:64].cuda().float()
        means = [side.flatten(2).mean((0, 1)) for side in (some, *self.layer.project(some))]
        self.reference = LayerReference(*means, (some - means[0]).square().mean().sqrt().item(), 1, 1, 0, None, None)

    def _cached(self) -> Tensor:
        x = torch.empty(SEQUENCES, CONTEXT, D_MODEL, dtype=torch.bfloat16, pin_memory=True)
        for rows, tokens in zip(x.split(BATCH), self.tokens.split(BATCH), strict=True):
            rows.copy_(self.inputs(tokens, torch.bfloat16), non_blocking=True)
        return x

    def inputs(self, tokens: Tensor, dtype: torch.dtype | None) -> Tensor:
        with torch.no_grad(), torch.autocast("cuda", dtype or torch.float32, enabled=dtype is not None):
            return self.model(tokens, use_cache=False).last_hidden_state.float()


class PlainLoop:
    """One training as public code writes it: dense, autograd through every softmax, the model at every batch."""

    def __init__(self, world: World, kind: str, dtype: torch.dtype | None) -> None:
        self.world, self.layer, self.dtype, self.hyperparameters = world, world.layer, dtype, KINDS[kind]
        means = (world.reference.mean_input, world.reference.mean_query, world.reference.mean_key)
        self.transcoder = initialise_qk_transcoder(self.hyperparameters, self.layer, *means, world.reference.input_rms)
        rate = self.hyperparameters.learning_rate
        self.optimiser = torch.optim.Adam(self.transcoder.parameters(), lr=rate, fused=True)
        self.kl = nn.KLDivLoss(reduction="sum", log_target=True)
        self.hidden = ~self.layer.visible(CONTEXT)

    def step(self, number: int) -> Tensor:
        """The step's full KL."""
        sequences = torch.arange(number * BATCH, (number + 1) * BATCH, device="cuda") % SEQUENCES
        x = self.world.inputs(self.world.tokens[sequences], self.dtype)
        with torch.autocast("cuda", self.dtype or torch.float32, enabled=self.dtype is not None):
            with torch.no_grad():
                q, k = self.layer.project(x)
                truth = self.log_pattern(q, k)
            q_hat, k_hat, penalty = self.reconstruct(x)
            full = self.divergence(truth, q_hat, k_hat)
            loss = 3 * full + self.divergence(truth, q_hat, k) + self.divergence(truth, q, k_hat) + penalty
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return full.detach()

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        sides, penalty = [], 0.0
        for side in (self.transcoder.query, self.transcoder.key):
            f = side.encode(x)
            sides.append(side.decode(f).unflatten(-1, (-1, D_HEAD)))
            if self.hyperparameters.sparsity_coefficient:
                scaled = f * side.decoder_norms()
                omega = ((scaled + 1e-6).sqrt() - 1e-3).sum(-1).mean()
                penalty = penalty + self.hyperparameters.sparsity_coefficient * omega
        return *sides, penalty

    def divergence(self, truth: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.kl(self.log_pattern(q, k), truth) / truth[..., 0].numel()

    def log_pattern(self, q: Tensor, k: Tensor) -> Tensor:
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * self.layer.geometry.scale
        # a finite floor: KLDivLoss makes NaN of −inf
        return scores.float().masked_fill(self.hidden, -1e9).log_softmax(-1)


def main() -> None:
    if not torch.cuda.is_available():
        print("engine_gpu: no CUDA device, nothing measured", file=sys.stderr)
        print(json.dumps({"device": None}))
        return
    world = World()
    flops_per_second, bytes_per_second = peak_flops(), copy_rate()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "matmul_tflops": round(flops_per_second / 1e12, 1),
        "copy_tb_per_second": round(bytes_per_second / 1e12, 2),
    }
    for kind in KINDS:
        found[kind] = measure(world, kind, flops_per_second, bytes_per_second)
        say(f"{kind}: {json.dumps(found[kind], indent=1)}")
    print(json.dumps(found))


def measure(world: World, kind: str, flops_per_second: float, bytes_per_second: float) -> dict[str, Any]:
    # not the peak of the kind before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    pack = PackTrainer([KINDS[kind]] * MEMBERS, world.layer, world.cache, world.reference, TRAINING, seed=0)
    pack.train(WARM_STEPS)
    stretches = sorted(seconds(lambda: pack.train(STEPS))[0] / STEPS for _ in range(STRETCHES))
    kernels = busiest(lambda: pack.train(4), steps=4)
    pack.members[0].losses.take_means()
    pack.train(8)
    step = median(stretches)
    # of the forward passes of an epoch, the share that falls to a step
    with_cache = step + world.forward_seconds * BATCH / SEQUENCES
    speed = MEMBERS * TOKENS / step
    products, traffic = MEMBERS * flops(kind) / flops_per_second, MEMBERS * traffic_bytes() / bytes_per_second
    result = {
        "engine_tokens_per_second": round(speed),
        "step_ms": round(1e3 * step, 3),
        "step_ms_of_stretches": [round(1e3 * stretch, 2) for stretch in stretches],
        "forward_ms": round(1e3 * (with_cache - step), 3),
        "products_at_ceiling_ms": round(1e3 * products, 3),
        "traffic_at_ceiling_ms": round(1e3 * traffic, 3),
        "share_of_matmul": round(products / step, 3),
        "share_of_roofline": round((products + traffic) / step, 3),
        "memory_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
        "kl": round(pack.members[0].losses.take_means()["train_kl"], 4),
        "kernels_ms": kernels,
    }
    for name, (precision, dtype) in LOOPS.items():
        torch.set_float32_matmul_precision(precision)
        loop = PlainLoop(world, kind, dtype)
        plain = time_plain(loop)
        torch.set_float32_matmul_precision("highest")
        result[name] = {
            "tokens_per_second": round(TOKENS / plain),
            "step_ms": round(1e3 * plain, 2),
            "ratio": round(speed * plain / TOKENS, 1),
            "ratio_with_cache": round(MEMBERS * plain / with_cache, 1),
        }
        if name == "plain":
            result[name]["kl"] = round(plain_kl(loop), 4)
    return result


def time_plain(loop: PlainLoop) -> float:
    for number in range(3):
        loop.step(number)
    return median(seconds(partial(loop.step, number))[0] for number in range(3, 3 + PLAIN_STEPS))


def plain_kl(loop: PlainLoop) -> float:
    """On the last of as many steps as the engine made."""
    done, wanted = 3 + PLAIN_STEPS, WARM_STEPS + STRETCHES * STEPS + 12
    return torch.stack([loop.step(number) for number in range(done, wanted)])[-8:].mean().item()


def flops(kind: str) -> float:
    """Products of one training's step: of its transcoders, and of the visible scores."""
    visible = BATCH * HEADS * CONTEXT * (CONTEXT + 1) / 2
    return 2.0 * (DENSE_PRODUCTS[kind] * TOKENS * FEATURES * D_MODEL + PRODUCTS_PER_SCORE * visible * D_HEAD)


def traffic_bytes() -> int:
    """What a step of one training moves through memory at least, however its kernels are fused."""
    features = 2 * FEATURES
    return BYTES_PER_PARAMETER * 2 * features * D_MODEL + BYTES_PER_ACTIVATION * TOKENS * features


def busiest(work: Callable[[], object], steps: int) -> dict[str, float]:
    """Milliseconds of a step by kernel; streams overlap, so that they may add up to more than the step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    times = {event.key[:80]: event.self_device_time_total / 1e3 / steps for event in profile.key_averages()}
    largest = sorted(times.items(), key=lambda item: -item[1])[:14]
    return {name: round(value, 3) for name, value in largest} | {"all": round(sum(times.values()), 3)}


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    torch.cuda.synchronize()
    started = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    return time.perf_counter() - started, result


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
