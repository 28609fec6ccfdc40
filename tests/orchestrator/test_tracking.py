import json
import math
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from orchestrator import load_dictionary
from orchestrator.ledger import Ledger
from orchestrator.ledger_decisions import record_decision
from orchestrator.ledger_records import Decision
from orchestrator.tracking import Tracker
from orchestrator.tracking_notes import end_status
from orchestrator.tracking_store import TrackingUnavailable, tracking_address
from orchestrator.tracking_summary import DESCRIPTION_TAG
from orchestrator.tracking_thread import TrackingThread
from qkmodel.errors import InputError
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
from tests.system.services import MlflowServer


def test_mlflow_shows_what_the_ledger_holds(storage: Path, ledger: Ledger) -> None:
    start(ledger, "one")
    ledger.report("one", 500, {"loss": 0.9, "top1": float("nan")}, seconds=1.0)
    ledger.report("one", 1000, {"loss": 0.4}, seconds=2.0)
    finish(ledger, "one", l0=16.0, kl=0.1)
    Tracker(None, storage, ledger).deliver()

    parent, children = runs(storage)
    (child,) = children.values()
    training = ledger.training("one")
    assert child.info.run_name == "L08 topk16 d512 lr3e-3 s0"
    assert child.info.status == "FINISHED"
    assert child.info.start_time == int(training.started.timestamp() * 1000)
    assert child.info.end_time == int(training.finished.timestamp() * 1000)
    assert child.data.params["layer"] == "8"
    assert child.data.params["k"] == "16"
    named = {"model": "m", "corpus": "c", "context": "128", "tokens": "1000", "sweep_seed": "3"}
    assert named.items() <= child.data.params.items()
    assert child.data.tags["qk.study_id"] == "study"
    assert child.data.metrics == {"loss": 0.4, "kl": 0.1, "l0": 16.0, "kl_recovered": 0.95}
    assert history(storage, child, "loss") == [(500, 0.9), (1000, 0.4)]
    assert history(storage, child, "kl") == [(1000, 0.1)]
    assert child.data.tags["pareto"] == "true"
    assert child.data.tags["state"] == "finished"
    assert artifacts(storage, child, "dictionary") == DICTIONARY_FILES
    assert (parent.info.run_name, parent.info.status) == ("l1", "RUNNING")
    assert parent.data.tags["mlflow.source.git.commit"] == "abc123"
    assert artifacts(storage, parent, "fronts") == {"fronts/L08.png", "fronts/L08.html", "fronts/L08.json"}
    assert artifacts(storage, parent, "") == {"fronts", "sweep.yaml", "start.yaml"}
    (row,) = front_table(storage, parent)
    assert (row["training"], row["kl"], row["k"]) == ("L08 topk16 d512 lr3e-3 s0", 0.1, 16)


def test_delivering_again_changes_nothing(storage: Path, ledger: Ledger) -> None:
    start(ledger, "one")
    ledger.report("one", 500, {"loss": 0.9}, seconds=1.0)
    tracker = Tracker(None, storage, ledger)
    tracker.deliver()
    tracker.deliver()
    ledger.report("one", 1000, {"loss": 0.4}, seconds=2.0)
    finish(ledger, "one", l0=16.0, kl=0.1)
    tracker.deliver()
    before = runs(storage)
    notes = ledger.delivered()
    Tracker(None, storage, ledger).deliver()
    tracker.deliver()
    after = runs(storage)
    assert history(storage, after[1]["one"], "loss") == [(500, 0.9), (1000, 0.4)]
    assert after[1]["one"].to_dictionary() == before[1]["one"].to_dictionary()
    assert after[0].to_dictionary() == before[0].to_dictionary()
    assert ledger.delivered() == notes


def test_a_delivery_whose_notes_were_lost_leaves_no_duplicates(storage: Path, ledger: Ledger) -> None:
    """The worst cut: everything arrived and nothing was noted."""
    start(ledger, "one")
    ledger.report("one", 500, {"loss": 0.9, "kl": 0.2}, seconds=1.0)
    finish(ledger, "one", l0=16.0, kl=0.1)
    Tracker(None, storage, ledger).deliver()
    with sqlite3.connect(ledger.where) as connection:
        connection.execute("DELETE FROM deliveries")
    Tracker(None, storage, ledger).deliver()
    parent, children = runs(storage)
    assert sorted(history(storage, children["one"], "kl")) == [(500, 0.1), (500, 0.2)]
    assert children["one"].data.metrics["kl"] == 0.1
    assert history(storage, children["one"], "loss") == [(500, 0.9)]
    assert len(front_table(storage, parent)) == 1


