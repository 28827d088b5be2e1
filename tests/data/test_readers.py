import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from smelt.data import readers
from smelt.data.documents import Reading
from smelt.data.readers import input_file, is_known, read_file
from smelt.errors import DataError

COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def texts_of(path, on_error="strict", column="text"):
    """Whole documents of a file, and what was met on the way."""
    reading = Reading(on_error, column)
    texts, parts = [], []
    for piece in read_file(input_file(path), reading):
        parts.append(piece.text)
        if piece.is_last:
            texts.append("".join(parts))
            parts = []
    assert not parts
    return texts, reading


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def parquet_bytes(**columns):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


GOOD = {
    "a.txt": (b"\xef\xbb\xbfone\r\ntwo \xf0\x9f\x99\x82", ["one\r\ntwo 🙂"]),
    "a.md": (b"# title", ["# title"]),
    "noname": (b"plain", ["plain"]),
    "a.jsonl": (b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "tw\\u00f6", "n": 1}', ["one", "twö"]),
    "chat.jsonl": (
        b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n',
        ["User: Hi\n\nAssistant: Hello\n\n"],
    ),
    "a.csv": (b'label,text\r\n1,"one, ""two""\r\nthree"\r\n2,four\r\n', ['one, "two"\r\nthree', "four"]),
    "a.tsv": (b"text\tlabel\none\t1\n", ["one"]),
    "a.parquet": (parquet_bytes(n=[1, 2], text=["one", "two 🙂"]), ["one", "two 🙂"]),
    "chat.parquet": (
        parquet_bytes(messages=[[{"role": "user", "content": "Hi"}]]),
        ["User: Hi\n\n"],
    ),
}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", GOOD)
def test_each_format_is_read_plain_and_compressed(name, suffix, tmp_path):
    content, expected = GOOD[name]
    path = written(tmp_path / (name + suffix), COMPRESS[suffix](content))
    texts, reading = texts_of(path)
    assert texts == expected
    assert reading.num_skipped == 0


