"""How a sub-layer reads from and writes to the residual stream.

A decoder layer never adds anything itself. Around each of its sub-layers F stands a connection. It reads the
sub-layer's input from the stream, and it keeps for the write what it found out on the way (`mixing`):

    u, mixing = connection(X);  y = F(norm(u));  X' = connection.write(X, y, mixing)

With one stream this is the plain residual connection `X' = X + y` (arXiv 1512.03385), and there is nothing to
keep. With several streams it is a hyper-connection (`hyper_connections`).
"""

import torch
from torch import nn


class ResidualConnection(nn.Module):
    """The plain residual connection: reads the stream as it is, adds the sub-layer's output."""

    def forward(self, stream: torch.Tensor) -> tuple[torch.Tensor, None]:
        return stream, None

    def write(self, stream: torch.Tensor, output: torch.Tensor, mixing: None) -> torch.Tensor:
        return stream + output
