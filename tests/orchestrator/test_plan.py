"""What a sweep file asks for beyond what its ledger holds, on the bundled model's real description."""

import contextlib
import hashlib
import itertools
import shutil
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import insert, update

from orchestrator.config import load_sweep
from orchestrator.identity import training_id
from orchestrator.ledger import Ledger
from orchestrator.ledger_file import LEDGER_FILE
from orchestrator.ledger_tables import MetricRow, TrainingRow
from orchestrator.pack_size import kinds_of_training, memory_of_pack
from orchestrator.plan import SweepPlan, make_plan
from orchestrator.plan_checks import machine_cpus
from orchestrator.search.space import Range
from qkmodel.activation_request import CacheRequest, missing_work, request_bytes
from qkmodel.errors import InputError
from tests.orchestrator.sweep_files import TOPK_GRID, write_sweep

RANGE = {
    "dictionary_size": 128,
    "activation": "topk",
    "k": 8,
    "learning_rate": {"low": 1e-3, "high": 1e-2, "log": True},
}


def plan_of(file: Path, *overrides: str) -> SweepPlan:
    return make_plan(load_sweep(file, overrides))


def train(plan: SweepPlan, layer: int, states: dict[int, str], **changed: object) -> None:
    """Put trainings of the TopK grid into the plan's ledger: k -> state, each with 128 features unless `changed`."""
    ledger = Ledger(plan.folder / LEDGER_FILE)
    ledger.open_sweep(plan.config.name, {}, None, {})
    (study,) = [study for study in plan.studies if study.layer == layer]
    ledger.open_study(study.study_id, "transcoder", layer, study.identity, model="m", corpus="c")
    for k, state in states.items():
        point = {"dictionary_size": 128, "activation": "topk", "k": k, "learning_rate": 6e-3, "seed": 0} | changed
        identifier = training_id(study.study_id, point)
        ledger.add_training(study.study_id, identifier, point, plan.tokens_per_training)
        match state:
            case "running":
                ledger.start(identifier, "pack-0001", {})
            case "failed":
                ledger.fail(identifier, "its worker died")
            case "finished":
                ledger.report(identifier, plan.tokens_per_training, {}, seconds=1.0)
                dictionary = plan.folder / "dictionaries" / identifier
                sha256 = write_dictionary(dictionary)
                ledger.finish(identifier, {"kl": 0.1, "l0": float(k)}, f"dictionaries/{identifier}", sha256)
    ledger.close()


def write_dictionary(folder: Path) -> str:
    """Files of the right names, and the hash that a plan looks at."""
    folder.mkdir(parents=True)
    for name in ("transcoder.safetensors", "attention.safetensors", "config.json"):
        (folder / name).write_text(folder.name)
    return hashlib.sha256(folder.name.encode()).hexdigest()


def work(plan: SweepPlan) -> list[tuple[int, int, int]]:
    """(finished, unfinished, new) of each study."""
    return [(study.finished, len(study.unfinished), study.new) for study in plan.studies]


def test_counts_of_a_sweep_that_was_never_started(tmp_path: Path) -> None:
    plan = plan_of(write_sweep(tmp_path), "training.batch_sequences=3", "pack=3")
    assert [study.layer for study in plan.studies] == [1, 2]
    assert work(plan) == [(0, 0, 4), (0, 0, 4)]
    assert (plan.trainings_left, plan.packs, plan.pack_size) == (8, 4, 3)
    # 4,096 tokens are 10.7 batches of 3 x 128: eleven whole ones
    assert plan.tokens_per_training == 11 * 3 * 128
    assert plan.train_sequences == 33
    assert (plan.model.n_layers, plan.model.d_model) == (30, 576)
    assert plan.corpus.documents == 12
    assert plan.sequences == {"train": 33, "validation": 16}
    # shards are built whole; per sequence and layer 128 x 576 activations of two bytes, once 128 token ids of four
    request = plan.cache_request(plan.cached)
    missing = missing_work(plan.cached, request)
    assert (missing.sequences, missing.bytes) == (128, 128 * 128 * (2 * 576 * 2 + 4))
    assert request_bytes(plan.cached, request) == missing.bytes


