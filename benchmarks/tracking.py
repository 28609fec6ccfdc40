"""What MLflow costs: 1,000 trainings with 20 step metrics each, booked in the ledger and delivered to each store.

Trainings are made up; ledger, tracker, SQLite, PostgreSQL and `mlflow server` are real. A training waits for its
booking only, so the second figure is what a sweep pays whatever becomes of MLflow. PostgreSQL where it is installed.
The last line of standard output is JSON:

    {"trainings": …, "booked_ms": per training,
     "stores": {store: {"delivered_ms": per training, "again_ms": a second delivery, "ratio": delivered to booked}}}
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.ledger import Ledger
from orchestrator.tracking import Tracker
from tests.system.services import MlflowServer, PostgresServer

REPORTS, METRICS = 4, 5
IDENTITY = {"corpus": {"context": 128}, "training": {"tokens": 1000}, "seed": 0}


def book(ledger: Ledger, trainings: int) -> float:
    """Books all trainings from proposal to result; seconds."""
    ledger.open_sweep("tracking", {}, None, {})
    ledger.open_study("study", "transcoder", 8, IDENTITY, model="m", corpus="c")
    ledger.set_reference("study", {"kl_baseline": 2.0, "l0_cap": 4096.0})
    began = time.perf_counter()
    for number in range(trainings):
        name = f"{number:016x}"
        point = {"dictionary_size": 512, "activation": "topk", "k": 1 + number, "learning_rate": 3e-3, "seed": 0}
        ledger.add_training("study", name, point, 1000)
        ledger.start(name, "pack-0001", {})
        for report in range(1, 1 + REPORTS):
            metrics = {f"metric_{index}": number + index / 10 for index in range(METRICS)}
            ledger.report(name, 100 * report, metrics, seconds=float(report))
        # one in fifty is on the front
        kl = 0.5 / (1 + number) if number % 50 == 0 else 1.0 - 1e-4 * number
        metrics = {"kl": kl, "l0": float(1 + number), "kl_recovered": 1 - kl / 2}
        folder = ledger.folder / "dictionaries" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(name)
        ledger.finish(name, metrics, f"dictionaries/{name}", "aa" * 32)
    return time.perf_counter() - began


@contextmanager
def stores(folder: Path) -> Iterator[dict[str, str | None]]:
    """Addresses by name."""
    found: dict[str, str | None] = {"SQLite file": None}
    (folder / "server").mkdir()
    server = MlflowServer(folder / "server")
    found["server on SQLite"] = server.url
    postgres = PostgresServer() if PostgresServer.is_installed() else None
    try:
        if postgres is not None:
            found["PostgreSQL"] = postgres.url
        yield found
    finally:
        server.kill()
        if postgres is not None:
            postgres.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainings", type=int, default=1000)
    trainings = parser.parse_args().trainings
    figures: dict[str, dict[str, float]] = {}
    booked = []
    with tempfile.TemporaryDirectory() as temporary, stores(Path(temporary)) as addresses:
        for index, (name, address) in enumerate(addresses.items()):
            storage = Path(temporary) / f"runs-{index}"
            ledger = Ledger(storage / "tracking" / "ledger.sqlite")
            booked.append(book(ledger, trainings))
            seconds = []
            for _ in range(2):
                began = time.perf_counter()
                Tracker(address, storage, ledger).deliver("FINISHED")
                seconds.append(time.perf_counter() - began)
            first, again = (1000 * one / trainings for one in seconds)
            figures[name] = {"delivered_ms": first, "again_ms": again, "ratio": seconds[0] / booked[-1]}
            print(f"{name}: delivered in {first:.1f} ms per training, again in {again:.2f} ms", flush=True)
    booked_ms = 1000 * sum(booked) / len(booked) / trainings
    print(f"booked in {booked_ms:.1f} ms per training")
    print(json.dumps({"trainings": trainings, "booked_ms": booked_ms, "stores": figures}))


if __name__ == "__main__":
    main()
