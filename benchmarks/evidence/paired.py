"""The loop of controls.py and forms.py: arms of hooks on the same seeds, beside the baseline.

Each run is a line of --records, judged at its last step. A stopped command goes on where it was;
runs of other settings or constants are left alone. Prints each arm's paired difference to the
baseline, over all runs of these settings.
"""

import argparse
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from agm import AgmError, Hook
from baselines import METHODS, quantize
from benchmarks import command_line, report
from benchmarks.errors import UsageError
from benchmarks.provenance import provenance
from benchmarks.task.task import Task, halves, load_task

BASELINE = "none"
# Of an arm: seed and steps after the warm-up -> its hooks.
Arms = Mapping[str, Callable[[int, int], list[Hook]]]


def main(
    argv: list[str], *, program: str, doc: str | None, arms: Arms, records: Path, half: str
) -> int:
    """Run ``arms`` and print their table; exit status 0, or 2 for a user's mistake.

    Args:
        half: the images to judge on, ``"tuning"`` or ``"proof"``.
    """
    parser = argparse.ArgumentParser(
        prog=program, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other options are compare.py's; one width is taken.",
    )  # fmt: skip
    parser.add_argument("--records", type=command_line.path, default=records)
    parser.add_argument("--arms", nargs="+", choices=arms, default=list(arms), metavar="ARM",
                        help=f"default: all of {'; '.join(arms)}")  # fmt: skip
    own, rest = parser.parse_known_args(argv)
    try:
        args = command_line.parse_setting(rest)
        task = load_task(args)
        if task.images is None:
            raise UsageError("--data is missing, the images to judge on")
        (weight_bits, act_bits), size = args.widths[0], task.inputs.image_size
        setting = {"model": args.model, "num_classes": args.num_classes}
        setting |= {"weight_bits": weight_bits, "act_bits": act_bits}
        setting |= command_line.training(args) | {
            "constants": command_line.constants(args.recipe, size)
        }
        lines = own.records.read_text().splitlines() if own.records.exists() else []
        rows = [
            row for row in map(json.loads, lines)
            if all(row.get(name) == value for name, value in setting.items())
        ]  # fmt: skip
        own.records.parent.mkdir(parents=True, exist_ok=True)
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        for seed, method, arm in itertools.product(seeds, args.methods, own.arms):
            run = {"method": method, "arm": arm, "seed": seed}
            if any(run.items() <= row.items() for row in rows):
                continue
            result = quantize(
                task.teacher,
                method=method,
                weight_bits=weight_bits,
                act_bits=act_bits,
                hooks=arms[arm](seed, steps_after_warmup(args, method, size)),
                image_size=size,
                seed=seed,
                **command_line.training(args),
            )
            run[f"accuracy_{half}"] = task.figures(result.model)[f"accuracy_{half}"]
            run[f"kl_{half}"] = divergence(task, result.model, half)
            rows.append(run | setting | provenance(args.device))
            with own.records.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
        print(table({f"{args.model} W{weight_bits}A{act_bits}": rows}, arms, half))
    except AgmError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    return 0


def steps_after_warmup(args: argparse.Namespace, method: str, size: int) -> int:
    """In which the hooks are asked."""
    _, recipe = getattr(METHODS[method], args.recipe)(size)
    given = {"steps": args.steps} if args.steps is not None else {}
    recipe = replace(recipe, **given)
    return recipe.steps - recipe.warmup_steps


@torch.no_grad()
def divergence(task: Task, student: nn.Module, half: str) -> float:
    """KL(teacher || student) on real images, in nats, mean over a half of them.

    What helps must lower it; a generator that fools both networks moves them on its images alone.
    """
    assert task.images is not None
    found = torch.cat([
        F.kl_div(
            student(images).log_softmax(1), task.teacher(images).log_softmax(1),
            reduction="none", log_target=True,
        ).sum(1)
        for images, _ in ((x.to(task.device), y) for x, y in task.images)
    ])  # fmt: skip
    return found[halves(task.images.labels)[half]].mean().item()


def table(groups: dict[str, list[dict[str, Any]]], arms: Iterable[str], half: str) -> str:
    """Of each title's rows the arms' paired differences to the baseline, methods together.

    See :func:`benchmarks.report.together`.
    """
    lines = []
    shown = [
        arm for arm in arms
        if arm != BASELINE and any(row["arm"] == arm for rows in groups.values() for row in rows)
    ]  # fmt: skip
    for title, rows in groups.items():
        by_seed: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
        for row in rows:
            by_seed[row["arm"], row["method"]][row["seed"]] = row[f"accuracy_{half}"]
        methods = {method for _, method in by_seed}
        found = [
            report.together((by_seed[BASELINE, m], by_seed[arm, m]) for m in methods)
            for arm in shown
        ]
        lines.append([title, *(report.difference_text(d) if d["n"] else "" for d in found)])
    head = ["", *shown]
    return "\n".join(f"| {' | '.join(x)} |" for x in (head, ["---"] * len(head), *lines))
