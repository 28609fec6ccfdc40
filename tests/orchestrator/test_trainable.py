"""The trainable without Ray around it: what it answers, what it leaves on disk, how it goes on."""

import math
from pathlib import Path

import pytest

from orchestrator.checkpoints import checkpoint_path, newest_checkpoint
from orchestrator.pack_order import DIVERGED, CopiesOrder, MemberOrder, MemberReport, PackOrder, dictionary_path
from orchestrator.permit import ask_to_stop, grant
from orchestrator.trainable import PackTrainable
from qkmodel.configs import CorpusConfig, ModelConfig
from qkmodel.dictionary import CorpusIdentity, ModelIdentity, load_dictionary
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.member import Member
from qkmodel.reference import ReferenceHeader, reference_path
from qkmodel.tensor_file import read_tensor_file, write_tensor_file
from tests.qkmodel.random_models import CONFIGS, save_random_model
from tests.qkmodel.world import LAYER, SmallWorld, make_world

STEPS = 48


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    return make_world(tmp_path_factory.mktemp("world"))


def order(
    world: SmallWorld,
    folder: Path,
    rates: dict[str, float],
    steps_done: int = 0,
    last_step: int = STEPS,
    streamed: bool = False,
    copies: CopiesOrder | None = None,
    start: int = 1,
) -> dict[str, str]:
    """The Tune configuration of a pack of TopK trainings with these learning rates; it goes on from the first start's
    checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    grant(folder, start)
    members = tuple(
        MemberOrder(
            training_id=training_id,
            hyperparameters=Hyperparameters(dictionary_size=16, activation="topk", k=2, learning_rate=rate),
            checkpoint=checkpoint_path(folder, 1, training_id, steps_done) if steps_done else None,
        )
        for training_id, rate in rates.items()
    )
    pack = PackOrder(
        task="transcoder",
        start=start,
        pack_id="pack",
        members=members,
        steps_done=steps_done,
        last_step=last_step,
        threads=1,
        sweep_folder=folder,
        cache_folder=world.cache.folder,
        copies=copies,
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
    return (folder / dictionary_path(1, training_id) / "transcoder.safetensors").read_bytes()


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


def test_a_node_that_keeps_copies_trains_the_same_from_them(world: SmallWorld, tmp_path: Path) -> None:
    run(order(world, tmp_path / "shared", {"a": 1e-2}))
    copies = CopiesOrder(folder=tmp_path / "node", max_bytes=10**9)
    run(order(world, tmp_path / "copied", {"a": 1e-2}, copies=copies))
    assert transcoder_bytes(tmp_path / "shared", "a") == transcoder_bytes(tmp_path / "copied", "a")
    names = {
        # without the hash in its name
        path.with_stem(path.stem[:-17]).relative_to(tmp_path / "node" / world.cache.folder.name).as_posix()
        for path in (tmp_path / "node").rglob("*.safetensors")
    }
    assert names == {path for path in world.cache.manifest.shards if path.startswith(f"L{LAYER:02d}/")}


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


def test_a_pack_ends_at_its_rung_and_the_rest_is_the_same(world: SmallWorld, tmp_path: Path) -> None:
    run(order(world, tmp_path / "whole", {"a": 1e-2}))
    # between two reports: there is one more
    _, answers = run(order(world, tmp_path / "rung", {"a": 1e-2}, last_step=8))
    assert [answer["a"].tokens for answer in answers] == [4 * 12 * 6, 4 * 12 * 8]
    # a driver that did not hear of it asks for the report alone
    _, again = run(order(world, tmp_path / "rung", {"a": 1e-2}, steps_done=8, last_step=8))
    assert [answer["a"].tokens for answer in again] == [4 * 12 * 8]
    figures = ("kl", "kl_recovered", "l0")
    assert [again[0]["a"].metrics[name] for name in figures] == [answers[1]["a"].metrics[name] for name in figures]
    run(order(world, tmp_path / "rung", {"a": 1e-2}, steps_done=8))
    assert transcoder_bytes(tmp_path / "whole", "a") == transcoder_bytes(tmp_path / "rung", "a")


def test_a_pack_that_is_asked_to_stop_loses_no_step_and_no_loss(
    world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = run(order(world, tmp_path / "whole", {"a": 1e-2}))
    folder = tmp_path / "stopped"
    trainable = PackTrainable(order(world, folder, {"a": 1e-2}))
    trainable.step()
    step = Member.step

    def step_and_ask(member: Member, *arguments: object) -> None:
        step(member, *arguments)
        ask_to_stop(folder, 1)

    monkeypatch.setattr(Member, "step", step_and_ask)
    answer = trainable.step()
    (standing,) = answer.pop("reports")
    assert answer == {"error": None, "done": True}
    # the time counts, and no figure is claimed
    assert standing["tokens"] > 0 and standing["seconds"] > 0 and standing["metrics"] == {}
    monkeypatch.undo()
    _, header = newest_checkpoint(folder, "a")
    # a step may have been under way when the next one was allowed
    assert STEPS // 8 < header.steps_done <= STEPS // 8 + 2 and header.progress == {}
    _, rest = run(order(world, folder, {"a": 1e-2}, steps_done=header.steps_done))
    assert [one["a"].metrics for one in rest[:-1]] == [one["a"].metrics for one in whole[1:-1]]
    assert transcoder_bytes(tmp_path / "whole", "a") == transcoder_bytes(folder, "a")


def test_a_worker_of_an_earlier_start_writes_nothing(world: SmallWorld, tmp_path: Path) -> None:
    trainable = PackTrainable(order(world, tmp_path, {"a": 1e-2}))
    trainable.step()
    before = sorted(tmp_path.rglob("*"))
    grant(tmp_path, 2)
    answer = trainable.step()
    assert (answer["reports"], answer["done"]) == ([], True) and answer["fenced"] is True
    assert sorted(tmp_path.rglob("*")) == before


def test_two_checkpoints_are_kept_the_latest_with_its_report(world: SmallWorld, tmp_path: Path) -> None:
    _, answers = run(order(world, tmp_path, {"a": 1e-2}), steps=3)
    kept = sorted(path.name for path in (tmp_path / "checkpoints" / "a").iterdir())
    assert kept == [f"0001-{steps:08d}.safetensors" for steps in (STEPS // 8 * 2, STEPS // 8 * 3)]
    _, header = newest_checkpoint(tmp_path, "a")
    assert header.progress == answers[-1]["a"].metrics


def test_a_pack_killed_before_its_last_answer_still_finishes(world: SmallWorld, tmp_path: Path) -> None:
    _, first = run(order(world, tmp_path, {"a": 1e-2, "b": 3e-3}))
    written = tmp_path / dictionary_path(1, "b") / "config.json"
    # another dictionary than this one by now
    written.write_text(written.read_text() + " ")
    # and what a start in between had begun to write
    begun = tmp_path / dictionary_path(2, "b") / "transcoder.safetensors"
    begun.parent.mkdir()
    begun.write_bytes(b"")
    _, again = run(order(world, tmp_path, {"a": 1e-2, "b": 3e-3}, steps_done=STEPS, start=3))
    assert len(again) == 1
    assert again[0]["a"].dictionary_sha256 == first[-1]["a"].dictionary_sha256
    # what the first start's driver never heard of is not kept twice
    assert sorted(path.name for path in (tmp_path / "dictionaries").iterdir()) == ["a-0003", "b-0001", "b-0003"]
    load_dictionary(tmp_path / again[0]["a"].dictionary, again[0]["a"].dictionary_sha256)


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
    path = checkpoint_path(tmp_path, 1, "a", 6)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"nonsense")
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
