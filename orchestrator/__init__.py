"""Sweep orchestration: plans, schedules, records, shows, chooses."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.registry import load_dictionary

__all__ = ["load_dictionary"]

# MLflow would send to its makers how it is used, here as in the processes that are begun; it looks when it is imported
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def __getattr__(name: str) -> Any:
    # torch and mlflow are imported when a dictionary is wanted, not when a sweep file is checked
    if name == "load_dictionary":
        from orchestrator.registry import load_dictionary

        return load_dictionary
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
