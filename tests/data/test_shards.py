import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.data.shards import SplitWriter, TokenSplit, token_dtype
from smelt.errors import InvalidInput

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13]]


def write(folder, documents, shard_tokens, dtype="<u2"):
    writer = SplitWriter(folder, "train", np.dtype(dtype), shard_tokens)
    for document in documents:
        for first in range(0, len(document), 2):  # in pieces
            writer.write(np.array(document[first : first + 2], np.uint32), starts_document=first == 0)
    return writer


@pytest.mark.parametrize("shard_tokens", [1, 2, 3, 5, 100])
def test_reading_gives_what_was_written(shard_tokens, tmp_path):
    split = write(tmp_path, DOCUMENTS, shard_tokens).tokens()
    flat = [token for document in DOCUMENTS for token in document]
    assert (split.num_tokens, split.num_documents) == (13, 4)
    assert [shard.num_tokens for shard in split.shards[:-1]] == [shard_tokens] * (len(split.shards) - 1)
    assert split.read(0, 13).tolist() == flat
    assert split.read(4, 4).tolist() == []
    assert [document.tolist() for document in split.documents()] == DOCUMENTS
    assert [document.tolist() for document in split.documents(2)] == DOCUMENTS[2:]
    assert [split.document_at(i) for i in range(13)] == [0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 2, 3, 3]
    assert [split.document_start(i) for i in range(5)] == [0, 3, 4, 11, 13]
    starts = np.array([9, 0, 3, 8, 0])
    assert split.gather(starts, 4).tolist() == [flat[start : start + 4] for start in starts]
    assert split.gather(starts, 4).dtype == np.int64


@settings(max_examples=60, deadline=None, database=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), shard_tokens=st.integers(1, 10), data=st.data())
def test_truncation_keeps_the_beginning(tmp_path_factory, lengths, shard_tokens, data):
    folder = tmp_path_factory.mktemp("shards")
    documents = [list(range(100 * i, 100 * i + n)) for i, n in enumerate(lengths)]
    flat = [token for document in documents for token in document]
    cut = data.draw(st.integers(1, len(flat)))
    writer = write(folder, documents, shard_tokens)
    writer.truncate(cut)
    split = writer.tokens()
    assert split.read(0, split.num_tokens).tolist() == flat[:cut]
    assert [token for document in split.documents() for token in document] == flat[:cut]
    assert {path.stem for path in folder.iterdir()} == {shard.name for shard in split.shards}


def test_a_shard_that_begins_inside_a_document_has_a_first_part(tmp_path):
    shards = write(tmp_path, DOCUMENTS, 5).tokens().shards
    middle = TokenSplit(tmp_path, shards[1:2], np.dtype("<u2"))
    assert middle.read(0, 5).tolist() == [6, 7, 8, 9, 10]
    assert middle.num_documents == 1
    assert middle.document_at(3) == 0
    assert [document.tolist() for document in middle.documents()] == [[6, 7, 8, 9, 10]]
    last = TokenSplit(tmp_path, shards[2:], np.dtype("<u2"))
    assert [document.tolist() for document in last.documents()] == [[11], [12, 13]]
    assert [last.document_at(i) for i in range(3)] == [0, 1, 1]


def test_what_lies_outside_is_refused(tmp_path):
    split = write(tmp_path, DOCUMENTS, 5).tokens()
    with pytest.raises(InvalidInput, match="12 to 14 are not among the 13"):
        split.read(12, 14)
    with pytest.raises(InvalidInput, match="rows of 4 tokens from 3 to 10"):
        split.gather(np.array([3, 10]), 4)
    with pytest.raises(InvalidInput, match="rows of 4"):
        split.gather(np.array([-1]), 4)


def test_files_are_little_endian(tmp_path):
    write(tmp_path, [[1, 256]], 5).close()
    assert (tmp_path / "train-000000.bin").read_bytes() == b"\x01\x00\x00\x01"
    assert (tmp_path / "train-000000.idx").read_bytes() == bytes(8)
    write(tmp_path, [[1]], 5, "<u4").close()
    assert (tmp_path / "train-000000.bin").read_bytes() == b"\x01\x00\x00\x00"


def test_the_vocabulary_chooses_the_type():
    assert [token_dtype(size).itemsize for size in (257, 65536, 65537)] == [2, 2, 4]
