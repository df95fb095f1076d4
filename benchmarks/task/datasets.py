"""Labelled images for evaluation, a normalised batch at a time, and for our digits teacher."""

import hashlib
import math
import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from joblib import cpu_count
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.errors import DataError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DIGITS_MEAN = (0.5,)
DIGITS_STD = (0.5,)
DIGITS_TEST_FRACTION = 0.5
DIGITS_SPLIT_SEED = 0

# Decoded images of up to so many bytes stay in memory; more are read anew in every pass.
KEPT_BYTES = 2**29
# Pixels in a batch, within the bounds on its images: at 224 pixels a core's caches hold what 8 of
# them need, and not what 32 do, which take EfficientNet-Lite0 nearly twice as long an image.
BATCH_PIXELS = 2**18
BATCH_BOUNDS = (8, 250)
MAX_WORKERS = 4


@dataclass(frozen=True)
class Inputs:
    """How an image becomes what a network takes.

    Its shorter side is resized to ``resize`` pixels (antialiased), the centre cropped, and each
    channel's levels in [0, 1] become (level - mean) / std.

    Args:
        image_size: height and width S of the crop, >= 1.
        resize: >= S.
        interpolation: of the resize, a value of torchvision's ``InterpolationMode``.
        mean, std: of each channel, std > 0 (default: ImageNet's).

    Raises:
        DataError: one of them is out of range.
    """

    image_size: int
    resize: int
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise DataError(f"image_size must be >= 1, got {self.image_size}")
        if self.resize < self.image_size:
            raise DataError(f"resize must be >= image_size {self.image_size}, got {self.resize}")
        numbers = (*self.mean, *self.std)
        if len(self.mean) != len(self.std) or not all(map(math.isfinite, numbers)):
            raise DataError(
                f"mean and std must be finite, one number a channel; got {self.mean}, {self.std}"
            )
        if min(self.std) <= 0:
            raise DataError(f"std must be > 0, got {self.std}")

    def normalised(self, levels: Tensor, white: int = 255) -> Tensor:
        """uint8 (N, C, H, W), ``white`` for 1, as float32."""
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return levels.float().div_(white).sub_(mean).div_(std)


class Images:
    """Labelled images, iterated over as normalised batches (float32 (n, C, S, S), int64 (n,)).

    The first pass decodes them. Where all take at most ``KEPT_BYTES`` as uint8 they then stay in
    memory. More are read anew in every pass, ahead of the network by worker processes, as many as
    there are spare cores; memory is then bounded by the batch.

    Args:
        source: pairs of uint8 (C, S, S), or the DataError that reading it gave, and a label.
        labels: (N,), of all pairs in order.
        inputs: S, and how to normalise.
        identity: what tells these images from others.
        white: the level of 1.
    """

    def __init__(
        self,
        source: Dataset[tuple[Tensor | DataError, Any]],
        labels: Tensor,
        inputs: Inputs,
        *,
        identity: bytes,
        white: int = 255,
    ) -> None:
        self.source, self.labels, self.inputs, self.white = source, labels, inputs, white
        self.hash = hashlib.sha256(identity).hexdigest()[:16]
        low, high = BATCH_BOUNDS
        self.batch_size = max(low, min(high, BATCH_PIXELS // inputs.image_size**2))
        self._decoded: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self._decode() if self._decoded is None else self._decoded
        for levels, labels in zip(batches, self.labels.split(self.batch_size), strict=True):
            images = self.inputs.normalised(levels, self.white)
            yield images.contiguous(memory_format=torch.channels_last), labels

    def _decode(self) -> Iterator[Tensor]:
        size = len(self.labels) * len(self.inputs.mean) * self.inputs.image_size**2
        keep = size <= KEPT_BYTES
        loader = DataLoader(
            self.source,
            self.batch_size,
            num_workers=0 if keep else _workers(),
            collate_fn=_collated,
            worker_init_fn=_own_signals,
            generator=torch.Generator(),  # else a pass draws from the global one
        )
        kept = []
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            if keep:
                kept.append(batch)
            yield batch
        if keep:
            self._decoded = kept


def _workers() -> int:
    """A process for each core but one; none in a child process, whose siblings have the cores."""
    if multiprocessing.parent_process() is not None:
        return 0
    return min(cpu_count() - 1, MAX_WORKERS)


def _own_signals(_: int) -> None:
    """Ctrl-C reaches every process of a terminal, and the main one decides what it means.

    SIGTERM is how it ends its workers, whatever it does on SIGTERM itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _collated(pairs: list[tuple[Tensor | DataError, Any]]) -> Tensor | DataError:
    """A batch, or its first error, which would reach us as a traceback if a worker raised it."""
    levels = []
    for image, _ in pairs:
        if isinstance(image, DataError):
            return image
        levels.append(image)
    return torch.stack(levels)


DIGITS_INPUTS = Inputs(8, 8, mean=DIGITS_MEAN, std=DIGITS_STD)
DIGITS_WHITE = 16


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's handwritten digits, in a fixed stratified split without overlap.

    Returns:
        (train_images, train_labels, test_images, test_labels): 898 and 899 images, float32
        (N, 1, 8, 8) in [-1, 1], that is in [0, 1] before ``DIGITS_MEAN`` and ``DIGITS_STD``;
        labels int64 (N,) in [0, 10).
    """
    train, train_labels, test, test_labels = _digits_levels()
    train_images, test_images = (DIGITS_INPUTS.normalised(x, DIGITS_WHITE) for x in (train, test))
    return train_images, train_labels, test_images, test_labels


def digits_images() -> Images:
    """The test half of :func:`digits`."""
    _, _, levels, labels = _digits_levels()
    return Images(
        TensorDataset(levels, labels),
        labels,
        DIGITS_INPUTS,
        identity=levels.numpy().tobytes(),
        white=DIGITS_WHITE,
    )


def _digits_levels() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    parts = train_test_split(
        data.images,
        data.target,
        test_size=DIGITS_TEST_FRACTION,
        random_state=DIGITS_SPLIT_SEED,
        stratify=data.target,
    )
    train, test = (torch.from_numpy(x).byte().unsqueeze(1) for x in parts[:2])
    train_labels, test_labels = (torch.from_numpy(y).long() for y in parts[2:])
    return train, train_labels, test, test_labels
