"""`orchestrate choose`, `export` and `explain`: what is done with single dictionaries."""

from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.addresses import HIDDEN
from orchestrator.choice import RULES, apply_rule, parse_rule
from orchestrator.cli_output import JsonOption, LayerOption, SweepArgument, console, messages, print_json
from orchestrator.status import study_statuses
from orchestrator.storage.address import check_storage_text, is_bucket
from orchestrator.storage_check import check_bucket
from orchestrator.sweep_argument import open_ledger, tracking_of
from qkmodel.errors import InputError
from qkmodel.files import require_place, user_path

dictionary_commands = typer.Typer()


@dictionary_commands.command()
def choose(
    sweep: SweepArgument,
    layer: LayerOption = None,
    rule: Annotated[str, typer.Option(help=f"{RULES}.")] = "knee",
    as_json: JsonOption = False,
) -> None:
    """Register one dictionary of each front in MLflow's registry, and print the Python that loads it."""
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


@dictionary_commands.command()
def export(
    sweep: SweepArgument,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder to write; it must not be there yet.")],
    layer: LayerOption = None,
    rule: Annotated[str | None, typer.Option(help=f"{RULES}; knee where left out.")] = None,
    training: Annotated[str | None, typer.Option(metavar="ID", help="The same as --rule training=ID.")] = None,
) -> None:
    """Write one dictionary as a folder for a model hub: safetensors, configuration and a model card."""
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


@dictionary_commands.command()
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
