from hypothesis import given
from hypothesis import strategies as st

from smelt.inference.stop_strings import StopStrings

TEXT = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3).map(tuple)


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[start:end] for start, end in zip(edges, edges[1:], strict=False)]


@given(TEXT, STOPS, st.lists(st.integers(0, 30), max_size=10))
def test_the_text_ends_before_the_first_stop_however_it_is_cut_up(
    text: str, stops: tuple[str, ...], cuts: list[int]
) -> None:
    stream = StopStrings(stops)
    shown = ""
    for piece in pieces_of(text, cuts):
        shown += stream.push(piece)
        assert not any(stop in shown for stop in stops)
    shown += stream.finish()
    # Pieces arrive one by one, so that the stop which is complete first decides.
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    assert stream.found == bool(ends)
    if not ends:
        assert shown == text
    else:
        assert text.startswith(shown)
        assert len(shown) in {start for _, start in ends}


def test_only_the_beginning_of_a_stop_is_held_back() -> None:
    stream = StopStrings(("\n\nUser:",))
    assert stream.push("Hello") == "Hello"
    assert stream.push(" you\n") == " you"
    assert stream.push("\nUs") == ""
    assert stream.push("ually") == "\n\nUsually"
    assert stream.push("\n\nUser: hi") == ""
    assert (stream.found, stream.push("more"), stream.finish()) == (True, "", "")


def test_what_was_held_back_is_shown_at_the_end() -> None:
    stream = StopStrings(("END",))
    assert stream.push("the EN") == "the "
    assert stream.finish() == "EN"
    assert not stream.found
