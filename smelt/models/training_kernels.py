"""Kernels of what is trained: calls the functions of `kernels.cpp` that have gradients; knows no model and no autograd.

Shapes: N tokens of texts one after the other, H heads of queries, G heads of keys, D width of a head; S adapters of
one rank R, P parts of a fused matrix; V token ids or rows of a table, K targets of a token.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Address, Count, Threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
WHOLE_ROW = 1 << 62  # as a window: no limit
SUFFIXES = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # of the functions' names
_TEXTS = [Address, Count] * 3 + [Address] + [Count] * 6
_ATTEND_TEXTS = [*_TEXTS, Address, Address, Threads]
_ATTEND_TEXTS_BACK = [*_TEXTS, *[Address] * 6, Threads]
_STACK = [Address] * 5 + [Count] * 5 + [Address] * 3 + [Count] * 2
_LORA_PASS = [*_STACK, *[Address] * 2, Threads]
_LORA_PASS_BACK = [*_STACK, *[Address] * 4, Threads]
_RMS_NORM_BACK = [Address] * 4 + [Count] * 2 + [ctypes.c_float, Threads]
_SWIGLU_BACK = [Address] * 3 + [Count] * 2 + [Threads]
_LOG_SUMS = [Address, Address, Count, Count, Threads]
_UPDATE_ROWS: list[Any] = [*[Address] * 5, Count, Count, Address, Count, Address, *[ctypes.c_float] * 6]
_TARGETS_BACK = [*[Address] * 5, *[Count] * 3, Threads]


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """Where texts begin and the last one ends, int64, and who sees whom: all, or none behind itself."""

    starts: Tensor
    causal: bool = True
    window: int | None = None  # keys up to and with itself that a query sees, in a causal one


@dataclass(frozen=True, slots=True, eq=False)
class StackedFactors:
    """Of a fused matrix the factors A (S, P R, in) and B (S, out, R) of S adapters and their scales (S,) in fp32.

    Each slot's lie in one piece, and the slots of A as far apart as those of B.
    """

    a: Tensor
    b: Tensor
    scales: Tensor
    part_rows: Tensor  # int64: of each part, together `out`


@dataclass(frozen=True, slots=True, eq=False)
class Datums:
    """Where datums begin, how many tokens they have, and whose they are; those of an adapter lie together. int64."""

    starts: Tensor
    lengths: Tensor
    slots: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of a table (V, C): masters and both moments in fp32, what each row has seen (V,) int32, and which, int64."""

    tensors: tuple[Tensor, Tensor, Tensor]
    last_seen: Tensor
    ids: Tensor


class Adam(NamedTuple):
    """One update of AdamW: what a row keeps, the rate over one correction, and the root of the other."""

    beta1: float
    beta2: float
    keeps: float
    rate: float
    root: float
    epsilon: float


