"""Sweep orchestration: plans, schedules, records, shows, chooses."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.registry import load_dictionary

__all__ = ["load_dictionary"]


def __getattr__(name: str) -> Any:
    # torch and mlflow are imported when a dictionary is wanted, not when a sweep file is checked
    if name == "load_dictionary":
        from orchestrator.registry import load_dictionary

        return load_dictionary
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
