"""The pictures people look at: KL recovered against sparsity, per study.

Each front of transcoders is shown twice, over the whole pattern and with the first column left out (`_no_bos`); see
`front_axes`.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from plotly.subplots import make_subplots

from orchestrator.front_axes import FrontAxes, Panel, axes_of
from orchestrator.ledger import Training
from orchestrator.pareto import MIN_L0, feasible, front, front_trainings

_COLOURS = "viridis"
_GREY = "#b0b0b0"
_RED = "#d62728"
# family -> matplotlib marker, plotly symbol; families beyond these share the last
_MARKERS = {"topk": ("o", "circle"), "relu-l1": ("^", "triangle-up"), "relu-sqrt": ("s", "square")}
_MARKERS |= {"sqrt": ("o", "circle"), "hard_concrete": ("^", "triangle-up"), "sqrt-joint": ("s", "square")}
_MARKERS |= {"sqrt-joint-encoders": ("P", "cross")}
_OTHER_MARKER = ("D", "diamond")
_OUTSIDE_MARKER = ("x", "x-thin-open")
_OUTSIDE = "outside"
_HOVERED = {
    "transcoder": ("kl", "kl_recovered", "kl_recovered_no_bos", "l0", "l0_query", "l0_key", "top1"),
    "pair_mask": ("kl_masked", "kl_masked_recovered", "kl_unmasked", "pairs_kept", "pairs_share", "variance_share"),
}
_FRONT = "on the front of the whole pattern"
_Y_LABEL = "KL recovered"
_TOP = 1.02


def front_png(trainings: Sequence[Training], title: str) -> Figure:
    """The front of one study as a picture of 12 × 5.4 inches.

    x: l0, or pairs (log); y: share of the baseline's KL recovered; colour: dictionary size, or what a pair costs;
    marker: family.
    Raises ValueError for trainings of several studies.
    """
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    _draw_rows(figure, {"": trainings}, title)
    return figure


def all_fronts_png(trainings_by_title: Mapping[str, Sequence[Training]], title: str) -> Figure:
    """The fronts of several studies below each other, one row of two panels per study, on common axes.

    Raises ValueError where the trainings under one title are of several studies, or there are no titles.
    """
    if not trainings_by_title:
        raise ValueError("no studies to draw")
    figure = Figure(figsize=(12, 1.2 + 3.6 * len(trainings_by_title)), layout="constrained")
    _draw_rows(figure, trainings_by_title, title)
    return figure


def front_html(trainings: Sequence[Training], title: str) -> go.Figure:
    """The same picture to explore: hovering over a point shows its training.

    Raises ValueError for trainings of several studies.
    """
    shown = _finished(trainings)
    frame = _Frame.around(shown)
    figure = make_subplots(
        rows=1, cols=len(frame.axes.panels), subplot_titles=[panel.title for panel in frame.axes.panels]
    )
    for column, panel in enumerate(frame.axes.panels, start=1):
        figure.add_traces(_panel_traces(shown, panel, frame), rows=1, cols=column)
    # the panels share their legend entries
    for column in range(2, len(frame.axes.panels) + 1):
        figure.for_each_trace(lambda trace: trace.update(showlegend=False), col=column)
    figure.update_layout(title_text=f"{html.escape(title)}<br><sup>ringed: {_FRONT}</sup>")
    _frame_plotly(figure, frame, is_empty=not shown)
    return figure


def front_panels_html(trainings: Sequence[Training]) -> dict[str, go.Figure]:
    """The panels of `front_html` by title, each a figure of its own: side by side they need a wide screen.

    Raises ValueError for trainings of several studies.
    """
    shown = _finished(trainings)
    frame = _Frame.around(shown)
    figures = {panel.title: go.Figure(_panel_traces(shown, panel, frame)) for panel in frame.axes.panels}
    for figure in figures.values():
        _frame_plotly(figure, frame, is_empty=not shown)
    return figures


def _panel_traces(shown: Sequence[Training], panel: Panel, frame: "_Frame") -> list[go.Scatter]:
    members = {training.training_id for training in front_trainings(shown)}
    traces = [_plotly_points(name, group, panel, frame, members) for name, group in _groups(shown).items()]
    xs, ys = _steps(shown, panel)
    line, name = {"shape": "hv", "color": _RED, "width": 1.5}, frame.axes.line
    steps = go.Scatter(x=xs, y=ys, mode="lines", line=line, name=name, legendgroup=name, hoverinfo="skip")
    return [*traces, steps]


def _frame_plotly(figure: go.Figure, frame: "_Frame", is_empty: bool) -> None:
    figure.update_xaxes(**frame.axes.plotly_axis)
    figure.update_yaxes(title_text=_Y_LABEL, range=[frame.bottom, _TOP])
    figure.update_layout(
        template="plotly_white",
        legend={"orientation": "h", "y": -0.2},
        coloraxis={
            "colorscale": _COLOURS,
            "colorbar": {
                "title": {"text": frame.axes.colour_label},
                "tickvals": [math.log2(value) for value in frame.colours],
                "ticktext": [f"{value:,}" for value in frame.colours],
            },
        },
    )
    if is_empty:
        figure.add_annotation(text="no finished training yet", showarrow=False, xref="paper", yref="paper")


@dataclass(frozen=True)
class _Frame:
    """The part of the plane that is shown: where the feasible points are, or all where none is.

    One collapsed or diverged training would otherwise squeeze the front into a corner; what lies beyond the
    left or lower edge is drawn at the edge. `colours` are the extremes and the middle of what colours stand for.
    """

    axes: FrontAxes
    left: float
    bottom: float
    colours: tuple[float, ...]

    @classmethod
    def around(cls, trainings: Sequence[Training]) -> "_Frame":
        axes = axes_of(trainings)
        inside = [training for training in trainings if feasible(training)] or trainings
        sizes = [training.metrics[axes.size] for training in inside if training.metrics.get(axes.size)]
        recovered = [training.metrics.get(panel.recovered) for training in inside for panel in axes.panels]
        lowest = max(min((value for value in recovered if value is not None), default=0.0), 0.0)
        colours = sorted({training.hyperparameters[axes.colour] for training in trainings})
        if len(colours) > 3:
            colours = [colours[0], colours[len(colours) // 2], colours[-1]]
        return cls(axes, min(sizes, default=MIN_L0) / 2, lowest - 0.08 * (_TOP - lowest), tuple(colours))

    def place(self, training: Training, panel: Panel) -> tuple[float, float] | None:
        """(l0 or pairs, KL recovered) within the frame; None where either is undefined."""
        size, recovered = training.metrics.get(self.axes.size), training.metrics.get(panel.recovered)
        if size is None or recovered is None:
            return None
        return max(size, self.left), max(recovered, self.bottom)


def _finished(trainings: Sequence[Training]) -> list[Training]:
    return [training for training in trainings if training.state == "finished"]


def _groups(trainings: Sequence[Training]) -> dict[str, list[Training]]:
    """By legend entry: the families inside the box, then all that is outside."""
    groups: dict[str, list[Training]] = {}
    for training in sorted(trainings, key=lambda training: (not feasible(training), training.family)):
        groups.setdefault(training.family if feasible(training) else _OUTSIDE, []).append(training)
    return groups


def _markers(group: str) -> tuple[str, str]:
    return _OUTSIDE_MARKER if group == _OUTSIDE else _MARKERS.get(group, _OTHER_MARKER)


def _steps(trainings: Sequence[Training], panel: Panel) -> tuple[list[float], list[float]]:
    """Corners of the best KL recovered that is to be had at each l0 (number of pairs), among the feasible."""
    points = [
        (training.metrics[training.objectives.size], training.metrics[panel.kl], training.metrics[panel.recovered])
        for training in trainings
        if feasible(training) and training.metrics.get(panel.recovered) is not None
    ]
    corners = sorted({points[index] for index in front([(size, kl) for size, kl, _ in points])})
    return [size for size, _, _ in corners], [recovered for _, _, recovered in corners]


def _draw_rows(figure: Figure, rows: Mapping[str, Sequence[Training]], title: str) -> None:
    shown = {name: _finished(trainings) for name, trainings in rows.items()}
    everything = [training for trainings in shown.values() for training in trainings]
    frame = _Frame.around(everything)
    colour = frame.axes.colour_label
    figure.suptitle(title + (f" ({colour} {frame.colours[0]:,})" if len(frame.colours) == 1 else ""))
    grid = figure.subplots(len(rows), len(frame.axes.panels), sharex=True, sharey=True, squeeze=False)
    for axes_row, (name, trainings) in zip(grid, shown.items(), strict=True):
        for panel, axes in zip(frame.axes.panels, axes_row, strict=True):
            _draw(axes, trainings, panel, frame)
            axes.set_title(f"{name}: {panel.title}" if name else panel.title, fontsize=10)
    for axes in grid[:, 0]:
        axes.set_ylabel(_Y_LABEL)
    for axes in grid[-1]:
        axes.set_xlabel(frame.axes.size_label)
    if everything:
        figure.legend(
            handles=_legend(list(_groups(everything)), frame.axes), loc="outside lower center", ncols=3, fontsize=9
        )
    if len(frame.colours) > 1:
        mappable = ScalarMappable(LogNorm(frame.colours[0], frame.colours[-1]), _COLOURS)
        bar = figure.colorbar(mappable, ax=grid, label=colour, pad=0.02)
        bar.ax.set_yticks(frame.colours, [f"{value:,}" for value in frame.colours])
        bar.ax.minorticks_off()


def _draw(axes: Axes, trainings: Sequence[Training], panel: Panel, frame: _Frame) -> None:
    norm = LogNorm(frame.colours[0], frame.colours[-1]) if len(frame.colours) > 1 else None
    for name, group in _groups(trainings).items():
        placed = [(training, point) for training in group if (point := frame.place(training, panel))]
        if not placed:
            continue
        style = (
            {"color": _GREY, "linewidths": 1.2}
            if name == _OUTSIDE
            else {
                "c": [training.hyperparameters[frame.axes.colour] for training, _ in placed],
                "norm": norm,
                "cmap": _COLOURS,
                "edgecolors": "black",
                "linewidths": 0.5,
            }
        )
        xs, ys = zip(*(point for _, point in placed), strict=True)
        axes.scatter(xs, ys, marker=_markers(name)[0], s=42, zorder=3, clip_on=False, **style)
    axes.plot(*_steps(trainings, panel), drawstyle="steps-post", color=_RED, linewidth=1.2, zorder=2)
    ringed = [point for training in front_trainings(trainings) if (point := frame.place(training, panel))]
    if ringed:
        axes.scatter(*zip(*ringed, strict=True), s=110, facecolors="none", edgecolors=_RED, zorder=4)
    if not trainings:
        axes.text(0.5, 0.5, "no finished training yet", ha="center", va="center", transform=axes.transAxes)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(left=frame.left)
    axes.set_ylim(frame.bottom, _TOP)
    axes.grid(alpha=0.25)


def _legend(groups: Sequence[str], axes: FrontAxes) -> list[Line2D]:
    """The outside's long entry comes last; colours are left to the colour bar."""
    common = {"linestyle": "none", "markersize": 7}
    entries = [
        Line2D([], [], marker=_markers(name)[0], label=name, mfc="white", mec="black", **common)
        for name in groups
        if name != _OUTSIDE
    ]
    entries.append(Line2D([], [], color=_RED, label=axes.line))
    entries.append(Line2D([], [], marker="o", label=_FRONT, mfc="none", mec=_RED, linestyle="none", markersize=11))
    if _OUTSIDE in groups:
        entries.append(Line2D([], [], marker=_OUTSIDE_MARKER[0], label=axes.outside, mec=_GREY, **common))
    return entries


