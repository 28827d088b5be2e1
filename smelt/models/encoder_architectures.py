"""What Hugging Face's encoders call their settings and their tensors, and the shape of a text classifier.

Knows `config.json` and the names and shapes in a weights file; opens no weights and knows no torch. Adding an encoder
is an entry of ENCODERS. What stands on top of a decoder that classifies is here too: one matrix, Hugging Face's
`score`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import Field

from smelt.configs import Config, DecoderConfig, validated
from smelt.errors import ConfigError, UnsupportedModel
from smelt.models.architectures import (
    ARCHITECTURES,
    CONFIG_FILE,
    DERIVED_TENSORS,
    HfConfig,
    Layout,
    Shape,
    Stored,
    from_hf_config,
    layout_of,
    refuse_unless,
    shapes_in_file,
    stored_linear,
    stored_norm,
    to_hf_config,
    zero_biases_of,
)

EncoderName = Literal["distilbert", "bert", "roberta"]
T = TypeVar("T")

MAX_LABELS = 1000
NGRAMS = "smelt-ngrams"
CLASSIFIES = "ForSequenceClassification"  # the end of the class names of Hugging Face's classifiers
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
HF_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
# Heads for other tasks, and buffers: what a folder may hold besides what classifies.
OTHER_HEADS = ("cls.", "lm_head.", "vocab_transform.", "vocab_layer_norm.", "vocab_projector.", "roberta.pooler.")
BUFFERS = (*DERIVED_TENSORS, "embeddings.position_ids", "embeddings.token_type_ids")
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


class EncoderConfig(Config):
    """Everything that fixes the shape of an encoder, in GPT-2's words."""

    architecture: EncoderName = Field("distilbert", description="Hugging Face's model_type")
    vocab_size: int = Field(ge=1, description="number of token ids")
    block_size: int = Field(ge=1, description="longest text in tokens")
    n_layer: int = Field(ge=1, description="number of blocks")
    n_head: int = Field(ge=1, description="number of heads")
    n_embd: int = Field(ge=1, description="width of the residual stream")
    n_inner: int = Field(ge=1, description="width of the MLP")
    activation: Literal["gelu", "gelu_tanh", "relu"] = Field("gelu", description="of the MLP")
    norm_eps: float = Field(1e-12, gt=0, description="added to the variance")
    num_token_types: int = Field(0, ge=0, description="rows of the table of segments, of which the first is used")
    first_position: int = Field(0, ge=0, description="row of the first token in the table of positions")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.n_embd // self.n_head


class NgramConfig(Config):
    """The shape of a text as tokens and pairs of them, which is our own: other programs do not read it."""

    architecture: Literal["smelt-ngrams"] = Field("smelt-ngrams", description="the model_type in its config.json")
    vocab_size: int = Field(ge=1, description="number of token ids")
    num_buckets: int = Field(ge=0, description="rows that pairs of tokens share")
    n_embd: int = Field(ge=1, description="width of a text's vector")
    block_size: int = Field(ge=1, description="longest text in tokens")
    lowercase: bool = Field(True, description="texts are put in lower case before they become tokens")


class ClassifierShape(Config):
    """A model that says which label a text has. Without labels it has no head yet and is there to be trained."""

    backbone: EncoderConfig | NgramConfig | DecoderConfig
    labels: tuple[str, ...] = ()

    @property
    def block_size(self) -> int:
        """The longest text in tokens."""
        return self.backbone.block_size

    @property
    def architecture(self) -> str:
        """Hugging Face's model_type."""
        return self.backbone.architecture

    @property
    def num_parameters(self) -> int:
        """Parameters, by the shapes of the layout."""
        sizes = (rows_of(stored) for stored in classifier_layout(self).values())
        return sum(sizes)


def rows_of(stored: Stored) -> int:
    """Elements of one of our parameters."""
    total = 0
    for shape in stored.shapes:
        elements = 1
        for size in shape:
            elements *= size
        total += elements
    return total


@dataclass(frozen=True, slots=True)
class EncoderNames:
    """What one kind of encoder calls its tensors; those of a layer begin with `layer`, which has its number."""

    prefix: str
    layer: str
    qkv: tuple[str, str, str]
    out: str
    attention_norm: str
    up: str
    down: str
    mlp_norm: str
    dense: str  # of the head
    classifier: str


