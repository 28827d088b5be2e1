"""Classifiers from labelled texts: what is learned, kept, resumed and reported."""

import json
import math
import os
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import smelt
from classifiers import save_reference
from ranks import on_two_ranks
from smelt.data.hf_tokenizer import read_huggingface_tokenizer
from smelt.data.text_ids import TextIds
from smelt.errors import CheckpointError, ConfigError, DataError, TokenizerError
from smelt.models.classifier import pack_texts
from smelt.models.classifier_folders import read_classifier
from smelt.models.folders import read_tokenizer
from smelt.training.label_scores import SCORES_FILE, LabelScores, confusions, read_scores, write_scores
from smelt.training.optim import linear_with_warmup
from smelt.training.parallel import Ranks
from smelt.training.text_batches import TextBatches, eval_batches

ANIMALS, FRUITS = ("cat", "dog", "horse", "sheep", "goat"), ("apple", "pear", "plum", "fig", "grape")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMELT_HOME", str(tmp_path / "home"))


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """Sentences about animals and fruits: what they are about is one word of four."""
    rows = [
        (label, f"{start} the {word} {end}")
        for label, words in (("animal", ANIMALS), ("fruit", FRUITS))
        for word in words
        for start in ("I saw", "this is", "we like", "where was")
        for end in ("here", "over there today", "again")
    ]
    held = [row for number, row in enumerate(rows) if number % 5 == 2]
    train = [row for number, row in enumerate(rows) if number % 5 != 2]
    for name, part in (("train", train), ("valid", held)):
        lines = ["label,text", *(f"{label},{text}" for label, text in part)]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
    return {"data": str(tmp_path / "train.csv"), "valid": str(tmp_path / "valid.csv")}


SMALL: dict[str, Any] = {
    "recipe": "classify",
    "tokenizer": "bpe:300",
    "n_embd": 8,
    "num_buckets": 100,
    "batch_size": 8,
    "epochs": 3,
    "threads": 1,
    "device": "cpu",
    "learning_rate": 2e-2,
}


def train(out_dir: Path, data: dict[str, str], **more: Any) -> Any:
    return smelt.train({**SMALL, **data, "out_dir": str(out_dir), **more})


