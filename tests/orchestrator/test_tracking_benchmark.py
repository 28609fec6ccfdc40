"""What `benchmarks/tracking.py` makes up is delivered: its figures are of whole deliveries."""

from pathlib import Path

from mlflow import MlflowClient

from benchmarks.tracking import book
from orchestrator.ledger import Ledger
from orchestrator.status import status_record
from orchestrator.tracking import Tracker
from orchestrator.tracking_store import tracking_address


def test_made_up_trainings_are_delivered(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "tracking" / "ledger.sqlite")
    book(ledger, 2)
    Tracker(None, tmp_path, ledger).deliver("FINISHED")
    assert not status_record(ledger)["owed"]["anything"]
    client = MlflowClient(tracking_address(None, tmp_path)[0])
    experiment = client.get_experiment_by_name("tracking").experiment_id
    (member,) = client.search_runs([experiment], "tags.pareto = 'true'", max_results=1)
    assert len(client.list_artifacts(member.info.run_id, "dictionary")) == 3
