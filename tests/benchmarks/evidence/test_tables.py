"""README's tables: from JSON alone, and up to date."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks import command_line
from benchmarks.evidence import tables


def grid(path, arguments, cells, commit="0123456789ab", gpu=None):
    source = {"versions": {"commit": commit}, "machine": {"gpu": gpu}}
    content = {"arguments": arguments, "sources": [source], "cells": cells}
    path.write_text(json.dumps(content))


def cell(arm, seed, accuracy, *, method="gdfq", bits=3):
    steps = range(100, 500, 100)
    history = [{"step": s, "accuracy": accuracy - 1, "batch_similarity": 0.5} for s in steps]
    return {
        "name": f"{method}{bits}{arm}{seed}", "method": method, "hooks": arm,
        "weight_bits": bits, "act_bits": bits, "seed": seed,
        "accuracy_last": accuracy - 2, "accuracy_proof": accuracy,
        "error": None, "history": history, "source": 0,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Two files: GDFQ on ResNet-20 in three arms, and AdaDFQ on digits in one."""
    base, both = [80.0, 82.0, 81.0], [81.0, 82.5, 83.0]
    cells = [cell("none", i, v) for i, v in enumerate(base)]
    cells += [cell("both", i, v) for i, v in enumerate(both)] + [cell("loss", 1, 82.0)]
    grid(tmp_path / "b.json", "--model resnet20 --with-agm", cells)
    grid(tmp_path / "a.json", "--bits 2", [cell("none", 0, 97.0, method="adadfq", bits=2)])
    return tmp_path


def test_proof_table(folder):
    _, _, first, second = tables.proof_table(tables.proof_rows(folder)).splitlines()
    half = stats.t.ppf(0.975, 2) * np.std([1.0, 0.5, 2.0], ddof=1) / 3**0.5
    mean = 3.5 / 3
    interval = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
    want = f"| 79.00 ± 1.00 | 81.00 ± 1.00 | +0.00 n/a |  | {interval} |  | 3, 1, 3 | 0123456 |"
    assert first == f"| ResNet-20 W3A3 GDFQ {want}"
    assert second == "| digits W2A2 AdaDFQ | 95.00 ± n/a | 97.00 ± n/a |  |  |  |  | 1 | 0123456 |"


def test_the_pairs_of_several_methods_together(folder):
    values = {"none": [70.0, 71.0], "both": [70.5, 73.0]}
    others = [cell(a, i, v, method="qimera") for a in values for i, v in enumerate(values[a])]
    grid(folder / "c.json", "--model resnet20 --baseline qimera --with-agm", others)
    rows = tables.proof_table(tables.proof_rows(folder)).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [
        "| ResNet-20 W3A3 GDFQ", "| ResNet-20 W3A3 Qimera", "| ResNet-20 W3A3, together",
        "| digits W2A2 AdaDFQ",
    ]  # fmt: skip
    # Of GDFQ's three seeds the two that Qimera has, too: its runs of one seed count once.
    differences = [(1.0 + 0.5) / 2, (0.5 + 2.0) / 2]
    mean, half = sum(differences) / 2, stats.t.ppf(0.975, 1) * np.std(differences, ddof=1) / 2**0.5
    interval = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
    assert rows[2] == f"| ResNet-20 W3A3, together |  |  |  |  | {interval} |  | 2, 2 | 0123456 |"


