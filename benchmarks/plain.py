"""The plain path: what the trainers compute, as the formulas read, for speed.py to compare with."""

import contextlib
import copy
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.quantization.batch_norms import NormalisedConv
from baselines.training import bn_stats, generators
from baselines.training import trainer as loop
from baselines.training.bn_stats import BatchNormStatistics
from baselines.training.parallel import ALONE, Ranks
from baselines.training.trainer import Remembered, Trainer


class PlainTrainer(Trainer):
    """Contiguous tensors."""

    def _place(self, network: nn.Module) -> nn.Module:
        return network.to(self.device, memory_format=torch.contiguous_format)


def plain_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """What baselines.training.bn_stats.channel_moments equals, as the formula reads."""
    variance, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
    return mean, variance


def plain_upsampled_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What baselines.training.generators.upsampled_convolution equals, as the formula reads."""
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)


def plain_bns(statistics: BatchNormStatistics, ranks: Ranks = ALONE) -> Tensor:
    """What its ``loss`` equals, as the formula reads."""
    trained = [moment for layer in statistics.layers for moment in layer.trained.chunk(2)]
    pairs = zip(statistics.batch, trained, strict=True)
    return 2 * torch.stack([F.mse_loss(batch, known) for batch, known in pairs]).mean()


def plain_normalised_conv(joined: NormalisedConv, input: Tensor) -> Tensor:
    """What its ``forward`` equals, as the formula reads."""
    return joined.norm(joined.conv(input))


def plain_forward(shared: Remembered, images: Tensor) -> Tensor:
    """Every call a forward."""
    return shared.network(images)


PLAIN = (
    (bn_stats, "channel_moments", plain_moments),
    (BatchNormStatistics, "loss", plain_bns),
    (generators, "upsampled_convolution", plain_upsampled_convolution),
    (NormalisedConv, "forward", plain_normalised_conv),
    (Remembered, "__call__", plain_forward),
    (loop, "with_folded_norms", copy.deepcopy),
)


@contextlib.contextmanager
def plain_formulas() -> Iterator[None]:
    """Everything as its formula reads."""
    with contextlib.ExitStack() as stack:
        for owner, name, formula in PLAIN:
            stack.enter_context(mock.patch.object(owner, name, formula))
        yield
