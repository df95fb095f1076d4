"""Quantize a trained network without data, with and without the add-on, and compare.

    python benchmarks/compare.py --baseline gdfq --with-agm

Without --model it runs on scikit-learn's handwritten digits and needs nothing but the install.

--pretrained loads a library's own weights, which torchvision and timm download; offline, pass a
downloaded file by --weights (torchvision's keep their file name). Resize, crop,
interpolation, mean, deviation and classes are then those that the library evaluates them with,
timm's at the size of training; --image-size, --resize, --mean and --std override them. The weights
of README's ResNet-20 are akamaster's (github.com/akamaster/pytorch_resnet_cifar10,
resnet20-12fca82f.th, BSD-2), whose images have ImageNet's mean and deviation, the default.

--data is an ImageFolder. Decoded images of up to 512 MiB stay in memory; more are read anew in
every pass: 50,000 JPEGs of 256 pixels took 0.9 GiB, and 0.4 in a process that decodes. They judge
the network straight after quantization, at the end, and up to 20 times between, as long as half as
many images are judged as are trained on; or every --eval-every steps. Above 20 classes top-5 is
reported too.

Under torchrun, with an --out that all see, the ranks share the runs out among them:

    torchrun --nnodes 2 --nproc-per-node 4 ... benchmarks/compare.py --out FOLDER ...

or, with --parallel batch, they share each batch of one run after the other.
"""

import argparse
import contextlib
import io
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import benchmarks  # noqa: F401 - first, since it says what is missing

# isort: split
import numpy as np
import torch
from joblib import cpu_count
from torch import Tensor
from tqdm import tqdm

from agm import AGM, AgmError, Hook
from baselines import Interrupted, Result, quantize
from baselines.quantization import checkpoint
from baselines.quantization.checkpoint import fingerprint
from baselines.quantization.export import lacking
from baselines.run import make_trainer
from baselines.training.parallel import ALONE, Ranks, connected
from baselines.training.recipe import Recipe
from benchmarks import progress, report
from benchmarks.command_line import constants, grid, parse, training
from benchmarks.errors import UsageError
from benchmarks.grid import claimed, number_of_jobs, one_thread, shared, side_by_side
from benchmarks.process import Stop, locked
from benchmarks.provenance import provenance
from benchmarks.report import Cell
from benchmarks.task.real_images import RealImages
from benchmarks.task.task import Task, load_task

# Of a finished cell; None in one that failed.
RESULTS = (
    "accuracy_ptq", "accuracy_ptq_top5", "accuracy_last", "accuracy_last_top5", "accuracy_tuning",
    "accuracy_proof", "seconds", "steps_per_s", "checkpoint",
    "onnx", "onnx_bytes", "onnx_times_smaller", "onnx_layers", "onnx_integer_layers",
)  # fmt: skip
PROGRAM = "compare.py"
# In the output folder: who works on which cell, and which ones failed under torchrun.
CLAIMS = ".claims"


