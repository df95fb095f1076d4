"""Uniform fake quantization: ranges, step sizes, straight-through gradients, observers.

``scale`` is the step size: x ~ scale * (q - zero_point) with integer q in [qmin, qmax].
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from baselines.errors import ConfigError

SCHEMES = ("asymmetric", "symmetric")
STES = ("identity", "clipped")


def integer_range(bit_width: int, scheme: str, *, signed: bool) -> tuple[int, int]:
    """(qmin, qmax): unsigned 0..2^b - 1, or for signed symmetric +-(2^(b-1) - 1)."""
    if scheme == "symmetric" and signed:
        return -(2 ** (bit_width - 1) - 1), 2 ** (bit_width - 1) - 1
    return 0, 2**bit_width - 1


def scale_and_zero_point(
    low: Tensor, high: Tensor, bit_width: int, scheme: str, *, signed: bool
) -> tuple[Tensor, Tensor]:
    """Step size and zero point for ranges [low, high], which are widened to include 0.

    The zero point is an integer, held in the ranges' dtype; an empty range gets scale 1. Zero is
    always represented exactly, values inside the range to within half a step.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    qmin, qmax = integer_range(bit_width, scheme, signed=signed)
    if scheme == "symmetric":
        scale = torch.maximum(-low, high) / qmax
    else:
        scale = (high - low) / (qmax - qmin)
    # Below the smallest normal number a division by the scale would overflow.
    scale = torch.where(scale < torch.finfo(scale.dtype).tiny, torch.ones_like(scale), scale)
    if scheme == "symmetric":
        return scale, torch.zeros_like(scale)
    return scale, (qmin - low / scale).round().clamp(qmin, qmax)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        lower: Tensor | int,
        upper: Tensor | int,
        clipped: bool,
        nonnegative: bool,
    ) -> Tensor:
        if clipped:
            low = None if nonnegative else (lower - 0.5) * scale
            ctx.save_for_backward(x, low, (upper + 0.5) * scale)
        # Not in bfloat16, which rounds the quotients before they are rounded, and is slower.
        wide = torch.promote_types(x.dtype, torch.float32)
        steps = x.div(scale) if x.dtype == wide else x.to(wide).div_(scale)
        return steps.round_().clamp_(lower, upper).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.saved_tensors:
            # A mask by threshold_backward: vectorised on the CPU, where torch.where is 30x slower.
            x, low, high = ctx.saved_tensors
            if low is not None:
                grad = torch.ops.aten.threshold_backward(grad, x - low.to(x), 0)
            grad = torch.ops.aten.threshold_backward(grad, high.to(x) - x, 0)
        return grad, None, None, None, None, None


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | int,
    qmin: int,
    qmax: int,
    *,
    ste: str = "identity",
    nonnegative: bool = False,
) -> Tensor:
    """scale * (clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point), in x's dtype.

    Args:
        x: any shape; ``scale`` and ``zero_point`` broadcast against it.
        ste: the gradient towards x. ``"identity"`` passes it all; ``"clipped"`` passes it where
            x rounds into [qmin, qmax] and blocks it elsewhere.
        nonnegative: x and qmin - zero_point are known to be >= 0 and 0: nothing is below the range,
            and the clipped gradient is cheaper by half.
    """
    lower, upper = qmin - zero_point, qmax - zero_point
    return _FakeQuantize.apply(x, scale, lower, upper, ste == "clipped", nonnegative)


