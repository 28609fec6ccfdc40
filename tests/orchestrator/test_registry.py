"""Dictionaries into MLflow's registry and back, against a real database and a real server."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from orchestrator import load_dictionary
from orchestrator.choice import apply_rule, parse_rule
from orchestrator.ledger import Ledger
from orchestrator.registry import Registered, chosen_record, register
from orchestrator.status import study_statuses
from orchestrator.tracking import Tracker
from orchestrator.tracking_store import SHA256_TAG, TrackingUnavailable
from qkmodel import load_dictionary as load_folder
from qkmodel.errors import InputError
from tests.orchestrator.dictionaries import FRONT, make_sweep
from tests.system.services import MlflowServer, free_port

NAME = "qk.smollm2-135m.L08"
KNEE = f"models:/{NAME}@knee"
MIDDLE = "bbbb000000000002"


@pytest.fixture
def storage(tmp_path: Path, migrated: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`runs` in the present folder, whose name MLflow has to escape. The process's own store is a dead one."""
    folder = tmp_path / "work ing" / "runs"
    folder.mkdir(parents=True)
    (folder / "mlflow.db").write_bytes(migrated)
    monkeypatch.chdir(folder.parent)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


@pytest.fixture
def ledger(storage: Path) -> Iterator[Ledger]:
    ledger = make_sweep(storage)
    yield ledger
    ledger.close()


def choose(ledger: Ledger, rule: str = "knee", tracking: str | None = None, layer: int | None = None) -> Registered:
    choices = apply_rule(study_statuses(ledger), parse_rule(rule), layer)
    (registered,) = register(tracking, ledger.folder.parent, ledger, choices)
    return registered


def client_of(storage: Path) -> MlflowClient:
    address = f"sqlite:///{storage}/mlflow.db"
    return MlflowClient(tracking_uri=address, registry_uri=address)


def versions(storage: Path) -> list[tuple[str, str]]:
    found = client_of(storage).search_model_versions(f"name = '{NAME}'")
    return sorted((str(version.version), version.tags["qk.training_id"]) for version in found)


def uploaded(storage: Path) -> Path:
    """The folder in which MLflow keeps the one dictionary that was registered."""
    (config,) = (storage / "mlflow-artifacts").glob("small/models/*/artifacts/config.json")
    return config.parent


def assert_same_dictionary(reference: str, ledger: Ledger, training_id: str, tracking: str | None = None) -> None:
    """By name: every tensor, and what they make of an input, as in the sweep's folder."""
    training = ledger.training(training_id)
    loaded = load_dictionary(reference, tracking)
    original = load_folder(ledger.folder / training.dictionary, sha256=training.dictionary_sha256)
    assert loaded.config == original.config and loaded.config.training_id == training_id
    for got, wanted in ((loaded.transcoder, original.transcoder), (loaded.attention, original.attention)):
        tensors = got.state_dict() if hasattr(got, "state_dict") else got.to_tensors()
        others = wanted.state_dict() if hasattr(wanted, "state_dict") else wanted.to_tensors()
        assert tensors.keys() == others.keys() != set()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    x = torch.randn(1, 5, loaded.config.geometry.d_model, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(*pair) for pair in zip(loaded.transcoder(x), original.transcoder(x), strict=True))


def test_a_chosen_dictionary_comes_back_by_alias_and_by_version(storage: Path, ledger: Ledger) -> None:
    registered = choose(ledger)
    assert registered == Registered(NAME, "1", "knee", is_new=True, alias_was=None)
    assert registered.reference == KNEE
    assert_same_dictionary(KNEE, ledger, MIDDLE)
    assert_same_dictionary(f"models:/{NAME}/1", ledger, MIDDLE, tracking=f"sqlite:///{storage}/mlflow.db")


