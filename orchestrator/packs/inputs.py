"""What every pack is made from, and what the trainable asks of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from orchestrator.pack_order import PackOrder
from qkmodel.activation_stream import StreamedActivations
from qkmodel.activations import ActivationCache
from qkmodel.attention import AttentionLayer
from qkmodel.pack import PackTrainer
from qkmodel.pair_mask.pack import MaskPackTrainer
from qkmodel.reference import LayerReference

if TYPE_CHECKING:
    from qkmodel.language_model import LanguageModel

# Validation sequences behind the progress figures; the final figures use all of them.
BRIEF_SEQUENCES = 8
Metrics = dict[str, float | None]


@dataclass(frozen=True)
class PackInputs:
    """An order, and what it names: `cache` for evaluation, `training_data` for batches; `load_model` where needed."""

    order: PackOrder
    cache: ActivationCache
    training_data: ActivationCache | StreamedActivations
    layer: AttentionLayer
    reference: LayerReference
    load_model: "Callable[[], LanguageModel]"

    @property
    def threads(self) -> int:
        """Those that training may use."""
        return self.order.threads if self.order.device == "cpu" else 1


class Pack(Protocol):
    """The trainings of a pack, which are the members of `trainer`."""

    @property
    def trainer(self) -> PackTrainer | MaskPackTrainer: ...

    def evaluate(self) -> list[Metrics]:
        """Every member's metrics: all of them at the end, on the way a few on a few sequences."""

    def save(self, index: int, training_id: str, metrics: Metrics, folder: Path) -> str:
        """Writes the dictionary of a member that `evaluate` was just called for; its SHA-256."""