def test_the_commits_of_a_row(folder):
    def commits():
        rows = tables.proof_table(tables.proof_rows(folder)).splitlines()[2:]
        return {row.split(" | ")[0]: row.split(" | ")[-1].removesuffix(" |") for row in rows}

    values = {"none": 70.0, "both": 71.0}
    later = [cell(arm, 3, v) for arm, v in values.items()]
    grid(folder / "c.json", "--model resnet20", later, "ba98765432-dirty", gpu="NVIDIA H100 80GB")
    longer = [cell("none", i, 80.0) for i in range(4)]
    grid(folder / "d.json", "--model resnet20 --steps 3960", longer, "ba9876543210")
    later_dirty = "ba98765-dirty (H100)"
    assert commits() == {
        "| ResNet-20 W3A3 GDFQ": f"0123456, {later_dirty}",
        "| ResNet-20, equal time, W3A3 GDFQ": (
            f"ba98765 against 0123456, ba98765 against {later_dirty}"
        ),
        "| digits W2A2 AdaDFQ": "0123456",
    }


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-5, 5)), min_size=1), st.integers(1, 4))
def test_a_row_put_together_with_itself_is_that_row(runs, times):
    base, other = dict.fromkeys(range(6), 70.0), {seed: 70 + d for seed, d in runs}
    arms = {
        arm: [cell(arm, seed, value) | {"origin": "a"} for seed, value in values.items()]
        for arm, values in (("none", base), ("both", other))
    }
    once, again = (tables._proof_line("", [arms] * n).split(" | ") for n in (1, 1 + times))
    assert once[5:] == again[5:]


def test_the_share_of_the_room(folder):
    real = [cell("real", i, v) for i, v in enumerate([84.0, 86.1])]
    grid(folder / "c.json", "--model resnet20 --with-real", real)
    _, _, row = tables.room_table(tables.proof_rows(folder)).splitlines()
    # The add-on's differences 1, 0.5, 2, real images' 4, 4.1.
    assert row.startswith("| ResNet-20 W3A3 GDFQ | 81.00 ± 1.00 | +1.17 [")
    assert "] |  | +4.05 [" in row
    assert row.endswith(f"], {100 * 3.5 / 3 / 4.05:.0f} % | 3, 2 |")
    # One seed alone has real images, or they bring nothing: no share.
    for values, text in (
        ([84.0], "| +4.00 n/a | 3, 1 |"),
        ([80.0, 82.0], "[+0.00, +0.00] | 3, 2 |"),
    ):
        real = [cell("real", i, v) for i, v in enumerate(values)]
        grid(folder / "c.json", "--model resnet20 --with-real", real)
        _, _, row = tables.room_table(tables.proof_rows(folder)).splitlines()
        assert row.endswith(text)
    (folder / "c.json").unlink()
    _, _, row = tables.room_table(tables.proof_rows(folder)).splitlines()
    assert row.endswith("] |  |  | 3 |")


def test_equal_time_is_a_longer_baseline_against_the_same_arm(folder):
    longer = [cell("none", i, v) for i, v in enumerate([80.5, 83.0, 81.5])]
    grid(folder / "c.json", "--model resnet20 --steps 3960", longer)
    rows = tables.proof_table(tables.proof_rows(folder)).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [
        "| ResNet-20 W3A3 GDFQ", "| ResNet-20, equal time, W3A3 GDFQ", "| digits W2A2 AdaDFQ",
    ]  # fmt: skip
    assert "| 81.67 ± 1.26 |" in rows[1]
    assert f"| {(0.5 - 0.5 + 1.5) / 3:+.2f} [" in rows[1]
    assert "| 81.00 ± 1.00 |" in rows[0]
    _, _, row = tables.room_table(tables.proof_rows(folder, ["resnet20"])).splitlines()
    beside = rows[1].split(" | ")[5]
    assert (
        row
        == f"| ResNet-20 W3A3 GDFQ | 81.00 ± 1.00 | {rows[0].split(' | ')[5]} | {beside} |  | 3 |"
    )


