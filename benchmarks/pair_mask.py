"""Step 2 on SmolLM2: KL against pairs kept for trained masks, saliency, weights and chance; speed beside a dense mask.

    python benchmarks/pair_mask.py            two and a half hours on two cores
    python benchmarks/pair_mask.py --only choices|masks|joint|speed|large

A TopK 16 dictionary with 1,024 features a side is trained on layer 8 first. `choices` are pairs kept without training,
`masks` trained ones. `joint` trains the dictionary along, decoders alone or encoders too, and beside it the dictionary
without a mask on as many more tokens. No mask sees a sequence twice. The dense mask of `speed` is the paper's step 2
written plainly, made exact for rotary embeddings, at 512 features a side. `large` has 16,384 features a side, 2.4
billion pairs, and says how much memory that takes. The last line is the figures, as JSON.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from smollm2 import build_cache, load_smollm2
from torch import Tensor

from qkmodel.activations import ActivationCache
from qkmodel.attention import AttentionLayer
from qkmodel.configs import TrainingConfig
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.pack import PackTrainer
from qkmodel.pair_mask.evaluation import evaluate_mask, mask_kl, unmasked_kl
from qkmodel.pair_mask.hyperparameters import MaskHyperparameters
from qkmodel.pair_mask.masked_scores import mask_gradient
from qkmodel.pair_mask.pair_set import PairSet
from qkmodel.pair_mask.saliency import SalientPairs, salient_pairs
from qkmodel.pair_mask.score_terms import SequenceCodes, sequence_codes
from qkmodel.pair_mask.training import Batch, MaskTrainer
from qkmodel.reference import ensure_reference
from qkmodel.transcoder import QKTranscoder

LAYER, FEATURES, K = 8, 1024, 16
TRAINING = TrainingConfig(tokens=410_000, batch_sequences=4, validation_sequences=200, learning_rate_schedule="linear")
CALIBRATION, CANDIDATE_SHARE = 128, 0.02
MASK_BATCH, MASK_STEPS, JOINT_STEPS = 8, 400, 1600
MASKS = (
    {"form": "sqrt", "pair_cost": 1.7e-7},
    {"form": "sqrt", "pair_cost": 1e-6},
    {"form": "sqrt", "pair_cost": 1e-5},
    {"form": "hard_concrete", "pair_cost": 2e-7, "learning_rate": 0.1},
    {"form": "sqrt", "pair_cost": 1.4e-7, "joint": True},
)
JOINTS = (
    {"form": "sqrt", "pair_cost": 3.4e-7, "joint": True},
    {"form": "sqrt", "pair_cost": 1.7e-7, "joint": True, "encoders": True},
)
JOINT_CANDIDATE_SHARE = 0.01
EXTRA_TOKENS = JOINT_STEPS * MASK_BATCH * 128
SHARES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
LARGE_FEATURES, LARGE_CANDIDATE_SHARE, LARGE_STEPS = 16_384, 1e-3, 40
THREADS = os.cpu_count() or 1


class Bench:
    """A layer's activations, a dictionary of some size, and its codes on parts of the text."""

    def __init__(self, cache: ActivationCache, features: int, tokens: int) -> None:
        self.cache = cache
        self.layer, reference = ensure_reference(cache, LAYER, TRAINING, load_smollm2)
        settings = Hyperparameters(dictionary_size=features, activation="topk", k=K, learning_rate=7e-3)
        training = TRAINING.model_copy(update={"tokens": tokens})
        trainer = PackTrainer([settings], self.layer, cache, reference, training, 0, 1)
        trainer.train(10**9)
        self.transcoder: QKTranscoder = trainer.members[0].transcoder.requires_grad_(False)

    def codes(self, split: str, numbers: list[int]) -> list[SequenceCodes]:
        return sequence_codes(self.transcoder, self.layer, self.cache.read(LAYER, split, numbers))

    def held_out(self, transcoder: QKTranscoder) -> list[SequenceCodes]:
        return sequence_codes(transcoder, self.layer, self.cache.read(LAYER, "validation", range(100)))

    def salient(self, share: float) -> SalientPairs:
        """The most salient pairs, so large a share of all."""
        calibration = self.codes("train", list(range(CALIBRATION)))
        total = self.layer.geometry.n_heads * self.transcoder.query.features * self.transcoder.key.features
        return salient_pairs(self.transcoder, self.layer, calibration, int(share * total), THREADS)

    def train_mask(self, candidates: PairSet, settings: MaskHyperparameters, steps: int, pool: ThreadPoolExecutor):
        trainer = MaskTrainer(settings, self.transcoder, self.layer, candidates, steps)
        order = np.random.default_rng(0).permutation(steps * MASK_BATCH).reshape(steps, MASK_BATCH)
        for numbers in order:
            x = self.cache.read(LAYER, "train", sorted(numbers.tolist()))
            trainer.step(Batch(x, sequence_codes(self.transcoder, self.layer, x)), pool)
        return trainer