def test_the_version_says_where_it_comes_from_and_how_good_it_is(storage: Path, ledger: Ledger) -> None:
    Tracker(None, storage, ledger).deliver()
    choose(ledger)
    client, training = client_of(storage), ledger.training(MIDDLE)
    version = client.get_model_version_by_alias(NAME, "knee")
    provenance = {
        "qk.sweep": "small",
        "qk.study_id": "study-8",
        "qk.training_id": MIDDLE,
        "qk.dictionary_sha256": training.dictionary_sha256,
        "qk.layer": "8",
        "qk.model": "smollm2-135m",
        "qk.model_weights_sha256": "fe" * 32,
        "qk.corpus": "sotu",
        "qk.corpus_sha256": "c0" * 32,
        "qk.git_sha": "abc123",
    }
    hyperparameters = {name: str(value) for name, value in training.hyperparameters.items()}
    metrics = {name: value for name, value in training.metrics.items() if name not in ("kl_head_00", "ce_recovered")}
    # a table of versions shows all tags of each, and the first line of its description
    ids = ("qk.sweep", "qk.study_id", "qk.training_id", "qk.dictionary_sha256")
    figures = {name: repr(metrics[name]) for name in ("l0", "kl", "kl_recovered")}
    assert version.tags == {name: provenance[name] for name in ids} | figures
    first, *rows = version.description.splitlines()
    assert first == training.label
    everything = provenance | hyperparameters | {name: repr(value) for name, value in metrics.items()}
    assert {row for row in rows if "`" in row} == {f"| {name} | `{value}` |" for name, value in everything.items()}
    run = client.get_run(version.run_id)
    assert run.data.tags["qk.training_id"] == MIDDLE
    model = client.get_logged_model(uploaded(storage).parent.name)
    assert (str(model.status), model.params) == ("READY", hyperparameters)
    assert {metric.key: metric.value for metric in model.metrics} == metrics
    # the training's run has no point twice
    assert [point.value for point in client.get_metric_history(run.info.run_id, "kl")] == [training.metrics["kl"]]


def test_choosing_again_makes_no_second_version(storage: Path, ledger: Ledger) -> None:
    choose(ledger)
    assert choose(ledger) == Registered(NAME, "1", "knee", is_new=False, alias_was="1")
    assert choose(ledger, "l0=16") == Registered(NAME, "1", "l0-16", is_new=False, alias_was=None)
    assert versions(storage) == [("1", MIDDLE)]
    assert uploaded(storage).is_dir()
    aliases = client_of(storage).get_registered_model(NAME).aliases
    assert {alias: str(version) for alias, version in aliases.items()} == {"knee": "1", "l0-16": "1"}


def test_another_choice_moves_the_alias(storage: Path, ledger: Ledger) -> None:
    choose(ledger)
    other = make_sweep(storage, "other", {8: {"dddd000000000004": (4.0, 0.1)}})
    assert choose(other) == Registered(NAME, "2", "knee", is_new=True, alias_was="1")
    assert_same_dictionary(KNEE, other, "dddd000000000004")
    assert_same_dictionary(f"models:/{NAME}/1", ledger, MIDDLE)


def test_two_that_choose_at_once_make_one_version(storage: Path, ledger: Ledger) -> None:
    command = [sys.executable, "-m", "orchestrator", "choose", "small", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, cwd=storage.parent, **pipes) for _ in range(2)]
    answers = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert sorted(json.loads(out)["chosen"][0]["is_new"] for out, _ in answers) == [False, True]
    assert versions(storage) == [("1", MIDDLE)]


