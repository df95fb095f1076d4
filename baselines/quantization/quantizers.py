"""Uniform fake quantization: ranges, step sizes, straight-through gradients, observers.

``scale`` is the step size: x ~ scale * (q - zero_point) with integer q in [qmin, qmax].
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from baselines.errors import ConfigError, UnsupportedLayerError

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
        # Not in bfloat16, which rounds the quotients before they are rounded, and is slower.
        wide = torch.promote_types(x.dtype, torch.float32)
        steps = x.div(scale) if x.dtype == wide else x.to(wide).div_(scale)
        quantized = steps.round_().clamp_(lower, upper).mul_(scale).to(x.dtype)
        if clipped:
            low = None if nonnegative else (lower - 0.5) * scale
            learned = (scale, quantized) if ctx.needs_input_grad[1] else ()
            ctx.save_for_backward(x, low, (upper + 0.5) * scale, *learned)
        return quantized

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inside, grad_scale = grad, None
        if ctx.saved_tensors:
            # A mask by threshold_backward: vectorised on the CPU, where torch.where is 30x slower.
            x, low, high, *learned = ctx.saved_tensors
            if low is not None:
                inside = torch.ops.aten.threshold_backward(inside, x - low.to(x), 0)
            inside = torch.ops.aten.threshold_backward(inside, high.to(x) - x, 0)
            if learned:
                scale, quantized = learned
                grad_scale = (_inner(grad, quantized) - _inner(inside, x)) / scale
        return inside, grad_scale, None, None, None, None


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """The sum of the products, in float32 at least."""
    return (a * b).sum(dtype=torch.promote_types(a.dtype, torch.float32))


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
            x rounds into [qmin, qmax] and blocks it elsewhere, and reaches a scale of one number
            too, with the zero point held: (quantized - x) / scale inside, quantized / scale outside
            (Esser et al., "Learned Step Size Quantization", ICLR 2020).
        nonnegative: x and qmin - zero_point are known to be >= 0 and 0: nothing is below the range,
            and the clipped gradient is cheaper.
    """
    lower, upper = qmin - zero_point, qmax - zero_point
    return _FakeQuantize.apply(x, scale, lower, upper, ste == "clipped", nonnegative)


