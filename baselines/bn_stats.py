"""The BatchNorm-statistics loss (BNS): how far a batch is from what the teacher has seen."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from baselines.errors import UnsupportedLayerError

BatchNorm = nn.modules.batchnorm._BatchNorm


class BatchNormStatistics:
    """Collects one loss per BatchNorm input; :meth:`loss` is their mean."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def collect(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """MSE(batch mean, running mean) + MSE(biased batch variance, running variance)."""
        mean, variance = channel_moments(inputs[0])
        self.losses.append(
            (mean - norm.running_mean).square().mean()
            + (variance - norm.running_var).square().mean()
        )

    def loss(self) -> Tensor:
        """Mean over the BatchNorm layers, a scalar in float32."""
        return torch.stack(self.losses).mean()


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, (N, C, ...) -> (C,), (C,), in float32 at least."""
    return _ChannelMoments.apply(x)


class _ChannelMoments(torch.autograd.Function):
    """torch.var_mean over all but dim 1, by two sums forward and one pass back.

    On the CPU var_mean over strided channels is some 20 times slower than the sums.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        dims = [0, *range(2, x.ndim)]
        wide = torch.promote_types(x.dtype, torch.float32)
        n = x.numel() // x.shape[1]
        mean = x.sum(dims, dtype=wide) / n
        # About the mean, in x's own precision: no cancellation of large squares.
        centred = x - _per_channel(mean, x)
        variance = centred.square().sum(dims, dtype=wide) / n
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        n = x.numel() // x.shape[1]
        slope = 2 * grad_variance / n
        offset = grad_mean / n - slope * mean
        return torch.addcmul(_per_channel(offset, x), x, _per_channel(slope, x))


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(1, -1, *(1,) * (like.ndim - 2))


@contextmanager
def batch_norm_statistics(teacher: nn.Module) -> Iterator[BatchNormStatistics]:
    """Collect from every forward of ``teacher`` inside; all hooks are removed on leaving."""
    norms = [m for m in teacher.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
    if not norms:
        raise UnsupportedLayerError(
            f"{type(teacher).__name__} has no BatchNorm with running statistics, which this method "
            "needs: they are all that is known of the training data"
        )
    statistics = BatchNormStatistics()
    handles = [norm.register_forward_pre_hook(statistics.collect) for norm in norms]
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
