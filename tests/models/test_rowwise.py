"""The compiled row-wise work against torch's, at every shape's edge."""

import pytest
import torch

from kernels_built import built_kernels
from smelt.models import kernels, rowwise

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    built = built_kernels()
    monkeypatch.setattr(kernels, "kernels", lambda: built)


def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "kernels", lambda: None)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 576), (2, 3, 7), (1, 40, 33), (1, 1, 1)])
def test_norms(compiled: None, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = rowwise.RMSNorm(shape[-1], eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(shape).to(dtype)
    found = norm(x)
    by_torch(monkeypatch)
    torch.testing.assert_close(found, norm(x))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 3072), (2, 20, 74), (1, 2, 2)])
def test_gates(compiled: None, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (30 * torch.randn(shape)).to(dtype)
    found = rowwise.swiglu(x)
    by_torch(monkeypatch)
    torch.testing.assert_close(found, rowwise.swiglu(x))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_rotations(compiled: None, monkeypatch: pytest.MonkeyPatch, num_tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    packed = torch.randn(1, num_tokens, 5, 24).to(dtype)
    cos, sin = torch.randn(2, 1, num_tokens, 1, 24).to(dtype)
    found = rowwise.rotate(packed[:, :, :3], cos, sin)
    by_torch(monkeypatch)
    torch.testing.assert_close(found, rowwise.rotate(packed[:, :, :3], cos, sin))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 768), (2, 3, 7), (1, 1, 2)])
def test_layer_norms(
    compiled: None, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], with_bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    norm = rowwise.LayerNorm(shape[-1], eps=1e-5, bias=with_bias).to(dtype)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x = 5 + torch.randn(shape).to(dtype)
    found = norm(x)
    by_torch(monkeypatch)
    torch.testing.assert_close(found, norm(x))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_of_heads(compiled: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    of_queries, of_keys = (rowwise.RMSNorm(24, eps=1e-6).to(dtype) for _ in range(2))
    for norm in (of_queries, of_keys):
        torch.nn.init.normal_(norm.weight)
    x = torch.randn(1, 3, 7, 24).to(dtype)[:, :, :5]
    found = rowwise.norm_heads(x, of_queries, of_keys, 3)
    by_torch(monkeypatch)
    torch.testing.assert_close(found, rowwise.norm_heads(x, of_queries, of_keys, 3))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 2, 37), (3,)])
def test_gelu(compiled: None, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (10 * torch.randn(shape)).to(dtype)
    found = rowwise.gelu_tanh(x)
    by_torch(monkeypatch)
    torch.testing.assert_close(found, rowwise.gelu_tanh(x))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_and_looked_up_vectors_are_torchs(compiled: None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 1, 3, 37).to(dtype)
    assert torch.equal(rowwise.add(x, y), x + y)
    assert torch.equal(rowwise.add(x, y[0, 0]), x + y[0, 0])
    table, ids = rowwise.Embedding(50, 37).to(dtype), torch.tensor([[0, 49, 7]])
    assert torch.equal(table(ids), table.weight[ids])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writing_into_a_cache(compiled: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    packed = torch.randn(6, 5, 16).to(dtype)
    places = torch.randperm(3 * 2 * 4)[:12].view(6, 2)
    caches = [torch.zeros(2, 3, 2, 4, 16, dtype=dtype) for _ in range(2)]
    rowwise.write_cache(packed[:, 1:3], packed[:, 3:], places, *caches[0])
    by_torch(monkeypatch)
    rowwise.write_cache(packed[:, 1:3], packed[:, 3:], places, *caches[1])
    assert torch.equal(caches[0], caches[1])
    assert torch.equal(caches[0][0].view(-1, 16)[places], packed[:, 1:3])


def test_gradients_pass_through_torch(compiled: None) -> None:
    norm, x = rowwise.RMSNorm(8), torch.randn(2, 8, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is not None
