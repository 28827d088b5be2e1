"""The worked examples of docs/how-to-add.md, run as they stand there."""

import math
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from families import our_logits, reference_logits
from smelt.configs import DecoderConfig
from smelt.data import sources
from smelt.data.documents import Reading
from smelt.errors import DataError
from smelt.models import architectures
from smelt.models.batch import NO_TARGET, Batch
from smelt.models.decoder import Decoder
from smelt.models.weights import read_model, write_model
from smelt.training import losses
from smelt.training.step import step

PAGE = (Path(__file__).resolve().parents[1] / "docs/how-to-add.md").read_text()


def blocks(heading: str) -> list[str]:
    """The Python blocks below a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].partition("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


def run_in(module: Any, code: str) -> dict[str, Any]:
    """The names that code defines when it stands in a module; the module stays as it is."""
    names = dict(vars(module))
    exec(code, names)
    return names


def test_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    function, table = blocks("A loss")
    names = run_in(losses, function + table)
    monkeypatch.setattr(losses, "LOSSES", names["LOSSES"])

    logprobs = torch.tensor([[math.log(0.9), math.log(0.1)]])
    total, metrics = losses.LOSSES["focal"](logprobs, {})
    assert total.item() == pytest.approx(-(0.1**2) * math.log(0.9) - 0.9**2 * math.log(0.1))
    assert metrics == {}
    assert losses.LOSSES["focal"](torch.zeros(1, 3), {})[0] == 0, "positions without a target contribute nothing"

    points = torch.tensor([[-0.1, -2.0, -0.7]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda logprobs: losses.LOSSES["focal"](logprobs, {})[0], points)

    model = Decoder(DecoderConfig(vocab_size=7, block_size=4, n_layer=1, n_head=1, n_embd=8))
    model.initialize(seed=0)
    batch = Batch(torch.tensor([[1, 2, 3]]), targets=torch.tensor([[2, NO_TARGET, 4]]))
    assert step(model, batch, losses.on_tokens("focal")).num_targets == 2
    assert model.embedding.weight.grad is not None


@pytest.fixture
def any_architecture() -> Any:
    """A config class that has the new name among its architectures, as the page asks for."""
    field = DecoderConfig.model_fields["architecture"]
    annotation = field.annotation
    field.annotation = str
    DecoderConfig.model_rebuild(force=True)
    yield
    field.annotation = annotation
    DecoderConfig.model_rebuild(force=True)


@pytest.mark.usefixtures("any_architecture")
def test_the_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    functions, row = blocks("An architecture")
    monkeypatch.setattr(architectures, "ARCHITECTURES", dict(architectures.ARCHITECTURES))
    run_in(architectures, functions + row)
    config = transformers.Phi3Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, sliding_window=16,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = transformers.Phi3ForCausalLM(config).eval()
    reference.save_pretrained(tmp_path / "theirs")
    tokens = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(3))

    model = read_model(tmp_path / "theirs")
    expected = reference_logits(reference, tokens)
    assert (our_logits(model, tokens) - expected).abs().max() < 1e-5

    write_model(model.config, model.state_dict(), tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert (reference_logits(again, tokens) - expected).abs().max() < 1e-5


def test_the_config_class_is_as_it_was() -> None:
    with pytest.raises(ValueError, match="architecture"):
        DecoderConfig(architecture="phi3", vocab_size=1, block_size=1, n_layer=1, n_head=1, n_embd=2)  # type: ignore[arg-type]


def test_the_dataset_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    function, row = blocks("A dataset source")
    monkeypatch.setattr(sources, "SOURCES", dict(sources.SOURCES))
    run_in(sources, function + row)
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("good.txt", "Grüße")
        archive.writestr("bad.txt", b"ab\xff")
        archive.writestr("picture.png", b"\xff\xfe")

    source = sources.open_source(f"zip:{tmp_path}/archive.zip", tmp_path, lambda *progress: None)
    with pytest.raises(DataError, match=r"bad.txt: byte 2 is not UTF-8; --errors skip"):
        list(source.read(Reading()))
    reading = Reading(on_error="skip")
    assert [piece.text for piece in source.read(reading)] == ["Grüße"]
    assert reading.num_skipped == 1
    assert source.num_bytes == 12

    with pytest.raises(DataError, match="is not a zip archive"):
        sources.open_source(f"zip:{tmp_path}/none.zip", tmp_path, lambda *progress: None)