def test_a_cache_over_its_limit_keeps_tokens_validation_and_what_means_need(tmp_path: Path) -> None:
    # 504 sequences in eight shards, and one of validation; 128 x 576 activations of two bytes, 128 tokens of four
    tokens, layer = 128 * 4, 128 * 576 * 2
    whole = (512 + 64) * (2 * layer + tokens)
    for limit, stored in ((whole, 504), (whole - 1, 256)):
        plan = plan_of(write_sweep(tmp_path), f"training.tokens={504 * 128}", f"activations.max_bytes={limit}")
        request = plan.cache_request(plan.cached)
        assert request.tokens == {"train": 504, "validation": 16}
        assert request.activations == {"train": stored, "validation": 16}
        assert request.streamed_sequences == 504 - stored
    assert request_bytes(plan.cached, request) == (512 + 64) * tokens + (256 + 64) * 2 * layer


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        (["pack=1"], 1),
        (["pack=3"], 3),
        # no pack is larger than a layer's search
        (["pack=7"], 4),
        # one CPU per pack: as many packs as CPUs, if there are trainings enough
        ([], min(4, -(-8 // machine_cpus()))),
        # one pack at a time takes all trainings of a layer
        ([f"resources.pack.cpu={machine_cpus()}"], 4),
        ([f"resources.pack.cpu={machine_cpus()}", "search.space.seed=[0,1,2,3]", "search.trainings=16"], 8),
    ],
)
def test_pack_size(tmp_path: Path, overrides: list[str], size: int) -> None:
    assert plan_of(write_sweep(tmp_path), *overrides).pack_size == size


def test_packs_shrink_to_what_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_sweep(tmp_path)
    overrides = [f"resources.pack.cpu={machine_cpus()}", "search.space.dictionary_size=[512,131072]"]
    monkeypatch.setattr("orchestrator.pack_size.device_memory", lambda config: 10**12)
    roomy = plan_of(file, *overrides, "search.space.seed=[0,1,2,3]", "search.trainings=16")
    assert roomy.pack_size == 8
    # 131,072 features of 576 + 576 and 576 + 192 numbers, three floats and a sixth each
    weights = 131_072 * (2 * 576 + 576 + 192 + 2)
    assert 8 * 14 * weights < roomy.pack_bytes < 8 * 14 * weights * 1.5
    monkeypatch.setattr("orchestrator.pack_size.device_memory", lambda config: 5 * 14 * weights)
    tight = plan_of(file, *overrides, "search.space.seed=[0,1,2,3]", "search.trainings=16")
    assert 1 < tight.pack_size < 4 and tight.pack_bytes < 0.7 * 5 * 14 * weights
    monkeypatch.setattr("orchestrator.pack_size.device_memory", lambda config: 2 * 14 * weights)
    assert plan_of(file, *overrides).pack_size == 1
    monkeypatch.setattr("orchestrator.pack_size.device_memory", lambda config: 14 * weights)
    with pytest.raises(InputError, match=r"search\.space\.dictionary_size: a pack of 1 takes about .* GB of memory"):
        plan_of(file, *overrides)
    with pytest.raises(InputError, match=r"pack: a pack of 3 takes about .* fewer trainings in a pack"):
        plan_of(file, *overrides, "pack=3")


def test_a_context_too_long_for_memory_is_what_the_refusal_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.pack_size.device_memory", lambda config: 24 * 10**9)
    with pytest.raises(InputError, match=r"corpus\.context: a pack of 1 takes about .* ask for shorter sequences"):
        plan_of(write_sweep(tmp_path), "corpus.context=8192", "training.tokens=600_000", "pack=1")


def test_a_pack_that_runs_the_model_takes_its_weights_and_what_a_pass_takes(tmp_path: Path) -> None:
    file, context = write_sweep(tmp_path), 1024
    fixed = [f"corpus.context={context}", f"training.tokens={504 * context}", "pack=1"]
    trained, streamed, patched = (
        plan_of(file, *fixed, *more).pack_bytes
        for more in (
            ["training.cross_entropy_sequences=0"],
            ["training.cross_entropy_sequences=0", "activations.max_bytes=1GB"],
            ["training.cross_entropy_sequences=8"],
        )
    )
    # SmolLM2's 134.5 M weights, 9 heads and residual stream of 576; batches of 8 sequences, of which the model runs one
    weights, scores = 4 * 134.5e6, 4 * 9 * context**2
    assert streamed - trained > weights + 4 * scores + 4 * 8 * context * 576
    # cross-entropies come when batches are gone, and take less than these
    assert weights <= patched - trained < 1.2 * weights


def test_a_pack_fits_the_smallest_gpu_whatever_others_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories = [80 * 10**9, 3 * 10**9, 80 * 10**9]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda one: SimpleNamespace(total_memory=memories[one]))
    for module in ("plan", "plan_checks"):
        monkeypatch.setattr(f"orchestrator.{module}.machine_cpus", lambda: 16)
    file = write_sweep(tmp_path)
    large = ["resources.pack.gpu=1", "search.space.dictionary_size=[512,131072]"]
    with pytest.raises(
        InputError, match=r"search\.space\.dictionary_size: a pack of 1 takes .*, and there are 3\.0 GB"
    ):
        plan_of(file, *large)
    memories[:] = [800 * 10**9] * 3
    more = ["search.space.seed=[0,1,2,3]", "search.trainings=32"]
    alone = plan_of(file, *large, *more)
    assert (alone.slots, alone.pack_size) == (3, 8)
    memories[2] = round(alone.pack_bytes / 0.7) + 1
    assert plan_of(file, *large, *more).pack_size == 8
    # six packs at once, of which two share a GPU
    shared = plan_of(file, *large, *more, "resources.pack.gpu=0.5")
    assert shared.slots == 6
    half = 0.7 * memories[2] / 2
    assert shared.pack_bytes <= half < memory_of_pack(shared.config, shared.model, shared.pack_size + 1, False)


