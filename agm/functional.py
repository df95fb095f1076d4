"""Pure functions: discrepancies between two networks, Gaussian margins, interpolation.

The formulas of the Gaussian margin are this project's own reading of Luo et al., "Learning to
Generate Diverse Data From a Temporal Perspective for Data-Free Quantization", IEEE TCSVT 2024,
doi 10.1109/TCSVT.2024.3399311, whose abstract fixes the idea and not the constants.

Half-precision inputs are computed in float32 and returned in their own dtype. Shapes are checked,
values never are: a non-finite input gives a non-finite output, but for a margin on an infinite
discrepancy, which is 0, and for the softmax of a logit of -inf, which is 0, too.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agm.errors import AgmValueError

Discrepancy = Callable[[Tensor, Tensor], Tensor]


def at_least_float32(tensor: Tensor) -> Tensor:
    """``tensor`` itself in float32 or float64, a float32 copy of anything narrower."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_logits(teacher_logits: Tensor, student_logits: Tensor) -> None:
    """Raise :class:`AgmValueError` unless both are floating, of one shape (N, C), N, C >= 1."""
    if not (isinstance(teacher_logits, Tensor) and isinstance(student_logits, Tensor)):
        kinds = type(teacher_logits).__name__, type(student_logits).__name__
        raise AgmValueError(
            f"logits must be tensors, got {kinds[0]} and {kinds[1]}; take them out of what the "
            "networks return"
        )
    shape, other = tuple(teacher_logits.shape), tuple(student_logits.shape)
    if shape != other:
        raise AgmValueError(
            f"logits differ in shape: teacher {shape}, student {other}; "
            "give both networks the same images and classes"
        )
    if len(shape) != 2 or 0 in shape:
        raise AgmValueError(f"logits must be (N, C) with N, C >= 1, got {shape}")
    if not (teacher_logits.is_floating_point() and student_logits.is_floating_point()):
        raise AgmValueError(
            f"logits must be floating point, got {teacher_logits.dtype} and {student_logits.dtype}"
        )


DISCREPANCIES: dict[str, Discrepancy] = {}


