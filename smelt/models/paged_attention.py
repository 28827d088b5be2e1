"""Attention of one new token per row over keys and values that lie in blocks; knows no model and no scheduler.

Shapes: B rows, H query heads, G key/value heads (H a multiple of G), D width of a head, N blocks of a row at most.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from smelt.models.kernels import kernels


def attend_paged(
    q_BHD: Tensor, keys: Tensor, values: Tensor, tables_BN: Tensor, lengths_B: Tensor, window: int | None
) -> Tensor:
    """(B, H, D): each row's query attends to the first `lengths_B` (>= 1) positions of its own blocks.

    `keys` and `values` are one layer's cache, (num_blocks, G, block_size, D). Block j of row b is `tables_BN[b, j]`
    (int32; what lies beyond a row's length may be any block's number). The query is at the last position; with a
    `window` it sees only that many positions, its own included.
    """
    fast = kernels() if suits_kernel(q_BHD, keys, values, tables_BN, lengths_B) else None
    attend = attend_gathered if fast is None else fast.attend
    return attend(q_BHD, keys, values, tables_BN, lengths_B, window)


def suits_kernel(q_BHD: Tensor, keys: Tensor, values: Tensor, tables_BN: Tensor, lengths_B: Tensor) -> bool:
    """Whether the compiled attention takes these: on the CPU, in fp32 or bf16, heads of 16 and each in one piece."""
    num_kv_heads, block_size, width = keys.shape[1:]
    return (
        q_BHD.device.type == "cpu"
        and q_BHD.dtype in (torch.float32, torch.bfloat16)
        and q_BHD.dtype == keys.dtype == values.dtype
        and width % 16 == 0
        and q_BHD.stride()[1:] == (width, 1)
        and keys.stride() == values.stride()
        and keys.stride()[1:] == (block_size * width, width, 1)
        and q_BHD.shape[1] % num_kv_heads == 0
        and all(x.dtype == torch.int32 and x.is_contiguous() for x in (tables_BN, lengths_B))
    )


def attend_gathered(
    q_BHD: Tensor, keys: Tensor, values: Tensor, tables_BN: Tensor, lengths_B: Tensor, window: int | None
) -> Tensor:
    """The same for every device and dtype, by copying each row's blocks into one piece."""
    k_BGLD, v_BGLD = (cache[tables_BN.long()].transpose(1, 2).flatten(2, 3) for cache in (keys, values))
    order_L = torch.arange(k_BGLD.shape[2], device=q_BHD.device)
    distances_BL = lengths_B[:, None] - 1 - order_L[None, :]
    visible_BL = distances_BL >= 0
    if window is not None:
        visible_BL &= distances_BL < window
    grouped = q_BHD.shape[1] != keys.shape[1]
    mixed_BH1D = F.scaled_dot_product_attention(
        q_BHD[:, :, None], k_BGLD, v_BGLD, visible_BL[:, None, None], enable_gqa=grouped
    )
    return mixed_BH1D[:, :, 0]
