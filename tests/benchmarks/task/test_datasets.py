import multiprocessing
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.errors import DataError
from benchmarks.task import datasets, folders
from benchmarks.task.datasets import (
    DIGITS_MEAN,
    DIGITS_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Inputs,
    digits,
    digits_images,
)
from benchmarks.task.folders import class_names, image_folder


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


def load(path, size=8, num_classes=None, **inputs):
    """All images and labels of a folder."""
    inputs = Inputs(**{"image_size": size, "resize": size, **inputs})
    x, y = zip(*image_folder(path, inputs, num_classes=num_classes), strict=True)
    return torch.cat(x), torch.cat(y)


PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def fails(path, *parts: str, **kwargs) -> None:
    with pytest.raises(DataError) as caught:
        load(path, **kwargs)
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
    images, labels = load(folder, num_classes=2)
    assert class_names(folder) == oracle.classes == ["ant", "zebra"]
    assert labels.dtype == torch.int64
    assert labels.tolist() == oracle.targets
    assert torch.equal(images, torch.stack([x for x, _ in oracle]))


def test_own_mean_and_std(folder):
    plain, _ = load(folder, **PLAIN)
    scaled, _ = load(folder, mean=(0.5, 0, 0), std=(0.5, 1, 2))
    assert 0 <= plain.min() < plain.max() <= 1
    scale = torch.tensor([0.5, 1, 2]).view(3, 1, 1)
    shift = torch.tensor([0.5, 0, 0]).view(3, 1, 1)
    torch.testing.assert_close(scaled * scale + shift, plain)


@pytest.mark.parametrize(("width", "height"), [(30, 20), (20, 30), (4, 8), (3, 3), (12, 12)])
@pytest.mark.parametrize(("resize", "interpolation"), [(10, "bilinear"), (13, "bicubic")])
def test_other_sizes_keep_their_aspect_and_centre(tmp_path, width, height, resize, interpolation):
    from torchvision.transforms._presets import ImageClassification
    from torchvision.transforms.functional import InterpolationMode

    write(tmp_path / "a" / "1.png", width=width, height=height)
    images, _ = load(tmp_path, 10, resize=resize, interpolation=interpolation)
    oracle = ImageClassification(
        crop_size=10, resize_size=resize, interpolation=InterpolationMode(interpolation)
    )
    with Image.open(tmp_path / "a" / "1.png") as image:
        torch.testing.assert_close(images[0], oracle(image), rtol=0, atol=1e-6)


def test_grey_images_become_three_channels(tmp_path):
    write(tmp_path / "a" / "1.png", mode="L")
    images, _ = load(tmp_path, **PLAIN)
    assert torch.equal(images[0, 0], images[0, 1])
    assert torch.equal(images[0, 0], images[0, 2])


def pixels(tmp_path):
    """(3, 1, 4) in 0..255, of the one image there."""
    images, _ = load(tmp_path, 4, **PLAIN)
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


@pytest.mark.parametrize(
    ("tags", "why"), [({258: 12}, "12 bits a pixel"), ({262: 0}, "16 bits a pixel, 0 is white")]
)
def test_sixteen_bits_of_other_levels_are_refused_by_name(tmp_path, tags, why):
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "1.tiff"
    square([0, 300, 4095, 4095], dtype=np.uint16).save(path)
    patch_tags(path, tags)
    fails(tmp_path, "1.tiff", why, "16 and 0 as black")


def patch_tags(path, tags):
    """Change values of a TIFF's one directory, as Pillow itself writes neither of them."""
    data = bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    for place in range(start + 2, start + 2 + 12 * count, 12):
        (tag,) = struct.unpack_from("<H", data, place)
        if tag in tags:
            struct.pack_into("<H", data, place + 8, tags[tag])
    path.write_bytes(data)


def test_a_pipe_is_no_image(folder):
    os.mkfifo(folder / "ant" / "pipe")
    fails(folder, "pipe", "no file")


def test_a_folder_named_as_a_home_is_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("~") / "a" / "1.png")
    assert len(load("~")[0]) == 1


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
    images, labels = load(folder, num_classes=2)
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


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"image_size": 0}, "image_size must be >= 1, got 0"),
        ({"resize": 7}, "resize must be >= image_size 8, got 7"),
        ({"mean": (0.5,)}, "one number a channel; got (0.5,)"),
        ({"mean": (0.5, float("nan"), 0)}, "must be finite"),
        ({"std": (1, float("inf"), 1)}, "must be finite"),
        ({"std": (1, 0, 1)}, "std must be > 0, got (1, 0, 1)"),
    ],
)
def test_inputs_out_of_range(changes, part):
    with pytest.raises(DataError, match=re.escape(part)):
        Inputs(**{"image_size": 8, "resize": 8, **changes})


