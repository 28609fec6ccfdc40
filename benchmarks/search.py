"""How many tokens a search needs: replays of 240 recorded trainings under three policies, 20 seeds each.

The record, `search_table.sqlite.gz`, is the ledger that `orchestrate sweep benchmarks/search_table.yaml` left (about
half an hour on two cores), without what replays do not read:

    python benchmarks/search.py --record runs/search_table/ledger.sqlite

writes it anew. About three minutes. Printed: the median share of the whole grid's hypervolume by tokens, and how well
the order at a rung predicts the final one (Spearman). The last line of standard output is JSON:

    {"policies": {"default": {"0.1": [quartiles], …, "tokens_to_95": [quartiles as shares of the grid's]}, …},
     "rank_correlation": {"8 batchtopk": {"10240": …, …}, …}, "tokens": …, "seeds": …}
"""

import argparse
import gzip
import json
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from scipy.stats import spearmanr

from orchestrator.ledger import Ledger
from orchestrator.pareto import within_box
from orchestrator.search.halving import AtRung, ranking
from orchestrator.simulation.curves import BUDGETS, quartiles, share_at, tokens_to
from orchestrator.simulation.policy import Policy
from orchestrator.simulation.recorded import RecordedStudy, RecordedSweep, RecordedTraining, read_recorded_sweep
from orchestrator.simulation.replay import Point, replay

RECORD = Path(__file__).with_name("search_table.sqlite.gz")
SEEDS = 20
RUNGS = (10_240, 20_480, 30_720, 61_440, 92_160)


def policies(tokens: int) -> dict[str, Policy]:
    """All may spend as much as the whole grid took."""
    return {
        "default": Policy(tokens=tokens),
        "tpe": Policy(sampler="tpe", halving=None),
        "random": Policy(sampler="random", halving=None),
    }


@contextmanager
def recorded_sweep() -> Iterator[RecordedSweep]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        path.write_bytes(gzip.decompress(RECORD.read_bytes()))
        yield read_recorded_sweep(Ledger.open_existing(path))


def record(ledger: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        source, copy = sqlite3.connect(ledger), sqlite3.connect(path)
        source.backup(copy)
        copy.execute("DELETE FROM reports WHERE name NOT IN ('kl', 'l0', 'kl_recovered')")
        copy.execute("DELETE FROM metrics WHERE name LIKE 'kl_head%'")
        copy.execute("DELETE FROM deliveries")
        copy.commit()
        copy.execute("VACUUM")
        copy.execute("PRAGMA journal_mode = DELETE")
        copy.close()
        RECORD.write_bytes(gzip.compress(path.read_bytes(), mtime=0))


def run(sweep: RecordedSweep, policy: Policy, seed: int) -> list[Point]:
    return replay(sweep, policy.model_copy(update={"seed": seed}))


def curves(sweep: RecordedSweep, pool: ProcessPoolExecutor) -> dict[str, list[list[Point]]]:
    runs = {
        name: [pool.submit(run, sweep, policy, seed) for seed in range(SEEDS)]
        for name, policy in policies(sweep.tokens).items()
    }
    return {name: [one.result() for one in submitted] for name, submitted in runs.items()}


def figures(sweep: RecordedSweep, found: list[list[Point]]) -> dict[str, tuple[float, float, float]]:
    shares = {f"{budget:g}": quartiles([share_at(one, budget * sweep.tokens) for one in found]) for budget in BUDGETS}
    # a policy that never gets there counts as one that needs more than all tokens
    needed = [(tokens_to(one, 0.95) or 2 * sweep.tokens) / sweep.tokens for one in found]
    return shares | {"tokens_to_95": quartiles(needed)}


def rank_correlation(study: RecordedStudy) -> dict[str, dict[str, float]]:
    """Per family and rung: Spearman's correlation of the places there with those at the end."""
    found: dict[str, dict[str, float]] = {}
    for family in sorted({one.training.family for one in study.trainings}):
        members = [one for one in study.trainings if one.training.family == family]
        order = {tokens: _places(members, tokens) for tokens in (*RUNGS, members[0].training.tokens_done)}
        *rungs, end = order.values()
        found[f"{study.layer} {family}"] = {
            str(tokens): round(float(spearmanr(places, end).statistic), 3)
            for tokens, places in zip(RUNGS, rungs, strict=True)
        }
    return found


def _places(members: Sequence[RecordedTraining], tokens: int) -> list[int]:
    at = [
        AtRung(one.training.training_id, metrics["kl"], metrics["l0"], within_box(one.training, metrics))
        for one in members
        for metrics in [one.at(tokens)]
    ]
    place = {one.training_id: number for number, one in enumerate(ranking(at))}
    return [place[one.training.training_id] for one in members]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--record", type=Path, metavar="LEDGER", help="write the record from this ledger, replay nothing"
    )
    arguments = parser.parse_args()
    if arguments.record is not None:
        record(arguments.record)
        return
    with recorded_sweep() as sweep, ProcessPoolExecutor(2) as pool:
        found = {name: figures(sweep, runs) for name, runs in curves(sweep, pool).items()}
        correlation = {key: value for study in sweep.studies for key, value in rank_correlation(study).items()}
        for name, row in found.items():
            print(f"{name:8}", *(f"{budget}: {values[1]:.3f}" for budget, values in row.items()))
        for key, row in correlation.items():
            print(f"{key:16}", *(f"{tokens}: {value:.2f}" for tokens, value in row.items()))
        print(json.dumps({"policies": found, "rank_correlation": correlation, "tokens": sweep.tokens, "seeds": SEEDS}))


if __name__ == "__main__":
    main()