def test_kinds_of_training_are_all_that_cost_differently() -> None:
    space = {"dictionary_size": [512, 4096, 1024], "k": Range(low=8, high=256), "activation": ["topk", "batchtopk"]}
    kinds = kinds_of_training([space | {"key_dictionary_size": 300, "learning_rate": [1e-3, 1e-2], "seed": [0, 1]}])
    assert {(one.activation, one.dictionary_size, one.k) for one in kinds} == set(
        itertools.product(("topk", "batchtopk"), (512, 4096), (8, 256))
    )
    assert {(one.key_dictionary_size, one.learning_rate, one.seed) for one in kinds} == {(300, 1e-3, 0)}


@pytest.mark.parametrize("key", ["pack", "activations"])
def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setattr("orchestrator.plan_checks.machine_gpus", lambda: 0)
    with pytest.raises(InputError, match=rf"resources\.{key}\.gpu: 1 is more than this machine has; at most 0"):
        plan_of(write_sweep(tmp_path), f"resources.{key}.gpu=1")


def test_packs_that_share_a_gpu_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("plan", "plan_checks"):
        monkeypatch.setattr(f"orchestrator.{module}.machine_gpus", lambda: 2)
        monkeypatch.setattr(f"orchestrator.{module}.machine_cpus", lambda: 16)
    monkeypatch.setattr("orchestrator.pack_size.device_memory", lambda config: 10**12)
    file = write_sweep(tmp_path)
    assert [plan_of(file, f"resources.pack.gpu={share}").slots for share in (1, 0.5, 0.3, 0)] == [2, 4, 6, 16]
    assert plan_of(file, "resources.pack={cpu: 8, gpu: 0.25}").slots == 2


