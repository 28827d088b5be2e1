"""The predicted memory is what a model of that shape holds, counted tensor by tensor."""

import pytest
import torch

from families import random_state
from smelt.configs import DecoderConfig
from smelt.models.decoder import Decoder
from smelt.models.footprint import adapter_values, kv_bytes_per_token, weights_bytes
from smelt.models.quantization import quantize
from smelt.training.session import SessionTrainer

GPT2 = DecoderConfig(vocab_size=61, block_size=16, n_layer=2, n_head=4, n_embd=32)
LLAMA = DecoderConfig(
    architecture="llama",
    vocab_size=61,
    block_size=16,
    n_layer=3,
    n_head=4,
    n_kv_head=2,
    head_dim=16,
    n_embd=32,
    n_inner=80,
    position="rope",
    norm="rmsnorm",
    mlp="swiglu",
    bias=False,
    qkv_bias=False,
    tied=False,
)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_weights_are_counted_to_the_byte(config: DecoderConfig) -> None:
    held = sum(tensor.to(torch.bfloat16).nbytes for tensor in random_state(config).values())
    assert weights_bytes(config, 2) == held
    assert weights_bytes(config, 4) == 2 * held


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_quantized_model_is_counted_to_the_byte(config: DecoderConfig) -> None:
    model = quantize(Decoder(config).to(torch.bfloat16), "int8")
    held = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    assert weights_bytes(config, 2, quantized=True) == sum(held.values())


def test_the_cache_holds_a_key_and_a_value_per_layer_and_head() -> None:
    assert kv_bytes_per_token(LLAMA, 2) == 2 * 3 * 2 * 16 * 2
    assert kv_bytes_per_token(GPT2, 4) == 2 * 2 * 32 * 4


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_an_adapter_has_as_many_values_as_are_trained(config: DecoderConfig) -> None:
    trained = SessionTrainer(Decoder(config)).create(rank=3, seed=0, train_unembed=False)
    assert adapter_values(config, 3) == trained.num_values
