"""What a whole sweep may cost, all its starts together, and whether it is used up."""

import time
from collections.abc import Collection
from dataclasses import dataclass

from orchestrator.ledger import Ledger
from orchestrator.starts import seconds_of_earlier_starts

SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class Limits:
    """As in the sweep file; None is no limit. `wall_time` in seconds.

    A device-hour is an hour of one pack: of one GPU or the share of it that packs are given, or else of the CPUs that
    one pack has.
    """

    tokens: int | None = None
    device_hours: float | None = None
    wall_time: float | None = None


class Budget:
    """Compares what the ledger says was spent on the present studies with the limits."""

    def __init__(
        self,
        limits: Limits,
        ledger: Ledger,
        studies: Collection[str],
        start: int,
        gpu_share: float = 0.0,
        seconds_before: float = 0.0,
    ) -> None:
        """`seconds_before` is what this start took before there were packs."""
        self._limits = limits
        self._ledger = ledger
        self._studies = studies
        self._device_share = gpu_share or 1.0
        self._begun = time.monotonic()
        self._before = seconds_of_earlier_starts(ledger, start) + seconds_before

    def exceeded(self) -> str | None:
        """The limit after which nothing goes on, in words; None as long as there is time."""
        limits = self._limits
        if limits.wall_time is not None and self._before + time.monotonic() - self._begun >= limits.wall_time:
            return "search.wall_time is used up"
        if limits.device_hours is not None:
            seconds = self._ledger.spent(self._studies).seconds * self._device_share
            if seconds >= limits.device_hours * SECONDS_PER_HOUR:
                return "search.device_hours are used up"
        return None

    @property
    def is_of_tokens(self) -> bool:
        return self._limits.tokens is not None

    def allows(self, trainings: int, tokens_each: int) -> int:
        """How many of so many new trainings the tokens suffice for; what is begun keeps those to its end."""
        if self._limits.tokens is None:
            return trainings
        left = self._limits.tokens - self._ledger.spent(self._studies).tokens_committed
        return max(0, min(trainings, left // tokens_each))
