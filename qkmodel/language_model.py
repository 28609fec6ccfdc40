"""A language model behind transformer_lens' TransformerBridge, and the four things read from it."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby

import torch
import transformers
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from qkmodel.configs import ModelConfig
from qkmodel.errors import InputError
from qkmodel.model_description import ModelDescription, describe_model, model_folder
from qkmodel.tokenizer import load_tokenizer


class LanguageModel:
    """A frozen float32 model with eager attention, its tokenizer and its description.

    The tokenizer is as its files say: whether it adds special tokens by itself differs between families, so
    ask for `add_special_tokens=False`.
    """

    def __init__(
        self, hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, description: ModelDescription
    ) -> None:
        """Wraps `hf_model` in place.

        Raises:
            InputError: transformer_lens has no adapter for the model's architecture.
        """
        self.description = description
        self.tokenizer = tokenizer
        self.architecture = type(hf_model).__name__
        try:
            # without its tokenizer, which the bridge would otherwise reload and make add BOS
            self.bridge: TransformerBridge = build_bridge_from_module(
                hf_model.eval().requires_grad_(False),
                self.architecture,
                hf_config=hf_model.config,
                model_name=description.name,
            )
        except ValueError as error:
            raise InputError(
                f"model.name {description.name}: transformer_lens does not support {self.architecture} ({_line(error)})"
            ) from error

    @property
    def device(self) -> torch.device:
        """Where the weights are and tokens are moved to."""
        return next(self.bridge.original_model.parameters()).device

    def capture(self, tokens: Int[Tensor, "batch context"], names: Sequence[str]) -> dict[str, Tensor]:
        """The tensors at the bridge's hooks `names`, given in the order in which the forward pass reaches them.

        The forward pass ends at the last of them.
        """
        with self._capturing(names) as run:
            return run(tokens)

    def attention_inputs(
        self, tokens: Int[Tensor, "batch context"], layers: Sequence[int]
    ) -> dict[int, Float[Tensor, "batch context d_model"]]:
        """For each of `layers` the tensor that its query and key projections receive: the normed residual stream.

        One forward pass in float32, which ends where the deepest of `layers` has received it.
        """
        return next(self.attention_inputs_of_batches([tokens], layers, torch.float32))

    def attention_inputs_of_batches(
        self,
        batches: Iterable[Int[Tensor, "batch context"]],
        layers: Sequence[int],
        products: torch.dtype,
        threads: int = 1,
        stored: torch.dtype | None = None,
    ) -> Iterator[dict[int, Float[Tensor, "batch context d_model"]]]:
        """The attention inputs of many batches, in their order.

        Matrix products are made in `products`; the residual stream stays float32. `threads` run different batches,
        each with torch's own threads, of which one is best then: no result depends on how many there are. At
        most two batches more than `threads` are in memory, before or after their pass, and no thread waits for the
        next to be asked for. With `stored` the inputs come rounded to it, in the CPU's memory.
        """
        names = {f"blocks.{layer}.attn.hook_in": layer for layer in sorted(layers)}

        def inputs(tokens: Int[Tensor, "batch context"]) -> dict[int, Float[Tensor, "batch context d_model"]]:
            with torch.autocast(self.device.type, products, enabled=products != torch.float32):
                found = {names[name]: x for name, x in run(tokens).items()}
            return found if stored is None else {layer: x.to("cpu", stored) for layer, x in found.items()}

        with self._capturing(list(names)) as run, ThreadPoolExecutor(threads) as pool:
            # one size at a time: transformer_lens keeps a batch's size on the model, for learned positions
            for _, of_one_size in groupby(batches, key=len):
                yield from _in_order(pool, inputs, of_one_size, threads + 1)

    @contextlib.contextmanager
    def _capturing(self, names: Sequence[str]) -> Iterator[Callable[[Tensor], dict[str, Tensor]]]:
        """Hooks for the time of the context, and a function that any thread may run the model with."""
        of_thread = threading.local()

        def keep(tensor: Tensor, hook: object) -> None:
            of_thread.captured[hook.name] = tensor.clone()
            if hook.name == names[-1]:
                raise StopAtLayerException(tensor)

        @torch.no_grad()
        def run(tokens: Int[Tensor, "batch context"]) -> dict[str, Tensor]:
            of_thread.captured = {}
            with contextlib.suppress(StopAtLayerException):
                self.bridge(tokens.to(self.device), use_cache=False)
            return of_thread.captured

        with self.bridge.hooks(fwd_hooks=[(name, keep) for name in names]):
            yield run

    def attention_pattern(
        self, tokens: Int[Tensor, "batch context"], layer: int
    ) -> Float[Tensor, "batch n_heads context context"]:
        """The model's own attention pattern of `layer`, in one forward pass up to there."""
        name = f"blocks.{layer}.attn.hook_pattern"
        return self.capture(tokens, [name])[name]

    def cross_entropy(
        self,
        tokens: Int[Tensor, "batch context"],
        layer: int | None = None,
        pattern: Float[Tensor, "batch n_heads context context"] | None = None,
        products: torch.dtype = torch.float32,
    ) -> tuple[float, int]:
        """Next-token cross-entropy in nats, summed, and the number of predicted tokens, batch · (context − 1).

        With `pattern`, `layer` attends by it instead of by its own. Matrix products are made in `products`.
        """
        if layer is None or pattern is None:
            return self._run_to_loss(tokens, products), tokens[:, 1:].numel()
        (patched,) = self.cross_entropies(tokens, layer, [lambda: pattern], products)
        return patched, tokens[:, 1:].numel()

    def cross_entropies(
        self,
        tokens: Int[Tensor, "batch context"],
        layer: int,
        patterns: Sequence[Callable[[], Float[Tensor, "batch n_heads context context"]]],
        products: torch.dtype = torch.float32,
        threads: int = 1,
    ) -> list[float]:
        """Summed cross-entropy (nats) for each of the patterns that `layer` is made to attend by.

        `threads` run different patterns, each with single-threaded arithmetic, and each asks for its pattern itself.
        """
        of_thread = threading.local()

        def patch(own: Tensor, hook: object) -> Tensor:
            return of_thread.pattern.to(own)

        def run(pattern: Callable[[], Tensor]) -> float:
            of_thread.pattern = pattern()
            return self._run_to_loss(tokens, products)

        with (
            self.bridge.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_pattern", patch)]),
            ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            return list(pool.map(run, patterns))

    @torch.no_grad()
    def _run_to_loss(self, tokens: Int[Tensor, "batch context"], products: torch.dtype) -> float:
        tokens = tokens.to(self.device)
        with torch.autocast(self.device.type, products, enabled=products != torch.float32):
            logits = self.bridge(tokens, use_cache=False)
        # one sequence at a time: log-probabilities of a whole batch would be as large as the logits again
        return sum(
            torch.nn.functional.cross_entropy(row[:-1].float(), target[1:], reduction="sum").item()
            for row, target in zip(logits, tokens, strict=True)
        )


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[Tensor], dict[int, Tensor]], items: Iterable[Tensor], ahead: int
) -> Iterator[dict[int, Tensor]]:
    """What `work` makes of each item, in their order, while up to `ahead` more are under way or done."""
    under_way: deque[Future[dict[int, Tensor]]] = deque()
    try:
        for item in items:
            under_way.append(pool.submit(work, item))
            if len(under_way) > ahead:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        for future in under_way:
            future.cancel()


def load_language_model(config: ModelConfig, device: str = "cpu") -> LanguageModel:
    """Load weights and tokenizer of the model that `config` names.

    The first load of a bundled model converts it, once per machine (about ten seconds).

    Raises:
        InputError: as `describe_model`, or the weights cannot be loaded as `config` allows.
    """
    description = describe_model(config)
    folder = model_folder(config)
    transformers.utils.logging.disable_progress_bar()
    try:
        hf_model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=config.safetensors_only or None,
            trust_remote_code=config.trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"model.name {config.name}: {folder} cannot be loaded ({_line(error)})") from error
    # transformers fills what it misses with random numbers
    if loading["missing_keys"]:
        raise InputError(f"model.name {config.name}: {folder} lacks the weights {sorted(loading['missing_keys'])[0]}")
    return LanguageModel(hf_model.to(device), load_tokenizer(config), description)


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
