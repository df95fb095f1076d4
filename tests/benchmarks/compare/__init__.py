"""compare.py as a user meets it: what its tests share."""

import contextlib
import io
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from baselines.quantization import checkpoint as checkpoints
from benchmarks import compare
from benchmarks.task import datasets, teachers
from tests.baselines import same_state

ROOT = str(Path(__file__).parents[3])
SCRIPT = Path(ROOT) / "benchmarks" / "compare.py"
SHARED = Path(__file__).parents[4] / "shared"
SHORT = ("--bits", "3", "--steps", "8", "--batch-size", "16")
BRIEF = ("--steps", "2", "--batch-size", "4", "--seeds", "1")
BRIEF3 = (*BRIEF, "--bits", "3")
REQUIRED = {
    "method", "hooks", "weight_bits", "act_bits", "seed", "accuracy_fp", "accuracy_ptq",
    "accuracy_last", "seconds", "steps_per_s", "checkpoint",
}  # fmt: skip

# A user's module of networks.
NETS = """
import torch
from torch import nn

def cnn(act=nn.ReLU, norm=nn.BatchNorm2d, num_classes=10):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), norm(8), act(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(8, num_classes))

def trained(num_classes=10, pretrained=False):
    return cnn(num_classes=20 if pretrained else num_classes)

def scalar(num_classes=10, pretrained=False):
    class Mean(nn.Sequential):
        def forward(self, x):
            return super().forward(x).mean()
    return Mean(*cnn())

def two_channels():
    return nn.Sequential(nn.Conv2d(2, 8, 3, 2, 1), *list(cnn())[1:])

def grouped():
    return cnn(lambda: nn.GroupNorm(2, 8))

def bare():
    return cnn(norm=nn.Identity)

def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 8), nn.BatchNorm1d(8), nn.ReLU(),
                         nn.Linear(8, 10))

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = cnn()

    def forward(self, x):
        return self.net(x), x

class Grey(Pair):
    def forward(self, x):
        return self.net(x.repeat(1, 3, 1, 1))

class Branching(Pair):
    def forward(self, x):
        return self.net(x if x.sum() > 0 else -x)

class Choosy(nn.Identity):
    __module__ = "torch.nn.choosy"  # a leaf to torch.fx

    def forward(self, x):
        if x.shape[-1] != 48:
            raise ValueError("48 pixels, please")
        return x

def picky():
    return nn.Sequential(Choosy(), *cnn())

def broken():
    raise RuntimeError("first line\\nsecond line")
"""


def enter(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(cache, folder / cache.name)
    monkeypatch.chdir(folder)


def call(*argv: object, together: bool = False) -> tuple[int, str, str]:
    """Exit status, stdout and stderr, or both in the first in the order they were written."""
    out = io.StringIO()
    err = out if together else io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = compare.main([str(a) for a in argv])
        except SystemExit as exit:
            status = exit.code
    return status, out.getvalue(), err.getvalue()


def ok(*argv: object) -> str:
    """stdout of a run that must succeed."""
    status, out, err = call(*argv)
    assert status == 0, err
    return out


def accuracy(model: torch.nn.Module, images: datasets.Images) -> float:
    return 100 * teachers.hits(model, images)[:, 0].sum().item() / len(images)


def load(out: Path | str) -> dict:
    return json.loads(Path(out, "report.json").read_text())


def untimed(cells: Sequence[dict]) -> list[dict]:
    """Without what two equal runs may differ in: the commit of a tree under work is one of them."""
    left_out = ("seconds", "steps_per_s", "versions")
    return [{k: v for k, v in c.items() if k not in left_out} for c in cells]


def same_networks(a: Path, b: Path, names: Sequence[str]) -> bool:
    return all(
        same_state(*(checkpoints.load(folder / name) for folder in (a, b))) for name in names
    )


def files(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob(pattern) if p.is_file()}


def spy(monkeypatch, before=lambda method, seed, arm: None) -> list[str]:
    """The cells that are run from now on; ``before`` is called with each of them."""
    started, real = [], compare.quantize

    def quantize(teacher, **kwargs):
        hooks = kwargs["hooks"]
        parts = [p for p in ("loss", "interpolation") if hooks and getattr(hooks[0], p)]
        arm = {0: "none", 1: "".join(parts), 2: "both"}[len(parts)]
        started.append(f"{kwargs['method']}-{arm}-{kwargs['seed']}")
        before(kwargs["method"], kwargs["seed"], arm)
        return real(teacher, **kwargs)

    monkeypatch.setattr(compare, "quantize", quantize)
    return started


def never(*_):
    raise AssertionError("a finished cell was run again")


def complaint(*argv: object) -> str:
    """The one line of a refusal."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # which would be further lines
        status, _, err = call(*argv)
    assert status == 2
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("compare.py: error: ")
    return lines[0]
