import io
import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from orchestrator.figures import all_fronts_png, front_html, front_png
from orchestrator.ledger import Ledger, Training

RED = (0xD6 / 255, 0x27 / 255, 0x28 / 255)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for layer in (4, 8):
        ledger.open_study(f"study{layer}", "transcoder", layer, {}, model="m", corpus="c")
    return ledger


def finish(
    ledger: Ledger,
    training_id: str,
    l0: float,
    kl: float | None,
    size: int = 512,
    layer: int = 8,
    **others: object,
) -> None:
    """kl_baseline = 2; without the first column everything is twice as far off."""
    hyperparameters = {
        "dictionary_size": size,
        "activation": "topk",
        "k": 16,
        "learning_rate": 3e-3,
        "seed": 0,
    }
    ledger.add_training(f"study{layer}", training_id, hyperparameters | others, 1000)
    metrics = {"l0": l0, "kl": kl, "kl_no_bos": None if kl is None else 2 * kl}
    metrics["kl_recovered"] = None if kl is None else 1 - kl / 2
    metrics["kl_recovered_no_bos"] = None if kl is None else 1 - kl
    ledger.finish(training_id, metrics, "d", "aa")


@pytest.fixture
def trainings(ledger: Ledger) -> list[Training]:
    finish(ledger, "sparse", 8.0, 0.4)
    finish(ledger, "dominated", 20.0, 0.5, size=1024)
    finish(ledger, "dense", 32.0, 0.1, size=1024)
    finish(ledger, "relu", 40.0, 0.2, activation="relu", penalty="l1", k=None, sparsity_coefficient=1e-3)
    finish(ledger, "collapsed", 0.0, 3.0)
    finish(ledger, "undefined", 8.0, None)
    ledger.add_training("study8", "open", {"dictionary_size": 4096, "activation": "topk", "k": 4}, 1000)
    return ledger.trainings("study8")


def offsets(figure: Figure, panel: int, red: bool = False) -> set[tuple[float, float]]:
    """Where the points of a panel are; with `red`, the rings."""
    found = set()
    for collection in figure.axes[panel].collections:
        edge = tuple(collection.get_edgecolor()[0][:3])
        if (edge == pytest.approx(RED)) is red:
            found |= {tuple(map(float, point)) for point in collection.get_offsets()}
    return found


def test_every_finished_training_is_drawn_and_the_front_ringed(trainings: list[Training]) -> None:
    figure = front_png(trainings, "l1, layer 8")
    bottom = figure.axes[0].get_ylim()[0]
    left = figure.axes[0].get_xlim()[0]
    assert offsets(figure, 0) == {(8.0, 0.8), (20.0, 0.75), (32.0, 0.95), (40.0, 0.9), (left, bottom)}
    assert offsets(figure, 1) == {(8.0, 0.6), (20.0, 0.5), (32.0, 0.9), (40.0, 0.8), (left, bottom)}
    assert offsets(figure, 0, red=True) == {(8.0, 0.8), (32.0, 0.95)}
    assert offsets(figure, 1, red=True) == {(8.0, 0.6), (32.0, 0.9)}


def test_the_line_steps_along_the_front(trainings: list[Training]) -> None:
    (line,) = front_png(trainings, "l1").axes[0].lines
    assert line.get_drawstyle() == "steps-post"
    assert line.get_xydata().tolist() == [[8.0, 0.8], [32.0, 0.95]]


def test_each_panel_has_the_line_of_its_own_measure(ledger: Ledger) -> None:
    """A sink can rank two dictionaries otherwise than the rest of the pattern does."""
    finish(ledger, "sparse", 8.0, 0.4)
    finish(ledger, "sink", 32.0, 0.1)
    (sparse, sink) = ledger.trainings("study8")
    sink.metrics.update(kl_no_bos=0.9, kl_recovered_no_bos=0.5)
    left, right = front_png([sparse, sink], "l1").axes[:2]
    assert left.lines[0].get_xydata().tolist() == [[8.0, 0.8], [32.0, 0.95]]
    assert right.lines[0].get_xydata().tolist() == [[8.0, 0.6]]


def test_what_is_not_feasible_is_explained_only_where_it_is(ledger: Ledger, trainings: list[Training]) -> None:
    def legend(shown: list[Training]) -> str:
        return " ".join(text.get_text() for text in front_png(shown, "l1").legends[0].get_texts())

    assert "not feasible: KL recovered < 0.5, l0 < 1 or > 0.25 × size" in legend(trainings)
    assert {"topk", "relu-l1"} <= set(legend(trainings).split())
    assert "not feasible" not in legend([t for t in trainings if t.training_id == "sparse"])


@pytest.mark.parametrize("which", [[], ["open"], ["collapsed"], ["undefined"], ["sparse"], ["sparse", "dense"]])
def test_any_subset_can_be_saved(trainings: list[Training], which: list[str]) -> None:
    shown = [training for training in trainings if training.training_id in which]
    picture = io.BytesIO()
    front_png(shown, "l1").savefig(picture, format="png")
    picture.seek(0)
    assert imread(picture).shape[:2] == (540, 1200)
    json.loads(front_html(shown, "l1").to_json())


def test_studies_below_each_other_share_their_axes(ledger: Ledger, trainings: list[Training]) -> None:
    finish(ledger, "wide", 100.0, 0.8, layer=4)
    figure = all_fronts_png({"layer 4": ledger.trainings("study4"), "layer 8": trainings}, "l1")
    panels = figure.axes[:4]
    assert [axes.get_title().split(":")[0] for axes in panels] == ["layer 4", "layer 4", "layer 8", "layer 8"]
    assert len({(axes.get_xlim(), axes.get_ylim()) for axes in panels}) == 1
    assert offsets(figure, 0) == {(100.0, 0.6)}
    assert panels[0].get_ylim()[0] < 0.2, "the lowest point of any panel is inside"


def test_mixed_studies_are_refused(ledger: Ledger, trainings: list[Training]) -> None:
    finish(ledger, "wide", 100.0, 0.8, layer=4)
    for draw in (front_png, front_html):
        with pytest.raises(ValueError, match="one study"):
            draw(ledger.trainings(), "mixed")
    with pytest.raises(ValueError, match="no studies"):
        all_fronts_png({}, "none")


def test_hovering_shows_id_and_hyperparameters_and_nothing_is_markup(ledger: Ledger) -> None:
    finish(ledger, "sparse", 8.0, 0.4, activation="<b>bold</b>")
    figure = front_html(ledger.trainings("study8"), "<script>alert(1)</script>")
    text = figure.data[0].text[0]
    assert {"sparse", "dictionary_size: 512", "k: 16", "kl: 0.4", "l0: 8"} <= set(text.split("<br>"))
    assert "<b>" not in text
    assert "<script>" not in figure.layout.title.text


def test_the_interactive_figure_shows_the_same_points(trainings: list[Training]) -> None:
    figure = front_html(trainings, "l1")
    markers = [trace for trace in figure.data if trace.mode == "markers" and trace.xaxis == "x"]
    feasible = {point for trace in markers[:-1] for point in zip(trace.x, trace.y, strict=True)}
    assert feasible == {(8.0, 0.8), (20.0, 0.75), (32.0, 0.95), (40.0, 0.9)}
