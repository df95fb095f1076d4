"""cifar.py, with a small test split in place of the downloaded one."""

import pickle

import numpy as np
import pytest
import torch

from benchmarks import cifar
from benchmarks.task.datasets import Inputs
from benchmarks.task.folders import image_folder

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
FILENAMES = ["b.png", "a.png", "cat_s_1.png", "b.png", "e.png", "f.png"]


class Small:
    """What torchvision's classes have once the data set is downloaded."""

    base_folder, classes, test_list = "batches", ["airplane", "bird"], [["test_batch", "md5"]]
    data, targets = IMAGES, [1, 0, 1, 0, 1, 0]

    def __init__(self, root, *, train, download):
        assert (train, download) == (False, True)
        (root / self.base_folder).mkdir(parents=True, exist_ok=True)
        with (root / self.base_folder / "test_batch").open("wb") as file:
            pickle.dump({"filenames": FILENAMES}, file)


@pytest.fixture(autouse=True)
def _small(tmp_path, monkeypatch):
    for name, torchvisions in cifar.SETS.items():
        (tmp_path / f"{name}_dev.txt").write_text("airplane/a.png\nbird/b.png\nbird/cat_s_1.png\n")
        monkeypatch.setattr(cifar.datasets, torchvisions, Small)
    monkeypatch.setattr(cifar, "LISTS", tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", cifar.SETS)
def test_the_named_images_of_each_class_in_order(name, capsys):
    assert cifar.main([name, "--out", "some/dev"]) == 0
    assert capsys.readouterr().out == "3 images in some/dev\n"
    inputs = Inputs(32, 32, mean=(0, 0, 0), std=(1, 1, 1))
    ((images, labels),) = image_folder("some/dev", inputs)
    assert labels.tolist() == [0, 1, 1]  # airplane/a, bird/b, bird/cat_s_1; not airplane/b
    want = IMAGES[[1, 0, 2]].transpose(0, 3, 1, 2)
    assert np.array_equal(images.mul(255).round().numpy(), want)


@pytest.mark.parametrize("out", ["cifar10_dev.txt", ".", "cifar10_dev.txt/dev"])
def test_a_folder_that_cannot_be(tmp_path, capsys, out):
    before = (tmp_path / "cifar10_dev.txt").read_text()
    assert cifar.main(["cifar10", "--out", out]) == 2
    assert out in capsys.readouterr().err
    assert (tmp_path / "cifar10_dev.txt").read_text() == before


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("no route")])
def test_a_download_that_fails(monkeypatch, tmp_path, capsys, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(cifar.datasets, "CIFAR100", fails)
    assert cifar.main(["cifar100", "--out", "dev"]) == 2
    assert "cannot download CIFAR100 into .agm-cache: no route" in capsys.readouterr().err
    assert not (tmp_path / "dev").exists()


@pytest.mark.parametrize("name", cifar.SETS)
def test_a_download_that_is_not_the_published_one(monkeypatch, tmp_path, capsys, name):
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    utils = "torchvision.datasets.utils."
    monkeypatch.setattr(utils + "_get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(
        utils + "_urlretrieve",
        lambda url, file, *_: cifar.Path(file).write_bytes(b"not what was asked for"),
    )
    assert cifar.main([name, "--out", "dev"]) == 2
    assert "not found or corrupted" in capsys.readouterr().err
    assert not (tmp_path / "dev").exists()


@pytest.mark.parametrize(("filename", "found"), [("g.png", 2), ("cat_s_1.png", 4)])
def test_other_images_than_the_list_names(monkeypatch, tmp_path, capsys, filename, found):
    at = 2 if found == 2 else 0
    changed = [*FILENAMES[:at], filename, *FILENAMES[at + 1 :]]
    if found == 4:  # twice in one class
        (tmp_path / "cifar10_dev.txt").write_text("airplane/a.png\nbird/e.png\nbird/cat_s_1.png\n")
    monkeypatch.setitem(globals(), "FILENAMES", changed)
    assert cifar.main(["cifar10", "--out", "dev"]) == 2
    assert f"has {found} of the 3 images that cifar10_dev.txt names" in capsys.readouterr().err
    assert not (tmp_path / "dev").exists()


def test_an_interruption_leaves_nothing(monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cifar.Image, "fromarray", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cifar.main(["cifar10", "--out", "some/dev"])
    assert list((tmp_path / "some").iterdir()) == []


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_the_lists_are_of_5000_images_alike_in_each_class(name, classes):
    paths = (cifar.Path(cifar.__file__).parent / f"{name}_dev.txt").read_text().split()
    assert len(paths) == len(set(paths)) == 5000
    labels = [path.partition("/")[0] for path in paths]
    counts = torch.tensor([labels.count(label) for label in sorted(set(labels))])
    assert counts.tolist() == [5000 // classes] * classes
