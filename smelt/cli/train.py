"""`smelt train`: flags and files to a config, a display for the run, then what to do next; computes nothing."""

from typing import Any

from smelt.cli.config_flags import ConfigCommand, run_values
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
  smelt train --config run.yaml --ranks 2
  torchrun --nnodes 2 --nproc-per-node 2 ... -m smelt train --config run.yaml"""


def train(**flags: Any) -> None:
    """Run the training that the flags ask for."""
    from smelt.cli.run_here import run_here, say_what_next
    from smelt.library import run_config

    say_what_next(run_here(run_config(run_values(flags))), "smelt train", "write with it: smelt generate")


command = ConfigCommand(
    TrainConfig,
    TRAIN_SECTIONS,
    name="train",
    callback=train,
    help=HELP,
    epilog=EXAMPLES,
    short_help="Train a model from scratch, continue a run, or fine-tune.",
)
