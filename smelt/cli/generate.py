"""`smelt generate`: prompts in from flags, a file or a conversation, text out as it is written; computes nothing."""

import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smelt.errors import InvalidInput

if TYPE_CHECKING:
    from smelt.inference.service import TextModel

EXAMPLES = """\b
Examples:
  smelt generate out --prompt "ROMEO:" --max-tokens 200
  smelt generate gpt2 --prompt-file opening.txt --num-samples 3 --seed 1
  smelt generate out --temperature 0 --prompt "def "
  smelt generate out --interactive"""

REPL_HELP = """Write a prompt, and the model goes on from it. Ctrl-C stops an answer.
  set NAME VALUE   max-tokens, temperature, top-k, top-p, min-p, a penalty or seed
  help             this text
  quit             leave (Ctrl-D too)"""


WHOLE_NUMBERS = ("max_tokens", "top_k", "seed")


@dataclass(frozen=True, slots=True)
class Settings:
    """The flags that decide how text is drawn; `set NAME VALUE` changes one."""

    max_tokens: int = 100
    temperature: float = 0.8
    top_k: int = 200
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def sampling(self) -> dict[str, Any]:
        """As SamplingParams wants them: top_k 0 keeps every token."""
        return {**asdict(self), "top_k": self.top_k or None}

    def changed(self, name: str, value: str) -> "Settings":
        """A copy with one setting parsed from text. InvalidInput names what is known."""
        known = [each.name for each in fields(self)]
        field = name.replace("-", "_")
        if field not in known:
            raise InvalidInput(f"unknown setting {name!r}; known: {', '.join(known).replace('_', '-')}")
        try:
            number: Any = int(value) if field in WHOLE_NUMBERS else float(value)
        except ValueError:
            raise InvalidInput(f"{name} must be a number, not {value!r}") from None
        return replace(self, **{field: number})


@click.command(
    epilog=EXAMPLES,
    short_help="Write text with a model.",
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
)
@click.argument("model")
@click.option("--prompt", help="Text to go on from. Without one the model starts from its end-of-text token.")
@click.option("--prompt-file", metavar="FILE", help="Read the prompt from a UTF-8 file; - is standard input.")
@click.option("--interactive", "-i", is_flag=True, help="Ask for prompts until Ctrl-D.")
@click.option("--max-tokens", default=100, show_default=True, help="Longest answer in tokens.")
@click.option("--temperature", default=0.8, show_default=True, help="0 always takes the likeliest token.")
@click.option("--top-k", default=200, show_default=True, help="Draw from the K likeliest tokens; 0 means all.")
@click.option("--top-p", default=1.0, show_default=True, help="Draw from the likeliest tokens that hold this share.")
@click.option("--min-p", default=0.0, show_default=True, help="Leave out tokens below this share of the likeliest.")
@click.option("--repetition-penalty", default=1.0, show_default=True, help="Above 1: less of what was there before.")
@click.option("--presence-penalty", default=0.0, show_default=True, help="Taken off tokens that the answer has.")
@click.option("--frequency-penalty", default=0.0, show_default=True, help="Taken off each time that it has them.")
@click.option("--num-samples", default=1, show_default=True, help="Answers to the same prompt.")
@click.option("--seed", type=int, help="Makes the answer repeatable; sample i uses seed + i.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be repeated.")
@click.option("--device", help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--dtype", help="auto, float32, bfloat16 or float16.")
@click.option("--quantize", help="none, or int8: weights rounded to a byte each, faster where few answers run.")
def command(
    model: str,
    prompt: str | None,
    prompt_file: str | None,
    interactive: bool,
    num_samples: int,
    stop: tuple[str, ...],
    device: str | None,
    dtype: str | None,
    quantize: str | None,
    **settings: Any,
) -> None:
    """Write text with MODEL: a registered name, a model folder, a run's --out-dir, gpt2...gpt2-xl or hf:ORG/NAME.

    Text appears as it is written. Several samples stand under a heading each. An answer may be longer than the
    model's context; the prompt may not.
    """
    if sum((prompt is not None, prompt_file is not None, interactive)) > 1:
        raise InvalidInput("--prompt, --prompt-file and --interactive exclude each other: give one of them")
    text = read_prompt(prompt_file) if prompt_file is not None else prompt or ""

    from smelt.library import load

    text_model = load(model, device=device, dtype=dtype, quantize=quantize)
    try:
        if interactive:
            converse(text_model, Settings(**settings), stop)
        else:
            write_samples(text_model, text, num_samples, {**Settings(**settings).sampling(), "stop": stop})
    except BrokenPipeError:
        # The reader (`head`, a pager) has gone: nothing to say, and nothing left to flush at exit.
        sys.stdout = None


def read_prompt(name: str) -> str:
    """The text of a file, or of standard input for `-`."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise InvalidInput(f"cannot read the prompt file {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidInput(f"the prompt file {name} is not UTF-8 text (byte {error.start})") from None


def write_samples(text_model: "TextModel", prompt: str, num_samples: int, sampling: dict[str, Any]) -> None:
    """Print the prompt and what follows, one sample after the other though all are computed together."""
    for number, stream in enumerate(text_model.streams(prompt, num_samples, **sampling), start=1):
        if num_samples > 1:
            click.secho(f"--- sample {number} ---", bold=True)
        click.echo(prompt, nl=False)
        for piece in stream:
            click.echo(piece, nl=False)
        click.echo()


def converse(text_model: "TextModel", settings: Settings, stop: tuple[str, ...]) -> None:
    """Read prompts and commands from the terminal until the end."""
    click.echo(REPL_HELP)
    while (line := read_line()) is not None:
        words = line.split()
        if words in (["quit"], ["exit"]):
            return
        try:
            if words == ["help"]:
                click.echo(REPL_HELP)
            elif words[:1] == ["set"] and len(words) == 3:
                settings = settings.changed(words[1], words[2])
            elif words:
                write_samples(text_model, line, 1, {**settings.sampling(), "stop": stop})
        except InvalidInput as error:
            click.secho(f"error: {error}", fg="red")
        except KeyboardInterrupt:
            click.echo("\n(stopped)")


def read_line() -> str | None:
    """A line from the terminal; None at its end."""
    try:
        return input("> ")
    except EOFError:
        click.echo()
        return None
    except KeyboardInterrupt:
        click.echo("\n(Ctrl-D or quit leaves)")
        return ""
