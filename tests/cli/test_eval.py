"""`smelt eval` says what transformers' loss is, per token and per byte, of texts, datasets and answers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import smelt
from families import random_state
from smelt.cli.eval import command
from smelt.configs import DecoderConfig
from smelt.data.characters import ByteTokenizer
from smelt.errors import DataError, InvalidInput, NotEnoughData
from smelt.models.weights import write_model

SHAPE = DecoderConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=16)
TEXT = "A short text of more than one piece."


@pytest.fixture
def model(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = home / "models" / "tiny"
    write_model(SHAPE, random_state(SHAPE), folder)
    ByteTokenizer().save(folder)
    return folder


def evaluated(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(command, ["tiny", "--device", "cpu", "--dtype", "float32", "--json", *arguments])
    if result.exception is not None:
        raise result.exception
    return dict(json.loads(result.stdout))


def reference(folder: Path, pieces: list[list[int]], num_given: int = 0) -> tuple[float, float, int]:
    """(mean loss, accuracy, number of tokens) of what follows the given ones, by transformers."""
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    losses, right = [], []
    for piece in pieces:
        with torch.no_grad():
            logits = theirs(torch.tensor([piece[:-1]])).logits[0]
        targets = torch.tensor(piece[1:])
        each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        first = max(0, num_given - 1)
        losses += each[first:].tolist()
        right += (logits.argmax(-1) == targets)[first:].tolist()
    return sum(losses) / len(losses), sum(right) / len(right), len(losses)


def test_a_text_is_scored_as_transformers_does(model: Path) -> None:
    Path("held-out.txt").write_text(TEXT)
    ids = [*TEXT.encode(), 256]
    loss, accuracy, num_tokens = reference(model, [ids[start : start + 17] for start in range(0, len(ids) - 1, 16)])
    found = evaluated("--data", "held-out.txt")
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert found["accuracy"] == pytest.approx(accuracy)
    assert (found["num_tokens"], found["num_bytes"]) == (num_tokens, len(TEXT) - 1), "the first byte is not predicted"
    assert found["bits_per_byte"] == pytest.approx(loss * num_tokens / math.log(2) / (len(TEXT) - 1), rel=1e-5)
    assert found["tokens_per_second"] > 0


def test_of_a_completion_only_the_answer_is_scored(model: Path) -> None:
    Path("asked.jsonl").write_text('{"prompt": "2+2=", "completion": "4"}\n{"prompt": "1+1=", "completion": "2"}\n')
    pieces = [[*b"2+2=4", 256], [*b"1+1=2", 256]]
    loss, _, num_tokens = reference(model, pieces, num_given=4)
    found = evaluated("--data", "asked.jsonl")
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert (found["num_tokens"], found["num_bytes"], found["num_examples"]) == (num_tokens, 2, 2)
    assert evaluated("--data", "asked.jsonl", "--limit", "1")["num_examples"] == 1


def test_a_split_of_a_dataset_is_scored(model: Path) -> None:
    Path("lines.jsonl").write_text("".join(json.dumps({"text": f"line number {n}"}) + "\n" for n in range(40)))
    smelt.prepare_data("lines.jsonl", "lines", tokenizer="bytes", block_size=16)
    val, train = (evaluated("--data", "lines", "--split", split) for split in ("val", "train"))
    assert val["num_examples"] < train["num_examples"]
    assert val["num_examples"] + train["num_examples"] == 40


def test_it_is_told_in_words(model: Path) -> None:
    Path("held-out.txt").write_text(TEXT)
    result = CliRunner().invoke(command, ["tiny", "--data", "held-out.txt", "--device", "cpu"])
    assert result.exception is None
    assert result.stdout.startswith("loss ")
    assert "bits per byte" in result.stdout
    assert f"over {len(TEXT)} tokens ({len(TEXT) - 1} bytes)" in result.stdout


@pytest.mark.parametrize(
    ("name", "content", "arguments", "error", "message"),
    [
        ("a.txt", "text", ["--max-length", "17"], InvalidInput, "more than the model's context of 16"),
        ("a.jsonl", '{"text": 1}', [], DataError, r"a\.jsonl, line 1: `text` must be"),
        ("a.jsonl", "", [], DataError, "holds no examples"),
    ],
)
def test_what_cannot_be_scored_is_said(
    model: Path, name: str, content: str, arguments: list[str], error: type[Exception], message: str
) -> None:
    Path(name).write_text(content)
    with pytest.raises(error, match=message):
        evaluated("--data", name, *arguments)


def test_an_empty_selection_is_said() -> None:
    from smelt.training.run_setup import no_progress
    from smelt.training.scoring import score

    with pytest.raises(NotEnoughData, match="holds no examples"):
        score(None, ByteTokenizer(), [], 8, no_progress)  # type: ignore[arg-type]