def by_weights(bench: Bench, count: int) -> PairSet:
    """The pairs of largest |d_a · e_b|, without rotary."""
    d_head = bench.layer.geometry.d_head
    d = bench.transcoder.query.W_dec.unflatten(-1, (-1, d_head)).transpose(0, 1)
    e = bench.transcoder.key.W_dec.unflatten(-1, (-1, d_head)).transpose(0, 1)
    products = (d @ e.repeat_interleave(len(d) // len(e), 0).mT).abs()
    numbers = products.flatten().topk(count).indices.numpy()
    return PairSet.from_numbers(numbers, tuple(products.shape))


def at_random(shape: tuple[int, int, int], count: int) -> PairSet:
    numbers = np.random.default_rng(0).choice(np.prod(shape), count, replace=False)
    return PairSet.from_numbers(numbers, shape)


def untrained_choices(bench: Bench, pool: ThreadPoolExecutor) -> dict[str, dict[str, float]]:
    """KL by the share of pairs kept, for each way to choose them."""
    found = bench.salient(max(SHARES))
    shape = found.pairs.shape
    choices = {
        "saliency": found.first,
        "weights": lambda count: by_weights(bench, count),
        "random": lambda count: at_random(shape, count),
    }
    held_out, total, curves = bench.held_out(bench.transcoder), np.prod(shape), {}
    for name, choose in choices.items():
        pairs = {f"{share:g}": choose(int(share * total)) for share in SHARES}
        curves[name] = {
            share: mask_kl(bench.transcoder, bench.layer, held_out, kept, pool) for share, kept in pairs.items()
        }
        print(name, curves[name], flush=True)
    return curves


def trained(
    bench: Bench, candidates: PairSet, salient: int, settings: dict[str, object], steps: int, pool: ThreadPoolExecutor
) -> dict[str, object]:
    began = time.perf_counter()
    trainer = bench.train_mask(candidates, MaskHyperparameters(dictionary="0" * 16, **settings), steps, pool)
    figures = settings | {"steps": steps, "seconds": time.perf_counter() - began}
    held_out = bench.held_out(trainer.transcoder)
    figures |= evaluate_mask(trainer.transcoder, bench.layer, held_out, trainer.kept, salient, pool)[0]
    print({name: figures[name] for name in (*settings, "pairs_share", "kl_masked", "kl", "seconds")}, flush=True)
    return figures


def masks(bench: Bench, pool: ThreadPoolExecutor) -> list[dict[str, object]]:
    found = bench.salient(CANDIDATE_SHARE)
    return [trained(bench, found.pairs, found.salient, settings, MASK_STEPS, pool) for settings in MASKS]


def joint(bench: Bench, pool: ThreadPoolExecutor) -> dict[str, object]:
    """Beside the dictionary that they began with, and that one trained on as many more tokens without a mask."""
    found = bench.salient(JOINT_CANDIDATE_SHARE)
    runs = [trained(bench, found.pairs, found.salient, settings, JOINT_STEPS, pool) for settings in JOINTS]
    figures: dict[str, object] = {"masks": runs}
    longer = Bench(bench.cache, FEATURES, TRAINING.tokens + EXTRA_TOKENS)
    for name, unmasked in (("kl_begun_with", bench), ("kl_unmasked_longer", longer)):
        figures[name] = unmasked_kl(unmasked.transcoder, unmasked.layer, unmasked.held_out(unmasked.transcoder))
    return figures


class DenseMask:
    """Every pair of every head in one tensor, as in the paper's code, exact for rotary embeddings.

    For one rotary frequency the score is (M ∘ A)·cos + (M ∘ B)·sin of the distance, A and B from two coordinates of the
    decoders each: 2 · d_head/2 dense products a head.
    """

    def __init__(self, transcoder: QKTranscoder, layer: AttentionLayer) -> None:
        self.transcoder, self.layer = transcoder, layer
        shape = (layer.geometry.n_heads, transcoder.query.features, transcoder.key.features)
        self.mask = torch.ones(shape, requires_grad=True)

    def kl(self, x: Tensor) -> Tensor:
        layer, geometry = self.layer, self.layer.geometry
        f_q, f_k = self.transcoder.query.encode(x), self.transcoder.key.encode(x)
        half, group = geometry.rotary_dim // 2, geometry.n_heads // geometry.n_kv_heads
        d = self.transcoder.query.W_dec.unflatten(-1, (-1, geometry.d_head)) * geometry.scale
        e = self.transcoder.key.W_dec.unflatten(-1, (-1, geometry.d_head))
        position = torch.arange(x.shape[1])
        angles = (position[:, None] - position[None, :])[..., None] * layer.inv_freq
        cos, sin = angles.cos(), angles.sin()
        bias = self._bias_scores(f_q, f_k)
        rows = []
        for head in range(geometry.n_heads):
            score = bias[:, head]
            for index in range(half):
                d1, d2 = d[:, head, index], d[:, head, index + half]
                e1, e2 = e[:, head // group, index], e[:, head // group, index + half]
                even, odd = torch.outer(d1, e1) + torch.outer(d2, e2), torch.outer(d1, e2) - torch.outer(d2, e1)
                score = score + cos[..., index] * (f_q @ (self.mask[head] * even) @ f_k.mT)
                score = score + sin[..., index] * (f_q @ (self.mask[head] * odd) @ f_k.mT)
            rows.append(score)
        log_p_hat = torch.stack(rows, 1).masked_fill(~layer.visible(x.shape[1]), float("-inf")).log_softmax(-1)
        log_p = layer.scores(*layer.project(x)).log_softmax(-1)
        return (log_p.exp() * (log_p - log_p_hat).masked_fill(log_p == float("-inf"), 0.0)).sum(-1).mean()

    @torch.no_grad()
    def _bias_scores(self, f_q: Tensor, f_k: Tensor) -> Tensor:
        layer, d_head = self.layer, self.layer.geometry.d_head
        q_hat, k_hat = self.transcoder.query.decode(f_q), self.transcoder.key.decode(f_k)
        b_q, b_k = self.transcoder.query.b_out.expand_as(q_hat), self.transcoder.key.b_out.expand_as(k_hat)

        def product(q: Tensor, k: Tensor) -> Tensor:
            q, k = (layer.rotate(y.unflatten(-1, (-1, d_head))).transpose(1, 2) for y in (q, k))
            return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * layer.geometry.scale

        return product(b_q, k_hat) + product(q_hat - b_q, b_k)


def speed(bench: Bench, pool: ThreadPoolExecutor) -> dict[str, float]:
    """Seconds per token of a step (loss and gradient) on 2 sequences, ours with the candidates it trains on."""
    x = bench.cache.read(LAYER, "train", [0, 1])
    codes = bench.codes("train", [0, 1])
    found = salient_pairs(bench.transcoder, bench.layer, bench.codes("train", list(range(16))), 94_372, THREADS)
    everything = PairSet.all(bench.transcoder, bench.layer.geometry.n_heads)
    dense = DenseMask(bench.transcoder, bench.layer)
    ones = np.ones(len(everything), np.float32)
    ours = mask_gradient(bench.transcoder, bench.layer, codes, everything, ones, pool)
    kl = dense.kl(x)
    kl.backward()
    apart = float((dense.mask.grad.flatten() - torch.from_numpy(ours.mask)).abs().max() / dense.mask.grad.abs().max())
    times: dict[str, list[float]] = {"dense": [], "candidates": [], "all_pairs": []}
    for _ in range(3):
        # all threads for it too: it has no loop over heads that a pool could take
        torch.set_num_threads(THREADS)
        began = time.perf_counter()
        dense.kl(x).backward()
        times["dense"].append(time.perf_counter() - began)
        torch.set_num_threads(1)
        for name, pairs in (("candidates", found.pairs), ("all_pairs", everything)):
            began = time.perf_counter()
            codes = bench.codes("train", [0, 1])
            mask_gradient(bench.transcoder, bench.layer, codes, pairs, np.ones(len(pairs), np.float32), pool)
            times[name].append(time.perf_counter() - began)
    seconds = {name: min(each) / (x.shape[0] * x.shape[1]) for name, each in times.items()}
    return {
        **{f"{name}_seconds_per_token": value for name, value in seconds.items()},
        "times_faster": seconds["dense"] / seconds["candidates"],
        "times_faster_all_pairs": seconds["dense"] / seconds["all_pairs"],
        "kl_difference": abs(kl.item() - ours.kl),
        "gradient_difference": apart,
    }


def large(bench: Bench, pool: ThreadPoolExecutor) -> dict[str, float]:
    """Saliency and steps of a mask among all pairs of a large dictionary; what they add to the peak of memory."""
    before, began = peak_bytes(), time.perf_counter()
    found = bench.salient(LARGE_CANDIDATE_SHARE)
    figures = {"pairs": int(np.prod(found.pairs.shape)), "candidates": len(found.pairs)}
    figures["saliency_seconds"] = time.perf_counter() - began
    figures["saliency_added_bytes"] = peak_bytes() - before
    began = time.perf_counter()
    settings = MaskHyperparameters(dictionary="0" * 16, pair_cost=1e-7, learning_rate=0.1)
    trainer = bench.train_mask(found.pairs, settings, LARGE_STEPS, pool)
    figures["step_seconds"] = (time.perf_counter() - began) / LARGE_STEPS
    held_out = bench.codes("validation", list(range(16)))
    figures["kl"] = mask_kl(bench.transcoder, bench.layer, held_out, found.pairs, pool)
    figures["kl_masked"] = mask_kl(bench.transcoder, bench.layer, held_out, trainer.kept, pool)
    return figures | {"kept": len(trainer.kept), "added_bytes": peak_bytes() - before, "peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """The most memory that this process had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["choices", "masks", "joint", "speed", "large"], help="one part")
    arguments = parser.parse_args()
    figures: dict[str, object] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        tokens = TRAINING.tokens + (EXTRA_TOKENS if arguments.only in (None, "joint") else 0)
        torch.set_num_threads(THREADS)
        cache = build_cache(load_smollm2(), [LAYER], TRAINING.model_copy(update={"tokens": tokens}), Path(folder))
        torch.set_num_threads(1)
        if arguments.only in (None, "choices", "masks", "joint"):
            bench = Bench(cache, FEATURES, TRAINING.tokens)
            for name, part in {"choices": untrained_choices, "masks": masks, "joint": joint}.items():
                if arguments.only in (None, name):
                    figures[name] = part(bench, pool)
        if arguments.only in (None, "speed"):
            figures["speed"] = speed(Bench(cache, 512, 100_000), pool)
        if arguments.only in (None, "large"):
            figures["large"] = large(Bench(cache, LARGE_FEATURES, 100_000), pool)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
