"""Packs without Ray: a real queue on a real ledger, real searches, real checkpoints, and reports made by hand."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from orchestrator.budget import Budget, Limits
from orchestrator.checkpoints import Checkpoints, checkpoint_path, newest_checkpoint
from orchestrator.identity import training_id
from orchestrator.ledger import Ledger, Training
from orchestrator.ledger_place import place_in
from orchestrator.pack_order import MemberReport, PackOrder
from orchestrator.pack_queue import PackQueue, QueueSettings, StudyWork, history
from orchestrator.search.allocation import Allocation
from orchestrator.search.halving import Halving
from orchestrator.search.study import StudySearch
from qkmodel.configs import CorpusConfig, ModelConfig, TrainingConfig
from qkmodel.dictionary import CorpusIdentity, ModelIdentity
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.member import Member
from qkmodel.pack import save_checkpoint
from qkmodel.reference import LayerReference
from tests.qkmodel.layers import random_layer

STEPS, TOKENS_PER_STEP = 8, 100
TOKENS = STEPS * TOKENS_PER_STEP
GRID = {"dictionary_size": [128, 256], "activation": "topk", "k": [4, 8], "learning_rate": 3e-3}
LAYERS = {"early": 4, "late": 8}


@dataclass
class Driver:
    """One start of a sweep: what `orchestrator.sweep` wires together, without Ray around it."""

    ledger: Ledger
    queue: PackQueue
    folder: Path
    searches: dict[str, StudySearch]

    def report(self, order: PackOrder, steps: int, **metrics: float) -> None:
        """Every member has got as far as `steps`: checkpoint written, then reported, as a worker does."""
        for member in order.members:
            write_checkpoint(self.folder, member.training_id, steps)
        self.queue.record(order.pack_id, [progress(member.training_id, steps, **metrics) for member in order.members])

    def finish(self, order: PackOrder) -> None:
        """Every member's last report, and the pack's end."""
        self.queue.record(order.pack_id, [final(member.training_id) for member in order.members])
        self.queue.end(order.pack_id, None)

    def states(self) -> Counter[str]:
        return Counter(training.state for training in self.ledger.trainings())


def start(
    folder: Path,
    *,
    studies: Sequence[str] = ("late",),
    space: dict[str, Any] = GRID,
    sampler: str = "grid",
    trainings: int = 4,
    pack_size: int = 3,
    halving: Halving | None = None,
    allocation: Allocation = "even",
    new: int | None = None,
    limits: Limits = Limits(),
    is_wanted: Callable[[Training], bool] = lambda training: training.state != "finished",
) -> Driver:
    """Start or continue the sweep in `folder`; `is_wanted` says which recorded trainings are to be continued."""
    ledger = Ledger(place_in(folder))
    ledger.open_sweep("test", {}, None, {})
    works = []
    for study in studies:
        ledger.open_study(study, "transcoder", LAYERS[study], {}, model="m", corpus="c")
        ledger.set_reference(study, {"kl_baseline": 2.0, "l0_cap": 64.0})
        recorded = ledger.trainings(study)
        wanted = {training.training_id for training in recorded if is_wanted(training)}
        search = StudySearch([space], sampler, trainings, 0, history(ledger, study, wanted))
        works.append(
            StudyWork(study, search, TOKENS_PER_STEP, STEPS, template(folder, LAYERS[study]), {"threads": 2}, wanted)
        )
    settings = QueueSettings(pack_size, halving, allocation, new)
    queue = PackQueue(ledger, works, Checkpoints(folder), settings, Budget(limits, ledger, studies, start=1))
    return Driver(ledger, queue, folder, {work.study_id: work.search for work in works})


def template(folder: Path, layer: int) -> Callable[..., PackOrder]:
    corpus = CorpusConfig(name="text.txt")
    return partial(
        PackOrder,
        task="transcoder",
        start=1,
        threads=2,
        sweep_folder=folder,
        cache_folder=folder / "cache",
        streamed=False,
        device="cpu",
        reference_file=folder / "reference",
        model_identity=ModelIdentity(
            config=ModelConfig(name="smollm2-135m"), weights_sha256="aa", layer=layer, hook="hook"
        ),
        corpus_identity=CorpusIdentity(config=corpus, bos=None, sha256="cc"),
        training=TrainingConfig(tokens=TOKENS),
        seed=0,
    )


def progress(training: str, steps: int, seconds: float = 1.0, **metrics: float) -> MemberReport:
    return MemberReport(training_id=training, tokens=steps * TOKENS_PER_STEP, seconds=seconds, metrics=metrics)


def final(training: str, kl: float | None = 0.1, l0: float | None = 16.0) -> MemberReport:
    return MemberReport(
        training_id=training,
        tokens=TOKENS,
        seconds=1.0,
        metrics={"kl": kl, "l0": l0, "kl_recovered": 0.9},
        dictionary=f"dictionaries/{training}",
        dictionary_sha256="dd",
    )


def given_up(training: str, steps: int) -> MemberReport:
    return MemberReport(
        training_id=training, tokens=steps * TOKENS_PER_STEP, seconds=1.0, metrics={}, error="loss was not finite"
    )


@cache
def small_member() -> Member:
    layer = random_layer(d_model=4, d_head=2, n_heads=1, n_kv_heads=1, rotary_dim=2)
    reference = LayerReference(torch.zeros(4), torch.zeros(2), torch.zeros(2), 1.0, 1.0, 1.0, 0.0, None, None)
    hyperparameters = Hyperparameters(dictionary_size=2, activation="topk", k=1, learning_rate=1e-3)
    return Member(hyperparameters, layer, reference, TrainingConfig(tokens=1))


def write_checkpoint(folder: Path, training: str, steps: int, figures: Mapping[str, float] | None = None) -> None:
    """A real checkpoint, of a small member: the queue reads its head alone."""
    path = checkpoint_path(folder, 1, training, steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(small_member(), path, training, steps, dict(figures or {}))


def steps_on_disk(folder: Path, training: str) -> int:
    found = newest_checkpoint(folder, training)
    return 0 if found is None else found[1].steps_done


def ids(order: PackOrder) -> list[str]:
    return [member.training_id for member in order.members]


def take(driver: Driver) -> PackOrder:
    order = driver.queue.next_pack()
    assert isinstance(order, PackOrder)
    return order


def grid_ids(study: str = "late") -> list[str]:
    points = [{**GRID, "dictionary_size": size, "k": k} for size in GRID["dictionary_size"] for k in GRID["k"]]
    return [training_id(study, point) for point in points]
