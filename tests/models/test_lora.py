import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adapters import PeftModel
from kernels_built import built_kernels
from smelt.errors import NotFound, UnsafeFile, UnsupportedModel
from smelt.models import lora as lora_module
from smelt.models.adapter_folders import (
    Factors,
    Matrix,
    matrices_of,
    merged,
    read_adapter,
    write_adapter,
)
from smelt.models.batch import NO_ADAPTER, Batch
from smelt.models.decoder import Decoder
from smelt.models.folders import ADAPTER_FILE, ADAPTER_WEIGHTS
from smelt.models.lora import Lora, LoraMatrix, lay_out
from smelt.models.quantization import quantize
from smelt.models.weights import assemble, read_model

ADAPTERS = {
    "a": {"r": 4, "lora_alpha": 8},
    "b": {"r": 9, "lora_alpha": 3, "use_rslora": True},
    "c": {"r": 2, "lora_alpha": 5},
}
TOKENS = torch.randint(0, 61, (6, 11), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=["llama", "gpt2", "qwen3", "llama biases"])
def peft_model(request: pytest.FixtureRequest, tmp_path: Path) -> PeftModel:
    adapters = {name: dict(settings) for name, settings in ADAPTERS.items()}
    is_gpt2 = request.param == "gpt2"
    adapters["c"]["target_modules"] = ["c_fc"] if is_gpt2 else ["v_proj", "up_proj"]  # parts of fused matrices
    adapters["c"]["alpha_pattern"] = {"mlp.c_fc": 1} if is_gpt2 else {"up_proj": 1}
    return PeftModel(request.param, tmp_path, adapters)


def with_adapters(peft_model: PeftModel) -> Decoder:
    model = read_model(peft_model.folder)
    lora = Lora(model)
    for slot, name in enumerate(peft_model.names):
        lora.put(slot, read_adapter(peft_model.folder_of(name), model.config))
    return model


def logits(model: Decoder, slots: list[int] | None = None) -> torch.Tensor:
    """(6, 11, V), each row with the adapter of its slot."""
    ids = None if slots is None else torch.tensor(slots)[:, None].expand(TOKENS.shape)
    with torch.no_grad():
        return model.logits(model(Batch(TOKENS, adapter_ids=ids)))


def test_each_row_has_its_own_adapter_as_in_peft(peft_model: PeftModel) -> None:
    slots = [2, NO_ADAPTER, 0, 1, 0, NO_ADAPTER]
    found = logits(with_adapters(peft_model), slots)
    for row, slot in enumerate(slots):
        name = None if slot == NO_ADAPTER else peft_model.names[slot]
        expected = peft_model.logits(TOKENS[row : row + 1], name)[0]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=0)


def test_tokens_of_one_row_may_have_different_adapters(peft_model: PeftModel) -> None:
    """Up to where a sequence changes its adapter, nothing differs: an engine packs all its tokens into one row."""
    model = with_adapters(peft_model)
    ids = torch.tensor([[0] * 5 + [1] * 6] * 6)
    with torch.no_grad():
        found = model.logits(model(Batch(TOKENS, adapter_ids=ids)))
    torch.testing.assert_close(found[:, :5], logits(model, [0] * 6)[:, :5], atol=1e-6, rtol=0)
    assert (found[:, 5:] - logits(model, [0] * 6)[:, 5:]).abs().max() > 0.01


