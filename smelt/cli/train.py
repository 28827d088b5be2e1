"""`smelt train`: flags and files to a config, a display for the run, then what to do next; computes nothing."""

from typing import Any

import click

from smelt.cli.config_flags import ConfigCommand, given_values
from smelt.cli.data_progress import data_progress
from smelt.run_configs import TRAIN_SECTIONS, TrainConfig

HELP = """Train a language model: from scratch, from where a run stopped, or from another model.

Every flag is also a key of the --config file; flags win over the file. A run stops cleanly on Ctrl-C and
continues with --init-from resume, exactly as if it had never stopped."""

EXAMPLES = """\b
Examples:
  smelt train --data-path input.txt --tokenizer char --max-iters 2000
  smelt train --dataset shakespeare --preset micro --block-size 256 --out-dir out-micro
  smelt train --config run.yaml --learning-rate 3e-4
  smelt train --init-from resume --out-dir out-micro --max-iters 10000
  smelt train --init-from gpt2 --data-path notes/ --learning-rate 3e-5 --max-iters 200
  torchrun --nproc-per-node 2 -m smelt train --config run.yaml"""


def train(**flags: Any) -> None:
    """Run the training that the flags ask for."""
    from smelt.cli.train_display import training_display
    from smelt.library import run, run_config

    values = given_values(flags)
    if values.get("init_from") == "resume":  # the saved config takes the file's place
        values = {**given_values({**flags, "config": None}), "out_dir": values.get("out_dir"), "init_from": "resume"}
    config = run_config(values)
    with data_progress() as progress, training_display(config) as display:
        summary = run(config, [display], progress)
    if summary.stop_reason == "interrupted":
        click.echo(f"continue with: smelt train --init-from resume --out-dir {summary.out_dir}", err=True)
        raise click.exceptions.Exit(130)
    if summary.stop_reason != "eval_only":
        click.echo(f"write with it: smelt generate {summary.out_dir}", err=True)


command = ConfigCommand(
    TrainConfig,
    TRAIN_SECTIONS,
    name="train",
    callback=train,
    help=HELP,
    epilog=EXAMPLES,
    short_help="Train a model from scratch, continue a run, or fine-tune.",
)
