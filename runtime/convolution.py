"""The short convolution over time of recurrent layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from runtime.layers import stored
from runtime.state import RecurrentCache, Tokens


class CausalConv1d(nn.Module):
    """A convolution over time, channel by channel, that sees the `width - 1` inputs before the first."""

    def __init__(self, channels: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = stored(channels, 1, width)
        self.bias = stored(channels) if bias else None

    def forward(self, x: Tensor, at: Tokens, cache: RecurrentCache) -> Tensor:
        """`[B, T, C]` to the same; `cache` supplies the inputs before, and remembers the last."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.conv1d(cache.before(x, at), self.weight.to(x.dtype), bias, groups=x.shape[-1]).transpose(1, 2)
