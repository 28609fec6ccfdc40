"""Whose pairs a sweep of masks chooses from, and which references are refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.choice import apply_rule, parse_rule
from orchestrator.config import SweepConfig
from orchestrator.preparation import _in_storage
from orchestrator.registry import register
from orchestrator.source_dictionaries import SourceDictionary, source_dictionaries
from orchestrator.status import study_statuses
from orchestrator.storage.bucket import working_copies
from orchestrator.storage.shared import SHARED
from qkmodel.configs import ModelConfig
from qkmodel.dictionary import CONFIG_FILE, load_dictionary, save_dictionary
from qkmodel.errors import InputError
from qkmodel.model_description import describe_model
from tests.orchestrator.dictionaries import FRONT, IDENTITY, make_sweep


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    make_sweep(tmp_path / "runs", fronts={8: FRONT, 3: {"dddd000000000004": (8.0, 0.5)}}).close()
    return tmp_path / "runs"


def sources(storage: Path, *references: str, layers: tuple[int, ...] = (8,)) -> dict[int, tuple[SourceDictionary, ...]]:
    config = SweepConfig(
        name="mask",
        task="pair_mask",
        model="smollm2-135m",
        layers=layers,
        corpus="sotu",
        pair_mask={"dictionaries": references},
        training={"tokens": 100_000},
        search={"trainings": 4, "space": {"pair_cost": [1e-7, 1e-6]}},
        storage=str(storage),
        tracking=f"sqlite:///{storage / 'mlflow.db'}",
    )
    model = replace(describe_model(ModelConfig(name="smollm2-135m")), weights_sha256="fe" * 32)
    return source_dictionaries(config, model, storage / "activations")


def folder_of(storage: Path, training_id: str) -> Path:
    return storage / "small" / "dictionaries" / training_id


def test_a_sweep_gives_its_fronts_of_the_layers_that_are_asked_for(storage: Path) -> None:
    found = sources(storage, "small", layers=(3, 8))
    assert {layer: len(each) for layer, each in found.items()} == {3: 1, 8: len(FRONT)}
    for one in found[8]:
        # it is the very dictionary
        load_dictionary(one.folder, one.sha256)
        assert one.name == one.sha256[:16] and one.all_pairs == 4 * 512 * 512
        assert one.candidates(0.01) == 10485
    assert sources(storage, str(storage / "small"))[8] == found[8]


def test_what_is_named_twice_counts_once(storage: Path) -> None:
    one = sources(storage, "small")[8][0]
    assert [each.name for each in sources(storage, str(one.folder), str(one.folder))[8]] == [one.name]
    assert len(sources(storage, "small", str(one.folder))[8]) == len(FRONT)


def test_a_registered_dictionary_is_the_same_source(storage: Path) -> None:
    ledger = make_sweep(storage, "other")
    (choice,) = apply_rule(study_statuses(ledger), parse_rule("knee"))
    (registered,) = register(f"sqlite:///{storage / 'mlflow.db'}", storage, ledger, [choice])
    (found,) = sources(storage, registered.reference)[8]
    assert found.sha256 == choice.training.dictionary_sha256
    one = found.fetched
    assert save_dictionary(found.folder, one.transcoder, one.attention, one.config) == found.sha256


def test_what_cannot_be_a_source_is_one_line(storage: Path) -> None:
    (storage / "file").touch()
    for reference in ("nothing", str(storage / "file")):
        with pytest.raises(InputError, match=f"{reference}: is neither a dictionary's folder nor a sweep"):
            sources(storage, reference)
    with pytest.raises(InputError, match="small: no dictionary of layer 5"):
        sources(storage, "small", layers=(5, 8))
    one = sources(storage, "small")[8][0]
    with pytest.raises(InputError, match="is of layer 8, which is not among layers"):
        sources(storage, str(one.folder), layers=(3,))
    with (one.folder / "transcoder.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match=r"transcoder\.safetensors is damaged or was changed; delete that folder"):
        sources(storage, "small")
    with pytest.raises(InputError, match=r"transcoder\.safetensors: .* was changed; name another than"):
        sources(storage, str(one.folder))
    (one.folder / "transcoder.safetensors").unlink()
    with pytest.raises(InputError, match=r"transcoder\.safetensors: cannot be read .*; name another than"):
        sources(storage, str(one.folder))
    with pytest.raises(InputError, match="is gone; start that sweep again"):
        sources(storage, "small")
    shutil.rmtree(one.folder)
    with pytest.raises(InputError, match="is gone"):
        sources(storage, "small")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda config: config["files"].update({"../small.sqlite": "ab"}),
            r"\.\./small\.sqlite is no file of a dictionary",
        ),
        (lambda config: config.update(files={}), r"transcoder\.safetensors: hash differs"),
        (
            lambda config: config["hyperparameters"].update(dictionary_size=256),
            r"the configuration needs float32 \(256",
        ),
        (lambda config: config["geometry"].update(d_model=256), r"tensor w_q has shape"),
    ],
)
def test_a_configuration_that_is_not_its_tensors_is_refused_before_anything_is_begun(
    change: Callable[[dict[str, Any]], object], said: str, storage: Path
) -> None:
    one = sources(storage, "small")[8][0]
    path = one.folder / CONFIG_FILE
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"pair_mask.dictionaries: .*{said}.*; name another than"):
        sources(storage, str(one.folder))


def test_a_dictionary_of_another_model_is_refused(storage: Path, tmp_path: Path) -> None:
    one = sources(storage, "small")[8][0]
    dictionary = load_dictionary(one.folder)
    model = dictionary.config.model.model_copy(update={"weights_sha256": "ab" * 32})
    config = dictionary.config.model_copy(update={"model": model})
    save_dictionary(tmp_path / "foreign", dictionary.transcoder, dictionary.attention, config)
    with pytest.raises(InputError, match="with other weights than smollm2-135m"):
        sources(storage, str(tmp_path / "foreign"))


@pytest.mark.parametrize("is_in_bucket", [True, False])
def test_what_a_bucket_has_is_copied_to_where_all_nodes_see_it(
    is_in_bucket: bool, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    one = sources(storage, "small")[8][0]
    folder = (working_copies() if is_in_bucket else tmp_path / "shared") / "one"
    shutil.copytree(one.folder, folder)
    config = SimpleNamespace(storage=str(tmp_path / "other"))
    plan = SimpleNamespace(storage=SHARED, config=config, cache_root=tmp_path / "other" / "activations")
    found = _in_storage(plan, replace(one, folder=folder))
    assert found.folder.is_relative_to(tmp_path / "other") is is_in_bucket
    load_dictionary(found.folder, one.sha256)


def test_a_sweep_of_masks_is_no_source(storage: Path) -> None:
    ledger = make_sweep(storage, "masks", fronts={})
    ledger.open_study("study", "pair_mask", 8, IDENTITY, model="smollm2-135m", corpus="sotu")
    ledger.close()
    with pytest.raises(InputError, match="masks: is a sweep of pair masks; name that of the dictionaries"):
        sources(storage, "masks")
