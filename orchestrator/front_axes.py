"""What the picture of a front shows, for each task: its panels, its sparsity axis and what colours stand for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.ledger import Training
from orchestrator.objectives import OBJECTIVES
from orchestrator.pareto import MAX_L0_SHARE, MIN_KL_RECOVERED, MIN_L0
from qkmodel.tasks import Task


@dataclass(frozen=True)
class Panel:
    """One of the ways in which KL is looked at."""

    title: str
    kl: str
    recovered: str


@dataclass(frozen=True)
class FrontAxes:
    """`size` is the metric along x, on a log axis; colours stand for the hyperparameter `colour`.

    `line` names the line of the best, `outside` what is not feasible.
    """

    panels: tuple[Panel, ...]
    size: str
    size_label: str
    colour: str
    line: str
    outside: str

    @property
    def colour_label(self) -> str:
        return self.colour.replace("_", " ")

    @property
    def plotly_axis(self) -> dict[str, Any]:
        ticks = [2**power for power in range(21)] if self.size == "l0" else [10**power for power in range(10)]
        return {"type": "log", "title_text": self.size_label, "tickvals": ticks}


_EDGE = " (at the edge if beyond)"
_LOW = f"not feasible: KL recovered < {MIN_KL_RECOVERED:g}"
FRONT_AXES: dict[Task, FrontAxes] = {
    "transcoder": FrontAxes(
        # an attention sink that every dictionary gets right flatters the plain figure
        panels=(
            Panel("whole pattern", "kl", "kl_recovered"),
            Panel("without the first column (attention sink)", "kl_no_bos", "kl_recovered_no_bos"),
        ),
        size="l0",
        size_label=OBJECTIVES["transcoder"].size_label,
        colour="dictionary_size",
        line="best at each l0, in this panel",
        outside=f"{_LOW}, l0 < {MIN_L0:g} or > {MAX_L0_SHARE:g} × size{_EDGE}",
    ),
    "pair_mask": FrontAxes(
        panels=(Panel("whole pattern, from the kept pairs", "kl_masked", "kl_masked_recovered"),),
        size="pairs_kept",
        size_label=OBJECTIVES["pair_mask"].size_label,
        colour="pair_cost",
        line="best at each number of pairs",
        outside=f"{_LOW}, or no pair{_EDGE}",
    ),
}


def axes_of(trainings: Sequence[Training]) -> FrontAxes:
    """Those of the task that the trainings, all of one, are of."""
    return FRONT_AXES[trainings[0].task if trainings else "transcoder"]
