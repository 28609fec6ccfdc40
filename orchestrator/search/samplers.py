"""Which sampler proposes trainings, and how it is set up."""

import warnings
from collections.abc import Sequence

import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from orchestrator.search.space import Alternative, grid_size, is_finite_choice, is_numeric

# Fitting the Gaussian processes costs about a second per proposal from here on, and more with every training.
_GP_TRAININGS = 100
# Up to here TPE is quick enough, and ahead of NSGA-II at equal budget.
_NSGA2_TRAININGS = 1000


def resolve_auto(alternatives: Sequence[Alternative], trainings: int) -> str:
    """The sampler that `auto` stands for.

    - `grid` if there are only values and lists, and the budget covers all their combinations: any sampler
      would end up there.
    - `gp` if only ranges vary, there is one alternative and there are at most 100 trainings: it learns most
      from each of them.
    - `tpe` otherwise, multivariate: lists, alternatives, or too many trainings for a Gaussian process.
    - `nsga2` from 1,000 trainings of one alternative: TPE finds better fronts in the same number, but a
      proposal takes longer with every training it has seen (40 ms each over the first 600).
    """
    if all(map(is_finite_choice, alternatives)) and grid_size(alternatives) <= trainings:
        return "grid"
    if len(alternatives) > 1:
        return "tpe"
    if trainings >= _NSGA2_TRAININGS:
        return "nsga2"
    return "gp" if is_numeric(alternatives[0]) and trainings <= _GP_TRAININGS else "tpe"


class RebuildableNSGAIISampler(NSGAIISampler):
    """NSGA-II that goes on from trials whose parameters were given, as in a study rebuilt from its history.

    Optuna files a trial under its generation only if it samples it, so given trials would never be parents;
    and it lists the parents by merit until it has cached them and by number from then on.
    """

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        super().before_trial(study, trial)
        self.get_trial_generation(study, trial)

    def select_parent(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        return sorted(super().select_parent(study, generation), key=lambda trial: trial.number)


def make_sampler(name: str, trainings: int, seed: int) -> BaseSampler:
    """An Optuna sampler: `random`, `tpe`, `gp` or `nsga2`.

    `tpe` and `gp` count trainings that still run as if their outcome were known (constant liar, pending
    points), so that proposals asked for at once differ. They start with a few random proposals, a quarter
    of the budget and at most 10.
    """
    startup = max(2, min(10, trainings // 4))
    with warnings.catch_warnings():
        # `group`, without which TPE cannot follow conditional hyperparameters, is marked experimental.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match name:
            case "random":
                return RandomSampler(seed=seed)
            case "tpe":
                return TPESampler(
                    n_startup_trials=startup, multivariate=True, group=True, constant_liar=True, seed=seed
                )
            case "gp":
                return GPSampler(n_startup_trials=startup, seed=seed)
            case "nsga2":
                return RebuildableNSGAIISampler(population_size=max(4, min(50, trainings // 10)), seed=seed)
    raise ValueError(f"no sampler is named {name}")
