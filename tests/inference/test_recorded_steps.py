"""Steps that are recorded and replayed: the bits of those that are not, for all families, whoever comes and goes."""

from collections.abc import Sequence as Items
from typing import Any

import pytest
import torch

from kernels_built import built_kernels
from smelt.configs import DecoderConfig
from smelt.inference import recorded_steps
from smelt.inference.engine import Engine
from smelt.inference.sequence import Sequence
from smelt.models import kernels, layers
from smelt.models.adapter_folders import UNEMBEDDING, Adapter, Factors, matrices_of
from smelt.models.decoder import Decoder
from smelt.models.quantization import quantize
from smelt.types import SamplingParams

SHAPE = {"vocab_size": 61, "block_size": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
LLAMA = {**SHAPE, "architecture": "llama", "norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {**SHAPE, "n_kv_head": 4, "mlp": "gelu"},
    "llama": LLAMA,
    "untied": {**LLAMA, "tied": False},
    "sliding": {**LLAMA, "architecture": "mistral", "sliding_window": 9},
    "biased": {**LLAMA, "architecture": "qwen2", "qkv_bias": True},
    "normed heads": {**LLAMA, "architecture": "qwen3", "qk_norm": True},
}
PROMPTS = [[5, 9, 2], [1], [7] * 23, [3, 4, 60], [11, 12, 13, 14, 15]]


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels._BUILD, "built", built_kernels())


def make_model(family: str, dtype: torch.dtype = torch.float32) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**FAMILIES[family]))
    decoder.initialize(0)
    with torch.no_grad():  # far from the uniform distribution, so that tokens depend on the context
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return decoder.to(dtype)


def outcome(
    engine: Engine, adapters: Items[str | None] = (None,) * 5, **sampling: Any
) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of answers of different lengths."""
    sequences = [
        Sequence(prompt, SamplingParams(max_tokens=9 + 4 * row, seed=row, **sampling), adapter=adapter)
        for row, (prompt, adapter) in enumerate(zip(PROMPTS, adapters, strict=True))
    ]
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        engine.step()
    return [(sequence.output_ids, sequence.logprobs) for sequence in sequences]


def random_adapter(model: Decoder, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def factors(num_out: int, width: int) -> Factors:
        a, b = (torch.randn(shape, generator=generator) for shape in ((4, width), (num_out, 4)))
        return Factors(0.2 * a, 0.2 * b, 1.0)

    return {
        name: tuple(factors(num_out, matrix.width) for num_out in matrix.num_rows)
        for name, matrix in matrices_of(model.config).items()
        if name != UNEMBEDDING
    }


def unrecorded(model: Decoder, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Engine:
    engine = Engine(model, **settings)
    monkeypatch.setattr(engine._recorded, "_chances", 0)
    return engine


@pytest.mark.parametrize("how", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_give_the_same_bits(family: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(family, torch.float32 if how == "fp32" else torch.bfloat16)
    model = quantize(model, "int8") if how == "int8" else model
    engine, ordinary = Engine(model, max_running=3), unrecorded(model, monkeypatch, max_running=3)
    for _ in range(2):  # the second time with recordings, and with prefixes in the cache
        assert outcome(engine, temperature=1.0) == outcome(ordinary, temperature=1.0)
    assert engine._recorded.sizes == [1, 2, 3]


def test_what_a_process_computes_once_and_keeps_hinders_only_its_first_step() -> None:
    layers._kept_frequencies.cache_clear()
    engine = Engine(make_model("llama"))
    for recorded in ([], [1]):
        engine.add(Sequence([1], SamplingParams(max_tokens=1)))
        engine.step()
        assert engine._recorded.sizes == recorded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_may_change_and_move_between_replays(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", dtype)
    engine, ordinary = Engine(model), unrecorded(make_model("llama", dtype), monkeypatch)
    answers = []
    for number in range(6):  # past the slots that there is room for at first
        for each in (engine, ordinary):
            each.adapters.keep(f"a{number}", random_adapter(model, number), set())
        newest = [f"a{max(0, number - row)}" for row in range(5)]
        answers.append(outcome(engine, newest))
        assert answers[-1] == outcome(ordinary, newest)
    assert answers[0] != answers[-1]
    assert engine._recorded.sizes == [1, 2, 3, 4, 5]
    assert len({key.adapters for key in engine._recorded._kept}) == 1


def test_company_without_adapters_goes_the_ordinary_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    engine, ordinary = Engine(model), unrecorded(make_model("llama"), monkeypatch)
    for each in (engine, ordinary):
        each.adapters.keep("a", random_adapter(model, 1), set())
    mixed = ["a", None, "a", None, "a"]
    assert outcome(engine, mixed) == outcome(ordinary, mixed)
    assert engine._recorded.sizes == [1]


def test_blocks_may_move_between_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    settings = {"max_running": 5, "block_size": 8, "num_blocks": 9}
    engine = Engine(model, **settings)
    assert outcome(engine, temperature=0.0) == outcome(unrecorded(model, monkeypatch, **settings), temperature=0.0)
    assert engine.stats.total_preempted > 0


def test_threads_may_change_between_replays() -> None:
    engine, num_threads = Engine(make_model("llama")), torch.get_num_threads()
    first, _ = zip(*outcome(engine), strict=True)
    torch.set_num_threads(num_threads + 1)
    try:
        second, _ = zip(*outcome(engine), strict=True)
    finally:
        torch.set_num_threads(num_threads)
    assert first == second
    assert len(engine._recorded._kept) > len(engine._recorded.sizes)


def test_more_sequences_than_our_products_take_go_the_ordinary_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_steps, "MOST_RECORDED", 2)
    engine = Engine(make_model("llama"))
    outcome(engine)
    assert engine._recorded.sizes == [1, 2]


def test_a_model_that_torch_has_to_compute_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gpt2")
    for block in model.blocks:
        monkeypatch.setattr(block.mlp, "gelu", torch.nn.functional.gelu)
    engine = Engine(model)
    assert outcome(engine) == outcome(unrecorded(model, monkeypatch))
    assert engine._recorded.sizes == []