def _plotly_points(name: str, group: Sequence[Training], panel: Panel, frame: _Frame, members: set[str]) -> go.Scatter:
    placed = [(training, point) for training in group if (point := frame.place(training, panel))]
    is_member = [training.training_id in members for training, _ in placed]
    colour = (
        {"color": _GREY}
        if name == _OUTSIDE
        else {
            "color": [math.log2(training.hyperparameters[frame.axes.colour]) for training, _ in placed],
            "coloraxis": "coloraxis",
        }
    )
    ring = {
        "width": [2.5 if ringed else 1 for ringed in is_member],
        "color": [_RED if ringed else _GREY for ringed in is_member],
    }
    return go.Scatter(
        x=[point[0] for _, point in placed],
        y=[point[1] for _, point in placed],
        mode="markers",
        name=frame.axes.outside if name == _OUTSIDE else name,
        legendgroup=name,
        marker={"symbol": _markers(name)[1], "size": 11, "line": ring, **colour},
        text=[hover_text(training) for training, _ in placed],
        hovertemplate="%{text}<extra></extra>",
    )


def hover_text(training: Training) -> str:
    """Label, id, hyperparameters and metrics, for plotly, which reads tags: escaped."""
    shown = _HOVERED[training.task]
    metrics = {name: training.metrics[name] for name in shown if name in training.metrics}
    lines = [training.label, training.training_id]
    lines += [f"{name}: {value}" for name, value in training.hyperparameters.items() if value is not None]
    lines += [f"{name}: {'undefined' if value is None else format(value, '.4g')}" for name, value in metrics.items()]
    return "<br>".join(html.escape(line) for line in lines)
