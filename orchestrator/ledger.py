"""The sweep's database: the only truth about what was asked for, trained, found and delivered.

One SQLite file in the sweep's folder. A training's state moves open -> running -> finished | stopped | failed and,
after an interruption or at a rung, back to open. `finished` is final while its dictionary is there: the first result
wins, and whatever a late or repeated event says about a finished training changes nothing, so every write may be
repeated.
"""

import math
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from sqlalchemy import case, delete, func, select, update
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.orm import Session

from orchestrator.ledger_file import create_or_open, open_if_there
from orchestrator.ledger_tables import (
    STATES,
    DeliveryRow,
    MetricRow,
    Report,
    ReportRow,
    State,
    Study,
    StudyRow,
    SweepRecord,
    SweepRow,
    Training,
    TrainingRow,
    own_fields,
    read_trainings,
)
from qkmodel.errors import InputError


@dataclass(frozen=True)
class Spent:
    """Tokens trained on, the same once all that is begun has ended, and the seconds that packs took."""

    tokens: int
    tokens_committed: int
    seconds: float


class Ledger:
    """Safe to share between threads; processes may read while one writes.

    Methods that take a `training_id` raise KeyError when the ledger holds no such training.
    """

    def __init__(self, path: Path) -> None:
        """Open the ledger at `path`, creating the file and its folder where missing.

        Raises InputError when the file is not a ledger that this version can read.
        """
        self.path = path
        self._engine = create_or_open(path)
        self._begun = threading.local()

    @classmethod
    def open_if_there(cls, path: Path) -> Self | None:
        """The ledger at `path`, None where no sweep was started yet. Creates nothing.

        Raises InputError when the file is not a ledger that this version can read.
        """
        engine = open_if_there(path)
        if engine is None:
            return None
        ledger = cls.__new__(cls)
        ledger.path = path
        ledger._engine = engine
        ledger._begun = threading.local()
        return ledger

    @classmethod
    def open_existing(cls, path: Path) -> Self:
        """The ledger of a sweep that was started. Creates nothing.

        Raises InputError when there is none, or not one that this version can read.
        """
        ledger = cls.open_if_there(path)
        if ledger is None:
            raise InputError(f"no sweep here: {path} is not there or empty; give a sweep that was started")
        return ledger

    @property
    def folder(self) -> Path:
        """The sweep's folder, to which the paths of dictionaries are relative."""
        return self.path.parent

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """One transaction: committed at the end of the block, rolled back on an exception.

        Within the block, what this thread asks of the ledger and writes to it is part of the transaction.
        """
        if (session := getattr(self._begun, "session", None)) is not None:
            yield session
            return
        with Session(self._engine) as session, session.begin():
            self._begun.session = session
            try:
                yield session
            finally:
                self._begun.session = None

    # -- the sweep and its studies

    def open_sweep(
        self, name: str, config: Mapping[str, Any], git_sha: str | None, versions: Mapping[str, str], attempt: int = 0
    ) -> SweepRecord:
        """Record the sweep, or that it was started again with a perhaps changed configuration.

        `attempt` counts how often everything was begun afresh.

        Raises InputError when the ledger belongs to a sweep of another name.
        """
        facts = {"config": dict(config), "git_sha": git_sha, "versions": dict(versions), "attempt": attempt}
        with self.transaction() as session:
            statement = insert(SweepRow).values(sweep=1, name=name, created=_now(), **facts)
            session.execute(statement.on_conflict_do_update(index_elements=["sweep"], set_=facts))
            row = session.get_one(SweepRow, 1)
            if row.name != name:
                raise InputError(f"{self.path} belongs to sweep {row.name!r}, not {name!r}: use another folder")
            return SweepRecord(**own_fields(row, SweepRecord))

    def attempt(self) -> int | None:
        """How often everything was begun afresh; None when no sweep was recorded yet."""
        with self.transaction() as session:
            return session.scalar(select(SweepRow.attempt))

    def sweep(self) -> SweepRecord:
        """Raises InputError when no sweep was recorded yet."""
        with self.transaction() as session:
            row = session.get(SweepRow, 1)
            if row is None:
                raise InputError(f"no sweep here: {self.path} is empty; start the sweep first")
            return SweepRecord(**own_fields(row, SweepRecord))

    def open_study(
        self, study_id: str, task: str, layer: int, identity: Mapping[str, Any], *, model: str, corpus: str
    ) -> Study:
        """Record a study, or return the one that is there."""
        with self.transaction() as session:
            statement = insert(StudyRow).values(
                study_id=study_id,
                task=task,
                layer=layer,
                model=model,
                corpus=corpus,
                identity=dict(identity),
                reference={},
                created=_now(),
            )
            session.execute(statement.on_conflict_do_nothing())
            return Study(**own_fields(session.get_one(StudyRow, study_id), Study))

    def set_constraints(self, study_id: str, constraints: Mapping[str, tuple[float | None, float | None]]) -> None:
        """Record what a point of the study's front has to meet beyond the feasible box."""
        statement = update(StudyRow).where(StudyRow.study_id == study_id).values(constraints=dict(constraints))
        with self.transaction() as session:
            session.execute(statement)

    def set_current(self, tokens_planned: Mapping[str, int]) -> None:
        """Record which studies this start of the sweep asks for, and the tokens that each comes to when it is done."""
        with self.transaction() as session:
            session.execute(update(StudyRow).values(tokens_planned=None))
            for study_id, tokens in tokens_planned.items():
                session.execute(update(StudyRow).where(StudyRow.study_id == study_id).values(tokens_planned=tokens))

    def set_reference(self, study_id: str, reference: Mapping[str, float | None]) -> None:
        """Record what the study's trainings are measured against: kl_baseline, ce_clean, …

        Raises KeyError for an unknown study.
        """
        values = {name: _finite(value) for name, value in reference.items()}
        statement = update(StudyRow).where(StudyRow.study_id == study_id).values(reference=values)
        with self.transaction() as session:
            if session.execute(statement).rowcount == 0:
                raise KeyError(study_id)

    def studies(self) -> list[Study]:
        with self.transaction() as session:
            rows = session.scalars(select(StudyRow).order_by(StudyRow.layer, StudyRow.created))
            return [Study(**own_fields(row, Study)) for row in rows]

    # -- trainings

    def add_training(
        self, study_id: str, training_id: str, hyperparameters: Mapping[str, Any], tokens_planned: int
    ) -> Training:
        """Record a training as open, or return the one that is there, in whatever state it is."""
        rows = TrainingRow
        next_number = select(func.coalesce(func.max(rows.number), -1) + 1).where(rows.study_id == study_id)
        statement = insert(rows).values(
            training_id=training_id,
            study_id=study_id,
            number=next_number.scalar_subquery(),
            hyperparameters=dict(hyperparameters),
            tokens_planned=tokens_planned,
            created=_now(),
        )
        with self.transaction() as session:
            session.execute(statement.on_conflict_do_nothing(index_elements=["training_id"]))
        return self.training(training_id)

    def start(self, training_id: str, pack: str, machine: Mapping[str, Any]) -> None:
        """A worker takes the training up: one more attempt. `started` stays that of the first."""
        first_start = func.coalesce(TrainingRow.started, _now())
        with self.transaction() as session:
            self._update(
                session,
                training_id,
                state="running",
                pack=pack,
                machine=dict(machine),
                attempts=TrainingRow.attempts + 1,
                started=first_start,
                finished=None,
                error=None,
            )

    def report(self, training_id: str, tokens: int, metrics: Mapping[str, float | None], seconds: float) -> None:
        """Record values reached after `tokens` tokens and `seconds` of training, both counted from the start.

        A value that was reported before at the same number of tokens (a continued training repeats the steps
        since its checkpoint) keeps its first value.
        """
        common = {"training_id": training_id, "tokens": tokens, "recorded": _now()}
        values = [{"name": name, "value": _finite(value), **common} for name, value in metrics.items()]
        with self.transaction() as session:
            is_unfinished = self._update(
                session,
                training_id,
                tokens_done=func.max(TrainingRow.tokens_done, tokens),
                seconds=func.max(TrainingRow.seconds, seconds),
            )
            if is_unfinished and values:
                session.execute(insert(ReportRow).on_conflict_do_nothing(), values)

    def finish(
        self, training_id: str, metrics: Mapping[str, float | None], dictionary: str, dictionary_sha256: str
    ) -> None:
        """Record the result, in one transaction. `dictionary` is a path relative to the sweep's folder."""
        values = [
            {"training_id": training_id, "name": name, "value": _finite(value)} for name, value in metrics.items()
        ]
        with self.transaction() as session:
            is_first = self._update(
                session,
                training_id,
                state="finished",
                dictionary=dictionary,
                dictionary_sha256=dictionary_sha256,
                finished=_now(),
                error=None,
            )
            if is_first and values:
                session.execute(insert(MetricRow), values)

    def fail(self, training_id: str, error: str) -> None:
        """Record that the training came to nothing, and why."""
        with self.transaction() as session:
            self._update(session, training_id, state="failed", error=error, finished=_now())

    def reopen(self, training_id: str, failures: int = 0) -> None:
        """Put an interrupted, failed or stopped training back in the queue; attempts, decisions and reports stay."""
        with self.transaction() as session:
            self._update(session, training_id, state="open", error=None, finished=None, failures=failures)

    def discard_result(self, training_id: str, reason: str) -> None:
        """Put a finished training back in the queue, as one that has done nothing; `reason` stays until it is started.

        The one way back from `finished`: for a dictionary that is gone. Reports stay.
        """
        is_finished = (TrainingRow.training_id == training_id, TrainingRow.state == "finished")
        statement = update(TrainingRow).where(*is_finished)
        with self.transaction() as session:
            nothing = {
                "tokens_done": 0,
                "seconds": 0.0,
                "finished": None,
                "dictionary": None,
                "dictionary_sha256": None,
            }
            if session.execute(statement.values(state="open", error=reason, **nothing)).rowcount == 1:
                session.execute(delete(MetricRow).where(MetricRow.training_id == training_id))

    def reopen_running(self) -> None:
        """Put back in the queue whatever is running: for a driver that starts, or that stops before its packs do."""
        statement = update(TrainingRow).where(TrainingRow.state == "running")
        with self.transaction() as session:
            session.execute(statement.values(state="open", error=None, finished=None))

    def _update(self, session: Session, training_id: str, **values: Any) -> bool:
        """Change an unfinished training; False and no change where it is finished."""
        statement = update(TrainingRow).where(TrainingRow.training_id == training_id, TrainingRow.state != "finished")
        if session.execute(statement.values(**values)).rowcount == 1:
            return True
        if session.get(TrainingRow, training_id) is None:
            raise KeyError(training_id)
        return False

    def training(self, training_id: str) -> Training:
        with self.transaction() as session:
            found = read_trainings(session, TrainingRow.training_id == training_id)
        if not found:
            raise KeyError(training_id)
        return found[0]

    def trainings(self, study_id: str | None = None, state: State | None = None) -> list[Training]:
        """By layer, then study, then number."""
        conditions = []
        if study_id is not None:
            conditions.append(TrainingRow.study_id == study_id)
        if state is not None:
            conditions.append(TrainingRow.state == state)
        with self.transaction() as session:
            return read_trainings(session, *conditions)

    def reports(self, training_id: str, after: int = 0) -> list[Report]:
        """In order of recording, those with a `report_id` above `after`."""
        statement = (
            select(ReportRow)
            .where(ReportRow.training_id == training_id, ReportRow.report_id > after)
            .order_by(ReportRow.report_id)
        )
        with self.transaction() as session:
            return [Report(**own_fields(row, Report)) for row in session.scalars(statement)]

    def counts(self, study_id: str | None = None) -> dict[State, int]:
        """Trainings per state; every state is there."""
        statement = select(TrainingRow.state, func.count()).group_by(TrainingRow.state)
        if study_id is not None:
            statement = statement.where(TrainingRow.study_id == study_id)
        with self.transaction() as session:
            found = {state: count for state, count in session.execute(statement)}
        return {state: found.get(state, 0) for state in STATES}

    def spent(self, studies: Collection[str]) -> Spent:
        """What the trainings of these studies have cost."""
        unfinished = case((TrainingRow.state.in_(("open", "running")), TrainingRow.tokens_planned), else_=None)
        columns = (
            func.coalesce(func.sum(TrainingRow.tokens_done), 0),
            func.coalesce(func.sum(func.coalesce(unfinished, TrainingRow.tokens_done)), 0),
            func.coalesce(func.sum(TrainingRow.seconds), 0.0),
        )
        with self.transaction() as session:
            return Spent(*session.execute(select(*columns).where(TrainingRow.study_id.in_(studies))).one())

    # -- what MLflow already holds

    def delivered(self) -> dict[str, dict[str, str]]:
        """run id -> item -> value, as noted by `note_delivered`."""
        notes: dict[str, dict[str, str]] = {}
        with self.transaction() as session:
            for run_id, item, value in session.execute(select(DeliveryRow.run_id, DeliveryRow.item, DeliveryRow.value)):
                notes.setdefault(run_id, {})[item] = value
        return notes

    def note_delivered(self, run_id: str, item: str, value: str) -> None:
        """Note that `item` of an MLflow run now stands at `value`."""
        statement = insert(DeliveryRow).values(run_id=run_id, item=item, value=value)
        with self.transaction() as session:
            session.execute(statement.on_conflict_do_update(index_elements=["run_id", "item"], set_={"value": value}))


def _now() -> datetime:
    return datetime.now(UTC)


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
