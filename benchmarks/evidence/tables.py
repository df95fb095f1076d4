"""README's table, the record's, and their pictures, from benchmarks/evidence/results alone.

    python benchmarks/evidence/tables.py

Writes between the markers ``<!-- NAME -->`` and ``<!-- end -->`` of README.md and of
benchmarks/evidence/RECORD.md, and proof.png and earlier.png in benchmarks/evidence/results.
"""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import benchmarks  # noqa: F401 - first, since it says what is missing

# isort: split
from benchmarks import command_line, report
from benchmarks.evidence import controls, paired
from benchmarks.evidence.proof import is_present, setting
from benchmarks.report import Cell

ROOT = Path(__file__).resolve().parents[2]
README, RECORD = ROOT / "README.md", Path(__file__).parent / "RECORD.md"
RESULTS = Path(__file__).parent / "results"
PROOF, EARLIER = RESULTS / "proof", RESULTS / "earlier"
NAMES = {"gdfq": "GDFQ", "qimera": "Qimera", "adadfq": "AdaDFQ"}
# A baseline of more steps, by the setting whose add-on took as long.
EQUAL_TIME = {
    "resnet20-1440": "resnet20-1200", "resnet20-100-1440": "resnet20-100-1200",
    "resnet20-3960": "resnet20", "digits-660": "digits-600",
}  # fmt: skip
# Likewise, by the setting whose interpolation alone took as long.
PART_TIME = {"resnet20-1280": "resnet20-1200"}
SETTINGS = {
    "resnet20-1200": "ResNet-20, 1,200 steps, {}",
    "resnet20-1280": "ResNet-20, 1,200 steps, interpolation's time, {}",
    "resnet20-1440": "ResNet-20, 1,200 steps, equal time, {}",
    "resnet20-100-1200": "ResNet-20, CIFAR-100, 1,200 steps, {}",
    "resnet20-100-1440": "ResNet-20, CIFAR-100, 1,200 steps, equal time, {}",
    "resnet20-100": "ResNet-20, CIFAR-100, {}",
    "resnet20-7200": "ResNet-20, 7,200 steps, {}",
    "resnet20-100-paper": "ResNet-20, CIFAR-100, published recipe and length, {}",
    "resnet20-paper": "ResNet-20, published recipe and length, {}",
    "efficientnet_lite0-150": "EfficientNet-Lite0, 150 steps, {}",
    "efficientnet_lite0-100": "EfficientNet-Lite0, 100 steps, {}",
    "resnet20": "ResNet-20 {}",
    "resnet20-3960": "ResNet-20, equal time, {}",
    "resnet20-paper-4000": "ResNet-20, published recipe, 4,000 steps, {}",
    "digits-600": "digits {}",
    "digits-660": "digits, equal time, {}",
}
# Of them those that README's table shows, but for rows that stand in its text: where little is to
# be won (at 3 bits real images bring one to three points, at 4 full precision is a point above),
# and two of the three methods at CIFAR-10's shorter length.
SHOWN = ("resnet20", "resnet20-100-1200", "resnet20-100", "resnet20-1200", "digits-600")
IN_TEXT = (
    "ResNet-20 W3A3", "ResNet-20 W4A4", "ResNet-20, CIFAR-100, W3A3",
    "ResNet-20, 1,200 steps, W2A2 Qimera", "ResNet-20, 1,200 steps, W2A2 AdaDFQ",
)  # fmt: skip
# Rows whose pairs are put together, beside those of one setting's methods.
POOLED = {
    "ResNet-20, W2A2 GDFQ, both lengths": (
        "ResNet-20 W2A2 GDFQ", "ResNet-20, 1,200 steps, W2A2 GDFQ",
    ),
    "ResNet-20, default length, GDFQ at W2A2, W4A4 and CIFAR-100's W3A3": (
        "ResNet-20 W2A2 GDFQ", "ResNet-20 W4A4 GDFQ", "ResNet-20, CIFAR-100, W3A3 GDFQ",
    ),
    "ResNet-20, CIFAR-100, 1,200 steps, W2A2, together, against each baseline's better length": (
        "ResNet-20, CIFAR-100, 1,200 steps, equal time, W2A2 GDFQ",
        "ResNet-20, CIFAR-100, 1,200 steps, equal time, W2A2 Qimera",
        "ResNet-20, CIFAR-100, 1,200 steps, W2A2 AdaDFQ",
    ),
}  # fmt: skip
# Seeds whose number was fixed before any of them was looked at, and to which none were added.
FIXED_BEFORE = {
    "digits W2A2 AdaDFQ": range(130, 180), "digits, equal time, W2A2 AdaDFQ": range(130, 180),
}  # fmt: skip
Row = tuple[str, dict[str, list[Cell]]]


