"""Masks on a small dictionary: trained, and compared with the choice by saliency."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from qkmodel.pair_mask.evaluation import evaluate_mask, mask_kl
from qkmodel.pair_mask.hyperparameters import MaskHyperparameters
from qkmodel.pair_mask.mask_forms import HardConcreteMask, SqrtMask
from qkmodel.pair_mask.pair_set import PairSet
from qkmodel.pair_mask.saliency import salient_pairs
from qkmodel.pair_mask.score_terms import SequenceCodes, final_scores, score_terms, sequence_codes
from qkmodel.pair_mask.training import Batch, MaskTrainer
from tests.qkmodel.pair_mask import dense

STEPS = 60


@pytest.fixture(scope="module")
def small():
    """A dictionary, and sequences whose true pattern is nearly what it gives."""
    transcoder, layer, x = dense.random_dictionary("grouped", "relu")
    transcoder, layer = transcoder.float(), layer.float()
    generator = torch.Generator().manual_seed(2)

    def nearly_as_reconstructed(codes: SequenceCodes) -> SequenceCodes:
        scores = score_terms(transcoder, layer, codes).scores
        noise = torch.randn(scores.shape, generator=generator) / 10
        return replace(codes, log_p=final_scores(scores + noise, layer).log_softmax(-1))

    x = x.float()
    return transcoder, layer, Batch(x, [nearly_as_reconstructed(one) for one in sequence_codes(transcoder, layer, x)])


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(2) as threads:
        yield threads


def train(small, pool, **settings) -> MaskTrainer:
    transcoder, layer, batch = small
    found = salient_pairs(transcoder, layer, batch.codes, 10_000)
    trainer = MaskTrainer(MaskHyperparameters(dictionary="0" * 16, **settings), transcoder, layer, found.pairs, STEPS)
    for _ in range(STEPS):
        trainer.step(batch, pool)
    return trainer


@pytest.mark.parametrize(("form", "rate"), [("sqrt", 0.1), ("hard_concrete", 0.3)])
def test_a_trained_mask_is_better_than_as_many_pairs_by_saliency(small, pool, form, rate):
    transcoder, layer, batch = small
    codes = batch.codes
    kept = train(small, pool, form=form, pair_cost=5e-3, learning_rate=rate).kept
    found = salient_pairs(transcoder, layer, codes, 10_000)
    assert 0 < len(kept) < len(found.pairs) / 2
    by_saliency = mask_kl(transcoder, layer, codes, found.first(len(kept)), pool)
    assert mask_kl(transcoder, layer, codes, kept, pool) < by_saliency


def test_a_higher_cost_keeps_fewer_pairs(small, pool):
    kept = [len(train(small, pool, pair_cost=cost, learning_rate=0.1).kept) for cost in (1e-4, 1e-3, 1e-2)]
    assert kept == sorted(kept, reverse=True) and kept[0] > kept[2]


def test_joint_training_moves_decoders_alone_and_helps(small, pool):
    transcoder, layer, batch = small
    codes = batch.codes
    alone = train(small, pool, pair_cost=5e-3, learning_rate=0.1)
    joint = train(small, pool, pair_cost=5e-3, learning_rate=0.1, joint=True, joint_learning_rate=1e-2)
    assert torch.equal(joint.transcoder.query.W_enc, transcoder.query.W_enc)
    assert not torch.equal(joint.transcoder.query.W_dec, transcoder.query.W_dec)
    assert torch.equal(alone.transcoder.query.W_dec, transcoder.query.W_dec)
    of_joint = mask_kl(joint.transcoder, layer, codes, joint.kept, pool)
    assert of_joint < 0.8 * mask_kl(transcoder, layer, codes, joint.kept, pool)


def test_encoders_trained_along_help_further(small, pool):
    transcoder, layer, batch = small
    settings = {"pair_cost": 1e-3, "learning_rate": 0.1, "joint": True, "joint_learning_rate": 1e-2}
    joint, whole = train(small, pool, **settings), train(small, pool, **settings, encoders=True)
    for side in ("query", "key"):
        for name in ("W_enc", "b_enc"):
            before = transcoder.get_submodule(side).get_parameter(name)
            assert not torch.equal(whole.transcoder.get_submodule(side).get_parameter(name), before)
    with torch.no_grad():
        codes = [one.encoded_by(whole.transcoder, x) for one, x in zip(batch.codes, batch.x, strict=True)]
    of_joint = mask_kl(joint.transcoder, layer, batch.codes, joint.kept, pool)
    assert mask_kl(whole.transcoder, layer, codes, whole.kept, pool) < of_joint
    assert 0 < len(whole.kept) < len(joint.kept)


def test_what_belongs_to_joint_is_refused_without_it():
    for name, value in {"encoders": True, "joint_learning_rate": 1e-3, "settled_share": 0.5}.items():
        with pytest.raises(ValueError, match=f"{name}.*joint: true"):
            MaskHyperparameters(dictionary="0" * 16, pair_cost=1e-3, **{name: value})


def test_the_same_training_gives_the_same_pairs(small, pool):
    settings = {"form": "hard_concrete", "pair_cost": 2e-3, "learning_rate": 0.1, "joint": True}
    first, second = train(small, pool, **settings), train(small, pool, **settings)
    assert np.array_equal(first.kept.numbers, second.kept.numbers)
    assert torch.equal(first.transcoder.key.W_dec, second.transcoder.key.W_dec)
    other = train(small, pool, **settings, seed=1)
    assert not torch.equal(first.transcoder.key.W_dec, other.transcoder.key.W_dec)


def test_hard_concrete_is_expected_to_keep_what_it_keeps():
    mask = HardConcreteMask(20_000)
    with torch.no_grad():
        mask.log_alpha.copy_(torch.randn(20_000) * 2)
    sampled = mask.sample(torch.Generator().manual_seed(0))
    assert ((sampled > 0).sum() - mask.penalty()).abs() < 300
    assert sampled.min() == 0 and sampled.max() == 1


def test_sqrt_entries_stay_between_0_and_1_and_cost_about_one_each():
    mask = SqrtMask(10)
    assert mask.penalty().item() == pytest.approx(10, rel=0.1)
    with torch.no_grad():
        mask.entries += torch.linspace(-2, 2, 10)
    mask.after_step()
    assert mask.settled().min() == 0 and mask.settled().max() == 1


def test_metrics_of_all_pairs_and_of_none(small, pool):
    transcoder, layer, batch = small
    codes = batch.codes
    everything = PairSet.all(transcoder, layer.geometry.n_heads)
    active = salient_pairs(transcoder, layer, codes, 10_000).salient
    metrics, shares = evaluate_mask(transcoder, layer, codes, everything, active, pool)
    assert metrics["kl_masked"] == pytest.approx(metrics["kl"], abs=1e-6)
    assert metrics["mask_recovered"] == pytest.approx(1, abs=1e-5)
    # no pair is left out, and what pairs do not make up is the biases'
    assert metrics["variance_share"] + metrics["bias_share"] == pytest.approx(1, abs=1e-5)
    assert abs(metrics["bias_share"]) > 1e-3
    assert metrics["pairs_share"] == 1 and metrics["unpaired_query"] == metrics["unpaired_key"] == 0
    assert metrics["pairs_head_00"] == dense.QUERY_FEATURES * dense.KEY_FEATURES
    assert len(shares.variance_share) == len(everything)
    one = everything.subset(np.arange(len(everything)) == 7)
    metrics, _ = evaluate_mask(transcoder, layer, codes, one, active, pool)
    assert metrics["kl_no_pairs"] > metrics["kl"] and metrics["pairs_kept"] == 1
    assert metrics["unpaired_query"] == pytest.approx(1 - 1 / dense.QUERY_FEATURES)
    assert metrics["unpaired_key"] == pytest.approx(1 - 1 / dense.KEY_FEATURES)
    assert metrics["pairs_share_active"] == pytest.approx(1 / active)


@pytest.mark.parametrize("interrupted_at", [1, 25, 50])
@pytest.mark.parametrize(
    "settings", [{"form": "sqrt"}, {"form": "hard_concrete", "joint": True}, {"joint": True, "encoders": True}]
)
def test_a_continued_training_is_the_uninterrupted_one(small, pool, settings, interrupted_at):
    transcoder, layer, batch = small
    codes = batch.codes
    hyperparameters = MaskHyperparameters(dictionary="0" * 16, pair_cost=2e-3, learning_rate=0.1, **settings)
    candidates = salient_pairs(transcoder, layer, codes, 10_000).pairs

    def new() -> MaskTrainer:
        return MaskTrainer(hyperparameters, transcoder, layer, candidates, STEPS)

    whole, first, second = new(), new(), new()
    for _ in range(STEPS):
        whole.step(batch, pool)
    for _ in range(interrupted_at):
        first.step(batch, pool)
    second.load_state_tensors({name: tensor.detach().clone() for name, tensor in first.state_tensors().items()})
    for _ in range(STEPS - interrupted_at):
        second.step(batch, pool)
    assert np.array_equal(whole.kept.numbers, second.kept.numbers)
    expected = whole.state_tensors()
    assert second.state_tensors().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in second.state_tensors().items())
    assert second.losses.take_means() == whole.losses.take_means()


def test_a_dictionary_without_an_active_feature_has_figures(small, pool):
    transcoder, layer, batch = small
    codes = batch.codes
    silent = [replace(one, query=replace(one.query, values=one.query.values * 0)) for one in codes]
    everything = PairSet.all(transcoder, layer.geometry.n_heads)
    with torch.no_grad():
        for side in (transcoder := copy.deepcopy(transcoder)).children():
            side.b_out.zero_()
    metrics, shares = evaluate_mask(transcoder, layer, silent, everything, 0, pool)
    assert metrics["kl_masked"] == metrics["kl"] == metrics["kl_no_pairs"] > 0
    assert metrics["mask_recovered"] is None
    assert metrics["variance_share"] == 0 and metrics["pairs_for_90"] is None and not shares.variance_share.any()


@pytest.mark.parametrize("along", [{}, {"joint": True}, {"joint": True, "encoders": True}])
@pytest.mark.parametrize("form", ["sqrt", "hard_concrete"])
def test_a_side_that_is_never_active_leaves_a_mask_without_candidates(small, pool, form, along):
    transcoder, layer, _ = small
    with torch.no_grad():
        (transcoder := copy.deepcopy(transcoder)).query.b_enc.fill_(-1e9)
    x = dense.random_dictionary("grouped", "relu")[2].float()
    codes = sequence_codes(transcoder, layer, x)
    found = salient_pairs(transcoder, layer, codes, 10)
    assert found.salient == len(found.pairs) == 0
    settings = MaskHyperparameters(dictionary="0" * 16, pair_cost=1e-3, form=form, **along)
    trainer = MaskTrainer(settings, transcoder, layer, found.pairs, 4)
    for _ in range(4):
        trainer.step(Batch(x, codes), pool)
    metrics, _ = evaluate_mask(trainer.transcoder, layer, codes, trainer.kept, found.salient, pool)
    assert trainer.is_finite and metrics["kl_masked"] == metrics["kl"] == metrics["kl_no_pairs"]
    assert metrics["pairs_kept"] == metrics["pairs_share_active"] == 0 and metrics["unpaired_key"] == 1
    assert metrics["bias_share"] == pytest.approx(1, abs=1e-4)
