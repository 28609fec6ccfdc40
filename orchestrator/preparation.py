"""What must be on disk before the first pack: the activation cache, the layers' references, and masks' candidates."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.late_checks import CheckedPlan, cache_threads
from orchestrator.pack_order import SourceOrder
from orchestrator.plan import SweepPlan
from orchestrator.source_dictionaries import SourceDictionary
from orchestrator.tables import counted
from qkmodel.activation_build import build_activation_cache
from qkmodel.activations import ActivationCache
from qkmodel.dictionary import Dictionary, load_dictionary, save_dictionary
from qkmodel.errors import InputError
from qkmodel.pair_mask.candidates import candidates_path, find_candidates, read_candidates
from qkmodel.progress import TokenProgress
from qkmodel.reference import LayerReference, ensure_reference, reference_path
from qkmodel.tensor_file import UnknownFormat


@dataclass(frozen=True)
class Preparation:
    """Paths and figures that packs are ordered with; `references` by layer.

    With `streamed` packs compute their training activations themselves. `sources` are the dictionaries whose pairs are
    masked, by name.
    """

    cache: ActivationCache
    streamed: bool
    references: dict[int, LayerReference]
    reference_files: dict[int, Path]
    sources: dict[str, SourceOrder]


def prepare(checked: CheckedPlan, say: Callable[[str], None], progress: Callable[[TokenProgress], None]) -> Preparation:
    """Makes sure that everything the plan's packs read is on disk.

    Model and corpus are asked for only when something is missing. `say` receives one line per stage, `progress` the
    state of what takes minutes. Raises InputError as the stages do: most of it was found by `check_plan`.
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
    sources = {source.name: _source(plan, source, activations, say, progress) for source in plan.sources}
    return Preparation(activations, request.streamed_sequences > 0, references, files, sources)


def _source(
    plan: SweepPlan,
    source: SourceDictionary,
    cache: ActivationCache,
    say: Callable[[str], None],
    progress: Callable[[TokenProgress], None],
) -> SourceOrder:
    """A dictionary and its candidates on disk; what is there from before is kept."""
    masks = plan.config.pair_mask
    dictionary = _open_source(source)
    most = source.candidates(masks.candidates)
    path = candidates_path(cache.folder / "candidates", source.sha256, masks.calibration_sequences, most)
    if not _is_whole(path, source.sha256, masks.calibration_sequences):
        say(f"dictionary {source.name}: looking for the {counted(most, 'pair')} that matter most")
        find_candidates(
            path,
            source.sha256,
            dictionary.transcoder,
            dictionary.attention,
            cache,
            masks.calibration_sequences,
            most,
            cache_threads(plan.config),
            progress,
        )
    return SourceOrder(
        folder=source.folder,
        sha256=source.sha256,
        candidates=path,
        calibration_sequences=masks.calibration_sequences,
    )


def _open_source(source: SourceDictionary) -> Dictionary:
    """The dictionary, whole: a damaged one would fail every training. Raises InputError."""
    try:
        return load_dictionary(source.folder, source.sha256)
    except InputError:
        if source.fetched is None:
            raise
        one = source.fetched
        save_dictionary(source.folder, one.transcoder, one.attention, one.config)
        return load_dictionary(source.folder, source.sha256)


def _is_whole(path: Path, dictionary_sha256: str, calibration_sequences: int) -> bool:
    try:
        read_candidates(path, dictionary_sha256, calibration_sequences)
    except UnknownFormat:
        # another version's, which may be at work with it
        raise
    except (FileNotFoundError, InputError):
        # a damaged one, or another dictionary's, is made again
        return False
    return True
