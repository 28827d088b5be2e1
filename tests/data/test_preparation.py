import gzip
import json
import os
import signal
import subprocess
import sys
import threading
from itertools import islice

import numpy as np
import pytest

from smelt.data import preparation
from smelt.data.characters import ByteTokenizer, CharTokenizer
from smelt.data.datasets import list_datasets
from smelt.data.documents import PIECE_CHARS
from smelt.data.preparation import PrepareOptions, dataset_for, prepare, retokenize
from smelt.data.tokenizers import make_tokenizer
from smelt.errors import AlreadyExists, DataError, InvalidInput, NotEnoughData, TokenizerError


def options(**values):
    return PrepareOptions(**{"block_size": 8, **values})


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def tokens_of(split):
    return split.read(0, split.num_tokens).tolist()


def documents_of(dataset):
    return {name: [document.tolist() for document in dataset.split(name).documents()] for name in ("train", "val")}


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("".join(f"Line {i} of the story, and then some more.\n" for i in range(200)))
    return path


# --- Splits ----------------------------------------------------------------------------------------------


def test_a_single_document_gives_its_tail_to_validation(shared_data, tmp_path):
    path = shared_data / "tinyshakespeare.txt"
    dataset = prepare(str(path), tmp_path, "shakespeare", tokenizer="bytes")
    content = path.read_bytes()
    cut = int(len(content) * 0.9)
    assert tokens_of(dataset.split("train")) == list(content[:cut])
    assert tokens_of(dataset.split("val")) == [*content[cut:], 256]
    assert dataset.split("val").num_documents == 1


def test_documents_are_never_in_both_splits(tmp_path):
    texts = [f"document {i}" for i in range(500)]
    dataset = prepare(jsonl(tmp_path / "a.jsonl", texts), tmp_path, "a", tokenizer="bytes", options=options())
    made = documents_of(dataset)
    assert [len(made["train"]), len(made["val"])] == [450, 50]
    assert all(document[-1] == 256 for split in made.values() for document in split)
    decoded = [bytes(document[:-1]).decode() for split in made.values() for document in split]
    assert sorted(decoded) == sorted(texts)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.37, 0.5, 0.9])
def test_the_fraction_holds_in_every_stretch(fraction):
    chosen = np.fromiter(islice(preparation._assignments(fraction), 20_000), bool)
    assert not chosen[0]
    for part in chosen.reshape(5, 4000):
        assert abs(part.mean() - fraction) < 0.05 * fraction
    first_of_each_ten = chosen[::10]
    assert 0.7 * fraction < first_of_each_ten.mean() < 1.3 * fraction  # no rhythm that data could share


def test_splits_do_not_depend_on_how_the_documents_arrive(tmp_path, monkeypatch):
    source = jsonl(tmp_path / "a.jsonl", [f"document {i} " * 20 for i in range(60)])
    first = prepare(source, tmp_path, "first", tokenizer="bytes", options=options())
    monkeypatch.setattr(preparation, "BATCH_PIECES", 3)
    second = prepare(source, tmp_path, "second", tokenizer="bytes", options=options())
    assert first.sha256 == second.sha256


