"""Tiny random models of every family that transformers and smelt both have, for parity tests."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smelt.configs import DecoderConfig
from smelt.models.batch import Batch
from smelt.models.decoder import Decoder
from smelt.models.weights import to_hf_tensors

LLAMA_SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2_SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

# name -> (transformers' prefix of class names, settings)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2_SHAPE),
    "gpt2 untied": ("GPT2", {**GPT2_SHAPE, "tie_word_embeddings": False}),
    "gpt2 exact gelu": ("GPT2", {**GPT2_SHAPE, "activation_function": "gelu", "n_inner": 48}),
    "llama": ("Llama", LLAMA_SHAPE),
    "llama tied": ("Llama", {**LLAMA_SHAPE, "tie_word_embeddings": True}),
    "llama biases": ("Llama", {**LLAMA_SHAPE, "attention_bias": True, "mlp_bias": True}),
    "llama one kv head": ("Llama", {**LLAMA_SHAPE, "num_key_value_heads": 1, "rope_theta": 500.0}),
    "llama 3 rope": ("Llama", {**LLAMA_SHAPE, "rope_parameters": LLAMA3_ROPE}),
    "mistral": ("Mistral", {**LLAMA_SHAPE, "sliding_window": None}),
    "mistral sliding": ("Mistral", {**LLAMA_SHAPE, "sliding_window": 5, "head_dim": 16}),
    "qwen2": ("Qwen2", LLAMA_SHAPE),
    "qwen2 tied": ("Qwen2", {**LLAMA_SHAPE, "tie_word_embeddings": True}),
    "qwen2 sliding": (
        "Qwen2",
        {**LLAMA_SHAPE, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0},
    ),
    "qwen3": ("Qwen3", {**LLAMA_SHAPE, "head_dim": 16}),
    "qwen3 tied": ("Qwen3", {**LLAMA_SHAPE, "head_dim": 8, "tie_word_embeddings": True}),
}


def make_reference(name: str, seed: int = 0) -> Any:
    """A transformers model of that family with random weights: norms and biases too, so that none can hide."""
    import transformers

    prefix, settings = FAMILIES[name]
    config = getattr(transformers, f"{prefix}Config")(**settings)
    class_name = "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM"
    torch.manual_seed(seed)
    model = getattr(transformers, class_name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def save_reference(name: str, folder: Path, seed: int = 0) -> Any:
    """Write that model as transformers writes it."""
    model = make_reference(name, seed)
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def our_logits(model: Decoder, tokens_BT: Tensor) -> Tensor:
    """(B, T, V) of our decoder."""
    return model.logits(model(Batch(tokens_BT)))


@torch.inference_mode()
def reference_logits(model: Any, tokens_BT: Tensor) -> Tensor:
    """(B, T, V) of transformers."""
    logits: Tensor = model(tokens_BT).logits
    return logits


def random_state(config: DecoderConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Normal values for every parameter of a decoder of that shape."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in Decoder(config).state_dict().items()}
    return {name: torch.randn(shape, generator=generator).to(dtype) * 0.2 for name, shape in shapes.items()}


def nanogpt_checkpoint(config: DecoderConfig, state: dict[str, Tensor], prefix: str = "") -> dict[str, object]:
    """What nanoGPT's training script saves for this state: untransposed, with tied head and mask buffers."""
    theirs = {}
    for name, tensor in to_hf_tensors(config.replace(tied=True), state).items():
        is_matrix = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        theirs[prefix + name] = tensor.t().contiguous() if is_matrix else tensor
    theirs[f"{prefix}lm_head.weight"] = state["embedding.weight"]
    model_args = {name: getattr(config, name) for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")}
    return {
        "model": theirs,
        "model_args": {**model_args, "bias": config.bias, "dropout": 0.1},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}},
        "iter_num": 3,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out"},
    }


def write_nanogpt(config: DecoderConfig, state: dict[str, Tensor], folder: Path) -> Path:
    """Save that as nanoGPT does, and return the file."""
    torch.save(nanogpt_checkpoint(config, state), folder / "ckpt.pt")
    return folder / "ckpt.pt"
