"""From finished cells to a table, a picture and report.json."""

import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from baselines.quantization import checkpoint

Cell = dict[str, Any]
PARTS = ("loss", "interpolation", "both")  # of the add-on
ARMS = ("none", *PARTS, "real")
ARM_NAMES = {
    "none": "baseline", "loss": "+loss", "interpolation": "+interpolation", "both": "+AGM",
    "real": "real images",
}  # fmt: skip
LEGEND = (
    "PTQ: straight after quantization. paired diff.: of the last step, on all evaluation images,\n"
    "to the baseline of the same seed. real images: the student learns from half of the\n"
    "evaluation images and is judged, as its baseline there, on the others: the room for better\n"
    "images. Of the generator's images, mean of the run's last quarter: movement ↑, how far their\n"
    "features move between two records (more is better, at 0 it stands still); similarity ↓, of a\n"
    "batch's features (less is better, at 1 all are alike); see agm.DiversityProbe. ONNX file: of\n"
    "the smallest cell, to float32 weights; fewer bits make it smaller, not faster. in integers:\n"
    "the layers that can."
)
# A figure of the history -> its column in the table, and what to multiply it by there.
PROBE = {"feature_movement": ("movement % ↑", 100), "batch_similarity": ("similarity ↓", 1)}
# Figures of the history in the picture: what it says above and beside the axis.
CURVES = {
    "accuracy": ("Accuracy of the quantized network", "accuracy on the\nevaluation images (%)"),
    "feature_movement": (
        "Movement of the generator: near 0 it stands still",
        "change of its images' features\nsince the last record (%)",
    ),
    "batch_similarity": (
        "Similarity of its images: at 1 all are alike",
        "cosine between the features\nof two images",
    ),
}
# Of the arms, where colours tell methods and bit widths apart.
LINES: dict[str, dict[str, Any]] = {
    "none": {"ls": ":"}, "loss": {"ls": "-."}, "interpolation": {"ls": "--"}, "both": {"ls": "-"},
    "real": {"ls": (0, (1, 4)), "marker": "x", "ms": 4},
}  # fmt: skip


def mean_std(values: Sequence[float]) -> str:
    """``mean ± std`` (sample standard deviation); the std of one value is n/a."""
    values = [v for v in values if not math.isnan(v)]
    if not values:
        return "n/a"
    spread = f"{np.std(values, ddof=1):.2f}" if len(values) > 1 else "n/a"
    return f"{np.mean(values):.2f} ± {spread}"


def parts(arm: str) -> dict[str, bool]:
    """Of the add-on in an arm of :data:`PARTS`, as :class:`agm.AGM` takes them."""
    return {part: arm in (part, "both") for part in ("loss", "interpolation")}


def paired_difference(base: dict[Any, float], other: dict[Any, float]) -> dict[str, Any]:
    """Mean of other - base over the seeds (or other keys) that both have, with its 95 % t interval.

    Returns:
        n, mean, and low and high, which are None for n < 2 (as is the mean for n = 0).
    """
    differences = [other[seed] - base[seed] for seed in sorted(base.keys() & other.keys())]
    n = len(differences)
    mean = float(np.mean(differences)) if n else None
    if n < 2:
        return {"n": n, "mean": mean, "low": None, "high": None}
    from scipy import stats  # most of a second, which a grid's processes can do without

    half = stats.t.ppf(0.975, n - 1) * np.std(differences, ddof=1) / math.sqrt(n)
    return {"n": n, "mean": mean, "low": float(mean - half), "high": float(mean + half)}


def together(pairs: Iterable[tuple[dict[Any, float], dict[Any, float]]]) -> dict[str, Any]:
    """:func:`paired_difference` of several (base, other): a seed's difference is their mean.

    One seed's runs begin alike and are not independent. Pairs without any ``other`` do not count; a
    seed that one of the rest lacks is left out, so that each counts the same.
    """
    found = [
        {seed: other[seed] - base[seed] for seed in base.keys() & other.keys()}
        for base, other in pairs
        if other
    ]
    seeds = set.intersection(*map(set, found)) if found else ()
    means = {seed: sum(values[seed] for values in found) / len(found) for seed in seeds}
    return paired_difference(dict.fromkeys(means, 0.0), means)


def interval_text(difference: dict[str, Any]) -> str:
    """``+0.50 [+0.10, +0.90]``; empty if there are no pairs."""
    if difference["mean"] is None:
        return ""
    interval = "n/a"
    if difference["low"] is not None:
        interval = f"[{_signed(difference['low'])}, {_signed(difference['high'])}]"
    return f"{_signed(difference['mean'])} {interval}"


def difference_text(difference: dict[str, Any]) -> str:
    """``+0.50 [+0.10, +0.90], n=3``, or ``n/a``."""
    text = interval_text(difference)
    return f"{text}, n={difference['n']}" if text else "n/a"


