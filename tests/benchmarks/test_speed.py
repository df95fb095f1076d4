"""speed.py: that its columns compute the same thing, and that its figures agree with each other."""

import json
import sys

import pytest
import torch

from baselines.quantization.quantizers import ActivationQuantizer
from benchmarks import speed

SMALL = ("--baseline", "gdfq", "--batch-size", "4", "--image-size", "16", "--precision", "fp32")


def main(monkeypatch, *argv):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["speed.py", *argv])
        return speed.main()


def test_figures(monkeypatch, capsys, tmp_path):
    peaks = []

    def peak_memory(args, method, arm, plain):
        """In this process, which spares the start of ten."""
        request = json.dumps({"method": method, "arm": arm, "plain": plain})
        capsys.readouterr()
        assert main(monkeypatch, *args.argv, "--peak", request) == 0
        peaks.append((arm, plain))
        return float(capsys.readouterr().out)

    monkeypatch.setattr(speed, "peak_memory", peak_memory)
    out = tmp_path / "speed.json"
    assert main(monkeypatch, *SMALL, "--rounds", "2", "--out", str(out)) == 0
    got = json.loads(out.read_text())
    assert set(got) == {"command", "machine", "methods", "versions"}
    result = got["methods"]["gdfq"]
    assert (result["batch_size"], result["precision"]) == (4, "fp32")
    figures = result["figures"]
    steps = ("plain", "none", "loss", "interpolation", "both")
    assert set(figures) > set(steps)
    assert peaks == [("none", True), *((arm, False) for arm in steps[1:])]
    for name, row in figures.items():
        assert row["seconds"] > 0
        assert row["spread"] >= 0
        assert row["rounds"] == 2
        if name in steps:
            assert row["steps_per_s"] == pytest.approx(1 / row["seconds"])
            assert row["images_per_s"] == pytest.approx(4 / row["seconds"])
            plain, none = (figures[n]["seconds"] for n in ("plain", "none"))
            assert row["speedup_over_plain"] == pytest.approx(plain / row["seconds"])
            assert row["over_baseline"] == pytest.approx(row["seconds"] / none - 1)
            assert row["peak_mib"] > 50
    assert figures["none"]["gflop"] <= figures["plain"]["gflop"]
    assert figures["none"]["gflop"] < figures["both"]["gflop"]


@pytest.mark.parametrize("recipe", ["paper", "quick"])
def test_the_plain_column_trains_the_same(monkeypatch, recipe):
    # Rounded activations would make whole steps of differences in the last digits.
    monkeypatch.setattr(ActivationQuantizer, "forward", lambda self, x: x)
    losses, logits = [], []
    for plain in (True, False):
        args = argparse_of(monkeypatch, "--recipe", recipe)
        trainer = speed.make(args, "gdfq", "none", plain=plain)
        networks = trainer.generator, trainer.student, trainer.teacher
        weights = [p for n in networks for p in n.parameters() if p.ndim == 4 and p.shape[1] > 1]
        assert all(p.is_contiguous() for p in weights) == plain
        step, terms = trainer.step, []
        trainer.step = lambda step=step, terms=terms: terms.append(step())
        speed.stepper(trainer, plain=plain)()
        # Not the student's KL, a difference of nearly equal numbers here.
        losses.append({k: v.item() for k, v in terms[0].items() if k != "Q/kd"})
        logits.append(trainer.student(torch.linspace(-2, 2, 8 * 3 * 256).view(8, 3, 16, 16)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    if recipe == "paper":  # SGD; Adam's first steps have the signs of gradients near 0
        assert (logits[0] - logits[1]).norm() < 1e-4 * logits[0].norm()
    assert ("Q/layers" in losses[0]) == (recipe == "quick")
    assert "Q/kd" in terms[0]


def argparse_of(monkeypatch, *argv):
    """The arguments that a command line becomes."""
    caught = []
    with monkeypatch.context() as patch:
        patch.setattr(speed, "profile", lambda args, method: caught.append(args))
        assert main(patch, *SMALL, *argv) == 0
    return caught[0]


def test_a_process_of_its_own_for_the_peak(monkeypatch):
    args = argparse_of(monkeypatch)
    assert speed.peak_memory(args, "gdfq", "none", False) > 50


def test_mistakes(monkeypatch, capsys):
    assert main(monkeypatch, "--model", "resnet21") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("speed.py: error: unknown model 'resnet21'")


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (("--out", "."), "'.' is a folder"),
        (("--out", "nowhere/speed.json"), "is in no folder"),
        (("--batch-size", "0"), "--batch-size must be at least 1, got 0"),
        (("--image-size", "-8"), "--image-size must be at least 1, got -8"),
        (("--device", "nonsense"), "'nonsense' cannot be used"),
        pytest.param(
            ("--device", "cuda"), "'cuda' cannot be used",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)  # fmt: skip
def test_mistakes_before_anything_is_measured(monkeypatch, capsys, argv, part):
    monkeypatch.setattr(speed, "profile", lambda *_: pytest.fail("measured"))
    assert main(monkeypatch, *argv) == 2
    out, err = capsys.readouterr()
    assert not out
    (line,) = err.splitlines()
    assert line.startswith("speed.py: error: ")
    assert part in line


def test_deployed_files(monkeypatch, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    out = tmp_path / "speed.json"
    argv = ("--deployed", "--bits", "4", "--image-size", "16", "--rounds", "2", "--out", str(out))
    assert main(monkeypatch, *argv) == 0
    assert "19 of 20 layers run in integers" in capsys.readouterr().out
    figures = json.loads(out.read_text())["methods"]["deployed"]["figures"]
    assert {"ONNX Runtime, batch 1", "ONNX Runtime, batch 16"} <= set(figures)
    for figure in figures.values():
        assert figure["seconds"].keys() == {"float32", "integer"}
        assert figure["over_float32"] > 0
