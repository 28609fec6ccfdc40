"""What MLflow holds after results, files or MLflow itself have changed behind its back, and what is owed then."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.ledger import Ledger
from orchestrator.report import REPORT_FILE
from orchestrator.starts import Lease
from orchestrator.tracking import NO_GIT_DIFF, Tracker
from orchestrator.tracking_notes import Owed, owed
from orchestrator.tracking_store import SHA256_TAG, TrackingUnavailable, tracking_address
from tests.orchestrator.tracking_world import (
    DICTIONARY_FILES,
    IDENTITY,
    REFERENCE,
    artifacts,
    client_of,
    finish,
    front_table,
    history,
    runs,
    start,
)


def text_of(storage: Path, run_id: str, path: str) -> str:
    return Path(client_of(storage).download_artifacts(run_id, path)).read_text()


def test_a_result_that_is_trained_anew_replaces_the_former(storage: Path, ledger: Ledger) -> None:
    tracker = Tracker(None, storage, ledger)
    start(ledger, "one")
    ledger.report("one", 1000, {}, seconds=1.0)
    finish(ledger, "one", l0=16.0, kl=0.1)
    tracker.deliver("FINISHED")
    ledger.discard_result("one", "its dictionary is gone")
    tracker.deliver()
    child = runs(storage)[1]["one"]
    assert (child.info.status, child.data.tags["state"]) == ("SCHEDULED", "open")
    assert not {"pareto", "qk.dictionary_sha256"} & set(child.data.tags)
    ledger.start("one", "pack-1", {})
    ledger.report("one", 1000, {}, seconds=1.0)
    finish(ledger, "one", l0=8.0, kl=0.2, attempt=2)
    tracker.deliver("FINISHED")
    parent, children = runs(storage)
    child = children["one"]
    assert (child.info.status, child.data.tags["qk.dictionary_sha256"]) == (
        "FINISHED",
        ledger.training("one").dictionary_sha256,
    )
    assert (child.data.metrics["kl"], child.data.tags["pareto"]) == (0.2, "true")
    assert text_of(storage, child.info.run_id, "dictionary/transcoder.safetensors") == "one 0.2"
    assert [(row["kl"], row["l0"]) for row in front_table(storage, parent)] == [(0.2, 8.0)]
    assert parent.data.metrics["hypervolume_L08"] == history(storage, parent, "hypervolume_L08")[-1][1]
    assert len(history(storage, parent, "hypervolume_L08")) == 2


def test_a_dictionary_that_is_gone_is_said_and_holds_up_nothing_else(storage: Path, ledger: Ledger) -> None:
    start(ledger, "one")
    finish(ledger, "one", l0=16.0, kl=0.1)
    place = ledger.folder / "dictionaries" / "one-1"
    place.rename(storage / "away")
    tracker = Tracker(None, storage, ledger)
    for _ in range(2):
        with pytest.raises(
            TrackingUnavailable, match=r"one-1/\S+ is gone; start the sweep again, which trains it anew"
        ):
            tracker.deliver("FINISHED")
    parent, children = runs(storage)
    assert (parent.info.status, children["one"].data.tags["pareto"]) == ("FINISHED", "true")
    assert owed(ledger) == Owed(0, 0, anything=True)
    (storage / "away").rename(place)
    tracker.deliver("FINISHED")
    assert artifacts(storage, children["one"], "dictionary") == DICTIONARY_FILES
    assert owed(ledger) == Owed(0, 0, anything=False)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("transcoder.safetensors", "one 0.2", "is damaged or was changed"),
        ("attention.safetensors", "", "is damaged or was changed"),
        ("config.json", "{}", "is not the one that was recorded"),
        ("attention.safetensors", None, "is gone"),
    ],
)
def test_a_damaged_dictionary_is_not_sent_and_one_trained_anew_is(
    storage: Path, ledger: Ledger, file: str, content: str | None, words: str
) -> None:
    start(ledger, "one")
    finish(ledger, "one", l0=16.0, kl=0.1)
    place, tracker = ledger.folder / "dictionaries" / "one-1", Tracker(None, storage, ledger)
    (place / file).unlink()
    if content is not None:
        (place / file).write_text(content)
    way = f"delete {place} and start the sweep again, which trains it anew"
    for _ in range(2):
        with pytest.raises(TrackingUnavailable, match=f"{re.escape(str(place / file))} {words}; {re.escape(way)}$"):
            tracker.deliver("FINISHED")
    child = runs(storage)[1]["one"]
    assert artifacts(storage, child, "dictionary") == set()
    assert owed(ledger) == Owed(0, 0, anything=True)
    ledger.discard_result("one", "its dictionary is gone")
    ledger.start("one", "pack-1", {})
    finish(ledger, "one", l0=16.0, kl=0.1, attempt=2)
    tracker.deliver("FINISHED")
    assert text_of(storage, child.info.run_id, "dictionary/transcoder.safetensors") == "one 0.1"
    assert artifacts(storage, child, "dictionary") == DICTIONARY_FILES
    assert owed(ledger) == Owed(0, 0, anything=False)


def test_what_is_trained_anew_to_the_same_hash_is_sent_whole(storage: Path, ledger: Ledger) -> None:
    tracker = Tracker(None, storage, ledger)
    start(ledger, "one")
    finish(ledger, "one", l0=16.0, kl=0.1)
    tracker.deliver("FINISHED")
    child, before = runs(storage)[1]["one"], ledger.training("one")
    (there,) = storage.glob("mlflow-artifacts/**/transcoder.safetensors")
    there.write_text("damaged in the store")
    ledger.discard_result("one", "its dictionary is gone")
    ledger.start("one", "pack-1", {})
    finish(ledger, "one", l0=16.0, kl=0.1, attempt=2)
    assert ledger.training("one").dictionary_sha256 == before.dictionary_sha256
    tracker.deliver("FINISHED")
    assert text_of(storage, child.info.run_id, "dictionary/transcoder.safetensors") == "one 0.1"


def test_what_is_owed_is_known_without_asking_mlflow(storage: Path, ledger: Ledger) -> None:
    start(ledger, "one")
    ledger.report("one", 500, {"loss": 0.9, "kl": 0.5}, seconds=1.0)
    start(ledger, "two", k=8)
    assert owed(ledger) == Owed(2, 2, anything=True)
    lease = Lease(ledger)
    tracker = Tracker(None, storage, ledger)
    tracker.deliver()
    assert owed(ledger) == Owed(0, 0, anything=False)
    ledger.report("one", 900, {"loss": 0.4}, seconds=2.0)
    assert owed(ledger) == Owed(1, 1, anything=True)
    finish(ledger, "one", l0=16.0, kl=0.1)
    ledger.fail("two", "diverged")
    assert owed(ledger) == Owed(2, 1, anything=True)
    tracker.deliver()
    assert owed(ledger) == Owed(0, 0, anything=False)
    lease.release()
    # its parent run would run for ever
    assert owed(ledger) == Owed(0, 0, anything=True)
    tracker.deliver("FINISHED")
    assert owed(ledger) == Owed(0, 0, anything=False)


def test_a_parent_that_still_runs_after_its_driver_was_killed_is_owed_an_end(storage: Path, ledger: Ledger) -> None:
    script = f"""
