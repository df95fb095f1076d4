"""The proof's queue, and the halves that search and proof are judged on."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agm import AGM
from baselines.methods import adadfq, gdfq
from benchmarks import command_line, compare
from benchmarks.evidence import graphed, proof
from benchmarks.process import locked
from benchmarks.task.task import halves

GRIDS = {
    "a": ("--bits 3 --steps 4 --batch-size 8 --baseline gdfq --with-agm", 2),
    "b": ("--bits 2 --steps 4 --batch-size 8 --baseline adadfq", 1),
}


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Runs the queue on digits, into tmp_path; without what takes longest in runs this short."""
    monkeypatch.setattr(compare, "lacking", lambda: "not looked at here")
    monkeypatch.setattr(compare.report, "picture", lambda *_, **__: None)
    monkeypatch.setattr(proof, "GRIDS", GRIDS)
    monkeypatch.setattr(proof, "RESULTS", tmp_path / "results")
    return lambda *more: proof.main(["--out", str(tmp_path / "runs"), *more])


def cells(tmp_path, grid):
    path = tmp_path / "results" / f"{grid}.json"
    if not path.exists():
        return {}
    file = json.loads(path.read_text())
    assert {c["source"] for c in file["cells"]} == set(range(len(file["sources"])))
    return {c["name"]: c | file["sources"][c["source"]] for c in file["cells"]}


def test_every_grid_runs_once(queue, tmp_path, monkeypatch):
    assert queue() == 0
    found = cells(tmp_path, "a")
    seeds = range(proof.FIRST_SEED, proof.FIRST_SEED + 2)
    arms = ("none", "both")
    assert set(found) == {f"gdfq-w3a3-{arm}-seed{seed}" for arm in arms for seed in seeds}
    assert set(cells(tmp_path, "b")) == {f"adadfq-w2a2-none-seed{proof.FIRST_SEED}"}
    for cell in found.values():
        halves = cell["accuracy_tuning"], cell["accuracy_proof"]
        assert min(halves) <= cell["accuracy_last"] <= max(halves)
        assert cell["command"].endswith(f"--first-seed {cell['seed']}")
        assert cell["settings"]["data_hash"]
    monkeypatch.setattr(compare, "main", lambda argv: pytest.fail("nothing was left to do"))
    assert queue() == 0


def test_a_stopped_queue_goes_on(queue, tmp_path, monkeypatch):
    original, runs = compare.main, []

    def stopping(argv):
        runs.append(argv)
        return original(argv) if len(runs) == 1 else 143

    monkeypatch.setattr(compare, "main", stopping)
    assert queue() == 143
    first = cells(tmp_path, "a")
    assert len(first) == 2
    assert len(runs) == 2
    monkeypatch.setattr(compare, "main", original)
    assert queue() == 0
    found = cells(tmp_path, "a")
    assert len(found) == 4
    assert all(found[name] == cell for name, cell in first.items())


def test_what_is_there_stays_beside_what_a_later_commit_adds(queue, tmp_path):
    assert queue("--grids", "b") == 0
    (first,) = cells(tmp_path, "b").values()
    (path,) = (tmp_path / "runs").glob("*/report.json")
    report = json.loads(path.read_text())
    later = {"versions": report["versions"] | {"commit": "later"}}
    report["cells"].append(report["cells"][0] | {"name": "another", "seed": 7} | later)
    report["cells"][0]["accuracy_last"] = -1.0  # trained again, as its folder was gone
    proof.merge("b", GRIDS["b"][0], report)
    again, another = (cells(tmp_path, "b")[name] for name in (first["name"], "another"))
    assert again == first
    assert another["versions"]["commit"] == "later"


def test_what_another_queue_works_on_is_left_to_it(queue, tmp_path, capsys):
    taken = proof.folder(GRIDS["a"][0], proof.FIRST_SEED, proof.precision_of("a"))
    with locked(tmp_path / "runs" / ".queues" / taken):
        assert queue() == 0
    assert "another queue" in capsys.readouterr().out
    assert {c["seed"] for c in cells(tmp_path, "a").values()} == {proof.FIRST_SEED + 1}
    assert queue() == 0
    assert len(cells(tmp_path, "a")) == 4


def test_grids_share_their_runs(queue, tmp_path, monkeypatch):
    assert queue() == 0
    started, real = [], compare.quantize
    monkeypatch.setattr(
        compare, "quantize", lambda *a, **k: started.append(k["hooks"]) or real(*a, **k)
    )
    monkeypatch.setitem(GRIDS, "c", (GRIDS["a"][0] + " loss", 1))
    assert queue() == 0
    ((hook,),) = started
    assert (hook.loss, hook.interpolation) == (True, False)
    assert set(cells(tmp_path, "c")) == {f"gdfq-w3a3-loss-seed{proof.FIRST_SEED}"}


def test_a_longer_run_is_another_run(queue, tmp_path, monkeypatch):
    assert queue() == 0
    monkeypatch.setitem(GRIDS, "c", (GRIDS["a"][0].replace("--steps 4", "--steps 5"), 1))
    assert queue() == 0
    found = cells(tmp_path, "c")
    assert set(found) == {f"gdfq-w3a3-{arm}-seed{proof.FIRST_SEED}" for arm in ("none", "both")}
    assert all(c["recipe"]["steps"] == 5 for c in found.values())
    assert all(c["recipe"]["steps"] == 4 for c in cells(tmp_path, "a").values())