class WeightQuantizer(nn.Module):
    """Parametrization of a weight: per output channel (dim 0), min-max of the latent weight."""

    def __init__(self, bit_width: int, scheme: str) -> None:
        super().__init__()
        self.bit_width, self.scheme = bit_width, scheme

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            # Two reductions; aminmax knows one dimension and is much slower on the CPU.
            channel = tuple(range(1, weight.ndim))
            low, high = weight.amin(channel, keepdim=True), weight.amax(channel, keepdim=True)
            scale, zero_point = scale_and_zero_point(
                low, high, self.bit_width, self.scheme, signed=True
            )
        qmin, qmax = integer_range(self.bit_width, self.scheme, signed=True)
        # Nothing lies outside a min-max range, so both straight-through gradients are the identity.
        return fake_quantize(weight, scale, zero_point, qmin, qmax)

    def extra_repr(self) -> str:
        return f"bit_width={self.bit_width}, scheme={self.scheme}, per_channel=True"


def _sample(x: Tensor, size: int = 2**16) -> Tensor:
    """About ``size`` values of x in float32; an odd stride, so that no channel is favoured."""
    flat = x.flatten()
    return flat[:: (flat.numel() // size) | 1].float()


def range_max(x: Tensor, _bit_width: int) -> Tensor:
    """The largest value."""
    return x.max().float()


def range_percentile(x: Tensor, _bit_width: int) -> Tensor:
    """The 99.9th percentile."""
    return torch.quantile(_sample(x), 0.999)


def range_mse(x: Tensor, bit_width: int) -> Tensor:
    """The clip in {1%, 2%, ..., 100%} of the largest value with the least squared error."""
    x, qmax = _sample(x, 2**14), 2**bit_width - 1
    clips = x.max() * torch.linspace(0.01, 1, 100, device=x.device)
    scale = (clips / qmax).clamp(min=torch.finfo(x.dtype).tiny)[:, None]
    errors = ((x / scale).round_().clamp_(0, qmax) * scale - x).square_().mean(1)
    return clips[errors.argmin()]


RANGE_ESTIMATORS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "max": range_max,
    "percentile": range_percentile,
    "mse": range_mse,
}


class ActivationQuantizer(nn.Module):
    """Per-tensor fake quantization of a non-negative activation, unsigned, zero_point 0.

    While observing, the range's upper end is a bias-corrected average (decay 0.9) of the
    estimator's value for each batch; afterwards it is frozen.
    """

    decay = 0.9

    def __init__(self, bit_width: int, *, ste: str, range_estimator: str) -> None:
        super().__init__()
        self.bit_width, self.ste, self.range_estimator = bit_width, ste, range_estimator
        self.observing = False
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("batches", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take one batch into the range."""
        high = RANGE_ESTIMATORS[self.range_estimator](x, self.bit_width)
        self.average.lerp_(high, 1 - self.decay)
        self.batches += 1
        high = self.average / (1 - self.decay**self.batches)
        scale, _ = scale_and_zero_point(
            torch.zeros_like(high), high, self.bit_width, "asymmetric", signed=False
        )
        self.scale.copy_(scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.observing:
            self.observe(x)
        qmin, qmax = integer_range(self.bit_width, "asymmetric", signed=False)
        # A zero_point known beforehand keeps the clamp's bounds numbers, ten times faster in bf16.
        return fake_quantize(x, self.scale, 0, qmin, qmax, ste=self.ste, nonnegative=True)

    def extra_repr(self) -> str:
        return f"bit_width={self.bit_width}, ste={self.ste}, range_estimator={self.range_estimator}"


@contextmanager
def observing(student: nn.Module) -> Iterator[None]:
    """While inside, the student's activation quantizers learn their ranges from what they see."""
    quantizers = [m for m in student.modules() if isinstance(m, ActivationQuantizer)]
    try:
        for quantizer in quantizers:
            quantizer.observing = True
        yield
    finally:
        for quantizer in quantizers:
            quantizer.observing = False


def check_bits(name: str, bits: int) -> None:
    """Raise :class:`ConfigError` unless bits is an integer in 2..8."""
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ConfigError(f"{name} must be a whole number from 2 to 8, got {bits!r}")


def check_choice(name: str, value: str, choices: Any) -> None:
    """Raise :class:`ConfigError` unless value is one of the choices."""
    if value not in tuple(choices):
        raise ConfigError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
