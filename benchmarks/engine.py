"""How fast the engine trains, against the loop that public code runs: the numbers of the README's table.

16 trainings (TopK 16, 1,024 features a side, context 128, 410 k tokens each) on a layer of SmolLM2, activation cache,
reference, reports and final metrics included, against

    plain   one training at a time; every batch goes through the model again; float32; three KLDivLoss of masked
            log-softmax by autograd; torch's Adam
    bf16    the same under bfloat16 autocast, forward and training

timed with all cores in a process of its own (whose memory allocator is as Python leaves it), a step in every eighth of
the engine's training, of which the median counts. What the plain loop would reach is found by training it to the end on
the same batches (without recomputing the forward, which would only take longer). A quarter of an hour for both layers
on two cores. The last line of standard output is JSON, by layer:

    {"8": {"engine_tokens_per_second": …, "plain": {…, "ratio": …, "ratio_of_training": …}, "bf16": {…}, "kl": …,
           "kl_seed_0": …, "plain_kl": …, "parts": {…}, "evaluation_share_of_training": …, "cross_entropy_seconds": …}}

The loops evaluate nothing: `ratio` has all of the engine's parts in its time, `ratio_of_training` none of reports,
final metrics and the held-out text's share of the cache. The seconds of cross-entropies are of all 16 and in neither.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from smollm2 import CORPUS, build_cache, load_smollm2
from torch import Tensor, nn

from qkmodel.activations import ActivationCache
from qkmodel.attention import AttentionLayer
from qkmodel.configs import TrainingConfig
from qkmodel.data_order import batch_sequences, sequences_per_epoch
from qkmodel.evaluation import evaluate, evaluate_cross_entropy, reconstructed_pattern
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
LOOPS = {"plain": torch.float32, "bf16": torch.bfloat16}
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
        parts: dict[str, float] = {}
        torch.set_num_threads(threads)
        cache = timed(parts, "cache", lambda: build_cache(model, [layer], TRAINING, Path(folder)))
        opened = timed(parts, "reference", lambda: ensure_reference(cache, layer, TRAINING, lambda: model))
        attention, reference = opened
        pack = timed(
            parts, "initialisation", lambda: PackTrainer(MEMBERS, attention, cache, reference, TRAINING, 0, threads)
        )
        with ProcessPoolExecutor(1, get_context("spawn"), start_loops, (cache.folder, layer, threads)) as loops:
            steps = {name: [] for name in LOOPS}

            def time_loops() -> None:
                for name, seconds in steps.items():
                    seconds.append(loops.submit(time_loop, name).result())

            kls = train(pack, parts, time_loops)
        seconds = sum(parts.values())
        speed = len(MEMBERS) * pack.tokens_done / seconds
        say(f"layer {layer}: engine {speed:,.0f} training-tokens/s; " + shares(parts))
        result = {
            "engine_tokens_per_second": round(speed),
            "kl": round(median(kls), 4),
            "kl_seed_0": round(kls[0], 4),
            "plain_kl": round(plain_kl(pack), 4),
            "parts": {name: round(value, 1) for name, value in parts.items()},
            "evaluation_share_of_training": round((parts["reports"] + parts["final metrics"]) / parts["training"], 4),
            "cross_entropy_seconds": round(cross_entropy_seconds(model, pack), 1),
        }
        for name, of_loop in steps.items():
            result[name] = loop_figures(
                pack.tokens_per_step, of_loop, speed, 1 - evaluation_seconds(parts, cache) / seconds
            )
        for name in LOOPS:
            say(f"layer {layer}: {name} loop {result[name]}")
        say(
            f"layer {layer}: kl {result['kl']} (median of 16), {result['kl_seed_0']} with seed 0, plain loop "
            f"{result['plain_kl']} with seed 0"
        )
        return result


def train(pack: PackTrainer, parts: dict[str, float], beside: Callable[[], None]) -> list[float]:
    """Trains as a sweep's pack does, with a brief look after each eighth and all metrics at the end; each member's kl.

    What is to be timed `beside` it is called in every eighth, so that a machine whose speed drifts is fair to both.
    """
    transcoders = [member.transcoder for member in pack.members]

    def measure_on(sequences: int) -> list[dict[str, float]]:
        return evaluate(transcoders, pack.layer, pack.cache, pack.reference, sequences, pack.threads)

    interval = -(-pack.steps_planned // 8)
    while not pack.finished:
        beside()
        torch.set_num_threads(1)
        timed(parts, "training", lambda: pack.train(interval))
        if not pack.finished:
            timed(parts, "reports", lambda: measure_on(BRIEF_SEQUENCES))
    metrics = timed(parts, "final metrics", lambda: measure_on(TRAINING.validation_sequences))
    return [one["kl"] for one in metrics]


def cross_entropy_seconds(model: LanguageModel, pack: PackTrainer) -> float:
    """Seconds for patching each member's pattern into the model, on as many sequences as a sweep does by default."""
    parts: dict[str, float] = {}
    patterns = [partial(reconstructed_pattern, member.transcoder, pack.layer) for member in pack.members]
    zero = replace(pack.reference, ce_clean=0.0, ce_ablated=0.0)
    sequences = TrainingConfig(tokens=1).cross_entropy_sequences
    torch.set_num_threads(1)
    timed(
        parts,
        "cross-entropy",
        lambda: evaluate_cross_entropy(patterns, pack.layer, model, pack.cache, zero, sequences, pack.threads),
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


class PlainLoop:
    """A plain training under way, forward pass included, in one element type."""

    def __init__(self, model: LanguageModel, cache: ActivationCache, layer: int, dtype: torch.dtype) -> None:
        self.model, self.cache, self.layer, self.dtype = model, cache, layer, dtype
        self.training = PlainTraining(*ensure_reference(cache, layer, TRAINING, lambda: model))
        self.available = sequences_per_epoch(TRAINING, CORPUS.context, cache.train_sequences_available)
        self.steps = 0

    def time(self) -> float:
        """Seconds of the second of two steps."""
        for _ in range(2):
            numbers = batch_sequences(self.steps, TRAINING.batch_sequences, self.available, 0)
            tokens = self.cache.tokens("train", numbers)
            started = time.perf_counter()
            x = next(self.model.attention_inputs_of_batches([tokens], [self.layer], self.dtype))[self.layer].float()
            with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
                self.training.step(x)
            last = time.perf_counter() - started
            self.steps += 1
        return last


# those of the process that times them
loops_here: dict[str, PlainLoop] = {}


def start_loops(folder: Path, layer: int, threads: int) -> None:
    torch.set_num_threads(threads)
    model, cache = load_smollm2(), ActivationCache.open(folder)
    loops_here.update({name: PlainLoop(model, cache, layer, dtype) for name, dtype in LOOPS.items()})


def time_loop(name: str) -> float:
    return loops_here[name].time()


def evaluation_seconds(parts: dict[str, float], cache: ActivationCache) -> float:
    """The engine's time for what no loop does."""
    held_out = sum(shard.sequences for path, shard in cache.manifest.shards.items() if "validation" in path)
    share = held_out / sum(shard.sequences for shard in cache.manifest.shards.values())
    return parts["reports"] + parts["final metrics"] + share * parts["cache"]


def loop_figures(
    tokens_per_step: int, seconds: Sequence[float], engine_speed: float, training_share: float
) -> dict[str, float]:
    step = median(seconds)
    speed = tokens_per_step / step
    return {
        "tokens_per_second": round(speed),
        "step_seconds": round(step, 4),
        "ratio": round(engine_speed / speed, 1),
        "ratio_of_training": round(engine_speed / training_share / speed, 1),
    }


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
