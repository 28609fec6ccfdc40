"""The command line from outside: what it prints, its exit codes, and that mistakes leave nothing behind."""

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import load_sweep
from orchestrator.ledger import Ledger
from orchestrator.ledger_file import LEDGER_FILE
from orchestrator.sweep_argument import tracking_of
from orchestrator.sweep_command import way_to_track, where_tracked
from qkmodel.files import exclusive
from tests.orchestrator.sweep_files import write_sweep


def orchestrate(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with runs/small in it: a front of two and one beaten, one failed, one running, one open."""
    root = tmp_path_factory.mktemp("swept")
    ledger = Ledger(root / "runs" / "small" / LEDGER_FILE)
    ledger.open_sweep("small", {"tracking": None}, None, {})
    ledger.open_study("late", "transcoder", 8, {}, model="m", corpus="c")
    ledger.set_reference("late", {"kl_baseline": 2.0, "kl_cache": 1e-5, "l0_cap": 128.0})
    ledger.open_study("early", "transcoder", 4, {}, model="m", corpus="c")
    results = {"low": (8.0, 0.5), "high": (32.0, 0.125), "beaten": (32.0, 0.25), "collapsed": (0.5, 0.75)}
    for number, (identifier, (l0, kl)) in enumerate(results.items()):
        add(ledger, "late", identifier, seed=number)
        ledger.report(identifier, 1000, {"loss": 0.5}, seconds=1.0)
        metrics = {"kl": kl, "l0": l0, "l0_query": l0 - 1, "l0_key": l0 + 1, "kl_recovered": 1 - kl / 2, "top1": 0.75}
        ledger.finish(identifier, metrics, f"dictionaries/{identifier}", identifier * 2)
    add(ledger, "late", "lost", seed=4)
    ledger.fail("lost", "loss was not finite by token 300; try a [lower] learning rate")
    add(ledger, "early", "going", seed=0)
    ledger.start("going", "pack-0001", {})
    ledger.report("going", 250, {"loss": 0.5}, seconds=1.0)
    add(ledger, "early", "waiting", seed=1)
    # the file asks for three trainings of layer 4, one of which no search has proposed yet
    ledger.set_current({"early": 3000, "late": 5000})
    ledger.close()
    return root


def add(ledger: Ledger, study: str, identifier: str, seed: int) -> None:
    hyperparameters = {"dictionary_size": 512, "activation": "topk", "k": 16, "learning_rate": 3e-3, "seed": seed}
    ledger.add_training(study, identifier, hyperparameters, 1000)


def record(*arguments: str, cwd: Path) -> dict[str, Any]:
    """What a command prints as JSON, alone on standard output."""
    ran = orchestrate(*arguments, "--json", cwd=cwd)
    assert (ran.returncode, ran.stderr) == (0, "")
    return json.loads(ran.stdout)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["sweep", "status", "fronts", "ui"]),
        (["sweep"], ["FILE", "KEY=VALUE", "--dry-run", "--json"]),
        (["status"], ["SWEEP", "--json"]),
        (["fronts"], ["SWEEP", "--json"]),
        (["report"], ["SWEEP", "--output", "--training"]),
        (["choose"], ["SWEEP", "--layer", "--rule", "--json"]),
        (["export"], ["SWEEP", "--layer", "--rule", "--training", "--output"]),
        (["ui"], ["SWEEP", "--port"]),
    ],
)
def test_help(tmp_path: Path, command: list[str], words: list[str]) -> None:
    ran = orchestrate(*command, "--help", cwd=tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert [word for word in words if word not in ran.stdout] == []


def test_status_as_json(swept: Path) -> None:
    assert record("status", "small", cwd=swept) == {
        "sweep": "small",
        "folder": str(swept / "runs" / "small"),
        "trainings": {"open": 1, "running": 1, "finished": 4, "stopped": 0, "failed": 1},
        "tokens_done": 4250,
        "tokens_planned": 8000,
        # nothing of this ledger was ever delivered
        "owed": {"trainings": 6, "reports": 5, "anything": True},
        "studies": [
            {
                "study_id": "early",
                "layer": 4,
                "current": True,
                "trainings": {"open": 1, "running": 1, "finished": 0, "stopped": 0, "failed": 0},
                "tokens_done": 250,
                "tokens_planned": 3000,
                "front": 0,
                "hypervolume": 0.0,
            },
            {
                "study_id": "late",
                "layer": 8,
                "current": True,
                "trainings": {"open": 0, "running": 0, "finished": 4, "stopped": 0, "failed": 1},
                "tokens_done": 4000,
                "tokens_planned": 5000,
                "front": 2,
                # up to l0 128 and kl 2: four halvings of l0 by two of kl, and two by two more
                "hypervolume": 12.0,
            },
        ],
        "failures": [
            {
                "training_id": "lost",
                "layer": 8,
                "error": "loss was not finite by token 300; try a [lower] learning rate",
            }
        ],
    }


def test_report_says_where_it_is_and_what_it_lacks(swept: Path, tmp_path: Path) -> None:
    ran = orchestrate("report", "small", "--output", str(tmp_path / "page.html"), cwd=swept)
    assert (ran.returncode, ran.stdout) == (0, f"{tmp_path}/page.html\n")
    early, late = ran.stderr.splitlines()
    assert early.startswith("left out: layer 4: no training has finished yet")
    assert late.startswith("left out: layer 8: features and sentences of L08 topk16")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert not (swept / "runs" / "small" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--training", "lost"], "error: --training: training lost is failed; only finished ones have a dictionary"),
        (["--training", "none"], "error: --training: the sweep has no training none;"),
        (["--output", "nowhere/page.html"], "error: --output: nowhere/page.html is no file in a folder that is there"),
    ],
)
def test_a_report_that_cannot_be_is_refused_in_a_line(swept: Path, arguments: list[str], reason: str) -> None:
    ran = orchestrate("report", "small", *arguments, cwd=swept)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith(reason) and ran.stderr.count("\n") == 1


def test_fronts_as_json(swept: Path) -> None:
    fronts = record("fronts", "small", cwd=swept)
    assert fronts["sweep"] == "small"
    early, late = fronts["fronts"]
    nothing = {"kl_baseline": None, "kl_cache": None, "hypervolume": 0.0, "trainings": []}
    assert early == {"study_id": "early", "layer": 4} | nothing
    members = late.pop("trainings")
    assert late == {"study_id": "late", "layer": 8, "kl_baseline": 2.0, "kl_cache": 1e-5, "hypervolume": 12.0}
    assert [member["training_id"] for member in members] == ["low", "high"]
    assert members[0] == {
        "training_id": "low",
        "kl": 0.5,
        "kl_recovered": 0.75,
        "kl_no_bos": None,
        "kl_recovered_no_bos": None,
        "l0_query": 7.0,
        "l0_key": 9.0,
        "l0": 8.0,
        "top1": 0.75,
        "max_error": None,
        "ce_recovered": None,
        "dictionary": str(swept / "runs" / "small" / "dictionaries" / "low"),
        "dictionary_sha256": "lowlow",
        "hyperparameters": {
            "dictionary_size": 512,
            "activation": "topk",
            "k": 16,
            "learning_rate": 0.003,
            "seed": 0,
        },
    }


def test_a_sweep_is_found_by_name_by_folder_and_by_file(swept: Path, tmp_path: Path) -> None:
    file = write_sweep(tmp_path, storage=str(swept / "runs"))
    expected = record("fronts", "small", cwd=swept)
    for sweep in (str(swept / "runs" / "small"), str(file)):
        assert record("fronts", sweep, cwd=tmp_path) == expected


def test_tables_for_people(swept: Path) -> None:
    status = orchestrate("status", "small", cwd=swept)
    assert (status.returncode, status.stderr) == (0, "")
    # the reason of a failure is printed as it stands, markup or not
    assert "failed: lost (layer 8): loss was not finite by token 300; try a [lower] learning rate" in status.stdout
    assert "4,000 of 5,000" in status.stdout
    fronts = orchestrate("fronts", "small", cwd=swept)
    rows = [line.split() for line in fronts.stdout.splitlines() if "L08" in line]
    assert [row[:3] for row in rows] == [["8.0", "0.5000", "75.0%"], ["32.0", "0.1250", "93.8%"]]
    assert "layer 4: front of 0 finished trainings: nothing inside the feasible box" in fronts.stdout


def test_status_shows_a_folder_as_it_is_called(swept: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs [old]" / "[" / "red]"
    shutil.copytree(swept / "runs" / "small", folder)
    status = orchestrate("status", str(folder), cwd=tmp_path)
    assert (status.returncode, status.stderr) == (0, "")
    assert status.stdout.startswith(f"sweep small in {folder}\n")


@pytest.mark.parametrize("command", ["status", "fronts"])
def test_an_unknown_sweep_is_answered_with_one_line(tmp_path: Path, command: str) -> None:
    ran = orchestrate(command, "nowhere", cwd=tmp_path)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: nowhere: no sweep of that name;")
    assert ran.stderr.count("\n") == 1
    assert ran.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_sweep_is_answered_with_one_line(tmp_path: Path) -> None:
    ran = orchestrate("fronts", ".", cwd=tmp_path)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: no sweep here: ") and ran.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["sqlite:///{}/none.db", "sqlite+pysqlite:///{}/none.db?timeout=5"])
def test_a_tracking_store_that_is_not_there_is_named(tmp_path: Path, address: str) -> None:
    file = write_sweep(tmp_path, tracking=address.format(tmp_path))
    ran = orchestrate("ui", str(file), cwd=tmp_path)
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"error: {tmp_path}/none.db: no tracking store here"), ran.stderr


# top-level keys of the sweep file, overrides, what the line has to say
BROKEN: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "layer out of range": ({"layers": [1, 30]}, [], ["layers: 30", "smollm2-135m", "0 to 29"]),
    "unknown model": ({"model": "smollm2-136m"}, [], ["model.name smollm2-136m", "did you mean smollm2-135m?"]),
    "missing corpus": ({"corpus": {"name": "./text.txt"}}, [], ["corpus.name", "./text.txt", "no such file"]),
    "layer twice": ({"layers": [1, 1]}, [], ["layers: [1, 1]", "keep one"]),
    "longer than the model reads": (
        {},
        ["corpus.context=8193"],
        ["corpus.context: 8193", "smollm2-135m", "at most 8192"],
    ),
    "less than a batch": ({}, ["training.tokens=1000"], ["training.tokens: 1000", "1024", "or more"]),
    "name of a folder above": ({"name": "../up"}, [], ["name", '"../up"', "letters, digits"]),
    "misspelt key": ({"layer": [1]}, [], ["layer: is no key here", "did you mean layers?"]),
    "not a number": ({}, ["training.tokens=many"], ["training.tokens", '"many"', "whole number"]),
    "grid larger than the budget": ({}, ["search.trainings=3"], ["4 points", "search.trainings is 3", "raise it to 4"]),
    "password in a bad address": (
        {"tracking": "ftp://me:hunter2@host"},
        [],
        ["tracking", "ftp://me:***@host", "http://localhost:5000"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_sweep_file_is_one_line_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    keys, overrides, expected = BROKEN[case]
    written, cwd, cache = tmp_path / "written", tmp_path / "cwd", tmp_path / "cache"
    for folder in (written, cwd):
        folder.mkdir()
    file = write_sweep(written, **{"storage": "runs"} | keys)
    before = sorted(written.rglob("*"))
    ran = orchestrate("sweep", str(file), *overrides, cwd=cwd, XDG_CACHE_HOME=str(cache))
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1, ran.stderr
    assert [part for part in expected if part not in ran.stderr] == [], ran.stderr
    assert "hunter2" not in ran.stderr
    assert list(cwd.iterdir()) == []
    assert sorted(written.rglob("*")) == before
    # a hash of the model's weights may be remembered, in the cache, but nothing is converted or loaded
    assert {path.name for path in cache.glob("qkmodel/*")} <= {"sha256"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sweep"], ["Missing argument", "FILE"]),
        (["sweep", "--bogus", "file"], ["No such option", "--bogus"]),
        (["swep"], ["swep", "sweep"]),
        (["status", "a", "b"], ["unexpected extra argument"]),
        (["ui", "--port", "many"], ["--port", "integer"]),
    ],
)
def test_a_command_that_cannot_be_understood_is_one_line(
    tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    ran = orchestrate(*arguments, cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1, ran.stderr
    assert [word for word in words if word not in ran.stderr] == [], ran.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["choose", "small", "--rule", "best"],
            "--rule: 'best' is none; write knee, l0=16, kl_recovered>=0.95 (of pair masks: pairs=9000",
        ),
        (
            ["choose", "small", "--layer", "8", "--rule", "l0=4"],
            "layer 8: no training on the front has l0 ≤ 4.4; it offers",
        ),
        (
            ["choose", "small"],
            "layer 4: the front is empty; nothing has finished inside the feasible box yet (--rule training",
        ),
        (
            ["choose", "small", "--layer", "5"],
            "--layer: the sweep has no such layer as of its latest start; it has 4, 8",
        ),
        (["choose", "nowhere"], "nowhere: no sweep of that name"),
        (["choose", "small", "--layer", "8"], "dictionaries/high/config.json: cannot be read"),
        (["export", "small"], "Missing option '--output'"),
        (["export", "small", "--output", "o", "--layer", "8"], "dictionaries/high/config.json: cannot be read"),
        (["export", "small", "--output", "o", "--training", "nix"], "--rule: the sweep has no training nix"),
        (
            ["choose", "small", "--rule", "training=zzz"],
            "error: --rule: the sweep has no training zzz; dictionaries/ in its",
        ),
        (["choose", "small", "--rule", "training=lost"], "error: --rule: training lost is failed; only finished"),
        (["export", "small", "--output", "o", "--training", "low", "--rule", "knee"], "--rule and --training exclude"),
        (
            ["report", "small", "--training", "zzz"],
            "error: --training: the sweep has no training zzz; dictionaries/ in its",
        ),
        (["export", "small", "--output", "o", "--training", ""], "--rule: 'training=' is none"),
        (["report", "small", "--output", "x" * 255], f"error: --output: {'x' * 255}: cannot be written (File name too"),
        (["report", "small", "--output", "/proc/x.html"], "error: --output: /proc/x.html: cannot be written (No such"),
        (["status", "x" * 5000], f"error: SWEEP: {'x' * 80} is not a usable path (File name too long)"),
    ],
)
def test_a_choice_that_cannot_be_made_is_one_line_and_changes_nothing(
    swept: Path, arguments: list[str], words: str
) -> None:
    before = sorted(swept.rglob("*"))
    ran = orchestrate(*arguments, cwd=swept)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1, ran.stderr
    assert words in ran.stderr and len(ran.stderr) < 400
    assert sorted(swept.rglob("*")) == before


def test_a_page_goes_where_a_tilde_leads(swept: Path, tmp_path: Path) -> None:
    ran = orchestrate("report", "small", "--output=~/page.html", cwd=swept, HOME=str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "page.html").is_file()


@pytest.mark.parametrize("name", ["link", "runs/small/dictionaries/..", "elsewhere/runs/small"])
def test_a_sweep_is_tracked_in_its_storage_whatever_its_folder_is_called(
    swept: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(swept / "runs", tmp_path / "runs")
    (tmp_path / "runs" / "small" / "dictionaries").mkdir()
    (tmp_path / "link").symlink_to("runs/small")
    (tmp_path / "elsewhere" / "runs").mkdir(parents=True)
    (tmp_path / "elsewhere" / "runs" / "small").symlink_to(tmp_path / "runs" / "small")
    assert tracking_of(str(tmp_path / name)) == (None, tmp_path / "runs")


def test_a_sweep_that_lies_elsewhere_is_tracked_where_its_link_is(swept: Path, tmp_path: Path) -> None:
    shutil.copytree(swept / "runs", tmp_path / "disk")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "small").symlink_to(tmp_path / "disk" / "small")
    (tmp_path / "runs" / "mlflow.db").touch()
    assert tracking_of(str(tmp_path / "runs" / "small")) == (None, tmp_path / "runs")


def test_a_sweep_file_is_found_where_a_tilde_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_sweep(tmp_path, tracking="http://u:secret@host:5000", storage=str(tmp_path / "runs"))
    assert tracking_of("~/sweep.yaml") == ("http://u:secret@host:5000", tmp_path / "runs")


@pytest.mark.parametrize("command", ["choose", "fronts", "status"])
def test_an_edited_reference_is_one_line(swept: Path, tmp_path: Path, command: str) -> None:
    shutil.copytree(swept / "runs", tmp_path / "runs")
    with sqlite3.connect(tmp_path / "runs" / "small" / LEDGER_FILE) as database:
        database.execute("UPDATE studies SET reference = '{}'")
    database.close()
    ran = orchestrate(command, "small", cwd=tmp_path)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1), ran.stderr
    assert "is damaged (study late: its reference cannot be read)" in ran.stderr


def test_nothing_is_announced_before_all_is_looked_at(swept: Path) -> None:
    (swept / "runs" / "mlflow.db").touch()
    ran = orchestrate("ui", "--dashboard", cwd=swept)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: --dashboard: shows one sweep's studies;") and ran.stderr.count("\n") == 1
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ran = orchestrate("ui", "small", "--dashboard", "--port", str(port - 1), cwd=swept)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"error: --port: {port} is in use on this machine; give another\n"
    assert not (swept / "runs" / "small" / "optuna.sqlite").exists()


def test_a_name_with_a_line_break_is_still_one_line(tmp_path: Path) -> None:
    ran = orchestrate("status", "no\nsweep", cwd=tmp_path)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
    assert ran.stderr.startswith(r"error: no\nsweep: no sweep of that name;")


def test_a_port_in_use_is_refused(swept: Path) -> None:
    (swept / "runs" / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ran = orchestrate("ui", "--port", str(port), cwd=swept)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"error: --port: {port} is in use on this machine; give another\n"


@pytest.mark.parametrize(
    ("tracking", "expected"),
    [
        (None, "the MLflow UI: orchestrate ui FOLDER"),
        ("http://me:secret@host:5000", "MLflow at http://me:***@host:5000"),
        ("postgresql://me@host/runs", "the MLflow store postgresql://***@host/runs"),
        ("sqlite:///runs.db", "the MLflow UI: orchestrate ui FOLDER"),
    ],
)
def test_the_last_hint_is_a_command_that_works(tmp_path: Path, tracking: str | None, expected: str) -> None:
    file = write_sweep(tmp_path)
    config = load_sweep(file, [] if tracking is None else [f"tracking='{tracking}'"])
    assert where_tracked(config, file, "FOLDER") == expected
    written = write_sweep(tmp_path, tracking="postgresql://me:secret@host/runs")
    assert where_tracked(load_sweep(written), written, "FOLDER") == f"the MLflow UI: orchestrate ui {written}"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["tracking=http://host:5000"], "orchestrate track FOLDER"),
        ([], "orchestrate track FILE"),
        (["name=other"], "start the sweep again"),
        (["tracking='http://me:other@host:5000'"], "start the sweep again"),
    ],
)
def test_the_way_to_deliver_later_is_one_to_the_same_store(tmp_path: Path, overrides: list[str], expected: str) -> None:
    file = write_sweep(tmp_path, tracking="http://me:secret@host:5000")
    config = load_sweep(file, overrides)
    assert way_to_track(config, file, "FOLDER") == expected.replace("FILE", str(file))
    # overrides made up for what the file lacks
    file.write_text(file.read_text().replace("layers:", "# layers:"))
    if expected == "orchestrate track FILE":
        assert way_to_track(config, file, "FOLDER") == "start the sweep again"


def test_a_second_driver_of_a_sweep_is_refused(tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    with exclusive(folder / "lock", print):
        ran = orchestrate("sweep", str(file), cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert f"process {os.getpid()} is at work on the sweep in {folder}" in ran.stderr
    assert ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1, ran.stderr
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_a_late_delivery_beside_a_driver_is_refused_with_what_fits(swept: Path) -> None:
    folder = swept / "runs" / "small"
    with exclusive(folder / "lock", print):
        ran = orchestrate("track", "small", cwd=swept)
    (folder / "lock").unlink()
    assert (ran.returncode, ran.stdout) == (2, "")
    at_work = f"process {os.getpid()} is at work on the sweep in {folder}"
    assert ran.stderr == f"error: {at_work} and delivers by itself; wait for it or end it\n"


def test_a_sweep_file_that_is_not_there(tmp_path: Path) -> None:
    ran = orchestrate("sweep", "sweeps/l1.yaml", cwd=tmp_path)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
    assert "sweeps/l1.yaml: there is no such file" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_and_mistakes_do_not_wait_for_heavy_libraries(tmp_path: Path) -> None:
    script = (
        "import sys; from orchestrator.cli import app;"
        "print({'torch', 'transformers', 'ray', 'optuna', 'mlflow'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
