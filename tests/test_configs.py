"""One schema for flags, YAML and JSON: the same values, the same errors, the same precedence."""

import json
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from smelt.cli.config_flags import ConfigCommand, given_values
from smelt.configs import PRESETS, DecoderConfig, read_config_file, validated, write_config_file
from smelt.errors import ConfigError, NotFound
from smelt.models.decoder import Decoder
from smelt.run_configs import TRAIN_SECTIONS, TrainConfig, config_of, learning_rates

FLAGS = [name for section in TRAIN_SECTIONS.values() for name in section]


def parse(*arguments: str) -> TrainConfig:
    """The config that `smelt train` would make of these arguments."""
    seen: list[TrainConfig] = []

    def callback(**flags: Any) -> None:
        seen.append(validated(TrainConfig, given_values(flags)))

    command = ConfigCommand(TrainConfig, TRAIN_SECTIONS, name="train", callback=callback)
    command.main(list(arguments), standalone_mode=False)
    return seen[0]


def test_every_field_is_a_flag_in_kebab_case_and_with_underscores() -> None:
    for name in FLAGS:
        field = TrainConfig.model_fields[name]
        assert field.description, name
        kebab = name.replace("_", "-")
        words = {"compile": "true", "dtype": "float32", "preset": "nano", "sharding": "full", "betas": "0.8,0.9"}
        sample = words.get(name)
        sample = sample or ("true" if field.annotation is bool else "1" if name != "dropout" else "0.1")
        if name in ("train_val_split",):
            sample = "0.5"
        assert parse(f"--{kebab}", sample) == parse(f"--{name}", sample)


def test_only_the_recipe_has_no_flag() -> None:
    assert set(TrainConfig.model_fields) - set(FLAGS) == {"recipe"}
    assert len(FLAGS) == len(set(FLAGS))


def test_a_mapping_names_its_recipe() -> None:
    assert config_of({"max_iters": 3}) == config_of({"recipe": "pretrain", "max_iters": 3}) == TrainConfig(max_iters=3)
    with pytest.raises(ConfigError, match="unknown recipe 'cook'; known: pretrain"):
        config_of({"recipe": "cook"})


def test_the_issues_command_line_parses() -> None:
    line = (
        "--data-path input.txt --tokenizer bytes --n-layer 4 --n-head 4 --n-embd 128 --block-size 64 --batch-size 12 "
        "--max-iters 2000 --lr-decay-iters 2000 --learning-rate 1e-3 --min-lr 1e-4 --warmup-iters 100 "
        "--betas 0.9,0.99 --dropout 0 --train-val-split 0.1"
    )
    config = parse(*line.split())
    assert (config.n_layer, config.block_size, config.betas, config.min_lr) == (4, 64, (0.9, 0.99), 1e-4)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--compile"], "true"),
        (["--compile", "auto"], "auto"),
        (["--compile=false"], "false"),
        (["--compile", "True"], "true"),
        ([], "auto"),
    ],
)
def test_a_bare_flag_means_true(arguments: list[str], expected: str) -> None:
    assert parse(*arguments).compile == expected


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    for path, text in (
        (tmp_path / "run.yaml", "max-iters: 7\nlearning_rate: 0.5\nbetas: [0.8, 0.9]\n"),
        (tmp_path / "run.json", json.dumps({"max_iters": 7, "learning_rate": 0.5, "betas": [0.8, 0.9]})),
    ):
        path.write_text(text)
        config = parse("--config", str(path), "--learning-rate", "0.25")
        assert (config.max_iters, config.learning_rate, config.betas) == (7, 0.25, (0.8, 0.9))
        assert config.batch_size == TrainConfig().batch_size


def test_a_model_section_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("max_iters: 3\nmodel:\n  n_layer: 2\n  block_size: 32\n")
    config = parse("--config", str(path))
    assert (config.n_layer, config.block_size, config.max_iters) == (2, 32, 3)


