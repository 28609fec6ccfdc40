"""Which layer trains next when layers share a budget. Pure decisions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Allocation = Literal["even", "by_progress"]
# However flat its curve, no layer gets less than this share of an even one: the next training may be the lucky one.
LEAST_SHARE = 0.5
# Progress is what the latest third of a study's trainings added, and at least this many of them.
LATEST_SHARE, LATEST_LEAST = 1 / 3, 3


@dataclass(frozen=True)
class Standing:
    """How far a study is: trainings begun, and its hypervolume after each one that ended, in that order."""

    study_id: str
    begun: int
    hypervolumes: Sequence[float] = ()

    @property
    def progress(self) -> float:
        """Hypervolume per training that the latest ones added; infinite while there are too few to tell."""
        latest = max(LATEST_LEAST, round(len(self.hypervolumes) * LATEST_SHARE))
        if len(self.hypervolumes) <= latest:
            return float("inf")
        return (self.hypervolumes[-1] - self.hypervolumes[-1 - latest]) / latest


def in_turn(standings: Sequence[Standing], allocation: Allocation) -> list[str]:
    """Study ids, the one that is to train next first.

    `even`: the fewest trainings begun. `by_progress`: first whoever has less than half of an even share, then the study
    whose hypervolume grew most per training lately; equals by fewest begun.
    """
    if allocation == "even":
        return [one.study_id for one in sorted(standings, key=lambda one: one.begun)]
    even = sum(one.begun for one in standings) / max(1, len(standings))

    def order(one: Standing) -> tuple[bool, float, int]:
        return one.begun >= LEAST_SHARE * even, -one.progress, one.begun

    return [one.study_id for one in sorted(standings, key=order)]
