"""The trainable without Ray around it: what it answers, what it leaves on disk, how it goes on."""

import math
from pathlib import Path

import pytest

from orchestrator.pack_order import DIVERGED, MemberOrder, MemberReport, PackOrder, checkpoint_path
from orchestrator.trainable import PackTrainable
from qkmodel.configs import CorpusConfig, ModelConfig
from qkmodel.dictionary import CorpusIdentity, ModelIdentity, load_dictionary
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.reference import ReferenceHeader, reference_path
from qkmodel.tensor_file import read_tensor_file, write_tensor_file
from tests.qkmodel.random_models import CONFIGS, save_random_model
from tests.qkmodel.world import LAYER, SmallWorld, make_world

STEPS = 48


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    return make_world(tmp_path_factory.mktemp("world"))


def order(
    world: SmallWorld, folder: Path, rates: dict[str, float], steps_done: int = 0, streamed: bool = False
) -> dict[str, str]:
    """The Tune configuration of a pack of TopK trainings with these learning rates."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    members = tuple(
        MemberOrder(
            training_id=training_id,
            hyperparameters=Hyperparameters(dictionary_size=16, activation="topk", k=2, learning_rate=rate),
        )
        for training_id, rate in rates.items()
    )
    pack = PackOrder(
        pack_id="pack",
        members=members,
        steps_done=steps_done,
        threads=1,
        sweep_folder=folder,
        cache_folder=world.cache.folder,
        streamed=streamed,
        device="cpu",
        reference_file=reference_path(world.cache, LAYER, world.training),
        model_identity=ModelIdentity(config=ModelConfig(name="random"), weights_sha256="w", layer=LAYER, hook="h"),
        corpus_identity=CorpusIdentity(config=CorpusConfig(name="c"), bos="b", sha256="c"),
        # no model to patch patterns into
        training=world.training.model_copy(update={"cross_entropy_sequences": 0}),
        seed=0,
    )
    return {"order": pack.model_dump_json()}


def run(config: dict[str, str], steps: int = 100) -> tuple[PackTrainable, list[dict[str, MemberReport]]]:
    """Steps until the pack says that it is done, at most `steps` times."""
    trainable = PackTrainable(config)
    answers = []
    for _ in range(steps):
        result = trainable.step()
        assert result["error"] is None
        answers.append({one["training_id"]: MemberReport.model_validate(one) for one in result["reports"]})
        if result["done"]:
            break
    return trainable, answers


def transcoder_bytes(folder: Path, training_id: str) -> bytes:
    return (folder / "dictionaries" / training_id / "transcoder.safetensors").read_bytes()


def test_eight_reports_then_a_dictionary(world: SmallWorld, tmp_path: Path) -> None:
    _, answers = run(order(world, tmp_path, {"a": 1e-2, "b": 3e-3}))
    assert len(answers) == 8
    assert [answer["a"].tokens for answer in answers] == [STEPS // 8 * 4 * 12 * n for n in range(1, 9)]
    assert all(answer.keys() == {"a", "b"} for answer in answers)
    assert answers[0]["a"].metrics.keys() == {"loss", "train_kl", "train_l0", "kl", "kl_recovered", "l0"}
    assert answers[0]["a"].dictionary is None
    final = answers[-1]["a"]
    dictionary = load_dictionary(tmp_path / final.dictionary, final.dictionary_sha256)
    assert dictionary.config.metrics == final.metrics and dictionary.config.training_id == "a"
    assert final.metrics["kl"] < answers[0]["a"].metrics["kl"]


def test_a_killed_pack_goes_on_to_the_same_dictionaries(world: SmallWorld, tmp_path: Path) -> None:
    rates = {"a": 1e-2, "b": 3e-3}
    run(order(world, tmp_path / "whole", rates))
    run(order(world, tmp_path / "killed", rates), steps=3)
    # what is left is what is on disk; the second attempt packs the members the other way round
    _, answers = run(order(world, tmp_path / "killed", dict(reversed(rates.items())), steps_done=STEPS // 8 * 3))
    assert len(answers) == 5
    for training_id in rates:
        whole, killed = (transcoder_bytes(tmp_path / name, training_id) for name in ("whole", "killed"))
        assert whole == killed


def test_a_pack_killed_before_its_last_answer_still_finishes(world: SmallWorld, tmp_path: Path) -> None:
    _, first = run(order(world, tmp_path, {"a": 1e-2}))
    _, again = run(order(world, tmp_path, {"a": 1e-2}, steps_done=STEPS))
    assert len(again) == 1
    assert again[0]["a"].dictionary_sha256 == first[-1]["a"].dictionary_sha256


def test_a_diverging_member_leaves_and_the_others_do_not_notice(world: SmallWorld, tmp_path: Path) -> None:
    _, answers = run(order(world, tmp_path / "both", {"wild": 1e30, "calm": 1e-2}))
    assert "not finite" in answers[0]["wild"].error
    assert all(answer.keys() == {"calm"} for answer in answers[1:])
    assert math.isfinite(answers[-1]["calm"].metrics["kl"])
    run(order(world, tmp_path / "alone", {"calm": 1e-2}))
    assert transcoder_bytes(tmp_path / "both", "calm") == transcoder_bytes(tmp_path / "alone", "calm")


def test_a_finite_kl_beyond_all_reason_counts_as_diverged(world: SmallWorld, tmp_path: Path) -> None:
    _, answers = run(order(world, tmp_path, {"wild": 1e6, "calm": 1e-2}))
    error = answers[0]["wild"].error
    assert error.startswith(DIVERGED) and "is over 100 times the mean pattern's" in error
    assert answers[-1].keys() == {"calm"}


def test_a_pack_of_diverging_members_is_done_at_once(world: SmallWorld, tmp_path: Path) -> None:
    _, answers = run(order(world, tmp_path, {"wild": 1e30}))
    assert len(answers) == 1 and not (tmp_path / "dictionaries").exists()


def test_what_goes_wrong_is_answered(world: SmallWorld, tmp_path: Path) -> None:
    config = order(world, tmp_path, {"a": 1e-2}, steps_done=6)
    checkpoint_path(tmp_path, "a").write_bytes(b"nonsense")
    result = PackTrainable(config).step()
    assert result["done"] and result["reports"] == []
    assert result["error"].startswith("InputError") and "cannot be read" in result["error"]


def test_a_reference_that_lacks_a_tensor_is_answered_with_the_reason(world: SmallWorld, tmp_path: Path) -> None:
    whole = reference_path(world.cache, LAYER, world.training)
    header, tensors = read_tensor_file(whole, ReferenceHeader)
    lacking = tmp_path / "reference.safetensors"
    write_tensor_file(lacking, header, {name: value for name, value in tensors.items() if name != "mean_key"})
    config = order(world, tmp_path, {"a": 1e-2})
    config["order"] = config["order"].replace(str(whole), str(lacking))
    result = PackTrainable(config).step()
    assert result["done"] and result["error"] == "KeyError: 'mean_key'"


def test_a_model_that_changed_under_the_sweep_is_not_measured_with(world: SmallWorld, tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_random_model(CONFIGS["llama3"], model)
    pack = PackOrder.model_validate_json(order(world, tmp_path, {"a": 1e-2})["order"])
    identity = pack.model_identity.model_copy(update={"config": ModelConfig(name=str(model))})
    changed = pack.model_copy(update={"training": world.training, "model_identity": identity})
    trainable = PackTrainable({"order": changed.model_dump_json()})
    answers = [trainable.step() for _ in range(8)]
    assert "its files changed since the sweep was started" in answers[-1]["error"]


def test_a_worker_takes_up_another_pack(world: SmallWorld, tmp_path: Path) -> None:
    trainable, _ = run(order(world, tmp_path / "first", {"a": 1e-2}))
    assert trainable.reset_config(order(world, tmp_path / "second", {"b": 3e-3}))
    while not trainable.step()["done"]:
        pass
    run(order(world, tmp_path / "fresh", {"b": 3e-3}))
    assert transcoder_bytes(tmp_path / "second", "b") == transcoder_bytes(tmp_path / "fresh", "b")