def test_what_is_written_reads_back_the_same(tmp_path: Path) -> None:
    config = TrainConfig(betas=(0.8, 0.99), preset="micro", max_time=3.5)
    write_config_file(config, tmp_path / "config.yaml")
    assert validated(TrainConfig, read_config_file(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_iter": 5}, "unknown key 'max_iter'; known keys: .*max_iters"),
        ({"batch_size": 0}, r"batch_size: .*greater than or equal to 1 \(got 0\)"),
        ({"batch_size": "many"}, r"batch_size: .*integer.* \(got 'many'\)"),
        ({"learning_rate": "nan"}, "learning_rate: .*finite"),
        ({"preset": "huge"}, "unknown preset 'huge'; known: nano, micro"),
        ({"betas": "0.9"}, r"betas.*"),
        ({"betas": "0.9,1.5"}, r"betas \(0\.9, 1\.5\) must each lie in"),
        ({"data_path": "a", "dataset": "b"}, "data_path and dataset exclude each other"),
        ({"train_val_split": 1.0}, "train_val_split: .*less than 1"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_given(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validated(TrainConfig, values)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"nowhere\.yaml does not exist"):
        read_config_file(tmp_path / "nowhere.yaml")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match=r"bad\.json is not valid json"):
        read_config_file(tmp_path / "bad.json")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        read_config_file(tmp_path / "list.yaml")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_sizes_they_are_known_for(preset: str) -> None:
    millions = {
        "nano": 0.82,
        "micro": 10.7,
        "gpt2": 124.4,
        "gpt2-medium": 354.8,
        "gpt2-large": 774.0,
        "gpt2-xl": 1557.6,
    }
    millions |= {"nano-llama": 0.81, "smollm2-135m": 134.5}
    vocab_size = {"nano": 65, "nano-llama": 65, "micro": 65, "smollm2-135m": 49152}.get(preset, 50257)
    config = TrainConfig(preset=preset).decoder_config(vocab_size)
    with torch.device("meta"):
        counted = sum(parameter.numel() for parameter in Decoder(config).parameters())
    assert counted == config.num_parameters
    assert counted / 1e6 == pytest.approx(millions[preset], rel=0.02)


def test_single_shape_flags_win_over_the_preset() -> None:
    config = TrainConfig(preset="gpt2", n_layer=2, block_size=64).decoder_config(100)
    assert (config.n_layer, config.n_embd, config.block_size, config.vocab_size) == (2, 768, 64, 100)


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match="n_embd 100 is not a multiple of n_head 3"):
        TrainConfig(n_embd=100, n_head=3).decoder_config(65)
    with pytest.raises(ConfigError, match="n_head 4 is not a multiple of n_kv_head 3"):
        validated(
            DecoderConfig, {"vocab_size": 9, "block_size": 8, "n_layer": 1, "n_head": 4, "n_embd": 8, "n_kv_head": 3}
        )


def test_short_runs_warm_up_in_proportion() -> None:
    assert learning_rates(TrainConfig(), 1e-3, 100) == (1e-3, 1e-4, 5, 100)
    assert learning_rates(TrainConfig(), 1e-3, 100_000)[2:] == (100, 100_000)


def test_without_decay_the_peak_is_kept() -> None:
    assert learning_rates(TrainConfig(decay_lr=False), 1e-3, 100) == (1e-3, 1e-3, 5, 100)


def test_help_lists_every_flag_under_a_heading() -> None:
    command = ConfigCommand(TrainConfig, TRAIN_SECTIONS, name="train", callback=lambda **_: None)
    text = CliRunner().invoke(command, ["--help"]).output
    for name in FLAGS:
        assert f"--{name.replace('_', '-')}" in text
    for heading in TRAIN_SECTIONS:
        assert f"{heading}:" in text


def test_an_unknown_flag_suggests_the_right_one() -> None:
    with pytest.raises(click.NoSuchOption) as error:
        parse("--max-iter", "5")
    assert "--max-iters" in error.value.format_message()
