"""A sweep in figures: what counts, after its file was edited."""

from pathlib import Path

from orchestrator.ledger import Ledger
from orchestrator.status import status_record

POINT = {"dictionary_size": 512, "activation": "topk", "k": 16, "learning_rate": 3e-3, "seed": 0}


def test_studies_that_the_file_no_longer_asks_for_are_shown_and_not_counted(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.open_sweep("s", {}, None, {})
    for study, layer in [("former", 4), ("present", 8)]:
        ledger.open_study(study, "transcoder", layer, {}, model="m", corpus="c")
        ledger.add_training(study, f"{study} one", POINT, 1000)
        ledger.report(f"{study} one", 250, {"loss": 1.0}, seconds=1.0)
    ledger.set_current({"former": 1000})
    # the next start asks for two trainings, one of which nobody has proposed yet
    ledger.set_current({"present": 2000})
    record = status_record(ledger)
    assert (record["tokens_done"], record["tokens_planned"]) == (250, 2000)
    assert record["trainings"] == {"open": 1, "running": 0, "finished": 0, "stopped": 0, "failed": 0}
    figures = [(one["current"], one["tokens_done"], one["tokens_planned"]) for one in record["studies"]]
    assert figures == [(False, 250, 250), (True, 250, 2000)]
