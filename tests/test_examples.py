"""Each recipe in examples/ is one that `smelt train` accepts; each script starts what torchrun and smelt understand."""

import os
import subprocess
from pathlib import Path

import pytest

from smelt.cli import train as config_command
from smelt.configs import read_config_file, validated
from smelt.run_configs import TrainConfig, learning_rates

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RECIPES = sorted(EXAMPLES.glob("*.yaml"))


def read(name: str) -> TrainConfig:
    return validated(TrainConfig, read_config_file(EXAMPLES / name))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_accepted_and_says_how_to_run_it(path: Path) -> None:
    config = read(path.name)
    assert config.data_path
    assert f"smelt train --config examples/{path.name}" in path.read_text()


@pytest.mark.parametrize(
    ("name", "millions"),
    [("shakespeare_char.yaml", 10.7), ("shakespeare_char_cpu.yaml", 0.8), ("shakespeare_char_deep.yaml", 21.4)],
)
def test_a_recipe_makes_a_model_of_the_size_it_is_known_for(name: str, millions: float) -> None:
    shape = read(name).decoder_config(vocab_size=65)
    assert shape.num_parameters / 1e6 == pytest.approx(millions, abs=0.06)


def test_fine_tuning_keeps_its_rate_and_names_its_folder_after_the_model() -> None:
    config = read("finetune_shakespeare_gpt2.yaml")
    assert (config.init_from, config.decay_lr, config.out_dir) == ("gpt2", False, None)
    assert learning_rates(config, config.learning_rate, config.max_iters)[1:3] == (config.learning_rate, 0)


def arguments_of(script: str, folder: Path, **variables: str) -> list[str]:
    """What a script gives to torchrun, where torchrun, srun and scontrol only say what they are asked."""
    commands = {
        "torchrun": 'printf "%s\\n" "$@"',
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; SLURM_NODEID=1 exec "$@"',
        "scontrol": "echo node1; echo node2",
    }
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    environment = {**os.environ, **variables, "PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["sh", EXAMPLES / script, "--config", "my run.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("script", "variables", "num_nodes"),
    [
        ("elastic.sh", {"FIRST_HOST": "node1", "RANKS_PER_HOST": "2"}, "1:3"),
        ("slurm.sh", {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}, "2"),
    ],
)
def test_a_script_starts_a_run_that_goes_on_after_a_restart(
    script: str, variables: dict[str, str], num_nodes: str, tmp_path: Path
) -> None:
    from torch.distributed.run import get_args_parser

    given = arguments_of(script, tmp_path, **variables)
    parsed = get_args_parser().parse_args(given)
    assert (parsed.nnodes, parsed.module, parsed.training_script) == (num_nodes, True, "smelt")
    assert "node1" in (parsed.rdzv_endpoint.split(":")[0], parsed.master_addr)
    verb, *flags = parsed.training_script_args
    assert (verb, flags) == ("train", ["--resume-if-begun", "--config", "my run.yaml"])
    config_command.command.make_context("train", flags)


def test_a_script_says_what_it_lacks() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "FIRST_HOST"}
    done = subprocess.run(["sh", EXAMPLES / "elastic.sh"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "FIRST_HOST" in done.stderr
