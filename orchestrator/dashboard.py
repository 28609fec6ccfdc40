"""A sweep's studies as optuna-dashboard shows them: written anew from the ledger, read by nobody else."""

import importlib.util
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.engine import URL

from orchestrator.ledger import Ledger
from orchestrator.ledger_records import Training
from orchestrator.objectives import OBJECTIVES
from orchestrator.pareto import final_values
from orchestrator.study_names import study_names
from qkmodel.errors import InputError

DASHBOARD_FILE = "optuna.sqlite"
# a log axis where values span at least this factor
_LOG_SPAN = 8
_STATES = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}


def export_studies(ledger: Ledger) -> str:
    """Writes the studies to a file in the sweep's folder, in place of the last export, and answers its address.

    Minimised are `kl` and `l0`, or those of pair masks. Trainings that are still to end are left out; stopped ones are
    pruned trials. Raises InputError on a machine that does not have the folder.
    """
    ledger.require_folder()
    path = ledger.folder / DASHBOARD_FILE
    for old in (path, *path.parent.glob(f"{DASHBOARD_FILE}-*")):
        old.unlink(missing_ok=True)
    address = URL.create("sqlite", database=str(path)).render_as_string()
    studies = ledger.studies()
    names = study_names(studies)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = optuna.storages.RDBStorage(address)
        for study in studies:
            name = f"{ledger.sweep().name} {names[study.study_id]}"
            exported = optuna.create_study(storage=storage, study_name=name, directions=["minimize"] * 2)
            exported.set_metric_names([OBJECTIVES[study.task].kl, OBJECTIVES[study.task].size])
            exported.add_trials(list(_trials(ledger.trainings(study.study_id))))
    finally:
        optuna.logging.set_verbosity(verbosity)
    return address


def dashboard_command(address: str, port: int) -> list[str]:
    """The command that serves an export on this machine's loopback address.

    Raises InputError when optuna-dashboard is not installed.
    """
    if importlib.util.find_spec("optuna_dashboard") is None:
        raise InputError("--dashboard: optuna-dashboard is not installed; pip install optuna-dashboard")
    program = str(Path(sys.executable).with_name("optuna-dashboard"))
    return [program, address, "--host", "127.0.0.1", "--port", str(port)]


def _trials(trainings: Sequence[Training]) -> Iterator[FrozenTrial]:
    distributions = _distributions([training.hyperparameters for training in trainings])
    for training in trainings:
        if training.state not in _STATES:
            continue
        params = {name: value for name, value in training.hyperparameters.items() if name in distributions}
        values = final_values(training) if training.state == "finished" else None
        has_values = training.state != "finished" or values is not None
        yield create_trial(
            state=_STATES[training.state] if has_values else TrialState.FAIL,
            params=params,
            distributions={name: distributions[name] for name in params},
            values=values,
            user_attrs={"training_id": training.training_id, "label": training.label},
        )


def _distributions(points: Sequence[dict[str, Any]]) -> dict[str, BaseDistribution]:
    """Of what differs between trainings: the range of the values that there are."""
    found: dict[str, BaseDistribution] = {}
    for name in dict.fromkeys(name for point in points for name in point):
        values = [point[name] for point in points if point.get(name) is not None]
        if len(set(values)) > 1:
            found[name] = _distribution(values)
    return found


def _distribution(values: Sequence[Any]) -> BaseDistribution:
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
        return CategoricalDistribution(sorted(set(map(str, values))))
    low, high = min(values), max(values)
    log = low > 0 and high / low >= _LOG_SPAN
    if all(isinstance(value, int) for value in values):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(float(low), float(high), log=log)
