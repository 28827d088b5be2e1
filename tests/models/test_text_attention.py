import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels_built import built_kernels
from smelt.models.text_attention import attend_texts
from smelt.models.training_kernels import Texts

STARTS = torch.tensor([0, 1, 34, 67, 131, 200])  # texts of odd lengths, one token, and more than a step's queries
SHAPES = [(4, 2, 16), (3, 3, 5), (9, 3, 64), (2, 1, 20)]  # heads of queries and of keys, width


WAYS = [Texts(STARTS), Texts(STARTS, window=7), Texts(STARTS, window=40), Texts(STARTS, causal=False)]


def by_torch(q: Tensor, k: Tensor, v: Tensor, texts: Texts) -> Tensor:
    found = []
    for start, end in zip(STARTS[:-1], STARTS[1:], strict=True):
        order = torch.arange(int(end - start))
        apart = order[:, None] - order[None, :]
        mask = (apart >= 0) & (apart < (texts.window or len(order))) if texts.causal else apart < len(order)
        own = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
        found.append(F.scaled_dot_product_attention(*own, mask, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("texts", WAYS, ids=["causal", "window of 7", "window of 40", "all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_it_is_that_of_torch(dtype: torch.dtype, most: float, shape: tuple[int, int, int], texts: Texts) -> None:
    num_heads, num_kv_heads, width = shape
    torch.manual_seed(0)
    packed = torch.randn(200, num_heads + 2 * num_kv_heads, width).to(dtype)
    gradient = torch.randn(200, num_heads, width).to(dtype)
    own, reference = packed.clone().requires_grad_(), packed.float().requires_grad_()
    sizes = (num_heads, num_kv_heads, num_kv_heads)
    found = attend_texts(built_kernels().training, *torch.split(own, sizes, 1), texts)
    expected = by_torch(*torch.split(reference, sizes, 1), texts)
    found.backward(gradient)
    expected.backward(gradient.float())
    assert own.grad is not None
    assert reference.grad is not None
    assert (found.float() - expected).abs().max() < most
    assert (own.grad.float() - reference.grad).abs().max() < most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_company_and_threads_change_no_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    fast = built_kernels().training
    q, k, v = (torch.randn(200, heads, 16).to(dtype) for heads in (4, 2, 2))
    together, log_sums = fast.attend_texts(q, k, v, Texts(STARTS))
    gradients = fast.attend_texts_back((q, k, v), Texts(STARTS), (together, log_sums), q)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = Texts(torch.tensor([0, 64]))
        own = [x[67:131].contiguous() for x in (q, k, v)]
        alone, own_sums = fast.attend_texts(*own, one)
        back = fast.attend_texts_back(tuple(own), one, (alone, own_sums), own[0])
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(alone, together[67:131])
    assert all(torch.equal(mine, all_of_them[67:131]) for mine, all_of_them in zip(back, gradients, strict=True))
