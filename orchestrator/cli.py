"""The commands of `orchestrate`: parse, call, print."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text
from typer.exceptions import TyperException

from orchestrator.addresses import redact_url, sqlite_file
from orchestrator.cli_dictionaries import dictionary_commands
from orchestrator.cli_output import (
    JsonOption,
    SweepArgument,
    console,
    messages,
    naming,
    print_fronts,
    print_json,
    print_plan,
    say_error,
)
from orchestrator.cluster.cli import cluster_commands
from orchestrator.config import load_sweep
from orchestrator.ledger import Ledger
from orchestrator.status import fronts_record, status_record, study_statuses
from orchestrator.sweep_argument import open_ledger, tracking_of
from orchestrator.sweep_command import run_and_show
from orchestrator.tables import counted, state_table
from orchestrator.tracking_store import TrackingUnavailable
from qkmodel.errors import InputError
from qkmodel.files import user_path

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train query/key transcoders over layers, sizes and sparsities, and see which explain the attention pattern.",
)
app.add_typer(dictionary_commands)
app.add_typer(cluster_commands)


@app.command()
def sweep(
    file: Annotated[
        # whether it can be read is answered by what reads it
        Path, typer.Argument(metavar="FILE", readable=False, help="A sweep file, for example sweeps/l1.yaml.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, for example layers=[3] training.tokens=1_000_000."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done and how long it would take; train nothing.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin everything anew; what was trained before stays beside it.")
    ] = False,
    git_diff: Annotated[
        bool, typer.Option("--git-diff", help="Have MLflow keep what this checkout changes in its commit.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Start or continue a sweep: train what FILE asks for and is not there yet, then show the fronts."""
    config = load_sweep(file, overrides or [])
    if dry_run:
        with naming(file):
            print_plan(config, as_json, fresh)
        return
    run_and_show(config, file, as_json, fresh, git_diff)


@app.command()
def status(sweep: SweepArgument, as_json: JsonOption = False) -> None:
    """How far a sweep is: trainings by state, tokens done and planned, failures and their reasons."""
    ledger = open_ledger(sweep)
    record = status_record(ledger)
    if as_json:
        print_json(record)
        return
    console.print(Text.assemble((f"sweep {record['sweep']}", "bold"), f" in {record['folder']}"), soft_wrap=True)
    console.print(state_table(study_statuses(ledger)))
    for failure in record["failures"]:
        console.print(f"failed: {failure['training_id']} (layer {failure['layer']}): {failure['error']}", markup=False)
    if record["owed"]["anything"]:
        trainings, reports = record["owed"]["trainings"], record["owed"]["reports"]
        known = f"{counted(trainings, 'training')}, {counted(reports, 'report')}"
        what = known if trainings else "figures or files of the sweep"
        console.print(f"not in MLflow yet: {what} (orchestrate track SWEEP)")


@app.command()
def fronts(sweep: SweepArgument, as_json: JsonOption = False) -> None:
    """The Pareto front of each layer: lowest KL for each sparsity, with the dictionary of each point."""
    ledger = open_ledger(sweep)
    if as_json:
        print_json(fronts_record(ledger))
    else:
        print_fronts(ledger)


@app.command()
def ui(
    sweep: Annotated[
        str | None, typer.Argument(metavar="[SWEEP]", help="A sweep; left out: the store of all sweeps in runs/.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port on this machine.", min=1, max=65534)] = 5000,
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="Open optuna-dashboard too, on the sweep's studies, one port further.")
    ] = False,
) -> None:
    """Open the MLflow UI on a sweep's tracking store; Ctrl-C closes it."""
    from orchestrator.web_pages import mlflow_command, mlflow_environment, require_free, serve

    commands, announced = [], []
    address = _tracking_address(sweep)
    if address.startswith("http"):
        announced.append(f"this sweep is tracked by the MLflow server at {redact_url(address)}")
    else:
        require_free(port)
        commands.append(mlflow_command(port))
        announced.append(f"MLflow UI: http://127.0.0.1:{port} (ready in a few seconds; Ctrl-C closes it)")
        announced.append("sweeps are under its *Model training*, upper left, and there under *Experiments*")
    if dashboard:
        from orchestrator.dashboard import dashboard_command, export_studies

        if sweep is None:
            raise InputError("--dashboard: shows one sweep's studies; give it: orchestrate ui SWEEP --dashboard")
        require_free(port + 1)
        commands.append(dashboard_command(export_studies(open_ledger(sweep)), port + 1))
        announced.append(f"optuna-dashboard: http://127.0.0.1:{port + 1}")
    # nothing is said to be there before all that may be refused was looked at
    for line in announced:
        messages.print(line, markup=False, soft_wrap=True)
    if commands and not serve(commands, mlflow_environment(address)):
        raise typer.Exit(1)


