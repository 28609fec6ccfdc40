"""How fast the engine trains, against the loop that public code runs: the numbers of the README's table.

16 trainings (TopK 16, 1,024 features a side, context 128, 410 k tokens each) on a layer of SmolLM2, activation cache,
reference, reports and final metrics included, against

    plain   one training at a time; every batch goes through the model again; float32; three KLDivLoss of masked
            log-softmax by autograd; torch's Adam
    bf16    the same under bfloat16 autocast, forward and training

timed on a stretch of steps with all cores. What the plain loop would reach is found by training it to the end on the
same batches (without recomputing the forward, which would only take longer). A quarter of an hour for both layers on
two cores. The last line of standard output is JSON, by layer:

    {"8": {"engine_tokens_per_second": …, "plain": {…, "ratio": …}, "bf16": {…}, "kl": …, "plain_kl": …, "parts": {…},
           "evaluation_share_of_training": …, "cross_entropy_seconds": … of all 16, not in the engine's time}}
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from smollm2 import CORPUS, build_cache, load_smollm2
from torch import Tensor, nn

from qkmodel.attention import AttentionLayer
from qkmodel.configs import TrainingConfig
from qkmodel.data_order import batch_sequences, sequences_per_epoch
from qkmodel.evaluation import evaluate, evaluate_cross_entropy
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.language_model import LanguageModel
from qkmodel.pack import PackTrainer
from qkmodel.products import forward_products
from qkmodel.reference import LayerReference, ensure_reference
from qkmodel.transcoder import QKTranscoder, initialise_qk_transcoder

TRAINING = TrainingConfig(tokens=410_000, learning_rate_schedule="linear", cross_entropy_sequences=0)
MEMBERS = [
    Hyperparameters(dictionary_size=1024, activation="topk", k=16, learning_rate=6e-3, seed=seed) for seed in range(16)
]
TIMED_STEPS = 8
BRIEF_SEQUENCES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 24])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    model = load_smollm2()
    found = {str(layer): measure(model, layer, arguments.threads) for layer in arguments.layers}
    print(json.dumps(found | {"threads": arguments.threads, "products": forward_products("bfloat16")}))


def measure(model: LanguageModel, layer: int, threads: int) -> dict[str, object]:
    """The engine and both loops on one layer."""
    with tempfile.TemporaryDirectory(prefix="engine-") as folder:
        parts, pack, kl = run_engine(model, layer, Path(folder), threads)
        seconds = sum(parts.values())
        tokens = len(MEMBERS) * pack.tokens_done
        say(f"layer {layer}: engine {tokens / seconds:,.0f} training-tokens/s; " + shares(parts))
        result = {
            "engine_tokens_per_second": round(tokens / seconds),
            "kl": round(kl, 4),
            "parts": {name: round(value, 1) for name, value in parts.items()},
            "evaluation_share_of_training": round((parts["reports"] + parts["final metrics"]) / parts["training"], 4),
            "cross_entropy_seconds": round(cross_entropy_seconds(model, pack), 1),
        }
        torch.set_num_threads(threads)
        for name, dtype in (("plain", torch.float32), ("bf16", torch.bfloat16)):
            step = time_loop(model, pack, dtype)
            speed = pack.tokens_per_step / step
            ratio = tokens / seconds / speed
            say(
                f"layer {layer}: {name} loop {speed:,.0f} tokens/s ({step:.3f} s a step): engine {ratio:.1f} times that"
            )
            result[name] = {"tokens_per_second": round(speed), "step_seconds": round(step, 4), "ratio": round(ratio, 1)}
        result["plain_kl"] = round(plain_kl(pack), 4)
        say(f"layer {layer}: kl {kl:.4f} (median of 16), plain loop {result['plain_kl']}")
        return result


def run_engine(
    model: LanguageModel, layer: int, folder: Path, threads: int
) -> tuple[dict[str, float], PackTrainer, float]:
    """Seconds by part, the trained pack, and the median final kl."""
    torch.set_num_threads(threads)
    parts: dict[str, float] = {}
    cache = timed(parts, "cache", lambda: build_cache(model, [layer], TRAINING, folder))
    attention, reference = timed(parts, "reference", lambda: ensure_reference(cache, layer, TRAINING, lambda: model))
    torch.set_num_threads(1)
    pack = timed(
        parts, "initialisation", lambda: PackTrainer(MEMBERS, attention, cache, reference, TRAINING, 0, threads)
    )
    transcoders = [member.transcoder for member in pack.members]

    def measure_on(sequences: int) -> list[dict[str, float]]:
        return evaluate(transcoders, attention, cache, reference, sequences, threads)

    # as a sweep's pack does: a brief look after each eighth, everything at the end
    interval = round(pack.steps_planned / 8)
    timed(parts, "training", lambda: pack.train(interval))
    while not pack.finished:
        timed(parts, "reports", lambda: measure_on(BRIEF_SEQUENCES))
        timed(parts, "training", lambda: pack.train(interval))
    metrics = timed(parts, "final metrics", lambda: measure_on(TRAINING.validation_sequences))
    return parts, pack, sorted(one["kl"] for one in metrics)[len(metrics) // 2]


def cross_entropy_seconds(model: LanguageModel, pack: PackTrainer) -> float:
    """Seconds for patching each member's pattern into the model, on as many sequences as a sweep does by default."""
    parts: dict[str, float] = {}
    transcoders = [member.transcoder for member in pack.members]
    zero = replace(pack.reference, ce_clean=0.0, ce_ablated=0.0)
    sequences = TrainingConfig(tokens=1).cross_entropy_sequences
    torch.set_num_threads(1)
    timed(
        parts,
        "cross-entropy",
        lambda: evaluate_cross_entropy(transcoders, pack.layer, model, pack.cache, zero, sequences, pack.threads),
    )
    return parts["cross-entropy"]


