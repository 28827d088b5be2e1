"""Vectors are the means of transformers' last hidden states, whatever they were packed or cut into."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from families import save_reference
from smelt.data.characters import ByteTokenizer
from smelt.errors import InvalidInput
from smelt.inference.embeddings import embed_in_slices, join_vectors
from smelt.inference.service import TextModel
from smelt.models.decoder import Decoder
from smelt.models.weights import read_model

LENGTHS = (1, 7, 30, 2, 19, 32, 5)


def inputs_of(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


@torch.inference_mode()
def reference_vectors(model: Any, inputs: list[list[int]]) -> np.ndarray:
    return np.stack([model.base_model(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy() for ids in inputs])


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama 3 rope", "mistral sliding", "qwen3"])
def test_vectors_are_the_means_of_transformers_hidden_states(family: str, tmp_path: Path) -> None:
    reference = save_reference(family, tmp_path)
    model = read_model(tmp_path)
    inputs = inputs_of(model.config.vocab_size)
    expected = reference_vectors(reference, inputs)
    for slice_tokens in (4, 16, 64):
        slices = list(embed_in_slices(model, inputs, slice_tokens))
        found = join_vectors(slices, len(inputs), model.config.n_embd)
        assert np.abs(found - expected).max() < 1e-5
        assert len(slices) >= sum(LENGTHS) / slice_tokens


def test_no_slice_is_larger_than_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_reference("llama", tmp_path)
    model = read_model(tmp_path)
    sizes = []
    forward = Decoder.forward

    def counting(self: Decoder, batch: Any, attend: Any = None) -> torch.Tensor:
        sizes.append(batch.tokens.numel())
        return forward(self, batch, attend)

    monkeypatch.setattr(Decoder, "forward", counting)
    list(embed_in_slices(model, inputs_of(model.config.vocab_size), 16))
    assert max(sizes) <= 16
    assert sum(sizes) == sum(LENGTHS)
    assert len(sizes) < 10  # short ones share a pass


@pytest.fixture
def text_model(tmp_path: Path) -> TextModel:
    save_reference("gpt2", tmp_path)
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = 61  # type: ignore[misc]
    return TextModel(read_model(tmp_path), tokenizer)


def test_texts_and_token_ids_may_be_embedded(text_model: TextModel) -> None:
    vectors = text_model.embed(["&'(", [38, 39, 40], "("])
    assert vectors.shape == (3, text_model.config.n_embd)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert np.abs(vectors[0] - vectors[2]).max() > 0.01


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["("] * 2 + ["(" * 99], "input 2 has 99 tokens, but the model's context is 64"),
        ([""], "input 0 has no tokens"),
        ([[1], [5, 61]], "input 1 has token ids outside of 0..60"),
        ([[-1]], "outside of"),
    ],
)
def test_what_cannot_be_embedded_is_named(text_model: TextModel, inputs: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as refused:
        text_model.embed(inputs)
    assert refused.value.param == "input"
