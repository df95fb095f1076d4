"""The student's and the images' smallest operations, several in one Triton kernel, for graphed.py.

A step of a small network spends its time on starting kernels. Same equations, to rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from baselines.quantization import quantizers
from baselines.quantization.batch_norms import NormalisedConv
from baselines.quantization.quantizers import WeightQuantizer, integer_range
from baselines.training import bn_stats, generators

BLOCK = 1024
# Added to a number below 2^22 and taken away again, it rounds half to even.
ROUND = tl.constexpr(1.5 * 2**23)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
ALL = tl.constexpr(tl.PropagateNan.ALL)


@contextmanager
def fused() -> Iterator[None]:
    """While inside, these stand in for what they compute."""
    normalised, quantized_weight = NormalisedConv.forward, WeightQuantizer._quantized
    fake_quantize, channel_moments = quantizers.fake_quantize, bn_stats._ChannelMoments.apply

    def run_normalised(module: NormalisedConv, input: Tensor) -> Tensor:
        conv, norm = module.conv, module.norm
        if not norm.affine or conv.bias is not None or not _taken(conv.weight):
            return normalised(module, input)
        moments = norm.running_mean, norm.running_var
        joined = _Normalise.apply(conv.weight, norm.weight, norm.bias, *moments, norm.eps)
        output: Tensor = conv._conv_forward(input, *joined)
        return output

    def quantize_weight(quantizer: WeightQuantizer, w: Tensor) -> Tensor:
        by_rows = quantizer.scheme == "asymmetric" and quantizer.transposed_groups is None
        if not by_rows or not _taken(w):
            return quantized_weight(quantizer, w)
        quantized: Tensor = _QuantizeWeight.apply(w, quantizer.bit_width)
        return quantized

    def quantize(
        x: Tensor, scale: Tensor, zero_point: Any, qmin: int, qmax: int, **how: Any
    ) -> Tensor:
        if scale.ndim or isinstance(zero_point, Tensor) or not _taken(x):
            return fake_quantize(x, scale, zero_point, qmin, qmax, **how)
        bounds = float(qmin - zero_point), float(qmax - zero_point)
        quantized: Tensor = _FakeQuantize.apply(x, scale, *bounds, how["ste"] == "clipped")
        return quantized

    def moments(x: Tensor) -> Any:
        return (_ChannelMoments.apply if _taken(x) else channel_moments)(x)

    with (
        patch.object(NormalisedConv, "forward", run_normalised),
        patch.object(WeightQuantizer, "_quantized", quantize_weight),
        patch.object(quantizers, "fake_quantize", quantize),
        patch.object(bn_stats._ChannelMoments, "apply", moments),
        patch.object(generators, "upsampled_convolution", _upsampled_convolution),
    ):
        yield


def _upsampled_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """:func:`baselines.training.generators.upsampled_convolution`, in two operations for forty."""
    return F.conv2d(F.interpolate(x, scale_factor=2), weight, bias, padding=1)


def _taken(x: Tensor) -> bool:
    """Whether the kernels take it: float32, the first dimension outermost, no gaps in its memory.

    Before and after a run networks are also asked on the CPU, where Triton can but interpret.
    """
    formats = [torch.contiguous_format] + [torch.channels_last] * (x.ndim == 4)
    dense = any(x.is_contiguous(memory_format=f) for f in formats)
    reached = x.is_cuda or triton.knobs.runtime.interpret
    return dense and reached and x.dtype == torch.float32


def _like(x: Tensor, other: Tensor) -> Tensor:
    """``x``, laid out as ``other``."""
    return x if x.stride() == other.stride() else torch.empty_like(other).copy_(x)


@triton.jit
def _nearest(x, lower, upper):  # type: ignore[no-untyped-def]
    x = tl.minimum(tl.maximum(x, lower, propagate_nan=ALL), upper, propagate_nan=ALL)
    return (x + ROUND) - ROUND


@triton.jit
def _quantize(x_at, scale_at, out_at, lower, upper, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, scale = tl.load(x_at + i, mask=i < n), tl.load(scale_at)
    tl.store(out_at + i, _nearest(tl.div_rn(x, scale), lower, upper) * scale, mask=i < n)


@triton.jit
def _clip(x_at, scale_at, grad_at, out_at, lower, upper, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, scale = tl.load(x_at + i, mask=i < n), tl.load(scale_at)
    inside = (x > (lower - 0.5) * scale) & (x < (upper + 0.5) * scale)
    tl.store(out_at + i, tl.where(inside, tl.load(grad_at + i, mask=i < n), 0.0), mask=i < n)


class _FakeQuantize(torch.autograd.Function):
    """Of activations, with one scale; both gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, lower: float, upper: float, clipped: bool
    ) -> Tensor:
        ctx.bounds, ctx.clipped = (lower, upper), clipped
        quantized, n = torch.empty_like(x), x.numel()
        _quantize[(triton.cdiv(n, BLOCK),)](x, scale, quantized, lower, upper, n, BLOCK)
        learned = (quantized,) if ctx.needs_input_grad[1] else ()
        ctx.save_for_backward(*((x, scale, *learned) if clipped else ()))
        return quantized

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.clipped:
            return grad, None, None, None, None
        x, scale, *learned = ctx.saved_tensors
        grad, n = _like(grad, x), x.numel()
        inside, grad_scale = torch.empty_like(x), None
        _clip[(triton.cdiv(n, BLOCK),)](x, scale, grad, inside, *ctx.bounds, n, BLOCK)
        if learned:
            inner = quantizers._inner
            grad_scale = (inner(grad, learned[0]) - inner(inside, x)) / scale
        return inside, grad_scale, None, None, None