def metrics_of(out_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return read_classifier(folder).state_dict()


def test_a_classifier_from_scratch_learns_and_is_kept_whole(tmp_path: Path, data: dict[str, str]) -> None:
    summary = train(tmp_path / "run", data)
    assert summary.stop_reason == "done"
    assert summary.step == 3 * math.ceil(96 / 8)
    best = tmp_path / "run" / "best"
    model, tokenizer = read_classifier(best), read_tokenizer(best)
    assert model.config.labels == ("animal", "fruit")
    assert tokenizer is not None
    ids = TextIds(tokenizer, 128, lowercase=True).encode(["a DOG there", "one plum"])
    with torch.inference_mode():
        assert model(pack_texts(ids)).argmax(-1).tolist() == [0, 1]
    scores = read_scores(tmp_path / "run" / SCORES_FILE)
    assert scores is not None
    assert scores.accuracy > 0.95
    assert sum(map(sum, scores.confusion)) == 24
    evaluations = [line for line in metrics_of(tmp_path / "run") if line["kind"] == "evaluation"]
    assert len(evaluations) == 3 + 1  # one for each epoch, and the last one
    assert {"accuracy", "macro_f1", "train_accuracy"} <= evaluations[0]["figures"].keys()
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "train: 96 texts: animal 48, fruit 48" in log


def test_a_resumed_run_has_the_same_bits(tmp_path: Path, data: dict[str, str]) -> None:
    train(tmp_path / "whole", data, dropout=0.2)
    train(tmp_path / "parts", data, dropout=0.2, max_iters=17, lr_decay_iters=36, warmup_iters=1)
    train(tmp_path / "whole2", data, dropout=0.2, max_iters=36, lr_decay_iters=36, warmup_iters=1)
    values = {"recipe": "classify", "init_from": "resume", "out_dir": str(tmp_path / "parts"), "max_iters": 36}
    assert smelt.train(values).step == 36
    resumed, whole = weights_of(tmp_path / "parts" / "last"), weights_of(tmp_path / "whole2" / "last")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def train_in_folder(folder: str, values: dict[str, Any]) -> None:
    os.environ["SMELT_HOME"] = folder
    smelt.train(values)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sharding"), [("scratch", "full"), ("distilbert", "full"), ("llama", "optimizer")])
def test_two_ranks_with_parts_learn_as_one_process_does(
    tmp_path: Path, data: dict[str, str], kind: str, sharding: str
) -> None:
    """A step has 5 texts, an epoch's last one 1: so a rank has fewer passes than the other, or none of its own."""
    values = {**SMALL, **data, "batch_size": 1, "gradient_accumulation_steps": 5, "epochs": 2, "dropout": 0.0}
    values |= {"dtype": "float32", "max_length": 16}
    if kind != "scratch":
        save_reference(kind, tmp_path / kind)
        word_level_tokenizer(tmp_path / kind)
        values |= {"model": str(tmp_path / kind), "learning_rate": 1e-3}
    smelt.train({**values, "out_dir": str(tmp_path / "one")})
    shared_values = {**values, "out_dir": str(tmp_path / "two"), "sharding": sharding}
    on_two_ranks(tmp_path, train_in_folder, str(tmp_path / "home"), shared_values)
    for name in ("loss", "val_loss"):
        alone, shared = ([line[name] for line in metrics_of(tmp_path / out) if name in line] for out in ("one", "two"))
        assert shared == pytest.approx(alone, abs=1e-5)
    whole, parts = weights_of(tmp_path / "one" / "last"), weights_of(tmp_path / "two" / "last")
    assert whole.keys() == parts.keys()


def test_other_data_is_not_gone_on_with(tmp_path: Path, data: dict[str, str]) -> None:
    train(tmp_path / "run", data, max_iters=5)
    with Path(data["data"]).open("a") as file:
        file.write("\nfruit,one more fig")
    with pytest.raises(CheckpointError, match="other data"):
        smelt.train({"recipe": "classify", "init_from": "resume", "out_dir": str(tmp_path / "run"), "max_iters": 9})


def word_level_tokenizer(folder: Path) -> None:
    """[CLS] words [SEP], as BERT's vocab.txt has it."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *ANIMALS, *FRUITS, "the", "here", "this", "is"]
    (folder / "vocab.txt").write_text("\n".join(words))


@pytest.mark.parametrize("kind", ["distilbert", "gpt2"])
def test_a_model_of_transformers_is_given_the_labels_of_the_data(
    kind: str, tmp_path: Path, data: dict[str, str]
) -> None:
    save_reference(kind, tmp_path / "base")
    word_level_tokenizer(tmp_path / "base")
    more = {"model": str(tmp_path / "base"), "max_length": 16, "epochs": 2, "learning_rate": 5e-3, "dropout": 0.0}
    train(tmp_path / "run", data, **more, dtype="float32")
    before, after = weights_of(tmp_path / "base"), weights_of(tmp_path / "run" / "last")
    assert after["out.weight"].shape == (2, 16)
    assert not torch.equal(before["backbone.embedding.weight"], after["backbone.embedding.weight"])
    with pytest.raises(ConfigError, match="max_length 50 is longer than the model's 40 tokens"):
        train(tmp_path / "long", data, **{**more, "max_length": 50})
    # Its own labels are kept, in their order, and its head goes on.
    again = {**more, "model": str(tmp_path / "run"), "max_iters": 0}
    train(tmp_path / "again", data, **again, dtype="float32")
    best = weights_of(tmp_path / "run" / "best")
    assert all(torch.equal(best[name], tensor) for name, tensor in weights_of(tmp_path / "again" / "last").items())


def test_a_model_without_tokenizer_is_refused(tmp_path: Path, data: dict[str, str]) -> None:
    save_reference("bert", tmp_path / "base")
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        train(tmp_path / "run", data, model=str(tmp_path / "base"), max_length=16)


def test_a_run_that_gets_no_better_ends_early(tmp_path: Path, data: dict[str, str]) -> None:
    summary = train(tmp_path / "run", data, learning_rate=0.0, epochs=20, patience=3)
    assert summary.stop_reason == "no_better"
    assert summary.step == 4 * 12  # the first is the best
    assert "no better" in (tmp_path / "run" / "log.txt").read_text()


def test_labels_of_the_validation_must_be_known(tmp_path: Path, data: dict[str, str]) -> None:
    Path(data["valid"]).write_text("label,text\nanimal,a dog\nstone,a pebble\n")
    with pytest.raises(DataError, match=r"valid\.csv, line 3: the label 'stone' is not among animal, fruit"):
        train(tmp_path / "run", data)


def test_part_of_the_data_and_a_split_of_it(tmp_path: Path, data: dict[str, str]) -> None:
    train(tmp_path / "run", {"data": data["data"]}, num_samples=40, max_iters=1)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "train: 40 texts" in log
    assert "valid: 10 texts" in log


# --- The parts -----------------------------------------------------------------------------------------------


TEXTS = [[number] * (1 + number * 7 % 13) for number in range(30)]


def batches(rank: int = 0, world_size: int = 1, num_texts: int = 8, micro: int = 3) -> TextBatches:
    return TextBatches(TEXTS, [number % 3 for number in range(30)], Ranks(rank, world_size), num_texts, micro, seed=5)


def seen(part: TextBatches, step: int) -> list[int]:
    pieces = list(part.micro_batches(step, torch.device("cpu"), part.ranks.rank))
    return [int(piece.tokens[0][piece.positions[0] == 0][i]) for piece in pieces for i in range(piece.num_targets)]


def test_each_epoch_has_every_text_once_on_any_number_of_ranks() -> None:
    alone = batches()
    assert alone.steps_per_epoch == 4
    for epoch in range(2):
        steps = range(4 * epoch, 4 * epoch + 4)
        assert sorted(chain.from_iterable(seen(alone, step) for step in steps)) == list(range(30))
        for step in steps:
            shares = [seen(batches(rank, 2), step) for rank in range(2)]
            assert sorted(chain.from_iterable(shares)) == sorted(seen(alone, step))
            assert abs(len(shares[0]) - len(shares[1])) <= 1
    assert seen(alone, 0) != seen(alone, 4)
    assert alone.size(3).num_targets == 6
    assert alone.size(0).num_tokens == sum(len(TEXTS[number]) for number in alone.numbers(0))


def test_evaluation_sees_every_text_once() -> None:
    labels = [number % 3 for number in range(30)]
    found = [
        int(token)
        for rank in range(3)
        for batch in eval_batches(TEXTS, labels, Ranks(rank, 3), 4, torch.device("cpu"))
        for token in batch.tokens[0][batch.positions[0] == 0]
    ]
    assert sorted(found) == list(range(30))


def test_scores_by_hand(tmp_path: Path) -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    logits = F.one_hot(torch.tensor([0, 0, 1, 1, 0, 1]), 4).float()
    counts = confusions(logits, labels)
    scores = LabelScores(("a", "b", "c", "d"), 0.5, tuple(tuple(int(n) for n in row) for row in counts.tolist()))
    assert scores.confusion == ((2, 1, 0, 0), (1, 1, 0, 0), (0, 1, 0, 0), (0, 0, 0, 0))
    assert scores.accuracy == 3 / 6
    assert [scores.f1(number) for number in range(4)] == pytest.approx([2 / 3, 2 / 5, 0, 0])
    assert scores.macro_f1 == pytest.approx((2 / 3 + 2 / 5) / 4)
    write_scores(scores, tmp_path / "s.json")
    assert read_scores(tmp_path / "s.json") == scores
    assert read_scores(tmp_path / "none.json") is None
    assert "0.667" in "\n".join(scores.lines())


def test_the_schedule_is_a_straight_line() -> None:
    rates = [linear_with_warmup(step, 1.0, 0.0, 2, 10) for step in range(12)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0, 0])


def test_texts_are_framed_as_transformers_frames_them(tmp_path: Path) -> None:
    import transformers

    word_level_tokenizer(tmp_path)
    theirs = transformers.BertTokenizerFast.from_pretrained(tmp_path)
    ours = TextIds(read_huggingface_tokenizer(tmp_path), 6)
    texts = ["The dog is HERE", "a", "this is the dog here this is", "", "[SEP] dog"]
    expected = [theirs(text, truncation=True, max_length=6)["input_ids"] for text in texts[:4]]
    found = ours.encode(texts)
    assert found[:4] == expected
    assert found[4].count(3) == 1  # a special token's name in a text is no special token
