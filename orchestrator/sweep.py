"""Start or continue a sweep: plan, prepare, train, track."""

import contextlib
import platform
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch

from orchestrator.budget import Budget, Limits
from orchestrator.checkpoints import Checkpoints
from orchestrator.driver_lock import only_driver
from orchestrator.late_checks import check_plan
from orchestrator.ledger import Ledger
from orchestrator.ledger_connection import Patience
from orchestrator.ledger_place import is_begun, place_of
from orchestrator.opening_token import keep_opening_token
from orchestrator.pack_order import BucketOrder, CopiesOrder, PackOrder
from orchestrator.pack_queue import PackQueue, QueueSettings, StudyWork, history
from orchestrator.packs_on_ray import clear_scratch, train_packs
from orchestrator.pareto import MAX_L0_SHARE
from orchestrator.permit import grant
from orchestrator.plan import SweepPlan, make_plan
from orchestrator.plan_figures import steps_per_training, storage_folder, tokens_per_step
from orchestrator.preparation import Preparation, prepare
from orchestrator.ray_connection import ask_cluster
from orchestrator.report import REPORT_FILE
from orchestrator.search.space import extremes
from orchestrator.search.study import StudySearch
from orchestrator.start_facts import machine_facts, plan_facts
from orchestrator.starts import Lease
from orchestrator.study_plan import StudyPlan
from orchestrator.tracking import Tracker
from orchestrator.tracking_notes import end_status
from orchestrator.tracking_thread import TrackingThread
from orchestrator.versions import GIT_DIFF_FILE, git_diff, git_sha, package_versions
from qkmodel.dictionary import CorpusIdentity, ModelIdentity
from qkmodel.errors import InputError
from qkmodel.files import write_atomically
from qkmodel.products import product_dtype
from qkmodel.progress import TokenProgress

TRACKING_INTERVAL_SECONDS = 5.0
# of the ten seconds that are left after a signal, Ray and the packs take the most
INTERRUPTED_TRACKING_SECONDS = 1.5
# enough for more than a thousand trainings, should all of them be owed
LAST_TRACKING_SECONDS = 300.0
# for a database server that goes away: longer than its machine takes to start again
LEDGER_PATIENCE_SECONDS = 600.0


@dataclass(frozen=True)
class SweepOutcome:
    """How a start of a sweep ended: trainings by what became of them.

    `budget_line` says which budget ended it before all was trained; `tracking_error` why MLflow does not have
    everything yet.
    """

    ledger: Ledger
    trained: int
    stopped: int
    failed: int
    budget_line: str | None
    tracking_error: str | None


class SweepView(Protocol):
    """Where a sweep shows what it does."""

    def say(self, line: str) -> None: ...

    def token_progress(self, state: TokenProgress) -> None: ...

    def training_started(self, plan: SweepPlan, ledger: Ledger) -> None: ...


def run_sweep(plan: SweepPlan, view: SweepView, with_git_diff: bool = False) -> SweepOutcome:
    """Trains what the plan asks for and the ledger does not hold, and brings MLflow up to date.

    With `with_git_diff` MLflow gets what this source tree changes in its commit.
    Raises InputError before anything is created when the file asks for something that cannot be had, and when
    another process is at work on the same sweep; RayStopped when Ray ends before the packs do, and KeyboardInterrupt
    when the process was asked to end, with every training in the ledger to be continued.
    """
    begun = time.monotonic()
    with contextlib.ExitStack() as held:
        # a bucket's sweep may have been begun on another machine
        was_there = plan.storage.url is not None or plan.folder.is_dir()
        if was_there:
            plan.folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(only_driver(plan.folder))
            # the process before this one may have ended just now
            plan = make_plan(plan.config, fresh=plan.fresh)
            plan.storage.fetch(plan.folder / REPORT_FILE)
        if plan.lost_line is not None:
            view.say(plan.lost_line)
        packs = ask_cluster(plan.folder, plan.config.resources.pack, plan.storage)
        checked = check_plan(replace(plan, cluster_packs=packs), view.say)
        # only now is it known which token opens sequences
        for line in checked.plan.change_lines:
            view.say(line)
        if checked.measured is not None:
            keep_opening_token(checked.measured, checked.plan.bos_file)
            plan.storage.send(checked.plan.bos_file)
        prepared = prepare(checked, view.say, view.token_progress) if checked.plan.trainings_left else None
        plan = checked.plan
        # it holds the model and the text, which would take memory while packs train
        del checked
        if not was_there:
            plan.folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(only_driver(plan.folder))
            if is_begun(plan.folder):
                raise InputError(f"name: another process began the sweep in {plan.folder} just now; start it again")
        return _run_prepared(plan, prepared, view, with_git_diff, time.monotonic() - begun)


