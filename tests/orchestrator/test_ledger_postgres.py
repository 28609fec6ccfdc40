"""A ledger in PostgreSQL: whose it is, and servers that refuse, are away, or go away; the rest is in test_ledger.py."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from orchestrator.config import load_sweep
from orchestrator.ledger import Ledger
from orchestrator.ledger_connection import Patience, ServerAway
from orchestrator.ledger_place import is_begun, place_in, place_of
from orchestrator.ledger_pointer import POINTER_FILE, LedgerPointer
from orchestrator.ledger_postgres import SweepSchema, schema_name
from orchestrator.starts import Lease, TakenOver
from qkmodel.errors import InputError
from tests.orchestrator.sweep_files import write_sweep
from tests.system.services import PostgresServer, free_port, postgres_or_skip

HYPERPARAMETERS = {"dictionary_size": 512, "activation": "topk", "k": 16, "learning_rate": 3e-3, "seed": 0}
PASSWORD = "sw0rdfish"


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """One that tests may stop."""
    with postgres_or_skip() as server:
        server.sql(f"CREATE ROLE reader LOGIN PASSWORD '{PASSWORD}'")
        yield server


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A sweep's, of this test alone: the database is shared."""
    return request.node.name[:100]


def started(server: PostgresServer, name: str, folder: Path) -> Ledger:
    """A sweep with a study and a training."""
    ledger = Ledger(SweepSchema(server.ledgers, schema_name(name), folder, None))
    ledger.open_sweep(name, {"tracking": None}, None, {})
    ledger.open_study("study", "transcoder", 8, {}, model="m", corpus="c")
    ledger.set_reference("study", {"kl_baseline": 2.0, "l0_cap": 64.0})
    ledger.add_training("study", "one", HYPERPARAMETERS, 1000)
    return ledger


def with_password(server: PostgresServer, database: str = "ledgers") -> str:
    return f"postgresql://reader@127.0.0.1:{server.port}/{database}"


def refusal(address: str, name: str, folder: Path) -> str:
    """What a driver is told; nothing is left in the folder's place."""
    place = SweepSchema(address, schema_name(name), folder, None)
    for opener in (Ledger.open_if_there, Ledger):
        with pytest.raises(InputError) as refused:
            opener(place)
        assert str(refused.value).isprintable() and PASSWORD not in str(refused.value)
        assert not is_begun(folder)
    return str(refused.value)


# -- whose it is


def test_schemas_differ_wherever_names_do_and_are_short_enough() -> None:
    names = ["l1", "L1", "a" * 100, "a" * 99 + "b", "a-b", "a_b"]
    schemas = {schema_name(name) for name in names}
    assert len(schemas) == len(names) and max(map(len, schemas)) <= 63


def test_sweeps_of_one_database_know_nothing_of_each_other(server: PostgresServer, name: str, tmp_path: Path) -> None:
    first, second = (started(server, f"{name}-{number}", tmp_path / str(number)) for number in (1, 2))
    first.finish("one", {"kl": 0.1}, "d", "aa")
    assert (first.training("one").state, second.training("one").state) == ("finished", "open")


def test_the_folder_tells_where_its_ledger_is(server: PostgresServer, name: str, tmp_path: Path) -> None:
    started(server, name, tmp_path / "runs" / name).close()
    ledger = Ledger.open_existing(place_in(tmp_path / "runs" / name))
    assert (ledger.sweep().name, ledger.folder) == (name, tmp_path / "runs" / name)
    kept = json.loads((ledger.folder / POINTER_FILE).read_text())
    assert (kept["address"], kept["schema"]) == (server.ledgers, schema_name(name))


def test_a_pointer_that_nobody_wrote_is_refused(tmp_path: Path) -> None:
    kept = {"format": 4, "address": f"postgresql://me:{PASSWORD}@h/d", "schema": "s", "identity": "i"}
    for content in (
        "{",
        "[]",
        "{}",
        json.dumps(kept),
        json.dumps(kept | {"format": 5}),
        json.dumps(kept | {"schema": 1}),
    ):
        (tmp_path / POINTER_FILE).write_text(content)
        with pytest.raises(InputError, match=POINTER_FILE) as refused:
            place_in(tmp_path)
        assert PASSWORD not in str(refused.value)


