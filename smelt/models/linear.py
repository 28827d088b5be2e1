"""Linear: every matrix product of a model goes through here, so that layouts and kernels have one place.

Knows no architecture. Shapes: (..., in_features) -> (..., out_features).
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """y = x W^T + b, with W stored (out_features, in_features)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return F.linear(x, self.weight, self.bias)
