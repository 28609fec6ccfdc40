"""What a sweep's parent run says of the sweep as a whole: hypervolumes against tokens, and a description."""

from collections.abc import Mapping, Sequence
from urllib.parse import urlencode

from mlflow import MlflowClient
from mlflow.entities import Metric

from orchestrator.ledger import Ledger
from orchestrator.ledger_records import Study, Training
from orchestrator.objectives import OBJECTIVES
from orchestrator.pareto import point_of
from orchestrator.status import StudyStatus, hypervolumes_by_tokens, study_statuses
from orchestrator.study_names import study_names
from orchestrator.tracking_notes import results_mark
from orchestrator.tracking_run import MAX_METRICS, batches, milliseconds
from orchestrator.tracking_store import STUDY_TAG

# the tag that MLflow's page of a run shows as its description, in Markdown
DESCRIPTION_TAG = "mlflow.note.content"
# what MLflow keeps of a tag
MAX_CHARACTERS = 8000
# how many rows of each front, the most that fit
_ROWS = (12, 6, 3, 1, 0)
_MOST_FAILURES, _MOST_ERROR_CHARACTERS = 5, 200


class SweepSummary:
    """What of the summary lies in one parent run."""

    def __init__(self, client: MlflowClient, ledger: Ledger, experiment: str, parent: str) -> None:
        self._client = client
        self._ledger = ledger
        self._experiment = experiment
        self._parent = parent

    def deliver(self, notes: Mapping[str, str]) -> None:
        """Deliver what the run does not hold yet."""
        names = study_names(self._ledger.studies())
        statuses = study_statuses(self._ledger)
        for status in statuses:
            self._deliver_hypervolumes(status, names[status.study.study_id], notes)
        text = _description(statuses, names, self._experiment)
        if notes.get("description") != text:
            self._client.set_tag(self._parent, DESCRIPTION_TAG, text)
            self._ledger.note_delivered(self._parent, "description", text)

    def _deliver_hypervolumes(self, status: StudyStatus, name: str, notes: Mapping[str, str]) -> None:
        """A point per finished training: after how many tokens of the study's ended trainings, which hypervolume."""
        finished = [training for training in status.trainings if training.state == "finished"]
        finished.sort(key=lambda one: (one.finished, one.number))
        mark = f"{len(finished)} {results_mark(finished)}"
        before = notes.get(f"hypervolume {name}", "0")
        if not finished or before == mark:
            return
        # where one of those that were sent has finished anew, all points may have moved
        sent = int(before.partition(" ")[0])
        sent = sent if before == f"{sent} {results_mark(finished[:sent])}" else 0
        points = hypervolumes_by_tokens(status)[sent:]
        metrics = [Metric(f"hypervolume_{name}", point.value, milliseconds(point.at), point.tokens) for point in points]
        for batch in batches(metrics, MAX_METRICS):
            self._client.log_batch(self._parent, metrics=batch)
        self._ledger.note_delivered(self._parent, f"hypervolume {name}", mark)


def _description(statuses: Sequence[StudyStatus], names: Mapping[str, str], experiment: str) -> str:
    """Of all studies as much as MLflow keeps: first rows of fronts are left out, then last studies, which are named."""
    for rows in _ROWS:
        parts = [_of_study(status, names[status.study.study_id], experiment, rows) for status in statuses]
        if len("\n\n".join(parts)) <= MAX_CHARACTERS:
            return "\n\n".join(parts)
    for shown in range(len(parts) - 1, -1, -1):
        left_out = ", ".join(names[status.study.study_id] for status in statuses[shown:])
        text = "\n\n".join([*parts[:shown], f"Left out for want of room: {left_out}; see fronts/"])
        if len(text) <= MAX_CHARACTERS:
            return text
    return f"{len(statuses)} studies: see fronts/"


def _front_address(experiment: str, study: Study) -> str:
    """Where MLflow's UI lists the trainings on a study's front by ascending l0, relative to any of its pages."""
    query = {
        "workflowType": "machine_learning",
        "searchFilter": f"tags.pareto = 'true' and tags.`{STUDY_TAG}` = '{study.study_id}'",
        # the UI nests runs below their parent only while they are sorted by time
        "orderByKey": f"metrics.`{OBJECTIVES[study.task].size}`",
        "orderByAsc": "true",
    }
    return f"#/experiments/{experiment}/runs?{urlencode(query)}"


def _of_study(status: StudyStatus, name: str, experiment: str, rows: int) -> str:
    counts = ", ".join(f"{count} {state}" for state, count in status.counts.items() if count)
    front = f"[{len(status.front)} on the front]({_front_address(experiment, status.study)})"
    lines = [f"### {name}", f"{counts}; {front}, hypervolume {status.hypervolume:.2f}", ""]
    shown = status.front[:rows]
    if shown:
        found, titles = OBJECTIVES[status.study.task], ["training"]
        titles += [
            found.size,
            found.kl,
            "recovered",
            *(["recovered, no BOS"] if status.study.task == "transcoder" else []),
        ]
        lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        lines += [*map(_front_row, shown), ""]
    if len(status.front) > len(shown):
        lines += [f"and {len(status.front) - len(shown)} more: fronts/{name}.json" if shown else f"fronts/{name}.json"]
    failures = [training for training in status.trainings if training.state == "failed"]
    lines += _failure_lines(failures)
    return "\n".join(lines)


def _front_row(training: Training) -> str:
    (size, kl), recovered = point_of(training), training.metrics[training.objectives.recovered]
    if training.task == "pair_mask":
        return f"| {training.label} | {size:,.0f} | {kl:.4f} | {recovered:.1%} |"
    no_bos = training.metrics.get("kl_recovered_no_bos")
    shown = "" if no_bos is None else f"{no_bos:.1%}"
    return f"| {training.label} | {size:.1f} | {kl:.4f} | {recovered:.1%} | {shown} |"


def _failure_lines(failures: Sequence[Training]) -> list[str]:
    if not failures:
        return []
    shown = [f"- {one.label}: `{_error(one)}`" for one in failures[:_MOST_FAILURES]]
    rest = len(failures) - len(shown)
    return ["", f"{len(failures)} failed:", "", *shown, *([f"- and {rest} more"] if rest else [])]


def _error(training: Training) -> str:
    text = (training.error or "").replace("`", "'")
    return text if len(text) <= _MOST_ERROR_CHARACTERS else f"{text[:_MOST_ERROR_CHARACTERS]}…"
