"""What a sweep file may only say for one of the tasks."""

from typing import TYPE_CHECKING

from orchestrator.search.config import METRICS, HalvingConfig
from qkmodel.errors import InputError
from qkmodel.tasks import task_of

if TYPE_CHECKING:
    from orchestrator.config import SweepConfig

# of `training`; a mask's learning rate has one schedule, and its products are few and exact
_OF_TRANSCODERS = ("learning_rate_schedule", "warmup_share", "gradient_clip", "precision")


def check_task(config: "SweepConfig") -> None:
    """Raises InputError for a key, a hyperparameter or a metric that belongs to another task than the file's."""
    for alternative in config.search.space:
        if task_of(alternative) != config.task:
            right = "pair_cost at least" if config.task == "pair_mask" else "dictionary_size and activation"
            raise InputError(f"search.space: is not one of task {config.task}, which takes {right}")
    for metric in config.search.constraints:
        if metric not in METRICS[config.task]:
            known = ", ".join(METRICS[config.task])
            raise InputError(f"search.constraints.{metric}: is not measured in task {config.task}; known: {known}")
    if config.task == "pair_mask":
        _check_masks(config)
    elif config.pair_mask is not None:
        raise InputError("pair_mask: belongs to task pair_mask; leave it out, or write task: pair_mask")


def _check_masks(config: "SweepConfig") -> None:
    if config.pair_mask is None:
        raise InputError("pair_mask: is missing; task pair_mask needs pair_mask.dictionaries, whose pairs it masks")
    for name in _OF_TRANSCODERS:
        if name in config.training.model_fields_set:
            raise InputError(f"training.{name}: belongs to task transcoder; leave it out")
    if config.search.warm_start is not None:
        raise InputError("search.warm_start: belongs to task transcoder; leave it out")
    if isinstance(config.halving, HalvingConfig):
        raise InputError("halving: a mask keeps few pairs only at its end; write null or leave it out")
    if config.resources.pack.gpu > 0:
        raise InputError("resources.pack.gpu: pair masks are trained on CPUs; leave it out")
    read = -(-config.training.tokens // config.corpus.context)
    if config.pair_mask.calibration_sequences > read:
        raise InputError(
            f"pair_mask.calibration_sequences: {config.pair_mask.calibration_sequences} is more than the {read} "
            "sequences of training.tokens; lower it, or raise training.tokens"
        )