def test_a_share_of_a_cpu_loses_no_slot_to_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.plan.machine_cpus", lambda: 0.3)
    assert plan_of(write_sweep(tmp_path), "resources.pack.cpu=0.1").slots == 3


def test_a_search_that_learns_gets_smaller_packs(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, search={"sampler": "tpe", "trainings": 40, "space": RANGE})
    plan = plan_of(file, f"resources.pack.cpu={machine_cpus()}")
    assert (plan.sampler, plan.pack_size, plan.trainings_left) == ("tpe", 4, 80)


@pytest.mark.parametrize("cut_off", ["", "PRAGMA journal_mode = WAL; CREATE TABLE sweep (sweep INTEGER PRIMARY KEY)"])
def test_a_kill_while_the_ledger_was_created_does_not_block_the_sweep(tmp_path: Path, cut_off: str) -> None:
    file = write_sweep(tmp_path)
    ledger_file = plan_of(file).folder / LEDGER_FILE
    ledger_file.parent.mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(ledger_file)) as connection:
        connection.executescript(cut_off)
    ledger_file.touch()
    assert work(plan_of(file)) == [(0, 0, 4), (0, 0, 4)]


def test_every_state_counts_once_and_only_in_its_own_study(tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    train(plan_of(file), 2, {8: "finished", 16: "running"})
    train(plan_of(file), 2, {8: "failed", 16: "open"}, dictionary_size=256)
    plan = plan_of(file)
    assert work(plan) == [(0, 0, 4), (1, 3, 0)]
    assert plan.trainings_left == 7
    assert {training.state for training in plan.studies[1].unfinished} == {"running", "failed", "open"}


@pytest.mark.parametrize("loss", ["gone", "config.json", "transcoder.safetensors", "changed"])
def test_a_finished_training_without_its_dictionary_is_to_be_trained_again(tmp_path: Path, loss: str) -> None:
    file = write_sweep(tmp_path)
    train(plan_of(file), 1, {8: "finished", 16: "finished"})
    assert plan_of(file).lost_line is None
    folder = sorted((plan_of(file).folder / "dictionaries").iterdir())[0]
    if loss == "gone":
        shutil.rmtree(folder)
    elif loss == "changed":
        (folder / "config.json").write_text("another")
    else:
        (folder / loss).unlink()
    plan = plan_of(file)
    assert work(plan)[0] == (1, 1, 2)
    assert plan.studies[0].lost.keys() == {folder.name}
    assert plan.lost_line.startswith(f"1 finished training is trained again: {folder}/")
    assert plan.studies[0].tokens_planned == 4 * plan.tokens_per_training


def test_an_edited_grid_trains_only_what_is_missing(tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    train(plan_of(file), 1, {8: "finished", 16: "finished"})
    assert work(plan_of(file))[0] == (2, 0, 2)
    larger = plan_of(file, "search.space.k=[8,16,32]", "search.trainings=6")
    assert work(larger)[0] == (2, 0, 4)
    assert larger.studies[0].tokens_planned == 6 * larger.tokens_per_training
    # what is finished or open outside the grid is neither counted nor continued
    train(plan_of(file), 1, {16: "open"}, dictionary_size=256)
    smaller = plan_of(file, "search.space.k=8")
    assert work(smaller)[0] == (1, 0, 1)
    disjoint = plan_of(file, "search.space.learning_rate=1e-3")
    assert work(disjoint)[0] == (0, 0, 4)


def test_points_inside_a_range_but_off_its_grid_do_not_count(tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    train(plan_of(file), 1, {8: "finished", 12: "finished", 14: "failed"})
    plan = plan_of(file, "search.space.dictionary_size=128", "search.space.k={low:8,high:16,points:2}")
    assert work(plan)[0] == (1, 0, 1)


def test_a_sampled_search_counts_against_its_budget_whatever_lies_in_its_space(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, search={"sampler": "random", "trainings": 5, "space": RANGE})
    train(plan_of(file), 1, {8: "finished"}, learning_rate=2e-3)
    train(plan_of(file), 1, {8: "failed"}, learning_rate=3e-3)
    # outside the space
    train(plan_of(file), 1, {8: "finished"}, learning_rate=0.5)
    assert work(plan_of(file))[0] == (1, 1, 3)
    assert work(plan_of(file, "search.trainings=1"))[0] == (1, 1, 0)


def test_a_space_with_fewer_points_than_the_budget_is_all_there_is_to_train(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, search={"sampler": "random", "trainings": 50, "space": TOPK_GRID})
    assert work(plan_of(file)) == [(0, 0, 4), (0, 0, 4)]
    train(plan_of(file), 1, {8: "finished", 16: "finished"})
    assert work(plan_of(file))[0] == (2, 0, 2)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("layers=[1,30]", ["layers", "30", "smollm2-135m", "0 to 29"]),
        ("corpus.context=8193", ["corpus.context", "8193", "smollm2-135m", "at most 8192"]),
        ("resources.pack.cpu=4096", ["resources.pack.cpu", "4096", f"at most {machine_cpus()}"]),
        ("resources.activations.cpu=4096", ["resources.activations.cpu", "4096", f"at most {machine_cpus()}"]),
        ("storage=/proc/foo", ["storage: /proc", "cannot be written to"]),
        ("storage=/tmp/what?", ["storage: /tmp/what?", "MLflow can keep no database", "rename it"]),
        ("storage=/tmp/a%20b", ["storage: /tmp/a%20b", "MLflow can keep no database", "rename it"]),
        ("tracking=mysql://me:hunter2@host/runs", ["tracking: mysql://me:***@host/runs", "not installed", "MySQLdb"]),
        ("tracking=mysql+nothing://host/runs", ["tracking: mysql+nothing://host/runs", "not installed"]),
        ("model.revision=abc", ["model.revision: abc", "smollm2-135m has none"]),
        ("corpus={name:sotu,subset:foo}", ["corpus.subset: foo", "sotu is local"]),
        ("corpus={name:sotu,split:test}", ["corpus.split: test", "sotu is local"]),
        ("corpus={name:sotu,text_field:foo}", ["corpus.text_field: foo", "plain text"]),
        ("training.cross_entropy_sequences=17", ["training.cross_entropy_sequences: 17", "16"]),
        ("search.sampler=gp", ["search.sampler: gp", "ranges"]),
        ("model=smolm2-135m", ["model.name", "smolm2-135m", "did you mean smollm2-135m?"]),
        ("model=./nowhere", ["model.name", "./nowhere", "no such folder"]),
        ("corpus.name=nowhere/text.txt", ["corpus.name", "nowhere/text.txt", "no such file"]),
        ("corpus=sotuu", ["corpus.name", "sotuu", "did you mean sotu?"]),
        ("corpus=owner/data", ["corpus.name", "owner/data", "cannot be reached"]),
        ("corpus.name=.", ["corpus.name", "no .txt, .jsonl, .parquet file"]),
    ],
)
def test_what_cannot_be_had_is_refused_with_key_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, expected: list[str]
) -> None:
    file = write_sweep(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError) as caught:
        plan_of(file, "training.tokens=100_000", override)
    message = str(caught.value)
    assert message.isprintable()
    assert [part for part in expected if part not in message] == [], message
    assert not (tmp_path / "runs").exists()


