"""Training activations without a cache of them: one forward pass of the model per batch, shared by a pack."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from qkmodel.activations import DTYPES, ActivationCache, Split
from qkmodel.errors import InputError
from qkmodel.forward_batch import forward_sequences

if TYPE_CHECKING:
    from qkmodel.language_model import LanguageModel


class StreamedActivations:
    """An activation cache of one layer whose training activations are computed whenever they are read.

    Tokens, and everything of the validation split, come from `cache`. The model computes in the cache's product type
    and its outputs are rounded as the cache's are; only that a batch here holds other sequences than one of the
    cache's does can change a last digit.
    """

    def __init__(self, cache: ActivationCache, model: "LanguageModel") -> None:
        self._cache = cache
        self._model = model

    @property
    def context(self) -> int:
        return self._cache.context

    @property
    def train_sequences_available(self) -> int | None:
        """Training sequences of the whole corpus, None when it has more than anyone has asked for."""
        return self._cache.train_sequences_available

    def read(self, layer: int, split: Split, indices: Iterable[int]) -> Float32[Tensor, "sequence context d_model"]:
        """The activations of the sequences `indices`, in that order; training sequences on the model's device.

        Raises InputError for a sequence whose tokens are not in the cache, and for activations that are not finite.
        """
        return self.read_stored(layer, split, indices).float()

    def read_stored(
        self, layer: int, split: Split, indices: Iterable[int]
    ) -> Float[Tensor, "sequence context d_model"]:
        """The same in the cache's element type."""
        if split == "validation":
            return self._cache.read_stored(layer, split, indices)
        key = self._cache.manifest.key
        tokens = self._cache.tokens(split, indices)
        batches = tokens.split(forward_sequences(self.context, self._model.device.type, len(tokens)))
        inputs = self._model.attention_inputs_of_batches(batches, [layer], DTYPES[key.products])
        x = torch.cat([of_batch[layer] for of_batch in inputs])
        if not x.isfinite().all():
            raise InputError(f"model: layer {layer} receives NaN or infinity on this corpus; it cannot be trained on")
        return x.to(DTYPES[key.dtype])
