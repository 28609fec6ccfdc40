"""What the commands of `orchestrate` share: arguments, where they print, and how."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from orchestrator.config import SweepConfig, one_line
from orchestrator.ledger import Ledger
from orchestrator.status import study_statuses
from orchestrator.tables import front_table
from qkmodel.errors import InputError

# into a file or a pipe, lines are as long as they need to be
console = Console(width=None if sys.stdout.isatty() else 120)
messages = Console(stderr=True, width=None if sys.stderr.isatty() else 120)

SweepArgument = Annotated[
    str, typer.Argument(metavar="SWEEP", help="A sweep's folder or address, its sweep file, or its name below runs/.")
]
LayerOption = Annotated[int | None, typer.Option("--layer", metavar="N", help="One layer's front only.", min=0)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output and nothing else there.")]


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Puts the sweep file's name before what is found wrong with its values."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def print_plan(config: SweepConfig, as_json: bool, fresh: bool, here: bool = True) -> None:
    """What would be done, measured on this machine; unless it would be done `here`, this machine refuses nothing."""
    from orchestrator.plan import make_plan

    # planned before the seconds that torch takes to import: most mistakes show here
    plan = make_plan(config, fresh=fresh, here=here)
    from orchestrator.estimate import estimate
    from orchestrator.late_checks import check_plan
    from orchestrator.plan_tables import estimate_lines, estimate_record, plan_table

    checked = check_plan(plan, partial(messages.print, markup=False, highlight=False, soft_wrap=True), stream=False)
    plan, estimated = checked.plan, estimate(checked)
    if as_json:
        print_json(estimate_record(plan, estimated))
        return
    console.print(plan_table(plan))
    for line in estimate_lines(plan, estimated):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_json(record: object) -> None:
    sys.stdout.write(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def print_fronts(ledger: Ledger) -> None:
    for status in study_statuses(ledger):
        console.print(front_table(status))


def say_error(line: str) -> None:
    messages.print(f"error: {one_line(line)}", markup=False, highlight=False, soft_wrap=True)
