"""A pack: trainings of one layer in lockstep on shared batches.

Every batch's activations, true queries and keys, and true pattern are computed once and used by all
members; nothing else is shared, so a packed training equals the same training alone bit for bit. A pack's threads
step different members at once, each with single-threaded arithmetic, so the number of threads changes no result; on a
GPU, where streams take their place, they only make batches.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from qkmodel.activation_stream import StreamedActivations
from qkmodel.activations import ActivationCache
from qkmodel.allocator import give_back_memory, keep_freed_memory
from qkmodel.attention import AttentionLayer
from qkmodel.configs import TrainingConfig
from qkmodel.errors import InputError
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.lockstep import Lockstep
from qkmodel.member import Member, SharedBatch
from qkmodel.pack_graphs import PackGraphs
from qkmodel.pattern_kl import true_pattern
from qkmodel.products import product_dtype
from qkmodel.reference import LayerReference
from qkmodel.schema import Schema
from qkmodel.sparse_code import centred_inputs
from qkmodel.tensor_file import read_tensor_file, write_tensor_file


def learning_rate_factor(training: TrainingConfig, progress: float) -> float:
    """What the learning rate is multiplied with when the share `progress` of a training is done.

    Over `warmup_share` it rises from 0 in a straight line. Then `constant`: 1; `linear`: 1 until half of the training,
    then a straight line down to 0; `cosine`: half a wave from 1 down to 0.
    """
    if progress < training.warmup_share:
        return progress / training.warmup_share
    if training.learning_rate_schedule == "cosine":
        share = (progress - training.warmup_share) / (1.0 - training.warmup_share)
        return (1.0 + math.cos(math.pi * share)) / 2.0
    if training.learning_rate_schedule == "linear":
        return min(1.0, 2.0 * (1.0 - progress))
    return 1.0


def shared_batch(x: torch.Tensor, layer: AttentionLayer, reference: LayerReference, dtype: torch.dtype) -> SharedBatch:
    """What members read of the inputs `x` [batch, context, d_model]; products are made in `dtype`."""
    return SharedBatch(centred_inputs(x - reference.mean_input, dtype), true_pattern(layer, *layer.project(x), dtype))


class PackTrainer(Lockstep):
    """Trains members on the layer's device.

    `threads` step different members at once; more threads than members stay idle. `members` may be taken out of the
    list between two calls of `train`, and cost nothing from then on.
    """

    def __init__(
        self,
        members: Sequence[Hyperparameters],
        layer: AttentionLayer,
        cache: ActivationCache | StreamedActivations,
        reference: LayerReference,
        training: TrainingConfig,
        seed: int,
        threads: int = 1,
    ) -> None:
        super().__init__(layer, cache, training, seed)
        self.reference = reference
        self.threads = threads
        self.dtype = product_dtype(training.precision, layer.w_q.device)
        self.members = [Member(hyperparameters, layer, reference, training) for hyperparameters in members]
        self._graphs = PackGraphs(self._share) if layer.w_q.device.type == "cuda" else None

    def train(self, steps: int, may_go_on: Callable[[], bool] = lambda: True) -> None:
        """Trains every member for `steps` further steps, or until the training's end.

        `may_go_on` is asked before every step, while the one before is still under way; a no leaves the members whole,
        after their last one. Raises what a member's step raises; members may then be a step apart, and of no use.
        """
        last = min(self.steps_done + steps, self.steps_planned)
        if self.steps_done == last or not may_go_on():
            return
        keep_freed_memory()
        # of evaluations and of making members
        give_back_memory()
        prepare, step = (self._prepare_on_gpu, self._step_on_gpu) if self._graphs else (self._shared_batch, self._step)
        with ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            following, under_way = pool.submit(prepare, self.steps_done), []
            while self.steps_done < last:
                batch = following.result()
                if self._graphs:
                    batch = self._graphs.take()
                # the next batch is made while members step
                if self.steps_done + 1 < last:
                    following = pool.submit(prepare, self.steps_done + 1)
                under_way = step(batch, pool, under_way)
                self.steps_done += 1
                if self.steps_done < last and not may_go_on():
                    break
            for stepped in under_way:
                stepped.result()
        give_back_memory()

    def _shared_batch(self, step: int) -> SharedBatch:
        return self._share(self.cache.read(self.layer.geometry.layer, "train", self.sequences_of(step)))

    def _prepare_on_gpu(self, step: int) -> None:
        x = self.cache.read_stored(self.layer.geometry.layer, "train", self.sequences_of(step))
        # page-locked, which a GPU copies from while it computes
        self._graphs.prepare(x if x.is_cuda else x.pin_memory())

    @torch.no_grad()
    def _share(self, x: Tensor) -> SharedBatch:
        return shared_batch(x, self.layer, self.reference, self.dtype)

    def _step(self, batch: SharedBatch, pool: ThreadPoolExecutor, under_way: list[Future]) -> list[Future]:
        """Starts a step of each member, then waits for the steps before: members may be one step apart."""
        before = under_way or [None] * len(self.members)
        where = self._where()
        started = [
            pool.submit(_step_after, one, member, batch, *where)
            for one, member in zip(before, self.members, strict=True)
        ]
        for stepped in under_way:
            stepped.result()
        return started

    def _step_on_gpu(self, batch: SharedBatch, _pool: ThreadPoolExecutor, _under_way: list[Future]) -> list[Future]:
        self._graphs.step(batch, self.members, *self._where())
        return []

    def _where(self) -> tuple[float, float]:
        """The learning rate's factor and the share of the training that is done, of the next step."""
        progress = self.steps_done / self.steps_planned
        return learning_rate_factor(self.training, progress), progress


