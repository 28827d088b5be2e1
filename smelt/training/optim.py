"""The optimizer over flat fp32 buffers, gradient accumulation in fp32, and schedules; knows no loss and no data.

All matrices lie one after the other in one buffer and all vectors in another (vectors do not decay). Parameters
and gradients are views of these, so clipping, AdamW, an all-reduce or a checkpoint's copy is one call each.
Embeddings that say `sparse` are apart: of these only the rows that batches look up are worked on.
A model in bf16 or fp16 computes with rounded copies, while the fp32 masters and the fp32 gradients live here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from smelt.training.lookup_table import EPSILON, LookupTable, is_closed_form

ALIGNMENT = 16  # elements: every parameter begins on a 64-byte line of its buffer


def cosine_with_warmup(step: int, peak: float, floor: float, warmup: int, decay_end: int) -> float:
    """Learning rate of a step: linear warm-up to the peak, then half a cosine down to the floor."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if step >= decay_end:
        return floor
    progress = (step - warmup) / max(1, decay_end - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def linear_with_warmup(step: int, peak: float, floor: float, warmup: int, decay_end: int) -> float:
    """Learning rate of a step: linear warm-up to the peak, then a straight line down to the floor."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, decay_end - warmup))
    return peak + (floor - peak) * progress


@dataclass
class ParameterGroup:
    """Some of the parameters as slices of flat fp32 buffers of equal length."""

    slices: dict[str, tuple[slice, torch.Size]]
    masters: nn.Parameter  # fp32, flat
    gradients: Tensor  # fp32, flat
    rounded: Tensor | None  # the model's own weights, flat, where its dtype is not fp32

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The parameters' tensors inside one of the buffers."""
        return {name: buffer[where].view(shape) for name, (where, shape) in self.slices.items()}


@dataclass
class LossScale:
    """Dynamic loss scaling for fp16: halved when gradients overflow, doubled after 2,000 good steps."""

    value: float = 1.0
    num_good_steps: int = 0

    def overflowed(self) -> None:
        """Halve the scale; the step is skipped."""
        self.value, self.num_good_steps = self.value / 2, 0

    def succeeded(self) -> None:
        """Count a good step."""
        self.num_good_steps += 1
        if self.num_good_steps == 2000:
            self.value, self.num_good_steps = self.value * 2, 0


class Optimizer:
    """AdamW with decoupled decay (Loshchilov and Hutter 2019) and global-norm clipping."""

    is_sharded = False  # each rank has all of every tensor

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, betas: tuple[float, float], weight_decay: float, grad_clip: float
    ) -> None:
        self.grad_clip = grad_clip
        self.loss_scale = LossScale(65536.0) if dtype == torch.float16 else None
        self.groups: list[ParameterGroup] = []
        self.tables = lookup_tables(model, dtype, betas, weight_decay)
        apart = {table.name for table in self.tables}
        named = {name: p for name, p in model.named_parameters() if p.requires_grad and name not in apart}
        matrices = self._hold({name: p for name, p in named.items() if p.dim() >= 2}, dtype)
        vectors = self._hold({name: p for name, p in named.items() if p.dim() < 2}, dtype)
        self.masters = [*matrices, *vectors]  # fp32, each with its gradient
        self.moments = [(torch.zeros_like(masters), torch.zeros_like(masters)) for masters in self.masters]
        self._parts = [(slice(0, len(matrices)), weight_decay), (slice(len(matrices), None), 0.0)]
        self._betas = betas
        self.num_steps = 0  # updates so far, which AdamW's bias correction depends on

    def _hold(self, parameters: dict[str, nn.Parameter], dtype: torch.dtype) -> list[nn.Parameter]:
        """The masters of some parameters, and a place for their gradients."""
        group = flatten(parameters, dtype)
        self.groups.append(group)
        return [group.masters]

    @property
    def device(self) -> torch.device:
        """Where masters and moments lie."""
        return self.masters[0].device

    def gradients(self) -> list[Tensor]:
        """The fp32 gradients that this rank holds: flat ones, and those of the rows that were looked up."""
        return [*self._whole_gradients(), *(table.touched()[1] for table in self.tables)]

    def _whole_gradients(self) -> list[Tensor]:
        """Of all but tables."""
        return [group.gradients for group in self.groups]

    def gradient_norm(self) -> float:
        """The norm of all gradients, as they are."""
        return math.hypot(*(float(torch.linalg.vector_norm(gradients)) for gradients in self.gradients()))

    def step(self, learning_rate: float) -> float | None:
        """Clip, update and clear the gradients; returns their norm before clipping.

        None: the gradients were not finite, so nothing moved (fp16 then goes on with a smaller loss scale).
        """
        scale = self.loss_scale.value if self.loss_scale else 1.0
        norm = self.gradient_norm() / scale
        finite = math.isfinite(norm)
        if finite:
            clip = self.grad_clip / norm if 0 < self.grad_clip < norm else 1.0
            self._update(learning_rate, clip / scale)
        if self.loss_scale:
            self.loss_scale.succeeded() if finite else self.loss_scale.overflowed()
        self.zero_gradients()
        return norm if finite else None

    def _update(self, learning_rate: float, gradient_factor: float) -> None:
        if gradient_factor != 1.0:
            for gradients in self.gradients():
                gradients.mul_(gradient_factor)
        for part, weight_decay in self._parts:
            masters, update = self.masters[part], Update(learning_rate, self._betas, weight_decay)
            found = [gradient for each in masters if (gradient := each.grad) is not None]
            adamw_(masters, found, self.moments[part], self.num_steps, update)
        self.num_steps += 1
        for table in self.tables:
            table.update(learning_rate, self.num_steps)
        self._round()

    def publish(self) -> None:
        """Have the model compute with what the masters are now."""
        self._round()
        for table in self.tables:
            table.publish()

    def settle(self, *, out_of_turn: bool = False) -> None:
        """Bring every row of tables up to date, for who reads all weights: see `LookupTable.settle`."""
        for table in self.tables:
            table.settle(out_of_turn=out_of_turn)

    @torch.no_grad()
    def _round(self) -> None:
        for group in self.groups:
            if group.rounded is not None:
                group.rounded.copy_(group.masters)

    def zero_gradients(self) -> None:
        """Forget what was accumulated."""
        for gradients in self._whole_gradients():
            gradients.zero_()
        for table in self.tables:
            table.forget_gradients()

    def buffers(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint must hold, by a stable name: here the flat ones, and tables."""
        found: dict[str, Tensor] = {}
        for index, (group, (first, second)) in enumerate(zip(self.groups, self.moments, strict=True)):
            found[f"{index}.masters"] = group.masters.detach()
            found[f"{index}.exp_avg"], found[f"{index}.exp_avg_sq"] = first, second
        for table in self.tables:
            found |= {f"{table.name}.{kind}": tensor for kind, tensor in table.tensors().items()}
        return found

    def waiting(self) -> dict[str, Tensor]:
        """What is kept of tables that were settled out of turn, beside `buffers`."""
        return {f"{table.name}.{kind}": tensor for table in self.tables for kind, tensor in table.waiting.items()}

    def wait_again(self, waiting: dict[str, Tensor]) -> None:
        """Leave tables as they were before they were settled out of turn, where that was kept."""
        for table in self.tables:
            if f"{table.name}.masters" in waiting:
                table.wait_again({kind: waiting[f"{table.name}.{kind}"] for kind in table.state()})

    def named(self, buffers: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
        """One kind (`masters`, `exp_avg` or `exp_avg_sq`) of copied or own buffers as tensors by parameter name."""
        flat = {
            name: tensor
            for index, group in enumerate(self.groups)
            for name, tensor in group.views(buffers[f"{index}.{kind}"]).items()
        }
        return flat | {table.name: buffers[f"{table.name}.{kind}"] for table in self.tables}

    def whole(self, held: Tensor) -> Tensor:
        """All of a tensor of `buffers`, on this rank's device."""
        return held

    def fill(self, held: Tensor, whole: Tensor) -> None:
        """Put what this rank holds of a whole tensor into one of `named(buffers(), ...)`."""
        held.copy_(whole)


class Update(NamedTuple):
    """What AdamW is told of one update."""

    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    eps: float = EPSILON


@torch.no_grad()
def adamw_(
    masters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    moments: Sequence[tuple[Tensor, Tensor]],
    num_before: int,
    update: Update,
) -> None:
    """One update in place, after `num_before` others.

    Torch's function without its class, which takes two seconds to import what compiles.
    """
    if not masters:
        return
    device = masters[0].device
    is_fused = device.type in ("cpu", "cuda")
    steps = [torch.tensor(float(num_before), device=device if is_fused else "cpu") for _ in masters]
    firsts, seconds = ([pair[index] for pair in moments] for index in range(2))
    adamw(
        list(masters),
        list(gradients),
        firsts,
        seconds,
        [],
        steps,
        foreach=False,
        fused=is_fused,
        amsgrad=False,
        beta1=update.betas[0],
        beta2=update.betas[1],
        lr=update.learning_rate,
        weight_decay=update.weight_decay,
        eps=update.eps,
        maximize=False,
    )


def lookup_tables(
    model: nn.Module, dtype: torch.dtype, betas: tuple[float, float], weight_decay: float
) -> list[LookupTable]:
    """The trained embeddings of a model that say `sparse`; where these betas have no closed form, they say no more."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and module.weight.requires_grad:
            module.sparse = is_closed_form(betas)
            if module.sparse:
                found.append(LookupTable(f"{name}.weight", module, dtype, betas, weight_decay))
    return found


def flatten(parameters: dict[str, nn.Parameter], dtype: torch.dtype) -> ParameterGroup:
    """Move parameters into flat buffers; afterwards they and their gradients are views of them."""
    slices: dict[str, tuple[slice, torch.Size]] = {}
    length = 0
    for name, parameter in parameters.items():
        slices[name] = (slice(length, length + parameter.numel()), parameter.shape)
        length += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
    device = next(iter(parameters.values())).device if parameters else torch.device("cpu")
    masters = nn.Parameter(torch.zeros(length, device=device))
    gradients = torch.zeros(length, device=device)
    rounded = None if dtype == torch.float32 else torch.zeros(length, device=device, dtype=dtype)
    masters.grad = gradients
    group = ParameterGroup(slices, masters, gradients, rounded)
    master_views, gradient_views = group.views(masters.data), group.views(gradients)
    weight_views = master_views if rounded is None else group.views(rounded)
    for name, parameter in parameters.items():
        master_views[name].copy_(parameter.data)
        parameter.data = weight_views[name]
        if rounded is None:
            parameter.grad = gradient_views[name]
        else:
            weight_views[name].copy_(master_views[name])
            parameter.register_post_accumulate_grad_hook(accumulator(gradient_views[name]))  # type: ignore[no-untyped-call]
    return group


def accumulator(gradient: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds a parameter's rounded gradient to its fp32 sum as soon as backward has it."""

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None, "the hook runs after the gradient is there"
        gradient.add_(parameter.grad)
        parameter.grad = None

    return add