@pytest.mark.parametrize(
    ("owner", "attribute", "stale"),
    [
        (gdfq, "quick", {"none", "both"}),
        (adadfq, "quick", set()),
        (command_line, "AGM", {"both"}),
    ],
    ids=["its recipe", "another's", "the add-on"],
)
def test_cells_of_another_recipe_are_trained_again(
    queue, tmp_path, monkeypatch, owner, attribute, stale
):
    monkeypatch.setitem(GRIDS, "a", (GRIDS["a"][0], 1))
    assert queue("--grids", "a") == 0
    file = json.loads((tmp_path / "results" / "a.json").read_text())
    assert all(proof.is_present(cell, file) for cell in file["cells"])

    if owner is command_line:
        changed = lambda *, ratio=0.2: AGM(ratio=ratio)  # noqa: E731
    else:
        method, recipe = owner.quick(8)
        changed = lambda image_size: (method, replace(recipe, generator_lr=2e-3))  # noqa: E731
    monkeypatch.setattr(owner, attribute, changed)
    assert {c["hooks"] for c in file["cells"] if not proof.is_present(c, file)} == stale
    seed = str(proof.FIRST_SEED)
    argv = [*GRIDS["a"][0].split(), "--seeds", "1", "--first-seed", seed]
    assert proof.missing(argv, proof.setting(GRIDS["a"][0])) == bool(stale)
    assert queue("--grids", "a") == 0  # whose runs of before are in no one's way
    assert not proof.missing(argv, proof.setting(GRIDS["a"][0]))
    assert len(cells(tmp_path, "a")) == 2


def test_a_grid_is_all_of_one_program(queue, tmp_path, monkeypatch, capsys):
    runs = []
    for program in (compare, graphed):
        monkeypatch.setattr(
            program, "main", lambda argv, name=program.PROGRAM: runs.append(name) or 0
        )
    (tmp_path / "results").mkdir()
    source = {"settings": {"program": graphed.PROGRAM, "precision": "fp32"}}
    begun = {"arguments": GRIDS["b"][0], "sources": [source], "cells": []}
    (tmp_path / "results" / "b.json").write_text(json.dumps(begun))
    assert queue() == 0
    assert runs == [compare.PROGRAM] * 2  # grid a's
    assert "b: left as it is, since evidence/graphed.py made" in capsys.readouterr().out
    monkeypatch.setitem(GRIDS, "b-equal-time", (GRIDS["b"][0].replace("4", "5"), 1))
    assert queue("--grids", "b-equal-time") == 0
    assert runs[2:] == []
    assert queue("--graphed") == 0
    assert runs[2:] == [graphed.PROGRAM] * 4


def test_a_grid_is_all_of_one_precision(queue, tmp_path, monkeypatch):
    """Also on a machine where "auto" is the other."""
    monkeypatch.setitem(GRIDS, "a-equal-time", ("--bits 3 --steps 5 --batch-size 8", 1))
    for usual, grid in (("bf16", "a"), ("fp32", "a-equal-time"), ("fp32", "b")):
        monkeypatch.setattr(proof, "resolve_precision", lambda *_, usual=usual: usual)
        assert queue("--grids", grid) == 0
    monkeypatch.setitem(GRIDS, "a", (GRIDS["a"][0], 3))
    assert queue("--grids", "a") == 0
    found = {grid: [c["precision"] for c in cells(tmp_path, grid).values()] for grid in GRIDS}
    assert found == {"a": ["bf16"] * 6, "a-equal-time": ["bf16"], "b": ["fp32"]}


def test_a_mistake_ends_the_queue(queue, monkeypatch):
    monkeypatch.setattr(proof, "GRIDS", {"a": ("--model resnet20", 1)})
    assert queue("--grids", "a", "--cifar10", "no-weights", "no-images") == 2


def test_each_network_is_judged_on_its_own_images(queue, monkeypatch, capsys):
    networks = {f"on {name}": (f"{start} --bits 3", 1) for name, start in proof.NETWORKS.items()}
    monkeypatch.setattr(proof, "GRIDS", networks)
    runs = []
    monkeypatch.setattr(compare, "main", lambda argv: runs.append(argv) or 0)
    assert queue("--cifar100", "W", "D", "--imagenet", "I") == 0
    by_model = [(argv[: argv.index("--bits")], argv[argv.index("--out") + 2 :]) for argv in runs]
    assert by_model == [
        (["--model", "resnet20", "--num-classes", "100"], ["--weights", "W", "--data", "D"]),
        (["--model", "efficientnet_lite0", "--pretrained"], ["--data", "I"]),
    ]
    assert "not given: on cifar10\n" in capsys.readouterr().out
    assert len({argv[argv.index("--out") + 1] for argv in runs}) == 2


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40))
def test_halves_share_no_image_and_split_every_class(labels):
    labels = torch.tensor(labels)
    first, second = halves(labels)["tuning"], halves(labels)["proof"]
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(len(labels)))
    for label in labels.unique():
        a, b = first[labels[first] == label], second[labels[second] == label]
        assert len(b) - len(a) in (0, 1)
        assert not len(a) or a.max() < b.min()
