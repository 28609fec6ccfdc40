"""A sweep in figures: what counts, after its file was edited."""

import sqlite3
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.ledger import Ledger
from orchestrator.pareto import front_trainings, hypervolume
from orchestrator.status import HypervolumesInTime, status_record
from qkmodel.errors import InputError

POINT = {"dictionary_size": 512, "activation": "topk", "k": 16, "learning_rate": 3e-3, "seed": 0}


def test_studies_that_the_file_no_longer_asks_for_are_shown_and_not_counted(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.open_sweep("s", {}, None, {})
    for study, layer in [("former", 4), ("present", 8)]:
        ledger.open_study(study, "transcoder", layer, {}, model="m", corpus="c")
        ledger.add_training(study, f"{study} one", POINT, 1000)
        ledger.report(f"{study} one", 250, {"loss": 1.0}, seconds=1.0)
    ledger.set_current({"former": 1000})
    # the next start asks for two trainings, one of which nobody has proposed yet
    ledger.set_current({"present": 2000})
    record = status_record(ledger)
    assert (record["tokens_done"], record["tokens_planned"]) == (250, 2000)
    assert record["trainings"] == {"open": 1, "running": 0, "finished": 0, "stopped": 0, "failed": 0}
    figures = [(one["current"], one["tokens_done"], one["tokens_planned"]) for one in record["studies"]]
    assert figures == [(False, 250, 250), (True, 250, 2000)]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.1, 0.2, 0.5, 1.0, None]),
            st.sampled_from([2.0, 8.0, 16.0, 500.0]),
            st.sampled_from([0.2, 0.9]),
        ),
        max_size=8,
    ),
    st.integers(0, 8),
)
def test_hypervolumes_are_those_of_all_that_had_finished(
    results: list[tuple[float | None, float, float]], before: int
) -> None:
    with TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.sqlite")
        ledger.open_study("study", "transcoder", 8, {}, model="m", corpus="c")
        ledger.set_reference("study", {"l0_cap": 128.0, "kl_baseline": 2.0})
        for number, (kl, l0, recovered) in enumerate(results):
            if number == before:
                grown = HypervolumesInTime(ledger.studies()[0], ledger.trainings("study"))
            ledger.add_training("study", str(number), POINT, 1000)
            ledger.finish(str(number), {"kl": kl, "l0": l0, "kl_recovered": recovered}, "where", "hash")
            if number >= before:
                grown.add(ledger.training(str(number)))
        if before >= len(results):
            grown = HypervolumesInTime(ledger.studies()[0], ledger.trainings("study"))
        finished = ledger.trainings("study")
        fronts = [front_trainings(finished[: count + 1]) for count in range(len(finished))]
        points = [[(one.metrics["l0"], one.metrics["kl"]) for one in front] for front in fronts]
        assert grown.values == [hypervolume(one, (128.0, 2.0)) for one in points]
        ledger.close()


@pytest.mark.parametrize(
    "reference",
    ["{}", "[]", "null", "3", '{"kl_baseline": 2.0}', '{"kl_baseline": "2", "l0_cap": 128}', '{"l0_cap": null}'],
)
def test_a_reference_that_nobody_wrote_is_called_damage(tmp_path: Path, reference: str) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.open_sweep("s", {}, None, {})
    ledger.open_study("study", "transcoder", 8, {}, model="m", corpus="c")
    ledger.add_training("study", "one", POINT, 1000)
    ledger.finish("one", {"kl": 0.1, "l0": 8.0, "kl_recovered": 0.9}, "where", "hash")
    with sqlite3.connect(ledger.where) as database:
        database.execute("UPDATE studies SET reference = ?", [reference])
    database.close()
    with pytest.raises(
        InputError, match=r"is damaged \(study study: its reference .*put a copy of it there"
    ) as refused:
        status_record(ledger)
    assert "\n" not in str(refused.value)
