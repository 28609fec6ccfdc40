"""How long a plan takes on this machine, from a short measurement of its own steps."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.config import SweepConfig
from orchestrator.late_checks import CheckedPlan, cache_threads
from orchestrator.pack_size import geometry_of, kinds_of_training
from orchestrator.packs.inputs import BRIEF_SEQUENCES
from orchestrator.plan import SweepPlan
from qkmodel.activation_request import MissingWork, missing_work, request_bytes
from qkmodel.activations import DTYPES
from qkmodel.allocator import give_back_memory, keep_freed_memory
from qkmodel.attention import AttentionLayer
from qkmodel.forward_batch import forward_sequences
from qkmodel.language_model import LanguageModel
from qkmodel.member import Member, SharedBatch
from qkmodel.pack import shared_batch
from qkmodel.pattern_comparison import evaluation_batch, patched_batch
from qkmodel.products import product_dtype
from qkmodel.reference import LayerReference

# Loading models and libraries, starting Ray, the report, the last delivery to MLflow.
STARTUP_SECONDS = 30.0
TIMED_STEPS = 2


@dataclass(frozen=True)
class Estimate:
    """Work that is left and the seconds it takes on this machine.

    `cache` is what the activation cache still lacks, `cache_bytes` its size once it lacks nothing; with `streamed` it
    holds no training activations, and packs compute them.

    Measured: one forward pass to the deepest layer, one through the whole model, and optimiser steps of the
    space's trainings on random activations of the right shape; on a GPU one after the other and launched kernel by
    kernel, which takes some twice as long as a pack's graphs. Assumed: a sequence costs in evaluation what it costs
    in a step, packs that run side by side do not slow each other down, and halving stops as many as it promises.
    """

    cache_bytes: int
    cache: MissingWork
    streamed: bool
    cache_seconds: float
    training_seconds: float | None
    evaluation_seconds: float | None

    @property
    def seconds(self) -> float | None:
        """None where trainings cannot be reckoned."""
        if self.training_seconds is None:
            return None
        return STARTUP_SECONDS + self.cache_seconds + self.training_seconds + self.evaluation_seconds


def estimate(checked: CheckedPlan) -> Estimate:
    """Measures for some ten seconds; loads the model unless nothing is left to do.

    Of pair masks only the activation cache is reckoned: what a mask costs hangs on which features are active together.
    Neither can a machine without a GPU tell of trainings on one.
    """
    plan, config = checked.plan, checked.plan.config
    whole = request_bytes(checked.manifest, checked.request)
    if plan.trainings_left == 0:
        return Estimate(whole, MissingWork(0, 0), False, 0.0, 0.0, 0.0)
    missing = missing_work(checked.manifest, checked.request)
    streamed = checked.request.streamed_sequences > 0
    if config.task == "pair_mask" or (plan.device == "cuda" and not torch.cuda.is_available()):
        seconds = 0.0
        if missing.sequences:
            with _one_thread():
                model = checked.load_model()
                seconds = _forward_seconds(plan, model)[0] * missing.sequences / _passes_at_once(config, model)
        return Estimate(whole, missing, streamed, seconds, None, None)
    model = checked.load_model()
    forward_seconds, whole_model_seconds, shared_seconds, step_seconds = _measure(plan, model)
    batch = config.training.batch_sequences
    steps = plan.tokens_per_training // (batch * config.corpus.context)
    reports = -(-steps // config.training.report_steps(batch * config.corpus.context)) - 1
    evaluated = plan.validation_sequences + reports * min(BRIEF_SEQUENCES, plan.validation_sequences)
    threads = 1 if plan.device == "cuda" else min(max(1, int(config.resources.pack.cpu)), plan.pack_size)
    at_once = min(plan.slots, plan.packs) * threads
    trainings_in_turn, packs_in_turn = plan.trainings_left * plan.share_trained / at_once, plan.packs / at_once
    batch_seconds = trainings_in_turn * step_seconds + packs_in_turn * shared_seconds
    streaming_seconds = packs_in_turn * forward_seconds * batch if streamed else 0.0
    return Estimate(
        cache_bytes=whole,
        cache=missing,
        streamed=streamed,
        cache_seconds=missing.sequences * forward_seconds / _passes_at_once(config, model),
        training_seconds=steps * (batch_seconds + streaming_seconds),
        evaluation_seconds=evaluated / batch * batch_seconds
        + trainings_in_turn * config.training.patched_sequences * whole_model_seconds,
    )


def _passes_at_once(config: SweepConfig, model: LanguageModel) -> int:
    """A GPU does one after the other, however many there are at once."""
    return 1 if model.device.type == "cuda" else cache_threads(config)


def _measure(plan: SweepPlan, model: LanguageModel) -> tuple[float, float, float, float]:
    """Seconds of one thread.

    Of one sequence's forward pass to the deepest requested layer and through the whole model; what a pack shares of a
    step; a training's own part of it.
    """
    with _one_thread():
        return *_forward_seconds(plan, model), *_step_seconds(plan)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """What is measured runs as it will: with one of torch's threads, and memory that is kept."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        give_back_memory()


