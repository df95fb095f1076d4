"""Quantize a trained network without data, with and without the add-on, and compare.

    python benchmarks/compare.py --baseline gdfq --with-agm

Without --model it runs on scikit-learn's handwritten digits and needs nothing but the install.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agm import AGM, AgmError
from baselines import METHODS, RECIPES, BaselineError, Interrupted, Result, quantize
from baselines.errors import ConfigError
from benchmarks import datasets, report, teachers
from benchmarks.errors import UsageError

# The digits' images have 16 times fewer pixels than CIFAR's and need fewer steps.
DIGITS_STEPS = 600


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, with every default that needs no model filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    add = parser.add_argument_group("what to quantize").add_argument
    add("--model", default="digits",
        help="digits (default), resnet20, torchvision:NAME or package.module:factory")
    add("--weights", type=Path, help="trained weights: a state_dict, bare or in a checkpoint")
    add("--data", type=Path, help="ImageFolder to evaluate on; without it accuracies are n/a")
    add("--image-size", type=int, help="pixels a side (default: digits 8, torchvision 224, or 32)")
    add("--num-classes", type=int, help="default: the folders of --data, or 10 (torchvision 1000)")
    add("--mean", type=float, nargs="+", help="of the model's input (default: ImageNet's)")
    add("--std", type=float, nargs="+", help="likewise")
    add = parser.add_argument_group("how").add_argument
    add("--baseline", nargs="+", default=["gdfq"], choices=[*METHODS, "all"], metavar="METHOD",
        help=f"{', '.join(METHODS)} or all (default: gdfq)")
    add("--with-agm", nargs="*", choices=report.ARMS[1:], metavar="PART",
        help="compare with the add-on: loss, interpolation, both (default), or several of them")
    add("--bits", type=int, nargs="+", help="default: 3; for other models than digits 3 and 4")
    add("--weight-bits", type=int, help="in place of --bits")
    add("--act-bits", type=int, help="in place of --bits")
    add("--seeds", type=int, default=3, help="how many runs of each (default: 3)")
    add("--first-seed", type=int, default=0, help="default: 0")
    add("--recipe", choices=RECIPES, default="quick", help="default: quick")
    add("--steps", type=int, help="in place of the recipe's")
    add("--batch-size", type=int, help="in place of the recipe's")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="default: auto")
    add = parser.add_argument_group("where").add_argument
    add("--out", type=Path, help="output folder (default: runs/MODEL-TIME)")
    add("--resume", action="store_true",
        help="go on in --out: keep what is finished, continue what was broken off")
    add("--checkpoint-every", type=int, default=200, metavar="STEPS", help="default: 200")
    add("--debug", action="store_true", help="show tracebacks")
    # fmt: on
    args = parser.parse_args(argv)
    args.methods = list(METHODS) if "all" in args.baseline else list(dict.fromkeys(args.baseline))
    args.arms = ["none"]
    if args.with_agm is not None:
        args.arms += args.with_agm or ["both"]
    if args.seeds < 1 or args.checkpoint_every < 1:
        raise UsageError("--seeds and --checkpoint-every must be at least 1")
    if args.resume and args.out is None:
        raise UsageError("--resume needs --out, the folder to go on in")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    bits = args.bits or ([3] if args.model == "digits" else [3, 4])
    if args.weight_bits or args.act_bits:
        if args.bits:
            raise UsageError("give --bits, or --weight-bits and --act-bits, not both")
        bits = [None]
    args.widths = [(args.weight_bits or b or 3, args.act_bits or b or 3) for b in bits]
    if args.model == "digits" and args.steps is None and args.recipe == "quick":
        args.steps = DIGITS_STEPS
    return args


@dataclass
class Task:
    """A teacher, and the images that judge it (None without --data)."""

    teacher: nn.Module
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: Tensor | None
    labels: Tensor | None
    device: str

    def accuracy(self, model: nn.Module) -> float:
        """In %, always computed in float32."""
        assert self.images is not None
        assert self.labels is not None
        return teachers.accuracy(model, self.images, self.labels, device=self.device)


def load_task(args: argparse.Namespace) -> Task:
    """Build and check everything that can be wrong before the first step."""
    try:
        torch.zeros((), device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {args.device!r} cannot be used: {error}") from error
    on_digits = args.model == "digits" and args.data is None
    zoo = args.model.startswith("torchvision:")
    size = args.image_size or (8 if on_digits else 224 if zoo else 32)
    num_classes = args.num_classes
    if num_classes is None:
        num_classes = 1000 if zoo else 10
        if args.data is not None:
            num_classes = len(datasets.class_names(args.data))
    teacher = teachers.build(args.model, num_classes=num_classes, weights=args.weights)
    channels = next(m.in_channels for m in teacher.modules() if isinstance(m, nn.Conv2d))
    mean, std = args.mean, args.std
    if mean is None:
        mean = datasets.DIGITS_MEAN if channels == 1 else datasets.IMAGENET_MEAN
    if std is None:
        std = datasets.DIGITS_STD if channels == 1 else datasets.IMAGENET_STD
    if len(mean) != channels or len(std) != channels:
        raise UsageError(
            f"--mean and --std need {channels} numbers, one a channel of the model's first "
            f"convolution; got {len(mean)} and {len(std)}"
        )
    try:
        with torch.no_grad():
            logits = teacher(torch.zeros(2, channels, size, size))
    except RuntimeError as error:
        raise UsageError(
            f"the model does not take {channels}x{size}x{size} images ({error}); set --image-size"
        ) from error
    if logits.ndim != 2 or logits.shape[1] != num_classes:
        raise UsageError(
            f"the model returns {tuple(logits.shape)} for 2 images, expected (2, {num_classes}); "
            "set --num-classes, or --data with that many class folders"
        )
    images = labels = None
    if on_digits:
        _, _, images, labels = datasets.digits()
    elif args.data is not None:
        images, labels = datasets.image_folder(
            args.data, image_size=size, mean=mean, std=std, num_classes=num_classes
        )
    teacher.to(args.device)
    return Task(teacher, size, tuple(mean), tuple(std), images, labels, args.device)


def run_cell(
    args: argparse.Namespace, task: Task, cell: dict[str, Any], bar: tqdm, stop: "Stop"
) -> tuple[dict[str, Any], Result]:
    """One run, as a row of report.json."""
    hooks = []
    if cell["hooks"] != "none":
        parts = {part: cell["hooks"] in (part, "both") for part in ("loss", "interpolation")}
        hooks = [AGM(**parts, seed=cell["seed"])]
    running = args.out / f"{cell['name']}.run"

    def on_step(step: int, terms: dict[str, Tensor]) -> None:
        bar.update(step + 1 - bar.n)
        if step % 20 == 0:
            bar.set_postfix({k: f"{v.item():.3g}" for k, v in terms.items()}, refresh=False)

    def on_policy(policy: Any) -> None:
        key = (cell["weight_bits"], cell["act_bits"])
        if key not in args.policies:
            args.policies[key] = str(policy)
            bar.write(f"\nBit policy W{key[0]}A{key[1]}\n{policy}\n", file=sys.stdout)

    result = quantize(
        task.teacher,
        method=cell["method"],
        weight_bits=cell["weight_bits"],
        act_bits=cell["act_bits"],
        hooks=hooks,
        image_size=task.image_size,
        recipe=args.recipe,
        steps=args.steps,
        batch_size=args.batch_size,
        seed=cell["seed"],
        device=args.device,
        precision=args.precision,
        evaluate=task.accuracy if task.images is not None else None,
        checkpoint_path=running,
        checkpoint_every=args.checkpoint_every,
        resume=args.resume,
        stop=stop,
        on_step=on_step,
        on_policy=on_policy,
    )
    path = args.out / f"{cell['name']}.ckpt"
    result.save(path)
    row = cell | {
        "accuracy_fp": args.accuracy_fp,
        "accuracy_ptq": result.accuracies[0] if result.accuracies else None,
        "accuracy_last": result.accuracies[-1] if result.accuracies else None,
        "seconds": result.seconds,
        "steps_per_s": result.steps_per_s,
        "checkpoint": path.name,
        "error": None,
        "precision": result.precision,
        "recipe": asdict(result.recipe),
        "history": result.history,
    }
    _save_images(args.out / f"{cell['name']}.npy", result.images, task)
    report.write_json(args.out / f"{cell['name']}.json", row)
    for leftover in (running, running.with_name(running.name + ".previous")):
        leftover.unlink(missing_ok=True)
    return row, result


def _save_images(path: Path, images: Tensor, task: Task) -> None:
    """Denormalised, uint8 (n, h, w, c)."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (task.mean, task.std))
    pixels = (images.cpu() * std + mean).clamp(0, 1).mul(255).round().byte()
    np.save(path, pixels.permute(0, 2, 3, 1).numpy())


