"""Folders for a model hub: they load, their card says what they are, and they are whole or not there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from orchestrator.choice import Choice, apply_rule, parse_rule
from orchestrator.export import export_dictionary
from orchestrator.ledger import Ledger
from orchestrator.model_card import model_card
from orchestrator.status import study_statuses
from qkmodel import load_dictionary
from qkmodel.configs import CorpusConfig, ModelConfig
from qkmodel.dictionary import DictionaryConfig
from qkmodel.errors import InputError
from tests.orchestrator.dictionaries import make_sweep

MIDDLE = "bbbb000000000002"
FILES = {"README.md", "config.json", "transcoder.safetensors", "attention.safetensors"}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return make_sweep(tmp_path / "runs")


def chosen(ledger: Ledger, rule: str = "knee") -> Choice:
    (choice,) = apply_rule(study_statuses(ledger), parse_rule(rule))
    return choice


def config_of(ledger: Ledger, choice: Choice, **identity: object) -> DictionaryConfig:
    """The dictionary's configuration, with parts of its model's or corpus' replaced."""
    config = load_dictionary(ledger.folder / choice.training.dictionary).config
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=parts) for name, parts in identity.items()}
    )


def front_matter(card: str) -> dict:
    _, matter, _ = card.split("---\n", 2)
    return yaml.safe_load(matter)


def test_an_exported_folder_loads_with_the_recorded_hash(ledger: Ledger, tmp_path: Path) -> None:
    choice, output = chosen(ledger), tmp_path / "hub" / "dictionary"
    export_dictionary(ledger, choice, output)
    assert {path.name for path in output.iterdir()} == FILES
    assert [path.name for path in output.parent.iterdir()] == ["dictionary"]
    original = load_dictionary(ledger.folder / choice.training.dictionary)
    loaded = load_dictionary(output, sha256=choice.training.dictionary_sha256)
    assert loaded.config == original.config
    for name, tensor in original.transcoder.state_dict().items():
        assert torch.equal(loaded.transcoder.state_dict()[name], tensor)


def test_the_python_on_the_card_runs(ledger: Ledger, tmp_path: Path) -> None:
    export_dictionary(ledger, chosen(ledger), tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    _, python, _ = card.replace("```python", "```").split("```", 2)
    script = python.replace("# x:", "import torch; x = torch.ones(1, 4, 24)  # x:").replace("FOLDER", "hub")
    script += "\nprint(f_query.shape, p_hat.shape)"
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout == "torch.Size([1, 4, 512]) torch.Size([1, 4, 4, 4])\n"


def test_the_card_says_what_it_is_how_good_and_where_from(ledger: Ledger) -> None:
    choice = chosen(ledger)
    card = model_card(ledger.sweep(), choice, config_of(ledger, choice))
    assert front_matter(card)["library_name"] == "qkmodel" and "base_model" not in front_matter(card)
    assert "# Query and key transcoders of `smollm2-135m`, layer 8" in card
    assert "| `kl` | 0.15 | 0.165 |" in card
    assert "| `kl_recovered` | 0.925 | 0.9175 |" in card
    rows = [line for line in card.splitlines() if "L08 topk16 d512" in line]
    assert [("**this**" in row, row.split("|")[2].strip()) for row in rows] == [
        (False, "8"),
        (True, "16.5"),
        (False, "60"),
    ]
    for fact in ("`study-8`", f"`{MIDDLE}`", f"`{choice.training.dictionary_sha256}`", "`abc123`", f"`{'fe' * 32}`"):
        assert f"| {fact} |" in card


def test_a_training_beside_the_front_is_shown_with_it(ledger: Ledger, tmp_path: Path) -> None:
    beaten = make_sweep(tmp_path / "more", fronts={8: {"a1": (8.0, 0.2), "a2": (9.0, 0.4)}})
    choice = chosen(beaten, "training=a2")
    card = model_card(beaten.sweep(), choice, config_of(beaten, choice))
    assert [line.split("|")[1].strip() for line in card.splitlines() if "L08 topk16" in line] == ["", "**this**"]


@pytest.mark.parametrize(
    ("name", "base_model"),
    [("owner/model-1.5", "owner/model-1.5"), ("smollm2-135m", None), ("/home/me/model", None), ("./a/b", None)],
)
def test_the_base_model_is_named_where_hubs_have_it(ledger: Ledger, name: str, base_model: str | None) -> None:
    choice = chosen(ledger)
    card = model_card(ledger.sweep(), choice, config_of(ledger, choice, model={"config": ModelConfig(name=name)}))
    assert front_matter(card).get("base_model") == base_model


def test_a_local_folder_that_reads_like_a_hub_name_is_no_base_model(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "smol").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    choice = chosen(ledger)
    config = config_of(ledger, choice, model={"config": ModelConfig(name="models/smol")})
    assert "base_model" not in front_matter(model_card(ledger.sweep(), choice, config))


def test_names_cannot_break_out_of_the_card(ledger: Ledger) -> None:
    choice = chosen(ledger)
    corpus = {"config": CorpusConfig(name="a`b``c | <script>"), "bos": "\n---\n|`"}
    card = model_card(ledger.sweep(), choice, config_of(ledger, choice, corpus=corpus))
    assert "```a`b``c | <script>```" in card
    assert r"opened by `` \n---\n|` ``" in card
    assert card.count("\n---\n") == 1 and card.count("<script>") == 1


@pytest.mark.parametrize("there", ["a file", "a folder with a file", "a link to an empty folder"])
def test_what_is_there_is_not_written_over(ledger: Ledger, tmp_path: Path, there: str) -> None:
    output = tmp_path / "hub"
    if there == "a file":
        output.write_text("mine")
    elif there == "a folder with a file":
        output.mkdir()
        (output / ".hidden").write_text("mine")
    else:
        (tmp_path / "elsewhere").mkdir()
        output.symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="hub: is there already"):
        export_dictionary(ledger, chosen(ledger), output)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_filled(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    export_dictionary(ledger, chosen(ledger), tmp_path / "hub")
    assert {path.name for path in (tmp_path / "hub").iterdir()} == FILES


def test_a_damaged_dictionary_is_not_exported(ledger: Ledger, tmp_path: Path) -> None:
    choice = chosen(ledger)
    weights = ledger.folder / choice.training.dictionary / "transcoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    way = rf"delete {re.escape(str(weights.parent))} and start the sweep again, which trains it anew$"
    with pytest.raises(InputError, match=rf"transcoder\.safetensors: hash differs.*; {way}"):
        export_dictionary(ledger, choice, tmp_path / "hub")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    shutil.rmtree(weights.parent)
    with pytest.raises(
        InputError, match=r"config\.json: cannot be read.*; start the sweep again, which trains it anew$"
    ):
        export_dictionary(ledger, choice, tmp_path / "hub")
