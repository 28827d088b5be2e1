import io
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from families import random_state
from smelt.cli.generate import Settings as GenerateSettings
from smelt.cli.generate import command, converse
from smelt.configs import DecoderConfig
from smelt.data.characters import CharTokenizer
from smelt.errors import InvalidInput
from smelt.models.weights import write_model

LETTERS = CharTokenizer({letter: index for index, letter in enumerate("abcdefgh\n>")})


@pytest.fixture
def model(home: Path) -> str:
    """A registered model that writes letters and, having no end-of-text token, never ends by itself."""
    config = DecoderConfig(vocab_size=10, block_size=16, n_layer=1, n_head=2, n_embd=8)
    write_model(config, random_state(config), home / "models" / "letters")
    LETTERS.save(home / "models" / "letters")
    return "letters"


def generate(*arguments: str, text: bytes = b"") -> Result:
    return CliRunner().invoke(command, arguments, input=text)


def message(result: Result) -> str:
    assert isinstance(result.exception, InvalidInput | click.ClickException), result.output
    return str(result.exception)


def test_the_prompt_and_so_many_tokens_are_written(model: str) -> None:
    result = generate(model, "--prompt", "abc", "--max-tokens", "40", "--seed", "1")
    assert result.exit_code == 0
    assert result.output.startswith("abc")
    assert len(result.output) == 3 + 40 + 1
    assert generate(model, "--prompt", "abc", "--max_tokens", "40", "--seed", "1").output == result.output
    assert generate(model, "--prompt", "abc", "--max-tokens", "40", "--seed", "2").output != result.output


def test_temperature_0_is_greedy_whatever_the_seed(model: str) -> None:
    outputs = {generate(model, "--prompt", "a", "--temperature", "0", "--seed", seed).output for seed in "123"}
    assert len(outputs) == 1


def test_several_samples_stand_under_a_heading_each(model: str) -> None:
    result = generate(model, "--prompt", "abc", "--num-samples", "3", "--seed", "1", "--max-tokens", "9", "--stop", ">")
    heads = [line for line in result.output.splitlines() if line.startswith("---")]
    assert heads == ["--- sample 1 ---", "--- sample 2 ---", "--- sample 3 ---"]
    assert result.output.count("abc") >= 3
    assert ">" not in result.output


def test_the_prompt_may_come_from_a_file_or_a_pipe_or_be_absent(model: str, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("bad")
    options = (model, "--max-tokens", "5", "--seed", "1")
    from_file = generate(*options, "--prompt-file", str(tmp_path / "prompt.txt"))
    assert from_file.output == generate(*options, "--prompt-file", "-", text=b"bad").output
    assert from_file.output == generate(*options, "--prompt", "bad").output
    assert len(generate(*options).output) == 5 + 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "a", "--prompt-file", "x"], "exclude each other"),
        (["--prompt-file", "nowhere.txt"], "cannot read the prompt file nowhere.txt: No such file"),
        (["--prompt-file", "-"], r"not UTF-8 text \(byte 2\)"),
        (["--prompt", "xyz"], "'x'"),
        (["--prompt", "a" * 17], "17 tokens, but the model's context is 16"),
        (["--temperature", "-1"], "not -1.0"),
        (["--top-k", "-2"], "top_k must be at least 1"),
        (["--num-samples", "0"], "num_samples"),
        (["--max-tokens", "many"], "'many' is not a valid integer"),
        (["--device", "abacus"], "device 'abacus' is unknown"),
        (["--dtype", "int3"], "dtype"),
    ],
)
def test_wrong_input_is_named(model: str, arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(command, [model, *arguments], input=b"ab\xff", standalone_mode=False)
    with pytest.raises((InvalidInput, click.ClickException), match=said):
        raise result.exception  # type: ignore[misc]


class FakeModel:
    """Answers with its settings, and stops with Ctrl-C where the prompt asks for it."""

    def streams(self, prompt: str, num_samples: int, **sampling: Any) -> list[Any]:
        """One answer in two pieces."""

        def answer() -> Any:
            yield f" top_k={sampling['top_k']}"
            if prompt == "wait":
                raise KeyboardInterrupt
            yield f" max_tokens={sampling['max_tokens']}"

        return [answer()]


def dialogue(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *lines: str) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    converse(FakeModel(), GenerateSettings(), ())  # type: ignore[arg-type]
    return capsys.readouterr().out


def test_a_conversation_changes_settings_and_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = dialogue(monkeypatch, capsys, "one", "set max-tokens 5", "set top_k 0", "two", "", "quit", "three")
    assert "one top_k=200 max_tokens=100\n" in said
    assert "two top_k=None max_tokens=5\n" in said
    assert "three" not in said


def test_a_conversation_survives_mistakes_and_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = dialogue(monkeypatch, capsys, "set colour 1", "set top-k x", "wait", "help", "again")
    assert (
        "error: unknown setting 'colour'; known: max-tokens, temperature, top-k, top-p, min-p, repetition-penalty"
        in said
    )
    assert "error: top-k must be a number, not 'x'" in said
    assert "wait top_k=200\n(stopped)" in said
    assert said.count("set NAME VALUE") == 2
    assert "again top_k=200 max_tokens=100" in said


def start(model: str, *arguments: str, **streams: Any) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", "smelt", "generate", model, *arguments], **streams)


def read_until(descriptor: int, wanted: bytes, seconds: float = 60) -> bytes:
    seen = b""
    deadline = time.monotonic() + seconds
    while wanted not in seen and time.monotonic() < deadline:
        if select.select([descriptor], [], [], 0.2)[0]:
            try:
                seen += os.read(descriptor, 4096)
            except OSError:  # the program has ended
                break
    assert wanted in seen, seen
    return seen


def test_ctrl_c_in_a_terminal_stops_the_answer_and_ctrl_d_leaves(model: str) -> None:
    ours, theirs = pty.openpty()
    process = start(
        model,
        "-i",
        "--max-tokens",
        "1000000000",
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(theirs), os.O_RDWR)),  # makes it the controlling terminal
    )
    os.close(theirs)
    try:
        read_until(ours, b"> ")
        os.write(ours, b"abc\n")
        read_until(ours, b"\nabc")
        os.write(ours, b"\x03")
        read_until(ours, b"(stopped)\r\n> ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_reader_that_leaves_ends_it_quietly(model: str) -> None:
    process = start(model, "--max-tokens", "1000000000", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(20)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 0
    process.stderr.close()
