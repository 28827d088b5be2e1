"""A model in int8 says nearly what it says in fp32, and no matrix of it is left as it was."""

from concurrent.futures import Future

import pytest
import torch

from kernels_built import built_kernels
from smelt.configs import DecoderConfig
from smelt.models import kernels
from smelt.models.batch import Batch
from smelt.models.decoder import Decoder
from smelt.models.linear import Int8Linear, Linear
from smelt.models.quantization import quantize

SHAPES = {
    "llama tied": {"architecture": "llama", "position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False},
    "gpt2": {"architecture": "gpt2"},
    "gpt2 untied": {"architecture": "gpt2", "tied": False},
}


def make_model(shape: str) -> Decoder:
    config = DecoderConfig(vocab_size=97, block_size=64, n_layer=3, n_head=4, n_embd=64, **SHAPES[shape])
    model = Decoder(config)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1 if parameter.dim() > 1 else 0.5)
    return model.eval()


@pytest.fixture(params=[True, False], ids=["kernels", "torch alone"])
def maybe_kernels(request, monkeypatch) -> None:
    build = kernels._Build()
    if request.param:
        build.future = Future()
        build.future.set_result(built_kernels())
    monkeypatch.setattr(kernels, "_BUILD", build)


@pytest.mark.usefixtures("maybe_kernels")
@pytest.mark.parametrize("num_tokens", [1, 7, 60])
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_logits_in_int8_are_within_four_hundredths(shape: str, num_tokens: int) -> None:
    model = make_model(shape)
    batch = Batch(torch.randint(97, (1, num_tokens)))
    exact = model.logits(model(batch))

    rounded = quantize(model, "int8")

    logits = rounded.logits(rounded(batch))
    assert (logits - exact).norm() <= 0.04 * exact.norm()
    assert not torch.equal(logits, exact)
    assert not [module for module in rounded.modules() if isinstance(module, Linear)]
    assert isinstance(rounded.head, Int8Linear)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_without_kernels_only_the_weights_are_rounded(has_bias: bool, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "_BUILD", kernels._Build())  # another test may have started one in this process
    torch.manual_seed(6)
    bias = torch.randn(5).to(dtype) if has_bias else None
    module, x = Int8Linear(torch.randn(5, 64), bias), torch.randn(2, 64).to(dtype)
    expected = x.float() @ (module.weight * module.scales[:, None]).T + (0.0 if bias is None else bias.float())
    tolerance = 1e-5 if dtype == torch.float32 else 0.06
    torch.testing.assert_close(module(x).float(), expected, atol=tolerance, rtol=tolerance)


def test_none_leaves_a_model_as_it_is() -> None:
    model = make_model("gpt2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = quantize(model, "none").state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.usefixtures("maybe_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_the_kernels_say_what_torch_says(shape: str, dtype: torch.dtype, monkeypatch) -> None:
    model = make_model(shape).to(dtype)
    batch = Batch(torch.randint(97, (1, 9)))
    found = model.logits(model(batch))
    monkeypatch.setattr(kernels, "_BUILD", kernels._Build())
    expected = model.logits(model(batch))
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_gradients_pass_through_torch(monkeypatch) -> None:
    build = kernels._Build()
    build.future = Future()
    build.future.set_result(built_kernels())
    monkeypatch.setattr(kernels, "_BUILD", build)
    model = make_model("gpt2")
    model.logits(model(Batch(torch.randint(97, (1, 5))))).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
