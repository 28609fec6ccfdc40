"""What `orchestrate sweep --dry-run` shows of a plan and its cost."""

from typing import Any

from rich import box
from rich.table import Table

from orchestrator.estimate import STARTUP_SECONDS, Estimate
from orchestrator.plan import SweepPlan
from orchestrator.plan_figures import tokens_per_step
from orchestrator.tables import counted, duration, size


def plan_table(plan: SweepPlan) -> Table:
    """Studies, trainings and packs that a sweep file asks for."""
    table = Table(title=f"sweep {plan.config.name}: what is to be done", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("layer", "finished", "to train", "packs", "tokens to train on"):
        table.add_column(column, justify="right")
    for study in plan.studies:
        packs = -(-study.to_train // plan.pack_size)
        tokens = study.to_train * plan.tokens_per_training
        table.add_row(str(study.layer), str(study.finished), str(study.to_train), str(packs), f"{tokens:,}")
    return table


def estimate_lines(plan: SweepPlan, estimate: Estimate) -> list[str]:
    """What the plan costs, in words."""
    config = plan.config
    lines = [
        f"model {plan.model.name}, corpus {config.corpus.name}{_documents(plan)}, sampler {plan.sampler}",
        f"{counted(plan.trainings_left, 'training')} in {counted(plan.packs, 'pack')} of up to {plan.pack_size}, "
        f"{counted(plan.slots, 'pack')} at once, each of about {size(plan.pack_bytes)} of memory",
        f"activation cache {size(estimate.cache_bytes)} (limit {size(config.activations.max_bytes)}), "
        f"{size(estimate.cache.bytes)} of it still to be written",
    ]
    if plan.corpus.documents is None:
        lines.append("a data set on the hub is read at the start: if it is shorter than that, the cache is smaller")
    if estimate.streamed:
        lines.append("training activations would take more than that: every pack computes its own as it goes")
    lines += plan.change_lines
    if plan.lost_line is not None:
        lines.append(plan.lost_line)
    if plan.trainings_left == 0:
        return [*lines, "nothing left to do"]
    if plan.halving is not None:
        lines.append(_halving_line(plan))
    if estimate.seconds is None:
        unknown = "this machine has no GPU to measure trainings on"
        if config.task == "pair_mask":
            unknown = "masks show their speed once they train"
        return [
            *lines,
            *_budget_lines(plan),
            f"estimated for caching {duration(estimate.cache_seconds)}; {unknown}",
        ]
    # measured without what a pack gains by CUDA graphs
    at_most = "at most " if plan.device == "cuda" else ""
    return [
        *lines,
        *_budget_lines(plan),
        f"estimated {duration(estimate.seconds)} on this machine: caching {duration(estimate.cache_seconds)}, "
        f"training {at_most}{duration(estimate.training_seconds)}, evaluation {duration(estimate.evaluation_seconds)}, "
        f"start and end {duration(STARTUP_SECONDS)} (assumed)",
    ]


def _halving_line(plan: SweepPlan) -> str:
    rungs = [f"{rung * tokens_per_step(plan.config):,}" for rung in plan.halving.rungs]
    return (
        f"halving: at {' and '.join(rungs)} tokens the best 1/{plan.halving.eta:g} of each kind go on, "
        f"so that about {plan.share_trained:.0%} of these tokens are trained on"
    )


def _budget_lines(plan: SweepPlan) -> list[str]:
    search, limits = plan.config.search, []
    if search.tokens is not None:
        limits.append(f"{search.tokens:,} tokens, of which {plan.tokens_spent:,} are spent")
    if search.device_hours is not None:
        limits.append(f"{search.device_hours:g} device-hours")
    if search.wall_time is not None:
        limits.append(f"{duration(search.wall_time)} of wall time")
    return [f"ends earlier after {' or '.join(limits)}, all starts together"] if limits else []


def estimate_record(plan: SweepPlan, estimate: Estimate) -> dict[str, Any]:
    """The plan and its cost, as `orchestrate sweep --dry-run --json` prints them."""
    return {
        "sweep": plan.config.name,
        "folder": str(plan.folder),
        "sampler": plan.sampler,
        "studies": [
            {
                "study_id": study.study_id,
                "layer": study.layer,
                "finished": study.finished,
                "to_train": study.to_train,
            }
            for study in plan.studies
        ],
        "trainings": plan.trainings_left,
        "packs": plan.packs,
        "pack_size": plan.pack_size,
        "packs_at_once": plan.slots,
        "pack_bytes": plan.pack_bytes,
        "tokens": plan.trainings_left * plan.tokens_per_training,
        "share_trained": plan.share_trained,
        "cache_bytes": estimate.cache_bytes,
        "cache_bytes_missing": estimate.cache.bytes,
        "streamed": estimate.streamed,
        "seconds": estimate.seconds if plan.trainings_left else 0.0,
    }


def _documents(plan: SweepPlan) -> str:
    if plan.corpus.documents is None:
        return ""
    return f" ({plan.corpus.documents:,} documents, {size(plan.corpus.bytes)})"
