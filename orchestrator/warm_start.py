"""What an earlier sweep found best, as points for another to try early."""

from typing import Any

from orchestrator.config import SweepConfig
from orchestrator.ledger import Ledger
from orchestrator.ledger_place import named_places, shown_storage
from orchestrator.pareto import front_trainings
from qkmodel.errors import InputError


def front_of_earlier_sweep(config: SweepConfig, layer: int) -> list[dict[str, Any]]:
    """The hyperparameters on the fronts of `search.warm_start`, of this layer's or, where it has none, of every layer.

    Values of another sweep say nothing about this one's, since tokens, text or layer differ; where they lie does.
    Raises InputError when there is no such sweep.
    """
    if config.search.warm_start is None:
        return []
    ledger = _open(config.search.warm_start, config)
    studies = [study for study in ledger.studies() if study.task == config.task]
    fronts = [front_trainings(ledger.trainings(study.study_id)) for study in studies]
    ledger.close()
    if not studies:
        raise InputError(f"search.warm_start: {config.search.warm_start}: has no trainings of task {config.task}")
    same_layer = [front for front in fronts if front and front[0].layer == layer]
    return [one.hyperparameters for front in same_layer or fronts for one in front]


def _open(sweep: str, config: SweepConfig) -> Ledger:
    for place in named_places("search.warm_start", sweep, config):
        ledger = Ledger.open_if_there(place)
        if ledger is not None:
            return ledger
    raise InputError(
        f"search.warm_start: {sweep}: no sweep is there; give its folder, or its name in {shown_storage(config)}"
    )
