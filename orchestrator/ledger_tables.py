"""The ledger's tables, and how records are read from them."""

import math
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    ColumnElement,
    DateTime,
    ForeignKey,
    Integer,
    Row,
    RowMapping,
    TypeDecorator,
    UniqueConstraint,
    select,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from orchestrator.ledger_records import STATES, Training, Unreadable
from qkmodel.errors import InputError

LEDGER_FORMAT = 4


class UtcDateTime(TypeDecorator[datetime]):
    """No time zone is kept: everything is stored as UTC and comes back aware."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


# PostgreSQL's plain integers end at 2³¹; SQLite's have no such end, and it numbers rows by itself in these only
_WHOLE = BigInteger().with_variant(Integer(), "sqlite")


class Table(DeclarativeBase):
    # not JSONB: the order of keys is what was written
    type_annotation_map: ClassVar[dict[Any, Any]] = {datetime: UtcDateTime, dict[str, Any]: JSON, int: _WHOLE}


class SweepRow(Table):
    __tablename__ = "sweep"

    sweep: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    attempt: Mapped[int] = mapped_column(default=0)
    config: Mapped[dict[str, Any]]
    git_sha: Mapped[str | None]
    versions: Mapped[dict[str, Any]]
    facts: Mapped[dict[str, Any]]
    created: Mapped[datetime]


class StudyRow(Table):
    __tablename__ = "studies"

    study_id: Mapped[str] = mapped_column(primary_key=True)
    task: Mapped[str]
    layer: Mapped[int]
    model: Mapped[str]
    corpus: Mapped[str]
    identity: Mapped[dict[str, Any]]
    reference: Mapped[dict[str, Any]]
    tokens_planned: Mapped[int | None]
    constraints: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created: Mapped[datetime]


class TrainingRow(Table):
    __tablename__ = "trainings"
    __table_args__ = (UniqueConstraint("study_id", "number"),)

    training_id: Mapped[str] = mapped_column(primary_key=True)
    study_id: Mapped[str] = mapped_column(ForeignKey("studies.study_id"))
    number: Mapped[int]
    state: Mapped[str] = mapped_column(default="open")
    hyperparameters: Mapped[dict[str, Any]]
    tokens_done: Mapped[int] = mapped_column(default=0)
    tokens_planned: Mapped[int]
    dictionary: Mapped[str | None]
    dictionary_sha256: Mapped[str | None]
    error: Mapped[str | None]
    pack: Mapped[str | None]
    seconds: Mapped[float] = mapped_column(default=0.0)
    attempts: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)
    machine: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created: Mapped[datetime]
    started: Mapped[datetime | None]
    finished: Mapped[datetime | None]


class MetricRow(Table):
    __tablename__ = "metrics"

    training_id: Mapped[str] = mapped_column(ForeignKey("trainings.training_id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[float | None]


class ReportRow(Table):
    __tablename__ = "reports"
    __table_args__ = (UniqueConstraint("training_id", "tokens", "name"),)

    report_id: Mapped[int] = mapped_column(primary_key=True)
    training_id: Mapped[str] = mapped_column(ForeignKey("trainings.training_id"))
    tokens: Mapped[int]
    name: Mapped[str]
    value: Mapped[float | None]
    recorded: Mapped[datetime]


class DecisionRow(Table):
    __tablename__ = "decisions"

    training_id: Mapped[str] = mapped_column(ForeignKey("trainings.training_id"), primary_key=True)
    tokens: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]
    family: Mapped[str]
    kl: Mapped[float | None]
    l0: Mapped[float | None]
    feasible: Mapped[bool]
    rank: Mapped[int]
    arrived: Mapped[int]
    kept: Mapped[bool]
    expected_kl: Mapped[float | None]
    expected_l0: Mapped[float | None]
    recorded: Mapped[datetime]


class StartRow(Table):
    """One start of the sweep. `beat` grows while its driver lives; `ended` is set when it ends in an orderly way."""

    __tablename__ = "starts"

    number: Mapped[int] = mapped_column(primary_key=True)
    host: Mapped[str]
    process: Mapped[int]
    started: Mapped[datetime]
    beat: Mapped[int] = mapped_column(default=0)
    ended: Mapped[datetime | None]


class DeliveryRow(Table):
    """What an MLflow run already holds. Keyed by run: a wiped or changed server has other run ids."""

    __tablename__ = "deliveries"

    run_id: Mapped[str] = mapped_column(primary_key=True)
    item: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


def refuse_other_format(where: str, found: int) -> None:
    """Raises InputError for the ledger of another version of this program."""
    if found != LEDGER_FORMAT:
        raise InputError(
            f"{where} has ledger format {found}; this version reads format {LEDGER_FORMAT}: "
            "use the version that wrote it, or another sweep name"
        )


def finite_or_none(value: float | None) -> float | None:
    """What a database would not give back as it was is kept as None."""
    return float(value) if value is not None and math.isfinite(value) else None


def own_fields(row: Table, kind: type) -> dict[str, Any]:
    """The columns of `row` that are fields of the record `kind`."""
    return {field.name: getattr(row, field.name) for field in fields(kind) if hasattr(row, field.name)}


_TRAINING_COLUMNS = [getattr(TrainingRow, field.name) for field in fields(Training) if hasattr(TrainingRow, field.name)]


def read_trainings(session: Session, *conditions: ColumnElement[bool]) -> list[Training]:
    """The trainings that meet all conditions, with their metrics and no others'."""
    # columns, not rows as objects of a session, which cost several times as much
    columns = (*_TRAINING_COLUMNS, StudyRow.layer, StudyRow.constraints)
    order = (StudyRow.layer, StudyRow.created, StudyRow.study_id, TrainingRow.number)
    rows = session.execute(select(*columns).join(StudyRow).where(*conditions).order_by(*order)).all()
    metrics: dict[str, dict[str, float | None]] = {row.training_id: {} for row in rows}
    # nobody else has any, and to look for them among all there are takes long
    if any(row.state == "finished" for row in rows):
        values = select(MetricRow.training_id, MetricRow.name, MetricRow.value).join(TrainingRow).where(*conditions)
        for training_id, name, value in session.execute(values):
            metrics[training_id][name] = value
    return [Training(**_checked(row), metrics=metrics[row.training_id]) for row in rows]


# what every program reads of a training's hyperparameters, by task
_NEEDED: tuple[set[str], ...] = ({"dictionary_size"}, {"dictionary", "form", "joint", "encoders", "pair_cost"})


def _checked(row: Row[Any]) -> RowMapping:
    is_sound = (
        row.state in STATES
        and isinstance(row.hyperparameters, dict)
        and any(needed <= row.hyperparameters.keys() for needed in _NEEDED)
        and (row.state != "finished" or row.dictionary is not None)
    )
    if not is_sound:
        raise Unreadable(f"training {row.training_id}: its state, hyperparameters or dictionary cannot be read")
    return row._mapping
