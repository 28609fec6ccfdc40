"""What a sweep file may say, how it is composed, and how each mistake in it is answered."""

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from orchestrator.addresses import redact_url
from orchestrator.composition import preset_names
from orchestrator.config import SweepConfig, load_sweep
from orchestrator.search.space import grid
from qkmodel.errors import InputError

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
PRESETS = ROOT / "orchestrator" / "conf"

GOOD = """\
name: good
model: smollm2-135m
layers: [4, 8]
corpus: {name: sotu, context: 64}
training: {tokens: 10_000, batch_sequences: 4}
search:
  sampler: grid
  trainings: 8
  space:
    dictionary_size: [512, 1024]
    activation: relu
    penalty: l1
    sparsity_coefficient: {low: 1e-3, high: 3e-2, log: true, points: 4}
    learning_rate: 3e-3
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


def message_of(path: Path, *overrides: str) -> str:
    """The one line that a mistake is answered with."""
    with pytest.raises(InputError) as raised:
        load_sweep(path, overrides)
    message = str(raised.value)
    assert message.isprintable(), "more than one line, or control characters"
    assert message.startswith(str(path))
    return message


# what stands in GOOD -> what is written instead; then what the message has to say: key, value, remedy
BROKEN_VALUES = {
    "unknown key": ("training:", "traning:", ["traning", "did you mean training?"]),
    "unknown inner key": ("batch_sequences:", "batch_sequence:", ["training.batch_sequence", "batch_sequences?"]),
    "key without near miss": ("name: good", "name: good\nzebra: 1", ["zebra", "known: name, task"]),
    "halving of no kind": (
        "name: good",
        "name: good\nhalving: true",
        ["halving", "auto, null, or a mapping", "eta: 3"],
    ),
    "negative budget": ("trainings: 8", "trainings: 8\n  tokens: -1", ["search.tokens", "-1", "greater than 0"]),
    "no time": ("trainings: 8", "trainings: 8\n  wall_time: soon", ["search.wall_time", "soon", "90 min, 8 h"]),
    "unknown metric": ("trainings: 8", "trainings: 8\n  constraints: {l1: {max: 3}}", ["search.constraints", "l1"]),
    "no bounds": (
        "trainings: 8",
        "trainings: 8\n  constraints: {l0: {}}",
        ["search.constraints.l0", "min, max or both"],
    ),
    "crossed bounds": ("trainings: 8", "trainings: 8\n  constraints: {l0: {min: 9, max: 3}}", ["l0", "nothing"]),
    "first with a grid": (
        "trainings: 8",
        "trainings: 8\n  first: [{k: 3}]",
        ["search.first", "grid", "leave first out"],
    ),
    "allocation": (
        "trainings: 8",
        "trainings: 8\n  layer_allocation: fair",
        ["layer_allocation", "fair", "by_progress"],
    ),
    "halving by one": ("name: good", "name: good\nhalving: {eta: 1}", ["halving.eta", "1.5"]),
    "rungs at the end": ("name: good", "name: good\nhalving: {rungs: [5_000, 10_000]}", ["halving.rungs", "10000"]),
    "a grid beyond all reason": ("log: true, points: 4", "log: true, points: 3_000_000", ["points"]),
    "home of nobody": ("name: good", "name: good\nstorage: ~nobody-here/x", ["storage", "not a usable path"]),
    "rungs in disorder": ("name: good", "name: good\nhalving: {rungs: [500, 100]}", ["halving.rungs", "ascending"]),
    "ledger of another kind": (
        "name: good",
        "name: good\nledger: sqlite:///a.db",
        ["ledger", "postgresql://HOST/DATABASE"],
    ),
    "ledger in no database": ("name: good", "name: good\nledger: postgresql://me@host", ["ledger", "DATABASE"]),
    "ledger at no port": ("name: good", "name: good\nledger: postgresql://host:port/db", ["ledger", "postgresql://"]),
    "ledger in a mapping": ("name: good", "name: good\nledger: {host: h}", ["ledger", "postgresql://HOST/DATABASE"]),
    "endless tokens": ("10_000", "100000000000000000", ["training.tokens", "100000000000000000", "1000000000000"]),
    "endless trainings": ("trainings: 8", "trainings: 100001", ["search.trainings", "100001", "100000"]),
    "endless dictionary": ("[512, 1024]", "[512, 1000000000]", ["search.space.dictionary_size", "1048576"]),
    "seed beyond 64 bits": ("penalty: l1", "penalty: l1\n    seed: 1" + "0" * 23, ["search.space.seed", "less than"]),
    "missing key": ("layers: [4, 8]\n", "", ["layers", "missing", "layers: [8]"]),
    "word for a count": ("10_000", "many", ["training.tokens", '"many"', "whole number"]),
    "fraction for a count": ("10_000", "1000.5", ["training.tokens", "1000.5", "whole number"]),
    "boolean for a count": ("10_000", "true", ["training.tokens", "true", "number"]),
    "a count in quotes": ("10_000", '"10000"', ["training.tokens", '"10000"', "leave the quotes out"]),
    "a layer in quotes": ("[4, 8]", '["4", 8]', ["layers[0]", '"4"', "leave the quotes out"]),
    "zero tokens": ("10_000", "0", ["training.tokens", "0", "greater than 0"]),
    "infinite tokens": ("10_000", ".inf", ["training.tokens", "finite"]),
    "nothing in a block": ("{tokens: 10_000, batch_sequences: 4}", "", ["training", "null", "mapping"]),
    "report beyond the end": ("tokens: 10_000", "tokens: 9_000, report_tokens: 9_001", ["training", "9001", "9000"]),
    "one layer without brackets": ("[4, 8]", "8", ["layers", "8", "list, in brackets", "[8]"]),
    "no layer": ("[4, 8]", "[]", ["layers", "[]", "[8]"]),
    "layer twice": ("[4, 8]", "[4, 4]", ["layers", "[4, 4]", "keep one"]),
    "negative layer": ("[4, 8]", "[4, -1]", ["layers[1]", "-1", "at least 0"]),
    "layer that is a word": ("[4, 8]", "[last]", ["layers[0]", '"last"', "whole number"]),
    "name with a slash": ("name: good", "name: ../up", ["name", '"../up"', "letters, digits"]),
    "name that reads as a number": ("name: good", "name: 1e3", ["name", "1000.0", "quotes"]),
    "name that reads as no": ("name: good", "name: no", ["name", "false", "quotes"]),
    "name that looks like an option": ("name: good", "name: -f", ["name", '"-f"', "letter or digit first"]),
    "unknown task": ("name: good", "name: good\ntask: masks", ["task", '"masks"', "transcoder", "pair_mask"]),
    "unknown sampler": ("sampler: grid", "sampler: grdi", ["search.sampler", '"grdi"', "did you mean grid?"]),
    "unknown hyperparameter": ("penalty: l1", "penality: l1", ["search.space.penality", "did you mean penalty?"]),
    "unknown activation": ("activation: relu", "activation: rleu", ["search.space.activation", "rleu", "relu?"]),
    "k with relu": (
        "penalty: l1",
        "penalty: l1\n    k: 8",
        ["search.space", "k belongs to activations topk and batchtopk"],
    ),
    "target l0 without penalty": (
        "penalty: l1\n    sparsity_coefficient: {low: 1e-3, high: 3e-2, log: true, points: 4}",
        "target_l0: 8",
        ["search.space: activation relu needs penalty (l1, sqrt, tanh, p_annealing)"],
    ),
    "target l0 of keys alone": (
        "sparsity_coefficient: {low: 1e-3, high: 3e-2, log: true, points: 4}",
        "key_target_l0: 8",
        ["search.space: key_target_l0 needs target_l0, the query side's"],
    ),
    "nothing for a word": ("10_000", "10_000, learning_rate_schedule: null", ["null is unknown; known: constant, lin"]),
    "misspelt range": ("low: 1e-3", "lo: 1e-3", ["search.space.sparsity_coefficient.lo", "did you mean low?"]),
    "range with a word": ("low: 1e-3", "low: tiny", ["search.space.sparsity_coefficient.low", '"tiny"', "number"]),
    "range upside down": ("low: 1e-3", "low: 1", ["search.space.sparsity_coefficient", "1", "0.03"]),
    "grid range without points": (", points: 4", "", ["search.space.sparsity_coefficient", "points"]),
    "list in a list": ("learning_rate: 3e-3", "learning_rate: [[1]]", ["search.space.learning_rate[0]", "[1]"]),
    "grid larger than the budget": ("trainings: 8", "trainings: 7", ["search.space", "8", "7", "raise it to 8"]),
    "unknown preset": (GOOD[GOOD.index("search:") :], "search: topkk\n", ["search", "topkk", "did you mean topk?"]),
    "context of two": ("context: 64", "context: 2", ["corpus.context", "2", "at least 3"]),
    "nothing held out": ("context: 64", "validation_documents: 0", ["corpus.validation_documents", "0", "greater"]),
    "unknown size": ("name: good", "name: good\nactivations: {max_bytes: lots}", ["max_bytes", '"lots"', "20 GB"]),
    "count with a comma": ("10_000", '"10,000"', ["training.tokens", '"10,000"', "digits group with _: 100_000"]),
    "count in braces with a comma": ("10_000", "10,000", ["line 5", "comma", "digits group with _: 100_000"]),
    "nothing for a hyperparameter": ("learning_rate: 3e-3", "learning_rate:", ["learning_rate", "null is neither"]),
    "range beyond all numbers": ("[512, 1024]", "{low: 512, high: 1e300, points: 2}", ["dictionary_size", "too large"]),
    "endless key": ("name: good", f"name: good\n? {'z' * 5000}\n: 1", ["z" * 60 + "…: is no key"]),
    "more patched than held out": (
        "batch_sequences: 4",
        "validation_sequences: 4, cross_entropy_sequences: 5",
        ["training.cross_entropy_sequences: 5", "validation_sequences 4"],
    ),
    "unknown dtype": ("name: good", "name: good\nactivations: {dtype: float31}", ["dtype", '"float31"', "float32?"]),
    "pack of none": ("name: good", "name: good\npack: 0", ["pack", "0", "auto"]),
    "no CPU": ("name: good", "name: good\nresources: {pack: {cpu: 0}}", ["resources.pack.cpu", "0", "at least 0.1"]),
    "two GPUs for a pack": (
        "name: good",
        "name: good\nresources: {pack: {gpu: 2}}",
        ["resources.pack.gpu", "2", "less than or equal to 1"],
    ),
    "tracking into a folder": ("name: good", "name: good\ntracking: mlruns", ["tracking", '"mlruns"', "http://"]),
    "tracking on a host without one": (
        "name: good",
        "name: good\ntracking: sqlite+pysqlite://a/b.db",
        ["tracking", "sqlite:///FILE.db"],
    ),
    "tracking in no file": ("name: good", "name: good\ntracking: sqlite://a.db", ["tracking", "sqlite:///FILE.db"]),
    "bucket without a ledger": (
        "name: good",
        "name: good\nstorage: s3://runs/a",
        ["ledger", "postgresql://HOST/DATABASE"],
    ),
    "bucket without a server": (
        "name: good",
        "name: good\nstorage: s3://runs/a\nledger: postgresql://host/ledgers",
        ["tracking", "http://HOST:PORT"],
    ),
    "bucket and a tracking database": (
        "name: good",
        "name: good\nstorage: s3://runs/a\nledger: postgresql://host/ledgers\ntracking: sqlite:///a.db",
        ["tracking", "http://HOST:PORT"],
    ),
    "other store": ("name: good", "name: good\nstorage: ftp://bucket", ["storage", "folder", "s3://BUCKET/PREFIX"]),
    "line break in a name": ("name: sotu", 'name: "so\\ntu"', ["corpus.name", '"so\\ntu"', "line breaks"]),
}


@pytest.mark.parametrize("case", BROKEN_VALUES)
def test_a_broken_value_is_answered_with_key_value_and_remedy(case: str, tmp_path: Path) -> None:
    before, after, expected = BROKEN_VALUES[case]
    assert before in GOOD
    path = tmp_path / "broken.yaml"
    path.write_text(GOOD.replace(before, after, 1))
    message = message_of(path)
    assert [part for part in expected if part not in message.removeprefix(str(path))] == [], message


def test_a_remedy_is_named_only_where_it_helps(good: Path) -> None:
    assert message_of(
        good, "search.space={dictionary_size: 8, activation: relu, target_l0: 3, learning_rate: 1}"
    ).endswith("activation relu needs penalty (l1, sqrt, tanh, p_annealing)")
    space = "dictionary_size: 64, learning_rate: 1, activation"
    too_large = message_of(good, f"search.space={{{space}: [topk, batchtopk], k: 65}}")
    assert too_large.endswith("search.space: k 65 is larger than dictionary_size 64")
    mixed = message_of(good, f"search.space={{{space}: [topk, relu], k: 6}}")
    assert mixed.endswith("write one alternative per activation, as a list of mappings")


# what the whole file holds -> what the message has to say
BROKEN_FILES = {
    "empty": (b"", ["empty", "a sweep file is", "key: value"]),
    "comments only": (b"# nothing\n", ["empty"]),
    "list": (b"- name: good\n", ["sequence", "key: value"]),
    "word": (b"hello\n", ["scalar", "key: value"]),
    "two documents": (b"name: a\n---\nname: b\n", ["line 2, column 1", "document"]),
    "bracket left open": (b"name: a\nlayers: [1, 2\nseed: 0\n", ["line 3, column 5"]),
    "tab": (b"training:\n\ttokens: 1\n", ["line 2, column 1", "\\t"]),
    "key twice": (b"name: a\nseed: 1\nseed: 2\n", ["line 3", "seed", "first on line 2", "keep one"]),
    "inner key twice": (b"training: {tokens: 1, tokens: 2}\n", ["line 1", "training.tokens", "keep one"]),
    "Latin-1": ("name: caf\u00e9\n".encode("latin-1"), ["byte 9", "UTF-8"]),
    "UTF-16": ("name: a\n".encode("utf-16"), ["UTF-8"]),
    "control character": (b"name: a\x00b\n", ["line 1", "control character"]),
    "interpolation": (b"name: a\ntracking: ${oc.env:HOME}\n", ["line 2", "tracking", "interpolation"]),
    "broken interpolation": (b"name: a\ncorpus:\n  name: ${{\n", ["line 3", "corpus.name", "interpolation"]),
    "interpolation as a key": (b"name: a\n? ${oc.env:HOME}\n: 1\n", ["line 2", "interpolation"]),
    "object to build": (b"name: a\nmodel: {_target_: os.system}\n", ["model._target_", "known: name"]),
    "tag of a plain value": (b"name: a\npack: !!int 3\n", ["line 2", "tag", "plain value"]),
    "Python tag": (b"name: !!python/object/apply:os.getcwd []\n", ["line 1", "name", "tag"]),
    "path tag": (b"name: !!python/object/apply:pathlib.Path [a]\n", ["line 1", "name", "tag"]),
    "Hydra's own settings": (b"name: a\nhydra: {searchpath: [file:///tmp]}\n", ["hydra", "known:"]),
    "alias": (b"name: &n a\nstorage: *n\n", ["line 2", "*n", "write the value out"]),
    "alias of itself": (b"name: &n [*n]\n", ["line 1", "*n"]),
    "nested without end": (b"name: " + b"[" * 5_000, ["nested"]),
    "number as a key": (b"name: a\n1: 2\n", ["line 2", "1", "quotes"]),
    "endless number": (b"name: a\nseed: " + b"9" * 5_000 + b"\n", ["line 2", "seed", "5000 digits"]),
    "octal number": (b"name: a\nseed: 010\n", ["line 2", "seed", "010", "base 8"]),
    "minutes and seconds": (b"name: a\nseed: 1:30\n", ["line 2", "seed", "1:30", "60"]),
    "far too large": (b"#" * 300_000, ["300,000", "262,144"]),
    "null as a key": (b"name: a\n~: 2\n", ["line 2", "a key is null"]),
    "nothing as a key": (b"name: a\n? \n: 2\n", ["line 2", "a key is null"]),
    "missing value": (b"name: ???\n", ["name", "???"]),
    "defaults that are no list": (b"defaults: topk\n", ["defaults", "list of presets", "[search: topk"]),
    "unknown default": (b"defaults: [search: topkk]\n", ["defaults[0]", "topkk", "did you mean topk?"]),
    "unknown default group": (b"defaults: [serch: topk]\n", ["defaults[0]", "serch", "model, corpus and search"]),
    "default from a file": (b"defaults: [/etc/passwd]\n", ["defaults[0]", "/etc/passwd", "group: preset"]),
    "default up the tree": (b"defaults: [{../conf/search: topk}]\n", ["../conf/search"]),
    "default twice": (b"defaults: [search: topk, search: l1]\n", ["defaults", "search", "keep one"]),
    "_self_ first": (b"defaults: [_self_, search: topk]\n", ["defaults", "_self_ comes last"]),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_broken_file_is_answered_in_one_line(case: str, tmp_path: Path) -> None:
    content, expected = BROKEN_FILES[case]
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    message = message_of(path)
    assert [part for part in expected if part not in message.removeprefix(str(path))] == [], message


# override -> what the message has to say
BROKEN_OVERRIDES = {
    "layers=1,2": ["layers=1,2", "brackets", "layers=[1,2]"],
    "search.space.learning_rate=range(1,3)": ["search.space.learning_rate", "brackets"],
    "traning.tokens=3": ["traning", "did you mean training?"],
    "training.tokens=many": ["training.tokens", '"many"', "whole number"],
    "training.tokens=1_000_": ["training.tokens", '"1_000_" must be a whole number'],
    "layers=3": ["layers", "3", "list, in brackets"],
    "layers": ["override layers", "KEY=VALUE"],
    "": ["KEY=VALUE"],
    "=3": ["no key", "KEY=VALUE"],
    "corpus.bos=<|endoftext|>": ["corpus.bos=<|endoftext|>", "KEY='\"VALUE\"'"],
    "storage=${oc.env:HOME}": ["storage=${oc.env:HOME}", "interpolation"],
    "search@training=topk": ["search@training=topk", "KEY=VALUE"],
    "search=topkk": ["search", "topkk", "did you mean topk?"],
    "~zebra": ["zebra", "no zebra"],
    "~name": ["name", "missing"],
    "~name=good": ["~name=good", "write ~name"],
    "seed.x=1": ["seed", '{"x": 1}', "whole number"],
    "name.x=1": ["name.x=1", '"good"', "set name itself"],
    "layers.2=1": ["layers.2=1", "list of 2", "no entry 2"],
    "layers.x=1": ["layers.x=1", "no entry x"],
    "hydra.searchpath=[file:///tmp]": ["hydra", "known:"],
    "hydra/launcher=joblib": ["hydra/launcher", "known:"],
    "model={_target_: os.system}": ["model._target_", "known: name"],
    "training.tokens=" + "9" * 5_000: ["training.tokens=999", "digits"],
    "name='a\nb'": ["name", "a\\nb", "letters, digits"],
}


@pytest.mark.parametrize("override", BROKEN_OVERRIDES, ids=lambda text: text[:40])
def test_a_broken_override_is_answered_in_one_line(override: str, good: Path) -> None:
    message = message_of(good, override)
    expected = BROKEN_OVERRIDES[override]
    assert [part for part in expected if part not in message.removeprefix(str(good))] == [], message
    assert len(message) < 500


def test_a_missing_file_names_the_nearest_one(good: Path) -> None:
    assert "did you mean" in message_of(good.with_name("god.yaml"))
    assert "good.yaml" in message_of(good.with_name("god.yaml"))
    assert "folder" in message_of(good.parent)
    assert "too long" in message_of(good.with_name("x" * 300))
    # what all names end in is no likeness
    assert "did you mean" not in message_of(good.with_name("missing.yaml"))


def test_what_is_there_and_no_file_is_said_to_be_that(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    assert "pipe" in message_of(tmp_path / "pipe.yaml").removeprefix(str(tmp_path / "pipe.yaml"))
    assert "link that leads nowhere" in message_of(tmp_path / "loop.yaml")


def test_the_sweep_file_of_the_design_is_read(good: Path) -> None:
    design = "halving: null\nledger: null\nresources: {pack: {cpu: 2, gpu: 0}, activations: {cpu: 2, gpu: 0}}\n"
    good.write_text(GOOD + design)
    assert load_sweep(good).resources.pack.cpu == 2


def test_one_mistake_is_counted_once(good: Path) -> None:
    assert message_of(good, "layers=[-1]").endswith("layers[0]: -1 must be at least 0")
    # a misspelt key is not missing besides
    good.write_text(GOOD.replace("layers:", "layer:"))
    assert message_of(good).endswith("layer: is no key here; did you mean layers?")


def test_several_mistakes_are_counted(good: Path) -> None:
    assert message_of(good, "seed=-1", "layers=8", "pack=0").endswith("(and 2 more to put right)")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_packaged_sweeps_say_what_they_are_named_for(path: Path) -> None:
    assert load_sweep(path).name == path.stem


def test_the_laptop_sweep_holds_what_it_promises() -> None:
    config = load_sweep(next(path for path in SWEEPS if path.stem == "l1"))
    assert config.layers == (4, 8)
    assert config.corpus.bos == "<|endoftext|>"
    points = grid(config.search.space)
    assert len(points) == config.search.trainings == 8
    assert {point["dictionary_size"] for point in points} == {512, 1024}
    assert len({point["sparsity_coefficient"] for point in points}) == 4
    assert config.activations.max_bytes == 20 * 10**9


@pytest.mark.parametrize("file_name", ["my sweep.yaml", "l1.v2-b.yaml", "a=b.yaml", "x@y.yaml", "über.yml", "noend"])
def test_any_file_name_will_do(file_name: str, tmp_path: Path) -> None:
    path = tmp_path / file_name
    path.write_text("\ufeff" + GOOD, encoding="utf-8")
    assert load_sweep(path).name == "good"


def test_numbers_are_read_as_people_write_them(good: Path) -> None:
    config = load_sweep(good, ["training.tokens=1e6", "search.space.learning_rate=3e-3"])
    assert config.training.tokens == 1_000_000
    assert isinstance(config.training.tokens, int)
    assert config.search.space[0]["learning_rate"] == 0.003
    assert config.search.space[0]["sparsity_coefficient"].low == 0.001


def test_overrides_win_over_the_file_and_later_ones_over_earlier(good: Path) -> None:
    config = load_sweep(good, ["layers=[3]", "seed=1", "+seed=2", "++activations.dtype=float32", "model.revision=v1"])
    assert config.layers == (3,)
    assert config.seed == 2
    assert config.activations.dtype == "float32"
    assert (config.model.name, config.model.revision) == ("smollm2-135m", "v1")
    assert config.corpus.context == 64


def test_a_value_override_replaces_a_setting_whole(good: Path) -> None:
    # a list over a mapping, a mapping over a list, and a deletion
    config = load_sweep(
        good,
        [
            "search.space.sparsity_coefficient=[1e-3,1e-2]",
            "search.space.dictionary_size={low: 64, high: 256, log: true, points: 3}",
            "search.space.learning_rate=1e-3",
            "~search.sampler",
        ],
    )
    space = config.search.space[0]
    assert space["sparsity_coefficient"] == [1e-3, 1e-2]
    assert (space["dictionary_size"].low, space["dictionary_size"].points) == (64, 3)
    assert config.search.sampler == "auto"


def test_one_alternative_of_several_can_be_overridden(good: Path) -> None:
    config = load_sweep(good, ["search=open", "search.space.0.k=16"])
    assert config.search.space[0]["k"] == 16
    assert "k" not in config.search.space[1]
    assert "search.space[1].k" in message_of(good, "search=open", "search.space.1={activation: topk, k: [8, 8]}")


@pytest.mark.parametrize("group", ["model", "corpus", "search"])
def test_every_preset_can_be_named_in_the_file_and_on_the_command_line(group: str, good: Path, tmp_path: Path) -> None:
    assert preset_names(group)
    for name in preset_names(group):
        from_command_line = load_sweep(good, [f"{group}={name}"])
        content = OmegaConf.to_container(OmegaConf.create(GOOD)) | {group: name}
        by_word = tmp_path / "by_word.yaml"
        by_word.write_text(json.dumps(content))
        by_list = tmp_path / "by_list.yaml"
        del content[group]
        by_list.write_text(json.dumps(content | {"defaults": [{f"/{group}": name}, "_self_"]}))
        assert from_command_line == load_sweep(by_word) == load_sweep(by_list)
        preset = OmegaConf.to_container(OmegaConf.load(PRESETS / group / f"{name}.yaml"))
        block = from_command_line.model_dump()[group]
        assert {key: block[key] for key in preset if key != "space"} == {
            key: value for key, value in preset.items() if key != "space"
        }


def test_the_files_own_keys_are_laid_over_its_presets(tmp_path: Path) -> None:
    content = OmegaConf.to_container(OmegaConf.create(GOOD))
    content["search"] = {"trainings": 3, "space": {"k": 4, "dictionary_size": 64, "seed": [0, 1, 2]}}
    path = tmp_path / "laid-over.yaml"
    path.write_text(json.dumps({"defaults": [{"search": "topk"}], **content}))
    search = load_sweep(path).search
    assert search.sampler == "grid"
    assert search.trainings == 3
    assert search.space == (
        {"dictionary_size": 64, "activation": "topk", "k": 4, "learning_rate": 6e-3, "seed": [0, 1, 2]},
    )


def test_a_preset_on_the_command_line_replaces_the_files_block(good: Path) -> None:
    assert "penalty" not in load_sweep(good, ["search=topk"]).search.space[0]
    assert "context" not in load_sweep(good, ["corpus=sotu"]).corpus.model_fields_set


def test_a_word_that_is_no_preset_is_the_name_of_a_model_or_corpus(good: Path) -> None:
    config = load_sweep(good, ["model=Qwen/Qwen3-8B", "corpus=./text.jsonl"])
    assert config.model.name == "Qwen/Qwen3-8B"
    assert config.corpus.name == "./text.jsonl"


PASSWORD = "sw0rdfish"
ADDRESSES = [
    f"http://user:{PASSWORD}@host:5000",
    f"https://{PASSWORD}@host/path",
    f"postgresql+psycopg://user:{PASSWORD}@host:5432/mlflow",
    f"postgresql://host/mlflow?user=a&password={PASSWORD}",
    f"https://host/?api_token={PASSWORD}#x",
    f"http://user:p@{PASSWORD}@host",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_secrets_in_the_tracking_address_are_kept_but_not_shown(address: str, good: Path) -> None:
    override = f"tracking={json.dumps(address)}"
    config = load_sweep(good, [override])
    assert config.tracking == address
    assert PASSWORD not in json.dumps(config.public_dict())
    assert "host" in config.public_dict()["tracking"]
    for mistake in ("x", ",2"):
        assert PASSWORD not in message_of(good, override + mistake)
    assert PASSWORD not in message_of(good, override, "tracking.x=1")


@pytest.mark.parametrize("begins", ["pass/", "20/", "20#"])
def test_an_address_that_cannot_be_redacted_is_refused_without_being_shown(good: Path, begins: str) -> None:
    message = message_of(good, f"tracking='http://user:{begins}{PASSWORD}@host'")
    assert PASSWORD not in message
    assert "tracking" in message and "%2F" in message


@pytest.mark.parametrize(
    "address",
    [
        f"postgresql://me:{PASSWORD}@host/db",
        f"postgresql://me:{PASSWORD}/x@host/db",
        f"postgresql://me:20/{PASSWORD}@host/db",
        f"postgresql://me:@{PASSWORD}@host/db",
        f"postgresql://host/db?user=me&password={PASSWORD}",
        f"postgresql://host/db?sslpassword={PASSWORD}",
    ],
)
def test_a_password_in_the_ledgers_address_is_refused_without_being_shown(address: str, good: Path) -> None:
    for override in (f"ledger={json.dumps(address)}", f"+ledger={json.dumps(address)}"):
        message = message_of(good, override)
        assert PASSWORD not in message and "ledger: has a password in it" in message


def test_a_ledgers_address_is_kept_as_it_is(good: Path) -> None:
    address = "postgresql://me@host:5433/db?sslmode=verify-full&sslkey=/keys/mine&passfile=/keys/pgpass"
    config = load_sweep(good, [f"ledger={json.dumps(address)}"])
    assert (config.ledger, config.public_dict()["ledger"]) == (address, address)
    assert load_sweep(good).ledger is None


@given(st.text(min_size=1), st.text(min_size=1))
def test_no_percent_encoded_password_survives_redaction(user: str, password: str) -> None:
    secret = quote(password, safe="")
    shown = redact_url(f"see postgresql://{quote(user, safe='')}:{secret}@db.example:5432/name for more")
    assert shown == f"see postgresql://{quote(user, safe='')}:***@db.example:5432/name for more"


def test_the_ledger_is_told_the_whole_path_of_a_tracking_database(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = {
        given: load_sweep(good, [f"tracking={given}"]).public_dict()["tracking"]
        for given in ("sqlite:///mine.db", "sqlite:////store/mine.db", "http://host:5000", "null")
    }
    assert told == {
        "sqlite:///mine.db": f"sqlite:///{tmp_path}/mine.db",
        "sqlite:////store/mine.db": "sqlite:////store/mine.db",
        "http://host:5000": "http://host:5000",
        "null": None,
    }


@given(st.sampled_from(["http://host:5000", "sqlite:///a b/c@d.db", "sqlite:////tmp/x.db", "plain@text", "a: b"]))
def test_what_holds_no_secret_is_left_as_it_is(text: str) -> None:
    assert redact_url(text) == text


texts = st.text(min_size=1, max_size=20).filter(lambda text: text.isprintable() and "${" not in text)
spaces = st.one_of(
    st.fixed_dictionaries(
        {
            "dictionary_size": st.one_of(st.integers(64, 4096), st.just([128, 256]), st.just({"low": 64, "high": 512})),
            "activation": st.just("topk"),
            "k": st.one_of(st.integers(1, 64), st.lists(st.integers(1, 64), min_size=1, max_size=3, unique=True)),
            "learning_rate": st.one_of(st.floats(1e-8, 1), st.just({"low": 1e-4, "high": 1e-2, "log": True})),
        },
    ),
    st.just(
        [
            {"dictionary_size": 64, "activation": "topk", "k": 4, "learning_rate": 1e-3},
            {
                "dictionary_size": 64,
                "activation": "relu",
                "penalty": ["l1", "sqrt"],
                "sparsity_coefficient": 0.1,
                "learning_rate": 1e-3,
            },
        ]
    ),
)
sweeps = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,20}", fullmatch=True),
        "model": st.one_of(texts, st.fixed_dictionaries({"name": texts, "revision": texts})),
        "layers": st.lists(st.integers(0, 99), min_size=1, max_size=5, unique=True),
        "corpus": st.fixed_dictionaries(
            {"name": texts, "context": st.integers(3, 64), "bos": st.none() | texts | st.just("\n")},
            optional={"validation_documents": st.floats(0, 1, exclude_min=True, exclude_max=True)},
        ),
        "training": st.fixed_dictionaries({"tokens": st.integers(512, 10**12), "batch_sequences": st.integers(1, 8)}),
        "search": st.fixed_dictionaries(
            {"sampler": st.sampled_from(["auto", "random", "tpe"]), "trainings": st.integers(1, 500), "space": spaces}
        ),
    },
    optional={
        "seed": st.integers(0, 2**32 - 1),
        "pack": st.just("auto") | st.integers(1, 64),
        "resources": st.fixed_dictionaries({"pack": st.fixed_dictionaries({"cpu": st.floats(0.1, 64)})}),
        "activations": st.sampled_from([{"max_bytes": "1.5 GB"}, {"dtype": "float32"}, {"max_bytes": 12345}]),
        "tracking": st.sampled_from([None, "http://localhost:5000"]),
        "storage": texts.filter(lambda text: "://" not in text),
    },
)


@given(sweeps)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_dumped_sweep_is_read_back_as_the_same_sweep(tmp_path: Path, mapping: dict) -> None:
    config = SweepConfig.model_validate(mapping)
    path = tmp_path / "dumped.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(config.public_dict())), encoding="utf-8")
    assert load_sweep(path) == config
    assert load_sweep(path) == config
    json.dumps(config.public_dict(), allow_nan=False)


def test_reading_a_sweep_neither_needs_nor_loads_the_heavy_libraries(good: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from orchestrator.config import load_sweep;"
        f"load_sweep(Path({str(good)!r}), ['search=topk']);"
        "print(*{'torch', 'transformers', 'transformer_lens', 'ray', 'optuna', 'mlflow'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""
    assert ran.stderr == ""


def test_composing_leaves_no_hydra_state_and_creates_nothing(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra.core.global_hydra import GlobalHydra

    monkeypatch.chdir(good.parent)
    load_sweep(good, ["search=topk"])
    assert not GlobalHydra.instance().is_initialized()
    assert list(good.parent.iterdir()) == [good]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("halving={eta: 3, rung: [4096]}", "halving.rung: is no key here; did you mean rungs?"),
        ("search.constraints={l0: {maximum: 5}}", "search.constraints.l0.maximum: is no key here; did you mean max?"),
        ("search.constraints={kll: {max: 5}}", 'search.constraints.kll: "kll" is unknown; did you mean kl?'),
    ],
)
def test_a_key_within_a_mapping_is_compared_with_the_keys_of_that_mapping(good: Path, override: str, said: str) -> None:
    assert message_of(good, override).endswith(said)


def test_a_constraint_on_what_is_not_measured_is_refused(good: Path) -> None:
    message = message_of(good, "search.constraints={ce_recovered: {min: 0}}", "training.cross_entropy_sequences=0")
    assert "search.constraints.ce_recovered: is not measured" in message


def test_a_rung_that_falls_on_the_last_step_is_refused(good: Path) -> None:
    config = load_sweep(good)
    per_step = config.training.batch_sequences * config.corpus.context
    message = message_of(good, f"training.tokens={4 * per_step}", f"halving={{rungs: [{4 * per_step - 1}]}}")
    assert "halving.rungs" in message and f"by a step of {per_step}" in message
