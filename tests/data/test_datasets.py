import json

import numpy as np
import pytest

from smelt.data.datasets import (
    Dataset,
    dataset_folder,
    kept,
    list_datasets,
    open_dataset,
    remove_dataset,
)
from smelt.data.preparation import PrepareOptions, prepare
from smelt.errors import DataError, InUse, InvalidInput, NotFound

OPTIONS = PrepareOptions(block_size=8, shard_tokens=1024)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"document number {i} 🙂"}) for i in range(100)))
    return path


@pytest.fixture
def dataset(source, tmp_path) -> Dataset:
    return prepare(str(source), tmp_path / "home", "stories", tokenizer="bytes", options=OPTIONS)


def test_a_dataset_is_read_as_it_was_made(dataset, tmp_path):
    again = open_dataset(tmp_path / "home" / "stories")
    assert again.name == "stories"
    assert again.sha256 == dataset.sha256
    assert again.tokenizer.name == again.manifest.tokenizer == "bytes"
    train, val = again.split("train"), again.split("val")
    assert (train.num_documents, val.num_documents) == (90, 10)
    texts = [piece.text for name in ("train", "val") for piece in again.texts(name)]
    assert sorted(texts) == sorted(f"document number {i} 🙂" for i in range(100))
    assert [piece.text for piece in again.texts("val", start=9)] == texts[-1:]


def test_shards_have_names(dataset):
    names = [shard.name for shard in dataset.manifest.train]
    assert names == ["train-000000", "train-000001", "train-000002"]
    assert dataset.shard("train-000001").num_tokens == 1024
    tokens = np.concatenate([dataset.shard(name).read(0, dataset.shard(name).num_tokens) for name in names])
    assert (tokens == dataset.split("train").read(0, dataset.split("train").num_tokens)).all()
    with pytest.raises(NotFound, match="no shard 'train-000009'; it has train-000000, .*val-000000"):
        dataset.shard("train-000009")


def test_damage_is_noticed(dataset):
    dataset.verify()
    path = dataset.folder / "train-000001.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x07")
    with pytest.raises(DataError, match="train-000001.bin is damaged"):
        open_dataset(dataset.folder).verify()
    path.write_bytes(content[:-2])
    with pytest.raises(DataError, match="train-000001.bin has 2,046 bytes instead of 2,048"):
        open_dataset(dataset.folder)
    path.unlink()
    with pytest.raises(DataError, match="train-000001.bin is missing"):
        open_dataset(dataset.folder)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format_version": 2}', '{"train": [{"name": "../../x", "num_tokens": 1}]}']
)
def test_a_damaged_manifest_is_named(content, dataset):
    (dataset.folder / "dataset.json").write_text(content)
    with pytest.raises(DataError, match="dataset.json is damaged"):
        open_dataset(dataset.folder)


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "", ".hidden", "-x", "a" * 65, "a b", "ünder", "a\n", "/etc"])
def test_names_cannot_leave_the_folder(name, tmp_path, source):
    for refused in (
        lambda: dataset_folder(tmp_path, name),
        lambda: remove_dataset(tmp_path, name),
        lambda: prepare(str(source), tmp_path / "home", name),
    ):
        with pytest.raises(InvalidInput, match="is not a name for a dataset"):
            refused()
    assert not (tmp_path / "home").exists()


def test_datasets_are_listed_and_removed(dataset, tmp_path):
    home = tmp_path / "home"
    (home / "no-dataset").mkdir()
    assert list_datasets(home) == ["stories"]
    assert list_datasets(tmp_path / "nowhere") == []
    split = dataset.split("train")
    split.read(0, 1)
    remove_dataset(home, "stories")
    assert list_datasets(home) == []
    with pytest.raises(NotFound, match="no dataset 'stories'"):
        remove_dataset(home, "stories")
    with pytest.raises(NotFound, match="no dataset 'stories'"):
        open_dataset(home / "stories")
    assert len(split.read(0, 1024)) == 1024  # a run that reads it goes on


def test_nobody_removes_a_dataset_that_somebody_keeps(dataset: Dataset) -> None:
    datasets, name = dataset.folder.parent, dataset.name
    with kept(dataset.folder), kept(dataset.folder):
        with pytest.raises(InUse, match="a run trains on it"):
            remove_dataset(datasets, name)
        assert open_dataset(dataset.folder).manifest == dataset.manifest
    remove_dataset(datasets, name)
    with pytest.raises(NotFound), kept(dataset.folder):
        pass
