"""The command `orchestrate sweep`: plan, train, and say what came of it."""

import shlex
from pathlib import Path

import typer

from orchestrator.addresses import HIDDEN, redact_url
from orchestrator.cli_output import messages, naming, print_fronts, print_json, say_error
from orchestrator.config import SweepConfig, load_sweep
from orchestrator.status import fronts_record
from orchestrator.sweep_argument import shown_folder
from orchestrator.tables import counted
from qkmodel.errors import InputError


def run_and_show(config: SweepConfig, file: Path, as_json: bool, fresh: bool, git_diff: bool) -> None:
    """Raises typer.Exit(1) when a training failed or Ray gave out, and InputError before anything is started."""
    from orchestrator.plan import make_plan

    # planned before the seconds that ray and mlflow take to import: most mistakes show here
    with naming(file):
        plan = make_plan(config, fresh=fresh)
    from orchestrator.packs_on_ray import RayStopped
    from orchestrator.sweep import run_sweep
    from orchestrator.terminal import LogView, TerminalView

    try:
        with naming(file), (TerminalView if messages.is_terminal else LogView)(messages) as view:
            outcome = run_sweep(plan, view, git_diff)
    except RayStopped as error:
        say_error(str(error))
        raise typer.Exit(1) from error
    if outcome.trained == 0 and outcome.stopped == 0 and outcome.failed == 0 and outcome.budget_line is None:
        done = f"nothing left to do: sweep {config.name} has everything that {file} asks for"
        messages.print(done, markup=False, soft_wrap=True)
    if as_json:
        print_json(fronts_record(outcome.ledger))
    else:
        print_fronts(outcome.ledger)
    if outcome.tracking_error is not None:
        messages.print(f"MLflow does not have everything yet: {outcome.tracking_error}", markup=False)
        what = way_to_track(config, file, shlex.quote(shown_folder(outcome.ledger)))
        messages.print(f"once it is there: {what}", markup=False, soft_wrap=True)
    folder = shlex.quote(shown_folder(outcome.ledger))
    messages.print(f"compare the trainings in {where_tracked(config, file, folder)}", markup=False, soft_wrap=True)
    if outcome.stopped:
        messages.print(f"{counted(outcome.stopped, 'training')} stopped at rungs", markup=False)
    if outcome.budget_line is not None:
        messages.print(f"{outcome.budget_line}: raise it and start again to go on", markup=False)
    if outcome.failed:
        failed = counted(outcome.failed, "training")
        messages.print(f"{failed} failed: orchestrate status {folder}", markup=False, soft_wrap=True)
        raise typer.Exit(1)


def way_to_track(config: SweepConfig, file: Path, folder: str) -> str:
    if HIDDEN not in redact_url(config.tracking or ""):
        return f"orchestrate track {folder}"
    # the ledger keeps no password
    return f"orchestrate track {shlex.quote(str(file))}" if _is_told_by(file, config) else "start the sweep again"


def _is_told_by(file: Path, config: SweepConfig) -> bool:
    """Whether a sweep's file says without overrides where the sweep and its MLflow are."""
    try:
        alone = load_sweep(file)
    except InputError:
        # overrides made up for what it lacks
        return False
    return (alone.name, alone.storage, alone.tracking) == (config.name, config.storage, config.tracking)


def where_tracked(config: SweepConfig, file: Path, folder: str) -> str:
    """The MLflow server, or the command that opens the UI."""
    shown = redact_url(config.tracking or "")
    if shown.startswith("http"):
        return f"MLflow at {shown}"
    if HIDDEN not in shown:
        return f"the MLflow UI: orchestrate ui {folder}"
    if _is_told_by(file, config):
        return f"the MLflow UI: orchestrate ui {shlex.quote(str(file))}"
    return f"the MLflow store {shown}"
