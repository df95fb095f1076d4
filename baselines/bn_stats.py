"""The BatchNorm-statistics loss (BNS): how far a batch is from what the teacher has seen."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from baselines.errors import UnsupportedLayerError

BatchNorm = nn.modules.batchnorm._BatchNorm


class BatchNormStatistics:
    """Collects the moments of every BatchNorm's input; :meth:`loss` compares them with its own."""

    def __init__(self) -> None:
        self.batch: list[Tensor] = []
        self.trained: list[Tensor] = []

    def collect(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """The batch's means and biased variances, and those that the layer was trained with."""
        self.batch += channel_moments(inputs[0])
        self.trained += [norm.running_mean, norm.running_var]

    def loss(self) -> Tensor:
        """MSE of the means + MSE of the variances, averaged over the layers; float32, scalar."""
        if not self.batch:
            raise UnsupportedLayerError(
                "the network has BatchNorm layers and ran none of them, so there are no statistics "
                "to draw images from; give the network without its unused parts"
            )
        # All layers at once: on small batches, many small operations are what a step waits for.
        share = [torch.full_like(v, 1 / len(v)) for v in self.trained]
        errors = torch.cat(self.batch) - torch.cat(self.trained)
        return (errors.square() * torch.cat(share)).sum() / (len(self.trained) / 2)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, (N, C, ...) -> (C,), (C,), in float32 at least."""
    return _ChannelMoments.apply(x)


class _ChannelMoments(torch.autograd.Function):
    """torch.var_mean over all but dim 1, and its gradient, by batch normalisation's kernels.

    Those are made for channels: on the CPU var_mean and a broadcast a * x + b are 10 times slower.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        # The affine parameters are there for their dtype, which is that of the statistics.
        wide = torch.promote_types(x.dtype, torch.float32)
        one, zero = x.new_ones(x.shape[1], dtype=wide), x.new_zeros(x.shape[1], dtype=wide)
        eps = 1e-12  # with 0, a constant channel is a case of its own
        _, mean, inverse_std = torch.native_batch_norm(x, one, zero, None, None, True, 0.0, eps)
        ctx.save_for_backward(x, mean)
        return mean, (inverse_std.pow(-2) - eps).clamp(min=0)

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        n = x.numel() // x.shape[1]
        slope = 2 * grad_variance / n
        zero, one = torch.zeros_like(mean), torch.ones_like(mean)
        # As if normalised with mean 0 and variance 1: slope * x + offset.
        offset = grad_mean / n - slope * mean
        return torch.native_batch_norm(x, slope, offset, zero, one, False, 0.0, 0.0)[0]


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
