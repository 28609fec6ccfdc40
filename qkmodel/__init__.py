"""The science: models, activations, query/key transcoders, their loss, training and evaluation.

Nothing here knows about sweeps: this package never imports orchestrator, ray, optuna, mlflow or hydra.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qkmodel.dictionary import load_dictionary

__all__ = ["load_dictionary"]


def __getattr__(name: str) -> Any:
    # torch is imported when a dictionary is wanted, not when a sweep file is checked
    if name == "load_dictionary":
        from qkmodel.dictionary import load_dictionary

        return load_dictionary
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
