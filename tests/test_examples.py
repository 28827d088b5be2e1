"""Each recipe in examples/ is one that `smelt train` accepts, and of the size that its first line says."""

from pathlib import Path

import pytest

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