def test_a_training_that_leaves_the_front_loses_its_tag(storage: Path, ledger: Ledger) -> None:
    tracker = Tracker(None, storage, ledger)
    start(ledger, "first")
    finish(ledger, "first", l0=16.0, kl=0.5)
    tracker.deliver()
    assert runs(storage)[1]["first"].data.tags["pareto"] == "true"
    start(ledger, "better", k=8)
    finish(ledger, "better", l0=8.0, kl=0.4)
    start(ledger, "collapsed", k=4)
    finish(ledger, "collapsed", l0=0.0, kl=1.9)
    tracker.deliver()
    parent, children = runs(storage)
    assert {name for name, run in children.items() if "pareto" in run.data.tags} == {"better"}
    assert artifacts(storage, children["better"], "dictionary") == DICTIONARY_FILES
    assert artifacts(storage, children["collapsed"], "dictionary") == set()
    assert [row["id"] for row in front_table(storage, parent)] == ["better"]


def test_a_failed_training_shows_why_until_it_is_taken_up_again(storage: Path, ledger: Ledger) -> None:
    tracker = Tracker(None, storage, ledger)
    start(ledger, "one")
    ledger.fail("one", "loss is not finite at 300 tokens")
    tracker.deliver()
    child = runs(storage)[1]["one"]
    assert (child.info.status, child.data.tags["error"]) == ("FAILED", "loss is not finite at 300 tokens")
    ledger.reopen("one")
    tracker.deliver()
    start(ledger, "one")
    tracker.deliver()
    child = runs(storage)[1]["one"]
    assert (child.info.status, child.data.tags["state"]) == ("RUNNING", "running")
    assert "error" not in child.data.tags


def test_a_stopped_training_that_is_taken_up_again_goes_on_reporting(storage: Path, ledger: Ledger) -> None:
    start(ledger, "one")
    ledger.report("one", 250, {"kl": 0.5}, 1.0)
    decision = Decision("one", 250, 0, "topk", (0.5, 16.0), True, 1, 2, kept=False, expected=(0.4, 16.0))
    record_decision(ledger, [decision])
    tracker = Tracker(None, storage, ledger)
    tracker.deliver()
    tracker.deliver()
    assert runs(storage)[1]["one"].data.tags["state"] == "stopped"
    ledger.reopen("one")
    ledger.start("one", "pack-1", {"device": "cpu"})
    ledger.report("one", 500, {"kl": 0.4}, 2.0)
    record_decision(ledger, [replace(decision, tokens=500, number=1)])
    tracker.deliver()
    run = runs(storage)[1]["one"]
    assert (run.data.tags["state"], run.info.status) == ("stopped", "KILLED")
    points = client_of(storage).get_metric_history(run.info.run_id, "kl")
    assert [(point.step, point.value) for point in points] == [(250, 0.5), (500, 0.4)]


def test_a_training_that_never_started_has_no_run(storage: Path, ledger: Ledger) -> None:
    ledger.add_training("study", "waiting", {"dictionary_size": 512}, 1000)
    Tracker(None, storage, ledger).deliver()
    assert runs(storage)[1] == {}


def test_the_parent_says_whether_the_sweep_ended_or_was_interrupted(storage: Path, ledger: Ledger) -> None:
    tracker = Tracker(None, storage, ledger)
    start(ledger, "one")
    tracker.deliver("KILLED")
    assert runs(storage)[0].info.status == "KILLED"
    tracker.deliver()
    assert runs(storage)[0].info.status == "RUNNING"
    finish(ledger, "one", l0=16.0, kl=0.1)
    # a training that no start asks for any more stays open for ever
    ledger.add_training("study", "of an earlier file", {"dictionary_size": 512}, 1000)
    tracker.deliver("FINISHED")
    assert runs(storage)[0].info.status == "FINISHED"


def test_a_sweep_that_is_delivered_late_ended_with_its_last_training(storage: Path, ledger: Ledger) -> None:
    start(ledger, "one")
    finish(ledger, "one", l0=4.0, kl=0.1)
    time.sleep(0.1)
    Tracker(None, storage, ledger).deliver("FINISHED")
    parent, children = runs(storage)
    assert parent.info.end_time == children["one"].info.end_time


