"""The proof's queue: every grid for README's table and the record's.

    python benchmarks/evidence/proof.py --cifar10 cifar10_resnet20.th cifar10/dev \\
        --cifar100 cifar100_resnet20.th cifar100/dev --imagenet imagenet/samples

Grids whose images are not given are left out. Each seed of a grid is one run of compare.py; its
finished cells are added to benchmarks/evidence/results/proof/GRID.json, and what is there already
is not trained again: to see it for oneself, take the file away. A stopped or killed queue
goes on with the same command, and several may work side by side: each takes the next seed that
nobody else works on. On another machine a grid keeps the precision that it began with.
"""

import argparse
import contextlib
import hashlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import benchmarks  # noqa: F401 - first, since it says what is missing

# isort: split
from agm import AgmError
from baselines import METHODS
from baselines.training.checks import resolve_device, resolve_precision
from benchmarks import command_line, compare, report
from benchmarks.errors import UsageError
from benchmarks.evidence import graphed
from benchmarks.process import locked

RESULTS = Path(__file__).parent / "results" / "proof"
SOURCE = ("command", "settings", "versions", "machine")  # of a cell
FIRST_SEED = 100  # the search used the seeds below
ROOM = "--with-agm --with-real"
PARTS = "--with-agm loss interpolation"
# Networks by the option that gives their images; the first that a grid's arguments start with.
NETWORKS = {
    "cifar100": "--model resnet20 --num-classes 100",
    "cifar10": "--model resnet20",
    "imagenet": "--model efficientnet_lite0 --pretrained",
}
CIFAR100, CIFAR10, IMAGENET = NETWORKS.values()
# The arguments of compare.py, and how many seeds: of settings in which each method is judged,
SETTINGS = {
    "resnet20-w2a2-1200": (f"{CIFAR10} --bits 2 --steps 1200 {ROOM}", 5),
    "cifar100-w2a2": (f"{CIFAR100} --bits 2 --steps 1200 {ROOM}", 5),
    "cifar100-w3a3": (f"{CIFAR100} --bits 3 --steps 1200 {ROOM}", 5),
    "resnet20-w2a2": (f"{CIFAR10} --bits 2 {ROOM}", 5),
    "resnet20-w3a3": (f"{CIFAR10} --bits 3 {ROOM}", 5),
    "resnet20-w4a4": (f"{CIFAR10} --bits 4 {ROOM}", 5),
    # The published recipes, their schedule drawn together to a twentieth, all with AdaDFQ's batch.
    "resnet20-w3a3-paper": (
        f"{CIFAR10} --recipe paper --steps 4000 --batch-size 16 --bits 3 {ROOM}", 5,
    ),
}  # fmt: skip
# and of grids of one method, or of all.
GRIDS = {
    "digits-w2a2": (f"--bits 2 --baseline all {ROOM}", 10),
    "cifar100-w3a3-3600": (f"{CIFAR100} --bits 3 --baseline gdfq {ROOM}", 5),
    "cifar100-w2a2-3600": (f"{CIFAR100} --bits 2 --baseline gdfq {ROOM}", 5),
    "resnet20-w2a2-7200": (f"{CIFAR10} --bits 2 --steps 7200 --baseline gdfq --with-real", 3),
    "efficientnet-w4a4-gdfq": (f"{IMAGENET} --bits 4 --steps 150 --with-agm", 3),
    "efficientnet-w5a5-gdfq": (f"{IMAGENET} --bits 5 --steps 100 --with-agm", 3),
    "efficientnet-w8a8-gdfq": (f"{IMAGENET} --bits 8 --steps 100 --with-agm", 3),
    # As long as the add-on's runs, whose step costs a tenth more on digits, and some 15 % on
    # ResNet-20, where 20 % are taken.
    "digits-w2a2-equal-time": ("--bits 2 --baseline all --steps 660", 10),
    "digits-w2a2-adadfq": (f"--bits 2 --baseline adadfq {ROOM}", 80),
    "digits-w2a2-adadfq-equal-time": ("--bits 2 --baseline adadfq --steps 660", 80),
    "resnet20-w2a2-1200-gdfq-equal-time": (f"{CIFAR10} --bits 2 --steps 1440", 5),
    "cifar100-w2a2-gdfq-equal-time": (f"{CIFAR100} --bits 2 --steps 1440", 5),
    "cifar100-w2a2-qimera-equal-time": (
        f"{CIFAR100} --bits 2 --steps 1440 --baseline qimera", 5,
    ),
    "cifar100-w2a2-adadfq-equal-time": (
        f"{CIFAR100} --bits 2 --steps 1440 --baseline adadfq", 5,
    ),
    "resnet20-w2a2-gdfq-equal-time": (f"{CIFAR10} --bits 2 --steps 3960", 5),
    "resnet20-w2a2-1200-gdfq-parts": (f"{CIFAR10} --bits 2 --steps 1200 {PARTS}", 5),
    "digits-w2a2-parts": (f"--bits 2 --baseline all {PARTS}", 10),
    "digits-w3a3": (f"--bits 3 --baseline all {ROOM}", 10),
    # A published recipe at its whole length.
    "resnet20-w3a3-published": (
        f"{CIFAR10} --recipe paper --bits 3 --baseline adadfq --with-agm", 3,
    ),
    "cifar100-w3a3-published": (
        f"{CIFAR100} --recipe paper --bits 3 --baseline adadfq --with-agm", 3,
    ),
} | {
    f"{setting}-{method}": (f"{arguments} --baseline {method}", seeds)
    for setting, (arguments, seeds) in SETTINGS.items()
    for method in METHODS
}  # fmt: skip


