"""The sweep's database: the only truth about what was asked for, trained, found and delivered.

In an SQLite file in the sweep's folder, or in PostgreSQL. A training's state moves open -> running -> finished |
stopped | failed and, after an interruption or at a rung, back to open. `finished` is final while its dictionary is
there: the first result wins, and whatever a late or repeated event says about a finished training changes nothing, so
every write may be repeated.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, bindparam, case, delete, func, insert, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from orchestrator.ledger_records import STATES, Report, State, Training
from orchestrator.ledger_studies import StudyRecords
from orchestrator.ledger_tables import (
    DeliveryRow,
    MetricRow,
    ReportRow,
    StudyRow,
    TrainingRow,
    finite_or_none,
    own_fields,
    read_trainings,
)


@dataclass(frozen=True)
class Spent:
    """Tokens trained on, the same once all that is begun has ended, and the seconds that packs took."""

    tokens: int
    tokens_committed: int
    seconds: float


class Ledger(StudyRecords):
    """Methods that take a `training_id` raise KeyError when the ledger holds no such training."""

    def add_training(
        self, study_id: str, training_id: str, hyperparameters: Mapping[str, Any], tokens_planned: int
    ) -> Training:
        """Record a training as open, or return the one that is there, in whatever state it is."""
        rows = TrainingRow
        next_number = select(func.coalesce(func.max(rows.number), -1) + 1).where(rows.study_id == study_id)
        statement = self.insert(rows).values(
            training_id=training_id,
            study_id=study_id,
            number=next_number.scalar_subquery(),
            hyperparameters=dict(hyperparameters),
            tokens_planned=tokens_planned,
            created=datetime.now(UTC),
        )
        with self.transaction() as session:
            # PostgreSQL would let two at once count to the same number
            session.execute(select(StudyRow.study_id).where(StudyRow.study_id == study_id).with_for_update())
            session.execute(statement.on_conflict_do_nothing(index_elements=["training_id"]))
        return self.training(training_id)

    def start(self, training_id: str, pack: str, machine: Mapping[str, Any]) -> None:
        """A worker takes the training up: one more attempt. `started` stays that of the first."""
        first_start = func.coalesce(TrainingRow.started, datetime.now(UTC))
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
        since its checkpoint) keeps its first value. Who got further has all attempts again.
        """
        common = {"training_id": training_id, "tokens": tokens, "recorded": datetime.now(UTC)}
        values = [{"name": name, "value": finite_or_none(value), **common} for name, value in metrics.items()]
        with self.transaction() as session:
            is_unfinished = self._update(
                session,
                training_id,
                failures=case((TrainingRow.tokens_done < tokens, 0), else_=TrainingRow.failures),
                tokens_done=_larger(TrainingRow.tokens_done, tokens),
                seconds=_larger(TrainingRow.seconds, seconds),
            )
            if is_unfinished and values:
                session.execute(self.insert(ReportRow).on_conflict_do_nothing(), values)

    def finish(
        self, training_id: str, metrics: Mapping[str, float | None], dictionary: str, dictionary_sha256: str
    ) -> None:
        """Record the result, in one transaction. `dictionary` is a path relative to the sweep's folder."""
        values = [
            {"training_id": training_id, "name": name, "value": finite_or_none(value)}
            for name, value in metrics.items()
        ]
        with self.transaction() as session:
            is_first = self._update(
                session,
                training_id,
                state="finished",
                dictionary=dictionary,
                dictionary_sha256=dictionary_sha256,
                finished=datetime.now(UTC),
                error=None,
            )
            if is_first and values:
                session.execute(insert(MetricRow), values)

    def fail(self, training_id: str, error: str) -> None:
        """Record that the training came to nothing, and why."""
        with self.transaction() as session:
            self._update(session, training_id, state="failed", error=error, finished=datetime.now(UTC))

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

    def count_reports(self, training_id: str, after: int) -> int:
        """How many reports there are with a `report_id` above `after`."""
        conditions = (ReportRow.training_id == training_id, ReportRow.report_id > after)
        with self.transaction() as session:
            return session.scalar(select(func.count()).select_from(ReportRow).where(*conditions))

    def last_report(self) -> int:
        """The largest `report_id` there is, 0 without any."""
        with self.transaction() as session:
            return session.scalar(select(func.coalesce(func.max(ReportRow.report_id), 0)))

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
            found = session.execute(select(*columns).where(TrainingRow.study_id.in_(studies))).one()
        tokens, committed, seconds = found
        # PostgreSQL adds whole numbers up to a Decimal
        return Spent(int(tokens), int(committed), seconds)

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
        statement = self.insert(DeliveryRow).values(run_id=run_id, item=item, value=value)
        with self.transaction() as session:
            session.execute(statement.on_conflict_do_update(index_elements=["run_id", "item"], set_={"value": value}))

    def forget_delivered(self, kept: Collection[str]) -> None:
        """Forget the notes of all MLflow runs but these."""
        table = DeliveryRow.__table__
        with self.transaction() as session:
            noted = session.scalars(select(DeliveryRow.run_id).distinct())
            gone = [{"gone": run_id} for run_id in noted if run_id not in kept]
            if gone:
                session.execute(delete(table).where(table.c.run_id == bindparam("gone")), gone)


def _larger(column: InstrumentedAttribute[Any], value: float) -> ColumnElement[Any]:
    return case((column < value, value), else_=column)
