"""A user's mistakes and what is short on the machine: one line each, nothing lost."""

import errno
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from agm import AgmError
from benchmarks import command_line, compare
from benchmarks.process import locked
from tests import hostile
from tests.benchmarks.compare import (
    BRIEF,
    BRIEF3,
    NETS,
    ROOT,
    SCRIPT,
    call,
    complaint,
    files,
    load,
    never,
    ok,
    spy,
    untimed,
)

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
    "1 bit": (("--bits", 1), ("--bits", "2 to 8", "got 1")),
    "0 bits": (("--bits", 0), ("--bits", "2 to 8", "got 0")),
    "0 weight bits": (("--weight-bits", 0, "--act-bits", 4), ("--weight-bits", "2 to 8", "got 0")),
    "9 bits": (("--bits", 3, 9), ("--bits", "2 to 8", "got 9")),
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
    "pretrained of no classes": (("--model", "nets:scalar", "--pretrained"), ("returns ()",)),
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
    "resume a typo": (("--resume", "--out", "rnu"), ("no rnu to go on in", "leave --resume out")),
    "resume what": (("--resume",), ("--resume needs --out",)),
    "no steps": (("--steps", 0), ("steps", "got 0", ">= 1")),
    "a warm-up alone": (("--steps", 1), ("steps=1", "warm-up", "2 or more")),
    "no batch": (("--batch-size", 0), ("batch_size", "got 0", ">= 1")),
    "no seeds": (("--seeds", 0), ("--seeds", "at least 1, got 0")),
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
    "digits of another size": (("--image-size", 16), ("8x8", "leave --image-size")),
    "digits of another mean": (("--mean", 0), ("8x8", "--mean")),
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
    monkeypatch.setenv("COLUMNS", "80")
    lines = ok("--help").splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 80
    commands = [line.split()[1:] for line in lines[:8] if line.startswith("  compare.py ")]
    assert len(commands) == 3
    command_line.parse(commands[0][:3])
    command_line.parse(commands[1][:7])


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


def test_results_without_their_settings(copied):
    out, argv = copied
    (out / "settings.json").unlink()
    before = files(out)
    for more in ((), ("--resume",), ("--steps", 4)):
        line = complaint(*argv, *more)
        assert "holds results" in line
        assert "settings.json" in line
    assert files(out) == before


@pytest.mark.parametrize("content", ["[]", "3", '"a"', "[1, 2]"])
def test_settings_that_are_something_else(copied, content):
    out, argv = copied
    (out / "settings.json").write_text(content)
    assert "settings.json is damaged" in complaint(*argv, "--resume")


def test_a_terminal_without_arrows(copied):
    _, argv = copied
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *argv, "--resume"], text=True, capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "cp1252"}, encoding="cp1252",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "movement % ?" in run.stdout
    assert "Reproduce: " in run.stdout


@pytest.mark.parametrize(
    ("closed", "more", "status"), [(">&-", "", 0), ("2>&-", "", 0), ("2>&-", "--steps 0", 2)]
)
def test_a_closed_stream(home, closed, more, status):
    command = f"{sys.executable} {SCRIPT} {shlex.join(BRIEF3)} --out run {more} {closed}"
    run = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert run.returncode == status
    assert "Error" not in run.stderr
    assert (home / "run" / "report.json").exists() == (status == 0)


def test_the_programs_own_modules_hide_none_that_a_network_imports(home):
    (home / "libraries" / "progress").mkdir(parents=True)
    (home / "libraries" / "progress" / "bar.py").write_text("from nets import cnn")
    (home / "theirs.py").write_text("from progress.bar import cnn")
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *BRIEF3, "--model", "theirs:cnn", "--out", "run"],
        env=os.environ | {"PYTHONPATH": str(home / "libraries")}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_a_home_folder_after_an_equals_sign(home, monkeypatch):
    monkeypatch.setenv("HOME", str(home / "own"))
    ok(*BRIEF3, "--out=~/run")
    assert (home / "own" / "run" / "report.json").exists()
    assert not (home / "~").exists()


def test_a_network_whose_module_sets_a_default_dtype(home):
    text = "torch.set_default_dtype(torch.float64)\ndef narrow():\n    return cnn().float()\n"
    (home / "nets.py").write_text(NETS + text)
    try:
        ok(*BRIEF3, "--model", "nets:narrow", "--out", "run")
    finally:
        torch.set_default_dtype(torch.float32)


def test_images_of_two_channels(home):
    more = ("--mean", 0, 0, "--std", 1, 1, "--image-size", 16, "--out", "run")
    ok(*BRIEF3, "--model", "nets:two_channels", *more)
    assert (home / "run" / "report.png").stat().st_size > 1000


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
