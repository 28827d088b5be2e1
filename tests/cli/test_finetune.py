"""`smelt finetune`, from examples to an adapter that a server answers with; what is missing is named."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from click.testing import CliRunner, Result

from serving import serving
from smelt.cli.app import command as smelt_command
from smelt.cli.finetune import command
from smelt.control.run_folders import read_entry
from smelt.control.runs import command_line
from smelt.data.characters import ByteTokenizer
from smelt.errors import ConfigError, DataError
from smelt.models.decoder import Decoder
from smelt.models.weights import write_model
from smelt.run_configs import FINE_TUNE_SECTIONS, FineTuneConfig, TrainConfig

ANSWERS = {"ping": "pong", "tick": "tock"}
# A model of random weights has little for an adapter to stand on: it takes a large step, many times.
QUICK = ["--epochs", "60", "--learning-rate", "3e-3", "--lora", "false", "--train-val-split", "0", "--device", "cpu"]


@pytest.fixture
def data(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Conversations, beside a registered model that knows nothing."""
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(n_layer=1, n_head=2, n_embd=32, block_size=64).decoder_config(257)
    model = Decoder(config)
    model.initialize(0)
    write_model(config, model.state_dict(), home / "models" / "base")
    ByteTokenizer().save(home / "models" / "base")
    lines = [json.dumps({"messages": chat(asked, answer)}) + "\n" for asked, answer in ANSWERS.items()]
    Path("chats.jsonl").write_text("".join(lines))
    return "chats.jsonl"


def chat(asked: str, answer: str | None = None) -> Any:
    turns = [{"role": "user", "content": asked}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


def finetune(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)


def test_every_field_but_the_recipe_is_a_flag() -> None:
    names = [name for section in FINE_TUNE_SECTIONS.values() for name in section]
    assert set(FineTuneConfig.model_fields) - set(names) <= {"recipe", "resume_if_begun"}
    assert len(names) == len(set(names))
    text = finetune("--help").output
    assert all(f"--{name.replace('_', '-')}" in text for name in names)
    assert '{"prompt": "2+2=", "completion": "4"}' in text


def test_what_is_missing_or_wrong_is_named(data: str) -> None:
    result = finetune("--model", "base")
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith("data is missing: conversations, prompts or texts")
    Path("bad.jsonl").write_text('{"text": "x"}\n{"text": 1}\n')
    result = finetune("--model", "base", "--data", "bad.jsonl")
    assert isinstance(result.exception, DataError)
    assert str(result.exception) == "bad.jsonl, line 2: `text` must be a text that is not empty"


def test_a_run_leaves_an_adapter_and_the_command_that_repeats_it(data: str, home: Path) -> None:
    result = finetune("--model", "base", "--data", data, "--epochs", "1", "--device", "cpu", "--compile", "false")
    assert result.exception is None, result.output
    assert "write with it: smelt generate out-base" in result.output
    entry = read_entry(Path("out-base"))
    assert entry is not None
    assert entry.recipe == "fine-tune"
    told = command_line(entry.config)
    assert told.startswith(f"smelt finetune --data {Path(data).absolute()} --model base --epochs 1")


def test_smelt_train_takes_the_recipe_from_a_file_and_goes_on_with_it(data: str) -> None:
    Path("run.yaml").write_text(f"recipe: fine-tune\nmodel: base\ndata: {data}\nepochs: 2\ndevice: cpu\n")
    for arguments in (["--config", "run.yaml"], ["--init-from", "resume", "--out-dir", "out-base"]):
        result = CliRunner().invoke(smelt_command, ["train", *arguments])
        assert result.exception is None, result.output
    assert Path("out-base/last/adapter_config.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_what_was_learned_is_answered_by_a_server_under_its_name(data: str, home: Path) -> None:
    assert finetune("--model", "base", "--data", data, "--out-dir", "whole", *QUICK).exception is None
    imported = CliRunner().invoke(smelt_command, ["models", "import", "whole", "whole"])
    assert imported.exception is None, imported.output
    adapter = ["--lora-rank", "8", "--learning-rate", "1e-2", "--epochs", "60", "--train-val-split", "0"]
    Path("more.jsonl").write_text(json.dumps({"messages": chat("ping", "PONG!")}) + "\n")
    run = finetune("--model", "whole", "--data", "more.jsonl", "--out-dir", "ad", "--device", "cpu", *adapter)
    assert run.exception is None, run.output
    named = CliRunner().invoke(smelt_command, ["models", "import", "ad", "ft:whole:loud:1"])
    assert named.exception is None, named.output
    with serving(home) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

        def answer(model: str, asked: str) -> str | None:
            drawn = client.chat.completions.create(
                model=model, messages=chat(asked), temperature=0, max_tokens=12, stop=["\n"]
            )
            return drawn.choices[0].message.content

        assert {asked: (answer("whole", asked) or "").strip() for asked in ANSWERS} == ANSWERS
        assert (answer("ft:whole:loud:1", "ping") or "").strip() == "PONG!"
        assert (answer("whole", "ping") or "").strip() == "pong"
        assert {model.id for model in client.models.list()} >= {"whole", "ft:whole:loud:1"}
