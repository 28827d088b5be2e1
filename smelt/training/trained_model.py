"""TrainedModel: all weights of a model, a session's own copy of them; knows no requests and no other session.

The model computes with rounded weights where its dtype is not fp32, and the fp32 masters learn. Data go through it one
after the other: then no request's bits depend on how it was cut, and there is nobody to share a pass with.
"""

import functools
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from smelt.configs import DecoderConfig
from smelt.errors import CheckpointError, InvalidInput
from smelt.models.batch import Batch
from smelt.models.decoder import Decoder
from smelt.models.devices import free_memory
from smelt.models.folders import read_config
from smelt.models.layers import attend_within
from smelt.models.text_attention import attend_row
from smelt.models.training_kernels import Texts
from smelt.models.weights import assemble, from_hf_tensors, read_tensors, write_model
from smelt.training.optim import flatten
from smelt.training.trained_weights import MASTERS, OPTIMIZER_FILE, TrainedWeights, read_optimizer

HEAD_ROWS = 512  # tokens whose logits are in memory at once
MARGIN = 0.9  # of the memory that is free


class TrainedModel(TrainedWeights):
    """Begins with a model's weights, which stay as they are."""

    rank = 0
    seed = 0

    def __init__(self, base: Decoder) -> None:
        """InvalidInput where there is no memory for it."""
        weight = base.embedding.weight
        check_memory(base.config, weight.dtype, weight.device)
        self.model = assemble(base.config, base.state_dict())
        self.model.gradient_checkpointing = base.gradient_checkpointing
        self._group = flatten(dict(self.model.named_parameters()), weight.dtype)
        super().__init__(self._group.masters.data, self._group.gradients, self._group.rounded)

    def logprobs(self, tokens: NDArray[np.int32], targets_NK: Tensor) -> Tensor:
        """log p(target) at each of N tokens, (N, K) in fp32; its gradient is the model's own."""
        batch = Batch(torch.from_numpy(tokens.astype(np.int64))[None].to(targets_NK.device))
        config = self.model.config
        text = Texts(torch.tensor([0, len(tokens)]), window=config.sliding_window)
        attend = attend_row(text, lambda: attend_within(batch, config, 0.0, fused=True))
        hidden_NC = self.model(batch, attend)[0]
        parts = list(zip(torch.split(hidden_NC, HEAD_ROWS), torch.split(targets_NK, HEAD_ROWS), strict=True))
        if len(parts) == 1 or not torch.is_grad_enabled():
            return torch.cat([_logprobs(self.model, *part) for part in parts])
        compute = functools.partial(checkpoint, _logprobs, self.model, use_reentrant=False)
        return torch.cat([compute(*part) for part in parts])

    def save_weights(self, folder: Path) -> None:
        """A model folder with the weights as the model computes with them, without its tokenizer."""
        write_model(self.model.config, self.model.state_dict(), folder)

    def _take(self, folder: Path) -> None:
        config = read_config(folder)
        if config != self.model.config:
            raise CheckpointError(f"{folder} is not the model that this session trains")
        exact = read_optimizer(folder).get(MASTERS) if (folder / OPTIMIZER_FILE).is_file() else None
        if exact is not None:
            self._copy_into({MASTERS: exact}, {MASTERS: self.masters}, folder)
            return
        tensors = from_hf_tensors(config, read_tensors(folder, config))
        for name, master in self._group.views(self.masters).items():
            master.copy_(tensors[name])


def check_memory(config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> None:
    """InvalidInput where weights, gradient and moments, and a copy of them for a snapshot, have no room."""
    rounded = 0 if dtype == torch.float32 else dtype.itemsize
    needed, free = config.num_parameters * (2 * 16 + rounded), int(free_memory(device) * MARGIN)
    if needed > free:
        raise InvalidInput(
            f"to train all {config.num_parameters:,} weights takes {needed / 2**20:,.0f} MiB of memory, and "
            f"{free / 2**20:,.0f} MiB are free; train an adapter (lora_config), or a smaller model",
            "lora_config",
        )


def _logprobs(model: Decoder, hidden_NC: Tensor, targets_NK: Tensor) -> Tensor:
    logits_NV = model.logits(hidden_NC).float()
    return logits_NV.gather(1, targets_NK) - logits_NV.logsumexp(dim=1, keepdim=True)
