"""Start or continue a sweep: plan, prepare, train, track."""

import contextlib
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from orchestrator.late_checks import check_plan
from orchestrator.ledger import Ledger
from orchestrator.ledger_file import LEDGER_FILE
from orchestrator.opening_token import keep_opening_token
from orchestrator.pack_order import PackOrder, checkpoint_path
from orchestrator.pack_queue import PackQueue, StudyWork, history
from orchestrator.packs_on_ray import train_packs
from orchestrator.pareto import MAX_L0_SHARE
from orchestrator.plan import StudyPlan, SweepPlan, make_plan, storage_folder
from orchestrator.preparation import Preparation, prepare
from orchestrator.search.space import extremes
from orchestrator.search.study import StudySearch
from orchestrator.tracking import EndStatus, Tracker
from orchestrator.tracking_thread import TrackingThread
from orchestrator.versions import git_sha, package_versions
from qkmodel.activation_build import BuildProgress
from qkmodel.dictionary import CorpusIdentity, ModelIdentity
from qkmodel.errors import InputError
from qkmodel.files import exclusive

LOCK_FILE = "lock"
TRACKING_INTERVAL_SECONDS = 5.0


@dataclass(frozen=True)
class SweepOutcome:
    """How a start of a sweep ended. `tracking_error` says why MLflow does not have everything yet."""

    ledger: Ledger
    trained: int
    failed: int
    tracking_error: str | None


class SweepView(Protocol):
    """Where a sweep shows what it does."""

    def say(self, line: str) -> None: ...

    def cache_progress(self, state: BuildProgress) -> None: ...

    def training_started(self, plan: SweepPlan, ledger: Ledger) -> None: ...


def run_sweep(plan: SweepPlan, view: SweepView) -> SweepOutcome:
    """Trains what the plan asks for and the ledger does not hold, and brings MLflow up to date.

    Raises InputError before anything is created when the file asks for something that cannot be had, and when
    another process is at work on the same sweep; RayStopped when Ray ends before the packs do, with every training
    in the ledger to be continued.
    """
    with contextlib.ExitStack() as held:
        was_there = plan.folder.is_dir()
        if was_there:
            held.enter_context(_only_driver(plan.folder))
            # the process before this one may have ended just now
            plan = make_plan(plan.config)
        if plan.lost_line is not None:
            view.say(plan.lost_line)
        checked = check_plan(plan, view.say)
        if checked.measured is not None:
            keep_opening_token(checked.measured, checked.plan.bos_file)
        prepared = prepare(checked, view.say, view.cache_progress) if checked.plan.trainings_left else None
        plan = checked.plan
        # it holds the model and the text, which would take memory while packs train
        del checked
        if not was_there:
            plan.folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(_only_driver(plan.folder))
        return _run_prepared(plan, prepared, view)


def _only_driver(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Holds the sweep against other drivers; workers that a dead one left behind do not hold it."""

    def refuse(holder: str) -> None:
        raise InputError(
            f"name: process {holder} is at work on the sweep in {folder}; wait for it or end it, or choose another name"
        )

    return exclusive(folder / LOCK_FILE, refuse)


def _run_prepared(plan: SweepPlan, prepared: Preparation | None, view: SweepView) -> SweepOutcome:
    config = plan.config
    ledger = Ledger(plan.folder / LEDGER_FILE)
    ledger.open_sweep(config.name, config.public_dict(), git_sha(), package_versions())
    for study in plan.studies:
        ledger.open_study(
            study.study_id,
            config.task,
            study.layer,
            study.identity,
            model=config.model.name,
            corpus=config.corpus.name,
        )
        for training_id, loss in study.lost.items():
            ledger.discard_result(training_id, loss)
    ledger.set_current({study.study_id: study.tokens_planned for study in plan.studies})
    tracking = TrackingThread(Tracker(config.tracking, storage_folder(config), ledger), TRACKING_INTERVAL_SECONDS)
    works: list[StudyWork] = []
    ended: EndStatus = "KILLED"
    try:
        if prepared is not None:
            _record_references(plan, prepared, ledger)
            works = [_study_work(plan, study, prepared, ledger) for study in plan.studies]
            queue = PackQueue(ledger, works, plan.folder, plan.pack_size)
            view.training_started(plan, ledger)
            train_packs(plan, queue)
        ended = "FINISHED"
    finally:
        # Ray is down and its workers with it
        ledger.reopen_running()
        tracking_error = tracking.stop(ended)
    wanted = {identifier for work in works for identifier in work.wanted}
    states = Counter(training.state for training in ledger.trainings() if training.training_id in wanted)
    return SweepOutcome(ledger, states["finished"], states["failed"] + plan.diverged, tracking_error)


def _record_references(plan: SweepPlan, prepared: Preparation, ledger: Ledger) -> None:
    measured = {study.study_id for study in ledger.studies() if study.reference}
    for study in plan.studies:
        if study.study_id not in measured:
            ledger.set_reference(study.study_id, _reference_figures(plan, prepared, study.layer))


def _reference_figures(plan: SweepPlan, prepared: Preparation, layer: int) -> dict[str, float | None]:
    """The layer's reference, and the l0 of the hypervolume's reference point.

    Recorded once per study: hypervolumes under different reference points could not be compared.
    """
    largest = max(max(extremes("dictionary_size", space["dictionary_size"])) for space in plan.config.search.space)
    return prepared.references[layer].figures() | {"l0_cap": MAX_L0_SHARE * largest}


def _study_work(plan: SweepPlan, study: StudyPlan, prepared: Preparation, ledger: Ledger) -> StudyWork:
    config = plan.config
    unfinished = {training.training_id for training in study.unfinished}
    search = StudySearch(
        config.search.space,
        config.search.sampler,
        config.search.trainings,
        config.seed,
        history(ledger.trainings(study.study_id), unfinished),
    )
    checkpoint_path(plan.folder, "").parent.mkdir(parents=True, exist_ok=True)
    template = partial(
        PackOrder,
        device=plan.device,
        threads=max(1, int(config.resources.pack.cpu)),
        sweep_folder=plan.folder,
        cache_folder=prepared.cache.folder,
        streamed=prepared.streamed,
        reference_file=prepared.reference_files[study.layer],
        model_identity=ModelIdentity(
            config=config.model,
            weights_sha256=plan.model.weights_sha256,
            layer=study.layer,
            hook=f"blocks.{study.layer}.attn.hook_in",
        ),
        corpus_identity=CorpusIdentity(config=config.corpus, bos=plan.bos, sha256=plan.corpus.sha256),
        training=config.training,
        seed=config.seed,
    )
    return StudyWork(study.study_id, search, plan.tokens_per_training, template, unfinished)
