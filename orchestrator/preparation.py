"""What must be on disk before the first pack: the activation cache and the layers' references."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.late_checks import CheckedPlan
from qkmodel.activation_build import BuildProgress, build_activation_cache
from qkmodel.activations import ActivationCache
from qkmodel.reference import LayerReference, ensure_reference, reference_path


@dataclass(frozen=True)
class Preparation:
    """Paths and figures that packs are ordered with; `references` by layer.

    With `streamed` packs compute their training activations themselves.
    """

    cache: ActivationCache
    streamed: bool
    references: dict[int, LayerReference]
    reference_files: dict[int, Path]


def prepare(checked: CheckedPlan, say: Callable[[str], None], progress: Callable[[BuildProgress], None]) -> Preparation:
    """Makes sure that everything the plan's packs read is on disk.

    Model and corpus are asked for only when something is missing. `say` receives one line per stage, `progress` the
    state of the forward passes. Raises InputError as the stages do: most of it was found by `check_plan`.
    """
    plan, training, request = checked.plan, checked.plan.config.training, checked.request
    if request.streamed_sequences > 0:
        say("activations.max_bytes is less than all activations take: packs compute those they train on as they go")
    activations = build_activation_cache(
        plan.cache_root,
        plan.cache_key,
        layers=plan.config.layers,
        train_sequences=request.activations["train"],
        validation_sequences=request.activations["validation"],
        streamed_sequences=request.streamed_sequences,
        max_bytes=plan.config.activations.max_bytes,
        model_loader=checked.load_model,
        corpus_loader=checked.read_corpus,
        progress=progress,
    )
    references = {}
    for layer in plan.config.layers:
        if not reference_path(activations, layer, training).exists():
            say(f"layer {layer}: measuring its baselines")
        _, references[layer] = ensure_reference(activations, layer, training, checked.load_model)
    files = {layer: reference_path(activations, layer, training) for layer in plan.config.layers}
    return Preparation(activations, request.streamed_sequences > 0, references, files)
