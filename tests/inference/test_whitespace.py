"""White space at both ends, wherever the pieces are cut."""

from hypothesis import given
from hypothesis import strategies as st

from smelt.inference.whitespace import OuterSpace


@given(st.lists(st.text(" \nab", max_size=4)))
def test_pieces_are_stripped_as_the_whole_would_be(pieces: list[str]) -> None:
    trimming, keeping = OuterSpace(trims=True), OuterSpace(trims=False)
    assert "".join(map(trimming.push, pieces)) == "".join(pieces).strip()
    assert "".join(map(keeping.push, pieces)) == "".join(pieces)
