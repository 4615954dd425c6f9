"""How a sub-layer reads from and writes to the residual stream.

A decoder layer never adds anything itself. Around each of its sub-layers F stands a connection:

    u = read(X);  y = F(norm(u));  X' = write(X, y)

With one stream this is the plain residual connection `X' = X + y` (arXiv 1512.03385).
"""

import torch
from torch import nn


class ResidualConnection(nn.Module):
    """The plain residual connection: reads the stream as it is, adds the sub-layer's output."""

    def read(self, stream: torch.Tensor) -> torch.Tensor:
        return stream

    def write(self, stream: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return stream + output
