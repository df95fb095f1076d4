"""compare.py's folders, networks and images."""

import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import compare
from benchmarks.task import teachers
from benchmarks.task.networks import resnet20
from tests.benchmarks.compare import NETS, SHORT, call, enter


@pytest.fixture(scope="package")
def cache(tmp_path_factory):
    """Where the digits teacher lies, trained once."""
    folder = tmp_path_factory.mktemp("teacher") / ".agm-cache"
    teachers.digits_teacher(folder)
    return folder


@pytest.fixture(autouse=True)
def home(cache, tmp_path, monkeypatch, request):
    """An empty current directory but for the teacher and nets.py.

    An ONNX file takes longer than the training of these networks: it is written in the processes
    that a test starts, and here where ``exports`` is asked for.
    """
    enter(tmp_path, cache, monkeypatch)
    if "exports" not in request.fixturenames:
        monkeypatch.setattr(compare, "lacking", lambda: "not looked at here")
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    return tmp_path


@pytest.fixture
def exports():
    """Asks for ONNX files, see ``home``."""


@pytest.fixture(scope="package")
def finished(cache, tmp_path_factory):
    """A finished grid of two arms and two seeds: its folder, its command line, its output."""
    folder = tmp_path_factory.mktemp("finished")
    argv = ["--with-agm", "--seeds", "2", *SHORT, "--out", "run"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        enter(folder, cache, monkeypatch)
        status, text, _ = call(*argv, together=True)
    assert status == 0, text
    return folder / "run", argv, text


@pytest.fixture
def copied(finished, home, exports):
    """A copy of the finished run in the current directory, and its command line."""
    shutil.copytree(finished[0], home / "run")
    return home / "run", finished[1]


@pytest.fixture
def folder(home):
    """An ImageFolder of 10 classes of 2 images."""
    rng = np.random.default_rng(0)
    for name in "abcdefghij":
        (home / "images" / name).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(home / "images" / name / f"{i}.png")
    return home / "images"


@pytest.fixture
def weights(home):
    """Of a ResNet-20, as they are found in the wild."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = resnet20().state_dict()
    path = home / "resnet20.th"
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, path)
    return path