def test_a_namesake_in_another_folder_is_refused(server: PostgresServer, name: str, tmp_path: Path) -> None:
    started(server, name, tmp_path / "here").close()
    assert "has a sweep of this name in another folder" in refusal(server.ledgers, name, tmp_path / "there")


def test_of_two_that_begin_at_once_one_does(server: PostgresServer, name: str, tmp_path: Path) -> None:
    place = SweepSchema(server.ledgers, schema_name(name), tmp_path, None)
    started(server, name, tmp_path).close()
    with pytest.raises(InputError, match="another process began the sweep"):
        Ledger(place)
    assert Ledger.open_existing(place_in(tmp_path)).sweep().name == name


def test_a_machine_without_the_folder_reads_by_the_sweep_file(
    server: PostgresServer, name: str, tmp_path: Path
) -> None:
    ledger = started(server, "small", tmp_path / "runs" / "small")
    metrics = {"kl": 0.1, "l0": 16.0, "kl_recovered": 0.9}
    ledger.finish("one", metrics, "dictionaries/one", "aa")
    ledger.set_current({"study": 1000})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    file = write_sweep(elsewhere, ledger=server.ledgers)
    config, folder = load_sweep(file), elsewhere / "runs" / "small"
    assert Ledger.open_existing(place_of(config, folder, reading=True)).sweep().name == "small"
    with pytest.raises(InputError, match="another folder"):
        Ledger.open_if_there(place_of(config, folder))
    ran = orchestrate("status", str(file), "--json", cwd=elsewhere)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["trainings"]["finished"] == 1
    for command in (["track"], ["choose"], ["export", "--output", "exported"]):
        ran = orchestrate(*command, str(file), cwd=elsewhere)
        assert (ran.returncode, ran.stdout) == (2, "")
        assert ran.stderr == f"error: {folder}: is not on this machine; run this where the sweep's folder is\n"
    assert not folder.exists()