BERT_LAYER: dict[str, Any] = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


@dataclass(frozen=True, slots=True)
class EncoderArchitecture:
    """One `model_type`: its class, its settings in and out, its tensors, what its head does between its matrices."""

    class_name: str
    read_config: Callable[[HfConfig], dict[str, Any]]
    write_config: Callable[[EncoderConfig], HfConfig]
    names: EncoderNames
    head_activation: Literal["relu", "tanh"]


# --- Settings ------------------------------------------------------------------------------------------------


def _read_distilbert_config(hf: HfConfig) -> dict[str, Any]:
    return {
        "vocab_size": hf["vocab_size"],
        "block_size": hf.get("max_position_embeddings", 512),
        "n_layer": hf["n_layers"],
        "n_head": hf["n_heads"],
        "n_embd": hf["dim"],
        "n_inner": hf["hidden_dim"],
        "activation": _activation(hf.get("activation", "gelu")),
    }


def _write_distilbert_config(config: EncoderConfig) -> HfConfig:
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size,
        "n_layers": config.n_layer,
        "n_heads": config.n_head,
        "dim": config.n_embd,
        "hidden_dim": config.n_inner,
        "activation": HF_ACTIVATIONS[config.activation],
        "sinusoidal_pos_embds": False,
    }


def _read_bert_config(hf: HfConfig) -> dict[str, Any]:
    kind = hf.get("position_embedding_type", "absolute")
    refuse_unless(kind == "absolute", f"position_embedding_type {kind!r}")
    refuse_unless(not hf.get("is_decoder", False), "an encoder with is_decoder")
    refuse_unless(not hf.get("add_cross_attention", False), "add_cross_attention")
    return {
        "vocab_size": hf["vocab_size"],
        "block_size": hf.get("max_position_embeddings", 512),
        "n_layer": hf["num_hidden_layers"],
        "n_head": hf["num_attention_heads"],
        "n_embd": hf["hidden_size"],
        "n_inner": hf["intermediate_size"],
        "activation": _activation(hf.get("hidden_act", "gelu")),
        "norm_eps": hf.get("layer_norm_eps", 1e-12),
        "num_token_types": hf.get("type_vocab_size", 2),
    }


def _write_bert_config(config: EncoderConfig) -> HfConfig:
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size + config.first_position,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_inner,
        "hidden_act": HF_ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_eps,
        "type_vocab_size": config.num_token_types,
    }


def _read_roberta_config(hf: HfConfig) -> dict[str, Any]:
    """Its positions begin after the number of its padding token."""
    values = _read_bert_config(hf)
    first = hf.get("pad_token_id", 1) + 1
    return {**values, "block_size": values["block_size"] - first, "first_position": first}


def _write_roberta_config(config: EncoderConfig) -> HfConfig:
    return {**_write_bert_config(config), "pad_token_id": config.first_position - 1}


def _activation(name: str) -> str:
    refuse_unless(name in ACTIVATIONS, f"activation {name!r} (known: {', '.join(ACTIVATIONS)})")
    return ACTIVATIONS[name]


ENCODERS: dict[EncoderName, EncoderArchitecture] = {
    "distilbert": EncoderArchitecture(
        "DistilBert",
        _read_distilbert_config,
        _write_distilbert_config,
        EncoderNames(
            prefix="distilbert.",
            layer="transformer.layer",
            qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            out="attention.out_lin",
            attention_norm="sa_layer_norm",
            up="ffn.lin1",
            down="ffn.lin2",
            mlp_norm="output_layer_norm",
            dense="pre_classifier",
            classifier="classifier",
        ),
        "relu",
    ),
    "bert": EncoderArchitecture(
        "Bert",
        _read_bert_config,
        _write_bert_config,
        EncoderNames("bert.", "encoder.layer", **BERT_LAYER, dense="bert.pooler.dense", classifier="classifier"),
        "tanh",
    ),
    "roberta": EncoderArchitecture(
        "Roberta",
        _read_roberta_config,
        _write_roberta_config,
        EncoderNames(
            "roberta.", "encoder.layer", **BERT_LAYER, dense="classifier.dense", classifier="classifier.out_proj"
        ),
        "tanh",
    ),
}


# --- Whole folders -------------------------------------------------------------------------------------------