def setting(arguments: str) -> str:
    """What grids have in common whose runs may lie in one folder: network, recipe and length."""
    args = command_line.parse(shlex.split(arguments))
    recipe = None if args.recipe == "quick" else args.recipe
    parts = args.model, args.num_classes, recipe, args.steps
    return "-".join(str(part) for part in parts if part)


def images(arguments: str, given: argparse.Namespace) -> list[str] | None:
    """compare.py's options for the network's weights and images; None if they were not given."""
    name = next((n for n, network in NETWORKS.items() if arguments.startswith(network)), None)
    if name is None:
        return []  # digits bring their own
    files = getattr(given, name)
    if files is None:
        return None
    names = ["--data"] if name == "imagenet" else ["--weights", "--data"]
    return [part for pair in zip(names, map(str, files), strict=True) for part in pair]


def merge(grid: str, arguments: str, content: dict[str, Any]) -> None:
    """Put a report's cells into the grid's file, but for those that it or another one holds.

    Each names its source: commit, machine, settings.
    Histories are kept for ResNet-20, whose curves the record shows; those of digits are ten times
    as large as all the rest.
    """
    with locked(RESULTS, wait=True):
        path = RESULTS / f"{grid}.json"
        there = present(setting(arguments))
        known = json.loads(path.read_text()) if path.exists() else {"arguments": arguments}
        known["arguments"] = arguments
        sources = known.setdefault("sources", [])
        changed = {} if arguments.startswith(CIFAR10) else {"history": []}
        cells = {cell["name"]: cell for cell in known.get("cells", [])}
        for cell in content["cells"]:
            if cell["error"] is None and cell["name"] not in there:
                source = {key: (content | cell)[key] for key in SOURCE}  # a cell's own first
                if source not in sources:
                    sources.append(source)
                left_out = ("policy", *SOURCE)
                row = {k: v for k, v in cell.items() if k not in left_out} | changed
                cells[cell["name"]] = row | {"source": sources.index(source)}
        used = sorted({cell["source"] for cell in cells.values()})
        known["sources"] = [sources[i] for i in used]
        known["cells"] = [
            cells[name] | {"source": used.index(cells[name]["source"])} for name in sorted(cells)
        ]
        report.write_json(path, known)


def folder(arguments: str, seed: int, precision: str) -> str:
    """Of a seed's runs: grids share a baseline's, other constants have other folders."""
    recipe = command_line.parse(shlex.split(arguments)).recipe
    made = str([command_line.constants(recipe, size) for size in (8, 32, 224)])
    constants = hashlib.sha256(made.encode()).hexdigest()[:8]
    return f"{setting(arguments)}-{constants}-{precision}-seed{seed}"


