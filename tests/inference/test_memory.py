"""What is predicted is what a model takes, and there is room for it in what is free."""

import pytest
import torch

from smelt.configs import DecoderConfig
from smelt.data.characters import ByteTokenizer
from smelt.inference.memory import MIB, Room, Upkeep, default_cache_bytes, predicted_bytes, step_bytes
from smelt.inference.service import TextModel
from smelt.models.decoder import Decoder

CONFIG = DecoderConfig(vocab_size=257, block_size=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_prediction_covers_weights_cache_and_a_step(dtype: torch.dtype) -> None:
    model = TextModel(Decoder(CONFIG).to(dtype), ByteTokenizer(), max_running=3)
    weights = sum(parameter.nbytes for parameter in model.model.parameters())
    cache = sum(keys.nbytes + values.nbytes for keys, values in model.engine.cache.layers)
    assert default_cache_bytes(CONFIG, dtype, CPU, max_running=3) == cache
    assert predicted_bytes(CONFIG, dtype, cache) == weights + cache + step_bytes(CONFIG, dtype)
    assert predicted_bytes(CONFIG, dtype, cache, quantized=True) < predicted_bytes(CONFIG, dtype, cache)


def test_room_is_the_limit_or_what_is_free_less_a_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [1000 * MIB]
    monkeypatch.setattr("smelt.inference.memory.free_memory", lambda _: free[0])
    assert Room(Upkeep(limit_bytes=100)).left(30) == 70
    room = Room(Upkeep())
    assert room.most == room.left(0) == 900 * MIB
    assert room.left(500 * MIB) == 450 * MIB
    free[0] = 100 * MIB
    assert room.left(500 * MIB) == 90 * MIB
