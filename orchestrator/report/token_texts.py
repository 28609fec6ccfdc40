"""The texts of a corpus's tokens, or their ids where the tokenizer cannot be had."""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from orchestrator.ledger_records import Study
from qkmodel.configs import ModelConfig
from qkmodel.errors import InputError
from qkmodel.model_description import describe_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenTexts:
    """`missing` says in a line why ids are shown; None while every tokenizer was to be had."""

    def __init__(self) -> None:
        self.missing: str | None = None
        self._load = cache(_load)

    def of(self, model: ModelConfig, study: Study, tokens: Sequence[int]) -> list[str]:
        """What each token of a study's sequences looks like: its text, or its id as text."""
        # takes seconds to import
        from qkmodel.tokenizer import token_texts

        if self.missing is not None:
            # asked once: a hub that does not answer costs seconds
            return [str(token) for token in tokens]
        try:
            return token_texts(self._load(model, study.identity.get("tokenizer_sha256")), tokens)
        except InputError as error:
            self.missing = f"token ids are shown in place of texts: {error}"
            return [str(token) for token in tokens]


def _load(model: ModelConfig, tokenizer_sha256: str | None) -> "PreTrainedTokenizerBase":
    """Raises InputError when it is not there, or not the one whose tokens the study was trained on."""
    from qkmodel.tokenizer import load_tokenizer

    if describe_model(model).tokenizer_sha256 != tokenizer_sha256:
        raise InputError(f"model.name {model.name}: its tokenizer is no longer the one of this sweep")
    return load_tokenizer(model)
