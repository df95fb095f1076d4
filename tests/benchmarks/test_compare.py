"""compare.py as a user meets it: its output, its files, its exit status and its complaints."""

import contextlib
import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from agm import AGM, AgmError
from baselines import METHODS, load_quantized
from baselines.errors import CheckpointError, ExportError, NonFiniteLossError
from baselines.quantization import checkpoint as checkpoints
from baselines.quantization import export
from baselines.quantization.checkpoint import fingerprint
from baselines.training.trainer import resolve_precision
from benchmarks import command_line, compare, progress
from benchmarks.process import locked
from benchmarks.task import datasets, teachers
from benchmarks.task import task as tasks
from benchmarks.task.folders import image_folder
from benchmarks.task.networks import resnet20
from tests import hostile
from tests.baselines import same_state

ROOT = str(Path(__file__).parents[2])
SCRIPT = Path(ROOT) / "benchmarks" / "compare.py"
SHARED = Path(__file__).parents[3] / "shared"
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

def grouped():
    return cnn(lambda: nn.GroupNorm(2, 8))

def bare():
    return cnn(norm=nn.Identity)

def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.BatchNorm1d(8), nn.ReLU(),
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


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the digits teacher lies, trained once."""
    folder = tmp_path_factory.mktemp("teacher") / ".agm-cache"
    teachers.digits_teacher(folder)
    return folder


@pytest.fixture(autouse=True)
def home(cache, tmp_path, monkeypatch):
    """An empty current directory but for the teacher and nets.py."""
    enter(tmp_path, cache, monkeypatch)
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    return tmp_path


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
    return [{k: v for k, v in c.items() if k not in ("seconds", "steps_per_s")} for c in cells]


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


@pytest.fixture(scope="module")
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
def copied(finished, home):
    """A copy of the finished run in the current directory, and its command line."""
    shutil.copytree(finished[0], home / "run")
    return home / "run", finished[1]


# What a run leaves


def test_report(finished):
    out, _, text = finished
    got = load(out)
    cells = got["cells"]
    assert [(c["hooks"], c["seed"]) for c in cells] == [
        ("none", 0), ("both", 0), ("none", 1), ("both", 1),
    ]  # fmt: skip
    for cell in cells:
        assert cell.keys() >= REQUIRED
        assert (cell["method"], cell["weight_bits"], cell["act_bits"]) == ("gdfq", 3, 3)
        assert cell["accuracy_fp"] > 90
        assert 0 <= cell["accuracy_ptq"] <= 100
        assert cell["accuracy_last"] == cell["history"][-1]["accuracy"]
        assert cell["history"][-1]["step"] == 8
        assert cell["seconds"] > 0
        assert cell["steps_per_s"] == pytest.approx(8 / cell["seconds"])
        assert "conv1.weight" in cell["policy"]
    assert got["versions"].keys() >= {"python", "torch", "torchvision", "numpy", "commit"}
    assert got["versions"]["torch"] == torch.__version__
    assert got["settings"]["teacher_hash"] == fingerprint(teachers.digits_teacher())
    assert got["evaluation_images"] == 899
    assert got["table"] in text


def test_there_is_a_picture(finished):
    with Image.open(finished[0] / "report.png") as image:
        assert image.format == "PNG"
        image.load()


def test_each_cell_leaves_a_network_that_is_as_good_as_reported(finished):
    out, *_ = finished
    cells = load(out)["cells"]
    assert len({c["checkpoint"] for c in cells}) == len(cells) == len(files(out, "*.ckpt"))
    for cell in cells:
        model = load_quantized(out / cell["checkpoint"], teachers.digits_cnn())
        got = accuracy(model, datasets.digits_images())
        assert got == pytest.approx(cell["accuracy_last"], abs=0.25)  # two images
    assert not [n for n in files(out) if n.endswith((".run", ".previous", ".tmp"))]


def test_what_is_printed(finished):
    _, argv, text = finished
    assert re.search(r"full precision 9\d\.\d\d %", text)
    how = (
        f"{resolve_precision('auto', torch.device('cpu'))} on cpu, 1 at a time on 1 CPU thread each"
    )
    assert text.splitlines()[1].endswith(f"; {how}")
    policy = text.index("Bit policy W3A3")
    assert text.count("Bit policy") == 1
    assert "layer3.0.conv2.weight" in text[policy : text.index("Wrote")]
    ended = re.findall(r"^\[(\d)/4\] gdfq-w3a3-\S+: \d+\.\d\d % after \d+ s$", text, re.M)
    assert ended == list("1234")  # where there is no terminal
    assert "\r" not in text
    assert policy < text.index("[1/4]")  # before the training
    assert text.index("[4/4]") < text.index("last step %")  # which the table follows
    assert "report.json" in text[text.index("last step %") :]
    assert argv[-2:] == ["--out", "run"]
    command = shlex.join(["python", "benchmarks/compare.py", *argv[:-2]])
    assert text.splitlines()[-1] == f"Reproduce: {command}"


def test_the_printed_command_reproduces_the_run(finished, home):
    python, script, *argv = shlex.split(load(finished[0])["command"])
    assert (python, script) == ("python", "benchmarks/compare.py")
    ok(*argv)  # into a folder of its own
    (out,) = (home / "runs").iterdir()
    assert untimed(load(out)["cells"]) == untimed(load(finished[0])["cells"])
    assert same_networks(out, finished[0], files(finished[0], "*.ckpt"))


def test_the_default_folder_is_new(home):
    ok(*BRIEF)
    (out,) = (home / "runs").iterdir()
    assert out.name.startswith("digits-")
    assert cells_of(out, "weight_bits", "act_bits") == [(2, 2), (3, 3)]


def test_other_files_in_the_folder_are_left_alone(home):
    mine = {"notes.tmp": b"mine", ".draft.tmp": b"mine", "gdfq.json": b"{}"}
    for name, content in mine.items():
        (home / name).write_bytes(content)
    ok(*BRIEF3, "--out", ".")
    assert files(home).items() >= mine.items()


# The grid


def cells_of(out: str | Path, *keys: str) -> list[tuple]:
    return [tuple(c[k] for k in keys) for c in load(out)["cells"]]


def test_the_baseline_alone_and_one_seed(monkeypatch):
    text = ok(*BRIEF3, "--first-seed", 7, "--out", "run")
    assert cells_of("run", "method", "hooks", "seed") == [("gdfq", "none", 7)]
    (row,) = (line for line in text.splitlines() if line.startswith("gdfq  "))
    assert row.count("± n/a") == 6
    # One command for going on, and for looking at the result again.
    spy(monkeypatch, never)
    assert row in ok(*BRIEF3, "--first-seed", 7, "--out", "run", "--resume")


def test_without_onnx_one_line_says_so(monkeypatch):
    find_spec = export.find_spec
    monkeypatch.setattr(
        export, "find_spec", lambda name: None if name.startswith("onnx") else find_spec(name)
    )
    options = ["--bits", 3, "--seeds", 2, "--steps", 8, "--jobs", 1, "--out", "a"]
    status, out, err = call(*options)
    assert status == 0, err
    (line,) = (line for line in (out + err).splitlines() if "pip install" in line)
    assert "onnx, onnxscript" in line
    assert all(cell["onnx"] is None and cell["accuracy_last"] for cell in load("a")["cells"])
    assert not list(Path("a").glob("*.onnx"))


def test_all_methods_at_two_widths():
    text = ok(*BRIEF, "--baseline", "all", "--bits", 2, 3, "--out", "run")
    got = cells_of("run", "method", "weight_bits", "act_bits")
    assert sorted(got) == sorted((m, b, b) for m in METHODS for b in (2, 3))
    assert "Bit policy W2A2" in text
    assert "Bit policy W3A3" in text
    names = "|".join(METHODS)
    assert len(re.findall(rf"^(?:{names}) +W[23]A[23] +baseline", text, re.M)) == 2 * len(METHODS)


def test_several_arms_and_bits_apart():
    argv = ("--with-agm", "loss", "interpolation", "both", "--weight-bits", 2, "--act-bits", 4)
    text = ok(*BRIEF, *argv, "--out", "run")
    assert cells_of("run", "hooks", "weight_bits", "act_bits") == [
        (arm, 2, 4) for arm in ("none", "loss", "interpolation", "both")
    ]
    for name in ("baseline", "+loss", "+interpolation", "+AGM"):
        assert len(re.findall(rf"^gdfq +W2A4 +{re.escape(name)} ", text, re.M)) == 1


def test_real_images_show_the_room():
    text = ok(*BRIEF3, "--with-agm", "--with-real", "--out", "run")
    assert cells_of("run", "hooks") == [("none",), ("both",), ("real",)]
    *_, real = load("run")["cells"]
    assert real["accuracy_last"] == real["accuracy_proof"]
    assert real["accuracy_tuning"] is None  # it has learned from them
    assert len(re.findall(r"^gdfq +W3A3 +real images ", text, re.M)) == 1


@pytest.mark.parametrize("arm", ["loss", "interpolation"])
def test_a_part_of_the_add_on(arm, monkeypatch):
    started = spy(monkeypatch)
    ok(*BRIEF3, "--with-agm", arm, "--out", "run")
    assert started == ["gdfq-none-0", f"gdfq-{arm}-0"]
    assert cells_of("run", "hooks") == [("none",), (arm,)]


def test_an_option_given_twice_counts_once(monkeypatch):
    started = spy(monkeypatch)
    argv = ("--baseline", "gdfq", "gdfq", "--with-agm", "loss", "loss", "--bits", 3, 3)
    ok(*BRIEF, *argv, "--out", "run")
    assert started == ["gdfq-none-0", "gdfq-loss-0"]
    assert len(load("run")["cells"]) == 2


def test_a_run_of_one_step_can_be_looked_at_again(monkeypatch):
    argv = (*BRIEF3, "--steps", 1, "--out", "run")
    text = ok(*argv)
    assert "nan" not in text.lower()
    assert load("run")["table"] in ok(*argv, "--resume")


# A user's own model and images


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


def test_resnet20_with_weights_on_a_folder_of_images(weights, folder):
    argv = ("--model", "resnet20", "--weights", weights, "--data", folder, "--bits", 3)
    text = ok(*argv, *BRIEF, "--out", "run")
    assert "on 20 evaluation images" in text
    (cell,) = load("run")["cells"]
    model = resnet20()
    model.load_state_dict(
        {k.removeprefix("module."): v for k, v in torch.load(weights)["state_dict"].items()}
    )
    assert load("run")["settings"]["teacher_hash"] == fingerprint(model)
    images = image_folder(folder, datasets.Inputs(32, 32))
    assert cell["accuracy_fp"] == accuracy(model.eval(), images)
    quantized = load_quantized(Path("run", cell["checkpoint"]), resnet20())
    got = accuracy(quantized, images)
    assert got == pytest.approx(cell["accuracy_last"], abs=5)  # one image


def test_a_factory_from_the_current_directory_at_the_default_widths(folder):
    ok("--model", "nets:cnn", "--data", folder, *BRIEF, "--out", "run")
    assert cells_of("run", "weight_bits", "act_bits") == [(3, 3), (4, 4)]
    assert load("run")["evaluation_images"] == 20


def test_many_classes_are_judged_by_their_five_largest_logits_too(home):
    rng = np.random.default_rng(0)
    for i in range(21):
        (home / "many" / f"{i:02}").mkdir(parents=True)
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(home / "many" / f"{i:02}" / "1.png")
    text = ok("--model", "nets:cnn", "--data", "many", *BRIEF3, "--out", "run")
    (cell,) = load("run")["cells"]
    for which in ("fp", "ptq", "last"):
        assert 0 <= cell[f"accuracy_{which}"] <= cell[f"accuracy_{which}_top5"] <= 100
    assert cell["accuracy_last_top5"] == cell["history"][-1]["accuracy_top5"] > 0
    assert cell["accuracy_tuning"] is None  # the first half of one image
    assert cell["accuracy_proof"] == cell["accuracy_last"]
    first, five = cell["accuracy_fp"], cell["accuracy_fp_top5"]
    assert f"full precision {first:.2f} % top-1, {five:.2f} % top-5 on 21 " in text
    assert "last step %, top-5" in load("run")["table"]


@pytest.mark.parametrize(("patience", "shown"), [(0, True), (1e9, False)])
def test_a_long_evaluation_shows_its_progress(monkeypatch, patience, shown):
    monkeypatch.setattr(tasks, "PATIENCE", patience)
    monkeypatch.setattr(progress, "shown", lambda: True)
    status, text, _ = call(*BRIEF3, "--out", "run", together=True)
    assert status == 0
    assert ("evaluating: " in text) == shown


def test_why_there_is_no_file_of_integers_is_told_once(monkeypatch):
    def missing(*_, **__):
        raise ExportError("an ONNX file needs onnx, which is missing")

    monkeypatch.setattr("baselines.run.export_onnx", missing)
    text = ok(*BRIEF, "--out", "run")
    assert text.count("needs onnx") == text.count("No ONNX file: an ONNX file needs onnx") == 1
    assert cells_of("run", "onnx", "onnx_bytes") == [(None, None)] * 2


def test_few_classes_are_not(finished):
    for cell in load(finished[0])["cells"]:
        assert cell["accuracy_last_top5"] is None
    assert "top-5" not in finished[2]


@pytest.mark.parametrize(
    ("argv", "judged", "steps"),
    [
        ((), 5, range(5, 21)),  # up to 400 images, 20 times all 20 of the folder, for 80 trained on
        ((), 1, [5, 10, 15, 20]),
        ((), 0.1, [5, 20]),
        (("--eval-every", 7), 0.1, [5, 7, 14, 20]),
    ],
)
def test_how_often_images_are_judged(folder, monkeypatch, argv, judged, steps):
    monkeypatch.setattr(tasks, "JUDGED", judged)
    argv = ("--model", "nets:cnn", "--data", folder, "--out", "run", *argv)
    ok(*BRIEF3, *argv, "--steps", 20)
    (cell,) = load("run")["cells"]
    assert [row["step"] for row in cell["history"] if "accuracy" in row] == list(steps)
    assert len(cell["history"]) >= 20  # of losses and images


def test_the_halves_of_each_class(folder):
    ok("--model", "nets:cnn", "--data", folder, *BRIEF3, "--out", "run")
    (cell,) = load("run")["cells"]
    model = load_quantized(Path("run", cell["checkpoint"]), teachers.build("nets:cnn"))
    hits = teachers.hits(model, image_folder(folder, datasets.Inputs(32, 32)))[:, 0]
    first, second = (100 * hits[start::2].float().mean().item() for start in (0, 1))
    assert cell["accuracy_tuning"] == pytest.approx(first, abs=10.1)  # one image
    assert cell["accuracy_proof"] == pytest.approx(second, abs=10.1)
    assert cell["accuracy_last"] == (cell["accuracy_tuning"] + cell["accuracy_proof"]) / 2


@pytest.mark.parametrize(
    ("argv", "inputs"),
    [
        ((), "Inputs(image_size=224, resize=256, "),
        (("--image-size", 32), "Inputs(image_size=32, resize=37, "),
        (("--image-size", 32, "--resize", 32), "Inputs(image_size=32, resize=32, "),
        (("--image-size", 32, "--mean", 0, 0.5, 1), "mean=(0.0, 0.5, 1.0), std=(0.229, "),
        (("--image-size", 32, "--std", 2, 0.5, 1), "0.406), std=(2.0, 0.5, 1.0)"),
    ],
)
def test_a_librarys_inputs_and_flags_before_them(argv, inputs, monkeypatch):
    state = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    args = command_line.parse(["--model", "torchvision:resnet18", "--pretrained", *map(str, argv)])
    task = tasks.load_task(args)
    assert inputs in str(task.inputs)


def test_torchvision_without_images_to_judge(recwarn):
    network = torchvision.models.resnet18(num_classes=10)
    torch.save(network.state_dict(), "resnet18.pth")
    argv = ("--model", "torchvision:resnet18", "--num-classes", 10, "--image-size", 32)
    argv += ("--weights", "resnet18.pth")
    text = ok(*argv, "--bits", 3, *BRIEF, "--with-agm", "--out", "run")
    for line in text.splitlines():
        if line.startswith("gdfq"):
            assert line.split()[3:6] == ["n/a"] * 3
    keys = ("accuracy_fp", "accuracy_ptq", "accuracy_last")
    assert cells_of("run", *keys) == [(None,) * 3] * 2
    assert len(files(Path("run"), "*.ckpt")) == 2
    assert not [w for w in recwarn if "legend" in str(w.message)]  # from the empty plot


def test_the_shared_network_and_images():
    source, data = SHARED / "weights" / "cifar10_resnet20.th", SHARED / "data/cifar10/dev"
    if not (source.exists() and data.exists()):
        pytest.skip(f"{SHARED} is absent")
    for name in sorted(os.listdir(data)):
        few = sorted((data / name).iterdir())[:10]
        Path("few", name).mkdir(parents=True)
        for path in few:
            Path("few", name, path.name).symlink_to(path)
    ok("--model", "resnet20", "--weights", source, "--data", "few", "--bits", 8, *BRIEF,
       "--out", "run")  # fmt: skip
    (cell,) = load("run")["cells"]
    assert cell["accuracy_fp"] > 80
    assert cell["accuracy_ptq"] > 60  # 8 bits


# A user's mistakes

OWN = ("--model", "nets:cnn")
MISTAKES = {
    "no weights": (
        ("--model", "resnet20", "--weights", "nowhere.th"), ("nowhere.th", "pass the path"),
    ),
    "no images": ((*OWN, "--data", "nowhere"), ("nowhere", "pass a directory")),
    "wrong class count": (
        (*OWN, "--data", "images", "--num-classes", 7), ("10 class folders", "expected 7", "pass"),
    ),
    "model of other classes": (
        ("--model", "resnet20", "--weights", "resnet20.th", "--num-classes", 7),
        ("10 classes", "model has 7"),
    ),
    "weights of another network": (
        ("--model", "torchvision:resnet18", "--num-classes", 10, "--image-size", 32,
         "--weights", "resnet20.th"),
        ("resnet20.th", "missing keys", "Choose the model"),
    ),
    "unknown method": (("--baseline", "zeroq"), ("--baseline", "'zeroq'", "gdfq", "--help")),
    "unknown part": (("--with-agm", "all"), ("--with-agm", "'all'", "interpolation")),
    "unknown recipe": (("--recipe", "slow"), ("--recipe", "'slow'", "paper")),
    "unknown option": (("--epochs", 3), ("--epochs", "--help")),
    "no number": (("--steps", "many"), ("--steps", "'many'")),
    "no checkpoints": (("--checkpoint-every", 0), ("--checkpoint-every", "at least 1")),
    "negative seed": (("--first-seed", -1), ("--first-seed", "got -1")),
    "corrupt weights": (
        ("--model", "resnet20", "--weights", "corrupt.th"), ("corrupt.th", "damaged", "re-save"),
    ),
    "hostile weights": (
        ("--model", "resnet20", "--weights", "hostile.th"), ("hostile.th", "run code", "re-save"),
    ),
    "empty class": ((*OWN, "--data", "empty"), ("no images", "empty/a", "add some")),
    "random weights": (("--model", "resnet20"), ("'resnet20'", "random weights", "--weights")),
    "random weights of torchvision": (
        ("--model", "torchvision:resnet18"), ("'torchvision:resnet18'", "random weights"),
    ),
    "unknown model": (("--model", "nonsense"), ("'nonsense'", "torchvision:NAME")),
    "a typo": (("--model", "restnet20"), ("'restnet20' (did you mean resnet20 or ",)),
    "a library's without it": (("--model", "resnet50"), (" or torchvision:resnet50 or ",)),
    "a typo in the library": (
        ("--model", "torchvison:resnet18"), ("(did you mean torchvision:resnet18?)",),
    ),
    "images in one folder": (
        (*OWN, "--data", "images/a"), ("no class subfolders in 'images/a'", "sort them so"),
    ),
    "unknown torchvision": (("--model", "torchvision:resnet19"), ("'resnet19'", "resnet18")),
    "no such module": (("--model", "nowhere_at_all:f"), ("nowhere_at_all", "current directory")),
    "failing factory": (("--model", "nets:broken"), ("nets:broken", "first line")),
    "1 bit": (("--bits", 1), ("bits", "2 to 8", "got 1")),
    "0 bits": (("--bits", 0), ("bits", "2 to 8", "got 0")),
    "0 weight bits": (("--weight-bits", 0, "--act-bits", 4), ("bits", "2 to 8", "got 0")),
    "9 bits": (("--bits", 3, 9), ("bits", "2 to 8", "got 9")),
    "pretrained and weights": (
        ("--model", "torchvision:resnet18", "--pretrained", "--weights", "resnet20.th"),
        ("--pretrained or --weights", "not both"),
    ),
    "pretrained of other classes": (
        ("--model", "nets:trained", "--pretrained", "--num-classes", 7), ("(2, 20)", "(2, 7)"),
    ),
    "images of other classes than the pretrained": (
        ("--model", "nets:trained", "--pretrained", "--data", "images"),
        ("10 class folders", "expected 20"),
    ),
    "nothing pretrained": (("--pretrained",), ("'digits'", "no pretrained weights")),
    "random weights of timm": (("--model", "timm:resnet18"), ("--pretrained", "--weights")),
    "a crop that is not there": (
        (*OWN, "--image-size", 32, "--resize", 28), ("resize must be >= image_size 32", "28"),
    ),
    "no evaluations": (("--eval-every", 0), ("--eval-every", "at least 1")),
    "no real images": ((*OWN, "--with-real"), ("real images", "--data")),
    "real images in parts": (
        ("--with-real", "--parallel", "batch"), ("--with-real", "one process"),
    ),
    "half of the bits": (("--weight-bits", 4), ("--weight-bits", "--act-bits", "together")),
    "bits twice": (("--bits", 3, "--act-bits", 4), ("--bits", "--act-bits", "not both")),
    "resume what": (("--resume",), ("--resume needs --out",)),
    "no steps": (("--steps", 0), ("steps", "got 0", ">= 1")),
    "no batch": (("--batch-size", 0), ("batch_size", "got 0", ">= 1")),
    "no seeds": (("--seeds", 0), ("--seeds", "at least 1")),
    "bad device": (("--device", "toaster"), ("--device", "'toaster'")),
    "no such GPU": (("--device", "cuda:99"), ("--device", "'cuda:99'")),
    "a device without values": (("--device", "meta"), ("--device", "'meta'")),
    "mean of wrong length": (
        (*OWN, "--mean", 0.5), ("--mean and --std need 3 numbers", "got 1 and 3"),
    ),
    "std of wrong length": (("--std", 1, 1, 1), ("need 1 number", "got 1 and 3")),
    "std of zero": ((*OWN, "--std", 1, 0, 1), ("std", "> 0")),
    "image size": ((*OWN, "--image-size", 30), ("30", "multiple of 4")),
    "no image size": (("--image-size", 0), ("image", "0")),
    "image size of nothing": ((*OWN, "--image-size", -4), ("-4",)),
    "no BatchNorm": (("--model", "nets:bare"), ("nets:bare", "BatchNorm", "choose")),
    "no convolution": (("--model", "nets:mlp"), ("nets:mlp", "onv")),
    "an error of the network's own": (("--model", "nets:picky"), ("3x32x32", "48 pixels", "set")),
    "two outputs": (("--model", "nets:Pair"), ("tuple", "expected")),
    "branching": (("--model", "nets:Branching"), ("Branching", "torch.fx", "rewrite")),
    "GroupNorm": (("--model", "nets:grouped"), ("'2' (GroupNorm)", "supported are Conv")),
    "grey model on coloured images": (("--data", "images"), ("channel",)),
}  # fmt: skip


def test_help_is_a_screen_with_the_three_commands_first(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines = ok("--help").splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 100
    commands = [line.split()[1:] for line in lines[:8] if line.startswith("  compare.py ")]
    assert len(commands) == 3
    command_line.parse(commands[0][:3])
    command_line.parse(commands[1][:7])


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


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, weights, folder, home):
    argv, parts = MISTAKES[name]
    (home / "corrupt.th").write_bytes(weights.read_bytes()[:1000])
    (home / "hostile.th").write_bytes(hostile.trap("os.system", home / "canary"))
    (home / "empty" / "a").mkdir(parents=True)
    where = () if "--resume" in argv else ("--out", "run")
    line = complaint(*BRIEF, *argv, *where)
    for part in parts:
        assert part in line
    assert list(files(home / "run")) in ([], [".lock"])
    assert not (home / "canary").exists()
    with pytest.raises(AgmError):  # which Python shows with its traceback
        compare.main([*BRIEF, *(str(a) for a in argv), *where, "--debug"])


def test_grey_images_that_a_network_repeats_to_three_channels(home):
    command = (*BRIEF3, "--model", "nets:Grey", "--out", "run")
    assert "3x32x32 images" in (line := complaint(*command))
    assert "--in-channels" in line
    assert "--in-channels must be at least 1, got 0" in complaint(*command, "--in-channels", 0)
    status, out, _ = call(*command, "--in-channels", 1)
    assert status == 0
    assert "--in-channels 1" in out
    (images,) = home.glob("run/*.npy")
    assert np.load(images).shape == (64, 32, 32, 1)


def test_a_file_that_is_no_image(folder, home):
    (folder / "c" / "notes.txt").write_text("hello")
    line = complaint(*BRIEF, *OWN, "--data", folder, "--out", "run")
    assert "notes.txt" in line
    assert "repair the file, or move it" in line
    assert list(files(home / "run")) in ([], [".lock"])


def test_a_damaged_image_is_named_before_the_training(folder, home, monkeypatch):
    file = folder / "c" / "1.png"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])  # its header is sound
    spy(monkeypatch, never)
    line = complaint(*BRIEF, *OWN, "--data", folder, "--out", "run")
    assert f"cannot read '{file}' as an image" in line
    assert list(files(home / "run")) in ([], [".lock"])


@pytest.mark.parametrize("out", ["nets.py", "nets.py/run", "/dev/null/run"])
def test_an_output_folder_that_cannot_be(out):
    line = complaint(*BRIEF, "--out", out)
    assert out in line
    assert "choose another --out" in line
    assert Path("nets.py").read_text() == NETS


PROGRAMS = ["compare.py", "cifar.py", "speed.py"]
PROGRAMS += [f"evidence/{name}.py" for name in ("deployed", "proof", "tables", "tune")]


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_is_not_installed_is_told_in_a_line(program):
    command = [sys.executable, "-I", "-S", str(SCRIPT.parent / program)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 2
    (line,) = child.stderr.splitlines()
    assert line.startswith(f"{Path(program).name}: error: torch, ")
    assert "pip install -e '.[bench]'" in line


def test_interrupted_while_torch_is_imported(home):
    """Nothing is said; the one line that the program waits in is torch's, of a fake."""
    (home / "torch.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(60)\n")
    child = subprocess.Popen(
        [sys.executable, str(SCRIPT)], env=os.environ | {"PYTHONPATH": str(home)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout.readline() == "importing\n"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (-signal.SIGINT, "")


def test_a_python_that_is_too_old_is_told_in_a_line():
    code = "import sys; sys.version_info = (3, 9, 2); import benchmarks"
    child = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({ROOT!r}); {code}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 2
    (line,) = child.stderr.splitlines()
    assert "Python 3.10 or newer is needed, this is 3.9.2" in line


def test_more_threads_than_cores_are_told(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    status, text, err = call(*BRIEF3, "--out", "run")
    assert status == 0
    assert "1 at a time on 3 CPU threads each" in text
    assert "3 threads are more than the cores here (1)" in err


def test_a_full_disk_of_temporary_files_is_told_in_a_line(monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/agm-1")

    monkeypatch.setattr(compare, "load_task", full)
    line = complaint(*BRIEF, "--out", "run")
    assert "No space left on device: '/tmp/agm-1'" in line
    assert "free some space" in line


def test_interrupted_before_the_training(monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "load_task", interrupted)
    assert call(*BRIEF, "--out", "run") == (130, "", "")


@pytest.mark.parametrize("free", [0, 8192, 65536])
def test_a_full_disk(small_disk, free):
    argv = (*BRIEF3, "--steps", 4, "--checkpoint-every", 2, "--with-agm")
    out, disk = small_disk / "run", os.statvfs(small_disk)
    out.mkdir()
    (small_disk / "filler").write_bytes(bytes(disk.f_bavail * disk.f_frsize - free))
    status, _, err = call(*argv, "--out", out)
    assert status == 2
    assert "No space left on device" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not [n for n in files(out) if n.endswith(".tmp")]
    shutil.copytree(out, "run")
    ok(*argv, "--out", "run", "--resume")
    ok(*argv, "--out", "whole")
    assert untimed(load("run")["cells"]) == untimed(load("whole")["cells"])


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_a_model_of_another_dtype_is_taken_in_float32(home, folder, dtype):
    (home / "wide.py").write_text(
        f"import nets, torch\ndef cnn(): return nets.cnn().to(torch.{dtype})\n"
    )
    try:
        ok("--model", "wide:cnn", "--data", folder, *BRIEF3, "--with-agm", "--out", "run")
    finally:
        sys.modules.pop("wide", None)
    assert len(load("run")["cells"]) == 2


def test_a_folder_in_use_is_refused(home):
    with locked(home / "run"):
        line = complaint(*BRIEF, "--out", "run")
        assert "another run is working in run" in line
        assert "choose another --out" in line


# Going on


def test_a_finished_run_is_not_overwritten(copied):
    out, argv = copied
    before = files(out)
    line = complaint(*argv)
    assert "run holds a run" in line
    assert "add --resume" in line
    assert files(out) == before


@pytest.mark.parametrize(
    "change",
    [("--steps", 9), ("--batch-size", 17), ("--precision", "fp32"), ("--image-size", 16)],
    ids=" ".join(["steps", "batch", "precision", "size"]).split(),
)
def test_results_of_other_settings_are_not_mixed(copied, change):
    out, argv = copied
    before = files(out)
    line = complaint(*argv, *change, "--resume")
    assert "other settings" in line
    key = change[0].strip("-").replace("-", "_")
    assert re.search(rf"\b{key} \S+ there, '?{change[1]}'? now", line)
    assert "choose another --out" in line
    assert files(out) == before


def test_resuming_a_finished_run_does_nothing(copied, monkeypatch):
    out, argv = copied
    want = load(out)
    spy(monkeypatch, never)
    text = ok(*argv, "--resume")
    got = load(out)
    for report in (want, got):
        report["versions"].pop("commit")  # of a working tree that may change meanwhile
    assert got == want
    assert want["table"] in text


@pytest.mark.parametrize("name", ["ratio", "decay", "interval", "discrepancy"])
def test_results_of_other_defaults_of_the_add_on_are_not_mixed(copied, monkeypatch, name):
    before = files(copied[0])
    value = {"interval": 11, "discrepancy": "logit_l1"}.get(name, 0.5)
    monkeypatch.setitem(AGM.__init__.__kwdefaults__, name, value)
    assert "other settings" in complaint(*copied[1], "--resume")
    assert files(copied[0]) == before


@pytest.mark.parametrize("method", METHODS)
def test_results_of_other_constants_of_a_method_are_not_mixed(copied, monkeypatch, method):
    losses, recipe = METHODS[method].quick(8)
    changed = replace(losses, bns_weight=3.0)
    monkeypatch.setattr(METHODS[method], "quick", lambda size: (changed, recipe))
    assert "other settings" in complaint(*copied[1], "--resume")


@pytest.mark.parametrize("size", [0, 50])
@pytest.mark.parametrize(
    "name", ["settings.json", "gdfq-w3a3-none-seed1.json", "gdfq-w3a3-none-seed1.npy"]
)
def test_a_damaged_file_of_a_finished_run_is_named_or_made_again(copied, name, size):
    out, argv = copied
    (out / name).write_bytes((out / name).read_bytes()[:size])
    status, text, err = call(*argv, "--resume")
    if status == 0:
        assert load(out)["table"] in text
    else:
        assert status == 2
        assert name in err


def test_more_seeds_keep_what_is_finished(copied, monkeypatch):
    out, argv = copied
    before = files(out, "gdfq-*")
    started = spy(monkeypatch)
    ok(*argv, "--seeds", 3, "--resume")  # the last of an option's values counts
    assert started == ["gdfq-none-2", "gdfq-both-2"]
    after = files(out, "gdfq-*")
    assert {name: after[name] for name in before} == before
    assert [c["seed"] for c in load(out)["cells"]] == [0, 0, 1, 1, 2, 2]
    assert "n=3" in load(out)["table"]


# Failures

FAILURES = [
    NonFiniteLossError("step 3, seed 0: loss of G is not finite\nand more"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more"),
    MemoryError(),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda e: type(e).__name__)
def test_a_failed_cell_does_not_lose_the_others(error, monkeypatch):
    argv = (*BRIEF3, "--with-agm", "--out", "run")

    def fail(method, seed, arm):
        if arm == "none":
            raise error

    with monkeypatch.context() as patch:
        started = spy(patch, fail)
        status, text, _ = call(*argv)
    assert status == 1
    assert started == ["gdfq-none-0", "gdfq-both-0"]
    (line,) = (line for line in text.splitlines() if line.startswith("FAILED"))
    assert line.startswith(f"FAILED gdfq-w3a3-none-seed0: {type(error).__name__}: ")
    assert "memory" in line or "not finite" in line
    bad, good = load("run")["cells"]
    assert bad.keys() >= REQUIRED
    assert bad["accuracy_last"] is None
    assert bad["error"] in line
    assert good["accuracy_last"] is not None
    kept = files(Path("run"), "gdfq-w3a3-both*")
    Image.open("run/report.png").verify()

    started = spy(monkeypatch)
    assert "FAILED" not in ok(*argv, "--resume")
    assert started == ["gdfq-none-0"]
    assert files(Path("run"), "gdfq-w3a3-both*") == kept
    assert all(c["error"] is None for c in load("run")["cells"])


def test_a_grid_that_fails_wholly_is_reported(monkeypatch):
    def fail(*_):
        raise NonFiniteLossError("step 3")

    spy(monkeypatch, fail)
    status, text, _ = call(*BRIEF3, "--baseline", "all", "--out", "run")
    assert status == 1
    assert text.count("FAILED") >= len(METHODS)
    Image.open("run/report.png").verify()
    with pytest.raises(NonFiniteLossError):
        compare.main([*BRIEF, "--out", "other", "--debug"])


# Being stopped

# Long enough to be caught in the act by a signal, and that after the warm-up.
STEPS, CAUGHT = 400, 150
LONG = (*BRIEF3, "--steps", str(STEPS), "--checkpoint-every", "3", "--with-agm", "--out", "run")


@pytest.fixture(scope="module")
def unbroken(cache, tmp_path_factory):
    """The folder of a method's LONG, which was never stopped."""
    folders = {}

    def make(method: str) -> Path:
        if method not in folders:
            folders[method] = tmp_path_factory.mktemp(method)
            with pytest.MonkeyPatch.context() as monkeypatch:
                enter(folders[method], cache, monkeypatch)
                ok("--baseline", method, *LONG)
        return folders[method] / "run"

    return make


def saved(run: Path) -> int:
    """The step of a run's newest checkpoint, which is damaged for as long as it is not there."""
    with contextlib.suppress(CheckpointError):
        return checkpoints.load(run)["trainer"]["step"]
    return 0


def stop(
    number: signal.Signals, home: Path, argv: Sequence[str], run: Path
) -> tuple[int, str, str]:
    """Run the command as a user would, and send it a signal in the midst of the training.

    Args:
        run: the checkpoint that tells how far it is.
    """
    out, err = home / "stdout", home / "stderr"
    with out.open("w") as stdout, err.open("w") as stderr:
        child = subprocess.Popen(
            [sys.executable, str(SCRIPT), *argv],
            stdout=stdout, stderr=stderr, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 600
            while saved(run) < CAUGHT and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            assert child.poll() is None, err.read_text()
            child.send_signal(number)
            status = child.wait(600)
        finally:
            child.kill()
            child.wait()
    return status, out.read_text(), err.read_text()


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)


@pytest.mark.parametrize(
    ("method", "number"),
    [
        pytest.param(method, number, marks=[pytest.mark.long] * (method != "gdfq"))
        for method in METHODS
        for number in SIGNALS
    ],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(method, number, unbroken, home, campaign):
    whole, out, cell = unbroken(method), home / "run", f"{method}-w3a3-both-seed0"
    out.mkdir()
    for name, content in files(whole).items():  # the add-on's cell is still to be run
        if not name.startswith((cell, "report")):
            (out / name).write_bytes(content)
    argv = ("--baseline", method, *LONG, "--resume")
    counted = f"{number.name} in compare.py"
    campaign.count(counted, runs=1)
    status, text, err = stop(number, home, argv, out / f"{cell}.run")
    assert not list(out.glob(f"{cell}.json"))
    if number == signal.SIGKILL:
        assert status == -number
        # What it might have been writing:
        for name in (f"{cell}.run.1234.tmp", f"{cell}.ckpt.1234.tmp"):
            (out / name).write_bytes(b"half a file")
    else:
        assert status == 128 + number
        assert re.search(rf"{cell}: stopped after step \d+ of {STEPS}", err)
        assert "stopping after this step" in err
        assert "Traceback" not in err
        assert "baseline" in text  # what is finished is reported
        command = err.splitlines()[-1].partition("go on with: ")[2]
        assert shlex.split(command)[1:] == ["benchmarks/compare.py", *argv]
    if number == signal.SIGTERM:  # and the newest checkpoint is damaged on top of it
        newest = out / f"{cell}.run"
        newest.write_bytes(newest.read_bytes()[:-1] + b"?")
        with pytest.warns(UserWarning, match="checksum"):
            ok(*argv)
    else:
        ok(*argv)
    assert untimed(load(out)["cells"]) == untimed(load(whole)["cells"])
    assert same_networks(out, whole, files(whole, "*.ckpt"))
    assert files(out).keys() == files(whole).keys()  # nothing temporary is left
    campaign.count(counted, resumed_bit_identical=1)


# The real command, but for a step that never ends.
ENDLESS = """
import os, signal, sys
from baselines.training.trainer import Trainer
from benchmarks import compare, progress

step, steps = Trainer.step, []
arrived, writing = os.pipe()
os.set_blocking(writing, False)
signal.set_wakeup_fd(writing)  # signal.pause would miss a signal that comes just before it

def endless(trainer):
    steps.append(step(trainer))
    if len(steps) == 3:
        print("in a long step", file=sys.stderr, flush=True)
        while os.read(arrived, 1):
            print("noticed", file=sys.stderr, flush=True)
    return steps[-1]

Trainer.step = endless
sys.exit(compare.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("method", "second"),
    [
        ("gdfq", signal.SIGTERM),
        pytest.param("qimera", signal.SIGINT, marks=pytest.mark.long),
        pytest.param("adadfq", signal.SIGTERM, marks=pytest.mark.long),
    ],
)
def test_a_second_signal_quits_at_once(method, second, home, campaign):
    argv = (*BRIEF3, "--steps", "9", "--checkpoint-every", "1", "--baseline", method)
    child = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, *argv, "--out", "run"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])},
    )  # fmt: skip
    campaign.count("second signals", runs=1)
    try:
        while "in a long step" not in (line := child.stderr.readline()):
            assert line, "it ended"
        child.send_signal(signal.SIGINT)
        while "noticed" not in (line := child.stderr.readline()):
            assert line, "it ended at the first signal"
        child.send_signal(second)
        assert child.wait(600) == 128 + second
    finally:
        child.kill()
        child.communicate()
    ok(*argv, "--out", "run", "--resume")
    ok(*argv, "--out", "whole")
    assert untimed(load("run")["cells"]) == untimed(load("whole")["cells"])
    campaign.count("second signals", quit_at_once_and_resumed_bit_identical=1)
