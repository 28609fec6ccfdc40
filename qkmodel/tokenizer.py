"""A model's tokenizer by itself, and what its tokens look like to a reader."""

from collections.abc import Sequence

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qkmodel.configs import ModelConfig
from qkmodel.errors import InputError
from qkmodel.model_description import model_folder

_NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model that `config` names, without its weights.

    Raises:
        InputError: as `describe_model`, or the tokenizer's files cannot be loaded as `config` allows.
    """
    folder = model_folder(config)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"model.name {config.name}: no tokenizer can be loaded from {folder} ({reason})") from error


def token_texts(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """The text of each token, spaces kept. A token that is a part of a character is shown as the vocabulary has it."""
    texts = [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in tokens]
    pieces = tokenizer.convert_ids_to_tokens(list(tokens))
    return [piece if _NO_CHARACTER in text else text for text, piece in zip(texts, pieces, strict=True)]
