"""From a sweep file to studies, trainings, packs, tokens and bytes: what will be done, before anything is."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from orchestrator.config import SweepConfig
from orchestrator.identity import study_id, study_identity
from orchestrator.ledger import Ledger
from orchestrator.ledger_place import place_of
from orchestrator.opening_token import AUTO, measurement_file, opening_token
from orchestrator.pack_order import DICTIONARIES_FOLDER
from orchestrator.pack_size import automatic_pack_size, check_memory, memory_of_masks, memory_of_pack
from orchestrator.plan_checks import (
    check_cluster,
    check_model,
    check_resources,
    check_tracking,
    machine_cpus,
    machine_gpus,
)
from orchestrator.plan_figures import (
    halving_of,
    packs_at_once,
    steps_per_training,
    storage_folder,
    sweep_folder,
    tokens_per_training,
)
from orchestrator.search.halving import Halving
from orchestrator.source_dictionaries import SourceDictionary, source_dictionaries
from orchestrator.storage.bucket import Bucket
from orchestrator.storage.opened import open_storage
from orchestrator.storage.shared import Storage
from orchestrator.storage_check import CACHE_FOLDER, check_storage
from orchestrator.stored_cache import StoredCache
from orchestrator.study_changes import change_lines
from orchestrator.study_plan import StudyPlan, make_study_plan, share_budget
from qkmodel.activation_request import CacheRequest, missing_work, request_bytes
from qkmodel.activations import SPLITS, TOKENS, CacheKey, Manifest, Split, in_whole_shards, read_manifest
from qkmodel.data_order import sequences_per_epoch
from qkmodel.documents import CorpusDescription, describe_corpus, require_corpus
from qkmodel.errors import InputError
from qkmodel.model_description import ModelDescription, describe_model
from qkmodel.products import forward_products
from qkmodel.reference import MEAN_SEQUENCES


@dataclass(frozen=True)
class SweepPlan:
    """Everything that is known about a sweep without loading its model.

    `bos` is the token that opens sequences, None for none, "auto" until it has been measured. `attempt` counts how
    often everything was begun afresh, and `fresh` says that this plan does so. `tokens_spent` by all trainings so far.
    `change_lines` say why studies are new. `cluster_packs` is how many packs the cluster at `RAY_ADDRESS` holds at
    once, None where there is none or it was not asked. Unless it is trained `here`, nothing was asked of this machine.
    """

    config: SweepConfig
    model: ModelDescription
    corpus: CorpusDescription
    bos: str | None
    studies: tuple[StudyPlan, ...]
    attempt: int
    fresh: bool
    tokens_spent: int
    change_lines: list[str]
    cluster_packs: int | None = None
    here: bool = True

    @property
    def folder(self) -> Path:
        return sweep_folder(self.config)

    @property
    def storage(self) -> Storage:
        """Where that folder is."""
        return open_storage(self.config.storage)

    @property
    def stored_cache(self) -> StoredCache:
        """The activation cache in the storage."""
        return StoredCache(self.cache_root / self.cache_key.folder_name, self.storage)

    @property
    def cache_root(self) -> Path:
        return storage_folder(self.config) / CACHE_FOLDER

    @property
    def sampler(self) -> str:
        """By name; that of the first layer, should they differ in how many dictionaries there are."""
        return self.studies[0].sampler

    @cached_property
    def halving(self) -> Halving | None:
        """Where trainings may be stopped early; None where all are trained to their end."""
        return halving_of(self.config)

    @property
    def share_trained(self) -> float:
        """The share of the planned tokens that is left to train on.

        As halving stops as many as it promises, and as `search.tokens` suffice.
        """
        halved = self.halving.share_trained(steps_per_training(self.config)) if self.halving is not None else 1.0
        planned = self.tokens_per_training * self.trainings_left
        if self.config.search.tokens is None or planned == 0:
            return halved
        return min(halved, max(0, self.config.search.tokens - self.tokens_spent) / planned)

    @property
    def trainings_left(self) -> int:
        return sum(study.to_train for study in self.studies) + self.second_chances

    @property
    def second_chances(self) -> int:
        """Stopped trainings that the rest of a budget of tokens suffices for."""
        wanted, each = self.config.search.tokens, self.tokens_per_training
        if wanted is None:
            return 0
        left = wanted - self.tokens_spent - each * sum(study.to_train for study in self.studies)
        return max(0, min(left // each, sum(study.stopped for study in self.studies)))

    @property
    def diverged(self) -> int:
        return sum(study.diverged for study in self.studies)

    @property
    def lost_line(self) -> str | None:
        """What is said of finished trainings whose dictionaries are gone."""
        losses = [loss for study in self.studies for loss in study.lost.values()]
        if not losses:
            return None
        if len(losses) == 1:
            return f"1 finished training is trained again: {losses[0]}"
        return f"{len(losses)} finished trainings are trained again: {losses[0]}, and {len(losses) - 1} more like it"

    @property
    def tokens_per_training(self) -> int:
        return tokens_per_training(self.config)

    @property
    def slots(self) -> int:
        """Packs that this machine, or the cluster, runs at once."""
        if self.cluster_packs is not None:
            return max(1, self.cluster_packs)
        return max(1, packs_at_once(machine_cpus(), machine_gpus(), self.config.resources.pack))

    @property
    def device(self) -> str:
        """Where packs train."""
        return "cuda" if self.config.resources.pack.gpu > 0 else "cpu"

    @cached_property
    def streamed(self) -> bool:
        """Whether packs compute their training activations, by what is known of the corpus without reading it."""
        return self.cache_request(self.cached).streamed_sequences > 0

    @cached_property
    def pack_size(self) -> int:
        """Trainings per pack: what the file says, or what suits this machine."""
        if self.config.pack != "auto":
            search, layers = self.config.search, len(self.config.layers)
            most = search.trainings * (layers if search.layer_allocation == "by_progress" else 1)
            return min(self.config.pack, most)
        if self.config.task == "pair_mask":
            # what masks share on a batch is little beside what each costs
            return 1
        per_layer = max((study.to_train for study in self.studies), default=1)
        adaptive = self.sampler not in ("grid", "random")
        return automatic_pack_size(
            self.config, self.model, self.trainings_left, per_layer, self.slots, adaptive, self.streamed
        )

    @property
    def pack_bytes(self) -> int:
        """Memory that a pack takes, by a model of its shapes."""
        if self.config.task == "pair_mask":
            return memory_of_masks(self.config, self.model, self.sources, self.pack_size, self.streamed)
        return memory_of_pack(self.config, self.model, self.pack_size, self.streamed)

    @property
    def sources(self) -> list[SourceDictionary]:
        """The dictionaries whose pairs are masked, of all layers."""
        return [source for study in self.studies for source in study.sources]

    @property
    def packs(self) -> int:
        return sum(math.ceil(study.to_train / self.pack_size) for study in self.studies)

    @cached_property
    def train_sequences(self) -> int:
        """Training sequences of one epoch, if the corpus has as many."""
        return sequences_per_epoch(self.config.training, self.config.corpus.context, None)

    @property
    def validation_sequences(self) -> int:
        return self.config.training.validation_sequences

    @property
    def bos_file(self) -> Path:
        """Where the measurement of the opening token is kept."""
        return measurement_file(self.cache_root, self.config, self.model, self.corpus)

    @property
    def cache_key(self) -> CacheKey:
        config = self.config
        return CacheKey(
            weights_sha256=self.model.weights_sha256,
            tokenizer_sha256=self.model.tokenizer_sha256,
            corpus_sha256=self.corpus.sha256,
            bos=self.bos,
            context=config.corpus.context,
            seed=config.seed,
            validation_documents=config.corpus.validation_documents,
            dtype=config.activations.dtype,
            products=forward_products(config.activations.dtype),
            d_model=self.model.d_model,
        )

    @property
    def cached(self) -> Manifest:
        """What the activation cache holds."""
        return read_manifest(self.cache_root / self.cache_key.folder_name) or Manifest.empty(self.cache_key)

    @property
    def sequences(self) -> dict[Split, int]:
        """Sequences that trainings read, if the corpus has as many."""
        return {"train": self.train_sequences, "validation": self.validation_sequences}

    def cache_request(self, manifest: Manifest) -> CacheRequest:
        """What an activation cache that holds `manifest` has to hold when packs start.

        Everything; or, where that would take more than `activations.max_bytes`, what packs cannot do without that
        compute their training activations themselves: all tokens, validation, and what means are taken over or
        candidates are found on.
        """
        layers = self.config.layers
        everything = CacheRequest(layers, self.sequences, self.sequences)
        fits = request_bytes(manifest, everything) <= self.config.activations.max_bytes
        if fits or missing_work(manifest, everything).bytes == 0:
            return everything
        masks = self.config.pair_mask
        needed = max(MEAN_SEQUENCES, masks.calibration_sequences if masks is not None else 0)
        kept = min(needed, self.train_sequences)
        return CacheRequest(layers, self.sequences, {"train": kept, "validation": self.validation_sequences})

    @property
    def sequences_in_shards(self) -> tuple[int, int]:
        """The same for training and validation, rounded up to whole shards."""
        train, validation = (in_whole_shards(self.sequences[split], None) for split in SPLITS)
        return train, validation


def _refuse_other_task(config: SweepConfig, ledger: Ledger) -> None:
    """One sweep's trainings are shown together, which those of two tasks cannot be."""
    if any(study.task != config.task for study in ledger.studies()):
        where = ledger.storage.shown(ledger.folder)
        raise InputError(f"task: the sweep in {where} is of another task than {config.task}; give another name")


