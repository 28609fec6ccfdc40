"""Tables of states and fronts for the terminal, and how times and sizes are written there."""

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.ledger_records import STATES, Training
from orchestrator.status import StudyStatus

# task -> column, metric, form
_COLUMNS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "transcoder": (
        ("l0", "l0", ".1f"),
        ("KL", "kl", ".4f"),
        ("recovered", "kl_recovered", ".1%"),
        ("no BOS", "kl_recovered_no_bos", ".1%"),
        ("top1", "top1", ".1%"),
        ("CE rec.", "ce_recovered", ".1%"),
    ),
    "pair_mask": (
        ("pairs", "pairs_kept", ",.0f"),
        ("of all", "pairs_share", ".2%"),
        ("KL", "kl_masked", ".4f"),
        ("recovered", "kl_masked_recovered", ".1%"),
        ("unmasked", "kl_unmasked", ".4f"),
        ("no pairs", "kl_no_pairs", ".4f"),
        ("CE rec.", "ce_recovered", ".1%"),
    ),
}
_BOXES = {
    "transcoder": "kl_recovered ≥ 0.5, 1 ≤ l0 ≤ dictionary_size/4",
    "pair_mask": "kl_masked_recovered ≥ 0.5, a pair at least",
}


def front_table(status: StudyStatus) -> RenderableType:
    """One study's front, best KL last."""
    baseline = status.study.reference.get("kl_baseline")
    title = f"{status.title}: front of {status.counts['finished']} finished trainings"
    if baseline is not None:
        title += f" (baseline KL {baseline:.3f} nats, hypervolume {status.hypervolume:.2f})"
    if not status.front:
        return Text(f"{title}: nothing inside the feasible box ({_BOXES[status.study.task]}) yet")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in (*(name for name, _, _ in _COLUMNS[status.study.task]), "training"):
        table.add_column(column, justify="left" if column == "training" else "right", no_wrap=True)
    for training in status.front:
        table.add_row(*_front_cells(training))
    return Group(Text(title, style="bold"), table)


def _front_cells(training: Training) -> list[str]:
    values = [(training.metrics.get(name), form) for _, name, form in _COLUMNS[training.task]]
    return [*("–" if value is None else format(value, form) for value, form in values), training.label]


def state_table(statuses: list[StudyStatus]) -> Table:
    """Trainings by state and tokens, per study."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("study", *STATES, "tokens", "on front", "hypervolume"):
        table.add_column(column, justify="right", no_wrap=True)
    for status in statuses:
        counts = status.counts
        table.add_row(
            status.title,
            *(str(counts[state]) for state in STATES),
            f"{status.tokens_done:,} of {status.tokens_planned:,}",
            str(len(status.front)),
            f"{status.hypervolume:.2f}",
        )
    return table


def counted(number: int, noun: str) -> str:
    """`1 pack`, `3 packs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 05 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def size(n_bytes: int) -> str:
    """Bytes in the largest decimal unit that leaves a number of one or more: `1.3 GB`."""
    amount, unit = float(n_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.3g} {unit}"