def _run_prepared(
    plan: SweepPlan, prepared: Preparation | None, view: SweepView, with_git_diff: bool, seconds_before: float
) -> SweepOutcome:
    ledger = Ledger(place_of(plan.config, plan.folder))
    lease = Lease(ledger, seconds_before=seconds_before)
    patience = Patience(LEDGER_PATIENCE_SECONDS, view.say, lease.require_latest)
    try:
        # not before the lease: of a bucket's sweep a driver on another machine may be at work, whose file it is then
        _keep_git_diff(plan, with_git_diff)
        with ledger.patience(patience):
            return _run_leased(plan, prepared, view, ledger, lease, _budget(plan, ledger, lease.start, seconds_before))
    finally:
        lease.release()


def _keep_git_diff(plan: SweepPlan, is_wanted: bool) -> None:
    file = plan.folder / GIT_DIFF_FILE
    if is_wanted:
        write_atomically(file, git_diff().encode())
        plan.storage.send(file)
    else:
        plan.storage.remove(file)


def _run_leased(
    plan: SweepPlan, prepared: Preparation | None, view: SweepView, ledger: Ledger, lease: Lease, budget: Budget
) -> SweepOutcome:
    config, start = plan.config, lease.start
    # from here on workers of an earlier start write nothing
    grant(plan.folder, start, plan.storage)
    facts = {"machine": machine_facts(), "plan": plan_facts(plan)}
    ledger.open_sweep(config.name, config.public_dict(), git_sha(), package_versions(), plan.attempt, facts)
    for study in plan.studies:
        ledger.open_study(
            study.study_id,
            config.task,
            study.layer,
            study.identity,
            model=config.model.name,
            corpus=config.corpus.name,
        )
        ledger.set_constraints(study.study_id, config.search.bounds)
        for training_id, loss in study.lost.items():
            ledger.discard_result(training_id, loss)
    ledger.set_current({study.study_id: study.tokens_planned for study in plan.studies})
    tracking = TrackingThread(Tracker(config.tracking, storage_folder(config), ledger), TRACKING_INTERVAL_SECONDS)
    works: list[StudyWork] = []
    is_interrupted = True
    budget_line = None
    try:
        if prepared is not None:
            _record_references(plan, prepared, ledger)
            works = [_study_work(plan, study, prepared, ledger, start) for study in plan.studies]
            queue = PackQueue(ledger, works, Checkpoints(plan.folder, plan.storage), _queue_settings(plan), budget)
            view.training_started(plan, ledger)
            budget_line = train_packs(plan, queue, start)
        else:
            clear_scratch(plan.folder)
        is_interrupted = False
    finally:
        try:
            # Ray is down and its workers with it
            if lease.is_latest:
                ledger.reopen_running()
        finally:
            ended = "KILLED" if is_interrupted else end_status(ledger)
            patience = INTERRUPTED_TRACKING_SECONDS if is_interrupted else LAST_TRACKING_SECONDS
            tracking_error = tracking.stop(ended, patience)
    wanted = {identifier for work in works for identifier in work.wanted}
    states = Counter(training.state for training in ledger.trainings() if training.training_id in wanted)
    failed = states["failed"] + plan.diverged
    return SweepOutcome(ledger, states["finished"], states["stopped"], failed, budget_line, tracking_error)


