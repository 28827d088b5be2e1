"""`smelt demo`: built-in text to a tokenizer, a small model and its samples, in about a minute; knows no internals."""

import shutil
from typing import Any

import click

from smelt.cli.data_progress import data_progress
from smelt.settings import load_settings

PROMPTS = ("The", "Return a", "If the")

VOCAB_SIZE = 8192
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
  smelt demo --seconds 20""",
)
@click.option("--seconds", default=60.0, show_default=True, help="How long to train.")
def command(seconds: float) -> None:
    """Train a small model on Python's own documentation, then let it write.

    The text is the documentation that this Python carries, so nothing is downloaded. The run is an ordinary one: it
    stays in the home folder as `runs/demo`, where every command finds it.
    """
    from smelt.cli.train_display import training_display
    from smelt.library import run, run_config
    from smelt.training.pace import seconds_per_step

    out_dir = load_settings().runs / "demo"
    shutil.rmtree(out_dir, ignore_errors=True)
    click.echo("Python's own documentation -> a tokenizer -> a small GPT -> text\n", err=True)
    config = run_config({**RECIPE, "out_dir": str(out_dir)})
    num_steps = max(20, round(seconds / seconds_per_step(config, VOCAB_SIZE)))
    config = config.replace(max_iters=num_steps, eval_interval=max(10, num_steps // 5))
    with data_progress() as progress, training_display(config) as display:
        summary = run(config, [display], progress)
    if summary.stop_reason == "interrupted":
        raise click.exceptions.Exit(130)
    write_samples(str(out_dir))
    click.echo(f"\nmore: smelt generate {out_dir} --interactive", err=True)


def write_samples(model_name: str) -> None:
    """Stream an answer to each prompt."""
    from smelt import library

    model = library.load(model_name)
    for number, prompt in enumerate(PROMPTS):
        click.secho(f"\n--- {prompt!r}", fg="cyan", err=True)
        click.echo(prompt, nl=False)
        for piece in model.stream(prompt, max_tokens=120, temperature=0.6, top_k=40, seed=number):
            click.echo(piece, nl=False)
        click.echo()
