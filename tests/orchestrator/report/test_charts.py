"""Charts and tables made from figures that are known: histograms, parallel coordinates, the heat map."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.ledger import Ledger, Training
from orchestrator.report.charts import density_chart, fronts_chart, hypervolume_chart, l0_chart
from orchestrator.report.dictionary_facts import DictionaryFacts
from orchestrator.report.heat_map import heat_map
from orchestrator.report.parallel_coordinates import MOST_LINES, parallel_coordinates
from orchestrator.report.sweep_facts import StudyFacts, gather_sweep
from qkmodel.feature_activity import FeatureActivity


@pytest.fixture
def studies(tmp_path: Path) -> list[StudyFacts]:
    """Layers 2 and 5 with two and three heads; the second has a failed training between its finished ones."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.open_sweep("s", {}, None, {})
    for layer, heads in ((2, 2), (5, 3)):
        study = f"study{layer}"
        ledger.open_study(study, "transcoder", layer, {}, model="m", corpus="c")
        ledger.set_reference(study, {"kl_baseline": 2.0, "l0_cap": 128.0})
        for number, (l0, kl) in enumerate([(8.0, 0.5), (32.0, 0.125)]):
            if layer == 5 and number == 1:
                add(ledger, study, "lost", rate=1.0)
                ledger.fail("lost", "diverged")
            identifier = f"{layer}-{number}"
            add(ledger, study, identifier, rate=10.0**-number)
            metrics = {f"kl_head_{head:02d}": (head + 1) * kl for head in range(heads)}
            ledger.finish(identifier, metrics | {"l0": l0, "kl": kl, "kl_recovered": 1 - kl / 2}, "d", "aa")
    return gather_sweep(ledger, None).studies


def add(ledger: Ledger, study: str, identifier: str, rate: float) -> None:
    hyperparameters = {"dictionary_size": 512, "activation": "topk", "k": 16, "learning_rate": rate, "seed": 0}
    ledger.add_training(study, identifier, hyperparameters, 1000)
    ledger.report(identifier, 1000, {}, seconds=1.0)


def test_studies_differ_by_more_than_colour(studies: list[StudyFacts]) -> None:
    for figure in (fronts_chart(studies), hypervolume_chart(studies)):
        assert [trace.name for trace in figure.data] == ["layer 2", "layer 5"]
        for look in ("marker.symbol", "line.dash", "line.color"):
            assert len({trace[look] for trace in figure.data}) == 2


def test_hypervolume_counts_the_tokens_of_what_failed_too(studies: list[StudyFacts]) -> None:
    first, second = hypervolume_chart(studies).data
    assert (first.x, second.x) == ((1000, 2000), (1000, 3000))
    # (log2 128 − log2 8)·(log2 2 − log2 0.5) = 8, and the strip from 32 on down to 0.125 adds 2·2
    assert first.y == second.y == (8.0, 12.0)


def test_a_layer_with_fewer_heads_leaves_cells_empty(studies: list[StudyFacts]) -> None:
    rows = heat_map(studies)
    assert [row.title for row in rows] == ["layer 2", "layer 5"]
    assert [[cell.value for cell in row.cells] for row in rows] == [[0.125, 0.25, None], [0.125, 0.25, 0.375]]
    least, largest = rows[1].cells[0], rows[1].cells[2]
    # the ends of viridis, with letters that can be read on them
    assert (least.background, least.ink) == ("#440154", "#ffffff")
    assert (largest.background, largest.ink) == ("#fde725", "#000000")


def test_parallel_coordinates_lie_in_the_order_of_the_values(studies: list[StudyFacts]) -> None:
    figure, omitted = parallel_coordinates(studies)
    assert omitted is None
    names = list(figure.layout.xaxis.ticktext)
    assert names == ["layer", "learning_rate (log)", "kl_recovered"], "what does not differ has no axis"
    places = {text: y for trace in figure.data for text, y in zip(trace.text, trace.y, strict=True) if text}
    label = "topk16 d512 lr1 s0"
    assert places[f"L02 {label}: layer 2"] == 0 and places[f"L05 {label}: layer 5"] == 1
    assert places[f"L02 {label}: learning_rate 1"] == 1
    assert places[f"L02 {label}: kl_recovered 0.75"] == 0
    # four trainings of three points and a gap each
    assert sum(len(trace.x) for trace in figure.data) == 4 * (3 + 1)


def test_too_many_lines_leave_out_those_that_recover_least(studies: list[StudyFacts]) -> None:
    (one, *_), status = studies[0].finished, studies[0].status
    many: list[Training] = [
        replace(one, training_id=str(number), metrics={"kl_recovered": number / 1000}) for number in range(700)
    ]
    many[3].metrics["kl_recovered"] = None
    crowded = replace(studies[0], status=replace(status, trainings=many))
    figure, omitted = parallel_coordinates([crowded])
    assert omitted == f"parallel coordinates show the {MOST_LINES} of 700 trainings that recover most KL"
    shown = sorted(float(text.split()[-1]) for trace in figure.data for text in trace.text if text)
    assert shown == pytest.approx([number / 1000 for number in range(200, 700)])


@pytest.fixture
def facts() -> DictionaryFacts:
    generator = torch.Generator().manual_seed(0)
    f = {name: torch.rand(300, size, generator=generator) < 0.1 for name, size in (("query", 90), ("key", 30))}
    f["key"][:, :7] = False
    activity = {name: FeatureActivity(one.sum(1), one.sum(0)) for name, one in f.items()}
    return DictionaryFacts(1, activity, [])


def test_bins_of_active_features_hold_every_token_once(facts: DictionaryFacts) -> None:
    for trace in l0_chart(facts).data:
        active = facts.activity[trace.name].active.tolist()
        counted = {int(text): count for text, count in zip(trace.text, trace.y, strict=True)}
        assert counted == {number: active.count(number) for number in counted} and sum(counted.values()) == 300


def test_wide_bins_are_named_by_their_ends() -> None:
    active = torch.tensor([0, 99, 100, 5, 5])
    facts = DictionaryFacts(1, {"query": FeatureActivity(active, torch.ones(1))}, [])
    (trace,) = l0_chart(facts).data
    counted = {text: count for text, count in zip(trace.text, trace.y, strict=True) if count}
    assert counted == {"0 to 2": 1, "3 to 5": 2, "99 to 101": 2}


def test_density_counts_living_features(facts: DictionaryFacts) -> None:
    for trace in density_chart(facts).data:
        fired = facts.activity[trace.name].fired
        assert sum(trace.y) == int((fired > 0).sum()) < len(fired) + (trace.name == "query")
        for middle, count in zip(trace.x, trace.y, strict=True):
            share = fired.double() / 300
            inside = (share >= 10 ** (middle - 0.1) * (1 - 1e-9)) & (share < 10 ** (middle + 0.1) * (1 - 1e-9))
            assert count == int(inside.sum())
