import pickle
from pathlib import Path

import pytest
import torch

from families import our_logits, random_state, write_nanogpt
from smelt.configs import DecoderConfig
from smelt.data.characters import ByteTokenizer
from smelt.errors import MissingDependency
from smelt.models import loading
from smelt.models.loading import convert, load_model
from smelt.models.weights import write_model

BYTES = DecoderConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=8)
LETTERS = DecoderConfig(vocab_size=3, block_size=16, n_layer=1, n_head=2, n_embd=8, mlp="gelu_exact")


def test_a_folder_gives_model_and_tokenizer(tmp_path: Path) -> None:
    write_model(BYTES, random_state(BYTES), tmp_path)
    assert load_model(tmp_path)[1] is None
    ByteTokenizer().save(tmp_path)
    model, tokenizer = load_model(tmp_path, torch.bfloat16)
    assert tokenizer is not None
    assert tokenizer.name == "bytes"
    assert (model.config, model.embedding.weight.dtype) == (BYTES, torch.bfloat16)


def test_nanogpt_brings_the_vocabulary_beside_it(tmp_path: Path) -> None:
    path = write_nanogpt(LETTERS, random_state(LETTERS), tmp_path)
    assert load_model(path)[1] is None
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3, "stoi": {"a": 0, "b": 1, "c": 2}}))
    _, tokenizer = load_model(path)
    assert tokenizer is not None
    assert tokenizer.encode("cab") == [2, 0, 1]


def test_nanogpt_of_gpt2_s_size_has_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def offline(spec: str, texts: object) -> None:
        asked.append(spec)
        raise MissingDependency("offline")

    monkeypatch.setattr(loading, "make_tokenizer", offline)
    config = LETTERS.replace(vocab_size=50304)
    path = write_nanogpt(config, random_state(config), tmp_path)
    with pytest.raises(MissingDependency):
        load_model(path)
    assert asked == ["gpt2"]


def test_a_converted_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    path = write_nanogpt(LETTERS, random_state(LETTERS), tmp_path)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3, "stoi": {"a": 0, "b": 1, "c": 2}}))
    convert(path, tmp_path / "converted")
    ours, tokenizer = load_model(path)
    converted, converted_tokenizer = load_model(tmp_path / "converted")
    tokens = torch.tensor([[0, 1, 2, 2, 1]])
    assert torch.equal(our_logits(ours, tokens), our_logits(converted, tokens))
    assert tokenizer is not None
    assert converted_tokenizer is not None
    assert converted_tokenizer.encode("abc") == tokenizer.encode("abc")
