"""KL of each head as a table: layers × heads, one row for each study's chosen training."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.colors import to_hex

from orchestrator.report.charts import COLOURS
from orchestrator.report.sweep_facts import StudyFacts

_HEAD = re.compile(r"kl_head_(\d+)")
# of the palette, where black letters begin to stand out better than white ones
_MIDDLE = 0.55


@dataclass(frozen=True)
class Cell:
    """`value` in nats as the ledger has it, None where it has none; colours are CSS."""

    value: float | None
    background: str
    ink: str


@dataclass(frozen=True)
class Row:
    title: str
    label: str
    cells: list[Cell]


def heat_map(studies: Sequence[StudyFacts]) -> list[Row]:
    """A row for each study that has a chosen training; as many cells as the layer with most heads has."""
    chosen = [(study, study.chosen, _heads(study.chosen.metrics)) for study in studies if study.chosen is not None]
    width = max((len(heads) for _, _, heads in chosen), default=0)
    values = [value for _, _, heads in chosen for value in heads if value is not None and value > 0]
    low, high = (math.log(min(values)), math.log(max(values))) if values else (0.0, 0.0)
    return [
        Row(study.title, training.label, [_cell(value, low, high) for value in heads + [None] * (width - len(heads))])
        for study, training, heads in chosen
        if width
    ]


def _heads(metrics: dict[str, float | None]) -> list[float | None]:
    found = {int(match[1]): metrics[name] for name in metrics if (match := _HEAD.fullmatch(name))}
    return [found.get(head) for head in range(max(found, default=-1) + 1)]


def _cell(value: float | None, low: float, high: float) -> Cell:
    """Coloured by the logarithm: heads differ by factors."""
    if value is None:
        return Cell(None, "#ffffff", "#000000")
    place = 0.0 if value <= 0 else (math.log(value) - low) / (high - low or 1.0)
    background = to_hex(matplotlib.colormaps[COLOURS](place))
    return Cell(value, background, "#000000" if place > _MIDDLE else "#ffffff")
