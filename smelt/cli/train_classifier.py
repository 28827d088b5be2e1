"""`smelt train-classifier`: flags and files to a config, a display for the run, how well it went; computes nothing."""

from pathlib import Path
from typing import Any

import click

from smelt.cli.config_flags import ConfigCommand, run_values
from smelt.run_configs import CLASSIFIER_SECTIONS, ClassifierConfig

HELP = """Train a text classifier from texts with labels: from scratch, or from an encoder or a decoder.

The columns of text and label, and the names of the labels, are found in the data. The best checkpoint is kept with its
tokenizer and labels; serve it with `smelt serve`. Every flag is also a key of the --config file; flags win over the
file. A run stops cleanly on Ctrl-C and continues with --init-from resume, exactly as if it had never stopped."""

EXAMPLES = """\b
Examples:
  smelt train-classifier --data train.csv --valid valid.csv --out-dir news
  smelt train-classifier --data hf:fancyzhx/ag_news --valid hf:fancyzhx/ag_news:test --model distilbert-base-uncased
  smelt train-classifier --data reviews.jsonl --text-column review --label-column stars --model ./bert --epochs 4
  smelt train-classifier --data train.csv --num-samples 2000 --patience 2 --ranks 2
  smelt train-classifier --init-from resume --out-dir news"""


def train_classifier(**flags: Any) -> None:
    """Run the training that the flags ask for."""
    from smelt.cli.run_here import run_here, say_what_next
    from smelt.library import run_config

    values = run_values(flags)
    if values.get("init_from") != "resume" and "data" not in values:
        raise click.UsageError("no data to train on: give --data, a file with a text and a label in each row")
    summary = run_here(run_config({**values, "recipe": "classify"}))
    show_scores(Path(summary.out_dir))
    say_what_next(summary, "smelt train-classifier", "serve it: smelt serve")


def show_scores(out_dir: Path) -> None:
    """The best evaluation's table, where there is one."""
    from smelt.training.label_scores import SCORES_FILE, read_scores

    scores = read_scores(out_dir / SCORES_FILE)
    if scores is not None:
        click.echo("\n".join([f"the best checkpoint, {out_dir / 'best'}:", *scores.lines()]))


command = ConfigCommand(
    ClassifierConfig,
    CLASSIFIER_SECTIONS,
    name="train-classifier",
    callback=train_classifier,
    help=HELP,
    epilog=EXAMPLES,
    short_help="Train a text classifier from labelled texts.",
)
