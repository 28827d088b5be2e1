"""What each Hugging Face architecture calls its settings and its tensors, in tables and pure functions.

Knows `config.json` and the names and shapes in a weights file; opens no weights and knows no torch, so that
the size of a model can be told without loading it. Adding an architecture is three functions and a line below.
"""

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any, TypeVar

from smelt.configs import DecoderConfig, validated
from smelt.errors import ConfigError, UnsupportedModel

HfConfig = dict[str, Any]
Shape = tuple[int, ...]
T = TypeVar("T")

CONFIG_FILE = "config.json"
# Buffers that old files carry along: they follow from the config.
DERIVED_TENSORS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one of our parameters lies: a tensor of theirs, or several that stand above each other in ours.

    Shapes are of the pieces as we hold them; `transposed` ones lie in the file as (in_features, out_features).
    """

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    transposed: bool = False


Layout = dict[str, Stored]  # our parameter's name -> where it lies


@dataclass(frozen=True, slots=True)
class Architecture:
    """One `model_type`: its settings in and out, its tensors, and the prefix that some files leave out."""

    read_config: Callable[[HfConfig], DecoderConfig]
    write_config: Callable[[DecoderConfig], HfConfig]
    layout: Callable[[DecoderConfig], Layout]
    prefix: str


def from_hf_config(hf: HfConfig) -> DecoderConfig:
    """Our config from a `config.json`, old or new style; UnsupportedModel names what we do not have."""
    model_type = hf.get("model_type")
    if model_type not in ARCHITECTURES:
        raise UnsupportedModel(f"model_type {model_type!r} is not supported; known: {', '.join(ARCHITECTURES)}")
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModel(f"weights quantized by {method!r} are not supported; use the unquantized model")
    try:
        return ARCHITECTURES[model_type].read_config(hf)
    except KeyError as missing:
        raise UnsupportedModel(f"{CONFIG_FILE} of a {model_type} model lacks {missing}") from None
    except ConfigError as error:
        raise UnsupportedModel(f"{CONFIG_FILE} of a {model_type} model: {error}") from None


def to_hf_config(config: DecoderConfig) -> HfConfig:
    """The `config.json` that every reader of this architecture understands, and that we read back as it was."""
    hf = ARCHITECTURES[config.architecture].write_config(config)
    read_back = from_hf_config(hf)
    if read_back != config:
        lost = [name for name in DecoderConfig.model_fields if getattr(read_back, name) != getattr(config, name)]
        values = ", ".join(f"{name}={getattr(config, name)!r}" for name in lost)
        raise UnsupportedModel(f"a {config.architecture} folder cannot express {values}")
    return hf


def layout_of(config: DecoderConfig) -> Layout:
    """Where every parameter of a decoder of this shape lies in its folder."""
    return ARCHITECTURES[config.architecture].layout(config)


def zero_biases_of(config: DecoderConfig) -> dict[str, Shape]:
    """Biases that GPT-2's file must hold though the model has none; they are stored as zeros."""
    if config.architecture != "gpt2" or (config.bias and config.qkv_bias):
        return {}
    names = {name for stored in layout_of(config).values() for name in stored.names}
    whole = layout_of(config.replace(bias=True, qkv_bias=True)).values()
    return {stored.names[0]: stored.shapes[0] for stored in whole if stored.names[0] not in names}


def expected_shapes(config: DecoderConfig) -> dict[str, Shape]:
    """Names and shapes that a weights file of this config must hold, as they lie in the file."""
    return shapes_in_file(layout_of(config))


def shapes_in_file(layout: Layout) -> dict[str, Shape]:
    """Names and shapes of a layout's tensors, as they lie in the file."""
    return {
        name: shape[::-1] if stored.transposed else shape
        for stored in layout.values()
        for name, shape in zip(stored.names, stored.shapes, strict=True)
    }


def with_full_names(config: DecoderConfig, tensors: Mapping[str, T]) -> dict[str, T]:
    """Tensors (or shapes) by their full names: files of the bare model leave out the prefix; buffers are dropped."""
    prefix = ARCHITECTURES[config.architecture].prefix
    is_bare = not any(name.startswith(prefix) for name in tensors)
    kept = {name: value for name, value in tensors.items() if not name.endswith(DERIVED_TENSORS)}
    if not is_bare:
        return kept
    return {name if name.startswith("lm_head.") else prefix + name: value for name, value in kept.items()}


