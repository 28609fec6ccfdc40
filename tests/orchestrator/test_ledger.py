import shlex
import sqlite3
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from orchestrator.ledger import Ledger
from orchestrator.ledger_place import place_in
from orchestrator.ledger_tables import MetricRow
from qkmodel.errors import InputError

HYPERPARAMETERS = {"dictionary_size": 512, "activation": "topk", "k": 16, "learning_rate": 3e-3, "seed": 0}


@pytest.fixture
def ledger(sweep_folder: Path) -> Ledger:
    ledger = Ledger(place_in(sweep_folder))
    ledger.open_sweep("l1", {"layers": [8]}, "abc", {"torch": "2.13"})
    ledger.open_study("study", "transcoder", 8, {"corpus": "sotu"}, model="m", corpus="c")
    ledger.add_training("study", "one", HYPERPARAMETERS, tokens_planned=1000)
    return ledger


def test_what_is_recorded_survives_reopening(ledger: Ledger) -> None:
    ledger.set_reference("study", {"kl_baseline": 2.38, "ce_clean": float("nan")})
    ledger.start("one", "pack-0", {"device": "cpu"})
    ledger.report("one", 500, {"loss": 0.5}, seconds=1.5)
    ledger.finish("one", {"kl": 0.1, "l0": 16.0}, "dictionaries/one.safetensors", "ff" * 32)
    ledger.close()

    again = Ledger.open_existing(place_in(ledger.folder))

    assert again.sweep().config == {"layers": [8]}
    assert again.sweep().versions == {"torch": "2.13"}
    (study,) = again.studies()
    assert (study.layer, study.identity) == (8, {"corpus": "sotu"})
    assert study.reference == {"kl_baseline": 2.38, "ce_clean": None}
    (training,) = again.trainings()
    assert training.state == "finished"
    assert training.hyperparameters == HYPERPARAMETERS
    assert training.metrics == {"kl": 0.1, "l0": 16.0}
    assert (training.tokens_done, training.tokens_planned, training.seconds) == (500, 1000, 1.5)
    assert (training.dictionary, training.dictionary_sha256) == ("dictionaries/one.safetensors", "ff" * 32)
    assert (training.pack, training.machine, training.attempts) == ("pack-0", {"device": "cpu"}, 1)
    assert training.created <= training.started <= training.finished


def test_times_are_utc_and_now(ledger: Ledger) -> None:
    created = ledger.training("one").created
    assert created.tzinfo is UTC
    assert abs((datetime.now(UTC) - created).total_seconds()) < 60


def test_adding_a_training_again_returns_the_one_that_is_there(ledger: Ledger) -> None:
    ledger.start("one", "pack-0", {})
    again = ledger.add_training("study", "one", {"dictionary_size": 1}, tokens_planned=5)
    assert (again.state, again.hyperparameters, again.tokens_planned) == ("running", HYPERPARAMETERS, 1000)
    assert len(ledger.trainings()) == 1


def test_numbers_count_per_study_in_the_order_of_asking(ledger: Ledger) -> None:
    ledger.open_study("early", "transcoder", 4, {}, model="m", corpus="c")
    for study_id, training_id in [("study", "two"), ("early", "a"), ("study", "three"), ("early", "b")]:
        ledger.add_training(study_id, training_id, HYPERPARAMETERS, 1000)
    rows = [(training.layer, training.number, training.training_id) for training in ledger.trainings()]
    assert rows == [(4, 0, "a"), (4, 1, "b"), (8, 0, "one"), (8, 1, "two"), (8, 2, "three")]
    assert [training.training_id for training in ledger.trainings(study_id="early")] == ["a", "b"]


def test_a_finished_training_stays_as_it_is_whatever_arrives_later(ledger: Ledger) -> None:
    ledger.start("one", "pack-0", {"device": "cpu"})
    ledger.finish("one", {"kl": 0.1}, "first", "aa")
    first = ledger.training("one")
    ledger.finish("one", {"kl": 0.2, "l0": 3.0}, "second", "bb")
    ledger.fail("one", "late news of a dead worker")
    ledger.start("one", "pack-1", {})
    ledger.report("one", 2000, {"kl": 0.3}, seconds=9.0)
    ledger.reopen("one")
    assert ledger.training("one") == first
    assert ledger.reports("one") == []


