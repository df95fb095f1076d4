"""The exported files' figures, on digits."""

import json

import pytest

from benchmarks import compare
from benchmarks.evidence import deployed, tables

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def test_figures_of_a_run(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "deployed.json"
    argv = ["--bits", "4", "--steps", "60", "--seeds", "2", "--jobs", "1", "--out", str(run)]
    assert compare.main(argv) == 0
    assert deployed.main([str(run), "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    rows = {row["name"]: row for row in json.loads((run / "report.json").read_text())["cells"]}
    assert len(content["cells"]) == 2
    for cell in content["cells"]:
        assert cell["accuracy_student"] == pytest.approx(
            rows[cell["name"]]["accuracy_last"], abs=0.2
        )
        assert abs(cell["accuracy_file"] - cell["accuracy_student"]) < 3
        assert cell["plain_agrees_with_deployed"] >= 98
        assert cell["float_agrees_with_student"] >= 99.9
        assert cell["bytes"] < cell["float32_bytes"]
        assert cell["conv_left"] == 0
        assert cell["integer_layers"] == cell["layers"] - 1  # not the last, of the logits
    assert "deployed.py" in content["command"]
    (row,) = tables.deployed_table(out).splitlines()[2:]
    assert row.startswith("| W4A4 |")
    assert row.count("|") == 8


def test_without_images_to_judge_on(tmp_path, capsys):
    argv = ["--model", "torchvision:resnet18", "--weights", "none.pt"]
    assert deployed.main([str(tmp_path), "--out", str(tmp_path / "a.json"), *argv]) == 2
    assert "none.pt" in capsys.readouterr().err
