"""A report of a small real sweep: figures are the ledger's, patterns the model's, and no text becomes markup."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from orchestrator.ledger import Ledger
from orchestrator.ledger_file import LEDGER_FILE
from orchestrator.report.write import write_report
from qkmodel.dictionary import load_dictionary
from qkmodel.errors import InputError
from tests.orchestrator.report.pages import ParsedPage, unpack
from tests.orchestrator.report.world import LAYER, MARKUP, STUDY, ReportWorld, make_report_world

NAME = f"L{LAYER:02d}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> ReportWorld:
    return make_report_world(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def html(world: ReportWorld) -> str:
    path, left_out = write_report(world.ledger)
    assert (path, left_out) == (world.folder / "report.html", [])
    return path.read_text()


@pytest.fixture(scope="module")
def page(html: str) -> ParsedPage:
    return ParsedPage(html)


def copied(world: ReportWorld, root: Path) -> Ledger:
    """The sweep's storage once more, to be damaged."""
    shutil.copytree(world.folder.parent, root / "runs", ignore=shutil.ignore_patterns("*.html"))
    return Ledger.open_existing(root / "runs" / "small" / LEDGER_FILE)


def test_figures_are_those_of_the_ledger(world: ReportWorld, page: ParsedPage) -> None:
    trainings = {one.training_id: one for one in world.ledger.trainings()}
    front = [trainings[name].metrics for name in ("sparse", "middle", "dense")]
    (line,) = page.data["figures"]["fronts"]["data"]
    assert line["x"] == [metrics["l0"] for metrics in front]
    assert line["y"] == [metrics["kl_recovered"] for metrics in front]
    (curve,) = page.data["figures"]["hypervolume"]["data"]
    assert curve["x"] == [192, 384, 576, 768]
    cap, baseline = math.log2(16.0), math.log2(2.0)
    first = (cap - math.log2(front[0]["l0"])) * (baseline - math.log2(front[0]["kl"]))
    assert curve["y"][0] == pytest.approx(first) and curve["y"][2] == curve["y"][3] > curve["y"][1]
    points = page.data["figures"][f"{NAME} whole pattern"]["data"][0]
    expected = {(one.metrics["l0"], one.metrics["kl_recovered"]) for one in trainings.values()}
    assert set(zip(points["x"], points["y"], strict=True)) == expected


def test_all_trainings_are_lines_through_their_own_values(world: ReportWorld, page: ParsedPage) -> None:
    texts = [text for trace in page.data["figures"]["parallel"]["data"] for text in trace["text"] if text]
    for training in world.ledger.trainings():
        for name in ("top1", "l0_query", "dead_key"):
            assert f"{training.label}: {name} {training.metrics[name]:.4g}" in texts


def test_heads_are_those_of_the_knee(world: ReportWorld, page: ParsedPage) -> None:
    metrics = world.ledger.training("middle").metrics
    heads = [metrics[f"kl_head_{head:02d}"] for head in range(4)]
    titles = [cell["title"] for cell in page.of("td") if "title" in cell]
    assert titles == [f"layer {LAYER}, head {head}: {value}" for head, value in enumerate(heads)]
    assert page.data["patterns"][NAME]["heads"] == heads
    assert f"{world.ledger.training('middle').label}, the knee of the front" in page.text


def test_patterns_are_those_of_the_layer(world: ReportWorld, page: ParsedPage) -> None:
    training = world.ledger.training("middle")
    dictionary = load_dictionary(world.folder / training.dictionary, training.dictionary_sha256)
    sentences = page.data["patterns"][NAME]["sentences"]
    x = world.cache.read(LAYER, "validation", range(len(sentences)))
    with torch.no_grad():
        true = world.layer.pattern(*world.layer.project(x))
        hats = (y.unflatten(-1, (-1, world.layer.geometry.d_head)) for y in dictionary.transcoder(x))
        reconstructed = world.layer.pattern(*hats)
    assert len(sentences) == 3 and not torch.allclose(true, reconstructed, atol=1e-2)
    for number, sentence in enumerate(sentences):
        for name, pattern in (("p", true), ("reconstructed", reconstructed)):
            shown = unpack(sentence[name], heads=4, size=12, scale=page.data["scale"])
            assert abs(shown - pattern[number].double().numpy()).max() < 1.01 / page.data["scale"]


