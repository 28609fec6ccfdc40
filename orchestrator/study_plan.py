"""What a sweep file asks for in one study, beyond what the ledger holds of it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from orchestrator.config import SweepConfig
from orchestrator.identity import training_id
from orchestrator.ledger import Training
from orchestrator.lost_dictionaries import find_losses
from orchestrator.pack_order import DIVERGED
from orchestrator.plan_figures import halving_of, sampler_for, tokens_per_training
from orchestrator.search.space import Alternative, canonical, contains, enumerate_space, grid, grid_size
from orchestrator.source_dictionaries import SourceDictionary
from orchestrator.warm_start import front_of_earlier_sweep
from qkmodel.errors import InputError


@dataclass(frozen=True)
class StudyPlan:
    """One study: what it already has and how many trainings it still needs.

    `unfinished` are trainings that the ledger holds as open or running, that failed for a reason outside themselves, or
    that are finished without a dictionary: those are `lost`, training id -> what is gone. `diverged` counts those whose
    numbers ran away, which are not tried again, `stopped` those that halving stopped, `new` those that the search is
    still to propose, `first` being what it tries first. `tokens_planned` are the tokens of all these, and those that
    trainings outside the file's present space have seen. `space` is the file's, with the `sources` whose pairs are
    masked among its choices; `sampler` as `auto` was resolved for it.
    """

    study_id: str
    layer: int
    identity: dict
    finished: int
    diverged: int
    stopped: int
    unfinished: tuple[Training, ...]
    first: tuple[dict[str, Any], ...]
    lost: dict[str, str]
    new: int
    tokens_planned: int
    space: tuple[Alternative, ...]
    sampler: str
    sources: tuple[SourceDictionary, ...] = ()

    @property
    def to_train(self) -> int:
        return len(self.unfinished) + self.new


def make_study_plan(
    config: SweepConfig,
    identifier: str,
    layer: int,
    identity: dict,
    trainings: Sequence[Training],
    sources: tuple[SourceDictionary, ...] = (),
    in_bucket: Collection[Path] | None = None,
) -> StudyPlan:
    """What the file asks for in one study, given the `trainings` that its ledger holds of it.

    `in_bucket` are the files of the sweep's dictionaries where it is kept in a bucket.

    Raises InputError for a grid that these many dictionaries make larger than the budget.
    """
    space = _space_with(config, sources)
    sampler = sampler_for(config, space)
    inside = [
        one for one in trainings if any(contains(alternative, canonical(one.hyperparameters)) for alternative in space)
    ]
    shared = len(config.layers) if config.search.layer_allocation == "by_progress" else 1
    points, budget = enumerate_space(space), config.search.trainings * shared
    possible = budget if points is None else sum(1 for _ in islice(points, budget))
    new = max(0, possible - len(inside))
    if sampler == "grid":
        wanted = {training_id(identifier, point) for point in grid(space)}
        inside = [one for one in inside if one.training_id in wanted]
        new = len(wanted) - len(inside)
    outside = sum(one.tokens_done for one in trainings) - sum(one.tokens_done for one in inside)
    lost = find_losses(config, inside, in_bucket)
    # as the ledger will have them once the sweep is started
    inside = [replace(one, state="open", tokens_done=0) if one.training_id in lost else one for one in inside]
    finished = [one for one in inside if one.state == "finished"]
    diverged = [one for one in inside if one.state == "failed" and (one.error or "").startswith(DIVERGED)]
    stopped = [one for one in inside if one.state == "stopped"] if halving_of(config) is not None else []
    ended = {one.training_id for one in [*finished, *diverged, *stopped]}
    unfinished = tuple(one for one in inside if one.training_id not in ended)
    tokens_planned = (len(inside) + new) * tokens_per_training(config) + outside
    return StudyPlan(
        study_id=identifier,
        layer=layer,
        identity=identity,
        finished=len(finished),
        diverged=len(diverged),
        stopped=len(stopped),
        unfinished=unfinished,
        first=(*config.search.first, *front_of_earlier_sweep(config, layer)),
        lost=lost,
        new=new,
        tokens_planned=tokens_planned,
        space=space,
        sampler=sampler,
        sources=sources,
    )


def _space_with(config: SweepConfig, sources: Sequence[SourceDictionary]) -> tuple[Alternative, ...]:
    """The file's space; of pair masks, with the dictionaries to choose from."""
    if not sources:
        return config.search.space
    # not in the order of a front, which may change
    names = sorted(source.name for source in sources)
    space = tuple({"dictionary": names, **alternative} for alternative in config.search.space)
    size, trainings = grid_size(space) if config.search.sampler == "grid" else 0, config.search.trainings
    if size > trainings:
        raise InputError(
            f"search.space: with {len(names)} dictionaries the grid has {size} points but search.trainings is "
            f"{trainings}: raise it to {size} or take points or dictionaries away"
        )
    return space


def share_budget(config: SweepConfig, studies: Sequence[StudyPlan]) -> list[StudyPlan]:
    """The plans of studies that share one budget of trainings: what is left of it, in even parts."""
    begun = sum(study.finished + study.diverged + study.stopped + len(study.unfinished) for study in studies)
    left, planned = max(0, config.search.trainings * len(studies) - begun), []
    for place, study in enumerate(studies):
        new = min(study.new, -(-left // (len(studies) - place)))
        tokens = study.tokens_planned - (study.new - new) * tokens_per_training(config)
        planned.append(replace(study, new=new, tokens_planned=tokens))
        left -= new
    return planned
