"""Hyperparameters and final metrics of all finished trainings as parallel coordinates.

Lines of a scatter plot and not plotly's own `Parcoords`, which draws with WebGL, not everywhere to be had, and shows
nothing when hovered over.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from orchestrator.ledger_records import Training
from orchestrator.report.charts import COLOURS, DARK_ENOUGH
from orchestrator.report.sweep_facts import StudyFacts

METRICS = (
    "l0_query",
    "l0_key",
    "kl_recovered",
    "kl_recovered_no_bos",
    "top1",
    "dead_query",
    "dead_key",
    "ce_recovered",
)
MOST_LINES = 500
_SHADES = 8
_MOST_MARKS = 5


@dataclass(frozen=True)
class _Axis:
    """One coordinate: `values` by training, None where a training has none."""

    name: str
    values: dict[str, Any]

    @property
    def present(self) -> list[Any]:
        return [value for value in self.values.values() if value is not None]

    @property
    def is_number(self) -> bool:
        return all(isinstance(value, int | float) for value in self.present)

    @property
    def is_log(self) -> bool:
        return self.is_number and min(self.present) > 0 and max(self.present) >= 10 * min(self.present)

    def places(self) -> dict[Any, float]:
        """Value -> height between 0 and 1. What does not differ lies in the middle."""
        values = sorted(set(self.present))
        if self.is_number:
            numbers = [math.log(value) if self.is_log else value for value in values]
        else:
            numbers = list(range(len(values)))
        spread = numbers[-1] - numbers[0]
        if spread == 0:
            return dict.fromkeys(values, 0.5)
        return {value: (number - numbers[0]) / spread for value, number in zip(values, numbers, strict=True)}

    def marks(self) -> dict[Any, float]:
        """The values that are written beside the axis: all of a few, the ends of many."""
        places = self.places()
        if len(places) <= _MOST_MARKS:
            return places
        return {value: place for value, place in places.items() if place in (0.0, 1.0)}


def parallel_coordinates(studies: Sequence[StudyFacts]) -> tuple[go.Figure, str | None]:
    """One line per finished training, and a line about those left out where they are more than `MOST_LINES`.

    Colour is the rank in KL recovered; members of fronts are solid with markers, the others dotted.
    """
    trainings = [one for study in studies for one in study.finished]
    trainings.sort(key=_recovered)
    omitted = None
    if len(trainings) > MOST_LINES:
        omitted = f"parallel coordinates show the {MOST_LINES} of {len(trainings)} trainings that recover most KL"
        trainings = trainings[-MOST_LINES:]
    on_front = {one.training_id for study in studies for one in study.status.front}
    axes = _axes(trainings)
    figure = go.Figure()
    shades = sample_colorscale(COLOURS, [DARK_ENOUGH * shade / (_SHADES - 1) for shade in range(_SHADES)])
    for is_member in (False, True):
        groups: dict[int, list[Training]] = {}
        for rank, training in enumerate(trainings):
            if (training.training_id in on_front) == is_member:
                groups.setdefault(rank * _SHADES // len(trainings), []).append(training)
        for number, (shade, group) in enumerate(groups.items()):
            figure.add_trace(_lines(group, axes, shades[shade], is_member, is_first=number == 0))
    _label(figure, axes)
    return figure, omitted


def _recovered(training: Training) -> float:
    value = training.metrics.get("kl_recovered")
    return -math.inf if value is None else value


def _axes(trainings: Sequence[Training]) -> list[_Axis]:
    """The layer and the hyperparameters in which trainings differ, then the metrics that any of them has."""
    names = list(dict.fromkeys(name for one in trainings for name in one.hyperparameters))
    axes = [_Axis("layer", {one.training_id: one.layer for one in trainings})]
    axes += [_Axis(name, {one.training_id: one.hyperparameters.get(name) for one in trainings}) for name in names]
    axes = [axis for axis in axes if len(set(axis.values.values())) > 1]
    metrics = [_Axis(name, {one.training_id: one.metrics.get(name) for one in trainings}) for name in METRICS]
    return axes + [axis for axis in metrics if axis.present]


def _lines(
    group: Sequence[Training], axes: Sequence[_Axis], colour: str, is_member: bool, is_first: bool
) -> go.Scatter:
    places = [axis.places() for axis in axes]
    x: list[float | None] = []
    y: list[float | None] = []
    texts: list[str | None] = []
    for training in group:
        for number, axis in enumerate(axes):
            value = axis.values[training.training_id]
            x.append(number)
            y.append(None if value is None else places[number][value])
            texts.append(html.escape(f"{training.label}: {axis.name} {_short(value)}"))
        # a gap between two trainings
        for column in (x, y, texts):
            column.append(None)
    return go.Scatter(
        x=x,
        y=y,
        text=texts,
        hovertemplate="%{text}<extra></extra>",
        mode="lines+markers",
        line={"color": colour, "width": 2.5 if is_member else 1.2, "dash": "solid" if is_member else "dot"},
        marker={"symbol": "circle" if is_member else "line-ew-open", "size": 7 if is_member else 4},
        opacity=1.0 if is_member else 0.6,
        name="on a front" if is_member else "beaten, or outside the feasible box",
        legendgroup=str(is_member),
        showlegend=is_first,
    )


def _label(figure: go.Figure, axes: Sequence[_Axis]) -> None:
    for number, axis in enumerate(axes):
        figure.add_vline(x=number, line={"color": "#888", "width": 1}, layer="below")
        for value, place in axis.marks().items():
            figure.add_annotation(
                x=number,
                y=place,
                text=html.escape(_short(value)),
                showarrow=False,
                xanchor="right",
                xshift=-4,
                font={"size": 10, "color": "#333"},
                bgcolor="rgba(255,255,255,0.75)",
            )
    names = [f"{axis.name} (log)" if axis.is_log else axis.name for axis in axes]
    figure.update_xaxes(
        tickvals=list(range(len(axes))), ticktext=[html.escape(name) for name in names], showgrid=False, zeroline=False
    )
    figure.update_xaxes(range=[-0.6, len(axes) - 0.7], tickangle=-30)
    figure.update_yaxes(visible=False, range=[-0.06, 1.06])
    figure.update_layout(template="plotly_white", legend={"orientation": "h", "y": 1.12})


def _short(value: Any) -> str:
    if value is None:
        return "undefined"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