def test_features_are_as_active_as_the_metrics_say(world: ReportWorld, page: ParsedPage) -> None:
    metrics = world.ledger.training("middle").metrics
    for side in ("query", "key"):
        assert f"{metrics[f'dead_{side}'] * 64:.0f} of 64 {side} features" in page.text
    tokens = 9 * 11
    for trace in page.data["figures"][f"{NAME} l0"]["data"]:
        assert sum(trace["y"]) == tokens
        mean = sum(x * y for x, y in zip(trace["x"], trace["y"], strict=True)) / tokens
        assert mean == pytest.approx(metrics[f"l0_{trace['name']}"])
    for trace in page.data["figures"][f"{NAME} density"]["data"]:
        assert sum(trace["y"]) == 64 - round(metrics[f"dead_{trace['name']}"] * 64)


def test_text_that_is_markup_stays_text(page: ParsedPage, html: str) -> None:
    shown = {token for sentence in page.data["patterns"][NAME]["sentences"] for token in sentence["tokens"]}
    assert shown >= set(MARKUP), "the corpus has them all among the first tokens"
    assert len(page.scripts) == 3 and page.of("img") == [] and page.of("b") == []
    raw_data = html.split('id="data">')[1].split("</script>")[0]
    assert "<" not in raw_data and ">" not in raw_data and "&" not in raw_data
    assert "<script>hacked" not in html and "onerror=hacked" in page.text
    options = [text for text in page.texts if text.endswith("…")]
    assert len(options) == 3 and any("</script>" in option for option in options)


def test_the_page_may_ask_for_nothing(page: ParsedPage) -> None:
    (policy,) = (one["content"] for one in page.of("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "http" not in policy
    addresses = [one.get("src") or one.get("href") for tag in ("script", "link", "a") for one in page.of(tag)]
    assert all(address is None or address[0] == "#" or address == "data:," for address in addresses)


def test_every_chart_has_its_figure_and_every_figure_its_chart(page: ParsedPage) -> None:
    charts = [one["data-figure"] for one in page.of("div") if "data-figure" in one]
    assert sorted(charts) == sorted(page.data["figures"])


def test_a_training_that_is_asked_for_stands_for_its_study(world: ReportWorld, tmp_path: Path) -> None:
    path, _ = write_report(world.ledger, tmp_path / "beaten.html", "beaten")
    page, metrics = ParsedPage(path.read_text()), world.ledger.training("beaten").metrics
    assert page.data["patterns"][NAME]["heads"] == [metrics[f"kl_head_{head:02d}"] for head in range(4)]
    assert f"{world.ledger.training('beaten').label}, as asked for" in page.text


def test_what_cannot_be_had_is_refused_and_nothing_written(world: ReportWorld, tmp_path: Path) -> None:
    ledger = copied(world, tmp_path)
    ledger.add_training(STUDY, "waiting", {"dictionary_size": 64, "activation": "topk", "k": 2}, 192)
    for arguments, reason in [
        ((None, "nobody"), "--training: the sweep has no training nobody"),
        ((None, "waiting"), "waiting is open"),
        ((tmp_path / "gone" / "report.html", None), "--output"),
        ((tmp_path, None), "--output"),
    ]:
        with pytest.raises(InputError, match=reason):
            write_report(ledger, *arguments)
    assert not list(tmp_path.rglob("*.html"))


def _delete_dictionary(ledger: Ledger) -> None:
    shutil.rmtree(ledger.folder / ledger.training("middle").dictionary)


def _change_dictionary(ledger: Ledger) -> None:
    config = ledger.folder / ledger.training("middle").dictionary / "config.json"
    config.write_text(config.read_text().replace('"sweep_seed": 0', '"sweep_seed": 1'))


def _delete_cache(ledger: Ledger) -> None:
    shutil.rmtree(ledger.folder.parent / "activations")


def _delete_activations(ledger: Ledger) -> None:
    for shard in (ledger.folder.parent / "activations").glob(f"*/{NAME}/validation-*"):
        shard.unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_delete_dictionary, "config.json: cannot be read"),
        (_change_dictionary, "config.json: hash is"),
        (_delete_cache, "has no activations of it"),
        (_delete_activations, "damaged or missing shard"),
    ],
)
def test_what_is_gone_is_left_out_with_a_line(
    world: ReportWorld, tmp_path: Path, damage: Callable[[Ledger], None], reason: str
) -> None:
    ledger = copied(world, tmp_path)
    damage(ledger)
    path, (line,) = write_report(ledger)
    page = ParsedPage(path.read_text())
    assert line.startswith(f"layer {LAYER}: features and sentences of L01 topk4") and reason in line
    assert " ".join(line.split()) in page.text
    assert page.data["patterns"] == {} and len(page.of("canvas")) == 0
    # what the ledger alone tells is there
    assert {"fronts", "hypervolume", "parallel", f"{NAME} whole pattern"} <= page.data["figures"].keys()
    assert len([cell for cell in page.of("td") if "title" in cell]) == 4


