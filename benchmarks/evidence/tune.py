"""One setting, some seeds, on the tuning half of the evaluation images: for the search's record.

    python benchmarks/evidence/tune.py NAME --model resnet20 --weights W --data D \\
        --set recipe.steps=1200 method.bns_weight=50 agm.ratio=0.5

The tuning half is the first half of each class in file order; the other half is left for the
proof. Appends one JSON line a run to --records: the last accuracy, and the curve. With --ceiling
the student learns from the tuning half itself, in place of the generator's images, and is judged on
the other: what better images could bring at most.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import benchmarks  # noqa: F401 - first, since it says what is missing

# isort: split
from tqdm import trange

from agm import AGM, AgmError, Hook
from baselines import METHODS
from baselines.training.trainer import Trainer
from benchmarks import command_line
from benchmarks.errors import UsageError
from benchmarks.provenance import provenance
from benchmarks.task.real_images import RealImages
from benchmarks.task.task import halves, load_task

CURVE_STEPS = 150


def settings(pairs: list[str]) -> dict[str, dict[str, Any]]:
    """``agm.ratio=0.5`` and the like, by what they belong to."""
    found: dict[str, dict[str, Any]] = {"recipe": {}, "method": {}, "agm": {}}
    for pair in pairs:
        name, _, value = pair.partition("=")
        owner, _, key = name.partition(".")
        if owner not in found or not key or not value:
            raise UsageError(f"--set takes recipe.X=V, method.X=V or agm.X=V, got {pair!r}")
        try:
            found[owner][key] = json.loads(value)
        except json.JSONDecodeError:
            found[owner][key] = value
    return found


def main(argv: list[str]) -> int:
    """Exit status 0, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other options are compare.py's; one method and one width are taken.",
    )  # fmt: skip
    parser.add_argument("name")
    parser.add_argument("--agm", action="store_true", help="with the add-on")
    parser.add_argument("--ceiling", action="store_true", help="real images for the student")
    parser.add_argument("--set", nargs="*", default=[], dest="pairs", metavar="OWNER.KEY=VALUE")
    parser.add_argument(
        "--records",
        type=command_line.path,
        default=Path("benchmarks/evidence/results/tuning.jsonl"),
    )
    own, rest = parser.parse_known_args(argv)
    try:
        args = command_line.parse_setting(rest)
        if len(args.methods) > 1:
            raise UsageError(f"one method is taken at a time, got {', '.join(args.methods)}")
        task, changes = load_task(args), settings(own.pairs)
        if task.images is None:
            raise UsageError("--data is missing, the images to judge on")
        if not len(halves(task.images.labels)["tuning"]):
            raise UsageError("--data has one image of each class, so no half to tune on")
        judged = "accuracy_proof" if own.ceiling else "accuracy_tuning"
        (weight_bits, act_bits), (method,) = args.widths[0], args.methods
        losses, recipe = getattr(METHODS[method], args.recipe)(task.inputs.image_size)
        lengths = {"steps": args.steps, "batch_size": args.batch_size}
        given = {name: value for name, value in lengths.items() if value is not None}
        recipe = replace(recipe, **given | changes["recipe"])
        losses = replace(losses, **changes["method"])
        config = recipe.config(weight_bits, act_bits)
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            hooks: list[Hook] = [AGM(seed=seed, **changes["agm"])] if own.agm else []
            if own.ceiling:
                hooks = [RealImages(task, seed=seed)]
            trainer = Trainer(
                task.teacher,
                method=losses,
                recipe=recipe,
                config=config,
                image_shape=(len(task.inputs.mean), *(task.inputs.image_size,) * 2),
                hooks=hooks,
                seed=seed,
                device=args.device,
                precision=args.precision,
            )
            curve = []
            for step in trange(recipe.steps, desc=f"{own.name} seed {seed}", mininterval=2):
                trainer.step()
                since, left = step + 1 - recipe.warmup_steps, recipe.steps - step - 1
                if since >= 0 and (left == 0 or since % CURVE_STEPS == 0):
                    curve.append([step + 1, task.figures(trainer.student)[judged]])
                    trainer.student.eval()
            row = {
                "name": own.name, "seed": seed, "curve": curve, "command": argv,
                "precision": args.precision,
                "accuracy_proof" if own.ceiling else "accuracy_tune": curve[-1][1],
                **provenance(args.device),
            }  # fmt: skip
            own.records.parent.mkdir(parents=True, exist_ok=True)
            with own.records.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    except (AgmError, TypeError) as error:
        print(f"tune.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
