"""What the driver costs: 2,000 trainings that train nothing, beside as many trials of plain Ray Tune.

`run_sweep` is run as it stands, with real Ray, ledger, searches, halving, live table and, where the case says so,
MLflow; only a pack's training and what would be prepared for it are made up. A pack reports what a real one reports and
writes a checkpoint, an empty one, where the queue looks for it. Plain Tune runs trials that answer as often as a whole
training reports; a second run of it answers once a trial, and is what halved searches are compared with, since they
end most trainings early. About half an hour on an idle machine; `--only CASE` runs one
(the last line of --help lists them).

Every case and every plain run has a process of its own, beginning with the start of Ray. The last line of standard
output is JSON, seconds throughout:

    {"trainings": …, "plain": {"plain-8": {"seconds": per trial, "cpu": of the driver's process, "memory": as
       below}, "plain-1": …},
     "cases": {case: {"seconds": per training, "overhead": that less plain Tune's, "ratio": that by plain Tune's, "cpu":
       per training of the driver's process, "cpu_overhead": that less plain Tune's,
       "quarters": [per training in each quarter], "search": per training in samplers, "queue": per training in the
       queue and the ledger, "memory": [MB of the driver when each quarter had begun], "ledger_mb": …, "states": {…},
       "status": …, "fronts": …, "plan": to plan the next start}}}
"""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import psutil
import torch
from ray import tune
from rich.console import Console

from orchestrator import packs_on_ray, sweep
from orchestrator.checkpoints import checkpoint_path
from orchestrator.config import SweepConfig
from orchestrator.ledger import Ledger
from orchestrator.ledger_file import LEDGER_FILE
from orchestrator.pack_order import MemberOrder, MemberReport, PackOrder, dictionary_path
from orchestrator.pack_queue import PackQueue
from orchestrator.plan import SweepPlan, make_plan
from orchestrator.preparation import Preparation
from orchestrator.ray_connection import connected_ray
from orchestrator.search.study import StudySearch
from orchestrator.status import fronts_record, status_record
from orchestrator.terminal import TerminalView
from qkmodel.activations import ActivationCache, Manifest
from qkmodel.pack import CheckpointHeader
from qkmodel.reference import LayerReference
from qkmodel.tensor_file import write_tensor_file

TRAININGS = 2_000
STEPS, TOKENS_PER_STEP, REPORTS = 180, 1_024, 8
KL_BASELINE, HEADS = 3.0, 9
MEGABYTE = 2**20

RATE = {"low": 1e-3, "high": 3e-2, "log": True}
SIZES = {"low": 256, "high": 2048, "log": True}
BATCHTOPK = {
    "dictionary_size": SIZES,
    "activation": "batchtopk",
    "k": {"low": 4, "high": 64, "log": True},
    "learning_rate": RATE,
}
RELU = {
    "dictionary_size": SIZES,
    "activation": "relu",
    "penalty": "tanh",
    "sparsity_coefficient": {"low": 3e-3, "high": 1e-1, "log": True},
    "learning_rate": RATE,
}


@dataclass(frozen=True)
class Case:
    """One sweep: how many trainings a pack holds, and what of the driver takes part."""

    sampler: str
    pack: int
    layers: int = 1
    allocation: str = "even"
    tracked: bool = False
    alternatives: int = 2


CASES = {
    "grid-1": Case("grid", 1),
    "grid-16": Case("grid", 16),
    "random-1": Case("random", 1),
    "random-16": Case("random", 16),
    # lists and ranges of two kinds of training: TPE
    "auto-16": Case("auto", 16),
    # one kind: NSGA-II from 1,000 trainings
    "nsga2-16": Case("auto", 16, alternatives=1),
    "progress-16": Case("random", 16, layers=2, allocation="by_progress"),
    "random-16-mlflow": Case("random", 16, tracked=True),
}
PLAIN = {"plain-8": REPORTS, "plain-1": 1}


