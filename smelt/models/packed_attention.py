"""Attention within texts of different lengths that lie one after the other in one row; knows no model.

The products of a layer then see no padding at all, and neither does attention by our kernels. Where torch computes it,
texts of similar length are laid side by side, so that what is filled up is a few percent. Shapes: N tokens in one row,
B texts of up to T tokens, H heads, D width of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from smelt.models.layers import Attend, prefers_written_out, written_out_attention
from smelt.models.text_attention import attend_row
from smelt.models.training_kernels import Texts

MIN_FILL = 0.8  # the shortest text of a group, as a fraction of the longest


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring texts of similar length. Without `places` all are equally long and need no filling up."""

    first: int  # token of the row
    last: int  # token after the group's last
    num_texts: int
    length: int  # of the longest
    places: Tensor | None  # (tokens of the group,): where each lies among num_texts x length places
    sources: Tensor | None  # (num_texts x length,): the token at each place, any where there is none
    visible: Tensor  # (B, 1, 1 or T, T): which keys a query may see


def attend_within_texts(
    lengths: Sequence[int],
    device: torch.device,
    *,
    causal: bool = False,
    window: int | None = None,
    dropout: float = 0.0,
) -> Attend:
    """How the tokens of one row attend to their own text; best where texts are sorted by length."""

    def by_torch() -> Attend:
        groups = [_group(first, part, device, causal, window) for first, part in _similar(lengths)]

        def attend(_layer: int, q_1NHD: Tensor, k_1NGD: Tensor, v_1NGD: Tensor) -> Tensor:
            return torch.cat([_attend(group, q_1NHD[0], k_1NGD[0], v_1NGD[0], dropout) for group in groups])[None]

        return attend

    if dropout > 0:
        return by_torch()
    return attend_row(Texts(torch.tensor([0, *accumulate(lengths)]), causal, window), by_torch)


def _similar(lengths: Sequence[int]) -> list[tuple[int, list[int]]]:
    """(first token, lengths) of neighbours that fill each other's places well."""
    groups: list[tuple[int, list[int]]] = []
    first = 0
    for length in lengths:
        if groups and min([*groups[-1][1], length]) >= MIN_FILL * max([*groups[-1][1], length]):
            groups[-1][1].append(length)
        else:
            groups.append((first, [length]))
        first += length
    return groups


def _group(first: int, lengths: list[int], device: torch.device, causal: bool, window: int | None) -> Group:
    length, last = max(lengths), first + sum(lengths)
    order = torch.arange(length)
    is_there = order[None] < torch.tensor(lengths)[:, None]
    visible = is_there[:, None, None]
    if causal:
        behind = order[:, None] - order[None]
        visible = visible & (behind >= 0) & (behind < (window or length))
        visible = visible | ~is_there[:, None, :, None]  # what sees nothing would be NaN, in the gradients too
    places = sources = None
    if min(lengths) < length:
        places = is_there.flatten().nonzero()[:, 0].to(device)
        sources = torch.zeros(is_there.numel(), dtype=torch.int64, device=device)
        sources[places] = torch.arange(last - first, device=device)
    return Group(first, last, len(lengths), length, places, sources, visible.to(device))


def _attend(group: Group, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, dropout: float) -> Tensor:
    q, k, v = (_side_by_side(group, x) for x in (q_NHD, k_NGD, v_NGD))
    if prefers_written_out(q):
        out_BHTD = written_out_attention(q, k, v, group.visible, dropout)
    else:
        out_BHTD = F.scaled_dot_product_attention(q, k, v, group.visible, dropout, enable_gqa=q.shape[1] != k.shape[1])
    out = out_BHTD.transpose(1, 2).flatten(0, 1)
    return out if group.places is None else out.index_select(0, group.places)


def _side_by_side(group: Group, x_NHD: Tensor) -> Tensor:
    """(B, H, T, D)."""
    own = x_NHD[group.first : group.last]
    if group.sources is not None:
        own = own.index_select(0, group.sources)
    return own.view(group.num_texts, group.length, *own.shape[1:]).transpose(1, 2)
