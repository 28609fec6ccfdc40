"""Does reviving dead features pay? TopK 16 with 1,024 and 4,096 features a side on layer 8 of SmolLM2, 410 k tokens.

    none      nothing is done
    redrawn   after each of the first five eighths, features that did not fire in the last 51 k tokens get new rows,
              drawn as at the start, and fresh optimiser moments (Bricken et al. 2023's resampling, in short)
    auxk      features that have not fired for 51 k tokens also learn the part of the true query (key) that the
              others miss (Gao et al. 2024's AuxK: 288 at a time, weight 1/32)

Two seeds each; half an hour on two cores. Dead is what never fires on the 200 validation sequences (25,400 tokens).
The last line of standard output is JSON: {"1024": {"none": {"kl": …, "dead_query": …, "dead_key": …}, …}, "4096": …}
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from smollm2 import build_cache, load_smollm2
from torch import Tensor, nn

from qkmodel.activations import ActivationCache
from qkmodel.attention import AttentionLayer
from qkmodel.configs import TrainingConfig
from qkmodel.evaluation import evaluate
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.member import Member, SharedBatch
from qkmodel.pack import PackTrainer
from qkmodel.reference import LayerReference, ensure_reference
from qkmodel.transcode import infer
from qkmodel.transcoder import Transcoder

LAYER, SIZES, SEEDS = 8, (1024, 4096), (0, 1)
LEARNING_RATE = 4e-3
TRAINING = TrainingConfig(tokens=410_000, batch_sequences=4, learning_rate_schedule="linear", cross_entropy_sequences=0)
# Steps without firing after which a feature counts as dead: an eighth of a training, 51,712 tokens.
WINDOW = 101
REVIVALS = 5
AUXILIARY_K, AUXILIARY_WEIGHT = 288, 1 / 32

World = tuple[AttentionLayer, ActivationCache, LayerReference]


class WatchedMember(Member):
    """A training that knows when each of its features last fired; `step` says which have not for `WINDOW` steps."""

    def __init__(self, hyperparameters: Hyperparameters, world: World) -> None:
        self.layer, _, self.reference = world
        super().__init__(hyperparameters, self.layer, self.reference, TRAINING)
        self.steps = 0
        self.last_fired = [torch.zeros(side.features, dtype=torch.int64) for side in self.sides]

    @property
    def sides(self) -> tuple[Transcoder, Transcoder]:
        return self.transcoder.query, self.transcoder.key

    def step(self, batch: SharedBatch, learning_rate_factor: float, progress: float) -> None:
        self.steps += 1
        x = (batch.inputs.x + self.reference.mean_input).unflatten(0, (-1, batch.inputs.context))
        for index, side in enumerate(self.sides):
            fired = torch.from_numpy(infer(side, x)[1] > 0)
            self.last_fired[index][fired] = self.steps
        self.prepare(x)
        super().step(batch, learning_rate_factor, progress)

    def prepare(self, x: Tensor) -> None:
        """What happens before a step; gradients left by it are added to the step's."""

    def dead(self, index: int) -> Tensor:
        return (self.steps - self.last_fired[index] >= WINDOW).nonzero().flatten()


class RedrawnMember(WatchedMember):
    @torch.no_grad()
    def prepare(self, x: Tensor) -> None:
        if self.steps % WINDOW or self.steps > REVIVALS * WINDOW:
            return
        fresh = Member(
            self.hyperparameters.model_copy(update={"seed": 1000 + self.steps}), self.layer, self.reference, TRAINING
        ).transcoder
        for index, (side, new) in enumerate(zip(self.sides, (fresh.query, fresh.key), strict=True)):
            rows, alive = self.dead(index), self.steps - self.last_fired[index] < WINDOW
            side.W_enc[rows] = new.W_enc[rows] * side.W_enc[alive].norm(dim=-1).mean()
            side.W_dec[rows] = new.W_dec[rows]
            side.b_enc[rows] = side.b_enc[alive].mean()
            for parameter in (side.W_enc, side.W_dec, side.b_enc):
                for moment in ("exp_avg", "exp_avg_sq"):
                    self.optimiser.state[parameter][moment][rows] = 0.0


class AuxiliaryMember(WatchedMember):
    def prepare(self, x: Tensor) -> None:
        with torch.no_grad():
            true = [heads.flatten(-2) for heads in self.layer.project(x)]
        for index, side in enumerate(self.sides):
            rows = self.dead(index)
            if len(rows) == 0:
                continue
            missed = true[index] - infer(side, x)[0]
            pre = nn.functional.linear(x - side.b_pre, side.W_enc[rows], side.b_enc[rows])
            kept = pre.topk(min(AUXILIARY_K, len(rows)), dim=-1)
            f = torch.zeros_like(pre).scatter(-1, kept.indices, torch.relu(kept.values))
            error = (f @ side.W_dec[rows] - missed).square().mean() / missed.square().mean()
            (AUXILIARY_WEIGHT * error).backward()


METHODS: dict[str, Callable[[Hyperparameters, World], Member]] = {
    "none": lambda hyperparameters, world: Member(hyperparameters, world[0], world[2], TRAINING),
    "redrawn": RedrawnMember,
    "auxk": AuxiliaryMember,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cache", type=Path, help="keep the activation cache in this folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dead-features-") as folder:
        model = load_smollm2()
        cache = build_cache(model, [LAYER], TRAINING, arguments.cache or Path(folder))
        layer, reference = ensure_reference(cache, LAYER, TRAINING, lambda: model)
        del model
        torch.set_num_threads(1)
        world = layer, cache, reference
        print(json.dumps({str(size): compare(size, world, arguments.threads) for size in SIZES}))


def compare(size: int, world: World, threads: int) -> dict[str, dict[str, float]]:
    """Means over seeds of each method's figures, all trained in one pack."""
    layer, cache, reference = world
    pack = PackTrainer([], layer, cache, reference, TRAINING, 0, threads)
    kinds = [(name, seed) for name in METHODS for seed in SEEDS]
    for name, seed in kinds:
        hyperparameters = Hyperparameters(
            dictionary_size=size, activation="topk", k=16, learning_rate=LEARNING_RATE, seed=seed
        )
        pack.members.append(METHODS[name](hyperparameters, world))
    pack.train(pack.steps_planned)
    transcoders = [member.transcoder for member in pack.members]
    metrics = evaluate(transcoders, layer, cache, reference, TRAINING.validation_sequences, threads)
    figures: dict[str, dict[str, float]] = {}
    for name in METHODS:
        of_seeds = [one for (kind, _), one in zip(kinds, metrics, strict=True) if kind == name]
        figures[name] = {
            metric: round(sum(one[metric] for one in of_seeds) / len(of_seeds), 4)
            for metric in ("kl", "top1", "dead_query", "dead_key")
        }
        print(f"{size} features, {name}: {figures[name]}", flush=True)
    return figures


if __name__ == "__main__":
    main()
