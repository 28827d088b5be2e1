import json
from typing import Any

import pytest

from families import FAMILIES, GPT2_SHAPE, LLAMA3_ROPE, LLAMA_SHAPE
from smelt.configs import LLAMA_STYLE, DecoderConfig, RopeScaling
from smelt.errors import UnsupportedModel
from smelt.models.architectures import from_hf_config, layout_of, to_hf_config
from smelt.models.decoder import Decoder

LLAMA = {"model_type": "llama", **LLAMA_SHAPE}
GPT2 = {"model_type": "gpt2", **GPT2_SHAPE}
QWEN3 = {"model_type": "qwen3", **LLAMA_SHAPE}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_config_survives_the_round_trip_through_json(name: str) -> None:
    prefix, settings = FAMILIES[name]
    config = from_hf_config({"model_type": prefix.lower(), **settings})
    assert from_hf_config(json.loads(json.dumps(to_hf_config(config)))) == config


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layout_has_exactly_the_parameters_of_the_decoder(name: str) -> None:
    prefix, settings = FAMILIES[name]
    config = from_hf_config({"model_type": prefix.lower(), **settings})
    shapes = {ours: tuple(tensor.shape) for ours, tensor in Decoder(config).state_dict().items()}
    stacked = {
        ours: (sum(shape[0] for shape in stored.shapes), *stored.shapes[0][1:])
        for ours, stored in layout_of(config).items()
    }
    assert stacked == shapes


def test_old_and_new_ways_to_write_rope_mean_the_same() -> None:
    old_scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    new = from_hf_config({**LLAMA, "rope_parameters": LLAMA3_ROPE})
    old = from_hf_config({**LLAMA, "rope_theta": 10000.0, "rope_scaling": old_scaling})
    oldest = from_hf_config({**LLAMA, "rope_scaling": {"type": "llama3", **old_scaling}})
    assert new == old == oldest
    expected = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_block_size=16)
    assert new.rope_scaling == expected
    assert from_hf_config({**LLAMA, "rope_theta": 7.0, "rope_scaling": None}).rope_theta == 7.0


def test_defaults_of_the_classes_hold_where_a_key_is_absent() -> None:
    absent = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert from_hf_config(absent).n_kv_head == 4
    assert from_hf_config({**LLAMA, "model_type": "mistral"}).sliding_window == 4096
    assert from_hf_config({**LLAMA, "model_type": "qwen2"}).sliding_window is None
    assert from_hf_config(QWEN3).head_dim == 128
    assert from_hf_config(GPT2).n_inner == 128


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "mixtral"}, "model_type 'mixtral'.*known: gpt2, llama"),
    ({}, "model_type None"),
    ({**LLAMA, "quantization_config": {"quant_method": "gptq"}}, "quantized by 'gptq'"),
    ({**LLAMA, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
    ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling 'linear'"),
    ({**LLAMA, "rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer"),
    ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({**LLAMA, "hidden_act": "relu"}, "hidden_act 'relu'"),
    ({**LLAMA, "attention_bias": True}, "attention_bias True with mlp_bias False"),
    ({**QWEN3, "attention_bias": True}, "attention_bias in a qwen3"),
    ({**QWEN3, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "some layers only"),
    ({**QWEN3, "num_hidden_layers": "two"}, "n_layer.*'two'"),
    ({key: value for key, value in LLAMA.items() if key != "hidden_size"}, "lacks 'hidden_size'"),
    ({**GPT2, "activation_function": "relu"}, "activation_function 'relu'"),
    ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    ({**GPT2, "scale_attn_weights": False}, "scale_attn_weights False"),
    ({**GPT2, "n_head": 5}, "n_embd 32 is not a multiple of n_head 5"),
]


@pytest.mark.parametrize(("hf", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_we_do_not_have_is_refused_by_name(hf: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        from_hf_config(hf)


def test_a_shape_that_no_folder_can_express_is_refused_on_writing() -> None:
    config = DecoderConfig(
        **{**LLAMA_STYLE, "qk_norm": True}, vocab_size=9, block_size=8, n_layer=1, n_head=2, n_embd=8
    )
    with pytest.raises(UnsupportedModel, match="a llama folder cannot express qk_norm=True"):
        to_hf_config(config)