def test_a_continued_training_repeats_reports_without_effect(ledger: Ledger) -> None:
    ledger.start("one", "pack-0", {})
    ledger.report("one", 100, {"kl": 1.0, "loss": 5.0}, seconds=1.0)
    ledger.report("one", 200, {"kl": 0.8}, seconds=2.0)
    started = ledger.training("one").started
    ledger.reopen("one")
    assert ledger.training("one").state == "open"
    ledger.start("one", "pack-1", {})
    ledger.report("one", 100, {"kl": 7.0, "top1": 0.5}, seconds=1.1)
    reports = [(report.tokens, report.name, report.value) for report in ledger.reports("one")]
    assert reports == [(100, "kl", 1.0), (100, "loss", 5.0), (200, "kl", 0.8), (100, "top1", 0.5)]
    training = ledger.training("one")
    assert (training.attempts, training.pack, training.started) == (2, "pack-1", started)
    assert (training.tokens_done, training.seconds) == (200, 2.0)


def test_reports_can_be_read_from_where_one_stopped(ledger: Ledger) -> None:
    ledger.report("one", 100, {"kl": 1.0}, seconds=1.0)
    seen = ledger.reports("one")[-1].report_id
    ledger.report("one", 100, {"loss": 2.0}, seconds=1.0)
    assert [report.name for report in ledger.reports("one", after=seen)] == ["loss"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_what_is_not_a_number_is_stored_as_none(ledger: Ledger, value: float | None) -> None:
    ledger.report("one", 100, {"kl": value}, seconds=1.0)
    ledger.finish("one", {"kl": value, "l0": 4.0}, "d", "aa")
    assert ledger.reports("one")[0].value is None
    assert ledger.training("one").metrics == {"kl": None, "l0": 4.0}


def test_failed_and_reopened(ledger: Ledger) -> None:
    ledger.start("one", "pack-0", {})
    ledger.fail("one", "loss is not finite at 300 tokens")
    failed = ledger.training("one")
    assert (failed.state, failed.error) == ("failed", "loss is not finite at 300 tokens")
    assert failed.finished is not None
    ledger.reopen("one")
    reopened = ledger.training("one")
    assert (reopened.state, reopened.error, reopened.finished) == ("open", None, None)
    assert reopened.attempts == 1


def test_a_result_whose_dictionary_is_gone_is_taken_back_and_may_come_again(ledger: Ledger) -> None:
    ledger.discard_result("one", "not finished: nothing happens")
    assert ledger.training("one").error is None
    ledger.start("one", "pack-0", {})
    ledger.report("one", 1000, {"loss": 0.5}, seconds=2.0)
    ledger.finish("one", {"kl": 0.1}, "dictionaries/one", "ff")
    ledger.discard_result("one", "dictionaries/one is gone")
    found = ledger.training("one")
    assert (found.state, found.error, found.tokens_done, found.seconds) == ("open", "dictionaries/one is gone", 0, 0.0)
    assert (found.metrics, found.dictionary, found.dictionary_sha256, found.finished) == ({}, None, None, None)
    ledger.start("one", "pack-1", {})
    ledger.finish("one", {"kl": 0.2}, "dictionaries/one", "ee")
    found = ledger.training("one")
    assert (found.state, found.error, found.metrics, found.attempts) == ("finished", None, {"kl": 0.2}, 2)


def test_whatever_runs_is_put_back_at_once(ledger: Ledger) -> None:
    ledger.add_training("study", "two", HYPERPARAMETERS, 1000)
    ledger.add_training("study", "three", HYPERPARAMETERS, 1000)
    for training_id in ("one", "two"):
        ledger.start(training_id, "pack-0", {})
    ledger.finish("two", {"kl": 0.1}, "d", "aa")
    ledger.reopen_running()
    assert ledger.counts() == {"open": 2, "running": 0, "finished": 1, "stopped": 0, "failed": 0}


def test_counts_have_every_state(ledger: Ledger) -> None:
    ledger.add_training("study", "two", HYPERPARAMETERS, 1000)
    ledger.start("two", "pack-0", {})
    assert ledger.counts() == {"open": 1, "running": 1, "finished": 0, "stopped": 0, "failed": 0}
    assert ledger.counts("no such study") == {"open": 0, "running": 0, "finished": 0, "stopped": 0, "failed": 0}
    assert [training.training_id for training in ledger.trainings(state="running")] == ["two"]


@pytest.mark.parametrize("write", ["start", "report", "finish", "fail", "reopen"])
def test_an_unknown_training_is_an_error(ledger: Ledger, write: str) -> None:
    arguments = {
        "start": ("pack", {}),
        "report": (1, {"kl": 1.0}, 1.0),
        "finish": ({"kl": 1.0}, "d", "aa"),
        "fail": ("why",),
        "reopen": (),
    }
    with pytest.raises(KeyError):
        getattr(ledger, write)("nobody", *arguments[write])


def test_starting_a_sweep_again_keeps_its_age_and_takes_the_new_configuration(ledger: Ledger) -> None:
    first = ledger.sweep()
    again = ledger.open_sweep("l1", {"layers": [8, 9]}, "def", {})
    assert (again.created, again.config, again.git_sha) == (first.created, {"layers": [8, 9]}, "def")


def test_another_sweep_in_the_same_folder_is_refused_and_changes_nothing(ledger: Ledger) -> None:
    before = ledger.sweep()
    with pytest.raises(InputError, match="belongs to sweep 'l1', not 'other'"):
        ledger.open_sweep("other", {}, None, {})
    assert ledger.sweep() == before


def test_opening_what_is_not_there_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no sweep here"):
        Ledger.open_existing(tmp_path / "nothing" / "ledger.sqlite")
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_kind_or_format_is_refused_in_one_line(tmp_path: Path) -> None:
    text = tmp_path / "ledger.sqlite"
    text.write_text("this is no database, but long enough to have a header " * 10)
    newer = tmp_path / "newer.sqlite"
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99")
    for path, reason in [(text, "not a database"), (newer, "format 99")]:
        before = path.read_bytes()
        for opener in (Ledger, Ledger.open_existing):
            with pytest.raises(InputError, match=reason) as caught:
                opener(path)
            assert "\n" not in str(caught.value)
        assert path.read_bytes() == before


def test_a_folder_name_with_odd_characters(tmp_path: Path) -> None:
    path = tmp_path / "a b%20?#" / "ledger.sqlite"
    Ledger(path).open_sweep("l1", {}, None, {})
    assert path.is_file()
    assert Ledger.open_existing(path).sweep().name == "l1"


def test_the_file_lets_others_read_while_one_writes(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger.sqlite").close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_finishing_is_all_or_nothing(ledger: Ledger) -> None:
    with ledger.transaction() as session:
        # the last of its metrics is in the way
        session.add(MetricRow(training_id="one", name="l0", value=1.0))
    with pytest.raises(IntegrityError):
        ledger.finish("one", {"kl": 0.1, "l0": 4.0}, "d", "aa")
    training = ledger.training("one")
    assert (training.state, training.metrics, training.dictionary) == ("open", {}, None)


def test_threads_write_at_once_without_losing_anything(ledger: Ledger) -> None:
    def work(worker: int) -> None:
        for index in range(10):
            training_id = f"{worker}-{index}"
            ledger.add_training("study", training_id, HYPERPARAMETERS, 1000)
            ledger.report(training_id, 100, {"kl": 1.0}, seconds=1.0)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trainings = ledger.trainings("study")
    assert [training.number for training in trainings] == list(range(41))
    assert sum(len(ledger.reports(training.training_id)) for training in trainings) == 40


def test_a_killed_writer_leaves_every_returned_write(sweep_folder: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from orchestrator.ledger import Ledger
from orchestrator.ledger_place import place_in
ledger = Ledger(place_in(Path({str(sweep_folder)!r})))
ledger.open_sweep("l1", {{}}, None, {{}})
ledger.open_study("study", "transcoder", 8, {{}}, model="m", corpus="c")
ledger.add_training("study", "one", {{"dictionary_size": 8}}, 10)
ledger.finish("one", {{"kl": 0.25}}, "d", "aa")
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], check=False)
    assert Ledger.open_existing(place_in(sweep_folder)).training("one").metrics == {"kl": 0.25}


@pytest.mark.parametrize(
    ("hyperparameters", "label"),
    [
        (HYPERPARAMETERS, "L08 topk16 d512 lr3e-3 s0"),
        (
            {
                "dictionary_size": 1024,
                "activation": "relu",
                "k": None,
                "penalty": "l1",
                "sparsity_coefficient": 0.00325,
                "learning_rate": 0.01,
                "seed": 2,
            },
            "L08 relu-l1 d1024 λ3.25e-3 lr1e-2 s2",
        ),
        (HYPERPARAMETERS | {"key_dictionary_size": 256, "key_k": 8}, "L08 topk16/8 d512/256 lr3e-3 s0"),
        (
            {
                "dictionary_size": 64,
                "activation": "relu",
                "penalty": "tanh",
                "target_l0": 16.0,
                "learning_rate": 0.01,
                "seed": 0,
            },
            "L08 relu-tanh d64 l0=16 lr1e-2 s0",
        ),
    ],
)
def test_label(ledger: Ledger, hyperparameters: dict, label: str) -> None:
    assert ledger.add_training("study", "named", hyperparameters, 1000).label == label


def test_the_ledger_imports_without_heavy_packages() -> None:
    heavy = ("torch", "ray", "mlflow", "optuna")
    script = f"import sys, orchestrator.ledger; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_writes_within_a_transaction_are_kept_together_or_not_at_all(ledger: Ledger) -> None:
    seen_elsewhere = []

    def look() -> None:
        seen_elsewhere.append(ledger.training("one").state)

    with pytest.raises(KeyError), ledger.transaction():
        ledger.start("one", "pack-0", {})
        ledger.report("one", 500, {"loss": 0.5}, seconds=1.5)
        # this thread sees what it wrote, others do not yet
        assert ledger.training("one").tokens_done == 500
        other = threading.Thread(target=look)
        other.start()
        other.join()
        ledger.fail("nobody", "there is no such training")
    assert seen_elsewhere == ["open"]
    assert (ledger.training("one").state, ledger.training("one").tokens_done) == ("open", 0)
    assert ledger.reports("one") == []
    with ledger.transaction():
        ledger.start("one", "pack-0", {})
        ledger.finish("one", {"kl": 0.1}, "first", "aa")
    assert ledger.training("one").metrics == {"kl": 0.1}


@pytest.mark.parametrize(
    "edit", ["state = 'weird'", "hyperparameters = '{bad'", "hyperparameters = '{}'", "dictionary = null"]
)
def test_a_row_that_nobody_wrote_is_called_damage(ledger: Ledger, edit: str) -> None:
    ledger.finish("one", {"kl": 0.1}, "dictionaries/one", "aa")
    if "{bad" in edit and "postgresql:" in ledger.where:
        pytest.skip("PostgreSQL takes no JSON that is none")
    with ledger.transaction() as session:
        session.execute(text(f"UPDATE {_trainings(ledger)} SET {edit}"))
    with pytest.raises(InputError, match=r"is damaged .*put a copy of it there"):
        ledger.trainings()


def _trainings(ledger: Ledger) -> str:
    """The table, for plain SQL."""
    _, _, schema = ledger.where.partition(", schema ")
    return f'"{schema}".trainings' if schema else "trainings"


@pytest.mark.parametrize("left", ["closed", "killed"])
def test_a_folder_that_nobody_can_write_to_is_read(tmp_path: Path, left: str) -> None:
    """With what a killed driver has left in the write-ahead log. The folder's name means something in an address."""
    folder = tmp_path / "what? #1%20"
    script = f"""
import os
from pathlib import Path
from orchestrator.ledger import Ledger
ledger = Ledger(Path({str(folder)!r}) / "ledger.sqlite")
ledger.open_sweep("l1", {{}}, None, {{}})
if {left!r} == "killed":
    os.kill(os.getpid(), 9)
ledger.close()
"""
    subprocess.run([sys.executable, "-c", script])
    assert (folder / "ledger.sqlite-wal").is_file() == (left == "killed")
    script = f"""
from pathlib import Path
from orchestrator.ledger import Ledger
ledger = Ledger.open_existing(Path({str(folder)!r}) / "ledger.sqlite")
print(ledger.sweep().name)
try:
    ledger.set_current({{}})
except OSError as error:
    print(error)
"""
    mount = f"mount --bind {shlex.quote(str(folder))} {shlex.quote(str(folder))}"
    command = f"{mount} && mount -o remount,ro,bind {shlex.quote(str(folder))} && echo mounted && "
    command += shlex.join([sys.executable, "-c", script])
    ran = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True)
    if not ran.stdout.startswith("mounted"):
        pytest.skip(f"this machine lets nobody mount: {ran.stderr}")
    assert ran.stdout.splitlines()[1:] == [
        "l1",
        f"{folder}/ledger.sqlite: attempt to write a readonly database; once that is mended the same command continues",
    ], ran.stderr
