"""Texts of tokens, with the bundled model's tokenizer."""

import pytest

from qkmodel.configs import ModelConfig
from qkmodel.errors import InputError
from qkmodel.tokenizer import load_tokenizer, token_texts
from tests.qkmodel.random_models import CONFIGS, random_hf_model

pytestmark = pytest.mark.system


def test_texts_of_tokens_make_up_the_text() -> None:
    tokenizer = load_tokenizer(ModelConfig(name="smollm2-135m"))
    text = "  The <script>state</script> of\n our union , it 's strong"
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    assert "".join(token_texts(tokenizer, tokens)) == text


def test_a_part_of_a_character_is_shown_as_the_vocabulary_has_it() -> None:
    tokenizer = load_tokenizer(ModelConfig(name="smollm2-135m"))
    tokens = tokenizer("a 𐎀", add_special_tokens=False).input_ids
    texts = token_texts(tokenizer, tokens)
    assert texts[0] == "a" and len(texts) > 2
    assert all(text and "�" not in text for text in texts)


def test_a_folder_without_tokenizer_is_refused_by_name(tmp_path) -> None:
    random_hf_model(CONFIGS["llama3"]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no tokenizer can be loaded"):
        load_tokenizer(ModelConfig(name=str(tmp_path)))
