"""Two hosts against one: the same 16 trainings on a Ray cluster whose workers have one CPU of this machine each.

    python -m benchmarks.hosts                as root, on two CPUs, about half an hour

Hosts are network namespaces with addresses of their own; the head, which drives, is one more and has no CPU to itself.
Seconds from the first training's start to the last one's end, by the ledger. The last line is the figures, as JSON:

    {"one": seconds, "two": seconds, "ratio": two by one, "same": whether every dictionary has the same hash}
"""

import argparse
import json
import tempfile
from pathlib import Path

from orchestrator.ledger import Ledger
from orchestrator.ledger_file import LEDGER_FILE
from tests.system.desk import Desk
from tests.system.hosts import RayHosts

GRID = ("search.space.dictionary_size=[512,1024]", "search.space.k=[8,16]")
RATES = "search.space.learning_rate=[2e-3,4e-3,6e-3,8e-3]"


def seconds(folder: Path, workers: int, tokens: int) -> tuple[float, dict[str, str | None]]:
    """How long the trainings took with so many hosts, and what they became."""
    cluster = RayHosts(workers, pinned=True)
    try:
        folder.mkdir()
        desk = Desk(folder, cluster.settings, {})
        sizes = ("training.batch_sequences=8", f"training.tokens={tokens}", f"training.report_tokens={tokens // 8}")
        job = desk.submit("name=hosts", "pack=4", "search.trainings=16", *sizes, *GRID, RATES)
        state = desk.wait(job, "finished", "failed", "lost", "interrupted", patience=3600, every=60)
        if state != "finished":
            raise SystemExit(desk.ask("logs", job)[0])
        trainings = Ledger.open_existing(folder / "store" / "hosts" / LEDGER_FILE).trainings()
        span = max(one.finished for one in trainings) - min(one.started for one in trainings)
        return span.total_seconds(), desk.hashes("hosts")
    finally:
        cluster.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=262_144, help="of each training")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        one, dictionaries = seconds(Path(temporary) / "one", 1, arguments.tokens)
        print(f"one host: {one:.0f} s", flush=True)
        two, again = seconds(Path(temporary) / "two", 2, arguments.tokens)
    print(json.dumps({"one": one, "two": two, "ratio": two / one, "same": dictionaries == again}))


if __name__ == "__main__":
    main()
