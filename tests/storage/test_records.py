"""Records: they come back as they were, names are taken once per owner, and another owner's do not exist."""

from dataclasses import fields, replace
from functools import partial

import pytest
from sqlalchemy import Connection, Engine

from smelt.errors import AlreadyExists, NotFound, StorageError
from smelt.storage import records
from smelt.storage.records import (
    Adapter,
    Ban,
    BatchJob,
    Checkpoint,
    ChunkedUpload,
    Dataset,
    FineTuningJob,
    Key,
    Model,
    Record,
    Run,
    SamplerRecord,
    SavedWeights,
    Session,
    Strike,
    TrainingModel,
    Upload,
    UploadPart,
)
from smelt.storage.writer import Writer

MODEL = Model(owner="ann", id="m", created=1.0, name="gpt", path="models/gpt")
RUN = Run(owner="ann", id="r", created=1.0, recipe="pretrain", config={"lr": 1e-3}, path="runs/r")
EXAMPLES: list[Record] = [
    MODEL,
    Adapter(owner="ann", name="lora", path="adapters/lora", model_id="m"),
    RUN,
    Checkpoint(owner="ann", run_id="r", step=10, path="runs/r/10"),
    Dataset(owner="ann", name="text", path="datasets/text"),
    Key(owner="ann", name="laptop", digest="abc", scopes=["read", "train"]),
    Strike(owner="ann", key_id="k", user="eve", rule="spam"),
    Ban(owner="ann", key_id="k", user="eve", reason="spam"),
    Session(owner="ann", id="s", tags=["a"], user_metadata={"k": "v"}, finished=2.0, ending={"type": "success"}),
    TrainingModel(owner="ann", id="t", session_id="s", number=0, base_model="org/gpt", served_model="gpt", rank=8),
    SavedWeights(owner="ann", model_id="t", type="weights", name="w", folder="sessions/t/w", future_id="f"),
    SamplerRecord(owner="ann", session_id="s", base_model="org/gpt", served_model="gpt", lane="t", seq=3),
    Upload(owner="ann", id="f", name="a.jsonl", purpose="batch", suffix=".jsonl", num_bytes=2**40, expires=9.5),
    BatchJob(owner="ann", endpoint="/v1/completions", input_file_id="f", key_id=None, deadline=2.0, times={"a": 1.5}),
    ChunkedUpload(owner="ann", id="u", name="a.jsonl", purpose="batch", num_bytes=2**40, expires=9.5, file_seconds=3.5),
    UploadPart(owner="ann", upload_id="u", num_bytes=2**36),
    FineTuningJob(owner="ann", model="gpt", request={"seed": 1}, error={"code": "x"}, result_files=["f"]),
]


@pytest.fixture
def connection(engine: Engine) -> Connection:
    with engine.begin() as connection:
        for record in EXAMPLES:
            records.add(connection, record)
        yield connection


def test_each_table_has_the_columns_of_its_record() -> None:
    for kind, table in records.TABLES.items():
        assert {field.name for field in fields(kind)} == set(table.c.keys())


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: type(record).__name__)
def test_a_record_comes_back_as_it_was(connection: Connection, record: Record) -> None:
    assert records.get(connection, type(record), "ann", record.id) == record
    assert records.find(connection, type(record), "ann") == [record]


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: type(record).__name__)
def test_another_owner_has_no_hand_in_it(connection: Connection, record: Record) -> None:
    kind = type(record)
    assert records.find(connection, kind, "bob") == []
    with pytest.raises(NotFound, match=record.id):
        records.get(connection, kind, "bob", record.id)
    with pytest.raises(NotFound):
        records.delete(connection, kind, "bob", record.id)
    with pytest.raises(NotFound):
        records.replace(connection, replace(record, owner="bob"))
    assert records.get(connection, kind, "ann", record.id) == record


def test_a_name_is_taken_once_per_owner(connection: Connection) -> None:
    with pytest.raises(AlreadyExists, match="'gpt' already exists in models"):
        records.add(connection, replace(MODEL, id="other"))
    records.add(connection, replace(MODEL, id="other", owner="bob"))
    assert [model.id for model in records.find(connection, Model, "bob", name="gpt")] == ["other"]


def test_records_change_and_go(connection: Connection) -> None:
    records.replace(connection, replace(RUN, state="failed", reason="out of memory"))
    assert records.get(connection, Run, "ann", "r").reason == "out of memory"
    records.delete(connection, Dataset, "ann", EXAMPLES[4].id)
    assert records.find(connection, Dataset, "ann") == []


def test_the_oldest_come_first(connection: Connection) -> None:
    records.add(connection, replace(RUN, id="older", created=0.5))
    records.add(connection, replace(RUN, id="newer", created=1.5))
    assert [run.id for run in records.find(connection, Run, "ann")] == ["older", "r", "newer"]


def test_keys_of_all_owners_are_found(connection: Connection) -> None:
    other = Key(owner="bob", name="laptop", digest="abd", scopes=[], max_concurrent=2, requests_per_minute=60)
    records.add(connection, other)
    assert records.all_keys(connection) == [EXAMPLES[5], other]


def test_what_others_point_to_stays(engine: Engine, writer: Writer) -> None:
    writer.write(lambda connection: [records.add(connection, record) for record in EXAMPLES]).result(5)
    with pytest.raises(StorageError, match="(?i)foreign key"):
        writer.write(lambda connection: records.delete(connection, Model, "ann", "m")).result(5)


def test_pages_follow_one_another_in_both_directions(connection: Connection) -> None:
    sizes = [
        Upload(owner="bob", id=f"f{n}", created=float(n // 2), name="n", purpose="p", suffix="", num_bytes=n)
        for n in range(5)
    ]
    for record in sizes:
        records.add(connection, record)
    read = partial(records.page, connection, Upload, "bob")
    assert read(9) == sizes[::-1]
    assert read(2, "f3") == [sizes[2], sizes[1]]
    assert read(9, "f3", newest_first=False) == [sizes[4]]
    assert read(9, num_bytes=3) == [sizes[3]]
    with pytest.raises(NotFound):
        read(9, "f")  # ann's
