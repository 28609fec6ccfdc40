"""The dictionaries whose pairs a sweep of pair masks chooses from."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from orchestrator.config import SweepConfig
from orchestrator.ledger import Ledger
from orchestrator.ledger_place import named_places, shown_storage
from orchestrator.pareto import front_trainings
from orchestrator.plan_figures import storage_folder
from orchestrator.storage.address import is_bucket
from orchestrator.trained_dictionary import dictionary_folder
from qkmodel.dictionary import (
    CONFIG_FILE,
    Dictionary,
    DictionaryConfig,
    dictionary_sha256,
    find_damage,
    find_loss,
    load_dictionary,
    read_dictionary_config,
)
from qkmodel.errors import InputError
from qkmodel.files import user_path
from qkmodel.model_description import ModelDescription

_KEY = "pair_mask.dictionaries"
# beside the activation caches, since sweeps share them
SOURCES_FOLDER = "dictionaries"


@dataclass(frozen=True)
class SourceDictionary:
    """One of them: where it lies, or will once what was `fetched` from a registry is written there."""

    folder: Path
    sha256: str
    config: DictionaryConfig
    fetched: Dictionary | None = None

    @property
    def name(self) -> str:
        """As hyperparameters have it."""
        return self.sha256[:16]

    @property
    def layer(self) -> int:
        return self.config.geometry.layer

    @property
    def all_pairs(self) -> int:
        sides = self.config.hyperparameters.query_side, self.config.hyperparameters.key_side
        return self.config.geometry.n_heads * sides[0].dictionary_size * sides[1].dictionary_size

    def candidates(self, share: float) -> int:
        """How many pairs masks choose from."""
        return max(1, int(share * self.all_pairs))


def source_dictionaries(
    config: SweepConfig, model: ModelDescription, cache_root: Path
) -> dict[int, tuple[SourceDictionary, ...]]:
    """The dictionaries of each layer that the sweep file asks for, each once; none where its task is another.

    Raises InputError for a reference that names nothing, for a dictionary that is damaged, of another model or layer or
    masked already, and for a layer that has none.
    """
    if config.pair_mask is None:
        return {layer: () for layer in config.layers}
    found: dict[int, dict[str, SourceDictionary]] = {layer: {} for layer in config.layers}
    for reference in config.pair_mask.dictionaries:
        for source in _named(config, reference, cache_root):
            _check(reference, source, config, model)
            found[source.layer][source.name] = source
    for layer, sources in found.items():
        if not sources:
            raise InputError(
                f"{_KEY}: {', '.join(config.pair_mask.dictionaries)}: no dictionary of layer {layer} (of a sweep, "
                "those on its fronts count); name one, or write layers as the dictionaries are of"
            )
    return {layer: tuple(sources.values()) for layer, sources in found.items()}


def _named(config: SweepConfig, reference: str, cache_root: Path) -> Iterator[SourceDictionary]:
    if reference.startswith("models:"):
        yield _registered(config, reference, cache_root)
        return
    if not is_bucket(reference):
        folder = user_path(_KEY, reference).absolute()
        if (folder / CONFIG_FILE).is_file():
            yield _in_folder(folder, reference)
            return
    for place in named_places(_KEY, reference, config):
        ledger = Ledger.open_if_there(place)
        if ledger is not None:
            try:
                yield from _fronts(ledger, reference, config.layers)
            finally:
                ledger.close()
            return
    raise InputError(
        f"{_KEY}: {reference}: is neither a dictionary's folder nor a sweep; give the folder of one, the name of a "
        f"sweep in {shown_storage(config)}, or models:/NAME@ALIAS"
    )


def _in_folder(folder: Path, reference: str) -> SourceDictionary:
    try:
        config, sha256 = read_dictionary_config(folder)
        # nobody recorded this hash, so whether the tensors are those that the configuration speaks of is seen here or
        # after the sweep was begun
        load_dictionary(folder, sha256)
    except InputError as error:
        raise InputError(f"{_KEY}: {error}; name another than {reference}, or one that is whole") from error
    return SourceDictionary(folder, sha256, config)


def _registered(config: SweepConfig, reference: str, cache_root: Path) -> SourceDictionary:
    # takes seconds to import
    from orchestrator.tracking_store import tracking_address

    dictionary = _fetch(reference, tracking_address(config.tracking, storage_folder(config))[0])
    sha256 = dictionary_sha256(dictionary.config)
    return SourceDictionary(cache_root / SOURCES_FOLDER / sha256, sha256, dictionary.config, dictionary)


@cache
def _fetch(reference: str, address: str) -> Dictionary:
    from orchestrator.registry import load_dictionary as load_registered

    return load_registered(reference, address)


def _fronts(ledger: Ledger, reference: str, layers: tuple[int, ...]) -> Iterator[SourceDictionary]:
    studies = ledger.studies()
    if studies and all(study.task != "transcoder" for study in studies):
        raise InputError(f"{_KEY}: {reference}: is a sweep of pair masks; name that of the dictionaries")
    for study in studies:
        if not study.is_current or study.layer not in layers or study.task != "transcoder":
            continue
        for training in front_trainings(ledger.trainings(study.study_id)):
            folder = dictionary_folder(ledger, training)
            loss = find_loss(folder, training.dictionary_sha256)
            if loss is not None:
                raise InputError(f"{_KEY}: {reference}: {loss}; start that sweep again, which trains it anew")
            damage = find_damage(folder, training.dictionary_sha256)
            if damage is not None:
                raise InputError(
                    f"{_KEY}: {reference}: {damage}; delete that folder and start that sweep again, which trains it "
                    "anew"
                )
            yield SourceDictionary(
                folder, training.dictionary_sha256, read_dictionary_config(folder, training.dictionary_sha256)[0]
            )


def _check(reference: str, source: SourceDictionary, config: SweepConfig, model: ModelDescription) -> None:
    if source.config.pair_mask is not None:
        raise InputError(f"{_KEY}: {reference}: its pairs are masked already; name the dictionary that it comes from")
    if source.config.model.weights_sha256 != model.weights_sha256:
        raise InputError(
            f"{_KEY}: {reference}: is of model {source.config.model.config.name} with other weights than "
            f"{config.model.name}; write model as that dictionary's sweep did"
        )
    if source.layer not in config.layers:
        raise InputError(f"{_KEY}: {reference}: is of layer {source.layer}, which is not among layers; add it there")
