"""Linear interpolation of synthetic images."""

import operator
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from agm.errors import AgmValueError, check_argument, check_state
from agm.functional import check_batch, check_weight, interpolate, regions


class LinearInterpolation:
    """Mix each image with another one of its batch: x' = lerp(x, x[pi], lambda).

    pi is a random permutation and lambda ~ U(0, 1), one per sample, the weight of x[pi]. With
    ``regions`` lambda is one per pixel: 1 in a box at a random place, 0 elsewhere, the box's share
    of the image, before it is cut off at the border, being ~ U(0, 1) (see
    :func:`agm.functional.regions`); samples without pixels, (N, ...) of fewer than three
    dimensions, are mixed whole. All comes from a generator that this object owns (on the CPU, so
    that every device mixes alike); the global RNG is never touched.

    Args:
        seed: of that generator (default 0).
        regions: mix a box of the image in place of all of it (default False).

    Raises:
        AgmValueError: ``seed`` is not a whole number in [-2^63, 2^64).

    Source: Luo et al., IEEE TCSVT 2024, doi 10.1109/TCSVT.2024.3399311 (the idea); the boxes are
    those of Yun et al., "CutMix", ICCV 2019.
    """

    def __init__(self, *, seed: int = 0, regions: bool = False) -> None:
        wanted = "a whole number, at least -2^63 and below 2^64"
        check_argument("seed", seed, wanted, lambda x: -(2**63) <= operator.index(x) < 2**64)
        self._rng = torch.Generator("cpu").manual_seed(operator.index(seed))
        self.regions = regions

    @overload
    def __call__(self, images: Tensor, *, weight: Tensor | float | None = None) -> Tensor: ...
    @overload
    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        num_classes: int | None = None,
        weight: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]: ...
    def __call__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        num_classes: int | None = None,
        weight: Tensor | float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Interpolate a batch; with labels, mix them too: (1 - lambda) y + lambda y[pi].

        Where lambda is one per pixel, labels take the mean of it.

        Args:
            images: (N, ...), any floating dtype; not written to.
            labels: (N,) integers, which need ``num_classes``, or (N, C) probabilities.
            weight: lambda, (N,), (N, 1, *pixels) or a number, in place of the random one.

        Returns:
            Images of the same shape, dtype and memory format; with labels also (N, C) soft labels,
            those of integers in the images' dtype, float32 at least.

        Raises:
            AgmValueError: an empty batch, images that are not floating, labels or weights of
                another length or shape, a missing ``num_classes`` or (on the CPU) a label outside
                of it. Nothing has been drawn.
        """
        check_batch(images)
        targets = None if labels is None else _soft_labels(labels, images, num_classes)
        if weight is not None:
            if not isinstance(weight, Tensor) or not weight.ndim:
                number = "a number or a tensor"
                check_argument("weight", weight, number, lambda w: isinstance(float(w), float))
                weight = images.new_full((len(images),), float(weight))
            check_weight(weight, images)
        permutation = self._permutation(images)
        weight = (self._weight(images) if weight is None else weight).to(images)
        mixed = interpolate(images, permutation, weight)
        if targets is None:
            return mixed
        if weight.ndim > 1:
            weight = weight.to(targets).flatten(1).mean(1)
        return mixed, interpolate(targets, permutation, weight)

    def _permutation(self, images: Tensor) -> Tensor:
        """pi, (N,), on the images' device."""
        permutation = torch.randperm(len(images), generator=self._rng, device="cpu")
        # Our own draws, which nothing else writes to, need not wait for the device.
        return permutation.to(images.device, non_blocking=True)

    def _weight(self, images: Tensor) -> Tensor:
        """lambda, (N,) or one a pixel, on the images' device."""
        n, size = images.shape[0], images.shape[2:]
        draws: dict[str, Any] = {"generator": self._rng, "dtype": torch.float64, "device": "cpu"}
        weight = torch.rand(n, **draws)
        if self.regions and size:
            weight = regions(weight, torch.rand(n, len(size), **draws), size)
        return weight.to(images, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """The state of the random generator."""
        return {"rng": self._rng.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where :meth:`state_dict` was taken.

        Raises:
            AgmValueError: ``state`` lacks something; nothing has changed.
        """
        check_state(self, state, "rng")
        self._rng.set_state(state["rng"].cpu())  # torch.load may have moved it


def _soft_labels(labels: Tensor, images: Tensor, num_classes: int | None) -> Tensor:
    """(N, C) probabilities from (N,) integers or (N, C) probabilities."""
    n = images.shape[0]
    if not isinstance(labels, Tensor):
        raise AgmValueError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.is_floating_point():
        if labels.ndim != 2 or labels.shape[0] != n:
            raise AgmValueError(f"soft labels must be ({n}, C), got {tuple(labels.shape)}")
        return labels
    if labels.shape != (n,):
        raise AgmValueError(f"integer labels must be ({n},), got {tuple(labels.shape)}")
    if num_classes is None:
        raise AgmValueError("integer labels need num_classes=, the number of classes")
    classes = "a whole number >= 1"
    check_argument("num_classes", num_classes, classes, lambda c: operator.index(c) >= 1)
    try:
        return F.one_hot(labels.long(), num_classes).to(
            torch.promote_types(images.dtype, torch.float32)
        )
    except RuntimeError as error:  # raised on the CPU alone; other devices do not look at values
        raise AgmValueError(f"labels must lie in [0, {num_classes}): {error}") from error