def test_more_reports_than_a_batch_holds_arrive_in_order(storage: Path, ledger: Ledger) -> None:
    start(ledger, "one")
    ledger.report("one", 500, {f"m{index:04d}": float(index) for index in range(2100)}, seconds=1.0)
    Tracker(None, storage, ledger).deliver()
    assert runs(storage)[1]["one"].data.metrics == {f"m{index:04d}": float(index) for index in range(2100)}


def test_what_was_deleted_in_mlflow_is_delivered_anew(storage: Path, ledger: Ledger) -> None:
    start(ledger, "one")
    ledger.report("one", 500, {"loss": 0.9}, seconds=1.0)
    Tracker(None, storage, ledger).deliver()
    client_of(storage).delete_run(runs(storage)[1]["one"].info.run_id)
    Tracker(None, storage, ledger).deliver()
    assert history(storage, runs(storage)[1]["one"], "loss") == [(500, 0.9)]


def test_a_sweep_begun_afresh_under_the_same_name_has_its_own_parent(storage: Path, ledger: Ledger) -> None:
    Tracker(None, storage, ledger).deliver()
    other = Ledger(storage / "other" / "ledger.sqlite")
    other.open_sweep("l1", {}, None, {})
    Tracker(None, storage, other).deliver()
    client = client_of(storage)
    found = client.search_runs([client.get_experiment_by_name("l1").experiment_id])
    assert len({run.data.tags["qk.sweep"] for run in found}) == len(found) == 2


