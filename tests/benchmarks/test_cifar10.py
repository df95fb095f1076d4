"""cifar10.py, with a small CIFAR-10 in place of the downloaded one."""

import pickle

import numpy as np
import pytest

from benchmarks import cifar10
from benchmarks.task.datasets import image_folder

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
FILENAMES = ["b.png", "a.png", "cat_s_1.png", "d.png", "e.png", "f.png"]


class Small:
    """What torchvision's CIFAR10 has once it is downloaded."""

    base_folder, classes = "batches", ["airplane", "bird"]
    data, targets = IMAGES, [1, 0, 1, 0, 1, 0]

    def __init__(self, root, *, train, download):
        assert (train, download) == (False, True)
        (root / self.base_folder).mkdir(parents=True, exist_ok=True)
        with (root / self.base_folder / "test_batch").open("wb") as file:
            pickle.dump({"filenames": FILENAMES}, file)


@pytest.fixture(autouse=True)
def _small(tmp_path, monkeypatch):
    (tmp_path / "names.txt").write_text("a.png\nb.png\ncat_s_1.png\n")
    monkeypatch.setattr(cifar10, "NAMES", tmp_path / "names.txt")
    monkeypatch.setattr(cifar10.datasets, "CIFAR10", Small)
    monkeypatch.chdir(tmp_path)


def test_the_named_images_of_each_class_in_order(capsys):
    assert cifar10.main(["--out", "some/dev"]) == 0
    assert capsys.readouterr().out == "3 images in some/dev\n"
    images, labels = image_folder("some/dev", image_size=32, mean=(0, 0, 0), std=(1, 1, 1))
    assert labels.tolist() == [0, 1, 1]  # airplane/a, bird/b, bird/cat_s_1
    want = IMAGES[[1, 0, 2]].transpose(0, 3, 1, 2)
    assert np.array_equal(images.mul(255).round().numpy(), want)


@pytest.mark.parametrize("out", ["names.txt", ".", "names.txt/dev"])
def test_a_folder_that_cannot_be(tmp_path, capsys, out):
    before = (tmp_path / "names.txt").read_text()
    assert cifar10.main(["--out", out]) == 2
    assert out in capsys.readouterr().err
    assert (tmp_path / "names.txt").read_text() == before


def test_a_download_that_fails(monkeypatch, tmp_path, capsys):
    def fails(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(cifar10.datasets, "CIFAR10", fails)
    assert cifar10.main(["--out", "dev"]) == 2
    assert "no route" in capsys.readouterr().err
    assert not (tmp_path / "dev").exists()


def test_an_interruption_leaves_nothing(monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cifar10.Image, "fromarray", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cifar10.main(["--out", "some/dev"])
    assert list((tmp_path / "some").iterdir()) == []


def test_the_list_is_of_5000_images():
    names = (cifar10.Path(cifar10.__file__).parent / "cifar10_dev.txt").read_text().split()
    assert len(names) == len(set(names)) == 5000