def test_controls_stand_beside_the_proofs_arms(folder):
    now = {"recipe": "quick", "constants": command_line.constants("quick", 32)}
    setting = {"method": "gdfq", "weight_bits": 3, "act_bits": 3, "model": "resnet20"} | now
    run = setting | {"steps": 1200, "arm": "both, control", "seed": 0, "accuracy_proof": 80.25}
    others = [
        run | {"accuracy_proof": 9.0, "constants": {}},  # of an earlier recipe
        run | {"seed": 1, "accuracy_proof": 82.25},
        # Another task of that network.
        run | {"num_classes": 100, "arm": "none", "accuracy_proof": 20.0},
        run | {"num_classes": 100, "accuracy_proof": 20.5},
        # A setting of which the grids have nothing, with a baseline of its own.
        run | {"model": "digits", "steps": 600, "arm": "none", "accuracy_proof": 90.0},
        run | {"model": "digits", "steps": 600, "arm": "loss", "accuracy_proof": 91.5},
    ]
    for seed, accuracy in enumerate([80.5, 84.0]):
        run_of_it = run | {"seed": seed, "arm": "interpolation", "accuracy_proof": 81.0 + seed}
        others += [
            run_of_it,
            run_of_it | {"steps": 1280, "arm": "none", "accuracy_proof": accuracy},
        ]
    records = folder / "c.jsonl"
    records.write_text("".join(json.dumps(row) + "\n" for row in (run, *others)))
    values = {"none": [80.0, 82.0], "both": [81.0, 83.0]}
    cells = [cell(arm, i, v) for arm in values for i, v in enumerate(values[arm])]
    grid(folder / "d.json", "--model resnet20 --bits 3 --steps 1200 --with-agm", cells)
    head, _, *rows = tables.controls_table(records, tables.proof_rows(folder)).splitlines()
    assert head == "|  | loss | interpolation | both | both, control |"
    ones = "+1.00 [+1.00, +1.00], n=2"
    assert rows == [
        "| ResNet-20, 1,200 steps, W3A3 GDFQ "
        f"|  | +0.50 [-5.85, +6.85], n=2 | {ones} | +0.25 [+0.25, +0.25], n=2 |",
        "| ResNet-20, CIFAR-100, 1,200 steps, W3A3 GDFQ |  |  |  | +0.50 n/a, n=1 |",
        "| digits W3A3 GDFQ | +1.50 n/a, n=1 |  |  |  |",
        "| ResNet-20, 1,200 steps, interpolation's time, W3A3 GDFQ "
        "|  | -0.75 [-16.63, +15.13], n=2 |  |  |",
    ]


def test_picture(folder, tmp_path):
    tables.picture(tables.proof_rows(folder), tmp_path / "proof.png")
    assert (tmp_path / "proof.png").read_bytes().startswith(b"\x89PNG")


def test_speed_table(tmp_path):
    figure = {"seconds": 0.05, "spread": 0.001, "over_baseline": 0.1, "peak_mib": 800.4,
              "speedup_over_plain": 2.04}  # fmt: skip
    steps = dict.fromkeys(("plain", "none", "loss", "interpolation", "both"), figure)
    content = {"methods": {"qimera": {"batch_size": 16, "figures": steps | {"piece": figure}}}}
    (tmp_path / "s.json").write_text(json.dumps(content))
    row = tables.speed_table([tmp_path / "s.json"]).splitlines()[-1]
    assert row == (
        "| Qimera, 16 | 50 ± 1 | 50 ± 1 (2.04x) | +10 % | +10 % | +10 % | 800 / 800 / 800 |"
    )


def test_only_what_is_between_the_markers_changes():
    text = "a\n<!-- x -->\n\nold\nlines\n\n<!-- end -->\nb\n<!-- y -->\n\nkept\n\n<!-- end -->\n"
    got = tables.fill(text, {"x": "new"})
    assert got == text.replace("old\nlines", "new")
    with pytest.raises(ValueError, match="'z' once, found 0"):
        tables.fill(text, {"z": ""})


def test_runs_of_an_earlier_recipe_are_counted_beside_the_table(tmp_path):
    path = next(tables.EARLIER.glob("resnet20-w3a3-gdfq.json"))
    file = json.loads(path.read_text())
    now = command_line.constants("quick", 32)
    for source in file["sources"]:
        source["settings"]["constants"] = dict(now)
    (tmp_path / "a.json").write_text(json.dumps(file))
    assert tables.earlier(tmp_path) == ""
    file["sources"].append(
        {"settings": {**file["sources"][0]["settings"], "constants": {**now, "gdfq": "another"}}}
    )
    file["cells"][0]["source"] = len(file["sources"]) - 1
    (tmp_path / "a.json").write_text(json.dumps(file))
    assert f"1 of the {len(file['cells'])} runs" in tables.earlier(tmp_path)


@pytest.mark.parametrize("path", tables.tables(), ids=lambda path: path.name)
def test_what_is_printed_is_up_to_date(path):
    text = path.read_text()
    assert tables.fill(text, tables.tables()[path]) == text
