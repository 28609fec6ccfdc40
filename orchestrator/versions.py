"""Which code made a result."""

import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# in the sweep's folder, where the user asked for it
GIT_DIFF_FILE = "git.diff"
RECORDED_PACKAGES = ("torch", "transformer_lens", "transformers", "ray", "optuna", "mlflow", "safetensors", "numpy")


@cache
def package_versions() -> dict[str, str]:
    """Versions of the packages that can move a figure, and of this project."""
    found = {}
    for name in ("qk-sweep-orchestrator", *RECORDED_PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_diff() -> str:
    """What this source tree changes in the commit it stands at, for `git apply`; empty outside a checkout."""
    try:
        # whatever the user's settings make of a diff on a screen
        return _git("diff", "--no-color", "--no-ext-diff", "HEAD") if git_sha() is not None else ""
    except (OSError, subprocess.SubprocessError):
        return ""


@cache
def git_sha() -> str | None:
    """The commit that this source tree stands at, `-dirty` when it was changed since; None outside a checkout."""
    try:
        # an installed copy may lie inside the checkout of something else
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        return _git("rev-parse", "HEAD").strip() + (
            "-dirty" if _git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    answer = subprocess.run(
        ["git", *arguments],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        # a diff may hold anything
        errors="replace",
        check=True,
        timeout=10,
    )
    return answer.stdout
