"""Weights, gradients and moments in shards, a part on each rank, by torch's FSDP2; knows no loss, no data, no schedule.

Torch cuts each parameter along its first dimension. Before a block computes, its weights are gathered, rounded to the
model's dtype; after its backward pass every rank is given the sum of its part of the gradients, in fp32. The shards are
the fp32 masters themselves, so there is nothing else to round or to copy.
"""

import ctypes
import math
import sys

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from smelt.models.encoder import EncoderBlock
from smelt.models.layers import Block
from smelt.training.optim import Optimizer
from smelt.training.parallel import Ranks

M_MMAP_THRESHOLD = -3  # as in malloc.h
LARGE_BYTES = 2**20


def shard(model: nn.Module, dtype: torch.dtype, device: torch.device, ranks: Ranks) -> None:
    """Leave this rank its part of an fp32 model, moved to its device; a block's weights are gathered together.

    What is not in a block, such as the embedding, stays gathered from the forward pass to the end of the backward pass.
    """
    if device.type == "cpu":
        give_large_memory_back()
    mesh = init_device_mesh(device.type, (ranks.world_size,))
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for table in model.modules():
        if isinstance(table, nn.Embedding | nn.EmbeddingBag):
            table.sparse = False  # parts of tables have no rows: their gradients travel whole
    blocks = [module for module in model.modules() if isinstance(module, (Block, EncoderBlock))]
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=ranks.sharding == "full")
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in gathered_together(model):
        # Each rank's loss is divided by the targets of all ranks: the gradients are to be added, which gloo can do.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def give_large_memory_back() -> None:
    """Have glibc return what is freed to the system, where it learns to keep gathered weights that others could use."""
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


def gathered_together(model: nn.Module) -> list[FSDPModule]:
    """The parts of a sharded model whose weights travel together: its blocks, and all that is not in one."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


class ShardedOptimizer(Optimizer):
    """The optimizer over this rank's part of a sharded model. Its tensors are DTensors: a part that knows the whole."""

    is_sharded = True

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, betas: tuple[float, float], weight_decay: float, grad_clip: float
    ) -> None:
        self.parts = gathered_together(model)
        self.named_masters: dict[str, nn.Parameter] = {}
        super().__init__(model, dtype, betas, weight_decay, grad_clip)

    def _hold(self, parameters: dict[str, nn.Parameter], dtype: torch.dtype) -> list[nn.Parameter]:
        """The shards themselves. A parameter without a gradient decays as it does in one process: hence the zeros."""
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        self.named_masters |= parameters
        return list(parameters.values())

    def _whole_gradients(self) -> list[Tensor]:
        """Of this rank's part."""
        return [local(masters.grad) for masters in self.masters]

    def gradient_norm(self) -> float:
        """The norm over all ranks."""
        norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in self.gradients()])
        square = norms.double().square().sum()
        torch.distributed.all_reduce(square)
        return math.sqrt(float(square))

    def publish(self) -> None:
        """The masters have changed: forget weights that were gathered from them before."""
        for part in self.parts:
            part.reshard()

    def buffers(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint must hold, in parts."""
        found: dict[str, Tensor] = {}
        for (name, masters), (first, second) in zip(self.named_masters.items(), self.moments, strict=True):
            found[f"masters.{name}"] = masters.detach()
            found[f"exp_avg.{name}"], found[f"exp_avg_sq.{name}"] = first, second
        return found

    def named(self, buffers: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
        """One kind (`masters`, `exp_avg` or `exp_avg_sq`) of gathered or own buffers by parameter name."""
        return {name: buffers[f"{kind}.{name}"] for name in self.named_masters}

    def whole(self, held: Tensor) -> Tensor:
        """All of a tensor of `buffers`; every rank must ask for it."""
        assert isinstance(held, DTensor)
        return held.full_tensor()

    def fill(self, held: Tensor, whole: Tensor) -> None:
        """Take this rank's part of a whole tensor, which every rank has read for itself."""
        assert isinstance(held, DTensor)
        held.copy_(distribute_tensor(whole, held.device_mesh, held.placements, src_data_rank=None))


def local(tensor: Tensor | None) -> Tensor:
    """The numbers that this rank holds of a tensor."""
    assert isinstance(tensor, DTensor), "shards and their gradients are DTensors"
    return tensor.to_local()