def is_classifier(hf: HfConfig) -> bool:
    """Whether a `config.json` is of a model that classifies texts, or of an encoder that can learn to."""
    classes = hf.get("architectures") or []
    return hf.get("model_type") in (*ENCODERS, NGRAMS) or any(str(name).endswith(CLASSIFIES) for name in classes)


def classifier_shape(hf: HfConfig) -> ClassifierShape:
    """The shape of what such a `config.json` describes; UnsupportedModel names what we do not have."""
    labels = _read_labels(hf) if any(str(name).endswith(CLASSIFIES) for name in hf.get("architectures") or []) else ()
    if hf.get("model_type") == NGRAMS:
        values = {name: hf[name] for name in NgramConfig.model_fields if name in hf}
        return ClassifierShape(backbone=validated(NgramConfig, values), labels=labels)
    if hf.get("model_type") not in ENCODERS:
        return ClassifierShape(backbone=from_hf_config(hf), labels=labels)
    kind = hf["model_type"]
    try:
        values = ENCODERS[kind].read_config(hf)
        backbone = validated(EncoderConfig, {"architecture": kind, **values})
        refuse_unless(
            backbone.n_embd % backbone.n_head == 0, f"a width of {backbone.n_embd} for {backbone.n_head} heads"
        )
    except KeyError as missing:
        raise UnsupportedModel(f"{CONFIG_FILE} of a {kind} model lacks {missing}") from None
    except ConfigError as error:
        raise UnsupportedModel(f"{CONFIG_FILE} of a {kind} model: {error}") from None
    return ClassifierShape(backbone=backbone, labels=labels)


def _read_labels(hf: HfConfig) -> tuple[str, ...]:
    """Names of the labels in the order of their numbers, two without names where nothing is said, as transformers."""
    problem = hf.get("problem_type")
    refuse_unless(problem in (None, "single_label_classification"), f"problem_type {problem!r}")
    names = hf.get("id2label")
    if names is None:
        return tuple(f"LABEL_{number}" for number in range(hf.get("num_labels") or 2))
    try:
        by_number = {int(number): str(name) for number, name in names.items()}
        labels = tuple(by_number[number] for number in range(len(by_number)))
    except (AttributeError, ValueError, KeyError):
        raise UnsupportedModel(f"{CONFIG_FILE}: id2label must name the labels 0, 1, 2, ...") from None
    refuse_unless(
        2 <= len(set(labels)) == len(labels) <= MAX_LABELS, f"id2label with {len(labels)} labels, or two alike"
    )
    return labels


def classifier_hf_config(shape: ClassifierShape) -> HfConfig:
    """The `config.json` that transformers reads as a classifier, and that we read back as it was."""
    backbone = shape.backbone
    if isinstance(backbone, EncoderConfig):
        kind = ENCODERS[backbone.architecture]
        hf = {"model_type": backbone.architecture, "problem_type": None, **kind.write_config(backbone)}
        hf["architectures"] = [f"{kind.class_name}{CLASSIFIES if shape.labels else 'Model'}"]
    elif isinstance(backbone, NgramConfig):
        hf = {"model_type": NGRAMS, **backbone.model_dump(), "architectures": [f"Ngrams{CLASSIFIES}"]}
    else:
        hf = to_hf_config(backbone)
        hf["architectures"] = [
            hf["architectures"][0].replace("LMHeadModel", "").replace("ForCausalLM", "") + CLASSIFIES
        ]
    hf["id2label"] = {str(number): label for number, label in enumerate(shape.labels)}
    hf["label2id"] = {label: number for number, label in enumerate(shape.labels)}
    assert classifier_shape(hf) == shape, "what is written can be read"
    return hf


# --- Tensors -------------------------------------------------------------------------------------------------


def classifier_layout(shape: ClassifierShape) -> Layout:
    """Where every parameter of a classifier of this shape lies in its folder."""
    backbone, num_labels = shape.backbone, len(shape.labels)
    if isinstance(backbone, EncoderConfig):
        layout = {f"backbone.{name}": stored for name, stored in _encoder_layout(backbone).items()}
        return layout | _head_layout(backbone, num_labels)
    if isinstance(backbone, NgramConfig):
        return _ngram_layout(backbone, num_labels)
    own = {name: stored for name, stored in layout_of(backbone).items() if name != "head.weight"}
    layout = {f"backbone.{name}": stored for name, stored in own.items()}
    return layout | (stored_linear("out", {"score": num_labels}, backbone.n_embd, bias=False) if num_labels else {})


