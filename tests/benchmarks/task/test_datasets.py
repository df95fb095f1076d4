import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.errors import DataError
from benchmarks.task.datasets import (
    DIGITS_MEAN,
    DIGITS_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    class_names,
    digits,
    image_folder,
)


def write(path: Path, *, width: int = 8, height: int = 8, seed: int = 0, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes of two and one images."""
    write(tmp_path / "zebra" / "1.png", seed=1)
    write(tmp_path / "ant" / "b.png", seed=2)
    write(tmp_path / "ant" / "a.PNG", seed=3)
    return tmp_path


def fails(path, *parts: str, **kwargs) -> None:
    with pytest.raises(DataError) as caught:
        image_folder(path, **{"image_size": 8, **kwargs})
    for part in parts:
        assert part in str(caught.value)


def test_digits_are_normalised_and_split_without_overlap():
    train_x, train_y, test_x, test_y = digits()
    assert train_x.shape == (898, 1, 8, 8)
    assert test_x.shape == (899, 1, 8, 8)
    for x, y in ((train_x, train_y), (test_x, test_y)):
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert x.shape[0] == y.shape[0]
        assert (x.min(), x.max()) == (-1, 1)
        assert (y.bincount() / len(y) - 0.1).abs().max() < 0.005
    train, test = ({x.numpy().tobytes() for x in part} for part in (train_x, test_x))
    assert train.isdisjoint(test)


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    data = load_digits()
    want = sorted(
        (*image.ravel(), label) for image, label in zip(data.images, data.target, strict=True)
    )
    train_x, train_y, test_x, test_y = digits()
    pixels = (torch.cat([train_x, test_x]) * DIGITS_STD[0] + DIGITS_MEAN[0]) * 16
    got = torch.cat([pixels.flatten(1), torch.cat([train_y, test_y])[:, None]], 1)
    assert sorted(map(tuple, got.tolist())) == want


def test_digits_are_the_same_every_time():
    for a, b in zip(digits(), digits(), strict=True):
        assert torch.equal(a, b)


def test_agrees_with_torchvision(folder):
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    write(folder / "ant" / "nested" / "c.png", seed=4)
    pipeline = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )
    oracle = ImageFolder(folder, pipeline)
    images, labels = image_folder(folder, image_size=8, num_classes=2)
    assert class_names(folder) == oracle.classes == ["ant", "zebra"]
    assert labels.dtype == torch.int64
    assert labels.tolist() == oracle.targets
    assert torch.equal(images, torch.stack([x for x, _ in oracle]))


def test_own_mean_and_std(folder):
    plain, _ = image_folder(folder, image_size=8, mean=(0, 0, 0), std=(1, 1, 1))
    scaled, _ = image_folder(folder, image_size=8, mean=(0.5, 0, 0), std=(0.5, 1, 2))
    assert 0 <= plain.min() < plain.max() <= 1
    scale = torch.tensor([0.5, 1, 2]).view(3, 1, 1)
    shift = torch.tensor([0.5, 0, 0]).view(3, 1, 1)
    torch.testing.assert_close(scaled * scale + shift, plain)


@pytest.mark.parametrize(("width", "height"), [(30, 20), (20, 30), (4, 8), (3, 3)])
def test_other_sizes_keep_their_aspect_and_centre(tmp_path, width, height):
    from torchvision.transforms import functional as TF

    write(tmp_path / "a" / "1.png", width=width, height=height)
    images, _ = image_folder(tmp_path, image_size=10, mean=(0, 0, 0), std=(1, 1, 1))
    with Image.open(tmp_path / "a" / "1.png") as image:
        want = TF.center_crop(TF.to_tensor(TF.resize(image, 10)), 10)
    assert torch.equal(images[0], want)


def test_grey_images_become_three_channels(tmp_path):
    write(tmp_path / "a" / "1.png", mode="L")
    images, _ = image_folder(tmp_path, image_size=8, mean=(0, 0, 0), std=(1, 1, 1))
    assert torch.equal(images[0, 0], images[0, 1])
    assert torch.equal(images[0, 0], images[0, 2])


def pixels(tmp_path):
    """(3, 1, 4) in 0..255, of the one image there."""
    images, _ = image_folder(tmp_path, image_size=4, mean=(0, 0, 0), std=(1, 1, 1))
    return (images[0, :, 0] * 255).round().int()


def square(row, mode=None, dtype=np.uint8):
    return Image.fromarray(np.array([row] * 4, dtype=dtype), mode)


@pytest.mark.parametrize("extension", ["png", "tiff", "pgm"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, extension):
    (tmp_path / "a").mkdir()
    row = [0, 300, 32768, 65535]
    square(row, dtype=np.uint16).save(tmp_path / "a" / f"1.{extension}")
    want = [round(v / 65535 * 255) for v in row]
    assert want == [0, 1, 128, 255]
    assert pixels(tmp_path).tolist() == [want] * 3


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_a_range_that_nothing_tells_is_refused_by_name(tmp_path, dtype):
    (tmp_path / "a").mkdir()
    square([0, 1, 2, 70000], dtype=dtype).save(tmp_path / "a" / "1.tiff")
    fails(tmp_path, "1.tiff", "32 bits a pixel", "8 or 16 bits")


# As torchvision's loader reads them: https://docs.pytorch.org/vision/stable/datasets.html
CYAN, GREY, COLOURS = (0, 255, 255), (100, 100, 100), ((10, 20, 30), (200, 100, 50))


@pytest.mark.parametrize(
    ("name", "image", "more", "want"),
    [
        ("1.png", square([[100, 0], [100, 255]] * 2, "LA"), {}, [GREY] * 4),
        ("1.png", square([[*COLOURS[1], 0], [*COLOURS[0], 9]] * 2), {}, [*COLOURS[::-1]] * 2),
        ("1.png", square([0, 255, 255, 0]).convert("1"), {}, [(v,) * 3 for v in (0, 255, 255, 0)]),
        ("1.jpg", Image.new("CMYK", (4, 4), (255, 0, 0, 0)), {"quality": 100}, [CYAN] * 4),
        ("1.tiff", Image.new("CMYK", (4, 4), (255, 0, 0, 0)), {}, [CYAN] * 4),
        ("palette", None, {}, [*COLOURS] * 2),
        ("palette", None, {"transparency": 0}, [*COLOURS] * 2),
        ("palette", None, {"transparency": b"\x00\x80"}, [*COLOURS] * 2),
    ],
)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_other_modes_keep_their_colours(tmp_path, name, image, more, want):
    (tmp_path / "a").mkdir()
    if name == "palette":
        name, image = "1.png", square([0, 1, 0, 1], "P")
        image.putpalette([v for colour in COLOURS for v in colour])
    image.save(tmp_path / "a" / name, **more)
    assert pixels(tmp_path).T.tolist() == [list(colour) for colour in want]


def test_hidden_and_top_level_files_are_ignored(folder):
    (folder / "README.txt").write_text("about")
    (folder / "ant" / ".DS_Store").write_text("x")
    (folder / ".git").mkdir()
    (folder / "ant" / ".thumbs").mkdir()
    (folder / "ant" / ".thumbs" / "x.txt").write_text("x")
    images, labels = image_folder(folder, image_size=8, num_classes=2)
    assert images.shape == (3, 3, 8, 8)
    assert labels.tolist() == [0, 0, 1]


def test_missing_folder(tmp_path):
    fails(tmp_path / "no", str(tmp_path / "no"), "No such file or directory", "pass a directory")


def test_not_a_directory(tmp_path):
    (tmp_path / "file").write_text("x")
    fails(tmp_path / "file", str(tmp_path / "file"), "Not a directory", "one subfolder of images")


def test_no_class_folders(tmp_path):
    write(tmp_path / "1.png")
    fails(tmp_path, f"no class subfolders in '{tmp_path}'", "PATH/cat/1.png")


def test_empty_class_folder(folder):
    (folder / "bee").mkdir()
    fails(folder, f"no images in the class folder '{folder / 'bee'}'", "remove the folder")


def test_a_file_that_is_no_image(folder):
    (folder / "ant" / "notes.txt").write_text("not an image")
    fails(folder, f"cannot read '{folder / 'ant' / 'notes.txt'}'", "expected BMP, JPEG", "move it")


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "zeroed"])
def test_a_damaged_image(folder, damage):
    file = folder / "zebra" / "1.png"
    content = file.read_bytes()
    half = len(content) // 2
    file.write_bytes(
        {
            "empty": b"",
            "truncated": content[:half],
            "text": b"hello",
            "zeroed": content[:half] + bytes(len(content) - half),
        }[damage]
    )
    fails(folder, f"cannot read '{file}' as an image", "repair the file")


def test_wrong_number_of_classes(folder):
    fails(folder, "has 2 class folders (ant, zebra), expected 10", "num_classes", num_classes=10)


def test_many_class_folders_are_not_all_listed(tmp_path):
    for i in range(7):
        write(tmp_path / f"c{i}" / "1.png")
    fails(tmp_path, "has 7 class folders (c0, c1, c2, c3, c4, ...), expected 2", num_classes=2)


def test_arguments_out_of_range(folder):
    fails(folder, "image_size must be >= 1, got 0", image_size=0)
    fails(folder, "must be 3 numbers each, std > 0", "(0.5,)", mean=(0.5,))
    fails(folder, "must be 3 numbers each, std > 0", "(1, 0, 1)", std=(1, 0, 1))


def test_the_error_is_a_value_error_of_ours(tmp_path):
    from agm import AgmError

    with pytest.raises(AgmError, match=re.escape(str(tmp_path))) as caught:
        image_folder(tmp_path, image_size=8)
    assert isinstance(caught.value, ValueError)
