"""The BatchNorm-statistics loss (BNS): how far a batch is from what the teacher has seen."""

from collections.abc import Iterator
from contextlib import contextmanager

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
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = [0, *range(2, x.ndim)]
    variance, mean = torch.var_mean(wide, dims, correction=0)
    return mean, variance


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
