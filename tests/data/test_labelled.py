import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smelt.data import sources
from smelt.data.documents import Reading
from smelt.data.labelled import Columns, LabelledTexts, order_of, read_labelled
from smelt.errors import DataError, NotEnoughData, NotFound

ROWS = [("good", "a fine film"), ("bad", "dull, long"), ("good", 'she said "yes"'), ("bad", "no\nplot")]


def write_csv(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def write_jsonl(path: Path, *records: object) -> str:
    return write_csv(path, *map(json.dumps, records))


def test_the_same_of_every_format(tmp_path: Path) -> None:
    quoted = ['"' + text.replace('"', '""') + '"' for _, text in ROWS]
    csv = write_csv(tmp_path / "a.csv", "label,text", *(f"{ROWS[i][0]},{quoted[i]}" for i in range(4)))
    tsv = write_csv(tmp_path / "a.tsv", "id\ttext\tlabel", *(f"{i}\t{quoted[i]}\t{ROWS[i][0]}" for i in range(4)))
    jsonl = write_jsonl(tmp_path / "a.jsonl", *({"text": text, "label": label, "id": 3} for label, text in ROWS))
    table = pa.table({"label": [row[0] for row in ROWS], "text": [row[1] for row in ROWS], "id": [1, 2, 3, 4]})
    pq.write_table(table, tmp_path / "a.parquet")
    for spec in (csv, tsv, jsonl, str(tmp_path / "a.parquet")):
        found = read_labelled(spec)
        assert found.names == ("bad", "good")
        assert found.texts == tuple(text for _, text in ROWS)
        assert found.labels == (1, 0, 1, 0)
        assert found.counts() == {"bad": 2, "good": 2}


def test_numbers_are_labels_in_their_order(tmp_path: Path) -> None:
    rows = [{"sentence": str(i), "label": i % 12} for i in range(24)]
    found = read_labelled(write_jsonl(tmp_path / "a.jsonl", *rows))
    assert found.names == tuple(map(str, range(12)))
    assert found.labels == tuple(i % 12 for i in range(24))


def test_columns_are_found_or_said(tmp_path: Path) -> None:
    spec = write_csv(tmp_path / "a.csv", "Class Index,Headline", "1,one", "2,two")
    assert read_labelled(spec).texts == ("one", "two")
    spec = write_csv(tmp_path / "b.csv", "kind,headline,body", "x,one,1", "y,two,2")
    with pytest.raises(DataError, match=r"no column that is plainly the label; its columns are kind, headline, body"):
        read_labelled(spec)
    assert read_labelled(spec, Columns("headline", "kind")).texts == ("one", "two")
    with pytest.raises(DataError, match=r"no column 'title'.*--text-column"):
        read_labelled(spec, Columns("title", "kind"))


def test_bad_records_are_named_or_skipped(tmp_path: Path) -> None:
    records = [
        {"text": "a", "label": "x"},
        {"text": "  ", "label": "x"},
        {"text": 7, "label": "x"},
        {"text": "b"},
        {"text": "c", "label": 1.5},
        {"text": "d", "label": ""},
        ["text"],
        {"text": "\ud800", "label": "x"},
        {"text": "e", "label": "y"},
    ]
    problems = ("is empty", "not text but 7", "neither a word", "neither a word", "label is empty", "list", "surrogate")
    for number, problem in enumerate(problems, start=2):
        spec = write_jsonl(tmp_path / "one.jsonl", *records[: number - 1][:1], records[number - 1])
        with pytest.raises(DataError, match=rf"one.jsonl, line 2.*{problem}"):
            read_labelled(spec)
    reading = Reading("skip")
    found = read_labelled(write_jsonl(tmp_path / "all.jsonl", *records), reading=reading)
    assert found.texts == ("a", "e")
    assert found.num_skipped == reading.num_skipped == 7
    spec = write_csv(tmp_path / "a.csv", "label,text", "x,one", "y,two,three")
    with pytest.raises(DataError, match=r"a\.csv, line 3 has 3 fields"):
        read_labelled(spec)


def test_labels_of_a_model_are_kept(tmp_path: Path) -> None:
    spec = write_csv(tmp_path / "a.csv", "label,text", "b,one", "a,two")
    assert read_labelled(spec, names=("c", "b", "a")).labels == (1, 2)
    with pytest.raises(DataError, match=r"line 2: the label 'b' is not among a, c"):
        read_labelled(spec, names=("a", "c"))


def test_what_cannot_be_learnt_from(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all texts .* have the label 'x'"):
        read_labelled(write_csv(tmp_path / "a.csv", "label,text", "x,one", "x,two"))
    with pytest.raises(NotEnoughData, match="holds no labelled text"):
        read_labelled(write_csv(tmp_path / "b.csv", "label,text"))
    with pytest.raises(DataError, match="1,001 different labels"):
        read_labelled(write_csv(tmp_path / "c.csv", "label,text", *(f"{i},t" for i in range(1001))))
    with pytest.raises(DataError, match="has no labels"):
        read_labelled(write_csv(tmp_path / "d.txt", "text"))
    with pytest.raises(NotFound):
        read_labelled(str(tmp_path / "gone.csv"))


def test_the_hub_says_what_numbers_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(list):  # type: ignore[type-arg]
        features = {"label": SimpleNamespace(names=["World", "Sports"])}

    rows = Rows([{"text": "a", "label": 1}, {"text": "b", "label": 0}])
    library = SimpleNamespace(load_dataset=lambda *_, **__: rows)
    monkeypatch.setattr(sources, "_datasets_library", lambda: library)
    found = read_labelled("hf:fancyzhx/ag_news")
    assert [found.names[label] for label in found.labels] == ["Sports", "World"]


def texts(num: int) -> LabelledTexts:
    return LabelledTexts("t", tuple(map(str, range(num))), tuple(i % 2 for i in range(num)), ("a", "b"))


def test_parts_are_drawn_by_the_seed() -> None:
    whole = texts(1000)
    train, held = whole.split(0.1, seed=3)
    assert (len(train), len(held)) == (900, 100)
    assert Counter(train.texts + held.texts) == Counter(whole.texts)
    assert whole.split(0.1, seed=3) == (train, held)
    assert whole.split(0.1, seed=4)[1] != held
    assert 30 < sum(held.labels) < 70  # a mixture, whatever the file's order
    assert len(whole.sample(10, seed=1)) == 10
    assert whole.sample(2000, seed=1) is whole
    assert whole.sample(10, seed=1).sha256() != whole.sample(10, seed=2).sha256()
    with pytest.raises(NotEnoughData, match="too few"):
        texts(3).split(0.1, seed=1)


def test_an_epoch_has_every_number_once_in_an_order_of_its_own() -> None:
    orders = [order_of(101, 5, epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(101)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert order_of(101, 5, 1) == orders[1]
    assert order_of(1, 5) == [0]
