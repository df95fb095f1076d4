"""What of the add-on's effect is its own: it and its parts, each beside a control as strong.

    python benchmarks/evidence/controls.py --baseline all --bits 2 --seeds 10 --first-seed 100

The loss's control adds noise to the images' gradient, as long as the loss's own. Interpolation's
moves an image as far as interpolation would, in a random direction. Both keep to the same turns,
and are the control of the whole.
Each run is a line of --records, judged on the proof half at its last step. A stopped command goes
on where it was; runs of other settings or constants are left alone. Prints each arm's paired
difference to the baseline, over all runs of these settings.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import benchmarks  # noqa: F401 - first, since it says what is missing

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor

from agm import AGM, AgmError, Hook, LinearInterpolation
from baselines import quantize
from benchmarks import command_line, report
from benchmarks.errors import UsageError
from benchmarks.provenance import provenance
from benchmarks.task.task import load_task

CONTROL = ", control"
ARMS = ("none", *(part + kind for part in report.PARTS for kind in ("", CONTROL)))
RECORDS = Path(__file__).parent / "results" / "controls.jsonl"


class NoiseForLoss(AGM):
    """Gaussian noise at the images, as long as the gradient that the loss would have there."""

    def __init__(self, *, seed: int, **parts: bool) -> None:
        super().__init__(seed=seed, **parts)
        self.rng = torch.Generator().manual_seed(seed)

    def generator_loss(self, *, images: Tensor, **given: Any) -> Tensor:
        term = super().generator_loss(images=images, **given)
        if not term.requires_grad:  # not the loss's turn
            return term
        (gradient,) = torch.autograd.grad(term, images, retain_graph=True)
        noise = torch.randn(images.shape, generator=self.rng).to(gradient)
        return (images * (noise * (gradient.norm() / noise.norm()))).sum()


class NoiseForInterpolation(LinearInterpolation):
    """Each image moved as far as interpolation would, in a random direction; labels kept."""

    def __init__(self, *, seed: int) -> None:
        super().__init__(seed=seed, regions=True)  # as AGM's
        self.rng = torch.Generator().manual_seed(seed)

    def __call__(self, images: Tensor, labels: Tensor, **given: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        mixed, soft = super().__call__(images, labels, **given)
        noise = torch.randn(images.shape, generator=self.rng).to(images)
        far, length = (x.flatten(1).norm(dim=1) for x in (mixed - images, noise))
        if not labels.is_floating_point():
            labels = F.one_hot(labels, soft.shape[1]).to(soft)
        return images + noise * (far / length)[:, None, None, None], labels


def hooks(arm: str, seed: int) -> list[Hook]:
    """Of an arm, all of one seed."""
    if arm == "none":
        return []
    part = arm.removesuffix(CONTROL)
    parts = {name: part in (name, "both") for name in ("loss", "interpolation")}
    if part == arm:
        return [AGM(seed=seed, **parts)]
    hook = NoiseForLoss(seed=seed, **parts)
    hook.mix = NoiseForInterpolation(seed=seed)
    return [hook]


def main(argv: list[str]) -> int:
    """Exit status 0, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other options are compare.py's; one width is taken.",
    )  # fmt: skip
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, metavar="ARM",
                        help=f"default: all of {'; '.join(ARMS)}")  # fmt: skip
    own, rest = parser.parse_known_args(argv)
    try:
        args = command_line.parse(rest)
        task = load_task(args)
        if task.images is None:
            raise UsageError("--data is missing, the images to judge on")
        (weight_bits, act_bits), size = args.widths[0], task.inputs.image_size
        setting = {"model": args.model, "weight_bits": weight_bits, "act_bits": act_bits}
        setting |= command_line.training(args) | {
            "constants": command_line.constants(args.recipe, size)
        }
        lines = own.records.read_text().splitlines() if own.records.exists() else []
        rows = [row for row in map(json.loads, lines) if setting.items() <= row.items()]
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
                hooks=hooks(arm, seed),
                image_size=size,
                seed=seed,
                **command_line.training(args),
            )
            run["accuracy_proof"] = task.figures(result.model)["accuracy_proof"]
            rows.append(run | setting | provenance(args.device))
            with own.records.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
        print(table({f"{args.model} W{weight_bits}A{act_bits}": rows}))
    except AgmError as error:
        print(f"controls.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def table(groups: dict[str, list[dict[str, Any]]]) -> str:
    """Of each title's rows the arms' paired differences to the baseline, methods together."""
    lines = []
    shown = [
        a for a in ARMS[1:] if any(row["arm"] == a for rows in groups.values() for row in rows)
    ]
    for title, rows in groups.items():
        of_arm: dict[str, dict[Any, float]] = {arm: {} for arm in ARMS}
        for row in rows:
            of_arm[row["arm"]][row["method"], row["seed"]] = row["accuracy_proof"]
        found = [report.paired_difference(of_arm["none"], of_arm[arm]) for arm in shown]
        lines.append([title, *(report.difference_text(d) if d["n"] else "" for d in found)])
    head = ["", *shown]
    return "\n".join(f"| {' | '.join(x)} |" for x in (head, ["---"] * len(head), *lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