def check_shapes(config: DecoderConfig, found: Mapping[str, Shape]) -> None:
    """UnsupportedModel names tensors that are missing, unknown or misshapen; `found` has full names."""
    optional = set(zero_biases_of(config)) | ({"lm_head.weight"} if config.tied else set())
    compare_shapes(expected_shapes(config), found, optional)


def compare_shapes(expected: Mapping[str, Shape], found: Mapping[str, Shape], optional: Set[str]) -> None:
    """UnsupportedModel names tensors that are missing, unknown or misshapen."""
    missing, unknown = expected.keys() - found.keys(), found.keys() - expected.keys() - optional
    if missing or unknown:
        parts = [f"missing {_first(missing)}"] if missing else []
        parts += [f"unexpected {_first(unknown)}"] if unknown else []
        raise UnsupportedModel(f"the weights do not fit {CONFIG_FILE}: {'; '.join(parts)}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise UnsupportedModel(f"{name} has shape {found[name]}, but {CONFIG_FILE} asks for {shape}")


def _first(names: Iterable[str], limit: int = 4) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:limit]) + (f" and {len(ordered) - limit} more" if len(ordered) > limit else "")


# --- GPT-2 -----------------------------------------------------------------------------------------------


def _read_gpt2_config(hf: HfConfig) -> DecoderConfig:
    activation = hf.get("activation_function", "gelu_new")
    refuse_unless(activation in ACTIVATIONS, f"activation_function {activation!r} (known: {', '.join(ACTIVATIONS)})")
    for key, plain in {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }.items():
        refuse_unless(hf.get(key, plain) == plain, f"{key} {hf.get(key)!r}")
    ours = hf.get("smelt", {})
    return validated(
        DecoderConfig,
        {
            "architecture": "gpt2",
            "vocab_size": hf["vocab_size"],
            "block_size": hf.get("n_positions", hf.get("n_ctx", 1024)),
            "n_layer": hf["n_layer"],
            "n_head": hf["n_head"],
            "n_embd": hf["n_embd"],
            "n_inner": hf.get("n_inner") or 0,
            "mlp": ACTIVATIONS[activation],
            "tied": hf.get("tie_word_embeddings", True),
            "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
            "bias": ours.get("bias", True),
            "qkv_bias": ours.get("qkv_bias", True),
        },
    )


def _write_gpt2_config(config: DecoderConfig) -> HfConfig:
    hf: HfConfig = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": config.n_inner,
        "activation_function": "gelu" if config.mlp == "gelu_exact" else "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if not (config.bias and config.qkv_bias):
        hf["smelt"] = {"bias": config.bias, "qkv_bias": config.qkv_bias}
    return hf


def gpt2_layout(config: DecoderConfig, transposed: bool = True) -> Layout:
    """GPT-2's tensors: Hugging Face keeps matrices transposed (Conv1D), nanoGPT does not."""
    width, bias = config.n_embd, config.bias
    layout = {
        "embedding.weight": Stored(("transformer.wte.weight",), ((config.vocab_size, width),)),
        "positions.weight": Stored(("transformer.wpe.weight",), ((config.block_size, width),)),
    }
    for layer in range(config.n_layer):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        layout |= stored_norm(f"{ours}.attention_norm", f"{theirs}.ln_1", width, bias)
        layout |= stored_linear(
            f"{ours}.attention.qkv", {f"{theirs}.attn.c_attn": 3 * width}, width, config.qkv_bias, transposed
        )
        layout |= stored_linear(f"{ours}.attention.out", {f"{theirs}.attn.c_proj": width}, width, bias, transposed)
        layout |= stored_norm(f"{ours}.mlp_norm", f"{theirs}.ln_2", width, bias)
        layout |= stored_linear(f"{ours}.mlp.up", {f"{theirs}.mlp.c_fc": config.n_inner}, width, bias, transposed)
        layout |= stored_linear(f"{ours}.mlp.down", {f"{theirs}.mlp.c_proj": width}, config.n_inner, bias, transposed)
    layout |= stored_norm("norm", "transformer.ln_f", width, bias)
    if not config.tied:
        layout |= stored_linear("head", {"lm_head": config.vocab_size}, width, bias=False)
    return layout


