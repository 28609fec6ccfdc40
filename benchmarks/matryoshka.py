"""Do Matryoshka prefixes pay? One training with three nested dictionaries against one training for each of them.

The nested one (Bussmann et al. 2025, with TopK): TopK 16 over 1,024 features a side; the loss is the mean of the
pattern losses of the first 256, the first 512 and all features. Each prefix is compared with a dictionary of its own
that has as many features and as many of them active; layer 8 of SmolLM2, 410 k tokens each, two seeds. Five minutes.
`cost` is thread-seconds against those of the plain trainings together, in one run. The last line is JSON:

    {"prefixes": {"256": {"l0": …, "kl": …, "own_kl": …}, …}, "cost": …}
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from smollm2 import build_cache, load_smollm2
from torch import nn

from qkmodel.configs import TrainingConfig
from qkmodel.evaluation import evaluate
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.member import Member, SharedBatch
from qkmodel.pack import PackTrainer
from qkmodel.pattern_kl import pattern_kl
from qkmodel.reference import ensure_reference
from qkmodel.transcoder import QKTranscoder

LAYER, PREFIXES, K, SEEDS = 8, (256, 512, 1024), 16, (0, 1)
TRAINING = TrainingConfig(tokens=410_000, batch_sequences=4, learning_rate_schedule="linear", cross_entropy_sequences=0)


class NestedMember(Member):
    """A training whose prefixes are trained to be dictionaries, too."""

    def step(self, batch: SharedBatch, learning_rate_factor: float, progress: float) -> None:
        sides = (self.transcoder.query, self.transcoder.key)
        codes = [side.activation(nn.functional.linear(batch.inputs.x, side.W_enc, side.b_enc)) for side in sides]
        loss = torch.zeros(())
        for prefix in PREFIXES:
            q_hat, k_hat = (
                (f[:, :prefix] @ side.W_dec[:prefix] + side.b_out).view(-1, batch.inputs.context, heads, self.d_head)
                for f, side, heads in zip(codes, sides, (9, 3), strict=True)
            )
            loss = loss + pattern_kl(q_hat, k_hat, batch.true).total / len(PREFIXES)
        loss.backward()
        for group in self.optimiser.param_groups:
            group["lr"] = self.hyperparameters.learning_rate * learning_rate_factor
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def prefix(self, features: int) -> QKTranscoder:
        """The dictionary of the first features: the others write nothing."""
        cut = copy.deepcopy(self.transcoder).requires_grad_(False)
        for side in (cut.query, cut.key):
            side.W_dec[features:] = 0.0
        return cut

    @torch.no_grad()
    def prefix_l0(self, x: torch.Tensor, features: int) -> float:
        sides = (self.transcoder.query, self.transcoder.key)
        return sum(float((side.encode(x)[:, 1:, :features] > 0).sum(-1).float().mean()) for side in sides) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cache", type=Path, help="keep the activation cache in this folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="matryoshka-") as folder:
        model = load_smollm2()
        cache = build_cache(model, [LAYER], TRAINING, arguments.cache or Path(folder))
        layer, reference = ensure_reference(cache, LAYER, TRAINING, lambda: model)
        del model
        torch.set_num_threads(1)
        sequences = TRAINING.validation_sequences

        def train(members: Sequence[Member]) -> float:
            pack = PackTrainer([], layer, cache, reference, TRAINING, 0, arguments.threads)
            pack.members = list(members)
            started = time.perf_counter()
            pack.train(pack.steps_planned)
            return time.perf_counter() - started

        def kl(transcoders: Sequence[QKTranscoder]) -> float:
            metrics = evaluate(transcoders, layer, cache, reference, sequences, arguments.threads)
            return round(sum(one["kl"] for one in metrics) / len(metrics), 4)

        def of(size: int, k: int, seed: int) -> Hyperparameters:
            return Hyperparameters(dictionary_size=size, activation="topk", k=k, learning_rate=6e-3, seed=seed)

        nested = [NestedMember(of(max(PREFIXES), K, seed), layer, reference, TRAINING) for seed in SEEDS]
        nested_seconds = train(nested)
        x = cache.read(LAYER, "validation", range(sequences))
        l0 = {size: sum(one.prefix_l0(x, size) for one in nested) / len(nested) for size in PREFIXES}
        own = {
            size: [Member(of(size, max(1, round(l0[size])), seed), layer, reference, TRAINING) for seed in SEEDS]
            for size in PREFIXES
        }
        own_seconds = train([member for members in own.values() for member in members])
        prefixes = {
            str(size): {
                "l0": round(l0[size], 2),
                "kl": kl([member.prefix(size) for member in nested]),
                "own_k": max(1, round(l0[size])),
                "own_kl": kl([member.transcoder for member in own[size]]),
            }
            for size in PREFIXES
        }
    for size, figures in prefixes.items():
        print(f"first {size} features: {figures}", flush=True)
    print(json.dumps({"prefixes": prefixes, "cost": round(nested_seconds / own_seconds, 2)}))


if __name__ == "__main__":
    main()