@app.command()
def track(sweep: SweepArgument) -> None:
    """Deliver to MLflow what it does not have of a sweep: for one whose server was away."""
    from orchestrator.late_delivery import deliver_late

    ledger, (tracking, storage) = open_ledger(sweep), tracking_of(sweep)
    address = deliver_late(ledger, tracking, storage)
    messages.print(f"MLflow at {address} has everything", markup=False, soft_wrap=True)


@app.command()
def simulate(
    ledger: Annotated[
        str,
        typer.Argument(metavar="LEDGER", help="A finished sweep: its folder, its ledger file, its sweep file or name."),
    ],
    policy: Annotated[
        # whether it can be read is answered by what reads it
        Path, typer.Option(metavar="FILE", readable=False, help="How trainings are chosen: see docs/sweep-file.md.")
    ],
    seeds: Annotated[int, typer.Option(help="Replays, each with a seed of its own.", min=1, max=1000)] = 1,
    as_json: JsonOption = False,
) -> None:
    """Replay a finished sweep's trainings under another policy: hypervolume against tokens, nothing trained."""
    from orchestrator.simulation.curves import curves_record, curves_table
    from orchestrator.simulation.policy import load_policy
    from orchestrator.simulation.recorded import read_recorded_sweep
    from orchestrator.simulation.replay import SNAPPING_RULE, replay

    chosen = load_policy(policy)
    path = Path(ledger)
    opened = Ledger.open_existing(path) if path.is_file() and path.suffix == ".sqlite" else open_ledger(ledger)
    recorded = read_recorded_sweep(opened)
    curves = [replay(recorded, chosen.model_copy(update={"seed": chosen.seed + number})) for number in range(seeds)]
    record = curves_record(recorded, curves)
    if as_json:
        print_json(record)
        return
    messages.print(SNAPPING_RULE, highlight=False)
    if recorded.outside:
        messages.print(f"left out: {recorded.outside} finished trainings outside the sweep's present search.space")
    console.print(curves_table(record))


@app.command()
def report(
    sweep: SweepArgument,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to; left out: report.html in the sweep's folder.")
    ] = None,
    training: Annotated[
        str | None, typer.Option(metavar="ID", help="The training to examine; left out: the knee of each front.")
    ] = None,
) -> None:
    """Write a sweep of transcoders as one HTML page, for MLflow too: fronts, costs, trainings, heads, attention."""
    from orchestrator.report.write import write_report

    ledger = open_ledger(sweep)
    place = user_path("--output", str(output)) if output is not None else None
    path, left_out = write_report(ledger, place, training)
    for line in left_out:
        messages.print(f"left out: {line}", markup=False, highlight=False, soft_wrap=True)
    shown = str(path) if output is not None else ledger.storage.shown(path)
    console.print(shown, markup=False, highlight=False, soft_wrap=True)
    if output is None:
        _deliver_report(sweep, ledger)


def _deliver_report(sweep: str, ledger: Ledger) -> None:
    from orchestrator.late_delivery import deliver_late
    from orchestrator.tracking_store import TrackingUnavailable

    try:
        deliver_late(ledger, *tracking_of(sweep))
    except (InputError, TrackingUnavailable) as error:
        # it is written all the same, and a driver at work delivers it
        messages.print(f"MLflow does not have it yet: {error}", markup=False, highlight=False, soft_wrap=True)


def run(arguments: Sequence[str]) -> int:
    """Does what the command line asks and returns the exit code; what goes wrong becomes one line."""
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    command = typer.main.get_command(app)
    try:
        with command.make_context("orchestrate", list(arguments) or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except TyperException as error:
        say_error(f"{' '.join(error.format_message().split()).rstrip('.')}; see orchestrate --help")
        return 2
    except InputError as error:
        say_error(str(error))
        return 2
    except (OSError, TrackingUnavailable) as error:
        # a full disk, a folder or a server that went away: the same command continues once that is mended
        say_error(str(error))
        return 1
    return 0


def _tracking_address(sweep: str | None) -> str:
    """Where MLflow keeps a sweep's runs, or those of every sweep in runs/."""
    from orchestrator.tracking_store import tracking_address

    tracking, storage = (None, Path("runs")) if sweep is None else tracking_of(sweep)
    address, _ = tracking_address(tracking, storage)
    file = sqlite_file(address)
    if file is not None and not file.is_file():
        raise InputError(f"{file}: no tracking store here; run a sweep first, or name one: orchestrate ui SWEEP")
    return address