def test_few_documents_still_give_validation_a_share(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", ["long text " * 100, "another long text " * 100, "short " * 20])
    dataset = prepare(source, tmp_path, "a", tokenizer="bytes", options=options(val_fraction=0.05))
    made = documents_of(dataset)
    assert made["val"][-1][-1] == 256
    total = sum(len(document) for split in made.values() for document in split)
    assert 0.02 < sum(map(len, made["val"])) / total < 0.15


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_each_split_holds_a_block_when_the_data_allows_it(fraction, tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [f"{i:03d}" for i in range(50)])  # 4 tokens each, with the end
    made = prepare(source, tmp_path, "a", tokenizer="bytes", options=options(val_fraction=fraction, block_size=99))
    assert made.split("train").num_tokens == made.split("val").num_tokens == 100
    with pytest.raises(
        NotEnoughData, match=r"gives 200 tokens, but training and validation need 202: one block of 100"
    ):
        prepare(source, tmp_path, "b", tokenizer="bytes", options=options(val_fraction=fraction, block_size=100))
    assert list_datasets(tmp_path) == ["a"]


def test_a_cut_document_is_cut_between_characters(tmp_path):
    path = tmp_path / "emoji.txt"
    path.write_text("🙂" * 1000)
    dataset = prepare(str(path), tmp_path, "emoji", tokenizer="bytes", options=options(val_fraction=0.3337))
    texts = ["".join(piece.text for piece in dataset.texts(name)) for name in ("train", "val")]
    assert "".join(texts) == "🙂" * 1000
    assert abs(len(texts[1]) - 334) <= 1


# --- Tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["bytes", "char", "bpe:300"])
def test_a_document_of_many_pieces_comes_back_whole(spec, tmp_path):
    text = "".join(f"Sentence {i}, with naïve café and 🙂.\n" for i in range(3 * PIECE_CHARS // 35))
    path = tmp_path / "long.txt"
    path.write_text(text)
    dataset = prepare(str(path), tmp_path, "long", tokenizer=spec, options=options(shard_tokens=50_000))
    assert len(text) > 2 * PIECE_CHARS
    assert len(dataset.manifest.train) > 3
    assert "".join(piece.text for name in ("train", "val") for piece in dataset.texts(name)) == text
    assert dataset.split("train").num_documents == 1


def test_learned_tokenizers_are_the_same_each_time(text_file, tmp_path):
    made = [prepare(str(text_file), tmp_path, name, tokenizer="bpe:300", options=options()) for name in "ab"]
    assert made[0].sha256 == made[1].sha256
    assert made[0].manifest.vocab_size == 300


def test_large_vocabularies_take_four_bytes(text_file, tmp_path):
    characters = {chr(code): code for code in range(70_000) if not 0xD800 <= code < 0xE000}
    dataset = prepare(str(text_file), tmp_path, "wide", tokenizer=CharTokenizer(characters), options=options())
    assert dataset.manifest.dtype == "uint32"
    text = "".join(piece.text for name in ("train", "val") for piece in dataset.texts(name))
    assert text == text_file.read_text()
    assert dataset.tokenizer.encode("a") == [97]


def test_progress_reaches_the_end(text_file, tmp_path):
    calls = []
    prepare(str(text_file), tmp_path, "a", tokenizer="bpe:300", options=options(), progress=lambda *c: calls.append(c))
    size = text_file.stat().st_size
    assert {stage for stage, _, _ in calls} == {"learning the tokenizer", "tokenizing"}
    assert calls[-1] == ("tokenizing", size, size)


# --- Nothing half-registered -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt is empty"),
        ("blank.jsonl", b'{"text": ""}\n\n', "blank.jsonl holds no text"),
        ("binary.txt", b"text\0", "byte 4 is NUL"),
        ("late.jsonl", b'{"text": "good"}\n' * 50 + b"bad", "late.jsonl, line 51 is not JSON"),
        ("torn.txt.gz", gzip.compress(b"hello " * 5000)[:-20], "torn.txt.gz cannot be read"),
    ],
)
def test_bad_sources_register_nothing(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(str(path), tmp_path / "home", "bad", tokenizer="bytes", options=options())
    assert {entry.name for entry in (tmp_path / "home").iterdir()} == {".lock"}


def test_skipped_records_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good text here"}\n' * 50 + b"bad\n[]\n")
    dataset = prepare(str(path), tmp_path, "a", tokenizer="bpe:300", options=options(errors="skip"))
    assert dataset.manifest.num_skipped == 2
    path.write_bytes(b"bad\n[]\n")
    with pytest.raises(DataError, match="holds no text: all 2 records were skipped, the first because .*line 1"):
        prepare(str(path), tmp_path, "b", tokenizer="bytes", options=options(errors="skip"))


def test_text_that_the_tokenizer_does_not_know_registers_nothing(text_file, tmp_path):
    with pytest.raises(TokenizerError, match="is not among the 2"):
        prepare(str(text_file), tmp_path, "a", tokenizer=CharTokenizer({"a": 0, "b": 1}), options=options())
    assert list_datasets(tmp_path) == []


def test_a_taken_name_is_refused_before_any_work(text_file, tmp_path):
    prepare(str(text_file), tmp_path, "a", tokenizer="bytes", options=options())
    with pytest.raises(AlreadyExists, match="a already exists"):
        prepare("/nowhere", tmp_path, "a")


@pytest.mark.parametrize(
    "values", [{"val_fraction": 0.0}, {"val_fraction": 1.0}, {"shard_tokens": 5}, {"block_size": 0}]
)
def test_senseless_options_are_refused(values):
    with pytest.raises(InvalidInput, match=next(iter(values))):
        options(**values)


PREPARE = """
import sys
from pathlib import Path
from smelt.data.preparation import prepare
def report(stage, num_done, num_total):
    print("working", flush=True)
    sys.stdin.read(1)
prepare(sys.argv[1], Path(sys.argv[2]), "slow", tokenizer="bytes", progress=report)
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_preparation_registers_nothing(stop, text_file, tmp_path):
    home = tmp_path / "home"
    worker = subprocess.Popen(
        [sys.executable, "-c", PREPARE, str(text_file), str(home)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert worker.stdout.readline() == b"working\n"
    os.kill(worker.pid, stop)
    worker.communicate()
    assert worker.returncode != 0
    assert list_datasets(home) == []
    prepare(str(text_file), home, "next", tokenizer="bytes", options=options())
    assert {entry.name for entry in home.iterdir()} == {".lock", "next"}


# --- Found again, and told in other tokens ---------------------------------------------------------------


def test_a_dataset_is_made_once_while_nothing_changes(text_file, tmp_path):
    home = tmp_path / "home"
    first = dataset_for(str(text_file), home, tokenizer="bytes", options=options())
    assert first.name.startswith("story-")
    assert dataset_for(str(text_file), home, tokenizer="bytes", options=options()).name == first.name
    assert dataset_for(str(text_file), home, tokenizer="bytes", options=options(block_size=16)).name == first.name
    others = [
        dataset_for(str(text_file), home, tokenizer="char", options=options()),
        dataset_for(str(text_file), home, tokenizer="bytes", options=options(val_fraction=0.2)),
        dataset_for(str(text_file), home, tokenizer=ByteTokenizer(), options=options()),
    ]
    text_file.write_text(text_file.read_text() + "one more line")
    others.append(dataset_for(str(text_file), home, tokenizer="bytes", options=options()))
    assert len({first.name, *(other.name for other in others)}) == 5


def test_splits_that_are_too_short_are_cut_again(text_file, tmp_path):
    first = dataset_for(str(text_file), tmp_path / "home", tokenizer="bytes", options=options(val_fraction=0.01))
    longer = options(val_fraction=0.01, block_size=1000)
    second = dataset_for(str(text_file), tmp_path / "home", tokenizer="bytes", options=longer)
    assert first.split("val").num_tokens < 1001 <= second.split("val").num_tokens
    assert dataset_for(str(text_file), tmp_path / "home", tokenizer="bytes", options=longer).name == second.name


@pytest.mark.parametrize(
    ("source", "stem"),
    [
        ("/a/b/My file.v2.txt.gz", "My-file"),
        ("https://host/corpus.jsonl", "corpus"),
        ("hf:org/name:train", "org-name-train"),
        ("builtin:pydoc", "pydoc"),
        ("/a/b/", "b"),
        (".", "data"),
        ("/a/日本.txt", "data"),
    ],
)
def test_names_come_from_sources(source, stem):
    assert preparation._stem(source) == stem


def test_two_processes_that_want_the_same_dataset_agree(text_file, tmp_path):
    made = []
    threads = [
        threading.Thread(
            target=lambda: made.append(
                dataset_for(str(text_file), tmp_path / "home", tokenizer="bytes", options=options())
            )
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4
    assert len({dataset.sha256 for dataset in made}) == 1


@pytest.mark.parametrize("spec", ["bytes", "char", "bpe:300"])
def test_retokenizing_keeps_documents_and_splits(spec, tmp_path):
    texts = [f"document {i}, naïve 🙂" * (1 + i % 3) for i in range(60)]
    source = jsonl(tmp_path / "a.jsonl", texts)
    dataset = prepare(source, tmp_path / "home", "a", tokenizer="bpe:280", options=options())
    other = make_tokenizer(spec, lambda: iter(texts))
    again = retokenize(dataset, other, tmp_path / "home")
    for name in ("train", "val"):
        assert [p.text for p in again.texts(name)] == [p.text for p in dataset.texts(name)]
    assert again.tokenizer.name == spec
    assert retokenize(dataset, other, tmp_path / "home").name == again.name
    assert retokenize(again, other, tmp_path / "home") is again


def test_the_same_name_is_not_the_same_tokenizer(text_file, tmp_path):
    dataset = prepare(str(text_file), tmp_path / "home", "a", tokenizer="bpe:300", options=options())
    other = make_tokenizer("bpe:300", lambda: iter(["entirely different text about ships"] * 9))
    again = retokenize(dataset, other, tmp_path / "home")
    assert again.sha256 != dataset.sha256
    assert "".join(p.text for p in again.texts("train")) == "".join(p.text for p in dataset.texts("train"))


MEASURED = """
import sys
from pathlib import Path
from smelt.data.preparation import prepare
def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
before = anonymous_bytes()
peaks = [before]
prepare(sys.argv[1], Path(sys.argv[2]), "big", tokenizer="bytes", progress=lambda *_: peaks.append(anonymous_bytes()))
print(max(peaks) - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="not on this platform: no /proc")
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_memory_stays_flat(suffix, tmp_path):
    path = tmp_path / f"big{suffix}"
    line = {
        ".txt": "a line of text\n" * 60,
        ".jsonl": '{"text": "' + "word " * 190 + '"}\n',
        ".csv": "word " * 190 + "\n",
    }
    with path.open("w") as file:
        file.write("text\n" if suffix == ".csv" else "")
        for _ in range(300):
            file.write(line[suffix] * 1000)
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path), str(tmp_path / "home")], capture_output=True, check=True, text=True
    )
    assert path.stat().st_size > 250e6
    assert int(run.stdout) < 150e6
