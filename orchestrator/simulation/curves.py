"""Hypervolume against tokens: what a policy reaches for which part of the whole sweep's tokens."""

from collections.abc import Sequence
from statistics import quantiles
from typing import Any

from rich import box
from rich.table import Table

from orchestrator.simulation.recorded import RecordedSweep
from orchestrator.simulation.replay import Point
from orchestrator.tables import counted

BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)


def share_at(curve: Sequence[Point], tokens: float) -> float:
    """The hypervolume's share of the whole that was reached by so many tokens."""
    return max((point.share for point in curve if point.tokens <= tokens), default=0.0)


def tokens_to(curve: Sequence[Point], share: float) -> int | None:
    """Tokens after which the share was reached; None where it never was."""
    return next((point.tokens for point in curve if point.share >= share), None)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of one value three times that."""
    lower, middle, upper = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return lower, middle, upper


def curves_record(sweep: RecordedSweep, curves: Sequence[Sequence[Point]]) -> dict[str, Any]:
    """Per budget, a share of the tokens of all recorded trainings: quartiles over seeds of the hypervolume's share."""
    return {
        "sweep": sweep.name,
        "trainings": sum(len(study.trainings) for study in sweep.studies),
        "tokens": sweep.tokens,
        "seeds": len(curves),
        "hypervolume_share": {
            f"{budget:g}": quartiles([share_at(curve, budget * sweep.tokens) for curve in curves]) for budget in BUDGETS
        },
    }


def curves_table(record: dict[str, Any]) -> Table:
    """The same for the terminal."""
    trainings, seeds = counted(record["trainings"], "recorded training"), counted(record["seeds"], "seed")
    table = Table(
        title=f"{record['sweep']}: hypervolume, as a share of what all {trainings} reach; {seeds}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for column in ("tokens", "of all", "lower quartile", "median", "upper quartile"):
        table.add_column(column, justify="right")
    for budget, shares in record["hypervolume_share"].items():
        cells = (
            f"{float(budget) * record['tokens']:,.0f}",
            f"{float(budget):.0%}",
            *(f"{share:.1%}" for share in shares),
        )
        table.add_row(*cells)
    return table
