"""A folder of labelled images, as torchvision's ImageFolder has them."""

import contextlib
import os
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets as tv
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from benchmarks.errors import DataError
from benchmarks.task.datasets import Images, Inputs

# Those whose extensions torchvision's ImageFolder knows.
_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


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
    path = os.path.abspath(path)  # torchvision would take a folder ~ for the home
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
        with _reading(file):
            if not stat.S_ISREG(os.stat(file).st_mode):  # a pipe would be waited for
                raise OSError("it is no file")
            with Image.open(file, formats=_FORMATS):
                pass
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
        _check_levels(image)
        grey = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))  # 65535 = 257 * 255
    elif image.mode in ("I", "F"):
        raise DataError(
            f"{image.filename!r} has 32 bits a pixel (Pillow's mode {image.mode}), and nothing "
            "says which values are black and white; save it with 8 or 16 bits"
        )
    return image.convert("RGB")


def _check_levels(image: Image.Image) -> None:
    """Raise :class:`DataError` for a TIFF whose levels are not 0, black, to 65535, white."""
    tags = getattr(image, "tag_v2", {})
    bits, black_is_zero = tags.get(258, (16,))[0], tags.get(262, 1) == 1
    if bits != 16 or not black_is_zero:
        raise DataError(
            f"{image.filename!r} has {bits} bits a pixel{'' if black_is_zero else ', 0 is white'}: "
            "save it with 8 bits, or with 16 and 0 as black"
        )


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