class PlainTraining:
    """One training as public code writes it: dense TopK, autograd through every softmax."""

    def __init__(self, layer: AttentionLayer, reference: LayerReference) -> None:
        self.layer = layer
        self.transcoder: QKTranscoder = initialise_qk_transcoder(
            MEMBERS[0],
            layer,
            reference.mean_input,
            reference.mean_query,
            reference.mean_key,
            reference.input_rms,
        )
        self.optimiser = torch.optim.Adam(self.transcoder.parameters(), lr=MEMBERS[0].learning_rate)
        self.kl = nn.KLDivLoss(reduction="sum", log_target=True)

    def step(self, x: Tensor) -> None:
        with torch.no_grad():
            q, k = self.layer.project(x)
            truth = self.log_pattern(q, k)
        q_hat, k_hat = (heads.unflatten(-1, (-1, self.layer.geometry.d_head)) for heads in self.transcoder(x))
        loss = 3 * self.divergence(truth, q_hat, k_hat) + self.divergence(truth, q_hat, k)
        loss = loss + self.divergence(truth, q, k_hat)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()

    def divergence(self, truth: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # a finite floor: KLDivLoss makes NaN of −inf
        return self.kl(self.log_pattern(q, k).clamp(min=-1e4), truth.clamp(min=-1e4)) / truth[..., 0].numel()

    def log_pattern(self, q: Tensor, k: Tensor) -> Tensor:
        return self.layer.scores(q, k).float().log_softmax(-1)


def time_loop(model: LanguageModel, pack: PackTrainer, dtype: torch.dtype) -> float:
    """Median seconds of a step of the plain loop, forward pass included."""
    training, layer = PlainTraining(pack.layer, pack.reference), pack.layer.geometry.layer
    seconds = []
    for number in range(TIMED_STEPS + 2):
        tokens = pack.cache.tokens("train", batch_sequences(number, TRAINING.batch_sequences, 3200, 0))
        started = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            training.step(model.attention_inputs(tokens, [layer])[layer])
        seconds.append(time.perf_counter() - started)
    return sorted(seconds[2:])[TIMED_STEPS // 2]


def plain_kl(pack: PackTrainer) -> float:
    """Where the plain loop ends, on the engine's batches and with its learning-rate schedule."""
    training = PlainTraining(pack.layer, pack.reference)
    available = sequences_per_epoch(TRAINING, CORPUS.context, pack.cache.train_sequences_available)
    for step in range(pack.steps_planned):
        numbers = batch_sequences(step, TRAINING.batch_sequences, available, 0)
        for group in training.optimiser.param_groups:
            group["lr"] = MEMBERS[0].learning_rate * min(1.0, 2.0 * (1.0 - step / pack.steps_planned))
        training.step(pack.cache.read(pack.layer.geometry.layer, "train", numbers))
    (metrics,) = evaluate([training.transcoder], pack.layer, pack.cache, pack.reference, 200)
    return metrics["kl"]


def timed(parts: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = work()
    parts[name] = parts.get(name, 0.0) + time.perf_counter() - started
    return result


def shares(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f} s" for name, value in parts.items())


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
