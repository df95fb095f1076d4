"""Labelled images for evaluation, a normalised batch at a time, and for our digits teacher."""

import contextlib
import hashlib
import math
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import datasets as tv
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

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
# them need, and EfficientNet-Lite0 takes 19 ms an image, but 35 in batches of 32.
BATCH_PIXELS = 2**18
BATCH_BOUNDS = (8, 250)
MAX_WORKERS = 4

# Those whose extensions torchvision's ImageFolder knows.
_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


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
        self.pixels = len(labels) * inputs.image_size**2
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
        keep = self.pixels * len(self.inputs.mean) <= KEPT_BYTES
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
    return min(len(os.sched_getaffinity(0)) - 1, MAX_WORKERS)


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


def class_names(path: str | os.PathLike[str]) -> list[str]:
    """The class folders inside ``path`` in label order, which is alphabetical; hidden ones are not.

    Raises:
        DataError: ``path`` is missing, is no directory, cannot be read or has no class folders.
    """
    try:
        with os.scandir(path) as entries:
            names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise DataError(
            f"cannot read the image folder {os.fspath(path)!r}: {error.strerror}; "
            "pass a directory with one subfolder of images per class"
        ) from error
    if not names:
        raise DataError(
            f"no class subfolders in {os.fspath(path)!r}; expected one subfolder of images "
            "per class, as in PATH/cat/1.png: sort them so, or leave them out (on the command line "
            "--data), and no accuracy is measured"
        )
    return names


class _Folder(tv.ImageFolder):
    """torchvision's, but every file that is not hidden must be an image, whatever its name."""

    def __init__(self, path: str, inputs: Inputs) -> None:
        def visible(file: str) -> bool:
            return not any(part.startswith(".") for part in Path(file).relative_to(path).parts)

        super().__init__(
            path,
            loader=partial(_levels_or_error, inputs=inputs),
            is_valid_file=visible,
            allow_empty=True,
        )

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names = class_names(directory)
        return names, {name: label for label, name in enumerate(names)}


def image_folder(
    path: str | os.PathLike[str], inputs: Inputs, *, num_classes: int | None = None
) -> Images:
    """A folder in torchvision's ImageFolder layout, ``path/CLASS/**/IMAGE``, in its order.

    Unlike ImageFolder, which skips files by their extension, every file inside a class folder must
    be an image, except for hidden ones. Every file's header is read now, its pixels in the first
    pass over the images. Their ``hash`` is over the files' names inside ``path`` and their sizes in
    bytes, not over their contents or times: a file that is replaced by one as long goes unnoticed.

    Args:
        path: a directory with one subfolder per class; see :func:`class_names` for their order.
        inputs: what becomes of an image; 3 channels.
        num_classes: how many class folders there must be (default: any number).

    Returns:
        Images (3, S, S), and labels in [0, number of class folders).

    Raises:
        DataError: the folder, or a class in it, is missing, unreadable or empty; the number of
            class folders is not ``num_classes``; a file is not a readable image, which the first
            pass over the images says where the header is whole.
    """
    path = os.fspath(path)
    names = class_names(path)
    if num_classes is not None and len(names) != num_classes:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise DataError(
            f"{path!r} has {len(names)} class folders ({shown}), expected {num_classes}:"
            " pass the folder that holds exactly the model's classes, or the right num_classes"
        )
    folder = _Folder(path, inputs)
    empty = sorted(set(range(len(names))) - set(folder.targets))
    if empty:
        raise DataError(
            f"no images in the class folder {os.path.join(path, names[empty[0]])!r}; "
            "add some, or remove the folder if it is not a class"
        )
    listed = []
    for file, _ in folder.samples:
        with _reading(file), Image.open(file, formats=_FORMATS):
            listed.append(f"{os.path.relpath(file, path)}\0{os.path.getsize(file)}\n")
    identity = "".join(listed).encode(errors="surrogateescape")
    return Images(folder, torch.tensor(folder.targets), inputs, identity=identity)


@contextlib.contextmanager
def _reading(file: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        raise DataError(
            f"cannot read {file!r} as an image ({type(error).__name__}: {error}); "
            f"expected {', '.join(_FORMATS)}: repair the file, or move it out of the class folder"
        ) from error


def _rgb(image: Image.Image) -> Image.Image:
    """8 bits a channel; 16-bit grey values are scaled, which Pillow's own conversion cuts off.

    Transparency is dropped, as by torchvision's loader: the colours are those underneath.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))  # 65535 = 257 * 255
    elif image.mode in ("I", "F"):
        raise DataError(
            f"{image.filename!r} has 32 bits a pixel (Pillow's mode {image.mode}), and nothing "
            "says which values are black and white; save it with 8 or 16 bits"
        )
    return image.convert("RGB")


def _read(file: str, inputs: Inputs) -> Tensor:
    """uint8 (3, S, S)."""
    with _reading(file), Image.open(file, formats=_FORMATS) as opened:
        image = _rgb(opened)
    interpolation = InterpolationMode(inputs.interpolation)
    image = TF.resize(image, [inputs.resize], interpolation)
    return TF.pil_to_tensor(TF.center_crop(image, [inputs.image_size]))


def _levels_or_error(file: str, inputs: Inputs) -> Tensor | DataError:
    try:
        return _read(file, inputs)
    except DataError as error:
        return error
