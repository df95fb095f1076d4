import json
import math
import re

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image
from scipy import stats

from benchmarks import report


def cell(arm="none", seed=0, last=90.0, **changes):
    """A finished cell of four records, the first of which has no movement."""
    history = [
        {"step": s, "batch_similarity": 0.1 * s, "feature_movement": None if s == 1 else 1.0 / s}
        for s in (1, 2, 3, 4)
    ]
    for row in history[1:]:
        row["accuracy"] = last - (4 - row["step"])
    return {
        "name": f"gdfq-w3a3-{arm}-seed{seed}",
        "method": "gdfq",
        "hooks": arm,
        "weight_bits": 3,
        "act_bits": 3,
        "seed": seed,
        "accuracy_fp": 98.5,
        "accuracy_ptq": last - 10,
        "accuracy_last": last,
        "seconds": 10.0 + seed,
        "steps_per_s": 4.0,
        "checkpoint": f"gdfq-w3a3-{arm}-seed{seed}.ckpt",
        "error": None,
        "history": history,
    } | changes


def failed(arm="none", seed=0, error="NonFiniteLossError: step 7"):
    nothing = ("accuracy_ptq", "accuracy_last", "seconds", "steps_per_s", "checkpoint")
    return cell(arm, seed, history=[], error=error) | dict.fromkeys(nothing)


def lines_of(cells):
    """The table's rows by arm, and what follows them."""
    head, rule, *rows = report.table(cells).splitlines()
    assert set(rule) == {"-", " "}
    return head, rows


# Statistics


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_paired_difference_is_scipys_paired_t_interval(n):
    rng = np.random.default_rng(n)
    base, other = rng.normal(60, 5, n), rng.normal(61, 5, n)
    got = report.paired_difference(dict(enumerate(base)), dict(enumerate(other)))
    want = stats.ttest_rel(other, base).confidence_interval(0.95)
    assert got["n"] == n
    assert got["mean"] == pytest.approx(np.mean(other - base))
    assert (got["low"], got["high"]) == pytest.approx((want.low, want.high))


def test_paired_difference_by_hand():
    # Differences 1 and 3: mean 2, standard error 1, t(0.975, 1) = 12.7062.
    got = report.paired_difference({5: 1.0, 9: 10.0}, {9: 13.0, 5: 2.0})
    assert got == {
        "n": 2,
        "mean": 2.0,
        "low": pytest.approx(-10.7062, abs=1e-4),
        "high": pytest.approx(14.7062, abs=1e-4),
    }
    text = report.difference_text(got)
    assert text == "+2.00 [-10.71, +14.71], n=2"


def test_paired_difference_pairs_by_seed_and_needs_two():
    only_one = report.paired_difference({0: 1.0, 1: 50.0}, {1: 49.5, 2: 7.0})
    assert only_one == {"n": 1, "mean": -0.5, "low": None, "high": None}
    assert report.difference_text(only_one) == "-0.50 n/a, n=1"
    for base, other in (({}, {}), ({0: 1.0}, {}), ({0: 1.0}, {1: 1.0})):
        none = report.paired_difference(base, other)
        assert none == {"n": 0, "mean": None, "low": None, "high": None}
        assert report.difference_text(none) == "n/a"


def test_equal_differences_have_an_empty_interval():
    got = report.paired_difference({0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.5, 1: 2.5, 2: 3.5})
    assert got == {"n": 3, "mean": 0.5, "low": 0.5, "high": 0.5}


def test_mean_std():
    assert report.mean_std([]) == "n/a"
    assert report.mean_std([3.14159]) == "3.14 ± n/a"
    assert report.mean_std([1.0, 2.0, 4.0]) == "2.33 ± 1.53"  # n - 1
    assert report.mean_std([2.0, 2.0]) == "2.00 ± 0.00"


# The table


def test_table():
    cells = [cell(seed=s, last=v) for s, v in ((0, 90.0), (1, 92.0), (2, 94.0))]
    cells += [cell("both", s, last=v) for s, v in ((2, 95.0), (0, 92.0), (1, 95.0))]
    head, rows = lines_of(cells)
    assert head.split("  ")[:3] == ["method", "bits", "arm"]
    base, agm = rows
    for part in ("gdfq", "W3A3", "baseline", "98.50", "82.00 ± 2.00", "92.00 ± 2.00"):
        assert part in base
    assert "[" not in base  # nothing to compare itself with
    # Differences 2, 3, 1: 2 ± 4.3027 / sqrt(3).
    for part in ("+AGM", "94.00 ± 1.73", "+2.00 [-0.48, +4.48], n=3", "11.00 ± 1.00"):
        assert part in agm
    assert "4.00 ± 0.00" in agm  # steps/s
    values = column(head, agm, "movement % ↑"), column(head, agm, "similarity ↓")
    assert values == ("25.00 ± 0.00", "0.40 ± 0.00")
    assert column(head, agm, "ONNX file") == column(head, agm, "in integers") == "n/a"


