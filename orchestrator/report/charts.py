"""The plotly charts of a report that are not fronts of one study. Nothing is told apart by colour alone."""

import html
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from orchestrator.figures import hover_text
from orchestrator.front_axes import FRONT_AXES
from orchestrator.report.dictionary_facts import DictionaryFacts
from orchestrator.report.sweep_facts import StudyFacts

COLOURS = "viridis"
# the palest yellows do not show on white
DARK_ENOUGH = 0.85
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "triangle-down", "x")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
# side -> colour and hatching
_SIDES = {"query": ("#440154", ""), "key": ("#5ec962", "/")}
_DENSITY_BINS_PER_DECADE = 5
_MOST_L0_BINS = 40


def fronts_chart(studies: Sequence[StudyFacts]) -> go.Figure:
    """The fronts of all studies: KL recovered against l0."""
    figure = go.Figure()
    for study, style in _styled(studies):
        members = [one for one in study.status.front if one.metrics.get("kl_recovered") is not None]
        if not members:
            continue
        figure.add_scatter(
            x=[one.metrics["l0"] for one in members],
            y=[one.metrics["kl_recovered"] for one in members],
            text=[hover_text(one) for one in members],
            hovertemplate="%{text}<extra></extra>",
            **style,
        )
    figure.update_xaxes(**FRONT_AXES["transcoder"].plotly_axis)
    figure.update_yaxes(title_text="KL recovered")
    return _laid_out(figure)


def hypervolume_chart(studies: Sequence[StudyFacts]) -> go.Figure:
    """Each study's hypervolume after the tokens that it took."""
    figure = go.Figure()
    for study, style in _styled(studies):
        if not study.progress:
            continue
        tokens, hypervolumes = zip(*study.progress, strict=True)
        style["line"]["shape"] = "hv"
        hover = "%{x:,} tokens: %{y:.2f}"
        figure.add_scatter(x=list(tokens), y=list(hypervolumes), hovertemplate=hover, **style)
    figure.update_xaxes(title_text="tokens of the trainings that had ended", rangemode="tozero")
    figure.update_yaxes(title_text="hypervolume", rangemode="tozero")
    return _laid_out(figure)


def l0_chart(facts: DictionaryFacts) -> go.Figure:
    """How many features are active on a token, both sides."""
    figure = go.Figure()
    most = max(int(side.active.max()) for side in facts.activity.values())
    # bins of whole numbers, as many as can be told apart
    width = max(1, -(-(most + 1) // _MOST_L0_BINS))
    edges = np.arange(0, most + 1 + width, width)
    middles = (edges[:-1] + (width - 1) / 2).tolist()
    ranges = [f"{low}" if width == 1 else f"{low} to {low + width - 1}" for low in edges[:-1]]
    for name, side in facts.activity.items():
        counts, _ = np.histogram(side.active.numpy(), edges)
        _add_bars(figure, name, middles, counts.tolist(), ranges, "active: %{y:,} tokens")
    figure.update_xaxes(title_text="active features of a token")
    figure.update_yaxes(title_text="tokens")
    return _laid_out(figure)


def density_chart(facts: DictionaryFacts) -> go.Figure:
    """On what share of tokens a feature is active, both sides; dead features, which have no logarithm, are left out."""
    figure = go.Figure()
    tokens = next(iter(facts.activity.values())).tokens
    decades = int(np.ceil(np.log10(tokens)))
    edges = np.linspace(-decades, 0, decades * _DENSITY_BINS_PER_DECADE + 1)
    middles = ((edges[1:] + edges[:-1]) / 2).tolist()
    ranges = [f"{10**low:.2g} to {10**high:.2g}" for low, high in pairwise(edges)]
    for name, side in facts.activity.items():
        density = side.density.numpy()
        counts, _ = np.histogram(np.log10(density[density > 0]), edges)
        _add_bars(figure, name, middles, counts.tolist(), ranges, "of tokens: %{y:,} features")
    figure.update_xaxes(
        title_text="share of tokens on which a feature is active",
        tickvals=list(range(-decades, 1)),
        ticktext=[f"{10.0**power:g}" for power in range(-decades, 1)],
    )
    figure.update_yaxes(title_text="features")
    return _laid_out(figure)


def _add_bars(figure: go.Figure, side: str, x: list[float], counts: list[int], ranges: list[str], meaning: str) -> None:
    colour, hatching = _SIDES[side]
    marker = {"color": colour, "pattern": {"shape": hatching, "fgcolor": "#08306b"}, "line": {"width": 0}}
    hover = f"{side}, %{{text}} {meaning}<extra></extra>"
    figure.add_bar(x=x, y=counts, text=ranges, textposition="none", name=side, marker=marker, hovertemplate=hover)


def _styled(studies: Sequence[StudyFacts]) -> list[tuple[StudyFacts, dict]]:
    """Each study with the colour, marker and dash it has in every chart."""
    depths = np.linspace(0, DARK_ENOUGH, max(len(studies), 1)).tolist()
    colours = sample_colorscale(COLOURS, depths)
    return [
        (
            study,
            {
                "name": html.escape(study.title),
                "mode": "lines+markers",
                "marker": {"color": colour, "symbol": _SYMBOLS[index % len(_SYMBOLS)], "size": 9},
                "line": {"color": colour, "dash": _DASHES[index % len(_DASHES)]},
            },
        )
        for index, (study, colour) in enumerate(zip(studies, colours, strict=True))
    ]


def _laid_out(figure: go.Figure) -> go.Figure:
    figure.update_xaxes(ticks="outside")
    return figure.update_layout(template="plotly_white", showlegend=True, legend={"orientation": "h", "y": -0.25})
