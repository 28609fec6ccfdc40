"""What was decided at rungs, as the ledger keeps it."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select, update

from orchestrator.ledger import Ledger
from orchestrator.ledger_records import Decision
from orchestrator.ledger_tables import DecisionRow, TrainingRow, finite_or_none


def record_decision(ledger: Ledger, decisions: Sequence[Decision]) -> None:
    """Records what was decided about trainings that asked together; those not kept are stopped. One transaction."""
    now = datetime.now(UTC)
    with ledger.transaction() as session:
        rows = [_columns(one) | {"recorded": now} for one in decisions]
        statement = ledger.insert(DecisionRow)
        replaced = {name: statement.excluded[name] for name in rows[0] if name not in _KEY}
        session.execute(statement.on_conflict_do_update(index_elements=_KEY, set_=replaced), rows)
        stopped = [one.training_id for one in decisions if not one.kept]
        is_stopped = (TrainingRow.training_id.in_(stopped), TrainingRow.state == "running")
        session.execute(update(TrainingRow).where(*is_stopped).values(state="stopped", finished=now))


def read_decisions(ledger: Ledger, study_id: str | None = None) -> list[Decision]:
    """A study's decisions or all, in the order in which they were made."""
    statement = select(DecisionRow).join(TrainingRow).order_by(DecisionRow.number, DecisionRow.rank)
    if study_id is not None:
        statement = statement.where(TrainingRow.study_id == study_id)
    with ledger.transaction() as session:
        return [_decision(row) for row in session.scalars(statement)]


_KEY = ("training_id", "tokens")
_PLAIN = ("training_id", "tokens", "number", "family", "feasible", "rank", "arrived", "kept")


def _columns(one: Decision) -> dict[str, Any]:
    (kl, l0), (expected_kl, expected_l0) = map(finite_or_none, one.values), one.expected or (None, None)
    plain = {name: getattr(one, name) for name in _PLAIN}
    return {"kl": kl, "l0": l0, "expected_kl": expected_kl, "expected_l0": expected_l0, **plain}


def _decision(row: DecisionRow) -> Decision:
    values = (math.nan if row.kl is None else row.kl, math.nan if row.l0 is None else row.l0)
    expected = None
    if row.expected_kl is not None and row.expected_l0 is not None:
        expected = (row.expected_kl, row.expected_l0)
    return Decision(**{name: getattr(row, name) for name in _PLAIN}, values=values, expected=expected)
