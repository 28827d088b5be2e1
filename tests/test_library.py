import subprocess
import sys
from pathlib import Path

import pytest
import torch

import smelt
from families import random_state
from smelt.configs import DecoderConfig
from smelt.data.characters import ByteTokenizer
from smelt.errors import AlreadyExists, ConfigError, NotFound, TokenizerError
from smelt.models.linear import Int8Linear
from smelt.models.weights import write_model

CONFIG = DecoderConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=8)
TEXT = "".join(f"Line {number} says that {number} and {number + 1} are neighbours.\n" for number in range(200))


def make_model(folder: Path, with_tokenizer: bool = True) -> str:
    write_model(CONFIG, random_state(CONFIG), folder)
    if with_tokenizer:
        ByteTokenizer().save(folder)
    return str(folder)


def test_data_training_and_text_in_a_few_lines(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("input.txt").write_text(TEXT)
    dataset = smelt.prepare_data("input.txt", "lines", tokenizer="bytes", block_size=16)
    assert dataset.split("train").num_tokens + dataset.split("val").num_tokens >= len(TEXT)
    fields = {"dataset": "lines", "n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "dtype": "float32"}
    summary = smelt.train(fields, max_iters=3, batch_size=2, eval_iters=1, device="cpu", compile="false")
    assert summary.step == 3
    model = smelt.load("out", device="cpu", dtype="float32")
    text = model.generate("Line", max_tokens=8, seed=1)
    assert text == "".join(model.stream("Line", max_tokens=8, seed=1))
    with pytest.raises(ConfigError, match="max_itres"):
        smelt.train(fields, max_itres=3)


def test_a_restarted_command_goes_on_where_it_was(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun and SLURM do: the very same command again."""
    monkeypatch.chdir(tmp_path)
    Path("input.txt").write_text(TEXT)
    fields = {"data_path": "input.txt", "tokenizer": "bytes", "n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16}
    fields |= {"batch_size": 2, "eval_iters": 1, "device": "cpu", "compile": "false", "resume_if_begun": True}
    assert smelt.train(fields, max_iters=2).step == 2
    again = smelt.train(fields, max_iters=5)
    assert (again.step, again.num_tokens) == (5, 3 * 2 * 16)
    with pytest.raises(AlreadyExists):
        smelt.train(fields, resume_if_begun=False)


def test_ranks_that_nobody_started_are_refused(home: Path) -> None:
    with pytest.raises(ConfigError, match="smelt train --ranks 2"):
        smelt.train(data_path="builtin:pydoc", ranks=2)


def test_a_name_and_a_folder_load_in_the_dtype_asked_for(home: Path) -> None:
    folder = make_model(home / "models" / "small")
    assert smelt.load("small", device="cpu", dtype="float32").config == CONFIG
    assert smelt.load(folder, device="cpu", dtype="bfloat16").model.embedding.weight.dtype == torch.bfloat16


def test_weights_are_rounded_where_somebody_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(home / "models" / "small")
    assert not isinstance(smelt.load(folder, device="cpu").model.head, Int8Linear)
    assert isinstance(smelt.load(folder, device="cpu", quantize="int8").model.head, Int8Linear)
    monkeypatch.setenv("SMELT_QUANTIZE", "int8")
    assert isinstance(smelt.load(folder, device="cpu").model.head, Int8Linear)
    assert smelt.load(folder, device="cpu").generate("a", max_tokens=3, temperature=0.0) is not None
    with pytest.raises(ConfigError, match="quantize"):
        smelt.load(folder, quantize="int4")


def test_settings_decide_where_nothing_is_given(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(home / "models" / "small")
    monkeypatch.setenv("SMELT_DTYPE", "float16")
    monkeypatch.setenv("SMELT_DEVICE", "cpu")
    assert smelt.load("small").model.embedding.weight.dtype == torch.float16


def test_what_cannot_be_loaded_says_why(home: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nothing-here"):
        smelt.load("nothing-here")
    with pytest.raises(TokenizerError, match=r"has no tokenizer; put its tokenizer.json"):
        smelt.load(make_model(tmp_path / "bare", with_tokenizer=False))
    with pytest.raises(ConfigError, match="dtype"):
        smelt.load("x", dtype="int3")


def test_the_public_names_are_these_and_importing_them_is_cheap() -> None:
    names = ["TextModel", "TrainConfig", "evaluate", "load", "load_classifier", "prepare_data", "train"]
    assert sorted(smelt.__all__) == names
    assert all(getattr(smelt, name) for name in smelt.__all__)
    code = "import sys, smelt, smelt.library; assert 'torch' not in sys.modules; smelt.TrainConfig()"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = smelt.lode