BAD = {  # name: (content, what the message says, what remains with --errors skip, how many were skipped)
    "empty.txt": (b"", "empty.txt is empty", [], 1),
    "binary.txt": (b"\x89PNG\x00\x01", r"binary.txt: byte 4 is NUL, so this is not a text file", [], 1),
    "latin.txt": ("naïve café".encode("latin-1"), r"byte 2 \(0xef\) is not UTF-8", ["nave caf"], 2),
    "cut.txt": ("ab🙂".encode()[:-1], r"byte 2 \(0xf0\) is not UTF-8: unexpected end", ["ab"], 1),
    "wide.txt": ("hello".encode("utf-16"), "is UTF-16, not UTF-8; convert it", [], 1),
    "json.jsonl": (b'{"text": "a"}\n{"text": \n{"text": "c"}', "json.jsonl, line 2 is not JSON", ["a", "c"], 1),
    "array.json": (b'["a"]\n', "line 1: is not a record with a 'text' but a list", [], 1),
    "field.jsonl": (
        b'{"body": "a", "n": 1}\n',
        "line 1: has no 'text', only 'body', 'n'; name it with --column",
        [],
        1,
    ),
    "null.jsonl": (b'{"text": null}\n{"text": "b"}', "line 1: 'text' is not text but None", ["b"], 1),
    "utf8.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2: byte 11 of it \(0xff\) is not UTF-8", ["a"], 1),
    "half.jsonl": (b'{"text": "ab\\ud800"}\n', "line 1: character 2 of 'text' is a lone surrogate", [], 1),
    "deep.jsonl": (b"[" * 100_000 + b'\n{"text": "b"}', "line 1 is not JSON that can be read", ["b"], 1),
    "digits.jsonl": (b'{"n": ' + b"1" * 5000 + b"}\n", "line 1 is not JSON that can be read", [], 1),
    "turn.jsonl": (b'{"messages": [{"role": "user"}]}\n', "line 1: turn 1 of `messages` must have", [], 1),
    "short.csv": (b"label,text\n1\n2,two\n", "line 2 has 1 fields, but the header 2", ["two"], 1),
    "quote.csv": (b'text\n"a"b\nfine\n', "row that begins on line 2: ',' expected after '\"'", ["fine"], 1),
    "open.csv": (b'text\nfine\n"never closed\n', "row that begins on line 3: unexpected end of data", ["fine"], 1),
    "utf8.csv": (b"text\n\xff\nfine\n", r"utf8.csv, line 2: byte 1 of it \(0xff\) is not UTF-8", ["fine"], 1),
    "null.parquet": (parquet_bytes(text=["a", None]), "row 2: 'text' is not text but None", ["a"], 1),
    "torn.parquet": (GOOD["a.parquet"][0][:-9], "torn.parquet is damaged Parquet, after row 0", [], 1),
    "torn.txt.gz": (gzip.compress(b"hello " * 9)[:-9], "torn.txt.gz cannot be read after .* bytes: Truncated", None, 1),
    "fake.txt.gz": (b"not gzip", "fake.txt.gz cannot be read after 0 bytes: zlib", [], 1),
    "torn.jsonl.zst": (zstandard.compress(b'{"text": "a"}\n' * 9)[:-4], "torn.jsonl.zst cannot be read", None, 1),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_or_skipped(name, tmp_path):
    content, message, remaining, num_skipped = BAD[name]
    path = written(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        texts_of(path)
    texts, reading = texts_of(path, on_error="skip")
    assert reading.num_skipped == num_skipped
    if remaining is not None:
        assert texts == remaining


@pytest.mark.parametrize("on_error", ["strict", "skip"])
@pytest.mark.parametrize(
    ("name", "content"), [("a.csv", b"a,b\n1,2\n"), ("a.parquet", parquet_bytes(a=["x"], b=["y"]))]
)
def test_a_missing_column_is_an_error_always(name, content, on_error, tmp_path):
    with pytest.raises(DataError, match="no column 'text'; its columns are a, b; choose with --column"):
        texts_of(written(tmp_path / name, content), on_error)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_the_column_can_be_chosen(name, tmp_path):
    content = {
        "a.jsonl": json.dumps({"body": "b", "text": "t"}).encode(),
        "a.csv": b"body,text\nb,t\n",
        "a.parquet": parquet_bytes(body=["b"], text=["t"]),
    }[name]
    assert texts_of(written(tmp_path / name, content), column="body")[0] == ["b"]


@pytest.mark.parametrize(("name", "start"), [("a.jsonl", b'{"text": "'), ("a.csv", b'text\n"')])
def test_an_endless_record_is_refused_in_bounded_memory(name, start, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 3_000_000)
    path = written(tmp_path / name, start + b"x" * 7_000_000 + b'\n{"text": "after"}\n')
    with pytest.raises(DataError, match="line [12] is longer than 2 MiB"):
        texts_of(path)
    texts, reading = texts_of(path, on_error="skip")
    assert reading.num_skipped == 1
    assert len(texts) == 1
    assert "after" in texts[0]


def test_an_endless_line_of_text_is_one_document(tmp_path):
    path = written(tmp_path / "a.txt", b"x" * 3_000_000)
    texts, reading = texts_of(path)
    assert [len(text) for text in texts] == [3_000_000]
    assert reading.num_bytes == 3_000_000


def test_characters_across_chunks_stay_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 3)
    text = "aé🙂 naïve\n" * 5
    assert texts_of(written(tmp_path / "a.txt", text))[0] == [text]
    assert texts_of(written(tmp_path / "a.jsonl", json.dumps({"text": text}, ensure_ascii=False)))[0] == [text]


def test_bytes_are_counted_as_stored(tmp_path):
    content = gzip.compress(b"hello world " * 1000)
    _, reading = texts_of(written(tmp_path / "a.txt.gz", content))
    assert reading.num_bytes == len(content)


@pytest.mark.parametrize(
    ("name", "known"), [("a.TXT", True), ("a.b.jsonl.GZ", True), ("a.gz", False), ("a.png", False), ("txt", False)]
)
def test_suffixes_tell_what_is_known(name, known, tmp_path):
    assert is_known(tmp_path / name) is known
