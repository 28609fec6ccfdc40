"""What the ledger holds of the sweep itself and of its studies."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select, update

from orchestrator.ledger_connection import LedgerConnection
from orchestrator.ledger_records import Study, SweepRecord, Unreadable
from orchestrator.ledger_tables import StudyRow, SweepRow, finite_or_none, own_fields
from qkmodel.errors import InputError


class StudyRecords(LedgerConnection):
    """The part of a `Ledger` that is written when the sweep starts."""

    def open_sweep(
        self,
        name: str,
        config: Mapping[str, Any],
        git_sha: str | None,
        versions: Mapping[str, str],
        attempt: int = 0,
        facts: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> SweepRecord:
        """Record the sweep, or that it was started again with a perhaps changed configuration.

        `attempt` counts how often everything was begun afresh; `facts` are what people want to know of this start:
        `machine` and `plan`.

        Raises InputError when the ledger belongs to a sweep of another name.
        """
        record = {
            "config": dict(config),
            "git_sha": git_sha,
            "versions": dict(versions),
            "attempt": attempt,
            "facts": {kind: dict(values) for kind, values in (facts or {}).items()},
        }
        with self.transaction() as session:
            statement = self.insert(SweepRow).values(sweep=1, name=name, created=datetime.now(UTC), **record)
            session.execute(statement.on_conflict_do_update(index_elements=["sweep"], set_=record))
            row = session.get_one(SweepRow, 1)
            if row.name != name:
                raise InputError(f"{self.where} belongs to sweep {row.name!r}, not {name!r}: use another folder")
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
                raise InputError(f"no sweep here: {self.where} is empty; start the sweep first")
            return SweepRecord(**own_fields(row, SweepRecord))

    def open_study(
        self, study_id: str, task: str, layer: int, identity: Mapping[str, Any], *, model: str, corpus: str
    ) -> Study:
        """Record a study, or return the one that is there."""
        with self.transaction() as session:
            statement = self.insert(StudyRow).values(
                study_id=study_id,
                task=task,
                layer=layer,
                model=model,
                corpus=corpus,
                identity=dict(identity),
                reference={},
                created=datetime.now(UTC),
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
        values = {name: finite_or_none(value) for name, value in reference.items()}
        statement = update(StudyRow).where(StudyRow.study_id == study_id).values(reference=values)
        with self.transaction() as session:
            if session.execute(statement).rowcount == 0:
                raise KeyError(study_id)

    def studies(self) -> list[Study]:
        """All studies, by layer. Raises InputError when one's reference is no mapping."""
        with self.transaction() as session:
            rows = session.scalars(select(StudyRow).order_by(StudyRow.layer, StudyRow.created))
            return [Study(**own_fields(_checked(row), Study)) for row in rows]


def _checked(row: StudyRow) -> StudyRow:
    if not isinstance(row.reference, dict):
        raise Unreadable(f"study {row.study_id}: its reference cannot be read")
    return row