def test_merged_weights_say_the_same(peft_model: PeftModel) -> None:
    model = with_adapters(peft_model)
    adapter = read_adapter(peft_model.folder_of("b"), model.config)
    plain = read_model(peft_model.folder)
    whole = assemble(*merged(plain.state_dict(), adapter, model.config))
    torch.testing.assert_close(logits(whole), logits(model, [1] * 6), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2 tied", "gpt2"])
def test_the_unembedding_s_adapter_is_peft_s_and_can_be_merged(family: str, tmp_path: Path) -> None:
    targets = ["c_attn", "lm_head"] if family == "gpt2" else ["q_proj", "lm_head"]
    peft_model = PeftModel(family, tmp_path, {"a": {"r": 4, "target_modules": targets}})
    model = read_model(peft_model.folder)
    lora = Lora(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says that it saves the frozen unembedding too
        adapter = read_adapter(peft_model.folder_of("a"), model.config)
    lora.put(0, adapter)
    slots = [0, NO_ADAPTER, 0, NO_ADAPTER, 0, 0]
    ids = torch.tensor(slots)[:, None].expand(TOKENS.shape)
    with torch.no_grad():
        hidden_NC = model(Batch(TOKENS, adapter_ids=ids)).flatten(0, 1)
        found = lora.logits(hidden_NC, ids.flatten().numpy()).unflatten(0, TOKENS.shape)
    expected = peft_model.logits(TOKENS, "a")
    for row, slot in enumerate(slots):
        wanted = peft_model.logits(TOKENS[row : row + 1], None)[0] if slot == NO_ADAPTER else expected[row]
        torch.testing.assert_close(found[row], wanted, atol=1e-5, rtol=0)
    write_adapter(adapter, model.config, tmp_path / "written")
    torch.testing.assert_close(peft_logits(peft_model.folder, tmp_path / "written"), expected, atol=1e-5, rtol=0)
    config, state = merged(read_model(peft_model.folder).state_dict(), adapter, model.config)
    assert not config.tied
    torch.testing.assert_close(logits(assemble(config, state)), expected, atol=1e-5, rtol=0)


def test_rows_without_an_adapter_are_the_model_s_own_bits(peft_model: PeftModel) -> None:
    plain = read_model(peft_model.folder)
    model = with_adapters(peft_model)
    assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model, [NO_ADAPTER] * 6), logits(plain))
    mixed = logits(model, [NO_ADAPTER, 0, 1, 2, 0, 1])
    assert torch.equal(mixed[0], logits(plain)[0])


def test_a_cleared_slot_changes_nothing_and_a_filled_one_is_replaced(peft_model: PeftModel) -> None:
    model = read_model(peft_model.folder)
    before = logits(model)
    lora = Lora(model)
    adapters = [read_adapter(peft_model.folder_of(name), model.config) for name in ("b", "c")]
    lora.put(0, adapters[0])
    lora.put(0, adapters[1])
    found = logits(model, [0] * 6)
    torch.testing.assert_close(found, peft_model.logits(TOKENS, "c"), atol=1e-5, rtol=0)
    lora.clear(0)
    torch.testing.assert_close(logits(model, [0] * 6), before, atol=1e-6, rtol=0)


def test_adapters_sit_on_int8_weights_too(peft_model: PeftModel) -> None:
    plain = read_model(peft_model.folder)
    expected = peft_model.logits(TOKENS, "a")
    model = quantize(read_model(peft_model.folder), "int8")
    Lora(model).put(0, read_adapter(peft_model.folder_of("a"), model.config))
    error = (logits(model, [0] * 6) - expected).norm()
    assert error < 0.1 * (logits(plain) - expected).norm()


def test_many_adapters_grow_the_stacks(peft_model: PeftModel) -> None:
    model = read_model(peft_model.folder)
    lora = Lora(model)
    adapters = [read_adapter(peft_model.folder_of(name), model.config) for name in peft_model.names]
    for slot in range(20):
        lora.put(slot, adapters[slot % 3])
    found = logits(model, [19, 0, 13, 5, 8, NO_ADAPTER])
    for row, name in enumerate(["b", "a", "b", "c", "c", None]):
        expected = peft_model.logits(TOKENS[row : row + 1], name)[0]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=0)


def test_gradients_reach_each_adapter_s_own_factors(peft_model: PeftModel) -> None:
    """The gradient of a sum over rows is, slot by slot, the one of a pass over that slot's rows alone."""
    model = read_model(peft_model.folder).requires_grad_(False)
    lora = Lora(model)
    for slot, name in enumerate(peft_model.names):
        lora.put(slot, read_adapter(peft_model.folder_of(name), model.config))
    factors = [stack.requires_grad_() for matrix in lora.matrices.values() for stack in (matrix.a, matrix.b)]

    def gradients(rows: list[int], slots: list[int]) -> list[torch.Tensor]:
        ids = torch.tensor(slots)[:, None].expand(len(rows), TOKENS.shape[1])
        loss = model.logits(model(Batch(TOKENS[rows], adapter_ids=ids))).logsumexp(-1).sum()
        return list(torch.autograd.grad(loss, factors, allow_unused=True, materialize_grads=True))

    together = gradients([0, 1, 2, 3], [0, 2, 0, NO_ADAPTER])
    alone = {slot: gradients(rows, [slot] * len(rows)) for slot, rows in ((0, [0, 2]), (2, [1]))}
    assert sum(float(gradient.abs().sum()) for gradient in together) > 0
    for index, gradient in enumerate(together):
        assert not gradient[1].any()
        for slot in (0, 2):
            torch.testing.assert_close(gradient[slot], alone[slot][index][slot], atol=1e-4, rtol=1e-4)


