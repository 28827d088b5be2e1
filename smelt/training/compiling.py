"""When torch.compile pays for itself, and eager code where it fails; knows no data and no loop."""

import torch
from torch import Tensor, nn

from smelt.models.batch import Batch
from smelt.models.devices import has_compiler, has_fast_bfloat16, matmul_peak
from smelt.run_configs import RunConfig
from smelt.training.losses import Loss, Metrics
from smelt.training.metrics import Note, Sink

# A compile takes about a minute on a CPU; it gains much where bf16 leaves little time to the matrix products,
# and almost nothing where fp32 products take most of the time.
WORTHWHILE_SECONDS = 900.0


def wants_compile(config: RunConfig, num_flops: float, device: torch.device, dtype: torch.dtype) -> bool:
    """As the config says; `auto`: when the run, at half the matmul peak, is long enough to repay it.

    Decided before the first step from figures that a rerun shares, so that the same run has the same bits.
    """
    if config.compile != "auto":
        return config.compile == "true"
    if config.sharding != "none" or not has_compiler() or device.type == "mps":
        return False
    if device.type == "cpu" and not (dtype == torch.bfloat16 and has_fast_bfloat16(device)):
        return False
    return num_flops / (0.5 * matmul_peak(device, dtype)) > WORTHWHILE_SECONDS


def compiled(loss: Loss, sinks: list[Sink]) -> Loss:
    """The loss compiled at its first call; where that fails, one note and the eager loss from then on."""
    # They take two seconds to import, and most runs on CPUs compile nothing.
    from torch._dynamo.exc import TorchDynamoException  # noqa: PLC0415
    from torch._inductor.exc import InductorError  # noqa: PLC0415

    chosen: Loss = torch.compile(loss)
    is_proven = False

    def run(model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        nonlocal chosen, is_proven
        try:
            result = chosen(model, batch)
        except (TorchDynamoException, InductorError) as error:
            if is_proven:
                raise
            chosen = loss
            reason = str(error).strip().splitlines()[0]
            for sink in sinks:
                sink(Note(f"torch.compile does not work here, going on without it: {reason}"))
            result = loss(model, batch)
        is_proven = True
        return result

    return run
