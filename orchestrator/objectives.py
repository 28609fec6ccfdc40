"""What trainings of each task are weighed by: how well they rebuild the pattern, and with how little."""

from dataclasses import dataclass

from qkmodel.tasks import Task


@dataclass(frozen=True)
class Objectives:
    """The two metrics of a front, both to be small, `recovered` = 1 − kl/kl_baseline, and how people read them.

    `cap` is the figure in a study's reference that bounds `size` for its hypervolume.
    """

    kl: str
    recovered: str
    size: str
    cap: str
    size_label: str


OBJECTIVES: dict[Task, Objectives] = {
    "transcoder": Objectives(
        "kl", "kl_recovered", "l0", "l0_cap", "l0: active features per token, mean of query and key"
    ),
    "pair_mask": Objectives(
        "kl_masked", "kl_masked_recovered", "pairs_kept", "pairs_cap", "pairs kept, over all heads of the layer"
    ),
}