def make_plan(
    config: SweepConfig,
    measured_bos: str | None = AUTO,
    fresh: bool = False,
    cluster_packs: int | None = None,
    here: bool = True,
) -> SweepPlan:
    """What this sweep file asks for beyond what its ledger already holds. Creates nothing.

    With `fresh` nothing that is there counts: the studies are those of a new attempt. `measured_bos` is what
    `corpus.bos: auto` was just found to be, where no measurement is kept yet. Unless it is trained `here`, nothing is
    asked of this machine.
    Raises InputError for an unknown model or corpus, for layers and contexts that the model does not have, and
    for resources that this machine does not have.
    """
    if here:
        check_storage(config.name, config.storage)
    model = describe_model(config.model)
    check_model(config, model)
    if here:
        check_resources(config)
    check_tracking(config.tracking, storage_folder(config))
    if here:
        check_cluster()
    corpus = describe_corpus(config.corpus)
    ledger = Ledger.open_if_there(place_of(config, sweep_folder(config), reading=not here))
    if ledger is not None:
        _refuse_other_task(config, ledger)
    latest = ledger.attempt() if ledger is not None else None
    attempt = 0 if latest is None else latest + int(fresh)
    measured = measurement_file(storage_folder(config) / CACHE_FOLDER, config, model, corpus)
    storage = open_storage(config.storage)
    if config.corpus.bos == AUTO:
        storage.fetch(measured)
    bos = opening_token(config, measured)
    if bos == AUTO:
        bos = measured_bos
    sources = source_dictionaries(config, model, storage_folder(config) / CACHE_FOLDER)
    studies = []
    # asked once for all trainings
    in_bucket = None
    if isinstance(storage, Bucket):
        in_bucket = storage.listing(sweep_folder(config) / DICTIONARIES_FOLDER)
    for layer in config.layers:
        identity = study_identity(
            task=config.task,
            weights_sha256=model.weights_sha256,
            tokenizer_sha256=model.tokenizer_sha256,
            layer=layer,
            corpus=config.corpus,
            corpus_sha256=corpus.sha256,
            bos=bos,
            training=config.training,
            dtype=config.activations.dtype,
            seed=config.seed,
            pair_mask=config.pair_mask,
            attempt=attempt,
        )
        identifier = study_id(identity)
        trainings = ledger.trainings(identifier) if ledger is not None else []
        studies.append(make_study_plan(config, identifier, layer, identity, trainings, sources[layer], in_bucket))
    if config.search.layer_allocation == "by_progress":
        studies = share_budget(config, studies)
    tokens_spent, changes = 0, []
    if ledger is not None:
        changes = change_lines(ledger.studies(), studies, config.task)
        tokens_spent = ledger.spent([study.study_id for study in studies]).tokens
        ledger.close()
    plan = SweepPlan(
        config, model, corpus, bos, tuple(studies), attempt, fresh, tokens_spent, changes, cluster_packs, here
    )
    plan.stored_cache.refresh()
    if plan.trainings_left and here:
        check_memory(config, model, plan.pack_size, plan.pack_bytes, plan.streamed)
    if plan.trainings_left and plan.cached.missing_sequences([TOKENS], plan.sequences) > 0:
        # a sweep whose text is cached does without the hub
        require_corpus(config.corpus)
    return plan