def test_token_ids_stand_for_texts_when_the_tokenizer_is_gone(world: ReportWorld, tmp_path: Path) -> None:
    hidden = world.model_folder.with_name("elsewhere")
    world.model_folder.rename(hidden)
    try:
        path, (line,) = write_report(world.ledger, tmp_path / "ids.html")
    finally:
        hidden.rename(world.model_folder)
    assert line.startswith("token ids are shown in place of texts")
    sentences = ParsedPage(path.read_text()).data["patterns"][NAME]["sentences"]
    ids = world.cache.tokens("validation", range(3)).tolist()
    assert [sentence["tokens"] for sentence in sentences] == [[str(token) for token in row] for row in ids]


def test_a_sweep_without_a_finished_training_has_a_report(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / LEDGER_FILE)
    ledger.open_sweep("young", {}, None, {})
    path, lines = write_report(ledger)
    assert lines == ["the sweep has no study yet"]
    ledger.open_study(STUDY, "transcoder", 3, {}, model="<i>m</i>", corpus="c")
    ledger.add_training(STUDY, "one", {"dictionary_size": 64, "activation": "topk", "k": 2}, 1000)
    path, (line,) = write_report(ledger)
    page = ParsedPage(path.read_text())
    assert line == "layer 3: no training has finished yet; its front and everything after it are left out"
    assert line in page.text and page.data["figures"] == {} and "<i>m</i>" in page.text


def test_trainings_outside_the_box_are_drawn_and_none_is_chosen(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / LEDGER_FILE)
    ledger.open_sweep("collapsed", {}, None, {})
    ledger.open_study(STUDY, "transcoder", 3, {}, model="m", corpus="c")
    ledger.add_training(STUDY, "one", {"dictionary_size": 64, "activation": "topk", "k": 2}, 1000)
    ledger.finish("one", {"kl": 2.5, "l0": 0.25, "kl_recovered": -0.25, "kl_head_00": None}, "d", "aa")
    ledger.set_reference(STUDY, {"kl_baseline": 2.0, "l0_cap": 16.0})
    path, (line,) = write_report(ledger)
    assert line.startswith("layer 3: no finished training is inside the feasible box")
    data = ParsedPage(path.read_text()).data
    assert data["figures"]["fronts"]["data"] == [] and data["figures"]["hypervolume"]["data"][0]["y"] == [0.0]
    # with nothing but an undefined head there is a heat map of one empty cell, and a dictionary that is not there
    path, (line,) = write_report(ledger, training_id="one")
    assert "features and sentences of L03 topk2" in line
