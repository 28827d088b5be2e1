"""`smelt demo`: built-in text to a tokenizer, a small model, and a server that answers with it; knows no internals."""

import shutil
from pathlib import Path
from typing import Any

import click

from smelt.cli.data_progress import data_progress
from smelt.run_configs import TrainConfig
from smelt.settings import load_settings

PROMPTS = ("The", "Return a", "If the")

VOCAB_SIZE = 4096
# Found by search for the lowest validation loss after a minute on two cores: see docs/experiments.md.
RECIPE: dict[str, Any] = {
    "data_path": "builtin:pydoc",
    "tokenizer": f"bpe:{VOCAB_SIZE}",
    "train_val_split": 0.02,
    "preset": "nano-llama",
    "n_layer": 2,
    "block_size": 128,
    "batch_size": 4,
    "learning_rate": 3e-3,
    "betas": (0.9, 0.98),
    "eval_iters": 40,
}


@click.command(
    short_help="Train a small model on built-in text and see it write, in about a minute.",
    epilog="""\b
Examples:
  smelt demo
  smelt demo --seconds 20
  smelt demo --exit""",
)
@click.option("--seconds", default=60.0, show_default=True, help="How long to train.")
@click.option("--exit", "leave", is_flag=True, help="End after the samples, instead of serving until Ctrl-C.")
def command(seconds: float, leave: bool) -> None:
    """Train a small model on Python's own documentation, then serve it and let it write.

    The text is the documentation that this Python carries, so nothing is downloaded. The run is an ordinary one: it
    stays in the home folder as `runs/demo`, where every command finds it. The server, too, is the one of
    `smelt serve`, and OpenAI's own client asks it for the samples.
    """
    from smelt.cluster.claims import held_home

    settings = load_settings()
    out_dir = settings.runs / "demo"
    with held_home(settings.home):  # another server would lose the model that it serves
        train(out_dir, seconds)
    serve(out_dir, leave)


def train(out_dir: Path, seconds: float) -> None:
    """Train for about so long, and show it."""
    from smelt.cli.train_display import training_display
    from smelt.library import run, run_config
    from smelt.training.pace import seconds_per_step

    shutil.rmtree(out_dir, ignore_errors=True)
    click.echo("Python's own documentation -> a tokenizer -> a small GPT -> text\n", err=True)
    config = run_config({**RECIPE, "out_dir": str(out_dir)})
    assert isinstance(config, TrainConfig), "the demo pretrains"
    num_steps = max(20, round(seconds / seconds_per_step(config, VOCAB_SIZE)))
    config = config.replace(max_iters=num_steps, eval_interval=max(10, num_steps // 5))
    with data_progress() as progress, training_display(config) as display:
        summary = run(config, [display], progress)
    if summary.stop_reason == "interrupted":
        raise click.exceptions.Exit(130)


def serve(out_dir: Path, leave: bool) -> None:
    """Have the model write a few samples, and stay for more."""
    from smelt.cli.demo_server import demo_server

    with demo_server(out_dir, load_settings()) as server:
        for number, prompt in enumerate(PROMPTS):
            click.secho(f"\n--- {prompt!r}", fg="cyan", err=True)
            click.echo(prompt, nl=False)
            server.write(out_dir.name, prompt, seed=number)
        click.echo(f"\npage:   {server.url}/dashboard\nOpenAI: {server.url}/v1  (model {out_dir.name})")
        if not leave:
            click.echo("Ctrl-C stops the server", err=True)
            server.stay()