def _signed(value: float) -> str:
    """-0.00 is below 0; what is 0 to rounding is +0.00."""
    return f"{round(value, 9) + 0.0:+.2f}"


def groups(cells: Iterable[Cell]) -> dict[tuple[str, int, int], dict[str, list[Cell]]]:
    """Cells by (method, weight_bits, act_bits), then by arm, in the order of the table."""
    found: dict[tuple[str, int, int], dict[str, list[Cell]]] = {}
    for cell in cells:
        key = (cell["method"], cell["weight_bits"], cell["act_bits"])
        found.setdefault(key, {}).setdefault(cell["hooks"], []).append(cell)
    return {
        key: {arm: sorted(arms[arm], key=lambda c: c["seed"]) for arm in ARMS if arm in arms}
        for key, arms in found.items()
    }


def by_seed(cells: Sequence[Cell], key: str) -> dict[int, float]:
    """A figure of the cells that finished, by seed."""
    return {c["seed"]: c[key] for c in cells if c.get("error") is None and c.get(key) is not None}


def last_probe(cell: Cell, key: str) -> float:
    """Mean of a probe figure over the last quarter of the run's records."""
    values = [v for row in cell["history"] if (v := row.get(key)) is not None and v == v]
    return float(np.mean(values[-max(1, len(values) // 4) :])) if values else math.nan


def percent(cell: Cell, key: str) -> str:
    """``87.80 %``, with the accuracy among the five largest logits where it is known."""
    shown = [f"{v:.2f} %" for v in (cell[key], cell.get(f"{key}_top5")) if v is not None]
    return " top-1, ".join(shown) + " top-5" * (len(shown) > 1) or "n/a"


def table(cells: Sequence[Cell]) -> str:
    """One row an arm of a method at a bit width; top-5 beside top-1 where some cell has it."""
    keys = ["accuracy_fp", "accuracy_ptq", "accuracy_last"]
    heads = ["FP %", "PTQ %", "last step %"]
    if any(c.get("accuracy_fp_top5") is not None for c in cells):
        keys = [key + which for key in keys for which in ("", "_top5")]
        heads = [head + which for head in heads for which in ("", ", top-5")]
    head = [
        "method", "bits", "arm", *heads, "paired diff. [95 % interval]",
        "seconds", "steps/s", *(name for name, _ in PROBE.values()), "ONNX file", "in integers",
    ]  # fmt: skip
    rows = [head]
    failures = []
    for (method, weight_bits, act_bits), arms in groups(cells).items():
        for arm, runs in arms.items():
            # Real images are half of those that judge the others.
            judged = "accuracy_proof" if arm == "real" else "accuracy_last"
            base = by_seed(arms.get("none", []), judged)
            done = [c for c in runs if c.get("error") is None]
            failures += [f"FAILED {c['name']}: {c['error']}" for c in runs if c.get("error")]
            last = by_seed(runs, "accuracy_last")
            rows.append([
                method,
                f"W{weight_bits}A{act_bits}",
                ARM_NAMES[arm],
                *(_accuracy_text(runs, key) for key in keys),
                "" if arm == "none" else difference_text(paired_difference(base, last)),
                mean_std([c["seconds"] for c in done]),
                mean_std([c["steps_per_s"] for c in done]),
                *(
                    mean_std([by * last_probe(c, key) for c in done])
                    for key, (_, by) in PROBE.items()
                ),
                *_file_text(done),
            ])  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines + failures)


def _file_text(cells: Sequence[Cell]) -> tuple[str, str]:
    """Size of the smallest file, and how many of its layers run in integers."""
    files = [c for c in cells if c.get("onnx_bytes")]
    if not files:
        return "n/a", "n/a"
    c = min(files, key=lambda c: c["onnx_bytes"])
    size = f"{c['onnx_bytes'] / 1000:.0f} kB ({1 / c['onnx_times_smaller']:.2f} of float32)"
    return size, f"{c['onnx_integer_layers']} of {c['onnx_layers']} layers"


def _accuracy_text(runs: Sequence[Cell], key: str) -> str:
    values = list(by_seed(runs, key).values())
    if key.startswith("accuracy_fp"):  # of one network
        return f"{values[0]:.2f}" if values else "n/a"
    return mean_std(values)


def curves(cells: Sequence[Cell], key: str) -> tuple[list[int], np.ndarray]:
    """Steps and values (seeds, records) of a figure of the history, where all seeds have it."""
    series = [
        {r["step"]: r[key] for r in c["history"] if r.get(key) is not None and r[key] == r[key]}
        for c in cells
        if c.get("error") is None
    ]
    steps = sorted(set.intersection(*(set(s) for s in series))) if series else []
    return steps, np.array([[s[step] for step in steps] for s in series])


def plot_curves(
    axis: Any,
    arms: dict[str, list[Cell]],
    key: str,
    label: str,
    *,
    name: str = "",
    styles: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Mean and range over seeds of a figure of the history, a line an arm.

    Args:
        name: in the legend before the arm's.
        styles: of some arms' lines, as ``axis.plot`` takes them.
    """
    by = PROBE.get(key, ("", 1))[1]
    for arm, runs in arms.items():
        steps, values = curves(runs, key)
        if not steps:
            continue
        values = by * values
        style = {"marker": ".", "label": name + ARM_NAMES[arm]} | (styles or {}).get(arm, {})
        (line,) = axis.plot(steps, values.mean(0), **style)
        low, high = values.min(0), values.max(0)
        axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, lw=0)
    axis.set(xlabel="training step", ylabel=label)
    axis.grid(alpha=0.3)


def picture(
    cells: Sequence[Cell], images: dict[str, np.ndarray], path: Path, *, title: str
) -> None:
    """Learning curves and diversity over the run, and below them generated images.

    All methods and bit widths share the three panels of curves. The images are those of the first
    method at its first bit width: of the baseline, and of the add-on where it was compared.

    Args:
        images: of some cells by name, (n, h, w, c) in [0, 1]; of other channels than 1 or 3 their
            mean is drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = groups(cells)
    figure = plt.figure(figsize=(14, 8.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    axes = above.subplots(1, len(CURVES))
    colours = [f"C{i}" for i in range(10)]
    if len(found) > len(colours):
        colours = plt.get_cmap("turbo")(np.linspace(0, 1, len(found)))
    for axis, (key, (head, label)) in zip(axes, CURVES.items(), strict=True):
        for place, ((method, weight_bits, act_bits), arms) in enumerate(found.items()):
            name, styles = f"{method} W{weight_bits}A{act_bits} ", {}
            if len(found) > 1:
                styles = {arm: {"color": colours[place], **LINES[arm]} for arm in arms}
            plot_curves(axis, arms, key, label, name=name, styles=styles)
        axis.set_title(head, fontsize=11)
    fp = [c["accuracy_fp"] for c in cells if c.get("accuracy_fp")]
    if fp:
        axes[0].axhline(fp[0], color="grey", ls="--", lw=1, label="full precision")
    if not axes[0].lines:
        axes[0].text(0.5, 0.5, "n/a, no evaluation images", ha="center")
        axes[0].set(xticks=[], yticks=[])
    lines = {line.get_label(): line for axis in axes for line in axis.lines}
    for ncols in range(6, 0, -1) if lines else ():  # as many as fit
        legend = above.legend(
            handles=list(lines.values()), loc="outside lower center", ncols=ncols, fontsize=9
        )
        figure.draw_without_rendering()
        if legend.get_window_extent().width < figure.bbox.width:
            break
        legend.remove()

    (method, weight_bits, act_bits), arms = next(iter(found.items()))
    drawn = {arm: c for arm, runs in arms.items() for c in reversed(runs) if c["name"] in images}
    drawn = {arm: drawn[arm] for arm in ("none", "both", "loss", "interpolation") if arm in drawn}
    axes = below.subplots(1, 2)
    for axis in axes:
        axis.axis("off")
    for axis, (arm, cell) in zip(axes, drawn.items(), strict=False):
        axis.imshow(
            mosaic(images[cell["name"]]), cmap="gray", vmin=0, vmax=1, interpolation="nearest"
        )
        name = f"{method} W{weight_bits}A{act_bits} {ARM_NAMES[arm]}, seed {cell['seed']}"
        axis.set_title(f"Generated images: {name}", fontsize=11)
    figure.suptitle(f"{title}: mean and range over seeds", fontsize=12)
    png = io.BytesIO()
    figure.savefig(png, dpi=110, format="png")
    plt.close(figure)
    checkpoint.write(path, png.getbuffer())


def mosaic(images: np.ndarray, rows: int = 4, columns: int = 8) -> np.ndarray:
    """The first rows * columns images as one, with a white line between them.

    Images of more than 64 pixels are averaged down, as the picture would show their grid alone.
    """
    if images.shape[3] not in (1, 3):
        images = images.mean(3, keepdims=True)
    k = -(-images.shape[1] // 64)
    n, h, w, c = images.shape
    h, w = h // k, w // k
    images = images[:, : h * k, : w * k].reshape(n, h, k, w, k, c).mean((2, 4))
    pad = ((0, 0), (0, 1), (0, 1), (0, 0))
    images = images[: min(rows, n // columns) * columns]  # whole rows
    images = np.pad(images, pad, constant_values=1.0)
    lines = [
        np.concatenate(list(images[i : i + columns]), 1) for i in range(0, len(images), columns)
    ]
    return np.concatenate(lines, 0)


def write_json(path: Path, content: Any) -> None:
    """Atomically; NaN becomes null."""
    checkpoint.write(path, (json.dumps(_finite(content), indent=1) + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
