"""A sweep whose ledger is in PostgreSQL, through all that may happen to it, beside the same one with a file."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.services import PostgresServer, kill_session, postgres_or_skip
from tests.system.test_kills import SAMPLE_TOKENS, Sweep, assert_same_results, wait_for_tokens

pytestmark = [pytest.mark.system, pytest.mark.slow]

IMPATIENT = "import sys, orchestrator.sweep; orchestrator.sweep.LEDGER_PATIENCE_SECONDS = 2.0;" + (
    "from orchestrator.cli import run; sys.exit(run(sys.argv[1:]))"
)


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_or_skip() as server:
        yield server


def test_results_are_those_of_a_sweep_with_a_file(server: PostgresServer, tmp_path: Path) -> None:
    undisturbed = Sweep.create(tmp_path / "file", SAMPLE_TOKENS)
    undisturbed.run()
    sweep = Sweep.create(tmp_path / "database", SAMPLE_TOKENS, ledger=server.ledgers)
    done = server_that_stays_away(server, sweep)
    process = sweep.start()
    try:
        done = wait_for_tokens(sweep, process, more_than=done)
        refuse_a_second_driver(sweep, tmp_path / "copy")
        wait_for_tokens(sweep, process, more_than=done)
    finally:
        kill_session(process)
    sweep.run()
    assert_same_results(sweep, undisturbed)
    assert all(one.failures == 0 for one in sweep.trainings())


def server_that_stays_away(server: PostgresServer, sweep: Sweep) -> int:
    """A start that loses patience: one line, exit code 1, nothing lost."""
    with (sweep.file.parent / "log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", IMPATIENT, "sweep", str(sweep.file)],
            cwd=sweep.file.parent,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        done = wait_for_tokens(sweep, process)
        server.stop()
        assert process.wait(timeout=120) == 1, sweep.said
    finally:
        kill_session(process)
        server.start()
    assert "Traceback" not in sweep.said
    last = sweep.said.splitlines()[-1]
    assert last.startswith("error: postgresql://") and last.endswith("the same command continues")
    assert {one.state for one in sweep.trainings()} <= {"running", "open", "finished"}
    return done


def refuse_a_second_driver(sweep: Sweep, copy: Path) -> None:
    """With a folder of its own, as on a machine whose locks do not reach this one."""
    copy.mkdir()
    shutil.copytree(sweep.folder, copy / sweep.folder.name, ignore=shutil.ignore_patterns(".*"))
    # its activations: to make them anew would only take time
    os.symlink(sweep.folder.parent / "activations", copy / "activations")
    second = subprocess.run(
        [sys.executable, "-m", "orchestrator", "sweep", str(sweep.file), f"storage={copy}"],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert second.returncode == 2, second.stderr
    assert second.stderr.splitlines()[-1].startswith("error: ") and "is at work on the sweep" in second.stderr