# --- Llama and its relatives -----------------------------------------------------------------------------


def _read_rope_config(hf: HfConfig, **particular: Any) -> DecoderConfig:
    """What Llama, Mistral, Qwen2 and Qwen3 share."""
    activation = hf.get("hidden_act", "silu")
    refuse_unless(activation in ("silu", "swish"), f"hidden_act {activation!r} (known: silu)")
    return validated(
        DecoderConfig,
        {
            "architecture": hf["model_type"],
            "vocab_size": hf["vocab_size"],
            "block_size": hf["max_position_embeddings"],
            "n_layer": hf["num_hidden_layers"],
            "n_head": hf["num_attention_heads"],
            "n_kv_head": hf.get("num_key_value_heads") or 0,
            "head_dim": hf.get("head_dim") or 0,
            "n_embd": hf["hidden_size"],
            "n_inner": hf["intermediate_size"],
            "position": "rope",
            "norm": "rmsnorm",
            "mlp": "swiglu",
            "tied": hf.get("tie_word_embeddings", False),
            "norm_eps": hf.get("rms_norm_eps", 1e-6),
            "bias": False,
            "qkv_bias": False,
            **_read_rope(hf),
            **particular,
        },
    )


def _read_rope(hf: HfConfig) -> dict[str, Any]:
    """Both ways to write it: `rope_parameters` (transformers 5), `rope_theta` with `rope_scaling` (before)."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    refuse_unless(kind in ("default", "llama3"), f"rope scaling {kind!r} (known: default, llama3)")
    partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
    refuse_unless(partial in (1.0, None), f"partial_rotary_factor {partial}")
    refuse_unless(not any(isinstance(value, dict) for value in rope.values()), "rope settings that differ by layer")
    values: dict[str, Any] = {"rope_theta": rope.get("rope_theta", hf.get("rope_theta", 10000.0))}
    if kind == "llama3":
        values["rope_scaling"] = {
            "factor": rope["factor"],
            "low_freq_factor": rope["low_freq_factor"],
            "high_freq_factor": rope["high_freq_factor"],
            "original_block_size": rope["original_max_position_embeddings"],
        }
    return values


def _read_llama_config(hf: HfConfig) -> DecoderConfig:
    bias = hf.get("attention_bias", False)
    refuse_unless(hf.get("mlp_bias", False) == bias, f"attention_bias {bias} with mlp_bias {not bias}")
    return _read_rope_config(hf, bias=bias, qkv_bias=bias)


def _read_mistral_config(hf: HfConfig) -> DecoderConfig:
    return _read_rope_config(hf, sliding_window=hf.get("sliding_window", 4096))


def _read_qwen2_config(hf: HfConfig) -> DecoderConfig:
    return _read_rope_config(hf, qkv_bias=True, sliding_window=_qwen_window(hf))


def _read_qwen3_config(hf: HfConfig) -> DecoderConfig:
    refuse_unless(not hf.get("attention_bias", False), "attention_bias in a qwen3 model")
    window = _qwen_window(hf)
    return _read_rope_config(hf, qk_norm=True, sliding_window=window, head_dim=hf.get("head_dim", 128))


def _qwen_window(hf: HfConfig) -> int | None:
    """Qwen gives the window to the layers from `max_window_layers` on: we have it in all of them or in none."""
    if not hf.get("use_sliding_window", False) or hf.get("sliding_window") is None:
        return None
    num_layers, first = hf["num_hidden_layers"], hf.get("max_window_layers", 28)
    kinds = hf.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(num_layers)
    ]
    refuse_unless(len(set(kinds)) == 1, "sliding windows in some layers only (use_sliding_window, max_window_layers)")
    return hf["sliding_window"] if kinds[0] == "sliding_attention" else None


def _write_rope_config(config: DecoderConfig, class_name: str) -> HfConfig:
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_block_size,
        }
    return {
        "architectures": [class_name],
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_inner,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        # Both styles, so that old and new readers agree.
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _write_llama_config(config: DecoderConfig) -> HfConfig:
    hf = _write_rope_config(config, "LlamaForCausalLM")
    return {**hf, "attention_bias": config.qkv_bias, "mlp_bias": config.bias}


def _write_mistral_config(config: DecoderConfig) -> HfConfig:
    return {**_write_rope_config(config, "MistralForCausalLM"), "sliding_window": config.sliding_window}


def _write_qwen2_config(config: DecoderConfig) -> HfConfig:
    return _write_rope_config(config, "Qwen2ForCausalLM") | _write_qwen_window(config)


def _write_qwen3_config(config: DecoderConfig) -> HfConfig:
    return {**_write_rope_config(config, "Qwen3ForCausalLM"), **_write_qwen_window(config), "attention_bias": False}


def _write_qwen_window(config: DecoderConfig) -> HfConfig:
    windowed = config.sliding_window is not None
    return {
        "use_sliding_window": windowed,
        "sliding_window": config.sliding_window,
        "max_window_layers": 0 if windowed else config.n_layer,
        "layer_types": ["sliding_attention" if windowed else "full_attention"] * config.n_layer,
    }


def llama_layout(config: DecoderConfig) -> Layout:
    """Tensors of Llama, Mistral, Qwen2 and Qwen3: our fused projections are theirs, one above the other."""
    width, bias = config.n_embd, config.bias
    q_rows, kv_rows = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    layout = {"embedding.weight": Stored(("model.embed_tokens.weight",), ((config.vocab_size, width),))}
    for layer in range(config.n_layer):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        qkv = {f"{attention}.q_proj": q_rows, f"{attention}.k_proj": kv_rows, f"{attention}.v_proj": kv_rows}
        gate_up = {f"{mlp}.gate_proj": config.n_inner, f"{mlp}.up_proj": config.n_inner}
        layout |= stored_norm(f"{ours}.attention_norm", f"{theirs}.input_layernorm", width)
        layout |= stored_linear(f"{ours}.attention.qkv", qkv, width, config.qkv_bias)
        layout |= stored_linear(f"{ours}.attention.out", {f"{attention}.o_proj": width}, q_rows, bias)
        if config.qk_norm:
            layout |= stored_norm(f"{ours}.attention.q_norm", f"{attention}.q_norm", config.head_dim)
            layout |= stored_norm(f"{ours}.attention.k_norm", f"{attention}.k_norm", config.head_dim)
        layout |= stored_norm(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm", width)
        layout |= stored_linear(f"{ours}.mlp.up", gate_up, width, bias)
        layout |= stored_linear(f"{ours}.mlp.down", {f"{mlp}.down_proj": width}, config.n_inner, bias)
    layout |= stored_norm("norm", "model.norm", width)
    if not config.tied:
        layout |= stored_linear("head", {"lm_head": config.vocab_size}, width, bias=False)
    return layout


# --- Shared by the tables above --------------------------------------------------------------------------


def stored_linear(ours: str, rows: dict[str, int], width: int, bias: bool, transposed: bool = False) -> Layout:
    """A matrix made of the named ones (name -> rows) above each other, and its bias likewise."""
    shapes = tuple((num_rows, width) for num_rows in rows.values())
    layout = {f"{ours}.weight": Stored(tuple(f"{name}.weight" for name in rows), shapes, transposed)}
    if bias:
        layout[f"{ours}.bias"] = Stored(tuple(f"{name}.bias" for name in rows), tuple((n,) for n in rows.values()))
    return layout


def stored_norm(ours: str, theirs: str, width: int, bias: bool = False) -> Layout:
    """A norm's weight, and its bias."""
    parts = ("weight", "bias") if bias else ("weight",)
    return {f"{ours}.{part}": Stored((f"{theirs}.{part}",), ((width,),)) for part in parts}


def refuse_unless(supported: bool, feature: str) -> None:
    """UnsupportedModel where we do not have that."""
    if not supported:
        raise UnsupportedModel(f"{feature} is not supported")


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(_read_gpt2_config, _write_gpt2_config, gpt2_layout, "transformer."),
    "llama": Architecture(_read_llama_config, _write_llama_config, llama_layout, "model."),
    "mistral": Architecture(_read_mistral_config, _write_mistral_config, llama_layout, "model."),
    "qwen2": Architecture(_read_qwen2_config, _write_qwen2_config, llama_layout, "model."),
    "qwen3": Architecture(_read_qwen3_config, _write_qwen3_config, llama_layout, "model."),
}
