"""What callers get of a ledger: the sweep, its studies, trainings, reports and decisions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from orchestrator.objectives import OBJECTIVES, Objectives
from qkmodel.tasks import Task, task_of

State = Literal["open", "running", "finished", "stopped", "failed"]
STATES: tuple[State, ...] = ("open", "running", "finished", "stopped", "failed")
# of metrics of single heads
HEAD_PREFIXES = ("kl_head_", "pairs_head_")


class Unreadable(ValueError):
    """A row that no program of this version wrote."""


@dataclass(frozen=True)
class SweepRecord:
    """`config` is the resolved sweep file, passwords redacted; `versions` maps package to version.

    `attempt` counts how often everything was begun afresh; `facts` describe the latest start: `machine` and `plan`.
    """

    name: str
    attempt: int
    config: dict[str, Any]
    git_sha: str | None
    versions: dict[str, str]
    facts: dict[str, dict[str, Any]]
    created: datetime

    @property
    def run_tag(self) -> str:
        """Tells its parent run in MLflow from those of sweeps of the same name: in another storage, or begun afresh."""
        return f"{self.name} {self.created.isoformat()}"


@dataclass(frozen=True)
class Study:
    """`identity` is what its trainings have in common; `reference` what they are measured against.

    `model` and `corpus` are the names in the sweep file, for people. `tokens_planned` is how many tokens its trainings
    will have seen when the sweep is done, as of its latest start; None when that start did not ask for this study.
    `constraints` maps a metric to its least and its largest value, either None: points outside are on no front.
    """

    study_id: str
    task: str
    layer: int
    model: str
    corpus: str
    identity: dict[str, Any]
    reference: dict[str, float | None]
    tokens_planned: int | None
    constraints: dict[str, tuple[float | None, float | None]]
    created: datetime

    @property
    def is_current(self) -> bool:
        """Whether the latest start of the sweep asked for it."""
        return self.tokens_planned is not None

    @property
    def reference_point(self) -> tuple[float, float]:
        """(cap of l0 or of pairs, kl_baseline), up to which hypervolumes count.

        Raises Unreadable where nobody recorded it.
        """
        cap = OBJECTIVES[self.task].cap if self.task in OBJECTIVES else ""
        values = [self.reference.get(name) for name in (cap, "kl_baseline")]
        if not all(isinstance(value, int | float) and math.isfinite(value) and value > 0 for value in values):
            raise Unreadable(f"study {self.study_id}: its reference cannot be read")
        return values[0], values[1]


@dataclass(frozen=True)
class Training:
    """One training as it stands. `metrics` are the final ones: empty until finished, None where undefined.

    `number` counts from 0 within the study, in the order of asking. `attempts` counts the packs that took it up and
    `failures` those that died with it since it was last put back; `seconds` of training so far, over all of them.
    `dictionary` is a path relative to the sweep's folder. `constraints` are its study's. Times are UTC.
    """

    training_id: str
    study_id: str
    layer: int
    number: int
    state: State
    hyperparameters: dict[str, Any]
    tokens_done: int
    tokens_planned: int
    metrics: dict[str, float | None]
    dictionary: str | None
    dictionary_sha256: str | None
    error: str | None
    pack: str | None
    seconds: float
    attempts: int
    failures: int
    machine: dict[str, Any]
    constraints: dict[str, tuple[float | None, float | None]]
    created: datetime
    started: datetime | None
    finished: datetime | None

    @property
    def task(self) -> Task:
        return task_of(self.hyperparameters)

    @property
    def objectives(self) -> Objectives:
        return OBJECTIVES[self.task]

    @property
    def family(self) -> str:
        """Trainings whose l0 behaves alike: topk, relu-l1, relu-sqrt, …; of masks: sqrt, sqrt-joint, …"""
        if self.task == "pair_mask":
            along = [name for name in ("joint", "encoders") if self.hyperparameters[name]]
            return "-".join([self.hyperparameters["form"], *along])
        parts = (self.hyperparameters.get("activation"), self.hyperparameters.get("penalty"))
        return "-".join(str(part) for part in parts if part is not None)

    @property
    def label(self) -> str:
        """A name for people: `L08 topk16 d1024 lr3e-3 s0`, `L04 relu-l1 d512 λ1e-3 lr3e-3 s0`.

        What the key side has of its own stands behind a slash: `L08 topk16/8 d1024/512 lr3e-3 s0`. A mask's:
        `L08 sqrt-joint of 0123abcd cost2e-7 lr0.03 s0`.
        """
        values = {name: _short(value) for name, value in self.hyperparameters.items() if value is not None}
        for name in [name for name in values if name.startswith("key_")]:
            values[name.removeprefix("key_")] += f"/{values.pop(name)}"
        parts = [f"L{self.layer:02d}", f"{self.family}{values.get('k', '')}"]
        if self.task == "pair_mask":
            parts.append(f"of {values['dictionary'][:8]}")
        for symbol, name in _SYMBOLS.items():
            if name in values:
                parts.append(f"{symbol}{values[name]}")
        return " ".join(parts)


_SYMBOLS = {
    "d": "dictionary_size",
    "λ": "sparsity_coefficient",
    "l0=": "target_l0",
    "cost": "pair_cost",
    "lr": "learning_rate",
    "s": "seed",
}


def _short(value: Any) -> str:
    """Small numbers as 3e-3, others as they are."""
    if not isinstance(value, float) or value == 0 or 0.1 <= abs(value) < 1e4:
        return f"{value:g}" if isinstance(value, float) else str(value)
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


@dataclass(frozen=True)
class Report:
    """One value on the way. `report_id` grows in the order of recording."""

    report_id: int
    tokens: int
    name: str
    value: float | None
    recorded: datetime


@dataclass(frozen=True)
class Decision:
    """What was decided about one training at a rung, and why.

    Those that asked together share `number`, which counts a study's decisions. Of the `arrived` trainings of the
    family that had reached the rung, this one was in place `rank` (0 is best). `expected` is the (kl, l0) that a
    stopped one would have ended at by extrapolation; `values` are (kl, l0) at the rung, NaN where not finite.
    """

    training_id: str
    tokens: int
    number: int
    family: str
    values: tuple[float, float]
    feasible: bool
    rank: int
    arrived: int
    kept: bool
    expected: tuple[float, float] | None


def without_heads(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """Metrics without those of single heads."""
    return {name: value for name, value in metrics.items() if not name.startswith(HEAD_PREFIXES)}
