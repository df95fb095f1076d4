"""tune.py: what it records, and its complaints."""

import json

import pytest

from benchmarks.evidence import tune
from benchmarks.task import teachers
from benchmarks.task.task import Task
from tests.benchmarks.task.test_real_images import task

SHORT = ("--bits", "3", "--steps", "8", "--batch-size", "16", "--seeds", "2")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setitem(teachers.DIGITS_RECIPE, "epochs", 1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(*argv):
    """What a run adds to its records."""
    argv = ["mine", *SHORT, *argv, "--records", "new/records.jsonl"]
    assert tune.main(argv) == 0
    with open("new/records.jsonl") as file:
        added = [json.loads(line) for line in file][-2:]
    assert [row.pop("command") for row in added] == [argv] * 2
    return added


def test_records_of_two_seeds():
    first = rows("--first-seed", "3")
    assert [(row["name"], row["seed"]) for row in first] == [("mine", 3), ("mine", 4)]
    for row in first:
        steps = [step for step, _ in row["curve"]]
        assert steps == sorted(set(steps))
        assert steps[-1] == 8
        assert row["accuracy_tune"] == row["curve"][-1][1]
        assert row["precision"] in ("fp32", "bf16")
        assert all(0 <= accuracy <= 100 for _, accuracy in row["curve"])
    assert rows("--first-seed", "3") == first


@pytest.mark.parametrize(
    "argv",
    [
        ("--set", "recipe.student_lr=0.1"),
        ("--agm", "--set", "agm.ratio=5", "agm.interval=1"),
        ("--recipe", "paper"),
        ("--batch-size", "4"),
    ],
)
def test_what_is_set_counts(argv):
    assert [r["curve"] for r in rows(*argv)] != [r["curve"] for r in rows()]


def test_a_ceiling_is_judged_on_the_other_half(monkeypatch):
    figures = {"accuracy": 1.0, "accuracy_tuning": 2.0, "accuracy_proof": 3.0}
    monkeypatch.setattr(Task, "figures", lambda *_: figures)
    for row in rows("--ceiling"):
        assert "accuracy_tune" not in row
        assert row["accuracy_proof"] == row["curve"][-1][1] == 3


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (("--set", "ratio=1"), "--set takes recipe.X=V, method.X=V or agm.X=V, got 'ratio=1'"),
        (("--set", "agm.ratio"), "got 'agm.ratio'"),
        (("--set", "recipe.nothing=1"), "nothing"),
        (("--agm", "--set", "agm.discrepancy=far"), "unknown discrepancy 'far'"),
        (("--bits", "1"), "got 1"),
        (("--epochs", "3"), "--epochs"),
        (("--with-agm",), "--with-agm and --with-real are compare.py's"),
        (("--with-real",), "--with-agm and --with-real are compare.py's"),
        (("--bits", "2", "3"), "one width"),
        (("--baseline", "all"), "one method is taken at a time, got adadfq, gdfq"),
    ],
)
def test_mistakes(capsys, argv, part):
    assert tune.main(["mine", *SHORT, *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tune.py: error: ")
    assert part in line


def test_images_without_a_tuning_half(monkeypatch, capsys):
    monkeypatch.setattr(tune, "load_task", lambda _args: task([0, 1, 2]))
    assert tune.main(["mine", *SHORT]) == 2
    assert "one image of each class" in capsys.readouterr().err