def test_real_images_are_compared_where_they_are_judged():
    cells = [
        cell(seed=s) | {"accuracy_last": 70.0, "accuracy_proof": v} for s, v in ((0, 80), (1, 82))
    ]
    cells += [
        cell("real", s) | {"accuracy_last": v, "accuracy_proof": v} for s, v in ((0, 84), (1, 86))
    ]
    _, (base, real) = lines_of(cells)
    assert "70.00 ± 0.00" in base
    for part in ("real images", "85.00 ± 1.41", "+4.00 [+4.00, +4.00], n=2"):
        assert part in real


def column(head, row, name):
    """What a row has under a heading."""
    return re.split(r"  +", row)[re.split(r"  +", head).index(name) - len(re.split(r"  +", head))]


def test_the_smallest_file_of_an_arm():
    files = [cell(seed=s, onnx_bytes=b, onnx_times_smaller=1e6 / b, onnx_layers=8,
                  onnx_integer_layers=7) for s, b in ((0, 20_000), (1, 16_000))]  # fmt: skip
    head, (row,) = lines_of(files)
    assert column(head, row, "ONNX file") == "16 kB (0.02 of float32)"
    assert column(head, row, "in integers") == "7 of 8 layers"


def test_top_5_beside_top_1_where_it_was_measured():
    five = {"accuracy_fp_top5": 99.5, "accuracy_ptq_top5": 85.0, "accuracy_last_top5": 97.0}
    head, (row,) = lines_of([cell(**five)])
    names = ["FP %", "FP %, top-5", "PTQ %", "PTQ %, top-5", "last step %", "last step %, top-5"]
    assert re.split(r"  +", head)[3:9] == names
    want = ["98.50", "99.50", "80.00 ± n/a", "85.00 ± n/a", "90.00 ± n/a", "97.00 ± n/a"]
    assert re.split(r"  +", row)[3:9] == want
    for missing in ({}, dict.fromkeys(five)):
        assert "top-5" not in report.table([cell(**missing)])


def test_percent():
    assert report.percent({"a": 87.8, "a_top5": 97.26}, "a") == "87.80 % top-1, 97.26 % top-5"
    assert report.percent({"a": 87.8, "a_top5": None}, "a") == "87.80 %"
    assert report.percent({"a": None}, "a") == "n/a"


def test_table_keeps_the_order_of_arms_and_a_row_a_method_and_width():
    arms = ("both", "interpolation", "loss", "none")
    cells = [cell(arm) for arm in arms]
    cells += [cell(method="qimera"), cell(weight_bits=2, act_bits=4)]
    _, rows = lines_of(cells)
    got = [line.split()[:3] for line in rows]
    names = ["baseline", "+loss", "+interpolation", "+AGM"]
    assert got[:4] == [["gdfq", "W3A3", name] for name in names]
    assert sorted(got[4:]) == [["gdfq", "W2A4", "baseline"], ["qimera", "W3A3", "baseline"]]


def test_table_of_one_seed_says_that_there_is_no_spread():
    _, (base, agm) = lines_of([cell(), cell("both", last=91.25)])
    assert "90.00 ± n/a" in base
    assert "+1.25 n/a, n=1" in agm


def test_table_without_images_to_judge():
    nothing = dict.fromkeys(("accuracy_fp", "accuracy_ptq", "accuracy_last"))
    _, (base, agm) = lines_of([cell(**nothing), cell("both", **nothing)])
    assert base.split()[3:6] == ["n/a"] * 3
    assert agm.split()[3:7] == ["n/a"] * 4


def test_table_counts_finished_cells_alone_and_names_the_failed():
    cells = [cell(seed=0, last=90.0), failed(seed=1), cell("both", 0, 91.0), cell("both", 1, 95.0)]
    _, rows = lines_of([*cells, failed("both", 2, "OutOfMemoryError: of memory")])
    base, agm, *rest = rows
    assert "90.00 ± n/a" in base
    assert "93.00 ± 2.83" in agm
    assert "+1.00 n/a, n=1" in agm  # seed 0 alone has both
    assert rest == [
        "FAILED gdfq-w3a3-none-seed1: NonFiniteLossError: step 7",
        "FAILED gdfq-w3a3-both-seed2: OutOfMemoryError: of memory",
    ]


