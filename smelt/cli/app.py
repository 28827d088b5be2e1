"""The `smelt` command: finds the verb, imports only its module, and turns errors into one clear line.

Knows no verb's details: each lives in a module of its own, and `VERBS` is the whole table.
"""

import sys
from importlib import import_module

import click

from smelt import __version__
from smelt.errors import SmeltError

# verb -> (module that holds a click command named `command`, one line of help).
# The help line stands here so that `smelt --help` imports none of the modules.
VERBS: dict[str, tuple[str, str]] = {
    "demo": ("smelt.cli.demo", "Train a small model on built-in text and see it write, in about a minute."),
    "data": ("smelt.cli.data", "Add, list, show and remove datasets."),
    "train": ("smelt.cli.train", "Train a model from scratch, continue a run, or fine-tune."),
    "finetune": ("smelt.cli.finetune", "Teach a model from conversations, texts or preferences."),
    "runs": ("smelt.cli.runs", "List, show, follow, cancel and resume runs."),
    "train-classifier": ("smelt.cli.train_classifier", "Train a text classifier from labelled texts."),
    "eval": ("smelt.cli.eval", "Say how well a model predicts texts or answers."),
    "generate": ("smelt.cli.generate", "Write text with a model."),
    "serve": ("smelt.cli.serve", "Serve models to OpenAI clients, and pages to watch runs on."),
    "adapters": ("smelt.cli.adapters", "Register, list and remove LoRA adapters."),
    "models": ("smelt.cli.models", "List, show, import, export and remove models."),
    "worker": ("smelt.cli.worker", "Compute answers for a server, from this machine or another."),
    "keys": ("smelt.cli.keys", "Make, list and revoke API keys."),
    "bans": ("smelt.cli.bans", "List, make and lift bans: who broke too many rules may ask for nothing."),
    "doctor": ("smelt.cli.doctor", "Say what this machine has, and what is wrong with it."),
}

EXAMPLES = """\b
Examples:
  smelt demo
  smelt data add shakespeare --from input.txt --tokenizer char
  smelt train --dataset shakespeare --preset nano --max-iters 2000 --out-dir out
  smelt generate out --prompt "ROMEO:" --max-tokens 200"""


class LazyGroup(click.Group):
    """A group that knows its verbs by name and imports a verb's module only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs in the order of the table, which is the order a newcomer needs them in."""
        return list(VERBS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, but suggest from the table: click knows only the verbs that it has imported."""
        if not args[0].startswith("-") and args[0] not in VERBS:
            raise click.exceptions.NoSuchCommand(args[0], possibilities=VERBS, ctx=ctx)
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the verb's module."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = import_module(VERBS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs from the table, importing nothing."""
        with formatter.section("Commands"):
            formatter.write_dl([(verb, line) for verb, (_, line) in VERBS.items()])


@click.group(cls=LazyGroup, epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="smelt")
def command() -> None:
    """Raw data in, served models out: datasets, tokenizers, training and generation in one program."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; user mistakes end with one line on stderr and exit code 2, Ctrl-C with 130."""
    try:
        # A verb that raises click's Exit ends up here with its code; one that simply returns, with None.
        sys.exit(command.main(arguments, prog_name="smelt", standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _complain(error.format_message() + _help_hint(error))
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except SmeltError as error:
        _complain(str(error))
        sys.exit(2)


def _complain(message: str) -> None:
    click.secho("error: ", fg="red", nl=False, err=True)
    click.echo(message, err=True)


def _help_hint(error: click.ClickException) -> str:
    """Where to read on after a wrong flag or verb."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f" (see {context.command_path} --help)" if context else ""
