"""The fronts on a sweep's parent run: a picture, a page and a table per study, and one picture of all."""

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from orchestrator.figures import all_fronts_png, front_html, front_png
from orchestrator.ledger import Ledger
from orchestrator.ledger_records import Training, without_heads
from orchestrator.pareto import front_trainings
from orchestrator.study_names import study_names
from orchestrator.tracking_notes import results_mark

TABLES_TAG = "mlflow.loggedArtifacts"
# a page carries all of plotly, some megabytes, and the picture of a dozen studies takes seconds to draw, which packs on
# this machine would miss
DRAWING_SECONDS = 60.0


class FrontArtifacts:
    """What of the fronts lies in one parent run. A front is drawn again when another of its trainings has finished."""

    def __init__(self, client: MlflowClient, ledger: Ledger, parent: str) -> None:
        self._client = client
        self._ledger = ledger
        self._parent = parent
        # item -> when its drawings were last sent, by the monotonic clock
        self._drawn: dict[str, float] = {}

    def deliver(self, trainings: Sequence[Training], notes: Mapping[str, str], is_last: bool) -> bool:
        """Deliver what the run does not hold yet; what is drawn at most once a minute, and when `is_last`.

        Whether the run holds everything now.
        """
        has_all = True
        studies = self._ledger.studies()
        names = study_names(studies)
        finished: dict[str, list[Training]] = {names[study.study_id]: [] for study in studies}
        for training in trainings:
            if training.state == "finished":
                finished[names[training.study_id]].append(training)
        sweep = self._ledger.sweep().name
        for name, in_study in finished.items():
            title = f"{sweep}, {name}: KL recovered against sparsity"
            mark = results_mark(in_study)
            if in_study and notes.get(f"front {name}") != mark:
                self._replace_table(f"fronts/{name}.json", front_trainings(in_study))
                self._ledger.note_delivered(self._parent, f"front {name}", mark)
            if in_study and notes.get(f"page {name}") != mark:
                if is_last or self._may_draw(f"page {name}"):
                    self._client.log_figure(self._parent, front_png(in_study, title), f"fronts/{name}.png")
                    self._deliver_page(name, in_study, title)
                    self._note_drawn(f"page {name}", mark)
                else:
                    has_all = False
        everything = results_mark([training for in_study in finished.values() for training in in_study])
        if len(studies) > 1 and any(finished.values()) and notes.get("overview") != everything:
            if is_last or self._may_draw("overview"):
                figure = all_fronts_png(finished, f"{sweep}: KL recovered against sparsity")
                self._client.log_figure(self._parent, figure, "fronts/all.png")
                self._note_drawn("overview", everything)
            else:
                has_all = False
        return has_all

    def _may_draw(self, item: str) -> bool:
        return item not in self._drawn or time.monotonic() - self._drawn[item] >= DRAWING_SECONDS

    def _note_drawn(self, item: str, mark: str) -> None:
        self._ledger.note_delivered(self._parent, item, mark)
        self._drawn[item] = time.monotonic()

    def _deliver_page(self, name: str, trainings: Sequence[Training], title: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / f"{name}.html"
            front_html(trainings, title).write_html(page, include_plotlyjs=True)
            self._client.log_artifact(self._parent, page, "fronts")

    def _replace_table(self, path: str, members: Sequence[Training]) -> None:
        """Like log_table, which would append to the table that is there."""
        rows = [_table_row(training) for training in members]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        data = [[row.get(name) for name in columns] for row in rows]
        self._client.log_dict(self._parent, {"columns": columns, "data": data}, path)
        tables = json.loads(self._client.get_run(self._parent).data.tags.get(TABLES_TAG, "[]"))
        entry = {"path": path, "type": "table"}
        if entry not in tables:
            self._client.set_tag(self._parent, TABLES_TAG, json.dumps([*tables, entry]))


def _table_row(training: Training) -> dict[str, Any]:
    metrics = without_heads(training.metrics)
    return {"training": training.label, **training.hyperparameters, **metrics, "id": training.training_id}