def test_file_and_folder_have_to_agree(server: PostgresServer, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "small"
    in_file = load_sweep(write_sweep(tmp_path))
    in_database = load_sweep(write_sweep(tmp_path, ledger=server.ledgers))
    Ledger(place_of(in_file, folder)).close()
    with pytest.raises(InputError, match=r"has its ledger in ledger\.sqlite there; leave the key out"):
        place_of(in_database, folder)
    for left in folder.iterdir():
        left.unlink()
    started(server, name, folder).close()
    with pytest.raises(InputError, match=r"has its ledger at postgresql://.*; write that"):
        place_of(in_file, folder)
    # one who reads need not know
    assert Ledger.open_existing(place_of(in_file, folder, reading=True)).sweep().name == name


def test_a_database_that_has_moved_is_followed_and_one_that_has_nothing_refused(
    server: PostgresServer, name: str, tmp_path: Path
) -> None:
    started(server, name, tmp_path).close()
    pointer = LedgerPointer.read(tmp_path)
    moved = f"{server.ledgers}&application_name=another"
    Ledger(SweepSchema(moved, schema_name(name), tmp_path, pointer)).close()
    assert json.loads((tmp_path / POINTER_FILE).read_text())["address"] == moved
    elsewhere = server.ledgers.replace("/ledgers", "/mlflow")
    for opener in (Ledger, Ledger.open_if_there):
        with pytest.raises(InputError, match="has none of it; write the former"):
            opener(SweepSchema(elsewhere, schema_name(name), tmp_path, pointer))


def test_a_creation_that_was_cut_off_is_completed(server: PostgresServer, name: str, tmp_path: Path) -> None:
    LedgerPointer(server.ledgers, schema_name(name), "drawn before the kill").create(tmp_path)
    place = place_in(tmp_path)
    assert Ledger.open_if_there(place) is None
    Ledger(place).open_sweep(name, {}, None, {})
    assert Ledger.open_existing(place).sweep().name == name


def test_a_ledger_of_another_version_is_refused(server: PostgresServer, name: str, tmp_path: Path) -> None:
    started(server, name, tmp_path).close()
    server.sql(f'UPDATE "{schema_name(name)}".ledger SET format = 99')
    with pytest.raises(InputError, match="has ledger format 99"):
        Ledger.open_existing(place_in(tmp_path))


def test_a_ledger_that_somebody_took_apart_is_called_damaged(server: PostgresServer, name: str, tmp_path: Path) -> None:
    ledger = started(server, name, tmp_path)
    server.sql(f'DROP TABLE "{schema_name(name)}".reports')
    with pytest.raises(InputError, match=r"is damaged \(relation .* does not exist\)"):
        ledger.report("one", 100, {"kl": 1.0}, seconds=1.0)


# -- servers that refuse, or are away


def test_a_password_comes_from_the_environment(
    server: PostgresServer, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "set PGPASSWORD, or write the password to ~/.pgpass" in refusal(with_password(server), name, tmp_path)
    monkeypatch.setenv("PGPASSWORD", "not the password")
    assert "password authentication failed" in refusal(with_password(server), name, tmp_path)
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    # as any user of a database may not
    assert "user reader may not create a schema there" in refusal(with_password(server), name, tmp_path)
    server.sql("GRANT CREATE ON DATABASE ledgers TO reader")
    Ledger(SweepSchema(with_password(server), schema_name(name), tmp_path, None)).open_sweep(name, {}, None, {})
    assert PASSWORD not in (tmp_path / POINTER_FILE).read_text()


@pytest.mark.parametrize(
    ("database", "reason"), [("none", "does not exist"), ("ledgers?nonsense=1", "invalid connection option")]
)
def test_what_is_no_database_is_refused(
    server: PostgresServer, name: str, tmp_path: Path, database: str, reason: str
) -> None:
    address = server.ledgers.replace("/ledgers?", f"/{database}{'&' if '?' in database else '?'}")
    assert reason in refusal(address, name, tmp_path)


def test_a_driver_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(InputError, match=r"ledger: .*psycopg2.*; pip install .*\[postgresql\]"):
        Ledger.open_if_there(SweepSchema("postgresql://me@host/db", "schema", tmp_path, None))


def test_a_database_that_cannot_hold_every_text_is_refused(server: PostgresServer, name: str, tmp_path: Path) -> None:
    server.sql("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    address = server.ledgers.replace("/ledgers", "/latin")
    assert "is in LATIN1; give one made with ENCODING 'UTF8'" in refusal(address, name, tmp_path)


@pytest.fixture(params=["nobody", "silent"])
def away(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a server that is not there, or takes connections and says nothing."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1] if request.param == "silent" else free_port()
        yield f"postgresql://me@127.0.0.1:{port}/db"


def test_a_server_that_is_away_is_noticed_within_seconds(away: str, name: str, tmp_path: Path) -> None:
    began = time.monotonic()
    assert refusal(away, name, tmp_path).startswith(f"ledger: {away}: ")
    # it was asked twice
    assert time.monotonic() - began < 20


def test_a_server_that_is_away_at_the_start_is_one_line(away: str, tmp_path: Path) -> None:
    write_sweep(tmp_path, ledger=away)
    ran = orchestrate("sweep", "sweep.yaml", cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"error: sweep.yaml: ledger: {away}: ") and ran.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


# -- servers that go away


@pytest.fixture
def ledger(server: PostgresServer, name: str, tmp_path: Path) -> Ledger:
    return started(server, name, tmp_path)


def stopped_for(server: PostgresServer, seconds: float) -> threading.Thread:
    """The server is down when this returns, and comes back."""
    server.stop()

    def come_back() -> None:
        time.sleep(seconds)
        server.start()

    thread = threading.Thread(target=come_back)
    thread.start()
    return thread


def test_without_patience_a_server_that_went_away_is_an_error_at_once(server: PostgresServer, ledger: Ledger) -> None:
    server.stop()
    try:
        with pytest.raises(ServerAway, match="once that is mended the same command continues"):
            ledger.training("one")
    finally:
        server.start()
    assert ledger.training("one").state == "open"


def test_a_driver_waits_and_goes_on(server: PostgresServer, ledger: Ledger) -> None:
    said: list[str] = []
    returned: list[str] = []
    with ledger.patience(Patience(60.0, said.append, lambda: returned.append("again"))):
        back = stopped_for(server, 2.0)
        ledger.report("one", 100, {"kl": 1.0}, seconds=1.0)
        back.join()
        assert (len(said), returned) == (1, ["again"])
        assert said[0].startswith("the ledger's server is away (") and "for at most 1 min" in said[0]
        ledger.finish("one", {"kl": 0.1}, "d", "aa")
    assert (ledger.training("one").state, len(ledger.reports("one"))) == ("finished", 1)


def test_what_was_begun_is_done_again(server: PostgresServer, ledger: Ledger) -> None:
    begun: list[threading.Thread] = []

    def body() -> str:
        ledger.start("one", "pack", {})
        if not begun:
            begun.append(stopped_for(server, 1.0))
        ledger.report("one", 100, {"kl": 1.0}, seconds=1.0)
        return "done"

    with ledger.patience(Patience(60.0, lambda line: None, lambda: None)):
        assert ledger.patiently(body) == "done"
    begun[0].join()
    training = ledger.training("one")
    assert (training.state, training.attempts, training.tokens_done) == ("running", 1, 100)


def test_a_commit_of_which_nothing_was_heard_is_not_done_again(server: PostgresServer, ledger: Ledger) -> None:
    def body() -> None:
        ledger.start("one", "pack", {})
        server.stop()

    try:
        with ledger.patience(Patience(60.0, lambda line: None, lambda: None)), pytest.raises(OSError) as raised:
            ledger.patiently(body)
    finally:
        server.start()
    assert not isinstance(raised.value, ServerAway) and "the same command continues" in str(raised.value)


def test_patience_has_an_end_and_then_there_is_none(server: PostgresServer, ledger: Ledger) -> None:
    server.stop()
    try:
        with ledger.patience(Patience(1.5, lambda line: None, lambda: None)):
            with pytest.raises(ServerAway):
                ledger.training("one")
            began = time.monotonic()
            with pytest.raises(ServerAway):
                ledger.training("one")
            assert time.monotonic() - began < 1.0
    finally:
        server.start()


def test_a_driver_that_was_taken_for_dead_meanwhile_writes_nothing(server: PostgresServer, ledger: Ledger) -> None:
    lease = Lease(ledger)
    try:
        with ledger.patience(Patience(60.0, lambda line: None, lease.require_latest)):
            server.stop()
            server.start()
            schema = ledger.where.rpartition(" ")[2]
            back = threading.Timer(1.0, server.start)
            server.sql(
                f"INSERT INTO \"{schema}\".starts (number, host, process, started, beat) VALUES (2, 'b', 1, now(), 0)"
            )
            server.stop()
            back.start()
            with pytest.raises(TakenOver):
                ledger.start("one", "pack", {})
            back.join()
    finally:
        lease.release()
    assert ledger.training("one").state == "open"


def test_a_lock_that_somebody_holds_is_waited_for_and_then_said(ledger: Ledger) -> None:
    holder = Ledger.open_existing(place_in(ledger.folder))
    with holder.transaction():
        holder.start("one", "pack", {})
        with pytest.raises(OSError, match="lock timeout"), ledger.transaction() as waiting:
            waiting.execute(text("SET LOCAL lock_timeout = '200ms'"))
            ledger.fail("one", "in vain")
    assert ledger.training("one").state == "running"


def orchestrate(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", *arguments],
        cwd=cwd,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