import os
from pathlib import Path
from orchestrator.ledger import Ledger
from orchestrator.starts import Lease
from orchestrator.tracking import Tracker
from orchestrator.tracking_notes import owed
storage = Path({str(storage)!r})
ledger = Ledger.open_existing(storage / "l1" / "ledger.sqlite")
Lease(ledger)
Tracker(None, storage, ledger).deliver()
print(owed(ledger).anything, flush=True)
os.kill(os.getpid(), 9)
"""
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", script], stdout=subprocess.PIPE, text=True)
    assert (ran.returncode, ran.stdout) == (-9, "False\n")
    assert owed(ledger) == Owed(0, 0, anything=True)


def test_a_front_a_page_or_a_tag_that_did_not_arrive_is_owed(storage: Path, ledger: Ledger) -> None:
    tracker = Tracker(None, storage, ledger)
    lease = Lease(ledger)
    start(ledger, "one")
    finish(ledger, "one", l0=16.0, kl=0.1)
    tracker.deliver()
    start(ledger, "two", k=8)
    finish(ledger, "two", l0=8.0, kl=0.2)
    # the page of the front waits for its minute
    tracker.deliver()
    assert owed(ledger) == Owed(0, 0, anything=True)
    lease.release()
    tracker.deliver("FINISHED")
    assert owed(ledger) == Owed(0, 0, anything=False)
    # the other training leaves the front by it, and the first gets nothing else
    ledger.set_constraints("study", {"l0": (None, 8.0)})
    assert owed(ledger) == Owed(0, 0, anything=True)
    tracker.deliver("FINISHED")
    assert owed(ledger) == Owed(0, 0, anything=False)
    parent, children = runs(storage)
    assert "pareto" not in children["one"].data.tags
    assert [row["id"] for row in front_table(storage, parent)] == ["two"]
    # of the second alone, up to (128, 2); MLflow keeps what it was before
    assert pytest.approx(4 * math.log2(2.0 / 0.2)) in [v for _, v in history(storage, parent, "hypervolume_L08")]


def test_what_another_store_held_is_no_longer_taken_for_delivered(storage: Path, ledger: Ledger) -> None:
    start(ledger, "one")
    Tracker(None, storage, ledger).deliver("KILLED")
    with pytest.raises(TrackingUnavailable):
        Tracker(f"sqlite:///{storage}/nowhere/mlflow.db", storage, ledger).deliver("KILLED")
    before = ledger.delivered()
    parent, children = runs(storage)
    for run in (parent, *children.values()):
        client_of(storage).delete_run(run.info.run_id)
    Tracker(None, storage, ledger).deliver()
    assert not before.keys() & ledger.delivered().keys()
    ledger.report("one", 500, {"loss": 0.9}, seconds=1.0)
    assert owed(ledger) == Owed(1, 1, anything=True)


def test_a_tag_that_arrived_without_its_note_is_taken_away(
    storage: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def set_tag_and_die(client: MlflowClient, run_id: str, name: str, value: str) -> None:
        set_tag(client, run_id, name, value)
        if name == "pareto":
            raise KeyboardInterrupt

    set_tag = MlflowClient.set_tag
    start(ledger, "one")
    finish(ledger, "one", l0=16.0, kl=0.2)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(MlflowClient, "set_tag", set_tag_and_die)
        Tracker(None, storage, ledger).deliver()
    assert runs(storage)[1]["one"].data.tags["pareto"] == "true"
    start(ledger, "two", k=8)
    finish(ledger, "two", l0=8.0, kl=0.1)
    Tracker(None, storage, ledger).deliver("FINISHED")
    assert {name for name, run in runs(storage)[1].items() if "pareto" in run.data.tags} == {"two"}


def test_a_store_that_is_come_back_to_has_no_tags_of_the_past(
    storage: Path, ledger: Ledger, migrated: bytes, tmp_path: Path
) -> None:
    (tmp_path / "other.db").write_bytes(migrated)
    start(ledger, "one")
    finish(ledger, "one", l0=16.0, kl=0.2)
    start(ledger, "two", k=8)
    ledger.fail("two", "diverged")
    Tracker(None, storage, ledger).deliver("KILLED")
    ledger.reopen("two")
    start(ledger, "two", k=8)
    finish(ledger, "two", l0=8.0, kl=0.1)
    ledger.discard_result("one", "its dictionary is gone")
    # which has the notes of the first store forgotten
    Tracker(f"sqlite:///{tmp_path}/other.db", storage, ledger).deliver()
    Tracker(None, storage, ledger).deliver()
    parent, children = runs(storage)
    assert parent.info.status == "RUNNING"
    assert not {"pareto", SHA256_TAG} & children["one"].data.tags.keys()
    assert children["two"].data.tags["pareto"] == "true" and "error" not in children["two"].data.tags


@pytest.mark.parametrize("left", ["notes", "deleted run"])
def test_trainings_below_a_parent_that_was_deleted_go_below_the_new_one(
    storage: Path, ledger: Ledger, left: str
) -> None:
    """And those of another storage's sweep stay where they are."""
    for name, k in (("one", 16), ("two", 8)):
        start(ledger, name, k=k)
        ledger.report(name, 500, {"loss": 0.9}, seconds=1.0)
        finish(ledger, name, l0=float(k), kl=1.0 / k)
    other = Ledger(storage / "other" / "ledger.sqlite")
    other.open_sweep("l1", {}, None, {})
    other.open_study("study", "transcoder", 8, IDENTITY, model="m", corpus="c")
    other.set_reference("study", REFERENCE)
    start(other, "one")
    Tracker(None, storage, ledger).deliver("FINISHED")
    Tracker(None, storage, other).deliver("KILLED")
    client, notes = client_of(storage), ledger.delivered()
    experiment = client.get_experiment_by_name("l1").experiment_id

    def below(sweep: Ledger) -> dict[str, str]:
        found = client.search_runs([experiment])
        (parent,) = [run for run in found if run.data.tags.get("qk.sweep") == sweep.sweep().run_tag]
        mine = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        return {run.info.run_id: run.data.tags["qk.training_id"] for run in mine}

    before, others = below(ledger), below(other)
    (parent,) = notes.keys() - before.keys()
    client.delete_run(parent)
    if left == "deleted run":
        ledger.forget_delivered(())
    Tracker(None, storage, ledger).deliver("FINISHED")
    assert below(ledger) == before and below(other) == others
    assert len(client.search_runs([experiment])) == 5
    assert {run_id: notes[run_id] for run_id in before}.items() <= ledger.delivered().items()
    assert [(point.step, point.value) for point in client.get_metric_history(min(before), "loss")] == [(500, 0.9)]