@triton.jit
def _quantize_rows(w_at, out_at, levels, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    w = tl.load(w_at + row * n + i, mask=i < n, other=0.0)
    low, high = tl.minimum(tl.min(w), 0.0), tl.maximum(tl.max(w), 0.0)
    scale = tl.div_rn(high - low, levels)
    scale = tl.where(scale < TINY, 1.0, scale)
    zero_point = _nearest(tl.div_rn(-low, scale), 0.0, levels)
    quantized = _nearest(tl.div_rn(w, scale), -zero_point, levels - zero_point) * scale
    tl.store(out_at + row * n + i, quantized, mask=i < n)


class _QuantizeWeight(torch.autograd.Function):
    """Of each output channel, from its least to its largest value; identity gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bit_width: int) -> Tensor:
        _, levels = integer_range(bit_width, "asymmetric", signed=True)
        quantized, n = torch.empty_like(weight), weight[0].numel()
        grid, block = (len(weight),), triton.next_power_of_2(n)
        _quantize_rows[grid](weight, quantized, float(levels), n, block)
        return quantized

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@triton.jit
def _normalise(  # type: ignore[no-untyped-def]
    w_at, gain_at, shift_at, mean_at, variance_at, weight_at, bias_at, eps, n, BLOCK: tl.constexpr
):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    scale = tl.load(gain_at + row) / tl.sqrt(tl.load(variance_at + row) + eps)
    w = tl.load(w_at + row * n + i, mask=i < n)
    tl.store(weight_at + row * n + i, w * scale, mask=i < n)
    tl.store(bias_at + row, tl.load(shift_at + row) - tl.load(mean_at + row) * scale)


@triton.jit
def _normalise_backward(  # type: ignore[no-untyped-def]
    w_at, gain_at, mean_at, variance_at, grad_weight_at, grad_bias_at, grad_w_at, grad_gain_at,
    eps, n, BLOCK: tl.constexpr,
):  # fmt: skip
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    unit = 1.0 / tl.sqrt(tl.load(variance_at + row) + eps)
    w = tl.load(w_at + row * n + i, mask=i < n, other=0.0)
    grad = tl.load(grad_weight_at + row * n + i, mask=i < n, other=0.0)
    tl.store(grad_w_at + row * n + i, grad * tl.load(gain_at + row) * unit, mask=i < n)
    of_scale = tl.sum(grad * w) - tl.load(grad_bias_at + row) * tl.load(mean_at + row)
    tl.store(grad_gain_at + row, of_scale * unit)


class _Normalise(torch.autograd.Function):
    """The weight and bias of :class:`baselines.quantization.batch_norms.NormalisedConv`."""

    @staticmethod
    def forward(
        ctx: Any, w: Tensor, gain: Tensor, shift: Tensor, mean: Tensor, variance: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        weight, bias, n = torch.empty_like(w), torch.empty_like(shift), w[0].numel()
        ctx.save_for_backward(w, gain, mean, variance)
        ctx.eps = eps
        _normalise[(len(w),)](
            w, gain, shift, mean, variance, weight, bias, eps, n, triton.next_power_of_2(n)
        )
        return weight, bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
        w, gain, mean, variance = ctx.saved_tensors
        grad_weight, n = _like(grad_weight, w), w[0].numel()
        grad_w, grad_gain = torch.empty_like(w), torch.empty_like(gain)
        _normalise_backward[(len(w),)](
            w, gain, mean, variance, grad_weight, grad_bias.contiguous(), grad_w, grad_gain,
            ctx.eps, n, triton.next_power_of_2(n),
        )  # fmt: skip
        return grad_w, grad_gain, grad_bias, None, None, None


@triton.jit
def _moments_backward(  # type: ignore[no-untyped-def]
    x_at, mean_at, grad_mean_at, grad_variance_at, out_at, channels, apart, share, n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = (i // apart) % channels
    x, mean = tl.load(x_at + i, mask=i < n), tl.load(mean_at + c)
    slope = 2 * tl.load(grad_variance_at + c)
    out = (slope * (x - mean) + tl.load(grad_mean_at + c)) * share
    tl.store(out_at + i, out, mask=i < n)


class _ChannelMoments(torch.autograd.Function):
    """:class:`baselines.training.bn_stats._ChannelMoments`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        out, n, channels = torch.empty_like(x), x.numel(), x.shape[1]
        _moments_backward[(triton.cdiv(n, BLOCK),)](
            x, mean, grad_mean.contiguous(), grad_variance.contiguous(), out,
            channels, x.stride(1), channels / n, n, BLOCK,
        )  # fmt: skip
        return out
