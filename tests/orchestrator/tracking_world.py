"""A sweep's ledger with made-up trainings, and what MLflow shows of it."""

import hashlib
import json
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run

from orchestrator.ledger import Ledger
from orchestrator.tracking_store import tracking_address
from qkmodel.dictionary import ATTENTION_FILE, CONFIG_FILE, TRANSCODER_FILE

DICTIONARY_FILES = {f"dictionary/{name}" for name in (TRANSCODER_FILE, ATTENTION_FILE, CONFIG_FILE)}
REFERENCE = {"kl_baseline": 2.0, "l0_cap": 128.0}
IDENTITY = {"corpus": {"context": 128}, "training": {"tokens": 1000}, "seed": 3}


def start(ledger: Ledger, training_id: str, k: int = 16, study: str = "study") -> None:
    hyperparameters = {"dictionary_size": 512, "activation": "topk", "k": k, "learning_rate": 3e-3, "seed": 0}
    ledger.add_training(study, training_id, hyperparameters, 1000)
    ledger.start(training_id, "pack-0", {"device": "cpu"})


def finish(ledger: Ledger, training_id: str, l0: float, kl: float, attempt: int = 1, **metrics: float) -> None:
    """`attempt` is in the dictionary's place; each has the same content."""
    place = f"dictionaries/{training_id}-{attempt}"
    metrics |= {"kl": kl, "l0": l0, "kl_recovered": 1 - kl / 2, "ce_recovered": None}
    ledger.finish(training_id, metrics, place, write_dictionary(ledger.folder / place, f"{training_id} {kl}"))


def write_dictionary(folder: Path, content: str) -> str:
    """Files whose hashes are those recorded, though they hold no tensors; the hash that fixes them all."""
    folder.mkdir(parents=True)
    for name in (TRANSCODER_FILE, ATTENTION_FILE):
        (folder / name).write_text(content)
    config = json.dumps({"files": dict.fromkeys((TRANSCODER_FILE, ATTENTION_FILE), sha256(content))})
    (folder / CONFIG_FILE).write_text(config)
    return sha256(config)


def sha256(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def client_of(storage: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=tracking_address(None, storage)[0])


def runs(storage: Path) -> tuple[Run, dict[str, Run]]:
    """The one parent run, and the children by training id."""
    client = client_of(storage)
    found = client.search_runs([client.get_experiment_by_name("l1").experiment_id])
    (parent,) = [run for run in found if "qk.sweep" in run.data.tags]
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    by_id = {run.data.tags["qk.training_id"]: run for run in children}
    assert len(by_id) == len(children) == len(found) - 1
    return parent, by_id


def history(storage: Path, run: Run, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client_of(storage).get_metric_history(run.info.run_id, name)]


def artifacts(storage: Path, run: Run, folder: str) -> set[str]:
    return {item.path for item in client_of(storage).list_artifacts(run.info.run_id, folder)}


def front_table(storage: Path, parent: Run) -> list[dict]:
    """The rows of the table that MLflow's page of the parent run shows for layer 8."""
    assert json.loads(parent.data.tags["mlflow.loggedArtifacts"]) == [{"path": "fronts/L08.json", "type": "table"}]
    table = json.loads(Path(client_of(storage).download_artifacts(parent.info.run_id, "fronts/L08.json")).read_text())
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