class Comparison:
    """A grid of runs on one task, in one folder that it has to itself; made, it is checked.

    Args:
        ranks: that share its cells, or with --parallel batch each run's batches.
    """

    def __init__(
        self, args: argparse.Namespace, task: Task, out: Path, *, ranks: Ranks = ALONE
    ) -> None:
        self.args, self.task, self.out, self.ranks = args, task, out, ranks
        # Who trains one run together: all ranks, or this process alone.
        self.partners = ranks if args.parallel else ALONE
        self.full_precision = _accuracies("fp", {})
        self.cells = grid(args)
        self.jobs = 1
        if ranks.size == 1:
            self.jobs = number_of_jobs(args.jobs, len(self.cells), args.device)
        self.recipes: dict[str, Recipe] = {}
        self.precision = self.args.precision
        self.network_hash = ""
        self.made_by = provenance(args.device)  # at the start: the commit may change meanwhile
        self.stop: Callable[[], bool]
        self.policies = self._check()

    def run(self) -> int:
        """All cells that are not finished, then the report; returns the exit status."""
        rows = self.ranks.first(self._claim_folder)
        if self.task.images is not None:
            # The pass that decodes them all, and names a damaged one.
            self.full_precision = _accuracies("fp", self.task.figures(self.task.teacher))
        self.ranks.first(partial(report.write_json, self.out / "settings.json", self._settings()))
        self.check_settings()
        todo = [cell for cell in self.cells if cell["name"] not in rows]
        if self.ranks.rank == 0:
            self._announce(len(rows))
        self.stop = stop = Stop()
        shown = progress.OfGrid(len(self.cells), len(rows), quiet=self.ranks.rank > 0)
        with stop.listening(), contextlib.closing(shown):
            for cell, end in self._ends(todo, shown):
                try:
                    row = end()
                except Interrupted as stopped:
                    progress.tell(f"{cell['name']}: {stopped}")
                    continue
                except BrokenExecutor as error:
                    row = self._failed(cell, error)
                rows[cell["name"]] = row
                shown.ended(cell["name"], _outcome(row))
        finished = [rows[cell["name"]] for cell in self.cells if cell["name"] in rows]
        interrupted = len(finished) < len(self.cells)
        if self.ranks.rank == 0:
            if finished:
                self._report(finished)
            if interrupted:
                where = shlex.join(["--out", str(self.out)])
                print(f"go on with: {self._command()} {where} --resume", file=sys.stderr)
            else:
                print(f"Reproduce: {self._command()}", flush=True)
        if interrupted:
            return 128 + (stop.received or signal.SIGINT)
        # By another rank's failure torchrun would end rank 0 in its report.
        return 1 if self.ranks.rank == 0 and any(row["error"] for row in finished) else 0

    def _announce(self, done: int) -> None:
        """What is to be run, and what is quantized how."""
        fp = report.percent(self.full_precision, "accuracy_fp")
        judged = 0 if self.task.images is None else len(self.task.images)
        threads = torch.get_num_threads()
        print(f"Teacher {self.args.model}: full precision {fp} on {judged} evaluation images")
        print(
            f"{len(self.cells)} runs, {done} of them done before, into {self.out}; "
            f"{self.precision} on {self.args.device}, {self.jobs} at a time on {threads} CPU "
            f"thread{'s' * (threads > 1)} each",
            flush=True,
        )
        if self.args.device == "cpu" and self.jobs * threads > cpu_count():
            progress.tell(
                f"{self.jobs * threads} threads are more than the cores here ({cpu_count()}) and "
                "may take many times as long: leave --jobs and OMP_NUM_THREADS out"
            )
        if why := lacking():
            print(f"No ONNX files will be written: {why}", flush=True)
        for (weight_bits, act_bits), policy in self.policies.items():
            print(f"\nBit policy W{weight_bits}A{act_bits}\n{policy}\n", flush=True)

    def _ends(
        self, todo: list[Cell], shown: progress.OfGrid
    ) -> Iterator[tuple[Cell, Callable[[], Cell]]]:
        """Cells with the calls that give their rows, in whatever way this grid is worked on."""
        if self.jobs > 1:
            make = partial(in_job, self.args.argv, self.out, self.full_precision)
            yield from side_by_side(todo, self.jobs, make, self.stop, shown.running)
        elif self.ranks.size > 1 and not self.args.parallel:
            for cell in shared(todo, self.out / CLAIMS, self.stop):
                yield cell, partial(self._take_over, cell)
        else:
            for cell in todo:
                if self.partners.any(self.stop(), self.args.device):
                    return
                yield cell, partial(self.run_cell, cell)

    def _check(self) -> dict[tuple[int, int], str]:
        """Build every kind of run once, so that a mistake shows before any training.

        Returns:
            The bit policies.
        """
        for arm in self.args.arms:
            self._hook({"hooks": arm, "seed": 0})
        policies = {}
        for method in self.args.methods:
            for weight_bits, act_bits in self.args.widths:
                trainer = make_trainer(
                    self.task.teacher,
                    method=method,
                    weight_bits=weight_bits,
                    act_bits=act_bits,
                    image_size=self.task.inputs.image_size,
                    ranks=self.partners,
                    **training(self.args),
                )
                policies[weight_bits, act_bits] = str(trainer.policy)
                self.recipes[method] = trainer.recipe
                self.precision = trainer.precision
                self.network_hash = fingerprint(trainer.teacher)
        return policies

    def _claim_folder(self) -> dict[str, Cell]:
        """Refuse the results of other settings, and to repeat a run unasked.

        Returns:
            The rows of the cells that are finished, by name.
        """
        known = self.out / "settings.json"
        if known.exists() and not self.args.resume:
            raise UsageError(
                f"{self.out} holds a run; add --resume to go on, or choose another --out"
            )
        rows = [self.out / f"{cell['name']}.json" for cell in self.cells]
        if not known.exists() and (there := next((row for row in rows if row.exists()), None)):
            raise UsageError(
                f"{self.out} holds results ({there.name}) without the settings.json that says what "
                "they were made with; choose another --out"
            )
        now = self._settings()
        before = _read_json(known) if known.exists() else now
        if before != now:
            raise UsageError(
                f"{self.out} was made with other settings ({_differing(before, now)}); repeat its "
                "command, or choose another --out"
            )
        for name in [*(cell["name"] for cell in self.cells), "report", "settings"]:
            for stale in self.out.glob(f"{name}.*.tmp"):
                stale.unlink()
        for failure in self.out.glob(f"{CLAIMS}/*.json"):
            failure.unlink()
        return {cell["name"]: row for cell in self.cells if (row := self._finished(cell))}

    def _settings(self) -> dict[str, Any]:
        """What a finished run depends on."""
        return (
            {
                "model": self.args.model,
                "teacher_hash": fingerprint(self.task.teacher),
                "network_hash": self.network_hash,  # of its code, too
                "data_hash": None if self.task.images is None else self.task.images.hash,
                "image_size": self.task.inputs.image_size,
                "inputs": str(self.task.inputs),
                "eval_every": self.args.eval_every,
                "constants": constants(self.args.recipe, self.task.inputs.image_size),
                **({"ranks": self.partners.size} if self.args.parallel else {}),
            }
            | training(self.args)
            | {"precision": self.precision}
        )

    def check_settings(self) -> None:
        """Refuse to share the runs of a process that has another network, or other images."""
        first, own = _read_json(self.out / "settings.json"), self._settings()
        if first != own:
            raise UsageError(
                f"this process has other settings than the first ({_differing(first, own)}): the "
                "model's weights or the images changed meanwhile, or are others on this machine, "
                "or made anew by each process; give files that stay, and start anew"
            )

    def _finished(self, cell: Cell) -> Cell | None:
        """The row of a cell that an earlier run completed; None if anything of it is damaged."""
        stem = self.out / cell["name"]
        try:
            row = json.loads(stem.with_suffix(".json").read_text())
            np.load(stem.with_suffix(".npy"))
            checkpoint.load(stem.with_suffix(".ckpt"))
            if row["onnx"] and (self.out / row["onnx"]).stat().st_size != row["onnx_bytes"]:
                return None
        except Exception:  # whatever rubbish may cause
            return None
        return row

    def run_cell(self, cell: Cell) -> Cell:
        """A cell that no other process works on, as a row of report.json."""
        first = self.partners.rank == 0
        with claimed(self.out / CLAIMS, cell) if first else contextlib.nullcontext():
            return self._run_cell(cell)

    def _take_over(self, cell: Cell) -> Cell:
        """The row of a cell that is claimed: another rank's, or this one's."""
        failure = self.out / CLAIMS / f"{cell['name']}.json"
        if failure.exists():
            return _read_json(failure)
        row = self._finished(cell) or self._run_cell(cell)
        if row["error"]:
            report.write_json(failure, row)
        return row

    def _run_cell(self, cell: Cell) -> Cell:
        """A cell under its progress bar; a failure is a row as well."""
        failures = [AgmError]
        if self.partners.size == 1:  # else the others would wait for this rank: let all end
            failures += [torch.OutOfMemoryError, MemoryError]
        with progress.of_run(self.recipes[cell["method"]].steps, cell["name"]) as bar:
            try:
                result = self._quantize(cell, bar)
            except tuple(failures) as error:
                if self.args.debug:
                    raise
                return self._failed(cell, error)
        return self.partners.first(partial(self._save, cell, result))

    def _failed(self, cell: Cell, error: BaseException) -> Cell:
        """The row of a cell that has no results."""
        why = (str(error) or "out of memory").splitlines()[0]
        if isinstance(error, BrokenExecutor):
            why = "the process that ran it was killed, or ran out of memory; --resume tries again"
        known = {"history": [], "error": f"{type(error).__name__}: {why}"}
        return cell | dict.fromkeys(RESULTS) | known | self.full_precision

    def _quantize(self, cell: Cell, bar: tqdm) -> Result:
        recipe, hook = self.recipes[cell["method"]], self._hook(cell)
        judge = hook if isinstance(hook, RealImages) else self.task
        every = self.args.eval_every or self.task.eval_every(recipe.steps, recipe.batch_size)

        def on_step(step: int, _terms: dict[str, Tensor]) -> None:
            if not bar.n:
                bar.initial = bar.n = step  # a resumed run's first ones cost nothing
            bar.update(step + 1 - bar.n)

        return quantize(
            self.task.teacher,
            method=cell["method"],
            weight_bits=cell["weight_bits"],
            act_bits=cell["act_bits"],
            hooks=[] if hook is None else [hook],
            image_size=self.task.inputs.image_size,
            seed=cell["seed"],
            **training(self.args),
            ranks=self.partners,
            evaluate=judge.figures if self.task.images is not None else None,
            eval_every=every,
            checkpoint_path=self.out / f"{cell['name']}.run",
            checkpoint_every=self.args.checkpoint_every,
            resume=self.args.resume or self.ranks.size > 1,  # what a dead rank left, too
            stop=self.stop,
            on_step=on_step,
        )

    def _hook(self, cell: Cell) -> Hook | None:
        """Of a cell's arm."""
        if cell["hooks"] == "none":
            return None
        if cell["hooks"] == "real":
            return RealImages(self.task, seed=cell["seed"])
        return AGM(**report.parts(cell["hooks"]), seed=cell["seed"])

    def _save(self, cell: Cell, result: Result) -> Cell:
        """The quantized network, its images, and last the row, which says that all is there."""
        stem = self.out / cell["name"]
        result.save(stem.with_suffix(".ckpt"))
        pixels = io.BytesIO()
        np.save(pixels, self.task.pixels(result.images))
        checkpoint.write(stem.with_suffix(".npy"), pixels.getbuffer())
        exported = self._export(stem.with_suffix(".onnx"), result)
        judged = [record for record in result.history if "accuracy" in record] or [{}]
        row = cell | {
            **self.full_precision,
            **_accuracies("ptq", judged[0]),
            **_accuracies("last", judged[-1]),
            **{name: judged[-1].get(name) for name in ("accuracy_tuning", "accuracy_proof")},
            "seconds": result.seconds,
            "steps_per_s": result.steps_per_s,
            "checkpoint": f"{cell['name']}.ckpt",
            **exported,
            "error": None,
            "precision": result.precision,
            "recipe": asdict(result.recipe),
            "policy": str(result.policy),
            "history": result.history,
            **self.made_by,
        }
        report.write_json(stem.with_suffix(".json"), row)
        for leftover in self.out.glob(f"{cell['name']}.run*"):
            leftover.unlink()
        return row

    def _export(self, path: Path, result: Result) -> dict[str, Any]:
        """Its file of integers, and the figures of that; without them the run is as good."""
        nothing = {name: None for name in RESULTS if name.startswith("onnx")}
        if lacking():  # which was said once
            return nothing
        try:
            made = result.export_onnx(path)
        except AgmError as error:
            return nothing | {"onnx_error": str(error).splitlines()[0]}
        return {
            "onnx": path.name,
            "onnx_bytes": made.bytes,
            "onnx_times_smaller": made.float_bytes / made.bytes,
            "onnx_layers": len(made.rows),
            "onnx_integer_layers": made.integer_layers,
        }

    def _report(self, rows: list[Cell]) -> None:
        """Table, picture, report.json."""
        text = report.table(rows)
        content = {
            "command": self._command(),
            "settings": self._settings(),
            "evaluation_images": 0 if self.task.images is None else len(self.task.images),
            "table": text,
            "cells": rows,
            **self.made_by,  # this command; each cell names what trained it
        }
        report.write_json(self.out / "report.json", content)
        done = [row["name"] for row in rows if row["error"] is None]
        images = {name: np.load(self.out / f"{name}.npy") / 255 for name in done}
        title = f"{self.args.model}, {self.args.recipe} recipe"
        print(f"\n{text}\n\n{report.LEGEND}\n")
        report.picture(rows, images, self.out / "report.png", title=title)
        for why in dict.fromkeys(row["onnx_error"] for row in rows if row.get("onnx_error")):
            print(f"No ONNX file: {why}")
        print(f"Wrote {self.out / 'report.json'} and {self.out / 'report.png'}")

    def _command(self) -> str:
        """What reproduces this run, in a folder of its own."""
        given = [a for a in self.args.argv if a != "--resume" and not a.startswith("--out=")]
        while "--out" in given:
            place = given.index("--out")
            del given[place : place + 2]
        start = ["torchrun", f"--nproc-per-node={self.ranks.size}"] if self.args.parallel else []
        called = sys.argv[0] if Path(sys.argv[0]).name == PROGRAM else f"benchmarks/{PROGRAM}"
        return shlex.join([*(start or ["python"]), called, *given])