class TrainingKernels:
    """The compiled functions. They take CPU tensors in fp32 or bf16, and trust their shapes."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self._attend_texts = by_dtype(functions, "attend_texts", _ATTEND_TEXTS)
        self._attend_texts_back = by_dtype(functions, "attend_texts_back", _ATTEND_TEXTS_BACK)
        self._lora_pass = by_dtype(functions, "lora_pass", _LORA_PASS)
        self._lora_pass_back = by_dtype(functions, "lora_pass_back", _LORA_PASS_BACK)
        self._rms_norm_back = by_dtype(functions, "rms_norm_back", _RMS_NORM_BACK)
        self._swiglu_back = by_dtype(functions, "swiglu_back", _SWIGLU_BACK)
        self._log_sums = by_dtype(functions, "log_sums", _LOG_SUMS)
        self._update_rows = functions.update_table_rows
        self._update_rows.argtypes, self._update_rows.restype = _UPDATE_ROWS, None
        self._targets_back = by_dtype(functions, "targets_back", _TARGETS_BACK)

    def attend_texts(self, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, texts: Texts) -> tuple[Tensor, Tensor]:
        """Attention within texts. Of each token its heads lie in one piece.

        Also the logarithms of the softmaxes' sums, fp32 (N, H).
        """
        out_NHD = torch.empty(q_NHD.shape, dtype=q_NHD.dtype)
        log_sums_NH = torch.empty(q_NHD.shape[:2])
        places = _texts(q_NHD, k_NGD, v_NGD, texts)
        self._attend_texts[q_NHD.dtype](*places, out_NHD.data_ptr(), log_sums_NH.data_ptr(), torch.get_num_threads())
        return out_NHD, log_sums_NH

    def attend_texts_back(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        texts: Texts,
        outputs: tuple[Tensor, Tensor],
        gradient_NHD: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v, from what the way there took and gave; the gradient is contiguous."""
        q, k, v = (torch.empty(each.shape, dtype=each.dtype) for each in inputs)
        addresses = [each.data_ptr() for each in (outputs[0], gradient_NHD, outputs[1], q, k, v)]
        back = self._attend_texts_back[gradient_NHD.dtype]
        back(*_texts(*inputs, texts), *addresses, torch.get_num_threads())
        return q, k, v

    def add_adapters(self, x_NC: Tensor, y_NO: Tensor, factors: StackedFactors, datums: Datums) -> Tensor:
        """Add scale B A x to y for the tokens of the datums; what lies between A and B, scaled: (N, P R)."""
        hidden = x_NC.new_empty(len(x_NC), factors.a.shape[1])
        addresses = y_NO.data_ptr(), hidden.data_ptr()
        self._lora_pass[x_NC.dtype](*_stack(x_NC, y_NO, factors, datums), *addresses, torch.get_num_threads())
        return hidden

    def add_adapters_back(
        self,
        x_NC: Tensor,
        gradient_NO: Tensor,
        hidden: Tensor,
        factors: StackedFactors,
        datums: Datums,
        factor_gradients: Tensor,
        x_gradient_NC: Tensor,
    ) -> None:
        """Add to the gradient of x what comes by way of the adapters, and to those of the factors where they lie.

        `factor_gradients`: the addresses, int64 (S, P, 2), of A's (R, in) and B's (rows, R) in fp32.
        """
        addresses = [each.data_ptr() for each in (gradient_NO, hidden, x_gradient_NC, factor_gradients)]
        back = self._lora_pass_back[x_NC.dtype]
        back(*_stack(x_NC, gradient_NO, factors, datums), *addresses, torch.get_num_threads())

    def rms_norm_back(self, x: Tensor, weight: Tensor, gradient: Tensor, eps: float) -> Tensor:
        """The gradient of x, (..., C), all in one piece."""
        x_gradient, width = torch.empty_like(x), x.shape[-1]
        addresses = [each.data_ptr() for each in (x, weight, gradient, x_gradient)]
        self._rms_norm_back[x.dtype](*addresses, x.numel() // width, width, eps, torch.get_num_threads())
        return x_gradient

    def swiglu_back(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of x, (..., 2F), given that of (..., F), all in one piece."""
        x_gradient, width = torch.empty_like(x), gradient.shape[-1]
        addresses = [each.data_ptr() for each in (x, gradient, x_gradient)]
        self._swiglu_back[x.dtype](*addresses, gradient.numel() // width, width, torch.get_num_threads())
        return x_gradient

    def log_sums(self, logits_NV: Tensor) -> Tensor:
        """log sum exp of each row, in fp32; rows lie one after the other."""
        sums = torch.empty(len(logits_NV))
        addresses = logits_NV.data_ptr(), sums.data_ptr()
        self._log_sums[logits_NV.dtype](*addresses, *logits_NV.shape, torch.get_num_threads())
        return sums

    def targets_back(
        self, logits_NV: Tensor, sums_N: Tensor, targets_NK: Tensor, gradient_NK: Tensor, to_NV: Tensor
    ) -> None:
        """Write the gradient of the logits, given that of log p(target): fp32, and rows one after the other."""
        num_rows, width = logits_NV.shape
        addresses = [each.data_ptr() for each in (logits_NV, sums_N, targets_NK, gradient_NK, to_NV)]
        sizes = num_rows, targets_NK.shape[1], width
        self._targets_back[logits_NV.dtype](*addresses, *sizes, torch.get_num_threads())

    def update_rows(self, table: Rows, missed: Tensor, gradients: Tensor | None, adam: Adam) -> None:
        """AdamW for rows of a table, after the updates that they have missed, of which `missed` has factors (.., 4).

        Without gradients (.., width) rows are only brought up to date.
        """
        addresses = [each.data_ptr() for each in (*table.tensors, table.last_seen, table.ids)]
        sizes = len(table.ids), table.tensors[0].shape[1], missed.data_ptr(), len(missed) - 1
        self._update_rows(*addresses, *sizes, None if gradients is None else gradients.data_ptr(), *adam)


def by_dtype(functions: ctypes.CDLL, name: str, types: Sequence[Any]) -> dict[torch.dtype, Any]:
    """A function of both dtypes."""
    found = {dtype: functions[f"{name}_{suffix}"] for dtype, suffix in SUFFIXES.items()}
    for function in found.values():
        function.argtypes, function.restype = types, None
    return found


def _stack(x_NC: Tensor, y_NO: Tensor, factors: StackedFactors, datums: Datums) -> list[int]:
    tensors = (x_NC, factors.a, factors.b, factors.scales, factors.part_rows)
    sizes = [factors.a.stride(0), len(factors.part_rows), factors.b.shape[2], x_NC.shape[1], y_NO.shape[1]]
    places = [each.data_ptr() for each in (datums.starts, datums.lengths, datums.slots)]
    return [*(each.data_ptr() for each in tensors), *sizes, *places, len(datums.starts), len(factors.a)]


def _texts(q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, texts: Texts) -> list[int]:
    places = [number for x in (q_NHD, k_NGD, v_NGD) for number in (x.data_ptr(), x.stride(0))]
    sizes = [len(texts.starts) - 1, q_NHD.shape[1], k_NGD.shape[1], q_NHD.shape[2]]
    window = WHOLE_ROW if texts.window is None else texts.window
    return [*places, texts.starts.data_ptr(), *sizes, window, 0 if texts.causal else WHOLE_ROW]
