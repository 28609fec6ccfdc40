"""From documents to token sequences of one length: split, tokenise, pack, shuffle, and which token opens a sequence."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int, Int32
from torch import Tensor

from qkmodel.configs import CorpusConfig
from qkmodel.documents import read_documents, seeded_hash, seeded_order
from qkmodel.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qkmodel.language_model import LanguageModel

# Sequences change places only within a block of this many, so that a longer request of a corpus begins
# with the shorter one's blocks, and a streamed corpus is read no further than the last block needed.
SHUFFLE_BLOCK = 4096
# documents are tokenised together up to this many characters
_BATCH_CHARACTERS = 1 << 20
# sequences on which the tokens that could open a sequence are compared
_BOS_SEQUENCES = 16
_NO_BOS = "none"


@dataclass(frozen=True)
class TokenisedCorpus:
    """The sequences of both sides of a corpus.

    `…_available` is the number of sequences that the whole corpus has on that side, or None when the
    corpus was not read to its end. `…_documents` counts the documents that were tokenised.
    """

    train: Int32[Tensor, "sequence context"]
    validation: Int32[Tensor, "sequence context"]
    bos: str | None
    bos_id: int | None
    train_documents: int
    validation_documents: int
    train_sequences_available: int | None
    validation_sequences_available: int | None


@dataclass(frozen=True)
class BosChoice:
    """The token that lets a model predict a text best, and the mean cross-entropy (nats per token) of each candidate.

    The candidate without any opening token is called "none".
    """

    bos: str | None
    cross_entropies: dict[str, float]


def tokenise(
    config: CorpusConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seed: int,
    bos: str | None,
    train_sequences: int | None,
    validation_sequences: int | None,
) -> TokenisedCorpus:
    """The first sequences of each side of the corpus; None asks for all, and fewer come when it holds fewer.

    Documents, not sequences, are dealt to the two sides, by a hash of `seed` and their text: copies of a
    text stay together. A side's documents are joined with `bos` between them and cut into `context` − 1
    tokens behind a `bos` (`context` tokens when `bos` is None); what is left over at the end is dropped.
    Sequence i of a side depends on config, tokeniser, seed and bos, never on how many were asked for.
    `config.bos` is not looked at: `bos` is what it
    resolved to. Raises InputError for an unknown `bos` and for a corpus with nothing on one side.
    """
    bos_id = None if bos is None else token_id(tokenizer, bos)
    train = _Side("training", config, bos_id, train_sequences)
    validation = _Side("validation", config, bos_id, validation_sequences)

    def side_of(text: str) -> _Side:
        return validation if _is_validation(text, config, seed) else train

    for texts in _batches(read_documents(config, seed)):
        # a full side needs no more of its documents
        wanted = [(side, text) for side, text in ((side_of(text), text) for text in texts) if not side.full]
        for (side, _), tokens in zip(wanted, _encode(tokenizer, [text for _, text in wanted]), strict=True):
            side.add(tokens)
        if train.full and validation.full:
            break
    return TokenisedCorpus(
        train=train.sequences(seed),
        validation=validation.sequences(seed),
        bos=bos,
        bos_id=bos_id,
        train_documents=train.documents,
        validation_documents=validation.documents,
        train_sequences_available=train.available,
        validation_sequences_available=validation.available,
    )


def choose_bos(model: "LanguageModel", config: CorpusConfig, seed: int) -> BosChoice:
    """Which of the tokeniser's own separators, or none, gives `model` its lowest cross-entropy on this text.

    Every candidate is scored on the same tokens of the same held-out sequences, all but the first, which a
    model without an opening token cannot predict.
    """
    text = tokenise(
        config, model.tokenizer, seed=seed, bos=None, train_sequences=0, validation_sequences=_BOS_SEQUENCES
    ).validation[:, : config.context - 1]
    cross_entropies = {
        _NO_BOS if bos is None else bos: _continuation_cross_entropy(model, text.long(), bos)
        for bos in _bos_candidates(model.tokenizer)
    }
    best = min(cross_entropies, key=lambda name: cross_entropies[name])
    return BosChoice(bos=None if best == _NO_BOS else best, cross_entropies=cross_entropies)


class _Side:
    """One side of the split: its documents' tokens as far as they have been read."""

    def __init__(self, name: str, config: CorpusConfig, bos_id: int | None, wanted: int | None):
        self.documents = 0
        self.tokens = 0
        self._name = name
        self._config = config
        self._bos_id = bos_id
        # tokens a sequence takes from the text
        self._body = config.context - (bos_id is not None)
        self._wanted = wanted
        # whole blocks, so that a block's shuffle does not depend on the request
        blocks = None if wanted is None else -(-wanted // SHUFFLE_BLOCK)
        self._limit = None if blocks is None else blocks * SHUFFLE_BLOCK * self._body
        self._parts: list[np.ndarray] = []

    @property
    def full(self) -> bool:
        return self._limit is not None and self.tokens >= self._limit

    @property
    def available(self) -> int | None:
        return None if self.full else self.tokens // self._body

    def add(self, document: np.ndarray) -> None:
        if self.documents > 0 and self._bos_id is not None:
            document = np.concatenate([np.array([self._bos_id], dtype=np.int32), document])
        self._parts.append(document)
        self.documents += 1
        self.tokens += len(document)

    def sequences(self, seed: int) -> Int32[Tensor, "sequence context"]:
        """The wanted sequences in their final order."""
        if self._wanted == 0:
            return torch.empty(0, self._config.context, dtype=torch.int32)
        if self.documents == 0:
            raise InputError(
                f"corpus.name: none of {self._config.name}'s documents is a {self._name} document; give it more "
                "documents (a .txt file is one), or change corpus.validation_documents or seed"
            )
        stream = np.concatenate(self._parts)[: self._limit]
        count = len(stream) // self._body
        if count == 0:
            raise InputError(
                f"corpus.context: the {self._name} documents of {self._config.name} hold {len(stream)} tokens, "
                f"less than one sequence of {self._config.context}"
            )
        bodies = stream[: count * self._body].reshape(count, self._body)
        bodies = bodies[self._order(count, seed)[: self._wanted]]
        if self._bos_id is not None:
            bodies = np.pad(bodies, ((0, 0), (1, 0)), constant_values=self._bos_id)
        return torch.from_numpy(bodies)

    def _order(self, count: int, seed: int) -> list[int]:
        return [
            start + index
            for start in range(0, count, SHUFFLE_BLOCK)
            for index in seeded_order(min(SHUFFLE_BLOCK, count - start), seed, "sequences", self._name, start)
        ]


def _is_validation(text: str, config: CorpusConfig, seed: int) -> bool:
    return seeded_hash(seed, "split", text) < config.validation_documents * 2**64


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of documents that are worth a fast tokeniser's while."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[np.ndarray]:
    """Each text's token ids (int32). Text that spells a special token stays text."""
    if not texts:
        return []
    encoding = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        # a document is longer than the model's context by right
        verbose=False,
    )
    return [np.array(ids, dtype=np.int32) for ids in encoding["input_ids"]]