def test_planning_creates_and_changes_nothing(tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    train(plan_of(file), 1, {8: "finished", 16: "running"})

    def tree() -> dict[str, bytes | None]:
        return {str(path): path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}

    before = tree()
    plan = plan_of(file)
    assert plan.cached.shards == {}
    assert plan.trainings_left == 7
    assert tree() == before


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "overrides",
    [
        ["training.tokens=1_000_000_000_000", "corpus.context=3", "training.validation_sequences=1_000_000"],
        ["search.sampler=random", "search.space.seed={low:0,high:1_000_000_000_000}"],
    ],
)
def test_huge_numbers_are_reckoned_with_not_listed(tmp_path: Path, overrides: list[str]) -> None:
    plan = plan_of(write_sweep(tmp_path), *overrides)
    assert plan.trainings_left == 8
    train, validation = plan.sequences_in_shards
    assert 0 <= train - plan.train_sequences < 64 and 0 <= validation - plan.validation_sequences < 64
    # the first asks for 5,208,348,959 shards
    request = CacheRequest(plan.config.layers, plan.sequences, plan.sequences)
    assert missing_work(plan.cached, request).sequences == train + validation


# -- starting anew, stopped trainings, shared budgets, earlier sweeps


def test_fresh_asks_for_everything_in_studies_of_their_own(tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    plan = plan_of(file)
    assert make_plan(load_sweep(file), fresh=True).attempt == 0
    train(plan, 1, {8: "finished", 16: "finished"})
    fresh = make_plan(load_sweep(file), fresh=True)
    assert (fresh.attempt, work(fresh)[0]) == (1, (0, 0, 4))
    assert not {study.study_id for study in fresh.studies} & {study.study_id for study in plan.studies}
    # the attempt that a start recorded is the one that later starts go on with
    ledger = Ledger(plan.folder / LEDGER_FILE)
    ledger.open_sweep(plan.config.name, {}, None, {}, fresh.attempt)
    ledger.close()
    assert [study.study_id for study in plan_of(file).studies] == [study.study_id for study in fresh.studies]


def test_stopped_trainings_are_done_unless_halving_is_given_up(tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    halved = plan_of(file, "halving={eta: 3}")
    train(halved, 1, {8: "finished", 16: "open"})
    ledger = Ledger(halved.folder / LEDGER_FILE)
    with ledger.transaction() as session:
        session.execute(update(TrainingRow).where(TrainingRow.state == "open").values(state="stopped"))
    ledger.close()
    again = plan_of(file, "halving={eta: 3}")
    assert (work(again)[0], again.studies[0].stopped) == ((1, 0, 2), 1)
    assert work(plan_of(file, "halving=null"))[0] == (1, 1, 2)


def test_layers_that_share_a_budget_have_it_once(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, search={"sampler": "random", "trainings": 4, "space": RANGE})
    shared = "search.layer_allocation=by_progress"
    assert work(plan_of(file, shared)) == [(0, 0, 4), (0, 0, 4)]
    train(plan_of(file, shared), 1, {8: "finished"})
    assert work(plan_of(file, shared)) == [(1, 0, 4), (0, 0, 3)]


def test_the_front_of_an_earlier_sweep_is_tried_first_and_a_missing_one_refused(tmp_path: Path) -> None:
    search = {"sampler": "random", "trainings": 4, "space": RANGE}
    file = write_sweep(tmp_path, search=search)
    with pytest.raises(InputError, match="nowhere: no sweep is there"):
        plan_of(file, "search.warm_start=nowhere")
    assert not plan_of(file).folder.exists()
    earlier = plan_of(file, "name=earlier")
    train(earlier, 1, {8: "finished"})
    ledger = Ledger(earlier.folder / LEDGER_FILE)
    with ledger.transaction() as session:
        session.execute(
            insert(MetricRow).values(training_id=ledger.trainings()[0].training_id, name="kl_recovered", value=0.9)
        )
    ledger.close()
    later = plan_of(file, "search.warm_start=earlier")
    assert [[one["k"] for one in study.first] for study in later.studies] == [[8], [8]]
