import pytest
import torch

from kernels_built import built_kernels
from smelt.models.training_kernels import Datums, StackedFactors

BOTH = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


@pytest.mark.parametrize(("dtype", "most"), BOTH)
@pytest.mark.parametrize("width", [5, 97, 256])
def test_log_probabilities_of_targets(dtype: torch.dtype, most: float, width: int) -> None:
    torch.manual_seed(0)
    fast = built_kernels().training
    logits = (3 * torch.randn(7, width)).to(dtype)
    targets = torch.randint(width, (7, 3))
    targets[2] = targets[2, 0]  # the same one three times
    gradient = torch.randn(7, 3)
    reference = logits.float().requires_grad_()
    expected = reference.log_softmax(dim=1).gather(1, targets)
    expected.backward(gradient)
    sums, to = fast.log_sums(logits), torch.empty_like(logits)
    assert (logits.float().gather(1, targets) - sums[:, None] - expected).abs().max() < 1e-5
    fast.targets_back(logits, sums, targets, gradient, to)
    assert reference.grad is not None
    assert (to.float() - reference.grad).abs().max() < most


@pytest.mark.parametrize(("dtype", "most"), BOTH)
@pytest.mark.parametrize(("rank", "part_rows"), [(8, [32, 16, 16]), (1, [7]), (3, [20, 9]), (16, [130, 130])], ids=str)
def test_factors_and_their_gradients(dtype: torch.dtype, most: float, rank: int, part_rows: list[int]) -> None:
    torch.manual_seed(0)
    fast, width, num_out, num_parts = built_kernels().training, 70, sum(part_rows), len(part_rows)
    x, y, g = (torch.randn(100, size).to(dtype) for size in (width, num_out, num_out))
    size_a, size_b = num_parts * rank * width, num_out * rank
    stacked = torch.cat((torch.randn(2, size_a) / 8, torch.randn(2, size_b) / 4), 1).to(dtype)
    a, b = (
        each.unflatten(1, (-1, last))
        for each, last in zip(stacked.split((size_a, size_b), 1), (width, rank), strict=True)
    )
    factors = StackedFactors(a, b, torch.tensor([2.0, 0.5]), torch.tensor(part_rows))
    datums = Datums(torch.tensor([0, 64, 33]), torch.tensor([33, 36, 1]), torch.tensor([0, 0, 1]))
    gradients = [[(torch.ones(rank, width), torch.ones(num_rows, rank)) for num_rows in part_rows] for _ in range(2)]
    addresses = [[[x.data_ptr() for x in pair] for pair in pairs] for pairs in gradients]
    out, g_x = y.clone(), torch.zeros_like(x)
    hidden = fast.add_adapters(x, out, factors, datums)
    fast.add_adapters_back(x, g, hidden, factors, datums, torch.tensor(addresses), g_x)

    own = [each.float().requires_grad_() for each in (x, a, b)]
    expected = y.float()
    for start, length, slot in zip(
        *(each.tolist() for each in (datums.starts, datums.lengths, datums.slots)), strict=True
    ):
        between = factors.scales[slot] * own[0][start : start + length] @ own[1][slot].t()
        added = [
            h @ rows.t()
            for h, rows in zip(between.split(rank, 1), own[2][slot].split(part_rows), strict=True)  # type: ignore[no-untyped-call]
        ]
        expected = expected.index_add(0, torch.arange(start, start + length), torch.cat(added, 1))
    expected.backward(g.float())
    of_x, of_a, of_b = (each.grad for each in own)
    assert of_x is not None
    assert of_a is not None
    assert of_b is not None
    scale = 1 + float(expected.detach().abs().max())
    assert (out.float() - expected).abs().max() < most * scale
    assert (g_x.float() - of_x).abs().max() < most * (1 + float(of_x.abs().max()))
    for slot, pairs in enumerate(gradients):
        found_a, found_b = (torch.cat(each) - 1 for each in zip(*pairs, strict=True))
        assert (found_a - of_a[slot]).abs().max() < most * (1 + float(of_a[slot].abs().max()))
        assert (found_b - of_b[slot]).abs().max() < most * (1 + float(of_b[slot].abs().max()))