def proof_rows(folder: Path, settings: Iterable[str] = SETTINGS) -> list[Row]:
    """("ResNet-20 W3A3 GDFQ", cells by arm) of every bit width and method of these, in order.

    "Equal time" sets a baseline of more steps against the add-on's runs of the usual length; where
    there is one, the usual length has it as the arm "longer".
    """
    cells: dict[str, list[Cell]] = {name: [] for name in SETTINGS}
    for path in sorted(folder.glob("*.json")):
        file = json.loads(path.read_text())
        cells[setting(file["arguments"])] += [
            cell | {"origin": _origin(file["sources"][cell["source"]])} for cell in file["cells"]
        ]
    rows = []
    longer = {usual: name for name, usual in EQUAL_TIME.items()}
    for name in settings:
        for key, arms in sorted(report.groups(cells[name]).items(), key=_order):
            run = dict(zip(("method", "weight_bits", "act_bits"), key, strict=True))
            if name in EQUAL_TIME:
                usual = report.groups(cells[EQUAL_TIME[name]])
                arms |= {"both": usual.get(key, {}).get("both", [])}
            elif name in longer:
                same = report.groups(cells[longer[name]]).get(key, {})
                arms |= {"longer": same.get("none", [])}
            rows.append((_title(name, run), arms))
    return rows


def _origin(source: dict[str, Any]) -> str:
    """The commit that a cell was trained at, and the GPU if it was one."""
    commit, dirty, gpu = *source["versions"]["commit"].partition("-")[::2], source["machine"]["gpu"]
    name = commit[:7] + ("-dirty" if dirty else "")
    return f"{name} ({gpu.split()[1]})" if gpu else name


def _order(item: tuple[tuple[str, int, int], Any]) -> tuple[int, int, int]:
    method, *bits = item[0]
    return (*bits, list(NAMES).index(method))


