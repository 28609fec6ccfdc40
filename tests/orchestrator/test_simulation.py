"""Replays of the recorded trainings: what a policy may spend, how proposals snap, and that a replay repeats itself."""

import gzip
import json
import sqlite3
from pathlib import Path

import pytest

from orchestrator.ledger import Ledger
from orchestrator.search.space import Range
from orchestrator.simulation.policy import Policy
from orchestrator.simulation.recorded import RecordedSweep, read_recorded_sweep
from orchestrator.simulation.replay import distance, replay
from qkmodel.errors import InputError
from tests.orchestrator.test_cli import orchestrate

RECORD = Path(__file__).parents[2] / "benchmarks" / "search_table.sqlite.gz"


@pytest.fixture(scope="module")
def ledger_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("record") / "ledger.sqlite"
    path.write_bytes(gzip.decompress(RECORD.read_bytes()))
    return path


@pytest.fixture(scope="module")
def sweep(ledger_file: Path) -> RecordedSweep:
    return read_recorded_sweep(Ledger.open_existing(ledger_file))


def test_a_policy_that_trains_everything_ends_at_all_of_it(sweep: RecordedSweep) -> None:
    curve = replay(sweep, Policy(sampler="random", halving=None))
    assert curve[-1].tokens == sweep.tokens and curve[-1].share == pytest.approx(1.0)
    shares = [point.share for point in curve]
    assert shares == sorted(shares)
    # two packs at a time in virtual time: half of what all packs took
    recorded = sum(one.training.seconds for study in sweep.studies for one in study.trainings)
    assert curve[-1].seconds == pytest.approx(recorded / 2, rel=0.1)


def test_no_policy_spends_more_than_it_may_and_halving_spends_it_better(sweep: RecordedSweep) -> None:
    fifth = sweep.tokens // 5
    halved, plain = (replay(sweep, Policy(tokens=fifth, halving=halving)) for halving in ("auto", None))
    assert max(halved[-1].tokens, plain[-1].tokens) <= fifth
    assert halved[-1].share > plain[-1].share


def test_a_replay_repeats_itself(sweep: RecordedSweep) -> None:
    policy = Policy(tokens=sweep.tokens // 10, seed=7)
    assert replay(sweep, policy) == replay(sweep, policy)


def test_proposals_are_as_far_from_a_training_as_their_scales_say() -> None:
    topk = {
        "dictionary_size": Range(low=256, high=1024, log=True),
        "activation": "topk",
        "k": [4, 8],
        "learning_rate": 1e-3,
    }
    point = {"dictionary_size": 256, "activation": "topk", "k": 4, "learning_rate": 1e-3, "seed": 0}
    assert distance([topk], point, point) == 0
    # one of the two doublings between both ends
    assert distance([topk], point, point | {"dictionary_size": 512}) == pytest.approx(0.5)
    assert distance([topk], point, point | {"activation": "batchtopk"}) == float("inf")


def test_a_point_of_a_list_is_as_far_as_its_place_among_the_numbers() -> None:
    lists = {"dictionary_size": 512, "activation": ["relu", "topk"], "k": [16, 4, 8], "learning_rate": 1e-3}
    point = {"dictionary_size": 512, "activation": "topk", "k": 4, "learning_rate": 1e-3, "seed": 0}
    assert distance([lists], point, point | {"k": 8}) == pytest.approx(0.5)
    assert distance([lists], point, point | {"k": 16}) == pytest.approx(1.0)


def test_what_an_edited_file_no_longer_asks_for_is_left_out_and_said(ledger_file: Path, tmp_path: Path) -> None:
    edited = tmp_path / "ledger.sqlite"
    edited.write_bytes(ledger_file.read_bytes())
    with sqlite3.connect(edited) as database:
        config = json.loads(database.execute("SELECT config FROM sweep").fetchone()[0])
        config["search"]["space"][0]["dictionary_size"]["high"] = 512
        database.execute("UPDATE sweep SET config = ?", (json.dumps(config),))
    database.close()
    policy = tmp_path / "policy.yaml"
    policy.write_text("{tokens: 5_000_000}")
    done = orchestrate("simulate", str(edited), "--policy", str(policy), cwd=tmp_path)
    assert done.returncode == 0 and "finished trainings outside the sweep's present search.space" in done.stderr


def test_an_edited_reference_is_called_damage(ledger_file: Path, tmp_path: Path) -> None:
    edited = tmp_path / "ledger.sqlite"
    edited.write_bytes(ledger_file.read_bytes())
    with sqlite3.connect(edited) as database:
        database.execute("""UPDATE studies SET reference = '{"kl_baseline": 2}'""")
    database.close()
    with pytest.raises(InputError, match=r"is damaged \(study \S+: its reference cannot be read\)"):
        read_recorded_sweep(Ledger.open_existing(edited))


def test_a_sampler_that_cannot_search_the_space_is_refused(ledger_file: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("{sampler: gp}")
    refused = orchestrate("simulate", str(ledger_file), "--policy", str(policy), cwd=tmp_path)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert "search.sampler: gp cannot search" in refused.stderr


def test_the_command_prints_the_curve(ledger_file: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("{tokens: 5_000_000, seed: 3}")
    done = orchestrate("simulate", str(ledger_file), "--policy", str(policy), "--json", cwd=tmp_path)
    record = json.loads(done.stdout)
    assert done.returncode == 0 and record["trainings"] == 240 and record["hypervolume_share"]["0.1"][1] > 0.7
    policy.write_text("{halving: {eta: 1}}")
    refused = orchestrate("simulate", str(ledger_file), "--policy", str(policy), cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "") and "halving.eta" in refused.stderr