@pytest.mark.parametrize("file", ["config.json", "transcoder.safetensors", "attention.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_what_was_changed_in_the_store_is_refused(storage: Path, ledger: Ledger, file: str, damage: str) -> None:
    choose(ledger)
    path = uploaded(storage) / file
    content = path.read_bytes()
    middle = len(content) // 2
    changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes(content[:-1] if damage == "truncated" else changed)
    with pytest.raises(InputError, match=rf"^{KNEE}: {file}: hash") as refused:
        load_dictionary(KNEE)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("harm", ["one file gone", "all files gone", "changed"])
def test_choosing_again_sends_files_that_the_store_has_lost(storage: Path, ledger: Ledger, harm: str) -> None:
    choose(ledger)
    folder = uploaded(storage)
    if harm == "one file gone":
        (folder / "attention.safetensors").unlink()
    elif harm == "all files gone":
        shutil.rmtree(folder)
    else:
        (folder / "attention.safetensors").write_bytes(b"changed")
    if harm != "changed":
        with pytest.raises(InputError, match=rf"^{KNEE}: \S+ is gone from file:.*; orchestrate choose") as refused:
            load_dictionary(KNEE)
        assert "\n" not in str(refused.value)
    assert choose(ledger) == Registered(NAME, "2", "knee", is_new=True, alias_was="1")
    assert choose(ledger) == Registered(NAME, "2", "knee", is_new=False, alias_was="2")
    assert_same_dictionary(KNEE, ledger, MIDDLE)


def test_a_forgery_that_is_consistent_in_itself_is_refused(storage: Path, ledger: Ledger) -> None:
    """A whole other dictionary in the place of the registered one."""
    choose(ledger)
    other = ledger.training("aaaa000000000001")
    load_folder(ledger.folder / other.dictionary)
    shutil.copytree(ledger.folder / other.dictionary, uploaded(storage), dirs_exist_ok=True)
    load_folder(uploaded(storage))
    with pytest.raises(
        InputError, match=r"config\.json: hash is .* recorded was .*; orchestrate choose registers it anew$"
    ):
        load_dictionary(KNEE)


def test_a_damaged_dictionary_is_not_registered(storage: Path) -> None:
    ledger = make_sweep(storage, fronts={4: {"eeee000000000004": (8.0, 0.2)}, 8: FRONT})
    place = ledger.folder / ledger.training(MIDDLE).dictionary
    (place / "attention.safetensors").write_bytes(b"")
    way = f"; delete {re.escape(str(place))} and start the sweep again, which trains it anew$"
    with pytest.raises(InputError, match=rf"attention\.safetensors: hash differs.*{way}"):
        register(None, storage, ledger, apply_rule(study_statuses(ledger), parse_rule("knee")))
    assert list(client_of(storage).search_registered_models()) == []
    assert not (storage / "mlflow-artifacts").exists()


def test_an_upload_that_fails_leaves_neither_version_nor_alias(storage: Path, ledger: Ledger) -> None:
    # where the artifacts would go there is a file
    (storage / "mlflow-artifacts").write_text("in the way")
    with pytest.raises(TrackingUnavailable) as caught:
        choose(ledger)
    assert "\n" not in str(caught.value) and "mlflow.db" in str(caught.value)
    assert list(client_of(storage).search_registered_models()) == []
    (storage / "mlflow-artifacts").unlink()
    assert choose(ledger).is_new
    assert_same_dictionary(KNEE, ledger, MIDDLE)


@pytest.mark.parametrize("cut", ["log_model_artifact", "finalize_logged_model", "create_model_version"])
def test_choosing_that_was_cut_off_leaves_one_logged_model(
    storage: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    Tracker(None, storage, ledger).deliver()

    def end(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            # as a kill: nothing in its way catches it
            patched.setattr(MlflowClient, cut, end)
            choose(ledger)
    assert choose(ledger) == Registered(NAME, "1", "knee", is_new=True, alias_was=None)
    client = client_of(storage)
    (model,) = client.search_logged_models([client.get_experiment_by_name("small").experiment_id])
    version = client.get_model_version(NAME, "1")
    assert str(model.status) == "READY" and version.source == model.artifact_location
    assert_same_dictionary(KNEE, ledger, MIDDLE)


def test_a_logged_model_without_its_files_is_not_taken_for_a_new_version(storage: Path, ledger: Ledger) -> None:
    choose(ledger)
    (uploaded(storage) / "transcoder.safetensors").write_bytes(b"changed")
    client_of(storage).delete_model_version(NAME, "1")
    assert choose(ledger).is_new
    client = client_of(storage)
    assert len(client.search_logged_models([client.get_experiment_by_name("small").experiment_id])) == 1
    assert_same_dictionary(KNEE, ledger, MIDDLE)


@pytest.mark.parametrize("source", ["http://127.0.0.1:1/x", "https://host/a/b", "runs:/abc/x"])
def test_a_version_with_a_foreign_source_is_not_taken_for_a_whole_one(
    storage: Path, ledger: Ledger, source: str
) -> None:
    client = client_of(storage)
    client.create_registered_model(NAME)
    client.create_model_version(NAME, source, tags={SHA256_TAG: ledger.training(MIDDLE).dictionary_sha256})
    with pytest.raises(InputError, match=f"^models:/{NAME}/1: was not registered by orchestrate choose: its source is"):
        load_dictionary(f"models:/{NAME}/1")
    assert choose(ledger) == Registered(NAME, "2", "knee", is_new=True, alias_was=None)
    assert choose(ledger) == Registered(NAME, "2", "knee", is_new=False, alias_was="2")


def counts(storage: Path) -> dict[str, int]:
    """Rows of MLflow's tables that choosing adds to."""
    names = ("experiments", "logged_models", "registered_models", "model_versions", "registered_model_aliases")
    with sqlite3.connect(storage / "mlflow.db") as database:
        return {name: database.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in names}


def test_a_name_that_a_prompt_has_is_refused_and_nothing_created(storage: Path) -> None:
    """The prompt has the second layer's name: the first is not registered either."""
    make_sweep(storage, fronts={4: {"eeee000000000004": (8.0, 0.2)}, 8: FRONT})
    client_of(storage).register_prompt(NAME, "a prompt")
    before = counts(storage)
    ran = subprocess.run(
        [sys.executable, "-m", "orchestrator", "choose", "small"], cwd=storage.parent, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1), ran.stderr
    assert ran.stderr.startswith(f"error: {NAME}: is the name of a prompt at sqlite:///{storage}/mlflow.db")
    assert counts(storage) == before
    assert not (storage / "mlflow-artifacts").exists()


@pytest.mark.parametrize("own", ["first delivered", "last delivered"])
def test_a_version_belongs_to_the_run_of_its_own_storage(
    storage: Path, ledger: Ledger, tmp_path: Path, own: str
) -> None:
    """Two storages, each with a sweep of the same name and the same trainings, track into one experiment."""
    address = f"sqlite:///{storage}/mlflow.db"
    other = make_sweep(tmp_path / "other", tracking=address)
    Tracker(address, storage, ledger).deliver()
    Tracker(address, tmp_path / "other", other).deliver()
    mine = ledger if own == "first delivered" else other
    choose(mine, tracking=address)
    client = client_of(storage)
    run = client.get_run(client.get_model_version_by_alias(NAME, "knee").run_id)
    assert run.data.tags["qk.training_id"] == MIDDLE
    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.data.tags["qk.sweep"] == f"small {mine.sweep().created.isoformat()}"


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (f"models:/{NAME}@nobody", "not in the registry"),
        (f"models:/{NAME}/99", "not in the registry"),
        (f"models:/{NAME}/999999999", "not in the registry"),
        (f"models:/{NAME}/9999999999", "names no dictionary"),
        (f"models:/{NAME}/{10**30}", "names no dictionary"),
        ("models:/qk.other.L08@knee", "not in the registry"),
        ("models:/foreign@knee", f"no tag {SHA256_TAG}"),
        (NAME, "names no dictionary"),
        (f"models:/{NAME}", "names no dictionary"),
        (f"models:/{NAME}@knee/../..", "names no dictionary"),
        (f"models:/{NAME}/latest", "names no dictionary"),
        ("runs:/abc/dictionary", "names no dictionary"),
        (None, "names no dictionary"),
        (5, "names no dictionary"),
    ],
)
def test_a_name_that_stands_for_nothing_is_one_line(storage: Path, ledger: Ledger, reference: str, words: str) -> None:
    choose(ledger)
    client = client_of(storage)
    client.create_registered_model("foreign")
    client.create_model_version("foreign", str(storage), "run")
    client.set_registered_model_alias("foreign", "knee", "1")
    with pytest.raises(InputError, match=words) as refused:
        load_dictionary(reference)
    assert "\n" not in str(refused.value)


def test_the_store_is_the_one_given_or_that_of_the_environment_or_runs_here(
    storage: Path, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(ledger)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"runs/mlflow\.db: no tracking store here"):
        load_dictionary(KNEE)
    assert {path.name for path in tmp_path.iterdir()} == {"work ing"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{storage}/mlflow.db")
    assert load_dictionary(KNEE).config.training_id == MIDDLE
    with pytest.raises(InputError, match=r"none\.db: no tracking store"):
        load_dictionary(KNEE, "sqlite:///none.db")
    for address in ("file:///mlruns", "sqlite://", 5, storage / "mlflow.db"):
        with pytest.raises(InputError, match="tracking"):
            load_dictionary(KNEE, address)


def test_a_dead_server_is_one_line_without_the_password(ledger: Ledger) -> None:
    address = f"http://user:hunter2@127.0.0.1:{free_port()}"
    for attempt in (lambda: load_dictionary(KNEE, address), lambda: choose(ledger, tracking=address)):
        with pytest.raises(TrackingUnavailable, match=r"127\.0\.0\.1") as caught:
            attempt()
        assert "\n" not in str(caught.value) and "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("tracking", "shown", "arguments"),
    [
        (None, "sqlite:///{}/mlflow.db", ', tracking="sqlite:///{}/mlflow.db"'),
        ("http://host:5000", "http://host:5000", ', tracking="http://host:5000"'),
        ("http://me:hunter2@host:5000", "http://me:***@host:5000", ""),
        ("postgresql://me:hunter2@host/runs", "postgresql://me:***@host/runs", ""),
    ],
)
def test_the_line_that_loads_it_shows_no_password(
    storage: Path, ledger: Ledger, tracking: str | None, shown: str, arguments: str
) -> None:
    (choice,) = apply_rule(study_statuses(ledger), parse_rule("knee"))
    registered = Registered(NAME, "1", "knee", is_new=True, alias_was=None)
    record = chosen_record(ledger, choice, registered, tracking, storage)
    assert record["tracking"] == shown.format(storage)
    line = (
        f'from orchestrator import load_dictionary; dictionary = load_dictionary("{KNEE}"{arguments.format(storage)})'
    )
    assert record["python"] == line
    assert "hunter2" not in json.dumps(record)


def test_importing_the_packages_loads_nothing_heavy() -> None:
    script = (
        "import sys, orchestrator, qkmodel; print({'torch', 'mlflow', 'ray'} & set(sys.modules));"
        "from orchestrator import load_dictionary as by_name; from qkmodel import load_dictionary as folder;"
        "print(by_name.__module__, folder.__module__)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == ["set()", "orchestrator.registry qkmodel.dictionary"]


def test_mlflow_tells_nobody_how_it_is_used(tmp_path: Path) -> None:
    """It would keep a number of this user, which it sends along, in the home folder. Tests and CI are spared that."""
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    script = "from orchestrator import load_dictionary; print(load_dictionary.__name__)"
    command = [sys.executable, "-W", "ignore", "-c", script]
    cwd = Path(__file__).parents[2]
    subprocess.run(command, env=environment | {"HOME": str(tmp_path)}, cwd=cwd, check=True, capture_output=True)
    assert list(tmp_path.rglob("telemetry.json")) == []


@pytest.mark.system
def test_a_real_server(tmp_path: Path, migrated: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered through a server, moved by another choice, tampered with, and the server gone."""
    (tmp_path / "server.db").write_bytes(migrated)
    # nothing may depend on the process's own store
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with MlflowServer(tmp_path) as server:
        address = server.url
        ledger = make_sweep(tmp_path / "runs", tracking=address)
        Tracker(address, tmp_path / "runs", ledger).deliver()
        assert choose(ledger, tracking=address) == Registered(NAME, "1", "knee", is_new=True, alias_was=None)
        assert choose(ledger, tracking=address) == Registered(NAME, "1", "knee", is_new=False, alias_was="1")
        assert choose(ledger, "l0=8", address) == Registered(NAME, "2", "l0-8", is_new=True, alias_was=None)
        assert_same_dictionary(KNEE, ledger, MIDDLE, address)
        assert_same_dictionary(f"models:/{NAME}/2", ledger, "aaaa000000000001", address)
        client = MlflowClient(tracking_uri=address, registry_uri=address)
        assert client.get_model_version(NAME, "1").tags[SHA256_TAG] == ledger.training(MIDDLE).dictionary_sha256
        ran = subprocess.run(
            [sys.executable, "-m", "orchestrator", "choose", "runs/small", "--json"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert (ran.returncode, ran.stderr) == (0, ""), ran.stderr
        line = json.loads(ran.stdout)["chosen"][0]["python"]
        script = f"{line}; print(dictionary.config.training_id)"
        ran = subprocess.run([sys.executable, "-c", script], cwd="/", capture_output=True, text=True, check=True)
        assert ran.stdout == f"{MIDDLE}\n"
        for weights in tmp_path.glob("server-artifacts/**/transcoder.safetensors"):
            weights.write_bytes(weights.read_bytes()[:-4])
        with pytest.raises(InputError, match=r"transcoder\.safetensors: hash differs"):
            load_dictionary(KNEE, address)
        for weights in tmp_path.glob("server-artifacts/**/transcoder.safetensors"):
            weights.unlink()
        with pytest.raises(InputError, match=rf"^{KNEE}: transcoder\.safetensors is gone from mlflow-a") as gone:
            load_dictionary(KNEE, address)
        assert "\n" not in str(gone.value)
        assert choose(ledger, tracking=address) == Registered(NAME, "3", "knee", is_new=True, alias_was="1")
        assert choose(ledger, tracking=address) == Registered(NAME, "3", "knee", is_new=False, alias_was="3")
        assert_same_dictionary(KNEE, ledger, MIDDLE, address)
    with sqlite3.connect(tmp_path / "server.db") as connection:
        before = connection.execute("SELECT * FROM registered_model_aliases").fetchall()
    ran = subprocess.run(
        [sys.executable, "-m", "orchestrator", "choose", "runs/small", "--rule", "l0=60"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (1, "", 1)
    assert ran.stderr.startswith(f"error: MLflow at {address} cannot be used now")
    with sqlite3.connect(tmp_path / "server.db") as connection:
        assert connection.execute("SELECT * FROM registered_model_aliases").fetchall() == before