def token_id(tokenizer: "PreTrainedTokenizerBase", text: str) -> int:
    """The number of the token that `corpus.bos` names. Raises InputError when there is none."""
    # convert_tokens_to_ids answers unk_token's id for an unknown text, and some models' unk is their separator
    number = tokenizer.get_vocab().get(text)
    if number is None:
        own = ", ".join(repr(bos) for bos in _bos_candidates(tokenizer) if bos is not None)
        raise InputError(f"corpus.bos: {text!r} is no token of this tokeniser; its own are {own}; null for none")
    return number


def _bos_candidates(tokenizer: "PreTrainedTokenizerBase") -> list[str | None]:
    named = [tokenizer.bos_token, tokenizer.eos_token, "<|endoftext|>"]
    vocabulary = tokenizer.get_vocab()
    return [*dict.fromkeys(token for token in named if token in vocabulary), None]


def _continuation_cross_entropy(model: "LanguageModel", text: Int[Tensor, "sequence token"], bos: str | None) -> float:
    """Mean nats per token over text[:, 1:], given what comes before it and `bos` before everything."""
    if bos is None:
        nats, count = model.cross_entropy(text)
        return nats / count
    opener = torch.full((len(text), 1), token_id(model.tokenizer, bos))
    opened = torch.cat([opener, text], dim=1)
    nats, count = model.cross_entropy(opened)
    # the model is causal, so the first token's share is what two-token sequences score
    first_nats, first_count = model.cross_entropy(opened[:, :2])
    return (nats - first_nats) / (count - first_count)
