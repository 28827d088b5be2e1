"""The compiled products against fp64, at every shape's edge; and what happens where they cannot be compiled."""

import logging
from pathlib import Path

import pytest
import torch

from kernels_built import built_kernels
from smelt.models import kernels
from smelt.models.linear import Int8Linear

ERROR = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # of an output of about 1; bf16 rounds it at 2^-8
SHAPES = [(576, 960), (100, 37), (7, 3), (1, 1), (65, 130), (1536, 16), (33, 5)]


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 11, 32])
@pytest.mark.parametrize(("width", "num_out"), SHAPES)
def test_products_are_those_of_fp64(width: int, num_out: int, num_rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, bias = torch.randn(num_rows, width).to(dtype), torch.randn(num_out).to(dtype)
    weight = (torch.randn(num_out, width) / width**0.5).to(dtype)
    expected = x.double() @ weight.double().T

    plain, with_bias = built_kernels().linear(x, weight, None), built_kernels().linear(x, weight, bias)

    tolerance = {"atol": ERROR[dtype], "rtol": ERROR[dtype]}
    torch.testing.assert_close(plain.double(), expected, **tolerance)
    torch.testing.assert_close(with_bias.double(), expected + bias.double(), **tolerance)


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("num_rows", [1, 6, 7, 40, 200])
@pytest.mark.parametrize(("width", "num_out"), [*SHAPES, (1100, 64)])
def test_products_of_many_rows_are_those_of_fp64(width: int, num_out: int, num_rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, bias = torch.randn(num_rows, width).to(dtype), torch.randn(num_out).to(dtype)
    weight = (torch.randn(num_out, width) / width**0.5).to(dtype)
    expected = x.double() @ weight.double().T
    tolerance = {"atol": 5 * ERROR[dtype], "rtol": ERROR[dtype]}  # each lane adds up one number after the other
    for by_columns_or_rows in (weight.t(), weight.t().contiguous()):
        plain, with_bias = (torch.empty(num_rows, num_out, dtype=dtype) for _ in range(2))
        built_kernels().matmul(x, by_columns_or_rows, None, plain)
        built_kernels().matmul(x, by_columns_or_rows, bias, with_bias)
        torch.testing.assert_close(plain.double(), expected, **tolerance)
        torch.testing.assert_close(with_bias.double(), expected + bias.double(), **tolerance)


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("num_rows", [1, 3, 6, 32])
@pytest.mark.parametrize(("width", "num_out"), SHAPES)
def test_int8_products_are_within_two_hundredths(width: int, num_out: int, num_rows: int, dtype: torch.dtype) -> None:
    """Of the product with the rounded weights: what remains is that x is rounded too."""
    torch.manual_seed(2)
    x, weight, bias = torch.randn(num_rows, width).to(dtype), torch.randn(num_out, width), torch.randn(num_out)
    module = Int8Linear(weight, bias.to(dtype))
    expected = x.double() @ (module.weight.double() * module.scales.double()[:, None]).T + module.bias.double()

    found = built_kernels().linear_int8(x, module.weight, module.scales, module.bias)

    assert found.dtype == dtype
    assert (found.double() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_a_row_does_not_depend_on_its_company_or_on_the_number_of_threads(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x, weight = torch.randn(11, 200).to(dtype), torch.randn(70, 200).to(dtype)
    rounded = Int8Linear(weight)

    def products(x: torch.Tensor) -> torch.Tensor:
        exact = built_kernels().linear(x, weight, None)
        built_kernels().matmul(x, weight.t(), None, many := torch.empty_like(exact))
        return torch.stack((exact, many, built_kernels().linear_int8(x, rounded.weight, rounded.scales, None)))

    num_threads, together = torch.get_num_threads(), products(x)
    torch.set_num_threads(1)
    try:
        assert torch.equal(products(x), together)
    finally:
        torch.set_num_threads(num_threads)
    for row in range(11):
        assert torch.equal(products(x[row : row + 1]), together[:, row : row + 1])


def test_zeros_stay_zeros_in_int8() -> None:
    module = Int8Linear(torch.zeros(3, 64))
    x = torch.zeros(1, 64)
    assert torch.equal(built_kernels().linear_int8(x, module.weight, module.scales, None), torch.zeros(1, 3))


def test_there_is_one_openmp_library() -> None:
    """A second one would bring a second pool of threads."""
    built_kernels()
    mapped = Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in mapped if "gomp" in line}) == 1


@pytest.fixture
def own_build(monkeypatch):
    build = kernels._Build()
    monkeypatch.setattr(kernels, "_BUILD", build)
    return build


def test_a_library_is_compiled_once_per_folder(own_build, tmp_path, monkeypatch) -> None:
    built_kernels()
    kernels.start_build(tmp_path)
    assert isinstance(kernels.kernels(), kernels.Kernels)
    [library] = tmp_path.glob("kernels-*")

    monkeypatch.setattr(kernels, "_compile", lambda *_: pytest.fail("compiled again"))
    own_build.future = own_build.built = None
    kernels.start_build(tmp_path)

    assert isinstance(kernels.kernels(), kernels.Kernels)
    assert library.is_file()


def test_without_a_compiler_there_are_no_kernels(own_build, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    kernels.start_build(tmp_path)
    assert kernels.kernels() is None


def test_a_failed_build_is_told_once_and_leaves_nothing(own_build, tmp_path, monkeypatch, caplog) -> None:
    built_kernels()
    broken = tmp_path / "broken.cpp"
    broken.write_text("this is not C++")
    monkeypatch.setattr(kernels, "SOURCE", broken)
    with caplog.at_level(logging.WARNING):
        kernels.start_build(tmp_path / "cache")
        assert kernels.kernels() is None
        assert kernels.kernels() is None
    assert len(caplog.records) == 1
    assert "error: expected" in caplog.text
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]


def test_nothing_is_built_unasked(own_build) -> None:
    assert kernels.kernels() is None
    assert own_build.future is None
