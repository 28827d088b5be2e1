"""Logits, gradients and folders of classifiers against transformers'."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from classifiers import DECODERS, ENCODERS, LABELS, make_reference, reference_logits, save_reference, texts_of
from smelt.errors import UnsupportedModel
from smelt.models.classifier import Classifier, labels_of, pack_texts
from smelt.models.classifier_folders import (
    assemble_classifier,
    read_classifier,
    read_classifier_state,
    write_classifier,
)
from smelt.models.encoder_architectures import ClassifierShape, EncoderConfig, NgramConfig
from smelt.models.folders import read_classifier_shape

TEXTS = texts_of((9, 8, 30, 29, 28, 3, 1))
KINDS = (*ENCODERS, *DECODERS)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers_reading_its_folder(kind: str, tmp_path: Path) -> None:
    reference = save_reference(kind, tmp_path)
    model = read_classifier(tmp_path)
    assert model.config.labels == LABELS
    with torch.inference_mode():
        assert (model(pack_texts(TEXTS)) - reference_logits(reference, TEXTS)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_our_folder(kind: str, tmp_path: Path) -> None:
    reference = save_reference(kind, tmp_path / "theirs")
    model = read_classifier(tmp_path / "theirs")
    write_classifier(model.config, model.state_dict(), tmp_path / "ours")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    assert again.config.id2label == dict(enumerate(LABELS))
    assert again.config.label2id == {label: number for number, label in enumerate(LABELS)}
    assert reference_logits(again, TEXTS) == pytest.approx(reference_logits(reference, TEXTS), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_transformers(kind: str, tmp_path: Path) -> None:
    reference = save_reference(kind, tmp_path)
    labels = [0, 1, 2, 0, 1, 2, 0]
    logits = torch.cat([reference(torch.tensor([text])).logits for text in TEXTS])
    F.cross_entropy(logits, torch.tensor(labels)).backward()
    model = read_classifier(tmp_path)
    batch = pack_texts(TEXTS, labels)
    F.cross_entropy(model(batch), labels_of(batch)).backward()
    table = next(
        name for name, _ in reference.named_parameters() if "word_emb" in name or "wte" in name or "tokens" in name
    )
    expected = dict(reference.named_parameters())[table].grad
    assert expected.abs().max() > 1e-3
    assert model.backbone.embedding.weight.grad.to_dense() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", [*ENCODERS, "gpt2"])
def test_bfloat16_is_near(kind: str, tmp_path: Path) -> None:
    save_reference(kind, tmp_path)
    exact, rounded = read_classifier(tmp_path), read_classifier(tmp_path, torch.bfloat16)
    assert {tensor.dtype for tensor in rounded.state_dict().values()} == {torch.bfloat16}
    with torch.inference_mode():
        difference = exact(pack_texts(TEXTS)).softmax(-1) - rounded(pack_texts(TEXTS)).float().softmax(-1)
    assert difference.abs().max() < 0.1


def test_a_text_has_the_same_answer_in_any_company(tmp_path: Path) -> None:
    save_reference("distilbert", tmp_path)
    model = read_classifier(tmp_path)
    with torch.inference_mode():
        alone = torch.cat([model(pack_texts([text])) for text in TEXTS])
        assert model(pack_texts(TEXTS)) == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("auto_class", ["AutoModel", "AutoModelForMaskedLM"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_without_our_head_is_read_and_given_one(kind: str, auto_class: str, tmp_path: Path) -> None:
    reference = make_reference(kind, auto_class)
    reference.save_pretrained(tmp_path)
    bare = read_classifier_shape(tmp_path)
    assert bare.labels == ()
    shape = bare.replace(labels=("no", "yes"))
    model = assemble_classifier(shape, read_classifier_state(tmp_path, bare))
    model.initialize_head(3)
    encoder = reference if auto_class == "AutoModel" else reference.base_model
    with torch.inference_mode():
        states = encoder(torch.tensor([TEXTS[0]])).last_hidden_state
        hidden = model.backbone(pack_texts(TEXTS[:1]), model._attend(torch.tensor([len(TEXTS[0])])))
        assert hidden == pytest.approx(states, abs=1e-5)
        assert model(pack_texts(TEXTS)).shape == (len(TEXTS), 2)


def test_a_decoder_without_head_is_given_one(tmp_path: Path) -> None:
    make_reference("gpt2", "AutoModelForCausalLM").save_pretrained(tmp_path)
    bare = read_classifier_shape(tmp_path)
    model = assemble_classifier(bare.replace(labels=("no", "yes")), read_classifier_state(tmp_path, bare))
    write_classifier(model.config, model.state_dict(), tmp_path / "ours")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours", pad_token_id=1).eval()
    with torch.inference_mode():
        assert model(pack_texts(TEXTS)) == pytest.approx(reference_logits(again, TEXTS), abs=1e-5)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    save_reference("bert", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")

    def refused(expected: str, **changes: object) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(UnsupportedModel, match=expected):
            read_classifier(tmp_path)

    refused("classifier.weight has shape", id2label={"0": "a", "1": "b"})
    refused("id2label", id2label={"0": "a", "2": "b"})
    refused("two alike", id2label={"0": "a", "1": "a", "2": "b"})
    refused("multi_label", problem_type="multi_label_classification")
    refused("activation 'swish'", hidden_act="swish")
    refused("relative_key", position_embedding_type="relative_key")
    refused("missing bert.encoder.layer.2", num_hidden_layers=3)
    refused("width of 16 for 3 heads", num_attention_heads=3)
    tensors.pop("classifier.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    refused("missing classifier.bias")


def test_dropout_drops_only_in_training() -> None:
    shape = ClassifierShape(
        backbone=EncoderConfig(vocab_size=61, block_size=40, n_layer=1, n_head=2, n_embd=16, n_inner=24), labels=LABELS
    )
    model = Classifier(shape, dropout=0.5, head_dropout=0.5)
    model.initialize(1)
    batch = pack_texts(TEXTS)
    with torch.no_grad():
        assert not torch.equal(model(batch), model(batch))
        model.eval()
        assert torch.equal(model(batch), model(batch))
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def ngrams(num_buckets: int = 50) -> Classifier:
    backbone = NgramConfig(vocab_size=61, num_buckets=num_buckets, n_embd=6, block_size=40)
    model = Classifier(ClassifierShape(backbone=backbone, labels=LABELS)).eval()
    model.initialize(1)
    return model


def test_a_text_of_ngrams_is_the_weighted_mean_of_tokens_and_pairs() -> None:
    model = ngrams()
    encoder = model.backbone
    encoder.weigh([[1, 2, 2], [2, 3]])
    seen_once = torch.log(torch.tensor(3 / 2)) + 1
    assert encoder.token_weights[[1, 2, 3, 4]] == pytest.approx(
        torch.tensor([seen_once, 1.0, seen_once, torch.log(torch.tensor(3.0)) + 1])
    )
    pairs = [61 + (a * 0x9E3779B1 + b * 0x85EBCA6B) % 50 for a, b in ((5, 6), (6, 7))]
    rows = torch.tensor([5, 6, 7, *pairs])
    weights = encoder.token_weights[rows]
    expected = (encoder.embedding.weight[rows] * weights[:, None]).sum(0) / weights.sum()
    batch = pack_texts([[9], [5, 6, 7], [7, 6]])
    found = encoder(batch, torch.tensor([1, 3, 2]))[1]
    assert found.detach() == pytest.approx(expected.detach(), abs=1e-6)


def test_ngrams_do_not_reach_across_texts_and_come_back_from_disk(tmp_path: Path) -> None:
    model = ngrams()
    model.backbone.weigh(TEXTS)
    with torch.inference_mode():
        logits = model(pack_texts(TEXTS))
        assert logits == pytest.approx(torch.cat([model(pack_texts([text])) for text in TEXTS]), abs=1e-6)
        write_classifier(model.config, model.state_dict(), tmp_path)
        again = read_classifier(tmp_path)
        assert again.config == model.config
        assert torch.equal(again(pack_texts(TEXTS)), logits)
        assert ngrams(0)(pack_texts(TEXTS)).shape == logits.shape
    model.train()
    model.backbone.dropout = 0.99
    with torch.no_grad():
        assert model(pack_texts(TEXTS)).isfinite().all()  # also where nothing is left
