"""One study's search: what has been tried, and what to try next."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import optuna
from optuna.trial import Trial, TrialState

from orchestrator.search.samplers import make_sampler, resolve_auto
from orchestrator.search.space import (
    Alternative,
    Range,
    canonical,
    contains,
    dimensions,
    enumerate_space,
    grid,
    is_integer,
)
from qkmodel.tasks import TaskHyperparameters, parse_hyperparameters

# A sampler that repeats itself this often has converged; chance takes over, and then enumeration.
_SAMPLER_ATTEMPTS = 3
_FALLBACK_ATTEMPTS = 20

# Below these an objective no longer tells two trainings apart, and its logarithm runs away.
_SMALLEST_KL = 1e-6
_SMALLEST_SIZE = 1.0


@dataclass(frozen=True)
class Past:
    """A training as the ledger remembers it.

    `open` trainings are running or waiting to be continued. `values` are (kl in nats, size: l0 in features per token,
    or pairs kept) of a finished training, and what a stopped one would have ended at; `feasible` is whether they lie in
    the study's feasible box.
    """

    hyperparameters: Mapping[str, Any]
    state: Literal["finished", "stopped", "failed", "open"]
    values: tuple[float, float] | None = None
    feasible: bool = True


class StudySearch:
    """Ask/tell over one in-memory Optuna study that minimises log2 kl and log2 of the size.

    The logarithms are those of the hypervolume that judges a study. Nothing is stored: the same space,
    sampler, budget, seed and history give the same next proposal, whatever happened before in this process.

    Args:
        alternatives: the search space, valid by `validate_space`.
        sampler: `auto`, `grid`, `random`, `tpe`, `gp` or `nsga2`; `self.sampler` says what `auto` became.
        trainings: how many trainings of this space the study may hold, whatever came of them. A grid is
            finished whatever the study holds beside it.
        seed: the sweep's seed.
        history: the study's trainings in the order in which they were proposed. Those outside the space
            (an edited sweep file) neither count nor teach.
        first: what to propose before anything else, in this order; points outside the space are left out.
    """

    def __init__(
        self,
        alternatives: Sequence[Alternative],
        sampler: str,
        trainings: int,
        seed: int,
        history: Sequence[Past] = (),
        first: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.sampler = resolve_auto(alternatives, trainings) if sampler == "auto" else sampler
        # What NSGA-II has not filed under a generation it never makes a parent.
        self._fallback = "nsga2" if self.sampler == "nsga2" else "random"
        self._alternatives = alternatives
        self._trainings = trainings
        self._seed = seed
        self._seen: set[TaskHyperparameters] = set()
        self._open: dict[TaskHyperparameters, Trial] = {}
        self._told: set[TaskHyperparameters] = set()
        self._exhausted = False
        self._first = [canonical(point) for point in first]
        # what an enumeration has not passed yet: what was seen stays seen, so it is gone through once
        self._points: Iterator[dict[str, Any]] | None = None
        self._next_point: dict[str, Any] | None = None
        logging.getLogger("optuna").setLevel(logging.WARNING)
        self._study = optuna.create_study(directions=["minimize", "minimize"])
        for past in history:
            self._remember(past)

    def ask(self) -> dict[str, Any] | None:
        """The next training's hyperparameters, canonical, never the same twice.

        None once the budget is used up or nothing new is left in the space.
        """
        if self._exhausted or (self.sampler != "grid" and len(self._seen) >= self._trainings):
            return None
        trial = self._given_first()
        if trial is None and self.sampler != "grid":
            trial = self._sample_unseen()
        if trial is None:
            trial = self._enumerate_unseen()
        if trial is None:
            self._exhausted = True
            return None
        return self._accept(self._placed(trial))

    def tell(
        self, hyperparameters: Mapping[str, Any], values: tuple[float, float] | None, feasible: bool = True
    ) -> None:
        """Report a training that `ask` proposed or that the history held as open.

        Args:
            hyperparameters: as proposed; keys may stand in any order.
            values: (kl, size); None, NaN or infinity if the training failed.
            feasible: whether the values lie in the feasible box; those outside rank behind all inside.

        Raises:
            KeyError: no such training of this space is open. One outside the space teaches nothing, and is
                let pass: a training of an edited sweep file's earlier space is still finished. So is one that was
                told before: stopped, and then taken up again.
        """
        key = parse_hyperparameters(hyperparameters)
        if not self.holds(hyperparameters) or key in self._told:
            return
        trial = self._open.pop(key)
        self._told.add(key)
        if values is None or not all(map(math.isfinite, values)):
            self._study.tell(trial, state=TrialState.FAIL)
            return
        kl, size = values
        trial.set_constraint("feasible_box", 0.0 if feasible else 1.0)
        self._study.tell(trial, [math.log2(max(kl, _SMALLEST_KL)), math.log2(max(size, _SMALLEST_SIZE))])

    def _remember(self, past: Past) -> None:
        point = canonical(past.hyperparameters)
        if parse_hyperparameters(point) in self._seen or not self.holds(point):
            return
        self._accept(self._start_trial(point))
        if past.state != "open":
            self.tell(point, past.values if past.state in ("finished", "stopped") else None, past.feasible)

    def holds(self, hyperparameters: Mapping[str, Any]) -> bool:
        """Whether the space has this training."""
        point = canonical(hyperparameters)
        return any(contains(alternative, point) for alternative in self._alternatives)

    def _placed(self, trial: Trial) -> Trial:
        """Where the proposal is carried out: at the proposed point, or at one that stands for it in a replay."""
        return trial

    def _accept(self, trial: Trial) -> dict[str, Any]:
        point = self._hyperparameters(trial)
        key = parse_hyperparameters(point)
        self._seen.add(key)
        self._open[key] = trial
        return point

    def _given_first(self) -> Trial | None:
        while self._first:
            point = self._first.pop(0)
            if self.holds(point) and parse_hyperparameters(point) not in self._seen:
                return self._start_trial(point)
        return None

    def _sample_unseen(self) -> Trial | None:
        for attempt in range(_SAMPLER_ATTEMPTS + _FALLBACK_ATTEMPTS):
            name = self.sampler if attempt < _SAMPLER_ATTEMPTS else self._fallback
            self._study.sampler = self._make_sampler(name, attempt)
            trial = self._start_trial()
            point = self._hyperparameters(trial)
            is_new = parse_hyperparameters(point) not in self._seen
            if is_new and self._index_of(trial) == self._first_with(point):
                return trial
            self._study.tell(trial, state=TrialState.FAIL)
            if is_new:
                # of overlapping alternatives the first has the point, as it will when the study is rebuilt
                return self._start_trial(point)
        return None

    def _enumerate_unseen(self) -> Trial | None:
        if self._points is None:
            points = grid(self._alternatives) if self.sampler == "grid" else enumerate_space(self._alternatives)
            self._points = iter(points or ())
            self._next_point = next(self._points, None)
        while self._next_point is not None and parse_hyperparameters(self._next_point) in self._seen:
            self._next_point = next(self._points, None)
        return None if self._next_point is None else self._start_trial(self._next_point)

    def _make_sampler(self, name: str, attempt: int) -> optuna.samplers.BaseSampler:
        """A fresh sampler for every proposal: its random state depends on the history's length alone."""
        state = np.random.SeedSequence((self._seed, len(self._seen), attempt)).generate_state(1)
        return make_sampler(name, self._trainings, int(state[0]))

    def _start_trial(self, point: Mapping[str, Any] | None = None) -> Trial:
        """A running Optuna trial with all its parameters set: to `point`, or as the sampler likes."""
        if point is not None:
            self._study.sampler = self._make_sampler(self._fallback, attempt=0)
            index = self._first_with(point)
            fixed = {self._parameter(index, name): point[name] for name in dimensions(self._alternatives[index])}
            self._study.enqueue_trial({"alternative": index, **fixed} if self._conditional else fixed)
        trial = self._study.ask()
        index = self._suggest_alternative(trial)
        for name in dimensions(self._alternatives[index]):
            self._suggest(trial, index, name)
        return trial

    def _suggest_alternative(self, trial: Trial) -> int:
        if not self._conditional:
            return 0
        return trial.suggest_categorical("alternative", list(range(len(self._alternatives))))

    def _suggest(self, trial: Trial, index: int, name: str) -> None:
        parameter, setting = self._parameter(index, name), self._alternatives[index][name]
        if not isinstance(setting, Range):
            trial.suggest_categorical(parameter, setting)
        elif is_integer(name):
            trial.suggest_int(parameter, round(setting.low), round(setting.high), log=setting.log)
        else:
            trial.suggest_float(parameter, setting.low, setting.high, log=setting.log)

    def _first_with(self, point: Mapping[str, Any]) -> int:
        return next(index for index, each in enumerate(self._alternatives) if contains(each, point))

    def _index_of(self, trial: Trial) -> int:
        return trial.params["alternative"] if self._conditional else 0

    def _hyperparameters(self, trial: Trial) -> dict[str, Any]:
        index = self._index_of(trial)
        alternative = self._alternatives[index]
        varying = {name: trial.params[self._parameter(index, name)] for name in dimensions(alternative)}
        # A list of one value does not vary, yet is a list.
        fixed = {
            name: setting[0] if isinstance(setting, list) else setting
            for name, setting in alternative.items()
            if name not in varying
        }
        return canonical(fixed | varying)

    @property
    def _conditional(self) -> bool:
        return len(self._alternatives) > 1

    def _parameter(self, index: int, name: str) -> str:
        """Optuna wants one distribution per parameter name, and alternatives may differ in theirs."""
        return f"{index}.{name}" if self._conditional else name
