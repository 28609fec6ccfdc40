"""The commands of `orchestrate`: parse, call, print."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.exceptions import TyperException

from orchestrator.addresses import HIDDEN, redact_url, sqlite_file
from orchestrator.cli_output import (
    JsonOption,
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
from orchestrator.storage.address import check_storage_text, is_bucket
from orchestrator.storage_check import check_bucket
from orchestrator.sweep_argument import open_ledger, tracking_of
from orchestrator.sweep_command import run_and_show
from orchestrator.tables import counted, state_table
from orchestrator.tracking_store import TrackingUnavailable
from qkmodel.errors import InputError
from qkmodel.files import require_place, user_path

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train query/key transcoders over layers, sizes and sparsities, and see which explain the attention pattern.",
)
app.add_typer(cluster_commands)

SweepArgument = Annotated[
    str, typer.Argument(metavar="SWEEP", help="A sweep's folder or address, its sweep file, or its name below runs/.")
]
LayerOption = Annotated[int | None, typer.Option("--layer", metavar="N", help="One layer's front only.", min=0)]


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
def choose(
    sweep: SweepArgument,
    layer: LayerOption = None,
    rule: Annotated[
        str, typer.Option(help="knee, l0=16 (of masks pairs=9000), kl_recovered>=0.95 or training=ID.")
    ] = "knee",
    as_json: JsonOption = False,
) -> None:
    """Register one dictionary of each front in MLflow's registry, and print the Python that loads it."""
    from orchestrator.choice import apply_rule, parse_rule

    parsed, ledger = parse_rule(rule), open_ledger(sweep)
    choices = apply_rule(study_statuses(ledger), parsed, layer)
    tracking, storage = tracking_of(sweep)
    from orchestrator.registry import chosen_record, register

    registered = register(tracking, storage, ledger, choices)
    records = [
        chosen_record(ledger, choice, one, tracking, storage) for choice, one in zip(choices, registered, strict=True)
    ]
    if as_json:
        print_json({"sweep": ledger.sweep().name, "chosen": records})
        return
    for choice, record in zip(choices, records, strict=True):
        _print_chosen(record, choice.training.label)


@app.command()
def export(
    sweep: SweepArgument,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder to write; it must not be there yet.")],
    layer: LayerOption = None,
    rule: Annotated[
        str | None, typer.Option(help="knee (default), l0=16 (of masks pairs=9000), kl_recovered>=0.95 or training=ID.")
    ] = None,
    training: Annotated[str | None, typer.Option(metavar="ID", help="The same as --rule training=ID.")] = None,
) -> None:
    """Write one dictionary as a folder for a model hub: safetensors, configuration and a model card."""
    from orchestrator.choice import apply_rule, parse_rule

    if rule is not None and training is not None:
        raise InputError("--rule and --training exclude each other; give one")
    parsed = parse_rule(f"training={training}" if training is not None else rule or "knee")
    ledger = open_ledger(sweep)
    choices = apply_rule(study_statuses(ledger), parsed, layer)
    if len(choices) > 1:
        layers = ", ".join(str(choice.training.layer) for choice in choices)
        raise InputError(f"--layer: the sweep has layers {layers}; say which one to export")
    from orchestrator.export import export_dictionary

    export_dictionary(ledger, choices[0], user_path("--output", str(output)).absolute())
    console.print(f"{choices[0].training.label} is in {output}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def explain(
    dictionary: Annotated[
        str, typer.Argument(metavar="DICTIONARY", help="A dictionary's folder, or models:/NAME@ALIAS.")
    ],
    head: Annotated[int, typer.Option(metavar="H", help="The head, counted from 0.", min=0)],
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model reads.")] = None,
    text: Annotated[Path | None, typer.Option(metavar="FILE", readable=False, help="The same from a file.")] = None,
    keys: Annotated[int, typer.Option(help="Positions attended to most, for each query position.", min=1)] = 2,
    pairs: Annotated[int, typer.Option(help="Pairs of features shown for each.", min=1)] = 4,
    tracking: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="MLflow's store, for models:/…; default: runs/mlflow.db.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="PAGE", help="Write an HTML page too, with where the pairs meet in the corpus."),
    ] = None,
    storage: Annotated[
        str, typer.Option(metavar="STORAGE", help="Where sweeps keep activations, for the corpus on that page.")
    ] = "runs",
    as_json: JsonOption = False,
) -> None:
    """The pairs of features behind a head's attention on a text; their contributions add up to the score."""
    from orchestrator.explanation import explain, explanation_record, explanation_table, open_dictionary, read_prompt

    words = read_prompt(prompt, text)
    if output is not None:
        from orchestrator.report.explanation_page import write_explanation

        output = user_path("--output", str(output))
        # before the model is loaded for it
        require_place("--output", output)
        check_storage_text(storage)
        if is_bucket(storage):
            check_bucket(storage, is_written=False)
    opened = open_dictionary(dictionary, tracking)
    found, tokens, texts = explain(opened, head, words, keys, pairs)
    if output is not None:
        for line in write_explanation(output, opened, found, tokens, texts, storage):
            messages.print(line, markup=False, highlight=False, soft_wrap=True)
        messages.print(f"written: {output}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print_json(explanation_record(found, tokens))
        return
    console.print(explanation_table(found, tokens))


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
    """Write a sweep as one HTML page, which MLflow gets too: fronts, costs, trainings, heads, features, attention."""
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


def _print_chosen(record: dict[str, Any], label: str) -> None:
    version = f"version {record['version']}{'' if record['is_new'] else ', registered before'}"
    moved = record["alias_was"] not in (None, record["version"])
    before = f"; the alias was at version {record['alias_was']}" if moved else ""
    messages.print(
        f"{record['reference']} is {label} ({version}{before})", markup=False, highlight=False, soft_wrap=True
    )
    if HIDDEN in record["tracking"]:
        messages.print("needs MLFLOW_TRACKING_URI, the store's address, whose password is not shown:")
    console.print(record["python"], markup=False, highlight=False, soft_wrap=True)


def _tracking_address(sweep: str | None) -> str:
    """Where MLflow keeps a sweep's runs, or those of every sweep in runs/."""
    from orchestrator.tracking_store import tracking_address

    tracking, storage = (None, Path("runs")) if sweep is None else tracking_of(sweep)
    address, _ = tracking_address(tracking, storage)
    file = sqlite_file(address)
    if file is not None and not file.is_file():
        raise InputError(f"{file}: no tracking store here; run a sweep first, or name one: orchestrate ui SWEEP")
    return address