def missing(argv: list[str], its_setting: str) -> bool:
    """Whether some cell of this run is in no file of its setting, as it would be trained today."""
    return not {cell["name"] for cell in command_line.grid(command_line.parse(argv))} <= present(
        its_setting
    )


def present(its_setting: str) -> set[str]:
    """The cells that some file of this setting holds as they would be trained today."""
    files = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    return {
        cell["name"]
        for file in files
        if setting(file["arguments"]) == its_setting
        for cell in file["cells"]
        if is_present(cell, file)
    }


def is_present(cell: dict[str, Any], file: dict[str, Any]) -> bool:
    """Whether a cell was trained with the recipe, losses and add-on that are the defaults now.

    Its code may be older, equal but for rounding: the source names the commit.
    """
    settings = file["sources"][cell["source"]]["settings"]
    now = command_line.constants(settings["recipe"], settings["image_size"])
    used = [cell["method"], *(["agm"] if cell["hooks"] in report.PARTS else [])]
    return all(settings["constants"][name] == now[name] for name in used)


def made_by(grid: str) -> list[dict[str, Any]]:
    """The settings that made a grid's cells and those it is set against."""
    partner = grid.removesuffix("-equal-time").removesuffix("-parts")
    paths = [RESULTS / f"{name}.json" for name in {grid, partner}]
    files = [json.loads(path.read_text()) for path in paths if path.exists()]
    return [source["settings"] for file in files for source in file["sources"]]


def precision_of(grid: str) -> str:
    """That of a grid's cells and those it is set against; before the first one, the machine's."""
    there = {made["precision"] for made in made_by(grid)}
    device = command_line.parse([]).device
    return there.pop() if len(there) == 1 else resolve_precision("auto", resolve_device(device))


def main(argv: list[str]) -> int:
    """Exit status 0, 1 if a cell failed, 2 for a user's mistake, 130 or 143 if stopped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, files in (
        ("cifar10", ("WEIGHTS", "DATA")), ("cifar100", ("WEIGHTS", "DATA")), ("imagenet", ("DATA",))
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=command_line.path, nargs=len(files), metavar=files)
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=list(GRIDS), metavar="GRID",
                        help=f"default: all of {', '.join(GRIDS)}")  # fmt: skip
    parser.add_argument("--out", type=command_line.path, default=Path("runs/proof"))
    parser.add_argument("--graphed", action="store_true",
                        help="on a GPU, by graphed.py in place of compare.py")  # fmt: skip
    args = parser.parse_args(argv)
    worst = 0
    judged_on = {grid: images(GRIDS[grid][0], args) for grid in args.grids}
    left_out = [grid for grid, files in judged_on.items() if files is None]
    if left_out:
        print(f"left out, as their images were not given: {', '.join(left_out)}", flush=True)
    runs = [
        (grid, seed)
        for grid in args.grids
        if grid not in left_out
        for seed in range(FIRST_SEED, FIRST_SEED + GRIDS[grid][1])
    ]
    nothing, program = True, graphed if args.graphed else compare
    for grid, seed in runs:
        arguments, precision = GRIDS[grid][0], precision_of(grid)
        out = args.out / folder(arguments, seed, precision)
        run = [*shlex.split(arguments), "--precision", precision, "--seeds", "1"]
        run += ["--first-seed", str(seed), "--out", str(out)]
        run += judged_on[grid]
        if not missing(run, setting(arguments)):
            continue
        nothing = False
        programs = {made.get("program", compare.PROGRAM) for made in made_by(grid)}
        if programs - {program.PROGRAM}:
            print(f"{grid}: left as it is, since {', '.join(programs)} made its other cells")
            continue
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(args.out / ".queues" / out.name))
            except UsageError:
                print(f"{out}: another queue works on it", flush=True)
                continue
            resume = ["--resume"] if (out / "settings.json").exists() else []
            status = program.main([*run, *resume])
            if (out / "report.json").exists():
                merge(grid, arguments, json.loads((out / "report.json").read_text()))
        if status not in (0, 1):
            return status
        worst = max(worst, status)
    if runs and nothing:
        print(f"nothing to train: all cells are in {RESULTS}; those taken out are trained anew")
    return worst


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except AgmError as error:
        print(f"proof.py: error: {error}", file=sys.stderr)
        sys.exit(2)