# --- The kernel for few rows -----------------------------------------------------------------------------


def random_matrix(rows: tuple[int, ...], width: int, ranks: list[int], dtype: torch.dtype) -> LoraMatrix:
    torch.manual_seed(5)
    matrix = LoraMatrix(Matrix(tuple("pqr"[: len(rows)]), rows, width), dtype, torch.device("cpu"))
    matrix.reserve(len(ranks), max(ranks))
    for slot, rank in enumerate(ranks):
        parts = [Factors(torch.randn(rank, width) / width**0.5, torch.randn(n, rank), 0.3 + slot) for n in rows]
        matrix.put(slot, parts if slot else [None, *parts[1:]])
    return matrix


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    built = built_kernels()
    monkeypatch.setattr(lora_module, "kernels", lambda: built)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "ranks"),
    [((576, 192, 192), 576, [16, 8, 16]), ((300, 37), 33, [3, 5, 1]), ((7,), 5, [24, 1, 9]), ((1, 1), 1, [8, 8, 8])],
)
def test_the_kernel_adds_what_torch_adds(
    kernel: None, rows: tuple[int, ...], width: int, ranks: list[int], dtype: torch.dtype, error: float
) -> None:
    matrix = random_matrix(rows, width, ranks, dtype)
    slots = np.array([2, -1, 0, 1, 1, 1, -1, 2, 1, 1, 1, 0])
    tiles = lay_out(slots, torch.device("cpu"))
    assert tiles is not None
    x, y = torch.randn(12, width).to(dtype), torch.randn(12, sum(rows)).to(dtype)
    expected = y.double()
    for row, slot in enumerate(slots):
        if slot >= 0:
            hidden = (matrix.a[slot].double() @ x[row].double() * matrix.scales[slot].double()).view(len(rows), -1)
            parts = matrix.b[slot].double().split(list(rows), dim=1)
            expected[row] += torch.cat([h @ b for h, b in zip(hidden, parts, strict=True)])
    by_torch = matrix(x, y, tiles)  # with gradients, so without the kernel
    with torch.no_grad():
        by_kernel = matrix(x, y.clone(), tiles)
    torch.testing.assert_close(by_kernel.double(), expected, atol=error, rtol=error / 5)
    torch.testing.assert_close(by_torch.double(), expected, atol=error, rtol=error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_added_to_a_row_does_not_depend_on_its_company(kernel: None, dtype: torch.dtype) -> None:
    matrix = random_matrix((96, 40), 70, [8, 16, 4], dtype)
    slots = np.array([2, -1, 0, 1, 1, 1, -1, 2, 1, 1, 1, 0, 1])
    x, y = torch.randn(13, 70).to(dtype), torch.randn(13, 136).to(dtype)

    def added(rows: list[int]) -> torch.Tensor:
        tiles = lay_out(slots[rows], torch.device("cpu"))
        with torch.no_grad():
            return y[rows] if tiles is None else matrix(x[rows], y[rows], tiles)

    together = added(list(range(13)))
    for row in range(13):
        assert torch.equal(added([row])[0], together[row])


# --- Folders ---------------------------------------------------------------------------------------------


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    """What peft makes of a model's folder and an adapter's."""
    import peft
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # peft still asks transformers for what it calls otherwise now
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        return model.eval()(TOKENS).logits


def test_what_is_written_is_read_by_peft_and_by_us(peft_model: PeftModel, tmp_path: Path) -> None:
    config = read_model(peft_model.folder).config
    adapter = read_adapter(peft_model.folder_of("a"), config)
    write_adapter(adapter, config, tmp_path / "written")
    again = read_adapter(tmp_path / "written", config)
    assert again.keys() == adapter.keys()
    for name, parts in adapter.items():
        for ours, theirs in zip(parts, again[name], strict=True):
            assert ours is not None
            assert theirs is not None
            assert torch.equal(ours.a, theirs.a)
            assert torch.equal(ours.b, theirs.b)
            assert ours.scale == theirs.scale
    found = peft_logits(peft_model.folder, tmp_path / "written")
    torch.testing.assert_close(found, peft_model.logits(TOKENS, "a"), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
    return PeftModel("llama", tmp_path_factory.mktemp("llama"), {"a": ADAPTERS["a"]})


def copied(llama: PeftModel, folder: Path) -> Path:
    source = llama.folder_of("a")
    folder.mkdir(exist_ok=True)
    for name in (ADAPTER_FILE, ADAPTER_WEIGHTS):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alpha_pattern": {".*q_proj": 3}}, "alpha_pattern"),
    ],
)
def test_other_kinds_of_adapters_are_refused(llama: PeftModel, tmp_path: Path, change: dict, reason: str) -> None:
    folder = copied(llama, tmp_path)
    saved = json.loads((folder / ADAPTER_FILE).read_text())
    (folder / ADAPTER_FILE).write_text(json.dumps(saved | change))
    with pytest.raises(UnsupportedModel, match=reason):
        read_adapter(folder, read_model(llama.folder).config)


