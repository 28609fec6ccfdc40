"""Which keys of a sweep file make other studies and other trainings, and which do not."""

import shutil
from pathlib import Path

import pytest

from orchestrator.config import load_sweep
from orchestrator.identity import study_id, study_identity, training_id
from orchestrator.plan import make_plan
from qkmodel.configs import CorpusConfig, TrainingConfig
from tests.orchestrator.sweep_files import write_corpus, write_sweep

SHARED = {
    "task": "transcoder",
    "weights_sha256": "aa",
    "tokenizer_sha256": "bb",
    "layer": 1,
    "corpus": CorpusConfig(name="text.txt", bos=None),
    "corpus_sha256": "cc",
    "bos": None,
    "training": TrainingConfig(tokens=10_000),
    "dtype": "bfloat16",
    "seed": 0,
}

# another valid value for every field; a new field has to be entered here, and so decided about
OTHER_TRAINING = {
    "tokens": 10_001,
    "batch_sequences": 9,
    "validation_sequences": 201,
    "report_tokens": 100,
    "cross_entropy_sequences": 0,
    "learning_rate_schedule": "linear",
    "warmup_share": 0.1,
    "gradient_clip": 1.0,
    "precision": "float32",
}
OTHER_CORPUS = {
    "name": "elsewhere/text.txt",
    "context": 129,
    "validation_documents": 0.2,
    "bos": "<|endoftext|>",
    "text_field": "body",
    "split": "test",
    "subset": "en",
}
OTHER_FACTS = {
    "task": "pair_mask",
    "weights_sha256": "a",
    "tokenizer_sha256": "b",
    "layer": 2,
    "corpus_sha256": "c",
    "bos": "<|endoftext|>",
    "dtype": "float32",
    "seed": 1,
}


def identify(**changed: object) -> str:
    return study_id(study_identity(**SHARED | changed))


def test_every_field_has_been_decided_about() -> None:
    assert OTHER_TRAINING.keys() == TrainingConfig.model_fields.keys()
    assert OTHER_CORPUS.keys() == CorpusConfig.model_fields.keys()
    assert OTHER_FACTS.keys() | {"corpus", "training"} == SHARED.keys()


@pytest.mark.parametrize("name", OTHER_TRAINING)
def test_every_field_of_training_but_the_report_interval_makes_another_study(name: str) -> None:
    other = identify(training=SHARED["training"].model_copy(update={name: OTHER_TRAINING[name]}))
    assert (other == identify()) == (name == "report_tokens")


@pytest.mark.parametrize("name", OTHER_CORPUS)
def test_how_the_corpus_is_cut_up_makes_another_study_and_how_it_is_found_does_not(name: str) -> None:
    """Which documents there are is in the corpus's hash, and the opening token counts as what it resolved to."""
    other = identify(corpus=SHARED["corpus"].model_copy(update={name: OTHER_CORPUS[name]}))
    assert (other != identify()) == (name in ("context", "validation_documents"))


def test_every_other_fact_makes_a_study_of_its_own() -> None:
    changed = [identify(**{name: value}) for name, value in OTHER_FACTS.items()]
    assert len({identify(), *changed}) == 1 + len(OTHER_FACTS)


def test_a_default_left_out_and_written_is_the_same_study() -> None:
    written = TrainingConfig.model_validate(SHARED["training"].model_dump())
    assert written.model_fields_set > SHARED["training"].model_fields_set
    assert identify(training=written) == identify()


TOPK = {"dictionary_size": 512, "activation": "topk", "k": 16, "learning_rate": 3e-3}
RELU = {
    "dictionary_size": 512,
    "activation": "relu",
    "penalty": "l1",
    "sparsity_coefficient": 1e-2,
    "learning_rate": 3e-3,
}


@pytest.mark.parametrize(
    ("one", "same"),
    [
        (TOPK, TOPK | {"seed": 0}),
        (TOPK, dict(reversed(TOPK.items()))),
        (TOPK, TOPK | {"penalty": None, "sparsity_coefficient": None}),
        (TOPK, TOPK | {"dictionary_size": 512.0}),
        (RELU | {"sparsity_coefficient": 1}, RELU | {"sparsity_coefficient": 1.0}),
    ],
)
def test_the_same_training_written_otherwise_has_the_same_id(one: dict, same: dict) -> None:
    assert training_id("study", one) == training_id("study", same)


def test_every_hyperparameter_and_the_study_make_another_training() -> None:
    changes = [
        (TOPK, {"dictionary_size": 513}),
        (TOPK, {"k": 17}),
        (TOPK, {"learning_rate": 0.0030000001}),
        (TOPK, {"seed": 1}),
        (RELU, {}),
        (RELU, {"penalty": "sqrt"}),
        (RELU, {"sparsity_coefficient": 0.02}),
    ]
    ids = [training_id("study", TOPK), training_id("other", TOPK)]
    ids += [training_id("study", base | change) for base, change in changes]
    assert len(set(ids)) == len(ids)


def test_ids_stay_what_they_are() -> None:
    """A change here makes every ledger on every disk train again; then raise IDENTITY_FORMAT."""
    assert identify() == "6539fd00cc75ff73"
    assert training_id("study", TOPK) == "1ac1ba3047850f36"
    assert training_id("study", RELU) == "70c0e445becbbd7d"


def studies_of(file: Path, *overrides: str) -> list[str]:
    return [study.study_id for study in make_plan(load_sweep(file, overrides)).studies]


def test_keys_of_a_sweep_file_reach_the_identity(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, layers=[1])
    unmoved = [
        "name=other",
        f"storage={tmp_path}/elsewhere",
        "tracking=http://localhost:5000",
        "pack=3",
        "resources.pack.cpu=0.5",
        "resources.activations.cpu=1",
        "activations.max_bytes=30GB",
        "training.report_tokens=2048",
        "search.trainings=5",
        "search.space.learning_rate=1e-3",
        "layers=[1,2]",
    ]
    moved = [
        "layers=[2]",
        "seed=1",
        "training.tokens=8192",
        "training.batch_sequences=4",
        "corpus.context=64",
        "corpus.bos=null",
        "activations.dtype=float32",
    ]
    (study,) = studies_of(file)
    assert {override: studies_of(file, override)[0] for override in unmoved} == dict.fromkeys(unmoved, study)
    assert len({study, *(studies_of(file, override)[0] for override in moved)}) == 1 + len(moved)


def test_text_counts_by_what_it_says_not_by_where_it_lies(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, layers=[1])
    (study,) = studies_of(file)
    moved = tmp_path / "moved"
    shutil.copytree(write_corpus(tmp_path), moved)
    assert studies_of(file, f"corpus.name={moved}") == [study]
    (moved / "00.txt").write_text("another text")
    assert studies_of(file, f"corpus.name={moved}") != [study]
