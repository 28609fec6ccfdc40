"""A sweep's progress as a person watches it: redrawn on a terminal, line by line in a log."""

import contextlib
import threading
import time
from collections import deque
from itertools import pairwise
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from orchestrator.ledger import Ledger
from orchestrator.pareto import point_of
from orchestrator.plan import SweepPlan
from orchestrator.status import StudyStatus, study_statuses
from orchestrator.tables import counted, duration, state_table
from qkmodel.progress import TokenProgress

LOG_SECONDS = 15.0
# reports come in leaps, an eighth of a training each: over a shorter time, or fewer of them, speed would jump
RATE_SECONDS, LEAPS = 300.0, 8
# The process that draws is the one that hands out packs.
READING_SHARE = 0.05


class LiveProgress:
    """The table that is redrawn while trainings run: recent speed and ETA, and the best points so far."""

    def __init__(self, plan: SweepPlan, ledger: Ledger) -> None:
        self._ledger = ledger
        self._studies = [study.study_id for study in plan.studies]
        self._tokens_before = self._tokens_done(study_statuses(ledger, self._studies))
        # (moment, tokens done) at every change that speed is taken from
        self._seen = deque([(time.monotonic(), self._tokens_before)])
        unfinished = sum(training.tokens_done for study in plan.studies for training in study.unfinished)
        wanted = plan.trainings_left * plan.tokens_per_training * plan.share_trained
        self._tokens_wanted = max(0, round(wanted) - unfinished)
        self._drawn: RenderableType | None = None
        self._next_drawing = 0.0

    def __rich__(self) -> RenderableType:
        """What was drawn last, where reading the ledger again would take more than a part of the time."""
        began = time.monotonic()
        if self._drawn is None or began >= self._next_drawing:
            # a ledger that is away now is the driver's to speak of
            with contextlib.suppress(OSError):
                self._drawn = self._draw()
            now = time.monotonic()
            self._next_drawing = now + (now - began) / READING_SHARE
        return self._drawn or ""

    def _draw(self) -> RenderableType:
        statuses = study_statuses(self._ledger, self._studies)
        running = [one for status in statuses for one in status.trainings if one.state == "running"]
        packs = len({one.pack for one in running})
        line = f"{counted(packs, 'pack')} running · {self._rate(statuses)}"
        best = [Text(line) for line in map(_best_line, statuses) if line]
        return Group(state_table(statuses), Text(line, style="bold"), *best)

    def rate(self) -> str:
        """Speed over the last minutes and the time that is left at that speed."""
        return self._rate(study_statuses(self._ledger, self._studies))

    def _rate(self, statuses: list[StudyStatus]) -> str:
        now, tokens = time.monotonic(), self._tokens_done(statuses)
        if tokens != self._seen[-1][1]:
            self._seen.append((now, tokens))
        # reports of long trainings may be further apart than that, and those of several packs come close together
        window = max(RATE_SECONDS, LEAPS * self._longest_leap())
        while len(self._seen) > 2 and self._seen[1][0] < now - window:
            self._seen.popleft()
        done = tokens - self._tokens_before
        if done <= 0:
            return "measuring speed"
        since, tokens_then = self._seen[0]
        # only what has been waited for longer than for any leap before speaks of a lower speed
        waited = min(now - self._seen[-1][0], self._longest_leap())
        rate = (tokens - tokens_then) / (now - waited - since)
        said = f"{done:,} of {self._tokens_wanted:,} training-tokens, {rate:,.0f}/s"
        if done >= self._tokens_wanted:
            return said
        left = (self._tokens_wanted - done) / rate - waited
        # final metrics count no tokens
        return f"{said}, about {duration(left)} left" if left >= 1 else f"{said}, the next report is due"

    def _longest_leap(self) -> float:
        return max((later - earlier for (earlier, _), (later, _) in pairwise(self._seen)), default=0.0)

    @staticmethod
    def _tokens_done(statuses: list[StudyStatus]) -> int:
        return sum(training.tokens_done for status in statuses for training in status.trainings)


def _best_line(status: StudyStatus) -> str:
    if not status.front:
        return ""
    best = min(status.front, key=lambda training: point_of(training)[1])
    size, kl = point_of(best)
    recovered = best.metrics[best.objectives.recovered]
    at = f"with {size:,.0f} pairs" if best.task == "pair_mask" else f"at l0 {size:.1f}"
    return f"{status.title}: lowest KL {kl:.4f} ({recovered:.1%} recovered) {at}, {best.label}"


class TerminalView:
    """A `SweepView` on a terminal: a bar for what comes first, a live table while packs train.

    A context manager, so that the terminal is whole again after an error.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,} of {task.total:,} tokens, {task.fields[rate]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID | None = None
        self._live: Live | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """One line that stays."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def token_progress(self, state: TokenProgress) -> None:
        """A bar, which stays when all is done."""
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task(state.what, total=state.tokens_total, rate=0.0)
        self._progress.update(self._task, completed=state.tokens_done, rate=state.tokens_per_second)
        if state.tokens_done >= state.tokens_total:
            self._progress.stop()
            self._progress.remove_task(self._task)
            self._task = None

    def training_started(self, plan: SweepPlan, ledger: Ledger) -> None:
        """From here on the live table redraws itself from the ledger."""
        self.say(_start_line(plan))
        self._live = Live(LiveProgress(plan, ledger), console=self._console, refresh_per_second=1, transient=True)
        self._live.start()


class LogView:
    """A `SweepView` into a file or a pipe: a line every `LOG_SECONDS`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_line = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def say(self, line: str) -> None:
        """One line."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def token_progress(self, state: TokenProgress) -> None:
        """How far it is, every `LOG_SECONDS`."""
        if state.tokens_done >= state.tokens_total or time.monotonic() - self._last_line >= LOG_SECONDS:
            self._last_line = time.monotonic()
            self.say(
                f"{state.what}: {state.tokens_done:,} of {state.tokens_total:,} tokens, "
                f"{state.tokens_per_second:,.0f} tokens/s, {duration(state.seconds_left)} left"
            )

    def training_started(self, plan: SweepPlan, ledger: Ledger) -> None:
        """From here on a thread reads the ledger and says how far it is."""
        self.say(_start_line(plan))
        progress = LiveProgress(plan, ledger)

        def log() -> None:
            while not self._stop.wait(LOG_SECONDS):
                with contextlib.suppress(OSError):
                    self.say(progress.rate())

        self._thread = threading.Thread(target=log, daemon=True)
        self._thread.start()


def _start_line(plan: SweepPlan) -> str:
    work = f"{counted(plan.trainings_left, 'training')} in {counted(plan.packs, 'pack')}"
    return f"starting {work}, {min(plan.slots, plan.packs)} at once"
