"""A pack: trainings of one layer in lockstep on shared batches.

Every batch's activations, true queries and keys, and true pattern are computed once and used by all
members; nothing else is shared, so a packed training equals the same training alone bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from qkmodel.activations import ActivationCache
from qkmodel.attention import AttentionLayer
from qkmodel.configs import TrainingConfig
from qkmodel.data_order import batch_sequences, sequences_per_epoch
from qkmodel.errors import InputError
from qkmodel.hyperparameters import Hyperparameters
from qkmodel.pattern_kl import PatternTarget, pattern_kl, pattern_target
from qkmodel.reference import LayerReference
from qkmodel.schema import Schema
from qkmodel.sparsity import make_penalty
from qkmodel.tensor_file import read_tensor_file, write_tensor_file
from qkmodel.transcoder import QKTranscoder, initialise_qk_transcoder


def learning_rate_factor(schedule: str, tokens_done: int, tokens: int) -> float:
    """What the learning rate is multiplied with after `tokens_done` of `tokens` tokens.

    `constant`: 1. `linear`: 1 over the first half of the tokens, then a straight line down to 0.
    """
    if schedule == "constant":
        return 1.0
    return min(1.0, 2.0 * (1.0 - tokens_done / tokens))


@dataclass(frozen=True)
class SharedBatch:
    """What all members read of one batch."""

    centred: Float[Tensor, "tokens d_model"]
    target: PatternTarget


@dataclass
class LossSums:
    """Sums over the steps since the last reading, in float64."""

    steps: int = 0
    values: dict[str, float] = field(default_factory=dict)

    def add(self, **values: float) -> None:
        self.steps += 1
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0.0) + value

    def take_means(self) -> dict[str, float]:
        means = {name: value / self.steps for name, value in self.values.items()}
        self.steps, self.values = 0, {}
        return means


class Member:
    """One training inside a pack: its transcoder, its optimiser, its running losses."""

    def __init__(self, hyperparameters: Hyperparameters, layer: AttentionLayer, reference: LayerReference) -> None:
        self.hyperparameters = hyperparameters
        self.layer = layer
        self.transcoder: QKTranscoder = initialise_qk_transcoder(
            hyperparameters, layer, reference.mean_input, reference.mean_query, reference.mean_key
        )
        self.penalty: nn.Module | None = make_penalty(hyperparameters)
        self.optimiser = torch.optim.Adam(self.transcoder.parameters(), lr=hyperparameters.learning_rate, fused=True)
        self.losses = LossSums()

    def step(self, batch: SharedBatch, learning_rate_factor: float) -> None:
        """One optimiser step on one batch."""
        geometry = self.layer.geometry
        context = batch.target.pattern.shape[-1]
        f_query = self.transcoder.query.encode_centred(batch.centred)
        f_key = self.transcoder.key.encode_centred(batch.centred)
        q_hat = self.transcoder.query.decode(f_query).view(-1, context, geometry.n_heads, geometry.d_head)
        k_hat = self.transcoder.key.decode(f_key).view(-1, context, geometry.n_kv_heads, geometry.d_head)
        pattern_loss = pattern_kl(q_hat, k_hat, batch.target)
        loss = pattern_loss.total
        if self.penalty is not None:
            omega = self.penalty(f_query * self.transcoder.query.decoder_norms())
            omega = omega + self.penalty(f_key * self.transcoder.key.decoder_norms())
            loss = loss + self.hyperparameters.sparsity_coefficient * omega
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        for group in self.optimiser.param_groups:
            group["lr"] = self.hyperparameters.learning_rate * learning_rate_factor
        self.optimiser.step()
        self.losses.add(loss=loss.item(), train_kl=pattern_loss.full.item())

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on besides the data: weights and optimiser moments."""
        tensors = {f"transcoder.{name}": value for name, value in self.transcoder.state_dict().items()}
        for name, parameter in self.transcoder.named_parameters():
            for key, value in self.optimiser.state[parameter].items():
                tensors[f"optimiser.{name}.{key}"] = value
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_tensors`.

        Raises KeyError or RuntimeError when a tensor is missing or has another shape.
        """
        prefix = "transcoder."
        self.transcoder.load_state_dict(
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        )
        for name, parameter in self.transcoder.named_parameters():
            state = {key: tensors[f"optimiser.{name}.{key}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
            if state["exp_avg"].shape != parameter.shape or state["exp_avg_sq"].shape != parameter.shape:
                raise RuntimeError(f"optimiser moments of {name} do not have its shape {tuple(parameter.shape)}")
            self.optimiser.state[parameter] = state


class PackTrainer:
    """Trains members in lockstep; `tokens_done` counts the tokens that each member has seen."""

    def __init__(
        self,
        members: Sequence[Hyperparameters],
        layer: AttentionLayer,
        cache: ActivationCache,
        reference: LayerReference,
        training: TrainingConfig,
        seed: int,
    ) -> None:
        self.layer = layer
        self.cache = cache
        self.reference = reference
        self.training = training
        self.seed = seed
        self.steps_done = 0
        self.members = [Member(hyperparameters, layer, reference) for hyperparameters in members]

    @property
    def tokens_per_step(self) -> int:
        return self.training.batch_sequences * self.cache.context

    @property
    def tokens_done(self) -> int:
        return self.steps_done * self.tokens_per_step

    @property
    def steps_planned(self) -> int:
        """Steps of a whole training: `training.tokens` rounded up to whole batches."""
        return -(-self.training.tokens // self.tokens_per_step)

    @property
    def finished(self) -> bool:
        return self.steps_done >= self.steps_planned

    def train(self, steps: int) -> None:
        """Trains every member for `steps` further steps, or until the training's end."""
        for _ in range(min(steps, self.steps_planned - self.steps_done)):
            batch = self._shared_batch(self.steps_done)
            factor = learning_rate_factor(
                self.training.learning_rate_schedule, self.tokens_done, self.steps_planned * self.tokens_per_step
            )
            for member in self.members:
                member.step(batch, factor)
            self.steps_done += 1

    @torch.no_grad()
    def _shared_batch(self, step: int) -> SharedBatch:
        available = sequences_per_epoch(self.training, self.cache.context, self.cache.train_sequences_available)
        numbers = batch_sequences(step, self.training.batch_sequences, available, self.seed)
        x = self.cache.read(self.layer.geometry.layer, "train", numbers)
        target = pattern_target(self.layer, *self.layer.project(x))
        return SharedBatch((x - self.reference.mean_input).flatten(0, 1), target)


class CheckpointHeader(Schema):
    """What a checkpoint says of itself."""

    format: Literal[1] = 1
    training_id: str
    steps_done: int = Field(ge=0)


def save_checkpoint(member: Member, path: Path, training_id: str, steps_done: int) -> None:
    """Writes one member's exact state, atomically."""
    write_tensor_file(path, CheckpointHeader(training_id=training_id, steps_done=steps_done), member.state_tensors())


def checkpoint_steps(path: Path, training_id: str) -> int:
    """Steps done by the training whose checkpoint this is.

    Raises InputError when the file is damaged or belongs to another training.
    """
    return _read_checkpoint(path, training_id)[0]


def load_checkpoint(member: Member, path: Path, training_id: str) -> int:
    """Restores one member's exact state and returns the steps it had done.

    Raises InputError when the file is damaged, belongs to another training, or does not fit.
    """
    steps, tensors = _read_checkpoint(path, training_id)
    try:
        member.load_state_tensors(tensors)
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{path}: does not fit training {training_id} ({error}); delete it to start over") from error
    return steps


def _read_checkpoint(path: Path, training_id: str) -> tuple[int, dict[str, Tensor]]:
    header, tensors = read_tensor_file(path, CheckpointHeader)
    if header.training_id != training_id:
        raise InputError(f"{path}: not a checkpoint of training {training_id}; delete it to start over")
    return header.steps_done, tensors
