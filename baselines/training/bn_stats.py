"""The BatchNorm-statistics loss (BNS): how far a batch is from what the teacher has seen."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from baselines.errors import UnsupportedLayerError
from baselines.quantization.batch_norms import FoldedConv
from baselines.training.parallel import ALONE, Ranks

BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Layer:
    """A layer to collect at, what its moments are with the training data, and their unit.

    Args:
        module: a BatchNorm, whose input counts, or a :class:`FoldedConv`, whose output does.
        trained: means and variances, (2 C,).
        factor: an error of a moment times this is in the unit wanted, over sqrt(C), (2 C,).
    """

    module: nn.Module
    trained: Tensor
    factor: Tensor


def normalising_layers(network: nn.Module, *, relative: bool = False) -> list[Layer]:
    """Where the statistics of ``network`` are to be had.

    Args:
        relative: count errors in units of the layer's trained variance, averaged over its
            channels (means in its root), so that all layers count alike. Else in the BatchNorm
            input's, as published, where a layer's weight is the square of its variance: they lie
            between 0.05 and 150 in one EfficientNet.

    Raises:
        UnsupportedLayerError: if it has none.
    """
    norms = {module: module for module in network.modules() if isinstance(module, BatchNorm)}
    for module in network.modules():
        if isinstance(module, FoldedConv):
            norms[module.norm] = module  # which runs in its place
    layers = [
        _layer(module, norm, relative)
        for norm, module in norms.items()
        if norm.running_mean is not None
    ]
    if not layers:
        raise UnsupportedLayerError(
            "the network has no BatchNorm with running statistics, which this method needs: they "
            "are all that is known of the training data"
        )
    return layers


@torch.no_grad()
def _layer(module: nn.Module, norm: nn.Module, relative: bool) -> Layer:
    mean, variance, unit = norm.running_mean, norm.running_var, torch.ones_like(norm.running_mean)
    if module is not norm:  # y = gain (x - mean) / std + shift
        std = (variance + norm.eps).sqrt()
        unit = std / norm.weight if norm.affine else std
        mean, variance = norm.bias if norm.affine else torch.zeros_like(mean), variance / unit**2
    spread = norm.running_var.mean() + norm.eps if relative else unit.new_ones(())
    factor = torch.cat([unit / spread.sqrt(), unit**2 / spread]) / len(unit) ** 0.5
    return Layer(module, torch.cat([mean, variance]), factor)


class BatchNormStatistics:
    """Collects a batch's moments; :meth:`loss` compares them with the trained ones."""

    def __init__(self) -> None:
        self.batch: list[Tensor] = []  # mean, variance, mean, variance, ...
        self.layers: list[Layer] = []

    def collect(
        self,
        layer: Layer,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        named: dict[str, Tensor],
        output: Tensor,
    ) -> None:
        """The batch's means and biased variances at one layer."""
        (given,) = (*inputs, *named.values())
        self.batch += channel_moments(output if isinstance(module, FoldedConv) else given)
        self.layers.append(layer)

    def loss(self, ranks: Ranks = ALONE) -> Tensor:
        """MSE of the means + MSE of the variances, averaged over the layers; float32, scalar.

        Each error is in its layer's unit, see :func:`normalising_layers`.

        Args:
            ranks: that share the batch, of which this one collected its part.
        """
        if not self.batch:
            raise UnsupportedLayerError(
                "the network has BatchNorm layers and ran none of them, so there are no statistics "
                "to draw images from; give the network without its unused parts"
            )
        # All layers at once: on small batches, many small operations are what a step waits for.
        errors = torch.cat(ranks.moments(self.batch)) - torch.cat(
            [layer.trained for layer in self.layers]
        )
        errors = errors * torch.cat([layer.factor for layer in self.layers])
        return errors.square().sum() / len(self.layers)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, (N, C, ...) -> (C,), (C,), in float32 at least."""
    return _ChannelMoments.apply(x)


class _ChannelMoments(torch.autograd.Function):
    """torch.var_mean over all but dim 1, and its gradient, by batch normalisation's kernels.

    Those are made for channels: var_mean and a broadcast a * x + b are much slower on the CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        # The affine parameters are there for their dtype, which is that of the statistics.
        wide = torch.promote_types(x.dtype, torch.float32)
        one, zero = x.new_ones(x.shape[1], dtype=wide), x.new_zeros(x.shape[1], dtype=wide)
        eps = 1e-30  # with 0, a constant channel is a case of its own
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
def batch_norm_statistics(layers: list[Layer]) -> Iterator[BatchNormStatistics]:
    """Collect from every forward inside; all hooks are removed on leaving."""
    statistics = BatchNormStatistics()
    handles = [
        layer.module.register_forward_hook(partial(statistics.collect, layer), with_kwargs=True)
        for layer in layers
    ]
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
