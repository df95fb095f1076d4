"""What part of the add-on's effect is its own: each part beside a control that is as strong.

    python benchmarks/evidence/controls.py --baseline all --bits 2 --seeds 10 --first-seed 100

The loss's control adds noise to the images' gradient, as long as the loss's own. Interpolation's
moves an image as far as interpolation would, in a random direction. Both keep to the same turns.
Each run is a line of --records, judged on the proof half at its last step; a stopped command goes
on where it was. Prints each arm's paired difference to the baseline.
"""

import argparse
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
from benchmarks import compare, report
from benchmarks.errors import UsageError
from benchmarks.provenance import provenance
from benchmarks.task.task import load_task

TRAINING = (
    "in_channels", "recipe", "steps", "batch_size", "activations", "device", "precision",
)  # fmt: skip
RECORDS = Path(__file__).parent / "results" / "controls.jsonl"


class NoiseForLoss(AGM):
    """Gaussian noise at the images, as long as the gradient that the loss would have there."""

    def __init__(self, *, seed: int) -> None:
        super().__init__(interpolation=False, seed=seed)
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
        super().__init__(seed=seed)
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
    if arm == "loss, control":
        return [NoiseForLoss(seed=seed)]
    if arm == "none":
        return []
    hook = AGM(loss=arm == "loss", interpolation=arm != "loss", seed=seed)
    if arm == "interpolation, control":
        hook.mix = NoiseForInterpolation(seed=seed)
    return [hook]


ARMS = ("none", "loss", "loss, control", "interpolation", "interpolation, control")


def main(argv: list[str]) -> int:
    """Exit status 0, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other options are compare.py's; one width is taken.",
    )  # fmt: skip
    parser.add_argument("--records", type=Path, default=RECORDS)
    own, rest = parser.parse_known_args(argv)
    try:
        args = compare.parse(rest)
        task = load_task(args)
        if task.images is None:
            raise UsageError("--data is missing, the images to judge on")
        (weight_bits, act_bits), source = args.widths[0], provenance(args.device)
        rows = [json.loads(line) for line in own.records.open()] if own.records.exists() else []
        own.records.parent.mkdir(parents=True, exist_ok=True)
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for method in args.methods:
                for arm in ARMS:
                    row = {"model": args.model, "bits": [weight_bits, act_bits], "method": method,
                           "arm": arm, "seed": seed, "steps": args.steps}  # fmt: skip
                    if any(row.items() <= done.items() for done in rows):
                        continue
                    result = quantize(
                        task.teacher,
                        method=method,
                        weight_bits=weight_bits,
                        act_bits=act_bits,
                        hooks=hooks(arm, seed),
                        image_size=task.inputs.image_size,
                        seed=seed,
                        **{name: getattr(args, name) for name in TRAINING},
                    )
                    row["accuracy_proof"] = task.figures(result.model)["accuracy_proof"]
                    rows.append(row | source)
                    with own.records.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
        print(table(rows))
    except AgmError as error:
        print(f"controls.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """Each setting's paired differences to its baseline, all methods together, as Markdown."""
    lines = ["| | n | " + " | ".join(ARMS[1:]) + " |", "|---" * (len(ARMS) + 1) + "|"]
    settings = sorted({(row["model"], tuple(row["bits"])) for row in rows})
    for model, bits in settings:
        of_arm: dict[str, dict[Any, float]] = {arm: {} for arm in ARMS}
        for row in rows:
            if (row["model"], tuple(row["bits"])) == (model, bits):
                of_arm[row["arm"]][row["method"], row["seed"]] = row["accuracy_proof"]
        found = [report.paired_difference(of_arm["none"], of_arm[arm]) for arm in ARMS[1:]]
        texts = [report.difference_text(d).rpartition(", n=")[0] for d in found]
        title = f"{model} W{bits[0]}A{bits[1]}"
        lines.append("| " + " | ".join([title, str(len(of_arm["none"])), *texts]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