def config(case: Case, trainings: int, storage: Path) -> SweepConfig:
    per_layer = trainings // case.layers
    spaces: list[dict[str, Any]] = [BATCHTOPK, RELU][: case.alternatives]
    if case.sampler == "grid":
        lists = {"dictionary_size": [256, 512, 1024, 2048], "k": [4, 8, 16, 32, 64]}
        seeds = list(range(-(-per_layer // 100)))
        spaces = [BATCHTOPK | lists | {"learning_rate": RATE | {"points": 5}, "seed": seeds}]
    return SweepConfig.model_validate(
        {
            "name": "scale",
            "model": "smollm2-135m",
            "layers": [8, 20][: case.layers],
            "corpus": {"name": "sotu", "context": 128, "bos": None},
            "training": {
                "tokens": STEPS * TOKENS_PER_STEP,
                "batch_sequences": TOKENS_PER_STEP // 128,
                "validation_sequences": 64,
                "cross_entropy_sequences": 0,
            },
            "search": {
                "sampler": case.sampler,
                "trainings": per_layer,
                "space": spaces,
                "layer_allocation": case.allocation,
            },
            "pack": case.pack,
            "resources": {"pack": {"cpu": 1}},
            "storage": str(storage),
        }
    )


class UntrainedPack(tune.Trainable):
    """A `PackTrainable` whose trainings are a formula."""

    def setup(self, config: dict[str, Any]) -> None:
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._order = PackOrder.model_validate_json(new_config["order"])
        self._steps = self._order.steps_done
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        return {}

    def step(self) -> dict[str, Any]:
        interval = round(STEPS / REPORTS)
        self._steps = min(self._steps + interval - self._steps % interval, self._order.last_step)
        is_over = self._steps >= self._order.last_step
        reports = [self._report(member, is_over).model_dump() for member in self._order.members]
        return {"reports": reports, "error": None, "done": is_over}

    def _report(self, member: MemberOrder, is_over: bool) -> MemberReport:
        order, name = self._order, member.training_id
        report = MemberReport(training_id=name, tokens=self._steps * TOKENS_PER_STEP, seconds=0.01, metrics={})
        metrics = made_up_metrics(member, self._steps)
        if self._steps < STEPS:
            progress = {key: metrics[key] for key in ("kl", "kl_recovered", "l0")} | {"loss": 1.0, "loss_kl": 1.0}
            if is_over:
                path = checkpoint_path(order.sweep_folder, order.start, name, self._steps)
                path.parent.mkdir(parents=True, exist_ok=True)
                header = CheckpointHeader(training_id=name, steps_done=self._steps, progress=progress)
                write_tensor_file(path, header, {})
            return report.model_copy(update={"metrics": progress})
        where = dictionary_path(order.start, name)
        (order.sweep_folder / where).mkdir(parents=True)
        (order.sweep_folder / where / "config.json").write_text(json.dumps(metrics))
        return report.model_copy(
            update={"metrics": metrics, "dictionary": str(where), "dictionary_sha256": hashlib.sha256().hexdigest()}
        )


def made_up_metrics(member: MemberOrder, steps: int) -> dict[str, float]:
    """All metrics of an evaluation: a trade-off between kl and l0, and chance that the training's id decides."""
    values = member.hyperparameters
    chance = int(member.training_id[:8], 16) / 2**32
    l0 = float(values.k or 4 * values.sparsity_coefficient**-0.7) * (1 + 0.1 * chance)
    kl = (1 + chance) * (2.0 - steps / STEPS) * (4 / l0) ** 0.5 * (512 / values.dictionary_size) ** 0.1
    names = ("kl_no_bos", "kl_query", "kl_key", "kl_query_no_bos", "kl_key_no_bos", "top1", "top1_no_bos", "max_error")
    names += ("l0_query", "l0_key", "dead_query", "dead_key", "dense_query", "dense_key", "kl_recovered_no_bos")
    rest = {name: chance for name in (*names, *(f"kl_head_{head:02d}" for head in range(HEADS)))}
    return {"kl": kl / 2, "kl_recovered": 1 - kl / 2 / KL_BASELINE, "l0": l0, **rest}


class PlainTrial(tune.Trainable):
    """What a pack of one training comes to for Tune itself."""

    def setup(self, config: dict[str, Any]) -> None:
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._left = new_config["reports"]
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        return {}

    def step(self) -> dict[str, Any]:
        self._left -= 1
        return {"kl": 1.0, "done": self._left == 0}


class CountTrials(tune.Callback):
    """Tells a clock of every trial that has ended."""

    def __init__(self, clock: "Clock") -> None:
        self._clock = clock

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._clock.count()


def run_plain(reports: int, trainings: int) -> dict[str, Any]:
    """What a trial of plain Tune takes, with the settings of `train_packs`, two trials at once."""
    os.environ |= packs_on_ray._ENVIRONMENT
    clock = Clock(trainings)
    began, cpu = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as folder, connected_ray():
        tune.Tuner(
            tune.with_resources(PlainTrial, {"cpu": 1}),
            param_space={"reports": reports, "x": tune.uniform(0, 1)},
            tune_config=tune.TuneConfig(num_samples=trainings, max_concurrent_trials=2, reuse_actors=True),
            run_config=tune.RunConfig(name="plain", storage_path=folder, verbose=0, callbacks=[CountTrials(clock)]),
        ).fit()
    figures = {"seconds": time.monotonic() - began, "cpu": time.process_time() - cpu}
    return {name: value / trainings for name, value in figures.items()} | {"memory": clock.megabytes}


class Clock:
    """Seconds in the queue and in the search, and what it was when each quarter of the trainings had begun."""

    def __init__(self, trainings: int) -> None:
        self._marks = [round(trainings * share / 4) for share in (1, 2, 3, 4)]
        self.asked = 0
        self.search = 0.0
        self.queue = 0.0
        self.moments = [time.monotonic()]
        self.megabytes: list[int] = []

    def count(self) -> None:
        self.asked += 1
        if self.asked in self._marks:
            self.moments.append(time.monotonic())
            self.megabytes.append(round(psutil.Process().memory_info().rss / MEGABYTE))

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, what, getattr(self, what) + time.perf_counter() - began)


def clocked(clock: Clock) -> tuple[type[StudySearch], type[PackQueue]]:
    """The search and the queue as they are, timed."""

    class ClockedSearch(StudySearch):
        def ask(self) -> dict[str, Any] | None:
            with clock.timed("search"):
                proposal = super().ask()
            if proposal is not None:
                clock.count()
            return proposal

        def tell(self, *arguments: Any) -> None:
            with clock.timed("search"):
                super().tell(*arguments)

    class ClockedQueue(PackQueue):
        def next_pack(self) -> Any:
            with clock.timed("queue"):
                return super().next_pack()

        def record(self, *arguments: Any) -> None:
            with clock.timed("queue"):
                super().record(*arguments)

        def end(self, *arguments: Any) -> None:
            with clock.timed("queue"):
                super().end(*arguments)

    return ClockedSearch, ClockedQueue


def prepared(plan: SweepPlan) -> Preparation:
    """What packs of formulas need prepared: figures to be compared with."""
    nothing = torch.zeros(0)
    reference = LayerReference(nothing, nothing, nothing, 1.0, KL_BASELINE, KL_BASELINE, 1e-4, None, None)
    cache = ActivationCache(plan.cache_root, Manifest.empty(plan.cache_key))
    layers = plan.config.layers
    return Preparation(cache, False, dict.fromkeys(layers, reference), dict.fromkeys(layers, plan.cache_root), {})


def run_case(case: Case, trainings: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as replaced:
        settings = config(case, trainings, Path(folder))
        clock = Clock(trainings)
        search, queue = clocked(clock)
        replaced.enter_context(patch.object(packs_on_ray, "PackTrainable", UntrainedPack))
        for name, stand_in in {
            "StudySearch": search,
            "PackQueue": queue,
            "check_plan": lambda plan, say: SimpleNamespace(plan=plan, measured=None),
            "prepare": lambda checked, say, progress: prepared(checked.plan),
        }.items():
            replaced.enter_context(patch.object(sweep, name, stand_in))
        if not case.tracked:
            replaced.enter_context(patch.object(sweep.Tracker, "deliver"))
        plan = make_plan(settings)
        began, cpu = time.monotonic(), time.process_time()
        with (
            open(os.devnull, "w") as nowhere,
            TerminalView(Console(file=nowhere, force_terminal=True, width=120)) as view,
        ):
            outcome = sweep.run_sweep(plan, view)
        seconds, cpu = time.monotonic() - began, time.process_time() - cpu
        if outcome.tracking_error is not None:
            raise RuntimeError(outcome.tracking_error)
        quarters = [later - earlier for earlier, later in zip(clock.moments, clock.moments[1:], strict=False)]
        return {
            "seconds": seconds / trainings,
            "cpu": cpu / trainings,
            "quarters": [quarter / (trainings / 4) for quarter in quarters],
            "search": clock.search / trainings,
            "queue": (clock.queue - clock.search) / trainings,
            "memory": clock.megabytes,
            **afterwards(plan, outcome.ledger),
        }


def afterwards(plan: SweepPlan, ledger: Ledger) -> dict[str, Any]:
    """The finished ledger, and how long it takes to answer."""
    found = {}
    for name, ask in {
        "status": lambda: status_record(ledger),
        "fronts": lambda: fronts_record(ledger),
        "plan": lambda: make_plan(plan.config),
    }.items():
        began = time.monotonic()
        ask()
        found[name] = time.monotonic() - began
    states = {state: count for state, count in ledger.counts().items() if count}
    return found | {"ledger_mb": round((ledger.folder / LEDGER_FILE).stat().st_size / MEGABYTE), "states": states}


def in_own_process(name: str, trainings: int) -> Any:
    command = [sys.executable, __file__, "--only", name, "--trainings", str(trainings)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(f"{name:18}", output.strip().splitlines()[-1], flush=True)
    return json.loads(output.strip().splitlines()[-1])


def run_one(name: str, trainings: int) -> Any:
    if name in PLAIN:
        return run_plain(PLAIN[name], trainings)
    return run_case(CASES[name], trainings)


def beside_plain(name: str, figures: dict[str, Any], plain: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A grid trains everything to its end, the others are halved."""
    yardstick = plain["plain-8" if CASES[name].sampler == "grid" else "plain-1"]
    return {
        **figures,
        "overhead": figures["seconds"] - yardstick["seconds"],
        "cpu_overhead": figures["cpu"] - yardstick["cpu"],
        "ratio": figures["seconds"] / yardstick["seconds"],
    }


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=" ".join([*PLAIN, *CASES]))
    parser.add_argument("--trainings", type=int, default=TRAININGS)
    parser.add_argument("--only", metavar="CASE", choices=[*PLAIN, *CASES], help="run one case alone, compare nothing")
    arguments = parser.parse_args()
    logging.getLogger("orchestrator").setLevel(logging.ERROR)
    if arguments.only is not None:
        print(json.dumps(rounded(run_one(arguments.only, arguments.trainings))))
        return
    plain = {name: in_own_process(name, arguments.trainings) for name in PLAIN}
    cases = {name: beside_plain(name, in_own_process(name, arguments.trainings), plain) for name in CASES}
    print(json.dumps({"trainings": arguments.trainings, "plain": plain, "cases": rounded(cases)}))


if __name__ == "__main__":
    main()