class Stop:
    """SIGINT and SIGTERM: the first lets the step end, the second ends the program at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __call__(self) -> bool:
        return self.received is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _frame: Any) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Refuse a second run in one folder; the lock of a dead process is gone with it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise UsageError(
            f"cannot write to {folder}: {error.strerror}; choose another --out"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another run is working in {folder}; wait for it or choose another --out"
            ) from error
        yield


def grid(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The cells in the order in which they run: all arms of a seed, then the next seed."""
    return [
        {
            "name": f"{method}-w{weight_bits}a{act_bits}-{arm}-seed{seed}",
            "method": method,
            "hooks": arm,
            "weight_bits": weight_bits,
            "act_bits": act_bits,
            "seed": seed,
        }
        for weight_bits, act_bits in args.widths
        for method in args.methods
        for seed in range(args.first_seed, args.first_seed + args.seeds)
        for arm in args.arms
    ]


def settings(args: argparse.Namespace, task: Task) -> dict[str, Any]:
    """What a finished run depends on; a folder is gone on with only under the same."""
    return {
        "model": args.model,
        "teacher_hash": teachers.teacher_hash(task.teacher),
        "data_hash": None if task.images is None else _hash(task.images),
        "recipe": args.recipe,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "device": args.device,
        "precision": args.precision,
    }


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def finished(folder: Path, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of cells that a run before this one completed."""
    rows = []
    for cell in cells:
        path = folder / f"{cell['name']}.json"
        if path.exists() and (folder / f"{cell['name']}.ckpt").exists():
            rows.append(json.loads(path.read_text()))
    return rows


def compare(args: argparse.Namespace) -> int:
    """The whole job; returns the exit status."""
    task = load_task(args)
    args.accuracy_fp = None if task.images is None else task.accuracy(task.teacher)
    cells = grid(args)
    name = args.model.replace(":", "-").replace("/", "-")
    args.out = args.out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    args.policies = {}
    with locked(args.out):
        same = settings(args, task)
        known = args.out / "settings.json"
        if known.exists() and not args.resume:
            raise UsageError(
                f"{args.out} holds a run; add --resume to go on, or choose another --out"
            )
        if known.exists() and json.loads(known.read_text()) != same:
            raise UsageError(
                f"{args.out} was made with other settings ({known}); repeat its command, or choose "
                "another --out"
            )
        report.write_json(known, same)
        rows = finished(args.out, cells)
        shown = "n/a" if args.accuracy_fp is None else f"{args.accuracy_fp:.2f} %"
        judged = "none" if task.images is None else f"{len(task.images)}"
        print(f"Teacher {args.model}: full precision {shown} on {judged} evaluation images")
        print(f"{len(cells)} runs ({len(rows)} of them done before) into {args.out}", flush=True)
        interrupted, stop = False, Stop()
        with stop.listening():
            done = {row["name"] for row in rows}
            todo = [cell for cell in cells if cell["name"] not in done]
            for i, cell in enumerate(todo):
                try:
                    rows.append(_timed_cell(args, task, cell, f"{i + 1}/{len(todo)}", stop))
                except Interrupted as stopped:
                    print(f"{cell['name']}: {stopped}", file=sys.stderr)
                    interrupted = True
                    break
        rows.sort(key=lambda row: [c["name"] for c in cells].index(row["name"]))
        if rows:
            write_report(args, task, rows, same)
    if interrupted:
        print(f"go on with: {command(args)} --resume", file=sys.stderr)
        return 128 + (stop.received or signal.SIGINT)
    return 1 if any(row["error"] for row in rows) else 0


def _timed_cell(
    args: argparse.Namespace, task: Task, cell: dict[str, Any], count: str, stop: Stop
) -> dict[str, Any]:
    """A cell under its progress bar; a failure becomes a row."""
    method_recipe = getattr(METHODS[cell["method"]], args.recipe)(task.image_size)[1]
    total = args.steps or method_recipe.steps
    with tqdm(total=total, desc=f"[{count}] {cell['name']}", unit="step", mininterval=0.5) as bar:
        try:
            return run_cell(args, task, cell, bar, stop)[0]
        except ConfigError:
            raise  # the command line's fault, and every cell's
        except (BaselineError, torch.OutOfMemoryError, MemoryError) as error:
            if args.debug:
                raise
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            empty = dict.fromkeys(("accuracy_ptq", "accuracy_last", "seconds", "steps_per_s"))
            row = {"accuracy_fp": args.accuracy_fp, "checkpoint": None, "history": []}
            return cell | empty | row | {"error": f"{type(error).__name__}: {first_line}"}


def command(args: argparse.Namespace) -> str:
    """What reproduces this run."""
    given = [a for a in args.argv if a != "--resume"]
    if "--out" not in given:
        given += ["--out", str(args.out)]
    return shlex.join(["python", "benchmarks/compare.py", *given])


def write_report(
    args: argparse.Namespace, task: Task, rows: list[dict[str, Any]], same: dict[str, Any]
) -> None:
    """Table, picture, report.json."""
    text = report.table(rows)
    content = {
        "command": command(args),
        "settings": same,
        "accuracy_fp": args.accuracy_fp,
        "evaluation_images": 0 if task.images is None else len(task.images),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
            "commit": _commit(),
        },
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if args.device.startswith("cuda") else None,
        },
        "policy": {f"W{w}A{a}": p for (w, a), p in args.policies.items()},
        "table": text,
        "cells": rows,
    }
    report.write_json(args.out / "report.json", content)
    images = {
        row["name"]: np.load(args.out / f"{row['name']}.npy") / 255
        for row in rows
        if row["error"] is None
    }
    report.picture(
        rows, images, args.out / "report.png", title=f"{args.model}, {args.recipe} recipe"
    )
    print(f"\n{text}\n\nWrote {args.out / 'report.json'} and {args.out / 'report.png'}")
    print(f"Reproduce: {command(args)}", flush=True)


def _commit() -> str | None:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return run.stdout.strip() or None


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 if a cell failed, 2 for a user's mistake, 130 or 143 if stopped."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parse(argv)
        args.argv = argv
        return compare(args)
    except AgmError as error:
        if "--debug" in argv:
            raise
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
