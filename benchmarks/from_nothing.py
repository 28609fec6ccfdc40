"""Times the first sweep from nothing: a fresh clone, `make sweep`, and `make sweep` again.

The clone holds what is committed. Caches (pip's, and that of converted models) start empty, in the same
temporary folder. The last line of standard output is JSON:

    {"first_seconds": …, "second_seconds": …, "fronts": {layer: number of members}}
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SWEEP = "l1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", nargs="?", default=Path(__file__).resolve().parent.parent, type=Path)
    parser.add_argument("--keep", action="store_true", help="leave the temporary folder and say where it is")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="from-nothing-"))
    try:
        result = measure(arguments.repository, folder)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(error.cmd)} ended with exit code {error.returncode}")
    finally:
        if arguments.keep:
            say(f"kept: {folder}")
        else:
            shutil.rmtree(folder)
    print(json.dumps(result))


def measure(repository: Path, folder: Path) -> dict[str, object]:
    """Clone `repository` into the empty `folder`, run its first sweep twice there and count the fronts' members."""
    clone = folder / "clone"
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "VENV": ".venv"}
    run(["git", "clone", "--quiet", str(repository), str(clone)], folder, environment)
    first_seconds = run(["make", "sweep"], clone, environment)
    second_seconds = run(["make", "sweep"], clone, environment)
    command = [".venv/bin/orchestrate", "fronts", SWEEP, "--json"]
    record = json.loads(subprocess.run(command, cwd=clone, check=True, stdout=subprocess.PIPE).stdout)
    members = {front["layer"]: len(front["trainings"]) for front in record["fronts"]}
    return {"first_seconds": round(first_seconds, 1), "second_seconds": round(second_seconds, 1), "fronts": members}


def run(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    """Run a command that has to succeed; seconds it took."""
    say(f"$ {' '.join(command)}    (in {folder})")
    started = time.monotonic()
    subprocess.run(command, cwd=folder, env=environment, check=True)
    seconds = time.monotonic() - started
    say(f"{seconds:.1f} s")
    return seconds


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