def room_table(rows: list[Row]) -> str:
    """What the add-on brings, and beside it what real images would, as Markdown.

    All on the proof half. A figure that was not measured stays open. The share of the room is the
    add-on's difference over that of real images, as they stand in the row; it stays open where real
    images are not known to bring anything.
    """
    lines = [
        "| | baseline % | + AGM | + AGM at equal time | real images: the room, AGM's share | n |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *filter(None, (_room_line(*row) for row in rows))])


def _room_line(title: str, arms: dict[str, list[Cell]]) -> str:
    base, both, real, longer = (
        report.by_seed(arms.get(arm, []), "accuracy_proof")
        for arm in ("none", "both", "real", "longer")
    )
    pairs = [(base, both), (longer, both), (base, real)]
    gain, equal_time, room = (report.paired_difference(*pair) for pair in pairs)
    if not gain["n"]:
        return ""
    found = [gain, equal_time, room]
    counts = ", ".join(map(str, dict.fromkeys([len(base), *(d["n"] for d in found if d["n"])])))
    texts = list(map(report.interval_text, found))
    if (room["low"] or 0) > 0:
        texts[-1] += f", {100 * gain['mean'] / room['mean']:.0f} %"
    mean = report.mean_std(list(base.values()))
    return "| " + " | ".join([title, mean, *texts, counts]) + " |"


def proof_table(rows: list[Row]) -> str:
    """Accuracy of the baseline and each arm's paired difference to it, as Markdown.

    Below several methods of one setting, all of them together, over the seeds that each has. n:
    seeds of the baseline, then of each arm's pairs. Last the commits; "a against b" where a
    baseline is not of its pair's.
    """
    return _proof_lines(_with_all_together(rows))


def pooled_table(rows: list[Row]) -> str:
    """As :func:`proof_table`, of several rows together, and of some seeds of a row."""
    of = dict(rows)
    together = [(name, [of[title] for title in titles]) for name, titles in POOLED.items()]
    for title, seeds in FIXED_BEFORE.items():
        arms = {a: [c for c in cells if c["seed"] in seeds] for a, cells in of[title].items()}
        together.append((f"{title}, seeds {seeds[0]} to {seeds[-1]}", [arms]))
    return _proof_lines(together)


def _proof_lines(rows: Iterable[tuple[str, list[dict[str, list[Cell]]]]]) -> str:
    lines = [
        "| | baseline, all images % | proof half % | + loss | + interpolation | **+ both** "
        "| real images | n | commits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_proof_line(title, methods) for title, methods in rows)])


def _with_all_together(rows: list[Row]) -> Iterator[tuple[str, list[dict[str, list[Cell]]]]]:
    """Each row as its title and one method's arms; below several of a setting, all theirs."""
    for setting_title, group in itertools.groupby(rows, lambda row: row[0].rpartition(" ")[0]):
        members = list(group)
        yield from ((title, [arms]) for title, arms in members)
        if len(members) > 1:
            yield f"{setting_title}, together", [arms for _, arms in members]


def _proof_line(title: str, methods: list[dict[str, list[Cell]]]) -> str:
    line, counts = [title, "", ""], []
    bases = [report.by_seed(arms["none"], "accuracy_proof") for arms in methods]
    if len(methods) == 1:
        everywhere = report.by_seed(methods[0]["none"], "accuracy_last")
        line[1:] = [report.mean_std(list(runs.values())) for runs in (everywhere, bases[0])]
    counts.append(str(len(set(bases[0]).intersection(*bases))))
    for arm in report.ARMS[1:]:
        others = [report.by_seed(arms.get(arm, []), "accuracy_proof") for arms in methods]
        alone = len(methods) > 1 and sum(map(bool, others)) < 2  # nothing to put together
        difference = report.together([] if alone else zip(bases, others, strict=True))
        line.append(report.interval_text(difference))
        counts += [str(difference["n"])] if difference["n"] else []
    return "| " + " | ".join([*line, ", ".join(counts), _commits(methods)]) + " |"


def _commits(methods: list[dict[str, list[Cell]]]) -> str:
    """Where the runs of a row's seeds are from, each once, in the order of the seeds."""
    origins = [{cell["seed"]: cell["origin"] for cell in arms["none"]} for arms in methods]
    shared = set(origins[0]).intersection(*origins)
    found: dict[str, None] = {}
    for bases, arms in zip(origins, methods, strict=True):
        pairs = [
            (cell["seed"], cell["origin"])
            for arm in report.ARMS[1:]
            for cell in arms.get(arm, [])
            if cell["seed"] in shared
        ]
        for seed, origin in sorted(pairs or bases.items()):
            same = origin == bases[seed]
            found[origin if same else f"{bases[seed]} against {origin}"] = None
    return ", ".join(found)


def controls_table(records: Path, rows: list[Row]) -> str:
    """controls.py's table of every setting that it was run in with today's constants.

    What its records lack there, arms or seeds, is the proof's; a baseline that is as long as
    interpolation alone takes is set against it.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    usual: dict[str, str] = {}
    now = [command_line.constants("quick", size) for size in (8, 32, 224)]
    for run in map(json.loads, records.read_text().splitlines()):
        if run["recipe"] == "quick" and run["constants"] in now:
            parts = run["model"], run.get("num_classes"), run["steps"]  # as proof.py's setting
            name = "-".join(str(part) for part in parts if part)
            groups.setdefault(_title(name, run), []).append(run)
            if name in PART_TIME:
                usual[_title(name, run)] = _title(PART_TIME[name], run)
    proof = dict(rows)
    for title, runs in groups.items():
        same = groups.get(usual.get(title, ""), [])
        runs += [run for run in same if run["arm"] == "interpolation"]
        present = {(run["arm"], run["seed"]) for run in runs}
        runs += [
            cell | {"arm": arm}
            for arm in ("none", *report.PARTS)
            for cell in proof.get(title, {}).get(arm, [])
            if (arm, cell["seed"]) not in present
        ]
    return paired.table(groups, controls.ARMS, "proof")


def _title(name: str, run: dict[str, Any]) -> str:
    bits = f"W{run['weight_bits']}A{run['act_bits']}"
    return SETTINGS[name].format(f"{bits} {NAMES[run['method']]}")


def speed_table(paths: list[Path]) -> str:
    """Milliseconds a step, the speedup over plain and what the add-on costs, as Markdown."""
    lines = [
        "| | plain | bf16 | + loss | + interpolation | + both | peak MiB, plain / bf16 / both |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in paths:
        for method, content in json.loads(path.read_text())["methods"].items():
            figures = content["figures"]
            times = {
                k: f"{1e3 * v['seconds']:.0f} ± {1e3 * v['spread']:.0f}" for k, v in figures.items()
            }
            cost = {k: f"{100 * figures[k]['over_baseline']:+.0f} %" for k in report.PARTS}
            peaks = " / ".join(f"{figures[k]['peak_mib']:.0f}" for k in ("plain", "none", "both"))
            lines.append(
                f"| {NAMES[method]}, {content['batch_size']} | {times['plain']} "
                f"| {times['none']} ({figures['none']['speedup_over_plain']:.2f}x) "
                f"| {cost['loss']} | {cost['interpolation']} | {cost['both']} | {peaks} |"
            )
    return "\n".join(lines)


def picture(rows: list[Row], path: Path) -> None:
    """Every paired difference with its interval, and the curves of the first row that has any.

    Rows of two pairs and fewer are left out of the first panel: an interval of two is some ten
    times as wide as the others. Those of three and four may run out of it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    labels, ends = [], [-1.0, 1.0]
    for title, arms in rows:
        base = report.by_seed(arms["none"], "accuracy_proof")
        both = report.by_seed(arms.get("both", []), "accuracy_proof")
        difference = report.paired_difference(base, both)
        if difference["n"] < 3:
            continue
        place = len(labels)
        axes[0].plot(difference["mean"], place, "o", color="C1")
        axes[0].plot([difference["low"], difference["high"]], [place, place], color="C1")
        labels.append(f"{title} (n={difference['n']})")
        ends += [difference["low"], difference["high"]] if difference["n"] >= 5 else []
    axes[0].axvline(0, color="grey", lw=1)
    axes[0].set_yticks(range(len(labels)), labels, fontsize=8)
    axes[0].set_ylim(len(labels) - 0.5, -0.5)
    axes[0].set_xlim(min(ends) - 0.5, max(ends) + 0.5)
    axes[0].set(
        xlabel="accuracy with AGM - without (points)\nmean and 95 % interval over paired seeds"
    )
    title, arms = next(row for row in rows if _has_curves(row))
    panels = {
        "accuracy": "accuracy on all evaluation images (%)",
        "batch_similarity": "cosine similarity of features\nbetween images of a batch",
    }
    for axis, (key, label) in zip(axes[1:], panels.items(), strict=True):
        report.plot_curves(axis, {a: arms[a] for a in ("none", "both") if a in arms}, key, label)
        axis.set_title(f"{title},\nmean and range over seeds", fontsize=9)
        axis.set_xlim(left=0)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _has_curves(row: Row) -> bool:
    return any(cell["history"] for cells in row[1].values() for cell in cells)


def fill(text: str, tables: dict[str, str]) -> str:
    """``text`` with each table between its markers; a marker that is not there is an error."""
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->).*?(<!-- end -->)"
        between = f"\n\n{table}\n\n"
        text, count = re.subn(pattern, lambda m, b=between: m[1] + b + m[2], text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"the file must have the markers of {name!r} once, found {count}")
    return text


def earlier(folder: Path) -> str:
    """A sentence on the runs that today's recipe did not make; empty if there are none."""
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    present = [is_present(cell, file) for file in files for cell in file["cells"]]
    if all(present):
        return ""
    return (
        f"\n\n{present.count(False)} of the {len(present)} runs behind this table are of an "
        "earlier recipe; their JSON names the commit."
    )


def deployed_table(path: Path) -> str:
    """What exported files lose against their students and weigh, a row a bit width, as Markdown."""
    lines = [
        "| ResNet-20, all images | student % | file % | file - student | n | kB | float32 kB |",
        "|---|---|---|---|---|---|---|",
    ]
    cells = json.loads(path.read_text())["cells"]
    for bits in sorted({tuple(cell["bits"]) for cell in cells}):
        group = [cell for cell in cells if tuple(cell["bits"]) == bits]
        student, file = (
            {i: cell[f"accuracy_{of}"] for i, cell in enumerate(group)}
            for of in ("student", "file")
        )
        difference = report.paired_difference(student, file)
        sizes = (max(c[key] for c in group) / 1000 for key in ("bytes", "float32_bytes"))
        means = [report.mean_std(list(v.values())) for v in (student, file)]
        title = f"W{bits[0]}A{bits[1]}"
        row = [title, *means, report.interval_text(difference), str(difference["n"])]
        lines.append("| " + " | ".join([*row, *(f"{s:.0f}" for s in sizes)]) + " |")
    return "\n".join(lines)


def tables() -> dict[Path, dict[str, str]]:
    """Every table by its file and the name of its marker."""
    shown = [row for row in proof_rows(PROOF, SHOWN) if not row[0].startswith(IN_TEXT)]
    proof = proof_rows(PROOF)
    return {
        README: {"room": room_table(shown) + earlier(PROOF)},
        RECORD: {
            "proof": proof_table(proof),
            "pooled": pooled_table(proof),
            "controls": controls_table(RESULTS / "controls.jsonl", proof),
            "earlier": proof_table(proof_rows(EARLIER)),
            "deployed": deployed_table(RESULTS / "deployed.json"),
            "speed": speed_table([RESULTS / "speed-batch200.json", RESULTS / "speed-batch16.json"]),
        },
    }


def main() -> None:
    description = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=description).parse_args()
    for path, of_file in tables().items():
        path.write_text(fill(path.read_text(), of_file))
    for folder in (PROOF, EARLIER):
        rows = proof_rows(folder)
        if any(map(_has_curves, rows)):
            picture(rows, folder.with_suffix(".png"))


if __name__ == "__main__":
    main()
