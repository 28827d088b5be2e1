import json
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from chat_templates import QWEN_3, TOOL, write_tokenizer
from smelt.configs import DecoderConfig
from smelt.data.characters import ByteTokenizer, CharTokenizer
from smelt.data.chat_format import ChatFormat
from smelt.data.tokenizers import load_tokenizer
from smelt.errors import DataError, InvalidInput
from smelt.inference.answer import Answer
from smelt.inference.service import TextModel
from smelt.models.decoder import Decoder
from smelt.types import ChatMessage, Grammar, SamplingParams


def make_model(vocab_size: int, block_size: int = 48) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(vocab_size=vocab_size, block_size=block_size, n_layer=2, n_head=2, n_embd=16))
    decoder.initialize(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return decoder


@pytest.fixture(scope="module")
def text_model() -> TextModel:
    return TextModel(make_model(257), ByteTokenizer(), max_running=3)


class ScriptedDecoder(Decoder):
    """Writes fixed tokens, whatever the prompt was: number i of the script comes after i tokens of output."""

    def __init__(self, script: list[int], vocab_size: int = 257, block_size: int = 400) -> None:
        super().__init__(
            DecoderConfig(vocab_size=vocab_size, block_size=block_size, n_layer=1, n_head=1, n_embd=vocab_size)
        )
        self.script = script

    def forward(self, batch: Any, attend: Any = None) -> torch.Tensor:
        """One-hot of the next byte, found by the number of the token that was fed last."""
        num_rows, num_tokens = batch.tokens.shape
        if batch.positions[0, 0] == 0:  # a prompt
            self.start = num_tokens
        at = int(batch.positions[0, -1]) - self.start + 1
        hidden = torch.zeros(num_rows, num_tokens, self.config.vocab_size)
        hidden[:, -1, self.script[min(at, len(self.script) - 1)]] = 1.0
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The one-hot itself, sharpened."""
        return hidden * 100


def scripted(text: str) -> TextModel:
    return TextModel(ScriptedDecoder([*text.encode(), 256]), ByteTokenizer())


def with_template(folder: Path, text: str, after: str = "") -> TextModel:
    """A model with a chat template and the control tokens of many families, which says this and ends its turn."""
    write_tokenizer(folder, QWEN_3)
    tokenizer = load_tokenizer(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    script = [*tokenizer.encode(text), backend.token_to_id("<|im_end|>"), *tokenizer.encode(after)]
    decoder = ScriptedDecoder(script, tokenizer.vocab_size, block_size=4000)
    return TextModel(decoder, tokenizer, chat_format=ChatFormat.of(folder, tokenizer))


def test_streamed_pieces_join_to_the_generated_text(text_model: TextModel) -> None:
    settings: dict[str, Any] = {"max_tokens": 60, "temperature": 1.0, "seed": 5}
    pieces = list(text_model.stream("Hello", **settings))
    assert len(pieces) > 10
    assert "".join(pieces) == text_model.generate("Hello", **settings)


def test_several_samples_are_what_their_seeds_give_one_by_one(text_model: TextModel) -> None:
    settings: dict[str, Any] = {"max_tokens": 20, "temperature": 1.0}
    together = text_model.generate("ab", num_samples=5, seed=10, **settings)
    assert together == [text_model.generate("ab", seed=10 + i, **settings) for i in range(5)]
    assert len(set(together)) == 5


def test_the_end_of_text_token_ends_an_answer_and_is_not_shown() -> None:
    assert scripted("Fin.").generate("Once", max_tokens=50, temperature=0) == "Fin."


def test_characters_of_several_bytes_come_whole() -> None:
    pieces = list(scripted("naïve 🙂 日本").stream("x", max_tokens=50, temperature=0))
    assert "".join(pieces) == "naïve 🙂 日本"
    assert "🙂" in pieces


def test_a_stop_string_over_several_tokens_never_shows() -> None:
    model = scripted("one two END three")
    pieces = list(model.stream("x", max_tokens=50, temperature=0, stop=(" END",)))
    assert "".join(pieces) == "one two"
    assert not model.engine.has_work
    assert model.generate("x", max_tokens=50, temperature=0, stop="two") == "one "
    assert model.generate("x", max_tokens=7, temperature=0, stop="two END") == "one two"


def test_an_answer_may_outgrow_the_context(text_model: TextModel) -> None:
    settings: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "seed": 3}
    model = TextModel(make_model(257), ByteTokenizer())
    model.engine.vocab_size = 128  # only characters of one byte, so that each token shows
    text = model.generate("A", max_tokens=200, **settings)
    assert len(text) == 200
    assert str(text).startswith(str(model.generate("A", max_tokens=47, **settings)))


def test_sliding_on_sees_exactly_half_a_context() -> None:
    model = TextModel(make_model(257), ByteTokenizer())
    model.engine.vocab_size = 128
    text = "A" + str(model.generate("A", max_tokens=71, temperature=0))
    assert text[48:72] == model.generate(text[24:48], max_tokens=24, temperature=0)


def test_a_prompt_that_does_not_fit_names_both_numbers(text_model: TextModel) -> None:
    with pytest.raises(InvalidInput, match="60 tokens, but the model's context is 48"):
        text_model.generate("x" * 60)


def test_without_a_prompt_it_starts_from_end_of_text_or_a_new_line() -> None:
    begun: list[list[int]] = []

    def first_ids(tokenizer: Any, vocab_size: int) -> list[int]:
        model = TextModel(make_model(vocab_size), tokenizer)
        add = model.engine.add
        model.engine.add = lambda sequence: (begun.append(sequence.prompt_ids), add(sequence))[1]  # type: ignore[method-assign]
        model.generate(max_tokens=1)
        return begun[-1]

    assert first_ids(ByteTokenizer(), 257) == [256]
    # nanoGPT's models by characters have no row for an end of text.
    assert first_ids(CharTokenizer({"a": 0, "\n": 1}), 2) == [1]
    assert first_ids(CharTokenizer({"a": 0, "b": 1}), 2) == [0]


def test_closing_a_stream_frees_the_engine(text_model: TextModel) -> None:
    stream = text_model.stream("Hello", max_tokens=10_000)
    next(stream)
    assert text_model.engine.has_work
    stream.close()  # type: ignore[attr-defined]
    assert not text_model.engine.has_work


def test_streams_read_in_turns_do_not_steal_each_other_s_tokens(text_model: TextModel) -> None:
    settings: dict[str, Any] = {"max_tokens": 40, "temperature": 1.0}
    prompts = ["one", "two", "three", "four"]
    streams = [text_model.stream(prompt, seed=1, **settings) for prompt in prompts]
    texts = [""] * 4
    for _ in range(45):
        for index, stream in enumerate(streams):
            texts[index] += next(stream, "")
    assert texts == [text_model.generate(prompt, seed=1, **settings) for prompt in prompts]


def test_threads_may_share_a_model(text_model: TextModel) -> None:
    settings: dict[str, Any] = {"max_tokens": 40, "temperature": 1.0, "seed": 2}
    expected = {prompt: text_model.generate(prompt, **settings) for prompt in ("a", "b", "c", "d", "e")}
    found: dict[str, Any] = {}

    def work(prompt: str) -> None:
        found[prompt] = text_model.generate(prompt, **settings)

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_chat_renders_the_turns_and_stops_where_the_user_would_speak() -> None:
    model = scripted(" Fine, thanks.\n\nUser: And you?")
    messages: list[Any] = [{"role": "user", "content": "How are you?"}]
    assert model.chat(messages, max_tokens=60, temperature=0) == "Fine, thanks."
    assert model.chat([ChatMessage("user", "How are you?")], max_tokens=60, temperature=0, stop="th") == "Fine,"
    with pytest.raises(DataError, match="role"):
        model.chat([{"content": "hi"}])


def test_unknown_settings_and_numbers_out_of_range_are_refused(text_model: TextModel) -> None:
    with pytest.raises(InvalidInput, match="unknown sampling settings: max_token; known: max_tokens, temperature"):
        text_model.generate("x", max_token=5)
    with pytest.raises(InvalidInput, match="num_samples must be at least 1, not 0"):
        text_model.generate("x", num_samples=0)
    with pytest.raises(InvalidInput, match="temperature"):
        text_model.generate("x", temperature=-1.0)


def finished(model: TextModel, *answers: Answer) -> list[str]:
    texts = dict.fromkeys(answers, "")
    while any(answer.finish_reason is None for answer in answers):
        for answer in model.step():
            texts[answer] += answer.news()[0]
    return list(texts.values())


@pytest.mark.parametrize("num_steps", [0, 3, 60])
def test_answers_resume_after_a_pause_to_the_same_text(num_steps: int) -> None:
    def begun(seed: int) -> Answer:
        [answer] = model.answers_to("Hello", SamplingParams(max_tokens=100, temperature=1.0, seed=seed))
        model.begin(answer)
        return answer

    model = TextModel(make_model(257), ByteTokenizer())
    expected = finished(model, begun(1), begun(2))
    answers = [begun(1), begun(2)]
    for _ in range(num_steps):
        model.step()
    model.pause()
    assert not model.engine.has_work
    model.step_alone(answers[1])
    assert not model.engine.has_work
    for answer in answers:
        model.resume(answer)
    assert finished(model, *answers) == expected
    assert [answer.num_tokens for answer in answers] == [100, 100]


def test_a_paused_answer_may_be_aborted() -> None:
    model = TextModel(make_model(257), ByteTokenizer())
    answers = model.answers_to("Hello", SamplingParams(max_tokens=20, seed=1), 2)
    for answer in answers:
        model.begin(answer)
    model.pause()
    model.abort(answers[0])
    model.resume(answers[1])
    assert finished(model, answers[1]) == [model.generate("Hello", max_tokens=20, seed=2)]
    assert not model.engine.has_work


def test_a_step_that_failed_half_way_changes_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TextModel(make_model(257), ByteTokenizer())
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=4)
    expected = model.generate("x", max_tokens=20, temperature=1.0, seed=4)
    [answer] = model.answers_to("x", params)
    model.begin(answer)
    model.step()
    with monkeypatch.context() as broken:
        broken.setattr("smelt.inference.engine.sample", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.step()
        model.pause()
        with pytest.raises(ZeroDivisionError):
            model.step_alone(answer)
    assert finished(model, answer) == [expected]


def test_a_stream_that_fails_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TextModel(make_model(257), ByteTokenizer())
    settings: dict[str, Any] = {"max_tokens": 20, "temperature": 1.0, "seed": 4}
    expected = model.generate("x", **settings)
    good, bad = model.stream("x", **settings), model.stream("y", **settings)
    text = next(good)
    with monkeypatch.context() as broken:
        broken.setattr("smelt.inference.engine.sample", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(bad)
    assert text + "".join(good) == expected
    assert not model.engine.has_work


def test_ctrl_c_amid_a_step_ends_the_answer_and_leaves_the_model_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TextModel(make_model(257), ByteTokenizer(), max_running=3)
    expected = model.generate("abc", max_tokens=9, seed=1)
    add = model.engine.scheduler._run

    def interrupted(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)  # before the sequence is anywhere
        add(*arguments)

    monkeypatch.setattr(model.engine.scheduler, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(model.stream("abc", max_tokens=9, seed=1))
    monkeypatch.undo()
    assert not model.engine.has_work
    assert model.generate("abc", max_tokens=9, seed=1) == expected


def test_all_that_was_drawn_is_counted(text_model: TextModel) -> None:
    model = scripted("one two END three")
    [answer] = model.answers_to([120, 121], SamplingParams(max_tokens=50, temperature=0, stop=("END",)))
    model.begin(answer)
    assert finished(model, answer) == ["one two "]
    assert (answer.finish_reason, answer.num_prompt_tokens, answer.num_tokens) == ("stop", 2, 11)
    assert not model.engine.has_work


def test_a_conversation_streams_what_chat_answers() -> None:
    model = scripted(" \n Fine,  thanks. \n\nUser: And you?")
    turns = [ChatMessage("user", "How are you?")]
    [answer] = model.answers_to_chat(turns, SamplingParams(max_tokens=60, temperature=0))
    model.begin(answer)
    assert finished(model, answer) == ["Fine,  thanks."] == [model.chat(turns, max_tokens=60, temperature=0)]


def test_a_model_s_own_template_is_used_and_its_turn_ends_by_its_token(tmp_path: Path) -> None:
    model = with_template(tmp_path, " Fine\n\nUser: I am. ", after="never")
    turns = [ChatMessage("user", "How are you?")]
    assert model.chat(turns, max_tokens=60, temperature=0) == " Fine\n\nUser: I am. "
    [answer] = model.answers_to_chat(turns, SamplingParams())
    assert answer.sequence.prompt_ids == model.chat_format.prompt_ids(turns)


def test_tool_calls_are_read_from_what_it_writes(tmp_path: Path) -> None:
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
    model = with_template(tmp_path, f"Let me look.\n{call}")
    turns = [ChatMessage("user", "Weather?")]
    [answer] = model.answers_to_chat(turns, SamplingParams(max_tokens=200, temperature=0), tools=[TOOL])
    model.begin(answer)
    assert finished(model, answer)[0].strip() == "Let me look."
    assert [(found.name, found.arguments) for found in answer.tool_calls] == [("get_weather", '{"city": "Bonn"}')]
    assert answer.finish_reason == "stop"
    [untold] = model.answers_to_chat(turns, SamplingParams(max_tokens=200, temperature=0))
    model.begin(untold)
    assert call in finished(model, untold)[0]
    assert untold.tool_calls == ()


def test_the_end_of_text_may_be_ignored_and_other_tokens_may_end_an_answer() -> None:
    model = TextModel(ScriptedDecoder([97, 256, 98, 99, 100]), ByteTokenizer())
    assert model.generate("x", max_tokens=4, temperature=0) == "a"
    assert model.generate("x", max_tokens=4, temperature=0, ignore_eos=True) == "abc"
    assert model.generate("x", max_tokens=9, temperature=0, ignore_eos=True, stop_token_ids=[99]) == "ab"


def test_an_answer_follows_its_grammar(text_model: TextModel) -> None:
    for seed in range(3):
        grammar = Grammar("regex", "(yes|no), [0-9]{3}")
        text = text_model.generate("Is it?", max_tokens=20, temperature=1.0, seed=seed, grammar=grammar)
        assert re.fullmatch("(yes|no), [0-9]{3}", str(text))


def test_samples_of_one_grammar_go_their_own_ways(text_model: TextModel) -> None:
    texts = text_model.generate("?", 4, max_tokens=30, temperature=1.0, seed=1, grammar=Grammar("regex", "[a-z]{9}"))
    assert len(set(texts)) == 4
    assert all(re.fullmatch("[a-z]{9}", text) for text in texts)


def test_a_prompt_begins_as_the_model_expects(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}))
    tokenizer = load_tokenizer(tmp_path)
    model = TextModel(make_model(tokenizer.vocab_size), tokenizer)

    def prompt_ids(prompt: str | list[int]) -> list[int]:
        return model.answers_to(prompt, SamplingParams())[0].sequence.prompt_ids

    assert prompt_ids("ab") == [tokenizer.bos_id, *tokenizer.encode("ab")]
    assert prompt_ids("") == [tokenizer.bos_id]
    assert prompt_ids([97]) == [97]
    [turn] = model.answers_to_chat([ChatMessage("user", "Hi")], SamplingParams())
    assert turn.sequence.prompt_ids[:2] == [tokenizer.bos_id, *tokenizer.encode("U")]


def test_a_text_that_is_far_too_long_is_refused_before_it_is_encoded(text_model: TextModel) -> None:
    with pytest.raises(InvalidInput, match="1,000,000 characters, but the model's context of 48 tokens"):
        text_model.generate("x" * 1_000_000)
