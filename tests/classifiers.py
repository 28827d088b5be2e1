"""Small classifiers of every kind, as transformers makes them: what tests of several packages share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LABELS = ("World", "Sports", "Business")
VOCAB_SIZE = 61
ENCODERS = ("distilbert", "bert", "roberta")
DECODERS = ("gpt2", "llama")

BERT_SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}


def _config(kind: str, **more: Any) -> Any:
    import transformers

    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    shared = {"vocab_size": VOCAB_SIZE, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": None, **labels, **more}
    makers: dict[str, Callable[[], Any]] = {
        "distilbert": lambda: transformers.DistilBertConfig(
            dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=40, **shared
        ),
        "bert": lambda: transformers.BertConfig(**BERT_SHAPE, **shared),
        "roberta": lambda: transformers.RobertaConfig(**BERT_SHAPE, layer_norm_eps=1e-5, **shared),
        "gpt2": lambda: transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=40, **shared),
        "llama": lambda: transformers.LlamaConfig(**BERT_SHAPE, num_key_value_heads=1, **shared),
    }
    return makers[kind]()


def make_reference(kind: str, auto_class: str = "AutoModelForSequenceClassification", **more: Any) -> Any:
    """A model of transformers with random weights, large enough that mistakes show."""
    import transformers

    model = getattr(transformers, auto_class).from_config(_config(kind, **more)).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model


def save_reference(kind: str, folder: Path, **more: Any) -> Any:
    """The same, and its folder."""
    model = make_reference(kind, **more)
    model.save_pretrained(folder)
    return model


def save_small_classifier(folder: Path, labels: tuple[str, ...] = LABELS) -> None:
    """Our own encoder of n-grams with random weights and a tokenizer of bytes: a folder that can be served."""
    from smelt.data.characters import ByteTokenizer
    from smelt.models.classifier import Classifier
    from smelt.models.classifier_folders import write_classifier
    from smelt.models.encoder_architectures import ClassifierShape, NgramConfig

    backbone = NgramConfig.model_validate({"vocab_size": 257, "num_buckets": 64, "n_embd": 8, "block_size": 4096})
    model = Classifier(ClassifierShape(backbone=backbone, labels=labels))
    model.initialize(5)
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(40)  # so that texts differ
    write_classifier(model.config, model.state_dict(), folder)
    ByteTokenizer().save(folder)


def texts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    """Token ids of texts that are as long as this."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def reference_logits(model: Any, texts: list[list[int]]) -> torch.Tensor:
    """(B, L): each text alone, without padding."""
    with torch.inference_mode():
        return torch.cat([model(torch.tensor([text])).logits for text in texts])
