"""Small language models with random weights, one per attention family.

Weights are drawn wide enough, norms away from one and contexts longer than the windows, so that no ingredient
of the attention can be left out unnoticed.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from qkmodel.language_model import LanguageModel
from qkmodel.model_description import ModelDescription

VOCABULARY, CONTEXT, WINDOW = 64, 24, 7

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "head_dim": 8}
_YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 16}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, scale_attn_by_inverse_layer_idx=True
    ),
    "pythia": GPTNeoXConfig(**_COMMON, rope_parameters={"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}),
    "llama3": LlamaConfig(**_GROUPED, rope_parameters=_LLAMA3),
    "yarn": LlamaConfig(**_GROUPED, rope_parameters=_YARN),
    "qwen3": Qwen3Config(**_GROUPED),
    "gemma2": Gemma2Config(**_GROUPED, sliding_window=WINDOW, query_pre_attn_scalar=5, attn_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(
        **_GROUPED,
        sliding_window=WINDOW,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "mistral": MistralConfig(**_GROUPED, sliding_window=WINDOW),
    "glm": GlmConfig(**_GROUPED, attention_bias=True),
}


def random_hf_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A float32 model of `config` whose parameters are all random, biases and norms included."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.3)
    return model.eval()


def save_random_model(config: PreTrainedConfig, folder: Path) -> None:
    """A model folder as the hub has them: `random_hf_model`, and a tokenizer of the words in `write_corpus`' texts."""
    random_hf_model(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"Text": 0, "of": 1, "twelve.": 2}, unk_token="of"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def wrap(hf_model: PreTrainedModel) -> LanguageModel:
    """`hf_model` as a LanguageModel without files and tokenizer."""
    config = hf_model.config
    description = ModelDescription(
        name="random",
        slug="random",
        weights_sha256="0" * 64,
        tokenizer_sha256="0" * 64,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", config.num_attention_heads),
        d_head=getattr(config, "head_dim", config.hidden_size // config.num_attention_heads),
        d_model=config.hidden_size,
        max_context=CONTEXT,
        soft_cap=getattr(config, "attn_logit_softcapping", None),
        vocabulary_size=config.vocab_size,
        vocabulary_matrices=1 if config.tie_word_embeddings else 2,
    )
    return LanguageModel(hf_model, None, description)


def random_tokens(batch: int = 3) -> torch.Tensor:
    """`[batch, CONTEXT]` token ids."""
    return torch.randint(VOCABULARY, (batch, CONTEXT), generator=torch.Generator().manual_seed(1))
