"""What of an answer is shown, and when: text, tokens and log-probabilities."""

from collections.abc import Callable

import pytest

from smelt.data.characters import ByteTokenizer
from smelt.data.tokenizers import StreamDecoder
from smelt.data.tool_calls import DIALECTS, ToolCallStream
from smelt.inference.answer import Answer, News
from smelt.inference.sequence import Sequence
from smelt.inference.stop_strings import StopStrings
from smelt.inference.whitespace import OuterSpace
from smelt.types import SamplingParams, TokenLogprob


class Words(ByteTokenizer):
    """Tokens are whole words of a list."""

    def __init__(self, *words: bytes) -> None:
        self.words = words

    def decode_bytes(self, ids: object) -> bytes:
        return b"".join(self.words[token] for token in ids)  # type: ignore[attr-defined]


def answer_of(
    *words: bytes, stop: tuple[str, ...] = (), trims: bool = False, dialect: str | None = None, echo: str | None = None
) -> Answer:
    tokenizer = Words(*words)
    params = SamplingParams(stop=stop, num_logprobs=1, max_tokens=100)
    calls = ToolCallStream(DIALECTS[dialect] if dialect else None)
    sequence = Sequence([0], params)
    bytes_of: Callable[[int], bytes] = lambda token: tokenizer.decode_bytes([token])  # noqa: E731
    return Answer(
        sequence, params, StreamDecoder(tokenizer), StopStrings(stop), calls, OuterSpace(trims), bytes_of, echo, 1
    )


def take(answer: Answer, token: int) -> News:
    answer.sequence.append(token, -float(token), ((token, -1.0), (0, -2.0)), 1000)
    answer.take(token)
    return answer.news()


def tokens(news: News) -> list[int]:
    return [scored.token_id for scored in news.logprobs]


def test_a_token_comes_with_its_bytes_and_alternatives() -> None:
    answer = answer_of(b"a", b"bc")
    top = (TokenLogprob(1, b"bc", -1.0), TokenLogprob(0, b"a", -2.0))
    assert take(answer, 1) == ("bc", [1], (TokenLogprob(1, b"bc", -1.0, top),))


def test_tokens_that_a_stop_string_holds_back_come_with_their_text_and_what_it_cuts_off_never() -> None:
    answer = answer_of(b"one", b" E", b"N", b"x", b"D.", stop=(" END",))
    assert tokens(take(answer, 0)) == [0]
    assert take(answer, 1) == ("", [1], ())
    assert tokens(take(answer, 2)) == []
    assert (news := take(answer, 3)).text == " ENx"
    assert tokens(news) == [1, 2, 3]
    for token in (1, 2):
        assert take(answer, token).text == ""
    news = take(answer, 4)
    assert (news.text, tokens(news)) == ("", [])
    assert answer.stops.found
    answer.close("stop")
    assert answer.news() == ("", [], ())


def test_a_token_that_is_partly_cut_off_is_not_given_for_it_holds_the_stop_string() -> None:
    answer = answer_of(b"one", b" two\nEND", stop=("\n",))
    assert tokens(take(answer, 0)) == [0]
    news = take(answer, 1)
    assert (news.text, tokens(news)) == (" two", [])


def test_the_tokens_of_one_character_come_with_the_last_of_them() -> None:
    smile = "🙂".encode()
    answer = answer_of(b"a", smile[:1], smile[1:3], smile[3:] + b"!", b"\xc3")
    assert tokens(take(answer, 0)) == [0]
    assert [tokens(take(answer, token)) for token in (1, 2)] == [[], []]
    news = take(answer, 3)
    assert (news.text, tokens(news)) == ("🙂!", [1, 2, 3])
    assert tokens(take(answer, 4)) == []  # a character broke off
    answer.close("length")
    news = answer.news()
    assert (news.text, tokens(news)) == ("\ufffd", [4])


def test_white_space_that_may_be_the_last_is_held_with_its_tokens() -> None:
    answer = answer_of(b" ", b"Hi", b"\n", b"you", trims=True)
    assert take(answer, 0).text == ""
    news = take(answer, 1)
    assert (news.text, tokens(news)) == ("Hi", [1])
    assert tokens(take(answer, 2)) == []
    assert tokens(take(answer, 3)) == [2, 3]
    take(answer, 2)
    answer.close("stop")
    assert answer.news() == ("", [], ())


def test_an_echo_comes_first_with_the_prompt_s_log_probabilities() -> None:
    answer = answer_of(b"ab", b"c", echo="ab")
    answer.sequence.prompt_logprobs, answer.sequence.prompt_top_logprobs = [None], [()]
    news = take(answer, 1)
    assert (news.text, list(news.token_ids)) == ("abc", [0, 1])
    assert news.logprobs[0] == TokenLogprob(0, b"ab", None)
    assert tokens(take(answer, 1)) == [1]


def test_tool_calls_are_no_text() -> None:
    call = b'<tool_call>{"name": "look", "arguments": {"at": "it"}}</tool_call>'
    answer = answer_of(b"Let me see.", call[:5], call[5:20], call[20:], dialect="hermes")
    text = "".join(take(answer, token).text for token in range(4))
    assert (text, answer.tool_calls) == ("Let me see.", ())
    answer.close("stop")
    assert answer.news().text == ""
    [found] = answer.tool_calls
    assert (found.name, found.arguments) == ("look", '{"at": "it"}')


@pytest.mark.parametrize("last", [b"<tool", b'<tool_call>{"name": '])
def test_what_only_looked_like_a_call_is_text(last: bytes) -> None:
    answer = answer_of(b"a ", last, dialect="hermes")
    text = "".join(take(answer, token).text for token in range(2))
    answer.close("length")
    assert (text + answer.news().text).removesuffix("</tool_call>") == f"a {last.decode()}"
    assert answer.tool_calls == ()


def test_likelihood_is_per_token() -> None:
    answer = answer_of(b"a", b"b", b"c")
    for token in (1, 2, 2, 1):
        take(answer, token)
    assert answer.mean_logprob == -1.5
