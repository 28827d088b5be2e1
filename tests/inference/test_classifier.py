"""Texts of many requests computed together: the same answers as alone, and what fails fails alone."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from classifiers import LABELS, save_reference, save_small_classifier
from smelt.errors import InvalidInput
from smelt.inference import classifier
from smelt.inference.classifier import Classifying, TextClassifier, classify_slice
from smelt.inference.events import ClassifyRequest, EmbedRequest, End, Scores
from smelt.inference.residents import Resident
from smelt.inference.server import InferenceServer
from smelt.library import load_classifier
from smelt.models.classifier import pack_texts
from smelt.transport.messages import Embed

TEXTS = tuple("word " * (number % 7 + 1) + str(number) for number in range(40))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TextClassifier:
    monkeypatch.setenv("SMELT_HOME", str(tmp_path / "home"))
    save_small_classifier(tmp_path / "news")
    return load_classifier(str(tmp_path / "news"), device="cpu")


def alone(model: TextClassifier, text: str) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        return model.model(pack_texts(model.text_ids.encode([text]))).softmax(-1)[0].numpy()


def test_a_classifier_is_loaded_and_asked(model: TextClassifier) -> None:
    found = model.classify(TEXTS)
    assert [list(each) for each in found] == [list(LABELS)] * len(TEXTS)
    assert np.array([list(each.values()) for each in found]) == pytest.approx(
        np.array([alone(model, text) for text in TEXTS]), abs=1e-6
    )


def test_few_texts_wait_for_more_and_a_full_pass_does_not(
    model: TextClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier, "SLICE_TOKENS", 100)
    resident = Resident("news", 0.0, 0.0, gathers_until=7.0)
    assert resident.classifies_at is None
    few, many = (Classifying(str(num), ClassifyRequest(TEXTS[:num])) for num in (1, 39))
    for job in (few, many):
        job.prepare(model)
    resident.classifying.append(few)
    assert resident.classifies_at == 7.0
    resident.classifying.append(many)
    assert resident.classifies_at == 0.0
    many.num_done = len(many.ids)
    assert resident.classifies_at == 7.0


def test_a_slice_takes_texts_of_several_requests(model: TextClassifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "SLICE_TOKENS", 100)
    jobs = [Classifying(str(n), ClassifyRequest(TEXTS[n : n + 13])) for n in (0, 13, 26)]
    for job in jobs:
        job.prepare(model)
    num_slices = 0
    while any(not job.is_done for job in jobs):
        touched = classify_slice(model, [job for job in jobs if not job.is_done])
        num_slices += 1
        assert touched
    assert 3 < num_slices < 39  # neither one for each request nor one for each text
    found = np.concatenate([job.probabilities for job in jobs])
    assert found == pytest.approx(np.array([alone(model, text) for text in TEXTS[:39]]), abs=1e-6)


def test_an_encoder_without_labels_says_so(tmp_path: Path, model: TextClassifier) -> None:
    from classifiers import make_reference

    make_reference("bert", "AutoModel").save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    with pytest.raises(InvalidInput, match="knows no labels yet"):
        load_classifier(str(tmp_path / "bare"), device="cpu")


class Heard:
    """What a server delivers, by key."""

    def __init__(self) -> None:
        self.scores: dict[str, Scores] = {}
        self.ends: dict[str, End] = {}
        self.changed = threading.Condition()

    def take(self, events: list[Any]) -> None:
        with self.changed:
            for event in events:
                if isinstance(event, Scores):
                    self.scores[event.key] = event
                elif isinstance(event, End):
                    self.ends[event.key] = event
            self.changed.notify_all()

    def wait_for(self, num_ends: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.ends) >= num_ends, timeout=60)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def server(model: TextClassifier, heard: Heard) -> Iterator[InferenceServer]:
    server = InferenceServer(lambda _: model, heard.take)
    yield server
    server.close()


def test_the_server_answers_many_at_once(server: InferenceServer, model: TextClassifier, heard: Heard) -> None:
    for number, text in enumerate(TEXTS):
        server.classify(str(number), ClassifyRequest((text, TEXTS[0]), "news"))
    heard.wait_for(len(TEXTS))
    for number, text in enumerate(TEXTS):
        scores = heard.scores[str(number)]
        assert scores.labels == LABELS
        rows = np.frombuffer(scores.probabilities, "<f4").reshape(2, -1)
        assert rows == pytest.approx(np.array([alone(model, text), alone(model, TEXTS[0])]), abs=1e-6)
        assert heard.ends[str(number)].error is None
        assert heard.ends[str(number)].num_prompt_tokens > 0


def test_what_fails_fails_alone(
    server: InferenceServer, model: TextClassifier, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model.probabilities

    def broken(texts: Any) -> Any:
        if any(len(text) == len("poison") + 1 for text in texts):
            raise RuntimeError("no")
        return whole(texts)

    monkeypatch.setattr(model, "probabilities", broken)
    for key, text in (("a", "a good text"), ("b", "poison"), ("c", "another good text")):
        server.classify(key, ClassifyRequest((text,), "news"))
    heard.wait_for(3)
    assert heard.ends["a"].error is heard.ends["c"].error is None
    assert heard.ends["b"].reason == "aborted"
    assert isinstance(heard.ends["b"].error, RuntimeError)


def test_one_text_does_not_wait_for_thousands(
    server: InferenceServer, model: TextClassifier, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier, "SLICE_TOKENS", 100)
    whole, may_go_on = model.probabilities, threading.Event()

    def held(texts: Any) -> Any:
        may_go_on.wait(60)
        return whole(texts)

    monkeypatch.setattr(model, "probabilities", held)
    server.classify("many", ClassifyRequest(TEXTS * 50, "news"))
    one = ClassifyRequest(("one",), "news")
    server.classify("one", one)
    while not any(resident.classifying for resident in server._residents):
        threading.Event().wait(0.01)
    may_go_on.set()
    heard.wait_for(2)
    assert list(heard.ends) == ["one", "many"]


def test_a_classifier_does_not_write_and_is_cancelled(server: InferenceServer, heard: Heard) -> None:
    request: EmbedRequest = Embed("e", "ann", "news", ("text",))
    server.embed("e", request)
    heard.wait_for(1)
    assert isinstance(heard.ends["e"].error, InvalidInput)
    assert "is a classifier" in str(heard.ends["e"].error)
    server.classify("c", ClassifyRequest(TEXTS * 50, "news"))
    server.cancel("c")
    heard.wait_for(2)
    server.classify("d", ClassifyRequest(("more",), "news"))
    heard.wait_for(3)
    assert heard.ends["d"].error is None


def test_logits_of_an_encoder_come_through(tmp_path: Path, model: TextClassifier) -> None:
    import transformers

    save_reference("distilbert", tmp_path / "bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert").eval()
    tokenizer = transformers.BertTokenizerFast.from_pretrained(tmp_path / "bert")
    ours = load_classifier(str(tmp_path / "bert"), device="cpu", dtype="float32")
    texts = ["a b c", "j", "a " * 60]
    for text, found in zip(texts, ours.classify(texts), strict=True):
        with torch.inference_mode():
            encoded = tokenizer(text, return_tensors="pt", truncation=True, max_length=40)
            expected = theirs(**encoded).logits.softmax(-1)[0]
        assert list(found.values()) == pytest.approx(expected.tolist(), abs=1e-5)