def _step_after(before: Future | None, member: Member, batch: SharedBatch, factor: float, progress: float) -> None:
    if before is not None:
        before.result()
    member.step(batch, factor, progress)


class CheckpointHeader(Schema):
    """What a checkpoint says of itself; `progress` are the figures reported with it, if any were."""

    format: Literal[3] = 3
    training_id: str
    steps_done: int = Field(ge=0)
    progress: dict[str, float | None] = Field(default_factory=dict)


class Checkpointed(Protocol):
    """A training whose exact state goes into a checkpoint and comes back from it."""

    @property
    def is_finite(self) -> bool: ...

    def state_tensors(self) -> dict[str, Tensor]: ...

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None: ...


def save_checkpoint(
    member: Checkpointed,
    path: Path,
    training_id: str,
    steps_done: int,
    progress: Mapping[str, float | None] | None = None,
) -> None:
    """Writes one member's exact state, atomically."""
    header = CheckpointHeader(training_id=training_id, steps_done=steps_done, progress=dict(progress or {}))
    write_tensor_file(path, header, member.state_tensors())


def read_checkpoint_header(path: Path, training_id: str) -> CheckpointHeader:
    """What a training's checkpoint says of itself.

    Raises InputError when the file is damaged or belongs to another training.
    """
    return _read_checkpoint(path, training_id)[0]


def load_checkpoint(member: Checkpointed, path: Path, training_id: str) -> int:
    """Restores one member's exact state and returns the steps it had done.

    Raises InputError when the file is damaged, belongs to another training, or does not fit.
    """
    header, tensors = _read_checkpoint(path, training_id)
    try:
        member.load_state_tensors(tensors)
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{path}: does not fit training {training_id} ({error}); delete it to start over") from error
    return header.steps_done


def _read_checkpoint(path: Path, training_id: str) -> tuple[CheckpointHeader, dict[str, Tensor]]:
    header, tensors = read_tensor_file(path, CheckpointHeader)
    if header.training_id != training_id:
        raise InputError(f"{path}: not a checkpoint of training {training_id}; delete it to start over")
    return header, tensors
