"""A row's bits are its own, whoever else is computed: by our kernels, and by torch in tiles."""

import pytest
import torch

from smelt.models.fixed_tiles import TILE_ROWS, fixed_tiles, product_in_tiles, row_by_row, tiled_product

ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
pytestmark = pytest.mark.usefixtures("computed_by")


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("is_turned", [True, False])
def test_a_row_is_the_same_in_any_company(dtype: torch.dtype, is_turned: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(300, 96).to(dtype), torch.randn(96, 80).to(dtype), torch.randn(80).to(dtype)
    weight = weight.t().contiguous().t() if is_turned else weight
    together = row_by_row(x, weight, bias)
    for rows in (slice(0, 32), slice(32, 160), slice(256, 300)):
        assert torch.equal(row_by_row(x[rows], weight, bias), together[rows])
    assert torch.equal(row_by_row(x.flip(0), weight, bias).flip(0), together)


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("num_rows", [1, TILE_ROWS, TILE_ROWS + 3])
def test_products_and_gradients_are_torch_s(dtype: torch.dtype, num_rows: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(num_rows, 40).to(dtype).requires_grad_(), (torch.randn(24, 40) / 8).to(dtype)
    reference = x.detach().float().requires_grad_()
    y, expected = tiled_product(x[None], weight, None)[0], reference @ weight.float().t()
    gradient = torch.randn(num_rows, 24).to(dtype)
    y.backward(gradient)
    expected.backward(gradient.float())
    assert x.grad is not None
    assert reference.grad is not None
    tolerance = {"atol": ERROR[dtype], "rtol": ERROR[dtype]}
    torch.testing.assert_close(y.float(), expected, **tolerance)
    torch.testing.assert_close(x.grad.float(), reference.grad, **tolerance)


def test_what_computes_products_is_of_the_block_alone() -> None:
    assert product_in_tiles() is None
    with fixed_tiles():
        assert product_in_tiles() is tiled_product
    assert product_in_tiles() is None