def test_the_thread_delivers_and_ends_the_parent(storage: Path, ledger: Ledger) -> None:
    thread = TrackingThread(Tracker(None, storage, ledger), interval=0.05)
    start(ledger, "one")
    deadline = time.monotonic() + 30
    while not any("status" in notes for notes in ledger.delivered().values()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    finish(ledger, "one", l0=16.0, kl=0.1)
    assert thread.stop("FINISHED", patience=60) is None
    parent, children = runs(storage)
    assert (parent.info.status, children["one"].info.status) == ("FINISHED", "FINISHED")


def test_studies_of_one_layer_are_told_apart_and_keep_their_files(storage: Path, ledger: Ledger) -> None:
    tracker = Tracker(None, storage, ledger)
    start(ledger, "one")
    finish(ledger, "one", l0=16.0, kl=0.1)
    tracker.deliver()
    ledger.open_study("0123456789abcdef", "transcoder", 8, IDENTITY, model="m", corpus="other")
    ledger.set_reference("0123456789abcdef", REFERENCE)
    start(ledger, "two", study="0123456789abcdef")
    finish(ledger, "two", l0=8.0, kl=0.2)
    start(ledger, "three", k=8)
    finish(ledger, "three", l0=8.0, kl=0.3)
    tracker.deliver("FINISHED")
    parent, _ = runs(storage)
    names = {f"fronts/{name}.{kind}" for name in ("L08", "L08-01234567") for kind in ("png", "html", "json")}
    assert artifacts(storage, parent, "fronts") == names | {"fronts/all.png"}
    shown = {name: table_ids(storage, parent, name) for name in ("L08", "L08-01234567")}
    assert shown == {"L08": ["three", "one"], "L08-01234567": ["two"]}


def table_ids(storage: Path, parent: Run, name: str) -> list[str]:
    path = client_of(storage).download_artifacts(parent.info.run_id, f"fronts/{name}.json")
    table = json.loads(Path(path).read_text())
    return [row[table["columns"].index("id")] for row in table["data"]]


def test_what_is_drawn_is_sent_once_a_minute_and_at_the_end(storage: Path, ledger: Ledger) -> None:
    def drawn() -> dict[str, bytes]:
        names = ("L08.html", "L08.png", "all.png")
        places = [client_of(storage).download_artifacts(runs(storage)[0].info.run_id, f"fronts/{one}") for one in names]
        return {name: Path(place).read_bytes() for name, place in zip(names, places, strict=True)}

    ledger.open_study("other", "transcoder", 9, IDENTITY, model="m", corpus="c")
    tracker = Tracker(None, storage, ledger)
    start(ledger, "training-one")
    finish(ledger, "training-one", l0=16.0, kl=0.1)
    tracker.deliver()
    first = drawn()
    assert b"training-one" in first["L08.html"]
    start(ledger, "training-two", k=8)
    finish(ledger, "training-two", l0=8.0, kl=0.2)
    tracker.deliver()
    assert drawn() == first
    assert len(front_table(storage, runs(storage)[0])) == 2
    tracker.deliver("FINISHED")
    last = drawn()
    assert b"training-two" in last["L08.html"] and all(last[name] != first[name] for name in first)


def test_an_error_that_nobody_foresaw_neither_ends_the_thread_nor_the_sweep(storage: Path, ledger: Ledger) -> None:
    # a run without a study's facts: a KeyError deep inside
    ledger.open_study("odd", "transcoder", 9, {}, model="m", corpus="c")
    start(ledger, "one", study="odd")
    thread = TrackingThread(Tracker(None, storage, ledger), interval=0.05)
    deadline = time.monotonic() + 60
    while thread.error is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "KeyError: 'corpus'" in thread.error and "mlflow.db" in thread.error
    with sqlite3.connect(ledger.where) as connection:
        connection.execute("UPDATE studies SET identity = ?", [json.dumps(IDENTITY)])
    assert thread.stop("FINISHED", patience=60) is None
    assert runs(storage)[1]["one"].data.params["context"] == "128"


def test_two_sweeps_that_start_together_in_a_new_storage_both_arrive(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from orchestrator import load_dictionary
from orchestrator.ledger import Ledger
from orchestrator.ledger_decisions import record_decision
from orchestrator.ledger_records import Decision
from orchestrator.tracking import Tracker
storage, name = Path(sys.argv[1]), sys.argv[2]
ledger = Ledger(storage / name / "ledger.sqlite")
ledger.open_sweep(name, {}, None, {})
tracker = Tracker(None, storage, ledger)
print("ready", flush=True)
sys.stdin.readline()
tracker.deliver("FINISHED")
"""
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    sweeps = [subprocess.Popen([*command, name], **pipes) for name in ("one", "two", "three")]
    for sweep in sweeps:
        assert sweep.stdout.readline() == "ready\n"
    for sweep in sweeps:
        sweep.stdin.write("go\n")
        sweep.stdin.flush()
    ended = [sweep.communicate(timeout=300) for sweep in sweeps]
    assert [sweep.returncode for sweep in sweeps] == [0, 0, 0], ended
    client = client_of(tmp_path)
    assert all(client.get_experiment_by_name(name) is not None for name in ("one", "two", "three"))


@pytest.mark.parametrize("notes_before_the_kill", [1, 8, 20])
def test_a_kill_in_the_middle_of_a_delivery_leaves_no_duplicates(
    storage: Path, ledger: Ledger, notes_before_the_kill: int
) -> None:
    expected = [(100 * step, float(step)) for step in range(1, 6)]
    for number in range(8):
        start(ledger, f"t{number}", k=number + 1)
        for tokens, value in expected:
            ledger.report(f"t{number}", tokens, {"loss": value}, seconds=1.0)
        finish(ledger, f"t{number}", l0=number + 1.0, kl=0.5 / (number + 1))
    script = f"""
from pathlib import Path
from orchestrator import load_dictionary
from orchestrator.ledger import Ledger
from orchestrator.ledger_decisions import record_decision
from orchestrator.ledger_records import Decision
from orchestrator.tracking import Tracker
storage = Path({str(storage)!r})
Tracker(None, storage, Ledger.open_existing(storage / "l1" / "ledger.sqlite")).deliver()
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    while sum(map(len, ledger.delivered().values())) < notes_before_the_kill:
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    Tracker(None, storage, ledger).deliver()
    _, children = runs(storage)
    assert len(children) == 8
    for child in children.values():
        assert history(storage, child, "loss") == expected
        assert history(storage, child, "kl_recovered") == [(500, child.data.metrics["kl_recovered"])]
        assert child.info.status == "FINISHED"


def test_the_first_delivery_to_a_new_database_prints_nothing(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from orchestrator import load_dictionary
from orchestrator.ledger import Ledger
from orchestrator.ledger_decisions import record_decision
from orchestrator.ledger_records import Decision
from orchestrator.tracking import Tracker
storage = Path({str(tmp_path)!r})
ledger = Ledger(storage / "l1" / "ledger.sqlite")
ledger.open_sweep("l1", {{}}, None, {{}})
Tracker(None, storage, ledger).deliver("FINISHED")
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert runs(tmp_path)[0].info.artifact_uri.startswith((tmp_path / "mlflow-artifacts" / "l1").as_uri())


@pytest.mark.parametrize(
    ("tracking", "address", "has_root"),
    [
        (None, "sqlite:////store/mlflow.db", True),
        ("http://mlflow:5000", "http://mlflow:5000", False),
        ("https://mlflow.example", "https://mlflow.example", False),
        ("sqlite:///mine.db", f"sqlite:///{Path.cwd()}/mine.db", True),
        ("postgresql+psycopg2://me@db/x", "postgresql+psycopg2://me@db/x", True),
    ],
)
def test_tracking_address(tracking: str | None, address: str, has_root: bool) -> None:
    root = "file:///store/mlflow-artifacts" if has_root else None
    assert tracking_address(tracking, Path("/store")) == (address, root)


@pytest.mark.parametrize(
    "tracking",
    [
        "http://[::1",
        "postgresql://h:port/x",
        "http://a..b",
        "http://:5000",
        "https://me:pw@host:99999",
        "http://me:20/24@host:5000",
        "postgresql://me:20/24@host/x",
        "http://me:20#24@host",
        "sqlite://[x/y.db",
    ],
)
def test_an_address_that_cannot_be_taken_apart_is_refused(tracking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = "models:/qk.smollm2-135m.L08@knee"
    for attempt in (lambda: tracking_address(tracking, Path("/store")), lambda: load_dictionary(reference, tracking)):
        with pytest.raises(InputError, match=r"^tracking: host and port cannot be read; in a password write /"):
            attempt()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
    with pytest.raises(InputError, match=r"^tracking: host and port cannot be read"):
        load_dictionary(reference)


@pytest.mark.parametrize("name", ["what?", "what?a=b", "a%20b", "%3F"])
def test_a_folder_whose_name_no_address_can_hold_is_refused(tmp_path: Path, name: str) -> None:
    for storage in (tmp_path / name, tmp_path / name / "runs"):
        with pytest.raises(InputError, match=f"^storage: {re.escape(str(storage))}: MLflow can keep no database"):
            tracking_address(None, storage)
    assert tracking_address("http://host", tmp_path / name) == ("http://host", None)
    assert tracking_address(None, tmp_path / "50% #1;ü")[0] == f"sqlite:///{tmp_path}/50% #1;ü/mlflow.db"


@pytest.mark.parametrize("tracking", ["mlruns", "/var/mlruns", "file:///mlruns", "ftp://me:pw@host/x", ""])
def test_an_address_that_mlflow_cannot_use_is_refused(tracking: str) -> None:
    with pytest.raises(InputError, match="tracking") as caught:
        tracking_address(tracking, Path("/store"))
    assert "pw" not in str(caught.value)


@pytest.mark.system
def test_a_real_server_that_goes_away_and_comes_back(tmp_path: Path, migrated: bytes) -> None:
    (tmp_path / "server.db").write_bytes(migrated)
    ledger = Ledger(tmp_path / "l1" / "ledger.sqlite")
    ledger.open_sweep("l1", {}, None, {})
    ledger.open_study("study", "transcoder", 8, IDENTITY, model="m", corpus="c")
    ledger.set_reference("study", REFERENCE)
    start(ledger, "one")
    ledger.report("one", 100, {"loss": 1.0}, seconds=1.0)
    with MlflowServer(tmp_path) as server:
        tracker = Tracker(server.url, tmp_path, ledger)
        tracker.deliver()
        server.kill()
        ledger.report("one", 200, {"loss": 0.5}, seconds=2.0)
        with pytest.raises(TrackingUnavailable, match=server.url):
            tracker.deliver()
        finish(ledger, "one", l0=16.0, kl=0.1)
        server.start()
        tracker.deliver("FINISHED")
        client = MlflowClient(tracking_uri=tracker.address)
        found = client.search_runs([client.get_experiment_by_name("l1").experiment_id])
        assert sorted(run.info.status for run in found) == ["FINISHED", "FINISHED"]
        (child,) = [run for run in found if "qk.training_id" in run.data.tags]
        points = client.get_metric_history(child.info.run_id, "loss")
        assert [(point.step, point.value) for point in points] == [(100, 1.0), (200, 0.5)]
        weights = client.download_artifacts(child.info.run_id, "dictionary/transcoder.safetensors", str(tmp_path))
        assert Path(weights).read_text() == "one 0.1"


def test_the_parent_says_what_was_found_and_what_failed(storage: Path, ledger: Ledger) -> None:
    ledger.open_sweep("l1", {}, "abc123", {}, facts={"machine": {"cpus": 2}, "plan": {"trainings": 3}})
    start(ledger, "one")
    finish(ledger, "one", l0=16.0, kl=0.1)
    start(ledger, "two", k=8)
    ledger.fail("two", "diverged `twice`")
    tracker = Tracker(None, storage, ledger)
    tracker.deliver()
    parent, _ = runs(storage)
    recorded = Path(client_of(storage).download_artifacts(parent.info.run_id, "start.yaml")).read_text()
    assert recorded == "versions: {}\nmachine:\n  cpus: 2\nplan:\n  trainings: 3\n"
    # the UI shows every tag, and offers every name as a column
    assert {name for name in parent.data.tags if not name.startswith("mlflow.")} == {"qk.sweep"}
    said = parent.data.tags["mlflow.note.content"]
    assert "| L08 topk16 d512 lr3e-3 s0 | 16.0 | 0.1000 | 95.0% |  |" in said
    assert "1 failed:\n\n- L08 topk8 d512 lr3e-3 s0: `diverged 'twice'`" in said
    start(ledger, "three", k=4)
    finish(ledger, "three", l0=4.0, kl=0.3)
    tracker.deliver()
    assert "| L08 topk4 d512 lr3e-3 s0 | 4.0 |" in runs(storage)[0].data.tags["mlflow.note.content"]


def test_the_parent_links_to_each_front_in_order(storage: Path, ledger: Ledger) -> None:
    ledger.open_study("other", "transcoder", 9, IDENTITY, model="m", corpus="c")
    ledger.set_reference("other", REFERENCE)
    for name, study, l0, kl in [("a", "study", 16.0, 0.1), ("b", "study", 4.0, 0.3), ("c", "other", 8.0, 0.2)]:
        start(ledger, name, k=round(l0), study=study)
        finish(ledger, name, l0=l0, kl=kl)
    Tracker(None, storage, ledger).deliver()
    parent, _ = runs(storage)
    links = re.findall(
        r"\[(\d) on the front\]\(#/experiments/(\d+)/runs\?([^) ]+)\)", parent.data.tags[DESCRIPTION_TAG]
    )
    assert [(count, experiment) for count, experiment, _ in links] == [("2", parent.info.experiment_id), ("1", "1")]
    query = parse_qs(links[0][2])
    (condition,), (key,), (ascending,) = query["searchFilter"], query["orderByKey"], query["orderByAsc"]
    order = f"{key} {'ASC' if ascending == 'true' else 'DESC'}"
    listed = client_of(storage).search_runs([parent.info.experiment_id], condition, order_by=[order])
    assert [run.data.tags["qk.training_id"] for run in listed] == ["b", "a"]


def test_metrics_of_heads_are_a_section_of_their_own(storage: Path, ledger: Ledger) -> None:
    start(ledger, "one")
    finish(ledger, "one", l0=4.0, kl=0.1, kl_head_00=0.2)
    Tracker(None, storage, ledger).deliver()
    assert runs(storage)[1]["one"].data.metrics == {"kl": 0.1, "l0": 4.0, "kl_recovered": 0.95, "heads/kl_head_00": 0.2}


def test_hypervolume_grows_along_the_tokens_of_ended_trainings(storage: Path, ledger: Ledger) -> None:
    for number, (name, l0, kl) in enumerate([("one", 16.0, 0.1), ("two", 8.0, 0.2), ("three", 32.0, 0.4)]):
        start(ledger, name, k=number + 1)
        ledger.report(name, 100 * (number + 1), {}, seconds=1.0)
        finish(ledger, name, l0=l0, kl=kl)
        Tracker(None, storage, ledger).deliver()
    start(ledger, "four", k=9)
    ledger.report("four", 50, {}, seconds=1.0)
    ledger.fail("four", "diverged")
    Tracker(None, storage, ledger).deliver()
    # areas in (log2 l0, log2 kl) up to (128, 2), by hand: 16 and 0.1; with 8 and 0.2; 32 and 0.4 add nothing
    first = 3 * math.log2(2.0 / 0.1)
    second = first + 1 * math.log2(2.0 / 0.2)
    points = history(storage, runs(storage)[0], "hypervolume_L08")
    assert [step for step, _ in points] == [100, 300, 600]
    assert [value for _, value in points] == pytest.approx([first, second, second])


def test_the_parent_run_is_finished_once_nothing_is_left_to_continue(storage: Path, ledger: Ledger) -> None:
    ledger.set_current({"study": 1000})
    start(ledger, "one")
    # as a kill leaves it
    assert end_status(ledger) == "KILLED"
    finish(ledger, "one", l0=16.0, kl=0.1)
    assert end_status(ledger) == "FINISHED"