def test_adapters_of_another_model_are_refused_with_the_name(llama: PeftModel, tmp_path: Path) -> None:
    config = read_model(llama.folder).config
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.mlp\.gate_proj have shapes .* \(99, rank\)"):
        read_adapter(copied(llama, tmp_path), config.replace(n_inner=99))
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.down_proj.lora_A.weight belongs to nothing"):
        read_adapter(copied(llama, tmp_path), config.replace(n_layer=1))


def test_half_an_adapter_is_refused(llama: PeftModel, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path)
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    del tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    with pytest.raises(UnsupportedModel, match="only one of the two factors of model.layers.0.mlp.up_proj"):
        read_adapter(folder, read_model(llama.folder).config)


def test_folders_without_an_adapter_say_what_is_missing(llama: PeftModel, tmp_path: Path) -> None:
    config = read_model(llama.folder).config
    with pytest.raises(NotFound, match="no adapter_config.json"):
        read_adapter(tmp_path, config)
    folder = copied(llama, tmp_path)
    (folder / ADAPTER_WEIGHTS).write_bytes(b"garbage")
    with pytest.raises(UnsupportedModel, match="damaged"):
        read_adapter(folder, config)
    (folder / ADAPTER_WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(UnsafeFile, match="pickle"):
        read_adapter(folder, config)


def test_every_matrix_of_a_block_can_be_changed(llama: PeftModel) -> None:
    matrices = matrices_of(read_model(llama.folder).config)
    assert len(matrices) == 2 * 4 + 1
    assert matrices["head"].names == ("lm_head",)
    assert matrices["blocks.1.attention.qkv"].names[2] == "model.layers.1.self_attn.v_proj"


# --- Tiles -----------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-1, 9), max_size=60), st.integers(0, 60))
def test_every_row_with_an_adapter_has_one_place_in_a_tile_of_its_slot(slots: list[int], num_more: int) -> None:
    ids = np.array(slots + [3] * num_more, np.int64)
    tiles = lay_out(ids, torch.device("cpu"))
    rows = np.flatnonzero(ids >= 0)
    if tiles is None:
        assert not len(rows)
        return
    num_tiles, size = tiles.grid.shape
    of_tiles = np.arange(10)[tiles.slots] if isinstance(tiles.slots, slice) else tiles.slots.numpy()
    assert len(of_tiles) == num_tiles
    flat = tiles.grid.flatten().numpy()
    found_rows = np.arange(len(ids)) if tiles.rows is None else tiles.rows.numpy()
    places = np.arange(len(ids)) if tiles.places is None else tiles.places.numpy()
    assert sorted(found_rows) == rows.tolist()
    assert (flat[places] == found_rows).all()
    assert (of_tiles[places // size] == ids[found_rows]).all()


def test_few_long_groups_are_not_padded_to_the_longest() -> None:
    ids = np.repeat(np.arange(16), [500] + [1] * 15)
    tiles = lay_out(ids, torch.device("cpu"))
    assert tiles is not None
    assert tiles.grid.numel() < 1200