def _discrepancy(formula: Discrepancy) -> Discrepancy:
    """Give ``formula`` the checks and the dtype rule that all discrepancies share, and enter it."""

    def checked(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        check_logits(teacher_logits, student_logits)
        dtype = torch.promote_types(teacher_logits.dtype, student_logits.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return formula(teacher_logits.to(wide), student_logits.to(wide)).to(dtype)

    checked.__name__ = checked.__qualname__ = formula.__name__
    checked.__doc__ = f"""{(formula.__doc__ or "").rstrip()}

    In the wider dtype of the two. Raises AgmValueError unless both are floating, of one shape
    (N, C), N, C >= 1.
    """
    DISCREPANCIES[formula.__name__] = checked
    return checked


@_discrepancy
def logit_l1(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Mean absolute difference, mean_c |P - Q|, (N, C) -> (N,), in logit units, in [0, inf)."""
    return (teacher_logits - student_logits).abs().mean(1)


@_discrepancy
def logit_l2(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Root mean square difference, sqrt(mean_c (P - Q)^2), (N, C) -> (N,), in logit units.

    In [0, inf). Its gradient where both agree is 0.
    """
    difference = teacher_logits - student_logits
    return torch.linalg.vector_norm(difference, dim=1) / math.sqrt(difference.shape[1])


@_discrepancy
def kl_divergence(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)), (N, C) -> (N,), in nats, in [0, inf)."""
    log_p, log_q = F.log_softmax(teacher_logits, 1), F.log_softmax(student_logits, 1)
    # Rounding can push a divergence of nearly equal distributions just below 0.
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1).clamp(min=0)


@_discrepancy
def js_divergence(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence of the softmaxes, (N, C) -> (N,), in nats, in [0, ln 2].

    (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2.
    """
    log_p, log_q = F.log_softmax(teacher_logits, 1), F.log_softmax(student_logits, 1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    to_middle = F.kl_div(log_m, log_p, reduction="none", log_target=True)
    to_middle = to_middle + F.kl_div(log_m, log_q, reduction="none", log_target=True)
    return (to_middle.sum(1) / 2).clamp(min=0)


@_discrepancy
def total_variation(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Half the L1 distance of the softmaxes, sum_c |p - q| / 2, (N, C) -> (N,), in [0, 1]."""
    difference = F.softmax(teacher_logits, 1) - F.softmax(student_logits, 1)
    return difference.abs().sum(1) / 2


def resolve_discrepancy(discrepancy: str | Discrepancy) -> Discrepancy:
    """The function behind a name of :data:`DISCREPANCIES`, or a callable as it is.

    Raises:
        AgmValueError: there is no such name.
    """
    if callable(discrepancy):
        return discrepancy
    if not isinstance(discrepancy, str) or discrepancy not in DISCREPANCIES:
        raise AgmValueError(
            f"unknown discrepancy {discrepancy!r}; "
            f"choose one of {', '.join(DISCREPANCIES)} or pass a callable"
        )
    return DISCREPANCIES[discrepancy]


def measure(discrepancy: Discrepancy, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """``discrepancy`` of the logits (N, C), in float32 at least.

    Raises:
        AgmValueError: logits as in :func:`check_logits`, or another result than (N,).
    """
    check_logits(teacher_logits, student_logits)
    d = discrepancy(at_least_float32(teacher_logits), at_least_float32(student_logits))
    if not isinstance(d, Tensor) or d.shape != teacher_logits.shape[:1]:
        raise AgmValueError(
            f"the discrepancy must return ({teacher_logits.shape[0]},), one value a sample; "
            f"it returned {tuple(d.shape) if isinstance(d, Tensor) else repr(d)}"
        )
    return at_least_float32(d)


def _standardised(excess: Tensor, std: Tensor) -> Tensor:
    """excess / std; 40 is as good as infinity in every dtype, and 0 / 0 is 0."""
    return (excess / std).nan_to_num(0.0, posinf=40.0, neginf=-40.0)


def margin_parts(excess: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Phi(z) and phi(z) at z = excess / std, the derivatives of :func:`expected_margin` with
    respect to the margin's mean and to its std, of the shape that both broadcast to.
    """
    z = _standardised(excess, std)
    below = torch.special.erfc(z / -math.sqrt(2)) / 2
    return below, torch.exp(z * z / -2) / math.sqrt(2 * math.pi)


class _GaussianHinge(torch.autograd.Function):
    """E[max(0, excess + std * N(0, 1))], element by element, for tensors of one shape and dtype."""

    generate_vmap_rule = True

    @staticmethod
    def forward(excess: Tensor, std: Tensor) -> Tensor:
        # std * (phi(z) + z Phi(z)) = max(excess, 0) + std * (phi(z) - |z| Phi(-|z|)), where with
        # u = |z| / sqrt(2) no cancellation is left: 2 Phi(-|z|) = exp(-u^2) erfcx(u).
        u = _standardised(excess, std).abs() / math.sqrt(2)
        tail = 1 / math.sqrt(2 * math.pi) - u * torch.special.erfcx(u) / math.sqrt(2)
        return excess.clamp(min=0) + std * (torch.exp(-u * u) * tail)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        below, density = margin_parts(*ctx.saved_tensors)
        return grad * below, grad * density


def _widen(
    discrepancy: Tensor, mean: float | Tensor, std: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The three as float32-or-wider tensors of one dtype and shape."""
    if not discrepancy.is_floating_point():
        raise AgmValueError(f"the discrepancy must be floating point, got {discrepancy.dtype}")
    d = at_least_float32(discrepancy)
    d, mu, sigma = torch.broadcast_tensors(
        d,
        *(
            v.to(device=d.device, dtype=d.dtype)
            if isinstance(v, Tensor)
            else d.new_full((), v)  # a fill, not a copy from the host
            for v in (mean, std)
        ),
    )
    return d, mu, sigma


def expected_margin(discrepancy: Tensor, mean: float | Tensor, std: float | Tensor) -> Tensor:
    """Expected Gaussian-margin loss, E[max(0, m - d)] for m ~ N(mean, std^2).

    With z = (mean - d) / std it equals std * (phi(z) + z * Phi(z)); its gradient with respect to d
    is -Phi(z): full supervision where d is far below the margin, almost none beyond it. std = 0 is
    the plain hinge (gradient -1/2 at the kink).

    Args:
        discrepancy: d, any shape, usually (N,), >= 0.
        mean: of the margin, in units of d; a number or a tensor that broadcasts.
        std: of the margin, >= 0, likewise. Gradients reach all three, in reverse mode (what has a
            forward mode of its own torch.compile does not take).

    Returns:
        The loss, non-negative, non-increasing and convex in d, of d's dtype. d = inf gives 0, NaN
        stays NaN. The tail is accurate to about 1e-6 of std in float32 at any z.

    Raises:
        AgmValueError: a discrepancy that is not floating.
    """
    d, mu, sigma = _widen(discrepancy, mean, std)
    return _GaussianHinge.apply(mu - d, sigma).to(discrepancy.dtype)


def margin_and_slope(d: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`expected_margin` and Phi(z), for a mean and a std that no gradient reaches.

    As (mean - d) Phi(z) + std phi(z), its two derivatives held: what they would add to the gradient
    cancels. It takes two thirds of the other's time, is for first derivatives, and in the tail it
    is accurate to rounding of std, and no better.
    """
    # Not -inf, whose product with Phi = 0 is NaN.
    excess = (mean - d).clamp(min=torch.finfo(d.dtype).min)
    below, density = margin_parts(excess.detach(), std)
    return torch.addcmul(std * density, excess, below), below


def sampled_margin(
    discrepancy: Tensor, mean: float | Tensor, std: float | Tensor, noise: Tensor
) -> Tensor:
    """Gaussian-margin loss for drawn margins, max(0, mean + std * noise - d).

    Args:
        discrepancy, mean, std: as in :func:`expected_margin`.
        noise: standard normal draws of d's shape.

    Returns:
        The loss, of d's shape and dtype; over the noise its mean is :func:`expected_margin`.

    Raises:
        AgmValueError: noise of another shape, or a discrepancy that is not floating.
    """
    if noise.shape != discrepancy.shape:
        raise AgmValueError(
            f"noise must have the discrepancy's shape {tuple(discrepancy.shape)}, "
            f"got {tuple(noise.shape)}"
        )
    d, mu, sigma = _widen(discrepancy, mean, std)
    return F.relu(mu + sigma * noise.to(d) - d).to(discrepancy.dtype)


def regions(share: Tensor, centre: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolation weights that replace a region of each image: 1 inside a box, 0 outside.

    In each of the D dimensions the box has the side share^(1/D) of the image's and is cut off at
    its border; a pixel is inside if its middle is.

    Args:
        share: (N,), in [0, 1], of the image that a box covers where it is not cut off.
        centre: (N, D), in [0, 1], of the image's sides.
        size: (D,), of an image in pixels.

    Returns:
        (N, 1, *size), in the dtype of ``share``; for D >= 1 :func:`interpolate`'s ``weight``.

    Raises:
        AgmValueError: share or centre of another shape.

    Source: Yun et al., "CutMix", ICCV 2019.
    """
    if share.ndim != 1 or centre.shape != (len(share), len(size)):
        raise AgmValueError(
            f"share must be (N,) and centre (N, {len(size)}) for images of {tuple(size)} pixels, "
            f"got {tuple(share.shape)} and {tuple(centre.shape)}"
        )
    half = at_least_float32(share) ** (1 / max(1, len(size))) / 2
    inside = torch.ones(len(share), 1, *size, dtype=torch.bool, device=share.device)
    for i, pixels in enumerate(size):
        middles = (torch.arange(pixels, dtype=half.dtype, device=share.device) + 0.5) / pixels
        along = (middles - centre[:, i, None].to(half)).abs() < half[:, None]
        inside = inside & along.view(-1, 1, *(pixels if i == j else 1 for j in range(len(size))))
    return inside.to(share.dtype)


def interpolate(images: Tensor, permutation: Tensor, weight: Tensor) -> Tensor:
    """Linear interpolation of a batch with a permutation of itself.

    x' = lerp(x, x[permutation], weight)

    Args:
        images: x, (N, ...), any floating dtype; also soft labels (N, C).
        permutation: (N,) integers.
        weight: (N,), the share of x[permutation], in [0, 1] for the convex hull; or one a pixel,
            (N, 1, ...) for images (N, channels, ...). It is rounded to x's dtype.

    Returns:
        A new tensor of x's shape, dtype and memory format. Weights 0 and 1 give back x and
        x[permutation] exactly where the difference of both is finite.

    Raises:
        AgmValueError: an empty batch, images that are not floating, or a permutation or weight of
            another shape.

    Source: Luo et al. (the module's), the idea; lambda's law is the caller's.
    """
    check_batch(images)
    check_weight(weight, images)
    n = images.shape[0]
    if permutation.shape != (n,):
        raise AgmValueError(
            f"permutation must be ({n},) for this batch, got {tuple(permutation.shape)}"
        )
    if weight.ndim == 1:
        weight = weight.view(-1, *(1,) * (images.ndim - 1))
    return torch.lerp(images, images[permutation.long()], weight.to(images))


def check_batch(images: Tensor) -> None:
    """Raise :class:`AgmValueError` unless these are floating, (N, ...) with N >= 1."""
    if not images.ndim or not images.shape[0]:
        raise AgmValueError(f"need a batch (N, ...) with N >= 1, got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise AgmValueError(f"images must be floating point, got {images.dtype}")


def check_weight(weight: Tensor, images: Tensor) -> None:
    """Raise :class:`AgmValueError` unless it is (N,) or, for images with pixels, one of each."""
    n = images.shape[0]
    a_pixel = (n, 1, *images.shape[2:]) if images.ndim > 2 else (n,)
    if weight.shape not in ((n,), a_pixel):
        pixels = f" or, one a pixel, {a_pixel}" if images.ndim > 2 else ""
        raise AgmValueError(
            f"weight must be ({n},){pixels} for this batch, got {tuple(weight.shape)}"
        )
