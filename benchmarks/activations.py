"""Which activation reconstructs patterns best with 16 active features: the table "Activations" of the README.

Layers 8 and 20 of SmolLM2, 1,024 features a side, 410 k tokens, batches of 4 sequences, learning rate falling over the
second half. Every activation is trained at each learning rate of a small grid with its dial (a target l0 or a
coefficient) turned until the held-out l0 is 16 ± 1; at the best of them two more seeds follow, each settled likewise.
About an hour on two cores. The last line of standard output is JSON:

    {"8": {"topk": {"kl": median of three seeds, "top1": …, "dead": share over `window` tokens, "l0": …,
                    "learning_rate": …, "dial": …, "tried": {…}}, …}, "20": …, "window": …}
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from smollm2 import build_cache, load_smollm2

from qkmodel.activations import ActivationCache
from qkmodel.attention import AttentionLayer
from qkmodel.configs import TrainingConfig
from qkmodel.evaluation import evaluate
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.pack import PackTrainer
from qkmodel.reference import LayerReference, ensure_reference

L0, TOLERANCE = 16.0, 1.0
# How often a dial is turned before a training counts as one that does not reach the wanted l0.
LARGEST_ROUNDS = 6
TRAINING = TrainingConfig(tokens=410_000, batch_sequences=4, learning_rate_schedule="linear", cross_entropy_sequences=0)


@dataclass(frozen=True)
class Contender:
    """An activation, the hyperparameter that its l0 depends on, where that starts, and l0's power of it.

    `learning_rates` are wide enough for the best one to lie inside.
    """

    fixed: Mapping[str, Any]
    dial: str
    start: float
    power: float
    learning_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3, 1.6e-2)


CONTENDERS = {
    "topk": Contender({"activation": "topk"}, "k", 16, 1),
    "batchtopk": Contender({"activation": "batchtopk"}, "k", 16, 1),
    # thresholds move slowly: at lower rates no coefficient brings them far enough
    "jumprelu": Contender({"activation": "jumprelu"}, "sparsity_coefficient", 5e-3, -1, (4e-3, 8e-3, 1.6e-2, 3.2e-2)),
} | {
    f"relu {penalty}": Contender(
        {"activation": "relu", "penalty": penalty}, "target_l0", 16, 1, (8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
    )
    for penalty in ("l1", "sqrt", "tanh", "p_annealing")
}


@dataclass(frozen=True)
class Run:
    """One training of a contender; `metrics` once it has been trained."""

    name: str
    learning_rate: float
    seed: int
    dial: float
    metrics: Mapping[str, float] | None = None

    @property
    def settled(self) -> bool:
        return self.metrics is not None and abs(self.metrics["l0"] - L0) <= TOLERANCE

    def hyperparameters(self) -> Hyperparameters:
        contender = CONTENDERS[self.name]
        dial = round(self.dial) if contender.dial == "k" else self.dial
        return Hyperparameters(
            dictionary_size=1024,
            learning_rate=self.learning_rate,
            seed=self.seed,
            **contender.fixed,
            **{contender.dial: dial},
        )

    def turned(self) -> "Run":
        """The same with its dial where a power law from its last l0 wants it."""
        if self.metrics is None:
            return self
        factor = (L0 / max(self.metrics["l0"], 0.1)) ** (1 / CONTENDERS[self.name].power)
        return replace(self, dial=self.dial * min(8.0, max(1 / 8, factor)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 20])
    parser.add_argument("--activations", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cache", type=Path, help="keep the activation cache in this folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="activations-") as folder:
        model = load_smollm2()
        cache = build_cache(model, arguments.layers, TRAINING, arguments.cache or Path(folder))
        opened = {layer: ensure_reference(cache, layer, TRAINING, lambda: model) for layer in arguments.layers}
        del model
        torch.set_num_threads(1)
        found = {
            str(layer): compare(
                arguments.activations, lambda runs, at=at: train(runs, cache, *at, arguments.threads), f"layer {layer}"
            )
            for layer, at in opened.items()
        }
    print(json.dumps(found | {"window": TRAINING.validation_sequences * (cache.context - 1)}))


def compare(
    names: Sequence[str], train_all: Callable[[Sequence[Run]], list[Run]], where: str
) -> dict[str, dict[str, Any]]:
    """Each contender's figures at its best learning rate."""
    contenders = {name: CONTENDERS[name] for name in names}
    first = [Run(name, rate, 0, one.start) for name, one in contenders.items() for rate in one.learning_rates]
    tried = settle(first, train_all)
    best = {
        name: min((run for run in tried if run.name == name and run.settled), key=lambda run: run.metrics["kl"])
        for name in contenders
        if any(run.name == name and run.settled for run in tried)
    }
    further = settle([replace(run, seed=seed, metrics=None) for run in best.values() for seed in (1, 2)], train_all)
    table = {}
    for name, first in best.items():
        seeds = [first, *(run for run in further if run.name == name and run.settled)]
        table[name] = {
            metric: round(median(run.metrics[metric] for run in seeds), 4) for metric in ("kl", "top1", "l0")
        } | {
            "dead": round(median((run.metrics["dead_query"] + run.metrics["dead_key"]) / 2 for run in seeds), 4),
            "seeds": len(seeds),
            "learning_rate": first.learning_rate,
            "dial": first.dial,
            "tried": {
                f"{run.learning_rate:g}": round(run.metrics["kl"], 4) if run.settled else None
                for run in tried
                if run.name == name
            },
        }
        say(f"{where}: {name} {table[name]}")
    return table


def settle(runs: list[Run], train_all: Callable[[Sequence[Run]], list[Run]]) -> list[Run]:
    """Trains all, and again with turned dials those whose l0 is not the wanted one."""
    done: list[Run] = []
    for _ in range(LARGEST_ROUNDS):
        trained = train_all([run.turned() for run in runs])
        done += [run for run in trained if run.settled]
        runs = [run for run in trained if not run.settled]
        if not runs:
            break
    return done + runs


def train(
    runs: Sequence[Run], cache: ActivationCache, layer: AttentionLayer, reference: LayerReference, threads: int
) -> list[Run]:
    """All of these in one pack, to the end."""
    pack = PackTrainer([run.hyperparameters() for run in runs], layer, cache, reference, TRAINING, 0, threads)
    pack.train(pack.steps_planned)
    transcoders = [member.transcoder for member in pack.members]
    metrics = evaluate(transcoders, layer, cache, reference, TRAINING.validation_sequences, threads)
    trained = [replace(run, metrics=one) for run, one in zip(runs, metrics, strict=True)]
    for run in trained:
        say(
            f"  {run.name} learning rate {run.learning_rate:g} seed {run.seed} "
            f"{CONTENDERS[run.name].dial} {run.dial:.4g}: l0 {run.metrics['l0']:.2f} kl {run.metrics['kl']:.4f}"
        )
    return trained


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