def in_job(
    argv: list[str],
    out: Path,
    full_precision: dict[str, float | None],
    job: int,
    stop: Callable[[], bool],
) -> Callable[[Cell], Cell]:
    """The comparison in a process of its own, as a cell's run."""
    args = parse(argv)
    if args.device == "cuda":
        torch.cuda.set_device(job % torch.cuda.device_count())
    comparison = Comparison(args, load_task(args), out)
    comparison.check_settings()
    comparison.full_precision = full_precision
    comparison.stop = stop
    return comparison.run_cell


def _differing(there: dict[str, Any], now: dict[str, Any]) -> str:
    return "; ".join(
        k if k == "constants" else f"{k} {there.get(k)!r} there, {now.get(k)!r} now"
        for k in there | now
        if there.get(k) != now.get(k)
    )


def _outcome(row: Cell) -> str:
    """Of a cell that has ended."""
    if row["error"]:
        return f"FAILED, {row['error']}"
    return f"{report.percent(row, 'accuracy_last')} after {row['seconds']:.0f} s"


def _accuracies(of: str, figures: dict[str, float]) -> dict[str, float | None]:
    """As a row of report.json has them; None where they were not measured."""
    found = {"": figures.get("accuracy"), "_top5": figures.get("accuracy_top5")}
    return {f"accuracy_{of}{which}": value for which, value in found.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({error}); choose another --out") from error


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 if a cell failed, 2 for a user's mistake, 130 or 143 if stopped."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        with connected() as ranks:
            return _compare(parse(argv), ranks)
    except AgmError as error:
        if "--debug" in argv:
            raise
        print("compare.py: error: " + " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the interpreter to flush at its end
        print(
            "compare.py: stopped, as nobody reads its output any more; go on with --resume and its "
            "--out",
            file=sys.stderr,
        )
        return 128 + signal.SIGPIPE
    except OSError as error:  # of files that are none of a run's: claims, temporary ones
        if "--debug" in argv:
            raise
        print(
            f"compare.py: error: {error}; free some space, or see who may write there, and repeat "
            "the command with --resume and its --out",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:  # before the training, where nothing is to be saved
        return 128 + signal.SIGINT


def _compare(args: argparse.Namespace, ranks: Ranks) -> int:
    one_thread()
    if ranks.size > 1:
        if args.out is None:
            raise UsageError("under torchrun --out is needed, one folder that all ranks see")
        if args.jobs is not None:
            raise UsageError("under torchrun give --nproc-per-node in place of --jobs")
        # torchrun --max-restarts starts all ranks again.
        args.resume |= os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    elif args.parallel:
        raise UsageError("--parallel needs torchrun --nproc-per-node N in place of python")
    task = load_task(args)
    name = args.model.replace(":", "-").replace("/", "-")
    out = args.out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if "--resume" in args.argv and not out.is_dir():  # a restart of torchrun's may come as early
        raise UsageError(f"there is no {out} to go on in; leave --resume out")
    comparison = Comparison(args, task, out, ranks=ranks)
    with locked(out) if ranks.rank == 0 else contextlib.nullcontext():
        return comparison.run()


if __name__ == "__main__":
    # Not this copy of it, whose functions a job's process would not find.
    from benchmarks.compare import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = main()
    if torch.distributed.is_torchelastic_launched():
        # gloo's threads may outlive their group, and an interpreter torn down under them aborts.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
