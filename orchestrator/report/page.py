"""One HTML file from what was gathered: charts and tables through the template, numbers as JSON beside them."""

import base64
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.colors import get_colorscale
from plotly.io import templates
from plotly.offline import get_plotlyjs
from torch import Tensor

from orchestrator.figures import front_panels_html
from orchestrator.report.charts import COLOURS, density_chart, fronts_chart, hypervolume_chart, l0_chart
from orchestrator.report.dictionary_facts import DictionaryFacts
from orchestrator.report.heat_map import heat_map
from orchestrator.report.parallel_coordinates import parallel_coordinates
from orchestrator.report.sweep_facts import StudyFacts, SweepFacts

# whole numbers that stand for probabilities in the page: 1 is this
PROBABILITY_SCALE = 65535
_TEMPLATE = "plotly_white"


@dataclass(frozen=True)
class ReportContent:
    """Everything that a page shows. `dictionaries` by study id; `left_out` says what is missing and why, in lines."""

    facts: SweepFacts
    dictionaries: dict[str, DictionaryFacts]
    left_out: list[str]


def render_page(content: ReportContent) -> str:
    """The page, self-contained: styles, plotly.js, data and script are in it, and it may not ask for anything else."""
    figures, omitted = _figures(content)
    studies = content.facts.studies
    data = {
        "template": templates[_TEMPLATE].to_plotly_json(),
        "palette": [colour for _, colour in get_colorscale(COLOURS)],
        "scale": PROBABILITY_SCALE,
        "figures": {name: _figure_record(figure) for name, figure in figures.items()},
        "patterns": {
            study.name: _pattern_record(study, content.dictionaries[study.status.study.study_id])
            for study in studies
            if study.status.study.study_id in content.dictionaries
        },
    }
    environment = Environment(
        loader=PackageLoader("orchestrator.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    # what is not finite is null in the ledger already; NaN would be no JSON
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "ensure_ascii": False, "separators": (",", ":")}
    loader = environment.loader
    return environment.get_template("page.html.jinja").render(
        facts=content.facts,
        origins=sorted({(study.status.study.model, study.status.study.corpus) for study in studies}),
        dictionaries=content.dictionaries,
        left_out=[*content.left_out, *([omitted] if omitted else [])],
        heat_map=heat_map(studies),
        figures=figures.keys(),
        panels=_panel_names(),
        data=data,
        written=datetime.now(UTC),
        # files of the program, not of anybody else
        plotly=Markup(get_plotlyjs()),
        style=Markup(loader.get_source(environment, "page.css")[0]),
        script=Markup(loader.get_source(environment, "page.js")[0]),
    )


def _panel_names() -> list[str]:
    return list(front_panels_html([]))


def _figures(content: ReportContent) -> tuple[dict[str, go.Figure], str | None]:
    """Figures by the names that the template places them under, and what one of them leaves out."""
    studies, figures = content.facts.studies, {}
    if not any(study.finished for study in studies):
        return {}, None
    figures["fronts"] = fronts_chart(studies)
    figures["hypervolume"] = hypervolume_chart(studies)
    figures["parallel"], omitted = parallel_coordinates(studies)
    for study in studies:
        if study.finished:
            for title, figure in front_panels_html(study.finished).items():
                figures[f"{study.name} {title}"] = figure
        facts = content.dictionaries.get(study.status.study.study_id)
        if facts is not None:
            figures[f"{study.name} l0"] = l0_chart(facts)
            figures[f"{study.name} density"] = density_chart(facts)
    return figures, omitted


def _figure_record(figure: go.Figure) -> dict[str, Any]:
    """Without plotly's template, which is in the page once."""
    record = json.loads(figure.to_json())
    record["layout"].pop("template", None)
    return record


def _pattern_record(study: StudyFacts, facts: DictionaryFacts) -> dict[str, Any]:
    metrics = study.chosen.metrics if study.chosen is not None else {}
    return {
        "heads": [metrics.get(f"kl_head_{head:02d}") for head in range(facts.heads)],
        "sentences": [
            {
                "tokens": sentence.tokens,
                "p": _packed(sentence.pattern),
                "reconstructed": _packed(sentence.reconstructed),
            }
            for sentence in facts.sentences
        ],
    }


def _packed(pattern: Float[Tensor, "n_heads token token"]) -> str:
    """The lower triangles, head by head and row by row, as base64 of 16-bit whole numbers, lowest byte first."""
    rows, columns = np.tril_indices(pattern.shape[-1])
    entries = np.rint(pattern.numpy()[:, rows, columns] * PROBABILITY_SCALE)
    return base64.b64encode(entries.astype("<u2").tobytes()).decode()