def test_table_of_failures_alone():
    _, (base, line) = lines_of([failed()])
    assert base.split()[3:] == ["n/a"] * (len(base.split()) - 3)
    assert line.startswith("FAILED gdfq-w3a3-none-seed0")


@pytest.mark.parametrize("missing", [None, math.nan])
def test_a_run_of_a_single_record_has_no_movement(missing):
    """NaN in the run itself, null when it is read back from its file."""
    one = cell(history=[{"step": 1, "batch_similarity": 0.5, "feature_movement": missing}])
    head, (row,) = lines_of([one])
    assert "nan" not in row.lower()
    values = column(head, row, "movement % ↑"), column(head, row, "similarity ↓")
    assert values == ("n/a", "0.50 ± n/a")


# Figures of the history


@pytest.mark.parametrize(("records", "want"), [(1, 0.0), (3, 2.0), (4, 3.0), (8, 6.5), (20, 17.0)])
def test_last_probe_is_the_mean_of_the_last_quarter(records, want):
    history = [{"step": i, "batch_similarity": float(i)} for i in range(records)]
    history.append({"step": records, "accuracy": 3.0})  # a record without the probe
    assert report.last_probe({"history": history}, "batch_similarity") == pytest.approx(want)


def test_curves():
    steps, values = report.curves([cell(last=90.0), cell(seed=1, last=80.0)], "accuracy")
    assert steps == [2, 3, 4]
    assert values.tolist() == [[88, 89, 90], [78, 79, 80]]


def test_curves_are_drawn_where_all_seeds_have_a_value():
    shorter = cell(seed=1, last=80.0)
    del shorter["history"][2]["accuracy"]
    shorter["history"][1]["accuracy"] = math.nan
    steps, values = report.curves([cell(), shorter, failed(seed=2)], "accuracy")
    assert steps == [4]
    assert values.tolist() == [[90], [80]]
    steps, _ = report.curves([cell()], "feature_movement")
    assert steps == [2, 3, 4]  # the first is null


def test_curves_of_nothing():
    for cells in ([], [failed()], [cell(history=[])], [cell(history=[]), cell(seed=1)]):
        assert report.curves(cells, "accuracy")[0] == []


# The picture


@pytest.mark.parametrize("channels", [1, 3])
def test_picture(tmp_path, channels):
    cells = [cell(a, s) for a in ("none", "both") for s in (0, 1)] + [failed("both", 2)]
    cells += [cell(method="qimera"), failed("both") | {"method": "qimera"}]
    images = np.random.default_rng(0).random((64, 8, 8, channels))
    path = tmp_path / "report.png"
    report.picture(cells, {"gdfq-w3a3-both-seed1": images}, path, title="a title")
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        assert min(image.size) > 300
        assert len(image.convert("L").getcolors()) > 50
    assert list(tmp_path.iterdir()) == [path]


def test_picture_of_failures_alone_and_without_accuracies(tmp_path):
    nothing = dict.fromkeys(("accuracy_fp", "accuracy_ptq", "accuracy_last"))
    unjudged = cell(**nothing)
    for row in unjudged["history"]:
        row.pop("accuracy", None)
    for cells in ([failed()], [failed(), cell("loss")], [unjudged]):
        report.picture(cells, {}, tmp_path / "report.png", title="")
        Image.open(tmp_path / "report.png").verify()


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_mosaic_of_other_channels_is_their_mean(channels):
    images = np.random.default_rng(0).random((4, 3, 3, channels))
    got = report.mosaic(images, rows=2, columns=2)
    assert got.shape == (8, 8, 1)
    np.testing.assert_allclose(got[:3, :3, 0], images[0].mean(2))


def test_mosaic_lays_the_first_images_out_in_rows():
    images = np.stack([np.full((2, 3, 1), i / 100) for i in range(10)])
    got = report.mosaic(images, rows=2, columns=3)
    assert got.shape == (2 * 3, 3 * 4, 1)
    levels = [got[y, x, 0] for y in (0, 3) for x in (0, 4, 8)]
    assert levels == pytest.approx([0.0, 0.01, 0.02, 0.03, 0.04, 0.05])
    assert (got[2] == 1).all()  # the line between
    assert (got[:, 3] == 1).all()


