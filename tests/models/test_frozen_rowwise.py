"""Row-wise work of frozen models and its gradient, against torch's autograd in fp32."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels_built import built_kernels
from smelt.models import frozen_rowwise
from smelt.models.rowwise import rotate

BOTH = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


def check(found: Callable[[Tensor], Tensor], expected: Callable[[Tensor], Tensor], x: Tensor, most: float) -> None:
    """Value and gradient."""
    own, reference = x.clone().requires_grad_(), x.float().requires_grad_()
    y, expected_y = found(own), expected(reference)
    gradient = torch.randn(y.shape).to(x.dtype)
    y.backward(gradient)
    expected_y.backward(gradient.float())
    assert own.grad is not None
    assert reference.grad is not None
    torch.testing.assert_close(y.float(), expected_y, atol=most, rtol=most)
    torch.testing.assert_close(own.grad.float(), reference.grad, atol=most, rtol=most)


@pytest.mark.parametrize(("dtype", "most"), BOTH)
@pytest.mark.parametrize("shape", [(1, 40, 576), (1, 3, 33), (1, 1, 1)])
def test_norms(shape: tuple[int, ...], dtype: torch.dtype, most: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    check(
        lambda x: frozen_rowwise.rms_norm(x, weight, 1e-5, built_kernels()),
        lambda x: F.rms_norm(x, weight.shape, weight.float(), 1e-5),
        x,
        most,
    )


@pytest.mark.parametrize(("dtype", "most"), BOTH)
@pytest.mark.parametrize("shape", [(1, 40, 3072), (1, 3, 34), (1, 1, 2)])
def test_gates(shape: tuple[int, ...], dtype: torch.dtype, most: float) -> None:
    torch.manual_seed(0)

    def expected(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    x = torch.randn(shape)
    x.view(-1)[0] = -100.0  # where exp would overflow
    check(lambda x: frozen_rowwise.swiglu(x, built_kernels()), expected, x.to(dtype), most)


@pytest.mark.parametrize(("dtype", "most"), BOTH)
@pytest.mark.parametrize("width", [64, 24, 2])
def test_rotations(width: int, dtype: torch.dtype, most: float) -> None:
    """`sin` as `rotary_tables` makes it: the second half is the first with the other sign."""
    torch.manual_seed(0)
    packed, angles = torch.randn(40, 5, width).to(dtype), torch.randn(40, 1, width // 2)
    cos, sin = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)
    check(
        lambda x: frozen_rowwise.rotate(x[:, :3], cos.to(dtype), sin.to(dtype), built_kernels()),
        lambda x: rotate(x[None, :, :3], cos.to(dtype).float(), sin.to(dtype).float())[0],
        packed,
        most,
    )
