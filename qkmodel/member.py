"""One training inside a pack: its transcoder, its optimiser, its penalties, and one step of it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qkmodel.attention import AttentionLayer
from qkmodel.configs import TrainingConfig
from qkmodel.hyperparameters import Hyperparameters, SideHyperparameters
from qkmodel.kernels.pattern_kl_terms import TruePattern
from qkmodel.loss_sums import LossSums
from qkmodel.pattern_kl import pattern_kl
from qkmodel.reference import LayerReference
from qkmodel.sparse_code import CentredInputs
from qkmodel.sparsity import PENALTIES, JumpReLU, jump_penalty
from qkmodel.sparsity_control import Coefficient
from qkmodel.transcode import Side, transcode
from qkmodel.transcoder import QKTranscoder, Transcoder, initialise_qk_transcoder


@dataclass(frozen=True)
class SharedBatch:
    """What all members read of one batch."""

    inputs: CentredInputs
    true: TruePattern


class SidePenalty(nn.Module):
    """λ·Ω of one side; zero for activations that are sparse by construction."""

    def __init__(self, side: SideHyperparameters) -> None:
        super().__init__()
        self.penalty = PENALTIES[side.penalty]() if side.penalty is not None else None
        self.coefficient = Coefficient(side)

    def forward(self, transcoder: Transcoder, side: Side, progress: float) -> Tensor | float:
        if isinstance(transcoder.activation, JumpReLU):
            omega = jump_penalty(side.pre, transcoder.activation, transcoder.decoder_norms())
        elif self.penalty is not None:
            omega = self.penalty(side.scaled(transcoder.decoder_norms()), len(side.y), progress)
        else:
            return 0.0
        return self.coefficient.value.item() * omega


class Member:
    """One training inside a pack, on the device of its layer.

    Whatever its next step depends on, besides the data, is in `state_tensors`.
    """

    def __init__(
        self,
        hyperparameters: Hyperparameters,
        layer: AttentionLayer,
        reference: LayerReference,
        training: TrainingConfig,
    ) -> None:
        self.hyperparameters = hyperparameters
        self.gradient_clip = training.gradient_clip
        self.d_head = layer.geometry.d_head
        self.transcoder: QKTranscoder = initialise_qk_transcoder(
            hyperparameters,
            layer,
            reference.mean_input,
            reference.mean_query,
            reference.mean_key,
            reference.input_rms,
        )
        self.penalties = nn.ModuleDict(
            {"query": SidePenalty(hyperparameters.query_side), "key": SidePenalty(hyperparameters.key_side)}
        )
        self.optimiser = _adam(self.transcoder, hyperparameters.learning_rate)
        self.losses = LossSums(reference.mean_input.device)

    def step(self, batch: SharedBatch, learning_rate_factor: float, progress: float) -> None:
        """One optimiser step on one batch; `progress` is the share of the training that is done."""
        self.set_learning_rate(learning_rate_factor)
        self.descend(batch, progress)

    @property
    def is_recordable(self) -> bool:
        """Whether `descend` is the same operations at every step, so that a CUDA graph may record it."""
        sides = (self.hyperparameters.query_side, self.hyperparameters.key_side)
        return all(side.penalty != "p_annealing" and side.target_l0 is None for side in sides)

    def set_learning_rate(self, factor: float) -> None:
        """The learning rate of the next step, as a multiple of the hyperparameter."""
        for group in self.optimiser.param_groups:
            rate = self.hyperparameters.learning_rate * factor
            # a CUDA graph reads it where it is
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate

    def descend(self, batch: SharedBatch, progress: float) -> None:
        """A step with the learning rate that is set."""
        context = batch.inputs.context
        query = transcode(self.transcoder.query, batch.inputs)
        key = transcode(self.transcoder.key, batch.inputs)
        q_hat, k_hat = (side.y.view(-1, context, side.y.shape[-1] // self.d_head, self.d_head) for side in (query, key))
        pattern_loss = pattern_kl(q_hat, k_hat, batch.true)
        loss = pattern_loss.total
        loss = loss + self.penalties["query"](self.transcoder.query, query, progress)
        loss = loss + self.penalties["key"](self.transcoder.key, key, progress)
        loss.backward()
        if self.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.transcoder.parameters(), self.gradient_clip)
        self.optimiser.step()
        # now, not before the next step: members that wait hold no gradients
        self.optimiser.zero_grad(set_to_none=True)
        counted = q_hat.shape[0] * (context - 1)
        l0 = {"query": query.active / counted, "key": key.active / counted}
        for name, value in l0.items():
            self.penalties[name].coefficient.observe(value, progress)
        self.losses.add(loss=loss, train_kl=pattern_loss.full, train_l0=(l0["query"] + l0["key"]) / 2)

    @property
    def is_finite(self) -> bool:
        """Whether every weight is a number. Losses do not tell: the kernels take that for granted."""
        return all(parameter.isfinite().all() for parameter in self.transcoder.parameters())

    def state_tensors(self) -> dict[str, Tensor]:
        """Weights, optimiser moments, what penalties remember, and losses that were not read yet."""
        tensors = {f"transcoder.{name}": value for name, value in self.transcoder.state_dict().items()}
        tensors |= {f"penalties.{name}": value for name, value in self.penalties.state_dict().items()}
        tensors |= {f"losses.{name}": value for name, value in self.losses.state_tensors().items()}
        for name, parameter in self.transcoder.named_parameters():
            for key, value in self.optimiser.state[parameter].items():
                tensors[f"optimiser.{name}.{key}"] = value
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_tensors`.

        Raises KeyError or RuntimeError when a tensor is missing or has another shape.
        """
        for prefix, module in (("transcoder.", self.transcoder), ("penalties.", self.penalties)):
            module.load_state_dict(
                {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            )
        losses = {name: value for name, value in tensors.items() if name.startswith("losses.")}
        self.losses.load_state_tensors({name.removeprefix("losses."): value for name, value in losses.items()})
        for name, parameter in self.transcoder.named_parameters():
            loaded = {key: tensors[f"optimiser.{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            if loaded["exp_avg"].shape != parameter.shape or loaded["exp_avg_sq"].shape != parameter.shape:
                raise RuntimeError(f"optimiser moments of {name} do not have its shape {tuple(parameter.shape)}")
            state = self.optimiser.state[parameter]
            for key, value in loaded.items():
                # in place where there are moments already, since a CUDA graph knows where they are
                state[key] = state[key].copy_(value) if key in state else value.to(parameter.device, copy=True)


def _adam(transcoder: QKTranscoder, learning_rate: float) -> torch.optim.Adam:
    parameters = list(transcoder.parameters())
    if parameters[0].device.type == "cpu":
        return torch.optim.Adam(parameters, lr=learning_rate, fused=True)
    rate = torch.tensor(learning_rate, device=parameters[0].device)
    return torch.optim.Adam(parameters, lr=rate, fused=True, capturable=True)
