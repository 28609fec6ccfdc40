"""Every metric against a plain loop over sequences, heads and rows in float64."""

import math
from functools import partial

import pytest
import torch

from qkmodel.errors import InputError
from qkmodel.evaluation import evaluate, evaluate_cross_entropy, reconstructed_pattern
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.pack import PackTrainer
from qkmodel.reference import ensure_reference, load_reference, reference_path
from qkmodel.transcoder import QKTranscoder
from tests.qkmodel.world import CONTEXT, LAYER, SmallWorld, make_world

TOPK = Hyperparameters(dictionary_size=64, activation="topk", k=3, learning_rate=1e-2)


@pytest.fixture(scope="module", params=["llama3", "qwen3", "gpt2"])
def trained(request: pytest.FixtureRequest, tmp_path_factory) -> tuple[SmallWorld, QKTranscoder]:
    world = make_world(tmp_path_factory.mktemp(request.param), request.param)
    trainer = PackTrainer([TOPK], world.layer, world.cache, world.reference, world.training, seed=0)
    trainer.train(20)
    return world, trainer.members[0].transcoder.requires_grad_(False)


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights]


def kl(p: list[float], p_hat: list[float]) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, p_hat, strict=True) if a > 0)


def plain_metrics(world: SmallWorld, transcoder: QKTranscoder) -> dict[str, float]:
    """Row by row, head by head, from scores in float64."""
    layer, sequences = world.layer, world.training.validation_sequences
    x = world.cache.read(LAYER, "validation", range(sequences))
    q, k = layer.project(x)
    f_q, f_k = transcoder.query.encode(x), transcoder.key.encode(x)
    q_hat = transcoder.query.decode(f_q).unflatten(-1, (-1, layer.geometry.d_head))
    k_hat = transcoder.key.decode(f_k).unflatten(-1, (-1, layer.geometry.d_head))
    exact = layer.double()
    try:
        scores = {
            "true": exact.scores(q.double(), k.double()),
            "kl": exact.scores(q_hat.double(), k_hat.double()),
            "kl_query": exact.scores(q_hat.double(), k.double()),
            "kl_key": exact.scores(q.double(), k_hat.double()),
        }
    finally:
        layer.float()
    heads = layer.geometry.n_heads
    sums: dict[str, float] = {}
    agree = error = 0.0
    per_head = [0.0] * heads
    for b in range(sequences):
        for h in range(heads):
            for i in range(CONTEXT):
                rows = {name: values[b, h, i, : i + 1].tolist() for name, values in scores.items()}
                p = {name: softmax(row) for name, row in rows.items()}
                for name in ("kl", "kl_query", "kl_key"):
                    sums[name] = sums.get(name, 0.0) + kl(p["true"], p[name])
                    if i >= 2:
                        value = kl(softmax(rows["true"][1:]), softmax(rows[name][1:]))
                        sums[f"{name}_no_bos"] = sums.get(f"{name}_no_bos", 0.0) + value
                per_head[h] += kl(p["true"], p["kl"])
                agree += p["true"].index(max(p["true"])) == p["kl"].index(max(p["kl"]))
                error += max(abs(a - c) for a, c in zip(p["true"], p["kl"], strict=True))
    rows, rows_no_bos = sequences * heads * CONTEXT, sequences * heads * (CONTEXT - 2)
    metrics = {name: value / (rows_no_bos if name.endswith("no_bos") else rows) for name, value in sums.items()}
    metrics |= {f"kl_head_{h:02d}": value / (sequences * CONTEXT) for h, value in enumerate(per_head)}
    metrics |= {"top1": agree / rows, "max_error": error / rows}
    for side, f in (("query", f_q), ("key", f_k)):
        counts = [sum(int(f[b, t, j] > 0) for b in range(sequences) for t in range(1, CONTEXT)) for j in range(64)]
        tokens = sequences * (CONTEXT - 1)
        metrics[f"l0_{side}"] = sum(counts) / tokens
        metrics[f"dead_{side}"] = sum(count == 0 for count in counts) / 64
        metrics[f"dense_{side}"] = sum(count > 0.1 * tokens for count in counts) / 64
    metrics["l0"] = (metrics["l0_query"] + metrics["l0_key"]) / 2
    metrics["feature_window_tokens"] = tokens
    return metrics


