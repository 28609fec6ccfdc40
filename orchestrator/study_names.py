"""What the studies of a sweep are called where people see them."""

from collections import Counter
from collections.abc import Sequence

from orchestrator.ledger_records import Study

_ID_DIGITS = 8


def study_names(studies: Sequence[Study]) -> dict[str, str]:
    """Study id -> a name of its own, fit for a file: `L08` for a layer's first study, `L08-<id>` for later ones.

    A study keeps its name whatever studies come after it.
    """
    names: dict[str, str] = {}
    for study in sorted(studies, key=lambda study: study.created):
        name = f"L{study.layer:02d}"
        names[study.study_id] = name if name not in names.values() else f"{name}-{study.study_id[:_ID_DIGITS]}"
    return names


def study_titles(studies: Sequence[Study]) -> dict[str, str]:
    """Study id -> `layer 8`, or where the sweep has several studies of that layer `layer 8, study <id>`."""
    per_layer = Counter(study.layer for study in studies)
    return {
        study.study_id: f"layer {study.layer}"
        + (f", study {study.study_id[:_ID_DIGITS]}" if per_layer[study.layer] > 1 else "")
        for study in studies
    }