def test_mosaic_averages_large_images():
    blocks = np.random.default_rng(0).random((4, 50, 50, 3))  # of 3 x 3 pixels, and an odd rest
    images = np.pad(blocks.repeat(3, 1).repeat(3, 2), ((0, 0), (0, 2), (0, 1), (0, 0)))
    got = report.mosaic(images, rows=3, columns=2)  # no third row
    assert got.shape == (2 * 51, 2 * 51, 3)
    assert np.allclose(got[51:-1, :50], blocks[2])


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """(cells, names of those with images) -> the figure, not saved."""
    from matplotlib.figure import Figure

    def draw(cells, names=()):
        found = []
        monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: found.append(self))
        images = dict.fromkeys(names, np.full((64, 8, 8, 1), 0.5))
        report.picture(cells, images, tmp_path / "report.png", title="")
        return found[0]

    return draw


def test_a_picture_without_accuracies_tells_its_arms_apart(drawn):
    cells = [cell(arm, 0, accuracy_fp=None) for arm in ("none", "both")]
    for c in cells:
        for row in c["history"]:
            row.pop("accuracy", None)
    figure = drawn(cells)
    accuracy, movement, similarity = figure.axes[:3]
    assert [t.get_text() for t in accuracy.texts] == ["n/a, no evaluation images"]
    for axis in (movement, similarity):
        assert len({line.get_color() for line in axis.lines}) == 2
    (legend,) = figure.subfigs[0].legends
    assert [t.get_text() for t in legend.get_texts()] == ["gdfq W3A3 baseline", "gdfq W3A3 +AGM"]


def test_five_panels_for_any_grid(drawn):
    cells = [
        cell(arm, seed, name=f"{method}-{bits}-{arm}-{seed}", method=method, weight_bits=bits)
        for method in ("gdfq", "qimera", "adadfq")
        for bits in (2, 3)
        for arm in ("both", "none", "loss")
        for seed in (0, 1)
    ]
    figure = drawn(cells, [c["name"] for c in cells])
    assert len(figure.axes) == 5
    assert all(axis.get_xlabel() and axis.get_ylabel() for axis in figure.axes[:3])
    titles = [axis.get_title() for axis in figure.axes]
    assert all(titles)
    name = "Generated images: gdfq W2A3 "
    assert titles[3:] == [f"{name}baseline, seed 0", f"{name}+AGM, seed 0"]
    for axis in figure.axes[1:3]:
        assert len({(line.get_color(), line.get_linestyle()) for line in axis.lines}) == 18


@pytest.mark.parametrize("arms", [("none", "both"), ("none", "both", "real"), report.ARMS])
@pytest.mark.parametrize("widths", [(2,), (2, 3), (2, 3, 4, 8)])
def test_a_legend_names_all_lines_inside_the_picture(drawn, arms, widths):
    methods = ("gdfq", "qimera", "adadfq")
    figure = drawn([
        cell(arm, 0, name=f"{method}-{bits}-{arm}", method=method, weight_bits=bits, act_bits=bits)
        for method in methods for bits in widths for arm in arms
    ])  # fmt: skip
    (legend,) = figure.subfigs[0].legends
    figure.draw_without_rendering()
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert len(legend.get_texts()) == len(methods) * len(widths) * len(arms) + 1
    lines = figure.axes[1].lines
    styles = {(to_hex(line.get_color()), line.get_linestyle(), line.get_marker()) for line in lines}
    assert len(styles) == len(lines)


def test_grey_images_are_drawn_from_black_to_white(drawn):
    """Each of two mosaics stretched to its own range could not be compared with the other."""
    figure = drawn([cell("none", 0), cell("both", 0)], [cell("none", 0)["name"]])
    (image,) = figure.axes[3].images
    assert image.get_clim() == (0, 1)


def test_movement_is_drawn_in_the_tables_unit(drawn):
    _, movement, *_ = drawn([cell()]).axes
    assert movement.lines[0].get_ydata() == pytest.approx([50, 100 / 3, 25])
    assert "%" in movement.get_ylabel()


# JSON


def test_write_json_turns_what_json_lacks_into_null(tmp_path):
    path = tmp_path / "x.json"
    report.write_json(path, {"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf, "d": None}})

    def refuse(constant):
        raise AssertionError(constant)

    got = json.loads(path.read_text(), parse_constant=refuse)
    assert got == {"a": [None, [None, 1.5]], "b": {"c": None, "d": None}}


def test_write_json_replaces_and_never_overwrites(tmp_path):
    path = tmp_path / "x.json"
    report.write_json(path, {"version": 1})
    with path.open() as reader:  # opened before, read after
        report.write_json(path, {"version": 2, "long": "x" * 10_000})
        assert json.load(reader) == {"version": 1}
    with pytest.raises(TypeError):
        report.write_json(path, {"version": 3, "oops": object()})
    assert json.loads(path.read_text())["version"] == 2
    assert list(tmp_path.iterdir()) == [path]