def _queue_settings(plan: SweepPlan) -> QueueSettings:
    allocation = plan.config.search.layer_allocation
    new = sum(study.new for study in plan.studies) if allocation == "by_progress" else None
    return QueueSettings(plan.pack_size, plan.halving, allocation, new)


def _budget(plan: SweepPlan, ledger: Ledger, start: int, seconds_before: float) -> Budget:
    search = plan.config.search
    limits = Limits(search.tokens, search.device_hours, search.wall_time)
    studies = [study.study_id for study in plan.studies]
    return Budget(limits, ledger, studies, start, plan.config.resources.pack.gpu, seconds_before)


def _record_references(plan: SweepPlan, prepared: Preparation, ledger: Ledger) -> None:
    measured = {study.study_id for study in ledger.studies() if study.reference}
    for study in plan.studies:
        if study.study_id not in measured:
            ledger.set_reference(study.study_id, _reference_figures(plan, prepared, study.layer))


def _reference_figures(plan: SweepPlan, prepared: Preparation, layer: int) -> dict[str, float | None]:
    """The layer's reference, and the l0 (of masks: the pairs kept) of the hypervolume's reference point.

    Recorded once per study: hypervolumes under different reference points could not be compared.
    """
    figures = prepared.references[layer].figures()
    if plan.config.task == "pair_mask":
        sources = [source for source in plan.sources if source.layer == layer]
        return figures | {"pairs_cap": max(one.candidates(plan.config.pair_mask.candidates) for one in sources)}
    largest = max(max(extremes("dictionary_size", space["dictionary_size"])) for space in plan.config.search.space)
    return figures | {"l0_cap": MAX_L0_SHARE * largest}


def _study_work(plan: SweepPlan, study: StudyPlan, prepared: Preparation, ledger: Ledger, start: int) -> StudyWork:
    config = plan.config
    unfinished = {training.training_id for training in study.unfinished}
    shared = len(plan.studies) if config.search.layer_allocation == "by_progress" else 1
    search = StudySearch(
        study.space,
        study.sampler,
        config.search.trainings * shared,
        config.seed,
        history(ledger, study.study_id, unfinished),
        first=study.first,
    )
    template = partial(
        PackOrder,
        task=config.task,
        start=start,
        device=plan.device,
        threads=max(1, int(config.resources.pack.cpu)),
        bucket=_bucket_order(plan),
        sweep_folder=plan.folder,
        cache_folder=prepared.cache.folder,
        copies=_copies(plan),
        streamed=prepared.streamed,
        reference_file=prepared.reference_files[study.layer],
        sources={source.name: prepared.sources[source.name] for source in study.sources},
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
    return StudyWork(
        study.study_id,
        search,
        tokens_per_step(config),
        steps_per_training(config),
        template,
        _machine(plan, prepared),
        unfinished,
    )


def _bucket_order(plan: SweepPlan) -> BucketOrder | None:
    if plan.storage.url is None:
        return None
    return BucketOrder(url=plan.storage.url, root=storage_folder(plan.config))


def _copies(plan: SweepPlan) -> CopiesOrder | None:
    wanted = plan.config.activations
    if wanted.node_folder is None and plan.storage.url is None:
        return None
    folder = Path(wanted.node_folder) if wanted.node_folder is not None else None
    return CopiesOrder(folder=folder, max_bytes=wanted.node_max_bytes)


def _machine(plan: SweepPlan, prepared: Preparation) -> dict[str, int | str]:
    """What the trainings run on, and what their settings come to there."""
    products = product_dtype(plan.config.training.precision, torch.device(plan.device))
    return {
        "threads": max(1, int(plan.config.resources.pack.cpu)),
        "device": plan.device,
        "products": str(products).removeprefix("torch."),
        "activations": "streamed" if prepared.streamed else "cached",
        "node": platform.node(),
        "torch": version("torch"),
    }