# Passes over the images


@pytest.fixture
def many(tmp_path):
    """Two classes of 30 images."""
    for i in range(60):
        write(tmp_path / "ab"[i % 2] / f"{i}.png", seed=i)
    return tmp_path


@pytest.fixture
def streaming(monkeypatch):
    """Nothing is kept, batches are small, and there are workers."""
    monkeypatch.setattr(datasets, "KEPT_BYTES", 0)
    monkeypatch.setattr(datasets, "BATCH_BOUNDS", (7, 7))
    monkeypatch.setattr(datasets, "_workers", lambda: 2)


def opened(monkeypatch):
    """Counts the files that are decoded in this process."""
    read, files = folders._read, []
    monkeypatch.setattr(folders, "_read", lambda *a: files.append(a[0]) or read(*a))
    return files


def test_images_that_fit_are_decoded_once(many, monkeypatch):
    files = opened(monkeypatch)
    images = image_folder(many, Inputs(8, 8))
    assert files == []
    next(iter(images))  # a pass that is broken off counts for nothing
    first, second = ([x.clone() for x, _ in images] for _ in range(2))
    assert len(files) == 60 + 60
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("streaming")
def test_images_that_do_not_fit_are_the_same(many, monkeypatch):
    files = opened(monkeypatch)
    before = torch.get_rng_state()
    streamed = image_folder(many, Inputs(8, 8))
    for _ in range(2):
        batches = list(streamed)
        assert [len(x) for x, _ in batches] == [7] * 8 + [4]
        monkeypatch.setattr(datasets, "KEPT_BYTES", 2**20)
        x, y = load(many)
        monkeypatch.setattr(datasets, "KEPT_BYTES", 0)
        assert torch.equal(torch.cat([x for x, _ in batches]), x)
        assert torch.equal(torch.cat([y for _, y in batches]), y)
    assert len(files) == 2 * 60  # those of load: the others were decoded elsewhere
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("streaming")
def test_an_error_of_a_worker_is_the_same_line(many):
    file = many / "b" / "51.png"
    file.write_bytes(file.read_bytes()[:100])
    fails(many, f"cannot read '{file}' as an image", "repair the file")
    with pytest.raises(DataError) as caught:
        load(many)
    assert "\n" not in str(caught.value)


BROKEN_OFF = """
import sys
from benchmarks.process import Stop
from benchmarks.task import datasets, folders

datasets.KEPT_BYTES, datasets._workers = 0, lambda: 2
with Stop().listening():
    batches = iter(folders.image_folder(sys.argv[1], datasets.Inputs(8, 8)))
    next(batches)
    raise ValueError("in the midst of a pass")
"""


def test_workers_end_with_a_program_that_breaks_off(many, monkeypatch):
    for i in range(900):
        (many / "a" / f"link{i}.png").symlink_to(many / "a" / "0.png")
    run = subprocess.run(
        [sys.executable, "-c", BROKEN_OFF, many], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 1
    assert "in the midst of a pass" in run.stderr
    assert "stopping after this step" not in run.stderr  # from a worker


def test_a_child_process_starts_no_workers():
    assert datasets._workers() >= 0
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(datasets._workers) == 0


def test_a_batch_is_bounded_by_its_pixels(many):
    assert image_folder(many, Inputs(8, 8)).batch_size == 250
    assert image_folder(many, Inputs(64, 64)).batch_size == 64
    assert image_folder(many, Inputs(224, 256)).batch_size == 8


def test_the_hash_is_of_names_and_sizes(many, tmp_path_factory):
    def of(folder):
        return image_folder(folder, Inputs(8, 8)).hash

    before = of(many)
    copy = shutil.copytree(many, tmp_path_factory.mktemp("copy") / "images")
    assert of(copy) == before  # wherever, and whenever written
    (copy / "a" / "0.png").rename(copy / "a" / "zero.png")
    assert of(copy) != before
    (copy / "a" / "zero.png").rename(copy / "a" / "0.png")
    with (copy / "a" / "0.png").open("ab") as file:
        file.write(b"!")
    assert of(copy) != before
    (copy / "a" / "0.png").rename(copy / "b" / "0.png")
    assert of(copy) != before


def test_the_images_of_digits_are_its_test_half():
    _, _, want, labels = digits()
    images = digits_images()
    for _ in range(2):
        assert torch.equal(torch.cat([x for x, _ in images]), want)
        assert torch.equal(torch.cat([y for _, y in images]), labels)
    assert len(images) == len(labels)


def test_the_error_is_a_value_error_of_ours(tmp_path):
    from agm import AgmError

    with pytest.raises(AgmError, match=re.escape(str(tmp_path))) as caught:
        load(tmp_path / "no")
    assert isinstance(caught.value, ValueError)
