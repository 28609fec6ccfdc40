"""What MLflow costs: 1,000 trainings with 20 step metrics each; how fast its pages open; the time that trainings lose.

1. Trainings that are made up are booked in a ledger and delivered to an SQLite file, a server on SQLite and, where it
   is installed, PostgreSQL. A training waits for its booking only.
2. The page of the parent run and the comparison of 50 trainings are opened in Chromium, where it is installed, as
   `mlflow server` shows them from the SQLite file and from PostgreSQL.
3. The same small sweep of SmolLM2 runs in turn with a healthy server, with one that takes two seconds to answer 500,
   and with none at the address. Ratios are to the last, which is as good as no tracking: a connection is refused at
   once.

The last line of standard output is JSON:

    {"trainings": …, "booked_ms": per training,
     "stores": {store: {"delivered_ms": per training, "again_ms": a second delivery, "ratio": delivered to booked,
                        "parent_s": …, "compare_50_s": …}},
     "sweeps": {server: {"training_s": [of each sweep, all trainings], "span_s": [first start to last end],
                         "ratio": of the medians of training_s, "span_ratio": …}}}
"""

import argparse
import asyncio
import hashlib
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from orchestrator.ledger import Ledger
from orchestrator.tracking import Tracker
from orchestrator.tracking_store import tracking_address
from qkmodel.dictionary import CONFIG_FILE, FILES
from tests.system.browser import CHROMIUM, browser_page
from tests.system.services import MlflowServer, PostgresServer, free_port
from tests.system.test_kills import Sweep

REPORTS, METRICS = 4, 5
IDENTITY = {"corpus": {"context": 128}, "training": {"tokens": 1000}, "seed": 0}
COMPARED = 50

SWEEP_TOKENS = 131_072
SEARCH = {
    "sampler": "grid",
    "trainings": 2,
    "space": {"dictionary_size": [512, 1024], "activation": "topk", "k": 16, "learning_rate": 6e-3},
}
NO_SERVER = "no server"


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
        ledger.finish(name, metrics, f"dictionaries/{name}", write_dictionary(ledger.folder / "dictionaries" / name))
    return time.perf_counter() - began


def write_dictionary(folder: Path) -> str:
    """Files that are as large as nothing and have the hashes of a dictionary; that which the ledger keeps."""
    folder.mkdir(parents=True)
    content = folder.name.encode()
    tensors = [name for name in FILES if name != CONFIG_FILE]
    for name in tensors:
        (folder / name).write_bytes(content)
    config = json.dumps({"files": dict.fromkeys(tensors, hashlib.sha256(content).hexdigest())}).encode()
    (folder / CONFIG_FILE).write_bytes(config)
    return hashlib.sha256(config).hexdigest()


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


def opening(address: str, folder: Path) -> dict[str, float]:
    """Seconds until a person can read the parent run's page, and that which compares 50 trainings."""
    client = MlflowClient(address)
    experiment = client.get_experiment_by_name("tracking").experiment_id
    (parent,) = client.search_runs([experiment], "tags.`qk.sweep` LIKE '%'")
    children = client.search_runs([experiment], "tags.state = 'finished'", max_results=COMPARED)
    runs = json.dumps([run.info.run_id for run in children])
    pages = {
        "parent_s": (f"experiments/{experiment}/runs/{parent.info.run_id}", ["hypervolume_L08", "on the front"]),
        f"compare_{COMPARED}_s": (
            f'compare-runs?runs={runs}&experiments=["{experiment}"]',
            [f"Comparing {COMPARED} Runs", "Run details", children[-1].info.run_name],
        ),
    }
    folder.mkdir()
    with MlflowServer(folder, store=address) as server:
        return {
            name: asyncio.run(_seconds_to_open(f"{server.url}/#/{page}", texts, folder / name))
            for name, (page, texts) in pages.items()
        }


async def _seconds_to_open(address: str, texts: list[str], profile: Path) -> float:
    """From an empty tab of a new browser that has seen the server's start page: scripts come from its cache."""
    async with browser_page(profile) as page:
        await page.resize(1440)
        await page.visit(address.partition("#")[0])
        await page.wait_for_text("Experiments")
        # from one page of the app to another it would load nothing
        await page.call("Page.navigate", url="about:blank")
        await page.wait_for("location.href == 'about:blank'")
        began = time.perf_counter()
        await page.call("Page.navigate", url=address)
        await page.wait_for_text(*texts)
        return time.perf_counter() - began


def deliveries(folder: Path, trainings: int) -> tuple[float, dict[str, dict[str, float]]]:
    """Milliseconds that booking a training takes, and the figures of each store."""
    figures: dict[str, dict[str, float]] = {}
    booked = []
    with stores(folder) as addresses:
        for index, (name, address) in enumerate(addresses.items()):
            storage = folder / f"runs-{index}"
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
            database, _ = tracking_address(address, storage)
            if CHROMIUM.is_file() and not database.startswith("http"):
                figures[name] |= opening(database, folder / f"pages-{index}")
                print(f"{name}: {figures[name]}", flush=True)
    return 1000 * sum(booked) / len(booked) / trainings, figures


class _Failing(BaseHTTPRequestHandler):
    """Two seconds, then 500, whatever was asked."""

    def _answer(self) -> None:
        time.sleep(2)
        self.send_error(500)

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _answer

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


@contextmanager
def failing_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Failing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def delays(folder: Path, repeats: int) -> dict[str, dict[str, Any]]:
    """Figures of the same sweep by what is at its tracking address."""
    (folder / "healthy").mkdir()
    with MlflowServer(folder / "healthy") as healthy, failing_server() as failing:
        nobody = f"http://127.0.0.1:{free_port()}"
        addresses = {"healthy server": healthy.url, "answers 500 after 2 s": failing, NO_SERVER: nobody}
        # the first fills the activation cache
        _times(folder, "first", nobody)
        figures: dict[str, dict[str, Any]] = {name: {"training_s": [], "span_s": []} for name in addresses}
        for repeat in range(repeats):
            for number, (name, address) in enumerate(addresses.items()):
                training, span = _times(folder, f"{number}-{repeat}", address)
                figures[name]["training_s"].append(training)
                figures[name]["span_s"].append(span)
                print(f"{name}: {training:.1f} s of training in {span:.1f} s", flush=True)
    for one in figures.values():
        for item, ratio in (("training_s", "ratio"), ("span_s", "span_ratio")):
            one[ratio] = statistics.median(one[item]) / statistics.median(figures[NO_SERVER][item])
    return figures


def _times(folder: Path, name: str, address: str) -> tuple[float, float]:
    """(Seconds in all trainings, seconds from the first start to the last end) of one sweep."""
    storage = folder / "runs"
    settings = {"name": name, "storage": str(storage), "search": SEARCH, "resources": {"pack": {"cpu": 1}}}
    Sweep.create(folder / name, SWEEP_TOKENS, tracking=address, **settings).run()
    trainings = Ledger.open_existing(storage / name / "ledger.sqlite").trainings()
    span = max(one.finished for one in trainings) - min(one.started for one in trainings)
    return sum(one.seconds for one in trainings), span.total_seconds()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainings", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3, help="sweeps with each kind of server")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        booked_ms, figures = deliveries(folder, arguments.trainings)
        print(f"booked in {booked_ms:.1f} ms per training")
        (folder / "sweeps").mkdir()
        sweeps = delays(folder / "sweeps", arguments.repeats)
    print(json.dumps({"trainings": arguments.trainings, "booked_ms": booked_ms, "stores": figures, "sweeps": sweeps}))


if __name__ == "__main__":
    main()
