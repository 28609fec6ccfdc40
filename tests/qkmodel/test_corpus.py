import itertools
import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import qkmodel.corpus
from qkmodel.configs import CorpusConfig
from qkmodel.corpus import choose_bos, tokenise
from qkmodel.errors import InputError

BOS = "<|start|>"
TEXTS = [f"{number}: " + chr(97 + number % 26) * (number % 23) for number in range(300)]


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token="<|end|>", unk_token="<|endoftext|>")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 8 sequences, so that small corpora have several."""
    monkeypatch.setattr(qkmodel.corpus, "SHUFFLE_BLOCK", 8)


def write_corpus(folder, texts, **fields):
    path = folder / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return CorpusConfig(name=str(path), **{"context": 16, "validation_documents": 0.3} | fields)


def tokenise_all(config, tokenizer, bos=BOS, seed=0, train=None, validation=None):
    return tokenise(config, tokenizer, seed=seed, bos=bos, train_sequences=train, validation_sequences=validation)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 60), min_size=30, max_size=60),
    context=st.integers(3, 24),
    bos=st.sampled_from([BOS, None]),
    seed=st.integers(0, 3),
)
def test_packing_is_the_joined_documents_cut_up(tmp_path_factory, tokenizer, lengths, context, bos, seed):
    texts = [chr(0x61 + index % 26) * length for index, length in enumerate(lengths)]
    config = write_corpus(tmp_path_factory.mktemp("packing"), texts, context=context)
    corpus = tokenise_all(config, tokenizer, bos=bos, seed=seed)

    bos_id = tokenizer.convert_tokens_to_ids(bos) if bos else None
    for name in ("train", "validation"):
        sequences = getattr(corpus, name).tolist()
        if bos:
            assert all(row[0] == bos_id for row in sequences)
        bodies = [tuple(row[bool(bos) :]) for row in sequences]
        # the reference: documents of this side in the order they are read, joined, cut, leftover dropped
        documents = [
            tokenizer(text)["input_ids"]
            for text in qkmodel.corpus.read_documents(config, seed)
            if qkmodel.corpus._is_validation(text, config, seed) == (name == "validation")
        ]
        joined = []
        for document in documents:
            joined += ([bos_id] if joined and bos else []) + document
        size = context - bool(bos)
        cut = [tuple(joined[start : start + size]) for start in range(0, len(joined) - size + 1, size)]
        assert len(bodies) == len(cut) == getattr(corpus, f"{name}_sequences_available")
        for start in range(0, len(cut), 8):
            assert sorted(bodies[start : start + 8]) == sorted(cut[start : start + 8])


def test_a_longer_request_begins_with_the_shorter(tmp_path, tokenizer):
    config = write_corpus(tmp_path, TEXTS)
    everything = tokenise_all(config, tokenizer)
    available = everything.train_sequences_available
    assert available == len(everything.train) > 40
    for train, validation in itertools.product((0, 1, 7, 8, 9, 30, available, available + 5), (1, 13)):
        part = tokenise_all(config, tokenizer, train=train, validation=validation)
        assert torch.equal(part.train, everything.train[:train])
        assert torch.equal(part.validation, everything.validation[:validation])
    assert part.train_sequences_available == available
    assert tokenise_all(config, tokenizer, train=8, validation=8).train_sequences_available is None


def test_a_short_request_reads_no_further_than_it_must(tmp_path, tokenizer, monkeypatch):
    config = write_corpus(tmp_path, TEXTS)
    monkeypatch.setattr(qkmodel.corpus, "_BATCH_CHARACTERS", 1)
    read = 0

    def counted(config, seed, documents=qkmodel.corpus.read_documents):
        nonlocal read
        for text in documents(config, seed):
            read += 1
            yield text

    monkeypatch.setattr(qkmodel.corpus, "read_documents", counted)
    tokenise_all(config, tokenizer, train=8, validation=8)
    assert 0 < read < 100


def test_sequences_are_shuffled_by_the_seed(tmp_path, tokenizer):
    config = write_corpus(tmp_path, ["".join(chr(33 + number) for number in range(64)), "v" * 64, "w" * 64])
    config = config.model_copy(update={"context": 2, "validation_documents": 0.5})
    for seed in range(20):
        corpus = tokenise_all(config, tokenizer, seed=seed)
        bodies = corpus.train[:8, 1].tolist()
        if len(set(bodies)) == 8:
            assert bodies != sorted(bodies)
            break
    else:
        pytest.fail("no seed put the long document first")


def test_no_document_is_on_both_sides_and_copies_stay_together(tmp_path, tokenizer):
    # every text is one letter repeated, so a sequence tells whose document it is from
    letters = [chr(0x4E00 + number) for number in range(60)]
    config = write_corpus(tmp_path, [letter * 40 for letter in letters] * 3, validation_documents=0.5)
    corpus = tokenise_all(config, tokenizer)
    ids = {tuple(tokenizer(letter)["input_ids"]): letter for letter in letters}

    def letters_of(sequences):
        joined = [tuple(row[start : start + 3]) for row in sequences.tolist() for start in range(1, len(row) - 2)]
        return {ids[piece] for piece in joined if piece in ids}

    train, validation = letters_of(corpus.train), letters_of(corpus.validation)
    assert train and validation and not train & validation
    assert corpus.train_documents == 3 * len(train)
    assert corpus.validation_documents == 3 * len(validation)


def test_the_share_of_validation_documents_is_the_one_asked_for(tmp_path, tokenizer):
    texts = [f"document {number}" * 2 for number in range(2000)]
    corpus = tokenise_all(write_corpus(tmp_path, texts, validation_documents=0.1), tokenizer)
    # five standard deviations of a binomial
    assert abs(corpus.validation_documents - 200) < 5 * math.sqrt(2000 * 0.1 * 0.9)
    other = tokenise_all(write_corpus(tmp_path, texts, validation_documents=0.1), tokenizer, seed=1)
    assert not torch.equal(corpus.validation[:8], other.validation[:8])


def test_text_that_spells_a_special_token_stays_text(tmp_path, tokenizer):
    config = write_corpus(tmp_path, [f"{BOS} and <|endoftext|> {number}" * 4 for number in range(40)])
    special = set(tokenizer.all_special_ids)
    for row in tokenise_all(config, tokenizer, bos=None).train.tolist():
        assert not special & set(row)


def test_refusals(tmp_path, tokenizer):
    config = write_corpus(tmp_path, TEXTS)
    with pytest.raises(InputError, match=r"corpus\.bos: '<bos>' is no token .* '<\|start\|>', '<\|end\|>'"):
        tokenise_all(config, tokenizer, bos="<bos>")
    with pytest.raises(InputError, match=r"none of .* is a validation document"):
        tokenise_all(write_corpus(tmp_path, ["alone " * 100], validation_documents=1e-9), tokenizer)
    with pytest.raises(InputError, match="less than one sequence of 500"):
        tokenise_all(write_corpus(tmp_path, TEXTS[:20], context=500), tokenizer)


class BigramModel:
    """A causal language model with a table of logits: the cross-entropy of each bigram is known."""

    def __init__(self, tokenizer, seed=0):
        self.tokenizer = tokenizer
        size = len(tokenizer)
        self.log_probabilities = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)

    def nats(self, tokens):
        return -self.log_probabilities[tokens[:, :-1], tokens[:, 1:]].double()

    def cross_entropy(self, tokens):
        nats = self.nats(tokens)
        return nats.sum().item(), nats.numel()


class SinkModel(BigramModel):
    """Predicts everything better behind one opening token."""

    def __init__(self, tokenizer, opener):
        super().__init__(tokenizer)
        self.opener = tokenizer.convert_tokens_to_ids(opener)

    def nats(self, tokens):
        return super().nats(tokens) - (tokens[:, :1] == self.opener) * 0.5


def test_bos_candidates_are_scored_on_the_same_tokens(tmp_path, tokenizer):
    choice = choose_bos(BigramModel(tokenizer), write_corpus(tmp_path, TEXTS), seed=0)
    assert list(choice.cross_entropies) == [BOS, "<|end|>", "<|endoftext|>", "none"]
    # a bigram model does not care what opened the sequence, except at the first token, which must not count
    for value in choice.cross_entropies.values():
        assert value == pytest.approx(choice.cross_entropies["none"], abs=1e-9)


@pytest.mark.parametrize("opener", [BOS, "<|end|>", "<|endoftext|>"])
def test_bos_with_the_lowest_cross_entropy_wins(tmp_path, tokenizer, opener):
    choice = choose_bos(SinkModel(tokenizer, opener), write_corpus(tmp_path, TEXTS), seed=0)
    assert choice.bos == opener
    assert choice.cross_entropies[opener] == pytest.approx(choice.cross_entropies["none"] - 0.5, abs=1e-6)
