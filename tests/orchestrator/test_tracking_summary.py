"""The description of a sweep's parent run, where there is more to say than MLflow keeps."""

from pathlib import Path

from orchestrator.ledger import Ledger
from orchestrator.tracking_summary import DESCRIPTION_TAG, MAX_CHARACTERS, SweepSummary
from tests.orchestrator.tracking_world import IDENTITY, REFERENCE, client_of, start


def add_study(ledger: Ledger, layer: int, members: int, failures: int = 0) -> None:
    study = f"{layer:016x}"
    ledger.open_study(study, "transcoder", layer, IDENTITY, model="m", corpus="c")
    ledger.set_reference(study, REFERENCE)
    for number in range(1, members + 1):
        name = f"{layer}-{number}"
        start(ledger, name, k=number, study=study)
        metrics = {"kl": 0.5 / number, "l0": float(number), "kl_recovered": 1 - 0.25 / number}
        ledger.finish(name, metrics, f"dictionaries/{name}", "aa" * 32)
    for number in range(failures):
        start(ledger, f"{layer}-failed-{number}", k=100 + number, study=study)
        ledger.fail(f"{layer}-failed-{number}", f"reason {number} " + "and so on " * 100)


def description(storage: Path, ledger: Ledger) -> str:
    client = client_of(storage)
    run_id = client.create_run(client.create_experiment("l1")).info.run_id
    SweepSummary(client, ledger, "1", run_id).deliver({})
    return client.get_run(run_id).data.tags[DESCRIPTION_TAG]


def test_a_long_description_has_fewer_rows_and_every_layer(storage: Path, ledger: Ledger) -> None:
    for layer in range(9, 21):
        add_study(ledger, layer, members=10, failures=2 if layer == 20 else 0)
    said = description(storage, ledger)
    assert len(said) <= MAX_CHARACTERS
    for layer in range(9, 21):
        assert f"### L{layer:02d}\n" in said
        assert f"more: fronts/L{layer:02d}.json" in said
    assert said.count("[10 on the front](#/experiments/") == 12
    assert "2 failed:" in said and "`reason 0 and so on" in said and "…`" in said


def test_layers_for_which_there_is_no_room_are_named(storage: Path, ledger: Ledger) -> None:
    for layer in range(9, 60):
        add_study(ledger, layer, members=0)
    said = description(storage, ledger)
    assert len(said) <= MAX_CHARACTERS
    shown, _, rest = said.partition("Left out for want of room: ")
    missing = rest.removesuffix("; see fronts/").split(", ")
    names = [line.removeprefix("### ") for line in shown.splitlines() if line.startswith("### ")]
    assert len(names) > 20 and names + missing == [f"L{layer:02d}" for layer in range(8, 60)]
