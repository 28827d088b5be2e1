import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.data import documents
from smelt.data.bpe import train_bpe
from smelt.data.documents import PIECE_CHARS, Piece, Reading, cut_point, pieces, split, whole
from smelt.errors import DataError


def test_short_documents_are_one_piece_and_empty_ones_none():
    assert list(whole("some text")) == [Piece("some text", is_last=True)]
    assert list(whole("")) == []
    assert list(pieces(["", "a", "", "b"])) == [Piece("ab", is_last=True)]


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(st.text(alphabet="ab \n", max_size=30)), st.integers(1, 12))
def test_pieces_join_to_the_document_whatever_the_chunks(chunks, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_CHARS", limit)
        made = list(pieces(chunks))
    assert "".join(piece.text for piece in made) == "".join(chunks)
    assert all(0 < len(piece.text) <= limit for piece in made)
    assert [piece.is_last for piece in made] == [False] * (len(made) - 1) + [True] * bool(made)


@pytest.mark.parametrize(
    ("text", "limit", "cut"),
    [
        ("one two three", 9, 7),
        ("one two three", 3, 3),
        ("one two", 7, 3),
        ("a   b", 4, 1),
        ("word", 2, 2),
        ("\n \n ", 3, 3),
    ],
)
def test_cuts_lie_before_the_space_behind_a_word(text, limit, cut):
    assert cut_point(text, 0, limit) == cut
    assert cut_point("one more" + text, 8, 8 + limit) == 8 + cut


def test_long_spaces_and_words_are_cut_anyway():
    for text in (" " * (3 * PIECE_CHARS), "x" * (2 * PIECE_CHARS + 1)):
        parts = split(text)
        assert "".join(parts) == text
        assert max(map(len, parts)) <= PIECE_CHARS


TOKENIZER = train_bpe(320, iter(["don't stop, it's 1234 words -- (really)!\n\n  indented\r\n\tthe end. "] * 9))


@settings(max_examples=200, deadline=None, database=None)
@given(st.lists(st.sampled_from(["word", " ", "  ", "\n", "'s", "12", "!?", "\t", " a"]), max_size=40).map("".join))
def test_cutting_never_changes_tokens_where_there_is_a_place_to_cut(text):
    cut = cut_point(text, 0, max(1, len(text) - 3))
    is_clean = text[cut : cut + 1] == " " and not text[cut - 1].isspace()
    if is_clean:
        assert TOKENIZER.encode(text[:cut]) + TOKENIZER.encode(text[cut:]) == TOKENIZER.encode(text)


def test_bad_records_stop_or_count():
    with pytest.raises(DataError, match="line 3: it is bad; --errors skip"):
        Reading().reject("line 3: it is bad")
    reading = Reading("skip")
    reading.reject("first")
    reading.reject("second")
    assert (reading.num_skipped, reading.first_skipped) == (2, "first")
