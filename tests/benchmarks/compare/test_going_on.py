"""Going on where a run ended, failed, or was stopped."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from agm import AGM
from baselines import METHODS
from baselines.errors import CheckpointError, NonFiniteLossError
from baselines.quantization import checkpoint as checkpoints
from baselines.training import trainer
from baselines.training.checks import resolve_precision
from benchmarks import compare
from tests.benchmarks.compare import (
    BRIEF,
    BRIEF3,
    NETS,
    REQUIRED,
    SCRIPT,
    call,
    complaint,
    enter,
    files,
    load,
    never,
    ok,
    same_networks,
    spy,
    untimed,
)

# Going on


def test_a_finished_run_is_not_overwritten(copied):
    out, argv = copied
    before = files(out)
    line = complaint(*argv)
    assert "run holds a run" in line
    assert "add --resume" in line
    assert files(out) == before


# Than this machine's own.
PRECISION = {"fp32": "bf16", "bf16": "fp32"}[resolve_precision("auto", torch.device("cpu"))]


@pytest.mark.parametrize(
    "change",
    [("--steps", 9), ("--batch-size", 17), ("--precision", PRECISION), ("--activations", "relu")],
    ids=["steps", "batch", "precision", "activations"],
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


def test_results_of_another_machines_precision_are_not_mixed(copied, monkeypatch):
    monkeypatch.setattr(trainer, "resolve_precision", lambda *_: PRECISION)
    assert f", {PRECISION!r} now" in complaint(*copied[1], "--resume")


TIMES = """
class Times(nn.Sequential):
    def forward(self, x):
        return super().forward({factor} * x)

def times():
    torch.manual_seed(0)
    return Times(*cnn())
"""


def test_results_of_another_network_with_the_same_weights_are_not_mixed(home, monkeypatch):
    argv = (*BRIEF3, "--model", "nets:times", "--out", "run")
    (home / "nets.py").write_text(NETS + TIMES.format(factor=1))
    ok(*argv)
    before = files(home / "run")
    (home / "nets.py").write_text(NETS + TIMES.format(factor=2.5))
    monkeypatch.delitem(sys.modules, "nets")
    line = complaint(*argv, "--resume")
    assert "other settings (network_hash" in line
    assert "teacher_hash" not in line
    assert files(home / "run") == before


def test_each_cell_names_what_trained_it(copied, monkeypatch):
    out, argv = copied
    before = {c["name"]: c["versions"] for c in load(out)["cells"]}
    later = {"versions": {"commit": "later"}, "machine": {}}
    monkeypatch.setattr(compare, "provenance", lambda _: later)
    ok(*argv, "--seeds", 3, "--resume")
    after = {c["name"]: c["versions"] for c in load(out)["cells"]}
    new = after.keys() - before.keys()
    assert len(new) == 2
    assert after == before | {name: {"commit": "later"} for name in new}


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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("gdfq-w3a3-none-seed1.json", b"{}"), ("gdfq-w3a3-none-seed1.json", b"[]"),
        ("gdfq-w3a3-none-seed1.json", b"null"), ("gdfq-w3a3-none-seed1.npy", b"PK\x03\x04" * 30),
        ("gdfq-w3a3-none-seed1.ckpt", b"PK\x03\x04" * 30),
    ],
)  # fmt: skip
def test_what_is_no_result_is_made_again(copied, name, content):
    out, argv = copied
    (out / name).write_bytes(content)
    status, text, _ = call(*argv, "--resume")
    assert status == 0
    assert load(out)["table"] in text
    assert (out / name).read_bytes() != content


@pytest.mark.parametrize("size", [0, 50])
@pytest.mark.parametrize(
    "name",
    [
        "settings.json", "gdfq-w3a3-none-seed1.json", "gdfq-w3a3-none-seed1.npy",
        "gdfq-w3a3-none-seed1.onnx",
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_finished_run_is_named_or_made_again(copied, name, size):
    out, argv = copied
    (out / name).write_bytes((out / name).read_bytes()[:size])
    status, text, err = call(*argv, "--resume")
    if status == 0:
        assert load(out)["table"] in text
        assert (out / name).stat().st_size > size
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
        assert shlex.split(command)[1:] == [str(SCRIPT), *argv]
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


def test_nobody_reads_the_output(home):
    reader, writer = os.pipe()
    os.close(reader)  # as head does once it has its lines
    argv = (*BRIEF3, "--out", "run")
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), *argv], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert ended.returncode == 128 + signal.SIGPIPE
    assert ended.stderr.splitlines()[-1].endswith("go on with --resume and its --out")
    assert not re.search("Traceback|Exception ignored", ended.stderr)
    assert "baseline" in ok(*argv, "--resume")


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