def test_an_experiment_that_was_deleted_is_answered_with_the_way_out(storage: Path, ledger: Ledger) -> None:
    Tracker(None, storage, ledger).deliver()
    address = tracking_address(None, storage)[0]
    client = client_of(storage)
    experiment = client.get_experiment_by_name("l1").experiment_id
    for command in (f"experiments restore --experiment-id {experiment}", f"gc --experiment-ids {experiment}"):
        client.delete_experiment(experiment)
        with pytest.raises(TrackingUnavailable, match="experiment l1 was deleted in MLflow") as caught:
            Tracker(None, storage, ledger).deliver()
        assert f"mlflow {command}" in str(caught.value) and f"MLFLOW_TRACKING_URI='{address}'" in str(caught.value)
        more = ["--backend-store-uri", address] if command.startswith("gc") else []
        assert " ".join(more).replace(address, f"'{address}'") in str(caught.value)
        environment = os.environ | {"MLFLOW_TRACKING_URI": address}
        subprocess.run([sys.executable, "-m", "mlflow", *command.split(), *more], env=environment, check=True)
        Tracker(None, storage, ledger).deliver()


def test_the_git_diff_is_that_of_the_latest_start(storage: Path, ledger: Ledger) -> None:
    tracker = Tracker(None, storage, ledger)
    tracker.deliver()
    assert artifacts(storage, runs(storage)[0], "") == {"sweep.yaml", "start.yaml"}
    (ledger.folder / "git.diff").write_text("+one more line\n")
    tracker.deliver()
    run_id = runs(storage)[0].info.run_id
    assert text_of(storage, run_id, "git.diff") == "+one more line\n"
    (ledger.folder / "git.diff").unlink()
    tracker.deliver()
    assert text_of(storage, run_id, "git.diff") == NO_GIT_DIFF


def test_the_report_is_an_artifact_as_soon_as_it_is_written(storage: Path, ledger: Ledger) -> None:
    tracker = Tracker(None, storage, ledger)
    tracker.deliver("FINISHED")
    for page in ("one", "another"):
        (ledger.folder / REPORT_FILE).write_text(page)
        assert owed(ledger) == Owed(0, 0, anything=True)
        tracker.deliver("FINISHED")
        assert text_of(storage, runs(storage)[0].info.run_id, REPORT_FILE) == page
        assert owed(ledger) == Owed(0, 0, anything=False)