def _encoder_layout(config: EncoderConfig) -> Layout:
    names, width = ENCODERS[config.architecture].names, config.n_embd
    tables = f"{names.prefix}embeddings"
    num_positions = config.block_size + config.first_position
    layout = {
        "embedding.weight": Stored((f"{tables}.word_embeddings.weight",), ((config.vocab_size, width),)),
        "positions.weight": Stored((f"{tables}.position_embeddings.weight",), ((num_positions, width),)),
    }
    if config.num_token_types:
        shape = (config.num_token_types, width)
        layout["token_types.weight"] = Stored((f"{tables}.token_type_embeddings.weight",), (shape,))
    layout |= stored_norm("norm", f"{tables}.LayerNorm", width, bias=True)
    for layer in range(config.n_layer):
        ours, theirs = f"blocks.{layer}", f"{names.prefix}{names.layer}.{layer}"
        qkv = {f"{theirs}.{name}": width for name in names.qkv}
        layout |= stored_linear(f"{ours}.attention.qkv", qkv, width, bias=True)
        layout |= stored_linear(f"{ours}.attention.out", {f"{theirs}.{names.out}": width}, width, bias=True)
        layout |= stored_norm(f"{ours}.attention_norm", f"{theirs}.{names.attention_norm}", width, bias=True)
        layout |= stored_linear(f"{ours}.mlp.up", {f"{theirs}.{names.up}": config.n_inner}, width, bias=True)
        layout |= stored_linear(f"{ours}.mlp.down", {f"{theirs}.{names.down}": width}, config.n_inner, bias=True)
        layout |= stored_norm(f"{ours}.mlp_norm", f"{theirs}.{names.mlp_norm}", width, bias=True)
    return layout


def _ngram_layout(config: NgramConfig, num_labels: int) -> Layout:
    num_rows = config.vocab_size + config.num_buckets
    layout = {
        "backbone.embedding.weight": Stored(("ngrams.embedding.weight",), ((num_rows, config.n_embd),)),
        "backbone.token_weights": Stored(("ngrams.token_weights",), ((num_rows,),)),
    }
    return layout | stored_linear("out", {"classifier": num_labels}, config.n_embd, bias=True)


def _head_layout(config: EncoderConfig, num_labels: int) -> Layout:
    if not num_labels:
        return {}
    names = ENCODERS[config.architecture].names
    dense = stored_linear("dense", {names.dense: config.n_embd}, config.n_embd, bias=True)
    return dense | stored_linear("out", {names.classifier: num_labels}, config.n_embd, bias=True)


def named_for(shape: ClassifierShape, tensors: Mapping[str, T]) -> dict[str, T]:
    """Tensors (or shapes) by their full names, without buffers and without the heads that this shape has not.

    Files of the bare model leave out the prefix, and old ones call a norm's weights gamma and beta.
    """
    is_encoder = not isinstance(shape.backbone, DecoderConfig)
    prefix = _prefix_of(shape)
    found = {_new_name(name): value for name, value in tensors.items() if not name.endswith(BUFFERS)}
    wanted = {name for stored in classifier_layout(shape).values() for name in stored.names}
    if not any(name.startswith(prefix) for name in found):
        found = {name if name in wanted else prefix + name: value for name, value in found.items()}
    foreign = (*OTHER_HEADS, *HEADS) if is_encoder else ("lm_head.", "score.")
    return {name: value for name, value in found.items() if name in wanted or not name.startswith(foreign)}


HEADS = ("pre_classifier.", "classifier.", "bert.pooler.")


def _prefix_of(shape: ClassifierShape) -> str:
    backbone = shape.backbone
    if isinstance(backbone, EncoderConfig):
        return ENCODERS[backbone.architecture].names.prefix
    if isinstance(backbone, NgramConfig):
        return "ngrams."
    return ARCHITECTURES[backbone.architecture].prefix


def _new_name(name: str) -> str:
    for old, new in OLD_NAMES.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def classifier_file_shapes(shape: ClassifierShape) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Shapes that a weights file must hold, and those that it may: GPT-2's biases that the model has not."""
    expected = shapes_in_file(classifier_layout(shape))
    optional = zero_biases_of(shape.backbone) if isinstance(shape.backbone, DecoderConfig) else {}
    return expected, optional
