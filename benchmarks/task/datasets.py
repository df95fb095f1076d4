"""Labelled images, normalised and wholly in memory: for evaluation, and for our digits teacher."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as TF

from benchmarks.errors import DataError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DIGITS_MEAN = (0.5,)
DIGITS_STD = (0.5,)
DIGITS_TEST_FRACTION = 0.5
DIGITS_SPLIT_SEED = 0

# Those whose extensions torchvision's ImageFolder knows.
_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's handwritten digits, in a fixed stratified split without overlap.

    Returns:
        (train_images, train_labels, test_images, test_labels): 898 and 899 images, float32
        (N, 1, 8, 8) in [-1, 1], that is in [0, 1] before ``DIGITS_MEAN`` and ``DIGITS_STD``;
        labels int64 (N,) in [0, 10).
    """
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
    train_images, test_images = (
        _normalize(torch.from_numpy(x).float().div_(16).unsqueeze(1), DIGITS_MEAN, DIGITS_STD)
        for x in parts[:2]
    )
    train_labels, test_labels = (torch.from_numpy(y).long() for y in parts[2:])
    return train_images, train_labels, test_images, test_labels


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
            "per class, as in PATH/cat/1.png"
        )
    return names


def image_folder(
    path: str | os.PathLike[str],
    *,
    image_size: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    num_classes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Load a folder in torchvision's ImageFolder layout, ``path/CLASS/**/IMAGE``, in its order.

    Unlike ImageFolder, which skips files by their extension, every file inside a class folder must
    be an image, except for hidden ones.

    Args:
        path: a directory with one subfolder per class; see :func:`class_names` for their order.
        image_size: height and width S, >= 1. Other sizes are resized, the shorter side to S
            (bilinear, antialiased), and centre-cropped.
        mean, std: of the red, green and blue channel in [0, 1] (default: ImageNet's).
        num_classes: how many class folders there must be (default: any number).

    Returns:
        Images float32 (N, 3, S, S), normalised, which take 12 S^2 bytes each, and labels int64
        (N,) in [0, number of class folders).

    Raises:
        DataError: the folder, or a class in it, is missing, unreadable or empty; a file is not a
            readable image; the number of class folders is not ``num_classes``; an argument is out
            of range.
    """
    if image_size < 1:
        raise DataError(f"image_size must be >= 1, got {image_size}")
    if len(mean) != 3 or len(std) != 3 or not all(s > 0 and math.isfinite(s) for s in std):
        raise DataError(
            f"mean and std must be 3 numbers each, std > 0; got mean={mean!r}, std={std!r}"
        )
    names = class_names(path)
    if num_classes is not None and len(names) != num_classes:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise DataError(
            f"{os.fspath(path)!r} has {len(names)} class folders ({shown}), expected {num_classes}:"
            " pass the folder that holds exactly the model's classes, or the right num_classes"
        )
    files = [(file, label) for label, name in enumerate(names) for file in _files(path, name)]
    images = torch.empty(len(files), 3, image_size, image_size)
    for image, (file, _) in zip(images, files, strict=True):
        image.copy_(_read(file, image_size))
    return _normalize(images.div_(255), mean, std), torch.tensor([label for _, label in files])


def _files(path: str | os.PathLike[str], name: str) -> list[Path]:
    """What is not hidden inside one class folder, in ImageFolder's order."""
    files = []
    for folder, subfolders, filenames in os.walk(Path(path, name), followlinks=True):
        subfolders[:] = [s for s in subfolders if not s.startswith(".")]
        files += [(folder, f) for f in filenames if not f.startswith(".")]
    if not files:
        raise DataError(
            f"no images in the class folder {os.fspath(Path(path, name))!r}; "
            "add some, or remove the folder if it is not a class"
        )
    return [Path(folder, f) for folder, f in sorted(files)]


def _read(file: Path, size: int) -> Tensor:
    """uint8 (3, size, size)."""
    try:
        with Image.open(file, formats=_FORMATS) as opened:
            image = _rgb(opened)
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        raise DataError(
            f"cannot read {os.fspath(file)!r} as an image ({type(error).__name__}: {error}); "
            f"expected {', '.join(_FORMATS)}: repair the file, or move it out of the class folder"
        ) from error
    if image.size != (size, size):
        image = TF.center_crop(TF.resize(image, [size]), [size])
    return TF.pil_to_tensor(image)


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


def _normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(N, C, H, W) in [0, 1], in place."""
    m, s = (torch.tensor(v, dtype=images.dtype).view(-1, 1, 1) for v in (mean, std))
    return images.sub_(m).div_(s)
