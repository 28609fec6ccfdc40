"""Packs of pair masks without Ray around them: what they answer and write, alone or together, killed or not."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.checkpoints import checkpoint_path
from orchestrator.pack_order import MemberOrder, PackOrder, SourceOrder, dictionary_path
from orchestrator.packs.inputs import PackInputs
from orchestrator.packs.pair_mask import MaskPack
from qkmodel.dictionary import PAIRS_FILE, load_dictionary
from qkmodel.errors import InputError
from qkmodel.evaluation import reconstructed_pattern
from qkmodel.pair_mask import saliency
from qkmodel.pair_mask.candidates import candidates_path, find_candidates, read_candidates
from qkmodel.pair_mask.hyperparameters import MaskHyperparameters
from qkmodel.progress import TokenProgress
from tests.orchestrator.test_trainable import order as transcoder_order
from tests.orchestrator.test_trainable import run
from tests.qkmodel.pair_mask import dense
from tests.qkmodel.world import SmallWorld, make_world

STEPS, CALIBRATION = 48, 20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def sources(world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SourceOrder]:
    """Two dictionaries and the half of their pairs that matters most."""
    folder = tmp_path_factory.mktemp("sources")
    _, answers = run(transcoder_order(world, folder, {"a": 1e-2, "b": 3e-3}))
    found = {}
    for training_id in ("a", "b"):
        report = answers[-1][training_id]
        dictionary = load_dictionary(folder / report.dictionary, report.dictionary_sha256)
        most = world.layer.geometry.n_heads * 16 * 16 // 2
        path = candidates_path(folder / "candidates", report.dictionary_sha256, CALIBRATION, most)
        arguments = (dictionary.transcoder, dictionary.attention, world.cache, CALIBRATION, most, 2)
        find_candidates(path, report.dictionary_sha256, *arguments)
        found[report.dictionary_sha256[:16]] = SourceOrder(
            folder=folder / report.dictionary,
            sha256=report.dictionary_sha256,
            candidates=path,
            calibration_sequences=CALIBRATION,
        )
    return found


def order(
    world: SmallWorld,
    folder: Path,
    sources: dict[str, SourceOrder],
    masks: dict[str, dict[str, object]],
    steps_done: int = 0,
    threads: int = 1,
) -> dict[str, str]:
    """A pack of masks of the dictionaries that `masks` numbers."""
    shared = PackOrder.model_validate_json(transcoder_order(world, folder, {"any": 1.0})["order"])
    names = sorted(sources)
    members = tuple(
        MemberOrder(
            training_id=training_id,
            hyperparameters=MaskHyperparameters(**settings | {"dictionary": names[settings["dictionary"]]}),
            checkpoint=checkpoint_path(folder, 1, training_id, steps_done) if steps_done else None,
        )
        for training_id, settings in masks.items()
    )
    changed = {
        "task": "pair_mask",
        "members": members,
        "sources": sources,
        "steps_done": steps_done,
        "threads": threads,
    }
    return {"order": shared.model_copy(update=changed).model_dump_json()}


MASKS = {
    "alone": {"dictionary": 0, "pair_cost": 1e-4, "learning_rate": 0.1},
    "joint": {"dictionary": 0, "pair_cost": 1e-4, "learning_rate": 0.1, "joint": True},
    "encoders": {"dictionary": 0, "pair_cost": 1e-4, "learning_rate": 0.1, "joint": True, "encoders": True},
    "other": {"dictionary": 1, "pair_cost": 1e-4, "learning_rate": 0.1, "form": "hard_concrete"},
}


def files_of(folder: Path, training_id: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / dictionary_path(1, training_id)).iterdir()}


def test_reports_on_the_way_and_a_dictionary_with_its_pairs(
    world: SmallWorld, sources: dict[str, SourceOrder], tmp_path: Path
) -> None:
    _, answers = run(order(world, tmp_path, sources, MASKS))
    assert len(answers) == 8
    assert answers[0]["alone"].metrics.keys() == {
        *("loss", "train_kl", "train_pairs"),
        *("kl_masked", "kl_masked_recovered", "pairs_kept"),
    }
    final = answers[-1]["alone"]
    dictionary = load_dictionary(tmp_path / final.dictionary, final.dictionary_sha256)
    assert dictionary.config.metrics == final.metrics
    assert len(dictionary.kept_pairs.pairs) == final.metrics["pairs_kept"] > 0
    source = sources[sorted(sources)[0]]
    of_source = load_dictionary(source.folder, source.sha256)
    candidates = read_candidates(source.candidates, source.sha256, CALIBRATION)
    assert set(dictionary.kept_pairs.pairs.numbers) < set(candidates.pairs.numbers)
    assert dictionary.config.pair_mask.source_sha256 == source.sha256
    # the kl beside it is that of the dictionary whose pairs they are
    assert final.metrics["kl"] == pytest.approx(of_source.config.metrics["kl"], rel=1e-3)
    assert final.metrics["kl"] < final.metrics["kl_masked"] < final.metrics["kl_no_pairs"]
    assert torch.equal(dictionary.transcoder.query.W_dec, of_source.transcoder.query.W_dec)
    joint = load_dictionary(tmp_path / answers[-1]["joint"].dictionary)
    assert not torch.equal(joint.transcoder.query.W_dec, of_source.transcoder.query.W_dec)
    assert torch.equal(joint.transcoder.query.W_enc, of_source.transcoder.query.W_enc)
    assert answers[-1]["joint"].metrics["kl"] != final.metrics["kl"]
    # compared with is the dictionary that all three come from
    unmasked = {name: answers[-1][name].metrics["kl_unmasked"] for name in ("alone", "joint", "encoders")}
    assert unmasked == pytest.approx(dict.fromkeys(unmasked, final.metrics["kl"]), abs=1e-6)
    of_encoders = answers[-1]["encoders"].metrics
    assert of_encoders["mask_recovered"] == pytest.approx(
        (of_encoders["kl_no_pairs"] - of_encoders["kl_masked"]) / (of_encoders["kl_no_pairs"] - final.metrics["kl"])
    )
    assert of_encoders["variance_share"] + of_encoders["bias_share"] == pytest.approx(1, abs=1e-3)
    encoders = load_dictionary(tmp_path / answers[-1]["encoders"].dictionary)
    assert not torch.equal(encoders.transcoder.key.W_enc, of_source.transcoder.key.W_enc)


def test_together_alone_killed_or_on_more_threads_a_mask_is_the_same(
    world: SmallWorld, sources: dict[str, SourceOrder], tmp_path: Path
) -> None:
    run(order(world, tmp_path / "together", sources, MASKS))
    for training_id, settings in MASKS.items():
        folder = tmp_path / training_id
        run(order(world, folder, sources, {training_id: settings}, threads=3), steps=5)
        run(order(world, folder, sources, {training_id: settings}, steps_done=STEPS // 8 * 5))
        assert files_of(folder, training_id) == files_of(tmp_path / "together", training_id)


def test_cross_entropy_is_that_of_the_pattern_of_kept_pairs(
    world: SmallWorld, sources: dict[str, SourceOrder], tmp_path: Path
) -> None:
    asked = PackOrder.model_validate_json(order(world, tmp_path, sources, {"alone": MASKS["alone"]})["order"])
    asked = asked.model_copy(update={"training": world.training})
    inputs = PackInputs(asked, world.cache, world.cache, world.layer, world.reference, lambda: world.model)
    pack = MaskPack(inputs)
    pack.trainer.train(STEPS)
    (metrics,) = pack.evaluate()
    pack.save(0, "alone", metrics, tmp_path / "dictionary")
    dictionary = load_dictionary(tmp_path / "dictionary")
    sequences, at = range(world.training.cross_entropy_sequences), world.layer.geometry.layer
    x = world.cache.read(at, "validation", sequences)
    # both in float64, with every pair of a sequence in one tensor
    transcoder, layer = copy.deepcopy(dictionary.transcoder).double(), copy.deepcopy(world.layer).double()
    kept = dictionary.kept_pairs.pairs
    mask = torch.zeros(kept.shape, dtype=torch.float64)
    mask.view(-1)[torch.from_numpy(kept.numbers)] = 1
    pattern = torch.stack([dense.scores(transcoder, layer, one, mask) for one in x.double()]).softmax(-1)
    torch.testing.assert_close(dictionary.pattern(x).double(), pattern, atol=1e-5, rtol=0)
    tokens = world.cache.tokens("validation", sequences)

    def cross_entropy(pattern: torch.Tensor) -> float:
        nats, count = world.model.cross_entropy(tokens, at, pattern.float(), torch.bfloat16)
        return nats / count

    assert metrics["ce_patched"] == pytest.approx(cross_entropy(pattern), abs=1e-4)
    of_all_pairs = cross_entropy(reconstructed_pattern(dictionary.transcoder, world.layer, x))
    assert abs(metrics["ce_patched"] - of_all_pairs) > 1e-3


@pytest.mark.parametrize("joint", [False, True])
def test_a_mask_that_keeps_nothing_ends_all_the_same(
    world: SmallWorld, sources: dict[str, SourceOrder], tmp_path: Path, joint: bool
) -> None:
    settings = MASKS["alone"] | {"pair_cost": 1e3, "learning_rate": 10.0, "joint": joint}
    _, whole = run(order(world, tmp_path / "whole", sources, {"none": settings}))
    final = whole[-1]["none"]
    assert final.metrics["pairs_kept"] == 0 and final.metrics["kl_masked"] == final.metrics["kl_no_pairs"]
    assert final.metrics["mask_recovered"] == 0 and final.metrics["pairs_for_90"] is None
    dictionary = load_dictionary(tmp_path / "whole" / final.dictionary, final.dictionary_sha256)
    x = world.cache.read(world.layer.geometry.layer, "validation", [0])
    assert dictionary.pattern(x).sum(-1) == pytest.approx(1.0, abs=1e-5)
    # from a checkpoint after the choice, where there is one
    run(order(world, tmp_path / "killed", sources, {"none": settings}), steps=7)
    run(order(world, tmp_path / "killed", sources, {"none": settings}, steps_done=STEPS // 8 * 7))
    assert files_of(tmp_path / "killed", "none") == files_of(tmp_path / "whole", "none")


def test_pairs_that_were_changed_or_are_gone_are_refused_in_one_line(
    world: SmallWorld, sources: dict[str, SourceOrder], tmp_path: Path
) -> None:
    _, answers = run(order(world, tmp_path, sources, {"alone": MASKS["alone"]}))
    folder = tmp_path / answers[-1]["alone"].dictionary
    path = folder / PAIRS_FILE
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=r"pairs\.safetensors: hash differs"):
        load_dictionary(folder)
    path.unlink()
    with pytest.raises(InputError, match=r"pairs\.safetensors: cannot be read"):
        load_dictionary(folder)


def test_finding_candidates_tells_how_far_it_is_over_all_passes(
    world: SmallWorld, sources: dict[str, SourceOrder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = next(iter(sources.values()))
    dictionary = load_dictionary(source.folder, source.sha256)
    heads = world.layer.geometry.n_heads
    # six of the sixteen query features at a time: three passes
    monkeypatch.setattr(saliency, "BLOCK_BYTES", 6 * 4 * heads * 16)
    told: list[TokenProgress] = []
    arguments = (dictionary.transcoder, dictionary.attention, world.cache, CALIBRATION, heads * 16 * 16 // 2, 1)
    find_candidates(tmp_path / "candidates", source.sha256, *arguments, told.append)
    each = world.cache.context
    assert [one.tokens_done for one in told] == [each * (number + 1) for number in range(3 * CALIBRATION)]
    assert {one.tokens_total for one in told} == {3 * CALIBRATION * each}
    assert (tmp_path / "candidates").read_bytes() == source.candidates.read_bytes()


def test_candidates_come_back_as_they_were_found_and_damage_is_seen(
    sources: dict[str, SourceOrder], tmp_path: Path
) -> None:
    source, other = sources.values()
    path = source.candidates
    found = read_candidates(path, source.sha256, CALIBRATION)
    assert len(found.pairs) <= found.salient and (found.saliency > 0).all()
    assert (np.diff(found.pairs.numbers) > 0).all()
    broken = tmp_path / "broken.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    broken.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        read_candidates(broken, source.sha256, CALIBRATION)
    for sha256, sequences in ((other.sha256, CALIBRATION), (source.sha256, CALIBRATION + 1)):
        with pytest.raises(InputError, match="holds the pairs of dictionary"):
            read_candidates(path, sha256, sequences)
