"""The plain path: what the trainers compute, as the formulas read, for speed.py to compare with."""

import contextlib
import copy
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from baselines.quantization.batch_norms import (
    NormalisedConv,
    normalised_convolutions,
    with_folded_norms,
)
from baselines.training import bn_stats, generators
from baselines.training import trainer as loop
from baselines.training.bn_stats import BatchNormStatistics
from baselines.training.layers import Layers
from baselines.training.parallel import ALONE, Ranks
from baselines.training.trainer import Remembered


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
    factors = [factor for layer in statistics.layers for factor in layer.factor.chunk(2)]
    units = [factor * len(factor) ** 0.5 for factor in factors]
    moments = zip(statistics.batch, trained, units, strict=True)
    errors = [F.mse_loss(batch * unit, known * unit) for batch, known, unit in moments]
    return 2 * torch.stack(errors).mean()


class PlainLayers(Layers):
    """The same layers, of a teacher whose BatchNorms run by themselves."""

    def __init__(self, teacher: fx.GraphModule, student: fx.GraphModule) -> None:
        super().__init__(with_folded_norms(teacher), student)
        behind = {str(conv.target): str(n.target) for conv, n in normalised_convolutions(teacher)}
        self.modules = [
            (teacher.get_submodule(behind.get(name, name)), of_student)
            for name, (_, of_student) in zip(self.names, self.modules, strict=True)
        ]


def plain_normalised_conv(joined: NormalisedConv, input: Tensor) -> Tensor:
    """What its ``forward`` equals, as the formula reads."""
    return joined.norm(joined.conv(input))


def contiguous(network: nn.Module) -> nn.Module:
    """In place of ``channels_last``."""
    return network


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
    (loop, "channels_last", contiguous),
    (loop, "Layers", PlainLayers),
)


@contextlib.contextmanager
def plain_formulas() -> Iterator[None]:
    """Everything as its formula reads."""
    with contextlib.ExitStack() as stack:
        for owner, name, formula in PLAIN:
            stack.enter_context(mock.patch.object(owner, name, formula))
        yield