def test_metrics_equal_a_plain_loop(trained: tuple[SmallWorld, QKTranscoder]) -> None:
    world, transcoder = trained
    (ours,) = evaluate([transcoder], world.layer, world.cache, world.reference, world.training.validation_sequences)
    plain = plain_metrics(world, transcoder)
    baseline, baseline_no_bos = world.reference.kl_baseline, world.reference.kl_baseline_no_bos
    plain |= {
        "kl_baseline": baseline,
        "kl_baseline_no_bos": baseline_no_bos,
        "kl_recovered": 1 - plain["kl"] / baseline,
        "kl_recovered_no_bos": 1 - plain["kl_no_bos"] / baseline_no_bos,
        "kl_cache": world.reference.kl_cache,
    }
    assert ours.keys() == plain.keys()
    for name, value in plain.items():
        assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_together_and_on_threads_is_as_alone(trained: tuple[SmallWorld, QKTranscoder]) -> None:
    world, transcoder = trained
    arguments = world.layer, world.cache, world.reference, 19
    other = PackTrainer([TOPK], world.layer, world.cache, world.reference, world.training, seed=0).members[0].transcoder
    alone = evaluate([transcoder], *arguments) + evaluate([other], *arguments)
    assert evaluate([transcoder, other], *arguments, threads=2) == alone


def test_references_equal_a_plain_computation(trained: tuple[SmallWorld, QKTranscoder]) -> None:
    world, _ = trained
    layer, reference = world.layer, world.reference
    x = world.cache.read(LAYER, "train", range(192)).double()
    exact = layer.double()
    try:
        q, k = (heads.flatten(-2).mean((0, 1)) for heads in exact.project(x))
        torch.testing.assert_close(reference.mean_input.double(), x.mean((0, 1)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(reference.mean_query.double(), q, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(reference.mean_key.double(), k, rtol=1e-5, atol=1e-6)
        held_out = world.cache.read(LAYER, "validation", range(19)).double()
        true = exact.scores(*exact.project(held_out)).log_softmax(-1)
        spread = [mean.view(1, 1, -1, layer.geometry.d_head).expand(19, CONTEXT, -1, -1) for mean in (q, k)]
        mean_pattern = exact.scores(*spread).log_softmax(-1)
        visible = torch.isfinite(true)
        gap = torch.where(visible, true - mean_pattern, torch.zeros_like(true))
        assert reference.kl_baseline == pytest.approx((true.exp() * gap).sum(-1).mean().item(), rel=1e-4)
    finally:
        layer.float()


def test_cached_activations_stay_close_to_exact_ones(trained: tuple[SmallWorld, QKTranscoder]) -> None:
    world, _ = trained
    assert 0 < world.reference.kl_cache < 0.01 * world.reference.kl_baseline


def test_cross_entropy_of_patched_patterns(trained: tuple[SmallWorld, QKTranscoder]) -> None:
    world, transcoder = trained
    other = PackTrainer([TOPK], world.layer, world.cache, world.reference, world.training, seed=0).members[0].transcoder
    arguments = world.layer, world.model, world.cache, world.reference, 5
    patterns = [partial(reconstructed_pattern, one, world.layer) for one in (transcoder, other)]
    metrics, others = evaluate_cross_entropy(patterns, *arguments, threads=2)
    assert evaluate_cross_entropy(patterns[1:], *arguments) == [others] != [metrics]
    tokens = world.cache.tokens("validation", range(5))
    x = world.cache.read(LAYER, "validation", range(5))
    q_hat, k_hat = (flat.unflatten(-1, (-1, world.layer.geometry.d_head)) for flat in transcoder(x))
    pattern = world.layer.pattern(q_hat, k_hat)
    total, count = world.model.cross_entropy(tokens, LAYER, pattern, torch.bfloat16)
    assert metrics["ce_patched"] == pytest.approx(total / count, rel=1e-6)
    clean, _ = world.model.cross_entropy(tokens, products=torch.bfloat16)
    assert metrics["ce_clean"] == pytest.approx(clean / count, rel=1e-6)
    assert clean / count == pytest.approx(world.model.cross_entropy(tokens)[0] / count, rel=1e-2)
    spread = metrics["ce_ablated"] - metrics["ce_clean"]
    if spread < 0.01:
        assert metrics["ce_recovered"] is None
    else:
        assert metrics["ce_recovered"] == pytest.approx((metrics["ce_ablated"] - metrics["ce_patched"]) / spread)


def test_the_stored_reference_is_the_computed_one(trained: tuple[SmallWorld, QKTranscoder]) -> None:
    world, _ = trained
    layer, reference = load_reference(reference_path(world.cache, LAYER, world.training))
    assert layer.geometry == world.layer.geometry
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), world.layer.buffers(), strict=True))
    assert reference.figures() == world.reference.figures()


def test_a_damaged_reference_is_made_again(tmp_path) -> None:
    world = make_world(tmp_path)
    path = reference_path(world.cache, LAYER, world.training)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match="damaged"):
        load_reference(path)
    ensure_reference(world.cache, LAYER, world.training, lambda: world.model)
    assert path.read_bytes() == content