def _forward_seconds(plan: SweepPlan, model: LanguageModel) -> tuple[float, float]:
    vocabulary = model.bridge.original_model.get_input_embeddings().num_embeddings
    context, device = plan.config.corpus.context, model.device.type
    deepest, products = [max(plan.config.layers)], DTYPES[plan.cache_key.products]

    def of_one_sequence(batch: int, run: Callable[[Tensor], object]) -> float:
        tokens = torch.randint(0, vocabulary, (batch, context))
        return _seconds(lambda: run(tokens)) / batch

    return (
        of_one_sequence(
            forward_sequences(context, device, evaluation_batch(context)),
            lambda tokens: next(model.attention_inputs_of_batches([tokens], deepest, products)),
        ),
        of_one_sequence(patched_batch(context, device), lambda tokens: model.cross_entropy(tokens, products=products)),
    )


def _step_seconds(plan: SweepPlan) -> tuple[float, float]:
    """What a pack shares, and the mean over the kinds of training in the space of what it does not."""
    layer = _random_layer(plan).to(plan.device)
    shape = (plan.config.training.batch_sequences, plan.config.corpus.context, layer.geometry.d_model)
    x = torch.randn(shape, device=plan.device)
    training, reference = plan.config.training, _neutral_reference(layer)
    dtype = product_dtype(training.precision, x.device)
    batch = shared_batch(x, layer, reference, dtype)
    kinds = kinds_of_training(plan.config.search.space)
    own = sum(_member_seconds(Member(kind, layer, reference, training), batch) for kind in kinds) / len(kinds)
    return _seconds(lambda: shared_batch(x, layer, reference, dtype)), own


def _member_seconds(member: Member, batch: SharedBatch) -> float:
    return _seconds(lambda: member.step(batch, 1.0, 0.0))


def _seconds(work: Callable[[], object]) -> float:
    def timed(times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started

    timed(1)
    return timed(TIMED_STEPS) / TIMED_STEPS


def _random_layer(plan: SweepPlan) -> AttentionLayer:
    geometry = geometry_of(plan.model)
    shapes = geometry.tensor_shapes()
    return AttentionLayer.from_tensors(
        geometry, {name: torch.randn(shape) * geometry.d_model**-0.5 for name, shape in shapes.items()}
    )


def _neutral_reference(layer: AttentionLayer) -> LayerReference:
    geometry, device = layer.geometry, layer.w_q.device
    sizes = (geometry.d_model, geometry.n_heads * geometry.d_head, geometry.n_kv_heads * geometry.d_head)
    means = (torch.zeros(size, device=device) for size in sizes)
    return LayerReference(*means, 1.0, 1.0, 1.0, 0.0, None, None)
