"""What must be on disk before the first pack: the activation cache, the layers' references, and masks' candidates."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.late_checks import CheckedPlan, cache_threads
from orchestrator.pack_order import SourceOrder
from orchestrator.plan import SweepPlan
from orchestrator.plan_figures import storage_folder
from orchestrator.source_dictionaries import SOURCES_FOLDER, SourceDictionary
from orchestrator.storage.bucket import working_copies
from orchestrator.storage.shared import Storage
from orchestrator.tables import counted
from qkmodel.activation_build import build_activation_cache
from qkmodel.activations import ActivationCache
from qkmodel.dictionary import CONFIG_FILE, Dictionary, find_damage, load_dictionary, save_dictionary
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
    stored = plan.stored_cache
    stored.fetch(request)
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
        recorded=stored.send_now_and_then,
    )
    stored.send()
    references, files = {}, {}
    for layer in plan.config.layers:
        files[layer] = reference_path(activations, layer, training)
        if not plan.storage.fetch(files[layer]):
            say(f"layer {layer}: measuring its baselines")
        _, references[layer] = ensure_reference(activations, layer, training, checked.load_model)
        plan.storage.send_changed(files[layer])
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
    source = _in_storage(plan, source)
    dictionary = _open_source(source, plan.storage)
    most = source.candidates(masks.candidates)
    path = candidates_path(cache.folder / "candidates", source.sha256, masks.calibration_sequences, most)
    plan.storage.fetch(path)
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
        plan.storage.send(path)
    return SourceOrder(
        folder=source.folder,
        sha256=source.sha256,
        candidates=path,
        calibration_sequences=masks.calibration_sequences,
    )


def _in_storage(plan: SweepPlan, source: SourceDictionary) -> SourceDictionary:
    """The dictionary where packs find it, on whatever node: a copy, where it lies in another bucket or in a folder."""
    if source.folder.is_relative_to(storage_folder(plan.config)):
        return source
    if plan.storage.url is None and not source.folder.is_relative_to(working_copies()):
        # in a folder that is shared, as the storage is
        return source
    folder = plan.cache_root / SOURCES_FOLDER / source.sha256
    if find_damage(folder, source.sha256) is not None:
        shutil.copytree(source.folder, folder, dirs_exist_ok=True)
    plan.storage.send(folder, last=CONFIG_FILE)
    return replace(source, folder=folder)


def _open_source(source: SourceDictionary, storage: Storage) -> Dictionary:
    """The dictionary, whole: a damaged one would fail every training. Raises InputError."""
    storage.fetch(source.folder)
    try:
        return load_dictionary(source.folder, source.sha256)
    except InputError:
        if source.fetched is None:
            raise
        one = source.fetched
        save_dictionary(source.folder, one.transcoder, one.attention, one.config)
        storage.send(source.folder, last=CONFIG_FILE)
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