class WeightQuantizer(nn.Module):
    """Parametrization of a weight w: fake_quantize(w, scale, zero_point), identity gradient.

    The range of each output channel is [min w, max w], or for ``"symmetric"`` +-max |w|.

    Args:
        bit_width, scheme: of the integers.
        transposed_groups: of a transposed convolution, whose weights are (in, out / groups, ...);
            None for (out, ...).
    """

    def __init__(self, bit_width: int, scheme: str, transposed_groups: int | None = None) -> None:
        super().__init__()
        self.bit_width, self.scheme = bit_width, scheme
        self.transposed_groups = transposed_groups
        self.enabled = True
        self.remembering = False
        self.remembered: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled:
            return weight
        if self.remembered is not None:
            return self.remembered
        quantized = self._quantized(weight)
        if self.remembering and torch.is_grad_enabled():  # else it would have no graph
            self.remembered = quantized
        return quantized

    def _quantized(self, weight: Tensor) -> Tensor:
        scale, zero_point = self.scale_and_zero_point(weight)
        qmin, qmax = integer_range(self.bit_width, self.scheme, signed=True)
        # Nothing lies outside a min-max range, so both straight-through gradients are the identity.
        return fake_quantize(weight, scale, zero_point, qmin, qmax)

    @torch.no_grad()
    def scale_and_zero_point(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Of each output channel, in a shape that broadcasts against the latent ``weight``."""
        groups = self.transposed_groups
        # Two reductions; aminmax knows one dimension and is much slower on the CPU.
        if groups is None:
            channel = tuple(range(1, weight.ndim))
            low, high = weight.amin(channel, keepdim=True), weight.amax(channel, keepdim=True)
        else:
            split = weight.unflatten(0, (groups, -1))  # (groups, in / groups, out / groups, ...)
            channel = (1, *range(3, split.ndim))
            ends = split.amin(channel, keepdim=True), split.amax(channel, keepdim=True)
            shape = -1, split.shape[1], *(-1,) * (weight.ndim - 1)
            low, high = (end.expand(shape).flatten(0, 1) for end in ends)
        return scale_and_zero_point(low, high, self.bit_width, self.scheme, signed=True)

    def extra_repr(self) -> str:
        return f"bit_width={self.bit_width}, scheme={self.scheme}, per_channel=True"


def _sample(x: Tensor, size: int = 2**16) -> Tensor:
    """About ``size`` values of x in float32.

    At a stride that has no divisor in common with x's sizes, so that all channels and places count.
    """
    flat = x.flatten()
    stride = max(1, flat.numel() // size)
    while math.gcd(stride, flat.numel()) > 1:
        stride += 1
    return flat[::stride].float()


def range_max(x: Tensor, _bit_width: int, _scheme: str) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value."""
    low, high = x.aminmax()
    return low.float(), high.float()


def range_percentile(x: Tensor, _bit_width: int, _scheme: str) -> tuple[Tensor, Tensor]:
    """The percentiles 0.1, where anything is below 0, and 99.9."""
    x = _sample(x)
    return torch.quantile(x, 0.001), torch.quantile(x, 0.999)


def range_mse(x: Tensor, bit_width: int, scheme: str) -> tuple[Tensor, Tensor]:
    """The range with the least squared error.

    Its upper end is one of {1%, 2%, ..., 100%} of the largest value; then, where anything is below
    0, its lower end is one of {0%, 1%, ..., 100%} of the smallest. Symmetric, both ends there are
    one of {1%, 2%, ..., 100%} of the largest magnitude.
    """
    x = _sample(x, 2**14)
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    shares = torch.linspace(0.01, 1, 100, device=x.device)
    if low and scheme == "symmetric":
        ends = torch.maximum(high, -low) * shares
        end = ends[_squared_errors(x, -ends, ends, bit_width, scheme, signed=True).argmin()]
        return -end, end
    highs = high * shares
    best = highs[_squared_errors(x, low.expand(100), highs, bit_width).argmin()]
    if low:
        lows = low * torch.linspace(0, 1, 101, device=x.device)
        low = lows[_squared_errors(x, lows, best.expand(101), bit_width).argmin()]
    return low, best


def _squared_errors(
    x: Tensor, low: Tensor, high: Tensor, bit_width: int, scheme: str = "asymmetric",
    *, signed: bool = False,
) -> Tensor:  # fmt: skip
    """The mean squared error of ``x``, (N,), quantized to each of the ranges, (R,) -> (R,)."""
    scale, zero_point = scale_and_zero_point(low, high, bit_width, scheme, signed=signed)
    scale, zero_point = scale[:, None], zero_point[:, None]
    qmin, qmax = integer_range(bit_width, scheme, signed=signed)
    steps = (x / scale).round_().maximum(qmin - zero_point).minimum(qmax - zero_point)
    return (steps * scale - x).square_().mean(1)


# (values, bit width, scheme) -> (low, high)
RANGE_ESTIMATORS: dict[str, Callable[[Tensor, int, str], tuple[Tensor, Tensor]]] = {
    "max": range_max,
    "percentile": range_percentile,
    "mse": range_mse,
}


class ActivationQuantizer(nn.Module):
    """Per-tensor fake quantization of an activation.

    While observing, the ends of the range are bias-corrected averages (decay 0.9) of the
    estimator's values for each batch; afterwards they are frozen, and before, activations pass as
    they are. Unsigned with zero point 0 where the range has nothing below zero; else asymmetric
    with a zero point, or, symmetric, signed without. A learned step is the observed one times
    exp(log_gain), a parameter that starts at 0.

    Args:
        bit_width, scheme, ste, range_estimator, learned_steps: see :class:`QuantizationConfig`.
        nonnegative: known beforehand of the activation, which makes the gradient cheaper.
    """

    decay = 0.9

    def __init__(
        self, bit_width: int, *, scheme: str, ste: str, range_estimator: str,
        learned_steps: bool = False, nonnegative: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.bit_width, self.scheme, self.ste = bit_width, scheme, ste
        self.range_estimator, self.nonnegative = range_estimator, nonnegative
        self.enabled, self.observing = True, False
        self.register_buffer("averages", torch.zeros(2))  # of the lower and the upper end
        self.register_buffer("batches", torch.zeros(()))
        self.register_buffer("observed_scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros(()))
        self.log_gain = nn.Parameter(torch.zeros(())) if learned_steps else None
        self._known: tuple[Any, ...] = ()

    @property
    def scale(self) -> Tensor:
        """The step size, > 0."""
        if self.log_gain is None:
            return self.observed_scale
        return self.observed_scale * self.log_gain.exp()

    @property
    def signed(self) -> bool:
        """Whether the range has something below zero, and is symmetric: +-qmax around 0."""
        return self.scheme == "symmetric" and bool(self.averages[0] < 0)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take one batch into the range."""
        low, high = RANGE_ESTIMATORS[self.range_estimator](x, self.bit_width, self.scheme)
        if self.scheme == "symmetric" and low < 0:
            high = torch.maximum(high, -low)
        self.averages.lerp_(torch.stack([low.clamp(max=0), high]), 1 - self.decay)
        self.batches += 1
        low, high = self.averages / (1 - self.decay**self.batches)
        scheme = "symmetric" if self.signed else "asymmetric"
        scale, zero_point = scale_and_zero_point(
            low, high, self.bit_width, scheme, signed=self.signed
        )
        self.observed_scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def bounds(self) -> tuple[int, int, int]:
        """(qmin, qmax, zero_point) as numbers, with which a clamp is much faster in bf16."""
        return self._read()[0]

    def _read(self) -> tuple[tuple[int, int, int], bool]:
        """The bounds, and whether anything was observed, read from the device once a change."""
        known = self.zero_point
        # A tensor of inference mode counts no changes.
        state = None if known.is_inference() else (id(known), known._version)
        if state is None or not self._known or self._known[0] != state:
            scheme = "symmetric" if self.signed else "asymmetric"
            qmin, qmax = integer_range(self.bit_width, scheme, signed=self.signed)
            if not bool(self.averages.isfinite().all()):
                low, high = (self.averages / (1 - self.decay**self.batches)).tolist()
                raise UnsupportedLayerError(
                    "an activation that is to be quantized has values that are not finite: its "
                    f"range is [{low:.4g}, {high:.4g}]; look at the network's activations for "
                    "random images"
                )
            self._known = (state, (qmin, qmax, int(self.zero_point)), bool(self.batches > 0))
        return self._known[1:]

    def forward(self, x: Tensor) -> Tensor:
        if self.observing:
            self.observe(x)
        if not self.enabled:
            return x
        (qmin, qmax, zero_point), observed = self._read()
        if not observed:
            return x
        return fake_quantize(
            x, self.scale, zero_point, qmin, qmax, ste=self.ste, nonnegative=self.nonnegative
        )

    def extra_repr(self) -> str:
        steps = "learned" if self.log_gain is not None else "frozen"
        return (
            f"bit_width={self.bit_width}, ste={self.ste}, range_estimator={self.range_estimator}, "
            f"steps={steps}"
        )


Quantizer = WeightQuantizer | ActivationQuantizer


def quantizers(student: nn.Module) -> list[Quantizer]:
    """Those of a student, of weights and of activations."""
    return [m for m in student.modules() if isinstance(m, Quantizer)]


@contextmanager
def observing(student: nn.Module) -> Iterator[None]:
    """While inside, the student's activation quantizers learn their ranges from what they see."""
    with _switched(student, ActivationQuantizer, "observing", True):
        yield


@contextmanager
def unquantized(student: nn.Module) -> Iterator[None]:
    """While inside, the student computes with latent weights and with activations as they are."""
    with _switched(student, Quantizer, "enabled", False):
        yield


@contextmanager
def weights_quantized_once(student: nn.Module) -> Iterator[None]:
    """While inside, every forward uses the weights that the first one quantized, with their graph.

    As torch's ``parametrize.cached``, which is one cache for all threads and their networks.
    """
    try:
        with _switched(student, WeightQuantizer, "remembering", True):
            yield
    finally:
        for quantizer in quantizers(student):
            quantizer.remembered = None


@contextmanager
def _switched(student: nn.Module, kinds: Any, name: str, value: bool) -> Iterator[None]:
    chosen = [q for q in quantizers(student) if isinstance(q, kinds)]
    before = [getattr(q, name) for q in chosen]
    try:
        for quantizer in chosen:
            setattr(quantizer, name, value)
        yield
    finally:
        for quantizer, old in zip(chosen, before, strict=True):
            setattr(quantizer, name, old)


def check_bits(name: str, bits: int) -> None:
    """Raise :class:`ConfigError` unless bits is an integer in 2..8."""
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ConfigError(f"{name} must be a whole number from 2 to 8, got {bits!r}")


def check_choice(name: str, value: str, choices: Any) -> None:
    """Raise :class:`ConfigError` unless value is one of the choices."""
    if value not in tuple(choices):
        raise ConfigError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
