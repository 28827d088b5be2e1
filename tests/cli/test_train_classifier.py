"""`smelt train-classifier`: from a table to a model and its scores; what is missing is named."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from smelt.cli.train_classifier import command
from smelt.configs import RUN_CONFIG, read_config_file
from smelt.control.runs import command_line
from smelt.errors import DataError, UnsupportedModel
from smelt.library import load, load_classifier
from smelt.run_configs import CLASSIFIER_SECTIONS, ClassifierConfig

QUICK = ["--tokenizer", "bpe:300", "--num-buckets", "50", "--n_embd", "8", "--batch_size", "8", "--device", "cpu"]


@pytest.fixture
def data(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    words = {"animal": ("cat", "dog", "cow"), "fruit": ("fig", "plum", "pear")}
    starts = ("a", "the", "one", "my", "your")
    rows = [f"{label},{start} {word}" for label, each in words.items() for word in each for start in starts]
    Path("texts.csv").write_text("\n".join(["label,text", *rows]))
    return "texts.csv"


def smelt(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)


def test_from_a_table_to_labels(data: str) -> None:
    done = smelt("--data", data, "--valid", data, "--out-dir", "things", "--learning_rate", "5e-2", *QUICK)
    assert done.exit_code == 0, done.output
    assert "accuracy 1.0000, macro F1 1.0000" in done.output
    assert "serve it: smelt serve things" in done.output
    [found] = load_classifier("things", device="cpu").classify(["the plum"])
    assert max(found, key=lambda label: found[label]) == "fruit"
    with pytest.raises(UnsupportedModel, match="is a classifier, which writes no text"):
        load("things", device="cpu")
    values = read_config_file(Path("things", RUN_CONFIG))
    assert values["recipe"] == "classify"
    assert command_line(values).startswith("smelt train-classifier --data")


def test_what_is_missing_is_named(data: str) -> None:
    assert "give --data" in smelt("--out-dir", "out").output
    Path("other.csv").write_text("kind,words\n1,a\n2,b")
    with pytest.raises(DataError, match="--label-column"):
        CliRunner().invoke(command, ["--data", "other.csv", *QUICK], catch_exceptions=False)


def test_every_field_has_a_flag() -> None:
    named = [name for section in CLASSIFIER_SECTIONS.values() for name in section]
    assert sorted(named) == sorted(set(ClassifierConfig.model_fields) - {"recipe"})
