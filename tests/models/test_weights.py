import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import (
    FAMILIES,
    make_reference,
    nanogpt_checkpoint,
    our_logits,
    random_state,
    reference_logits,
    save_reference,
    write_nanogpt,
)
from smelt.configs import DecoderConfig
from smelt.errors import NotFound, OutOfSpace, UnsafeFile, UnsupportedModel
from smelt.models import weights
from smelt.models.architectures import from_hf_config, to_hf_config
from smelt.models.folders import read_config
from smelt.models.weights import (
    from_hf_tensors,
    read_model,
    read_nanogpt,
    to_hf_tensors,
    write_model,
)

TOKENS = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers_reading_its_folder(name: str, tmp_path: Path) -> None:
    reference = save_reference(name, tmp_path)
    model = read_model(tmp_path)
    assert (our_logits(model, TOKENS) - reference_logits(reference, TOKENS)).abs().max() < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers_reading_our_folder(name: str, tmp_path: Path) -> None:
    import transformers

    reference = save_reference(name, tmp_path / "theirs")
    model = read_model(tmp_path / "theirs")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    write_model(model.config, model.state_dict(), tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(reference)
    assert (our_logits(model, TOKENS) - reference_logits(again, TOKENS)).abs().max() < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_number_of_parameters_by_formula_is_the_real_count(name: str, tmp_path: Path) -> None:
    reference = save_reference(name, tmp_path)
    model = read_model(tmp_path)
    ours = sum(parameter.numel() for parameter in model.parameters())
    assert model.config.num_parameters == ours == sum(parameter.numel() for parameter in reference.parameters())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_survive_the_round_trip_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    config = from_hf_config(make_reference(name).config.to_dict())
    state = random_state(config, dtype=dtype)
    again = from_hf_tensors(config, to_hf_tensors(config, state))
    assert list(again) == list(state)
    for tensor_name, tensor in state.items():
        assert torch.equal(again[tensor_name], tensor)
        assert again[tensor_name].dtype == dtype
        assert again[tensor_name].is_contiguous()


def test_gpt2_without_biases_is_exported_with_zeros_and_read_back(tmp_path: Path) -> None:
    import transformers

    config = DecoderConfig(vocab_size=61, block_size=64, n_layer=2, n_head=4, n_embd=32, bias=False, qkv_bias=False)
    state = random_state(config)
    write_model(config, state, tmp_path)
    again = read_model(tmp_path)
    assert again.config == config
    assert set(again.state_dict()) == set(state)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (our_logits(again, TOKENS) - reference_logits(reference, TOKENS)).abs().max() < 1e-5


def test_biases_that_appeared_where_the_config_says_there_are_none_are_refused() -> None:
    config = DecoderConfig(vocab_size=61, block_size=64, n_layer=1, n_head=4, n_embd=32, bias=False, qkv_bias=False)
    tensors = to_hf_tensors(config, random_state(config))
    tensors["transformer.ln_f.bias"][3] = 1.0
    with pytest.raises(UnsupportedModel, match=r"transformer.ln_f.bias is not zero"):
        from_hf_tensors(config, tensors)


def test_shards_are_written_and_read(tmp_path: Path) -> None:
    config = DecoderConfig(vocab_size=61, block_size=64, n_layer=2, n_head=4, n_embd=32)
    state = random_state(config)
    write_model(config, state, tmp_path, shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    for name, tensor in read_model(tmp_path).state_dict().items():
        assert torch.equal(tensor, state[name])


def test_transformers_reads_our_shards_and_we_read_its(tmp_path: Path) -> None:
    import transformers

    reference = make_reference("qwen3")
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    model = read_model(tmp_path / "theirs")
    assert (our_logits(model, TOKENS) - reference_logits(reference, TOKENS)).abs().max() < 1e-5
    write_model(model.config, model.state_dict(), tmp_path / "ours", shard_bytes=20_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(reference_logits(again, TOKENS), reference_logits(reference, TOKENS))


def test_a_folder_of_the_bare_model_with_derived_buffers_is_read(tmp_path: Path) -> None:
    reference = save_reference("gpt2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril().bool()
    save_file(bare, tmp_path / "model.safetensors")
    assert (our_logits(read_model(tmp_path), TOKENS) - reference_logits(reference, TOKENS)).abs().max() < 1e-5


def test_dtype_is_kept_or_converted(tmp_path: Path) -> None:
    config = DecoderConfig(vocab_size=61, block_size=64, n_layer=1, n_head=4, n_embd=32)
    write_model(config, random_state(config, dtype=torch.bfloat16), tmp_path)
    assert read_model(tmp_path).embedding.weight.dtype == torch.bfloat16
    assert {p.dtype for p in read_model(tmp_path, torch.float32).parameters()} == {torch.float32}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_reading_imports_no_compiler_and_needs_no_random_numbers(tmp_path: Path) -> None:
    save_reference("gpt2", tmp_path)
    program = f"""
import sys
import torch
from pathlib import Path
from smelt.models.weights import read_model
before = torch.get_rng_state()
read_model(Path({str(tmp_path)!r}))
assert torch.equal(before, torch.get_rng_state())
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_read_model_does_not_train_dropout_and_can_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    config = DecoderConfig(vocab_size=61, block_size=64, n_layer=1, n_head=4, n_embd=32)
    state = random_state(config)
    write_model(config, state, tmp_path)
    model = read_model(tmp_path)
    assert not model.training
    with torch.no_grad():
        model.embedding.weight.zero_()
    assert torch.equal(read_model(tmp_path).embedding.weight, state["embedding.weight"])


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    config = DecoderConfig(vocab_size=61, block_size=64, n_layer=1, n_head=4, n_embd=32)
    write_model(config, random_state(config), tmp_path)
    return tmp_path


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


def test_missing_and_unexpected_tensors_are_named(tiny_folder: Path) -> None:
    change_tensors(tiny_folder, transformer__ln_f__weight=None, transformer__extra=torch.ones(2))
    with pytest.raises(UnsupportedModel, match=r"missing transformer.ln_f.weight; unexpected transformer.extra"):
        read_model(tiny_folder)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(tiny_folder: Path) -> None:
    change_tensors(tiny_folder, transformer__wpe__weight=torch.ones(63, 32))
    with pytest.raises(UnsupportedModel, match=r"transformer.wpe.weight has shape \(63, 32\).*asks for \(64, 32\)"):
        read_model(tiny_folder)


def test_integer_weights_are_refused(tiny_folder: Path) -> None:
    change_tensors(tiny_folder, transformer__wpe__weight=torch.ones(64, 32, dtype=torch.int8))
    with pytest.raises(UnsupportedModel, match="stored as I8"):
        read_model(tiny_folder)


def test_a_head_that_differs_from_the_embedding_it_should_share_is_refused(tiny_folder: Path) -> None:
    change_tensors(tiny_folder, lm_head__weight=load_file(tiny_folder / "model.safetensors")["transformer.wte.weight"])
    read_model(tiny_folder)
    change_tensors(tiny_folder, lm_head__weight=torch.ones(61, 32))
    with pytest.raises(UnsupportedModel, match="lm_head.weight differs from the embedding"):
        read_model(tiny_folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_with_the_way_to_convert(tiny_folder: Path, name: str) -> None:
    (tiny_folder / "model.safetensors").rename(tiny_folder / name)
    with pytest.raises(UnsafeFile, match=rf"{name}.*safe_serialization=True"):
        read_model(tiny_folder)


def test_a_damaged_or_absent_file_is_a_clear_error(tiny_folder: Path) -> None:
    data = (tiny_folder / "model.safetensors").read_bytes()
    (tiny_folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UnsupportedModel, match="not a readable safetensors file"):
        read_model(tiny_folder)
    (tiny_folder / "model.safetensors").unlink()
    with pytest.raises(NotFound, match="has no model.safetensors"):
        read_model(tiny_folder)
    (tiny_folder / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match="not valid JSON"):
        read_model(tiny_folder)
    with pytest.raises(NotFound, match="not a model folder"):
        read_model(tiny_folder / "nowhere")


def test_an_index_cannot_reach_outside_of_its_folder(tiny_folder: Path) -> None:
    shutil.move(tiny_folder / "model.safetensors", tiny_folder.parent / "elsewhere.safetensors")
    index = {"weight_map": {"transformer.wte.weight": "../elsewhere.safetensors"}}
    (tiny_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedModel, match="outside of its folder"):
        read_model(tiny_folder)


def test_a_full_disk_is_out_of_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DecoderConfig(vocab_size=61, block_size=64, n_layer=1, n_head=4, n_embd=32)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(weights.os, "fsync", full_disk)
    with pytest.raises(OutOfSpace, match=str(tmp_path)):
        write_model(config, random_state(config), tmp_path)


# --- nanoGPT ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpt_checkpoints_are_read(bias: bool, prefix: str, tmp_path: Path) -> None:
    config = DecoderConfig(
        vocab_size=61, block_size=32, n_layer=2, n_head=2, n_embd=16, bias=bias, qkv_bias=bias, mlp="gelu_exact"
    )
    state = random_state(config)
    checkpoint = nanogpt_checkpoint(config, state, prefix)
    if not bias:
        assert isinstance(checkpoint["model"], dict)
        for name in [n for n in checkpoint["model"] if n.endswith(".bias")]:
            del checkpoint["model"][name]
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    found_config, found_state = read_nanogpt(tmp_path / "ckpt.pt")
    assert found_config == config
    assert all(torch.equal(found_state[name], tensor) for name, tensor in state.items())


class Danger:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, ("it-ran",)


def test_a_checkpoint_that_would_run_code_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Danger(), "model_args": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(UnsafeFile, match="more than plain weights"):
        read_nanogpt(tmp_path / "ckpt.pt")
    assert not (tmp_path / "it-ran").exists()


def test_other_and_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(UnsupportedModel, match="not a nanoGPT checkpoint"):
        read_nanogpt(path)
    torch.save({"model": {}, "model_args": dict.fromkeys(("vocab_size", "block_size", "n_layer"), 2)}, path)
    with pytest.raises(UnsupportedModel, match="n_head"):
        read_nanogpt(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UnsupportedModel, match="not a whole torch file"):
        read_nanogpt(path)
    with pytest.raises(NotFound):
        read_nanogpt(tmp_path / "absent.pt")


def test_a_converted_nanogpt_model_equals_transformers(tmp_path: Path) -> None:
    import transformers

    config = DecoderConfig(vocab_size=61, block_size=64, n_layer=2, n_head=2, n_embd=16, mlp="gelu_exact")
    write_nanogpt(config, random_state(config), tmp_path)
    found_config, state = read_nanogpt(tmp_path / "ckpt.pt")
    write_model(found_config, state, tmp_path / "hf")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert (our_logits(read_model(tmp_path / "hf"), TOKENS) - reference_logits(reference, TOKENS)).abs().max() < 1e-5
    assert read_config(tmp_path / "hf") == config == from_hf_config(to_hf_config(config))
