"""Where a step's time goes, and what the add-on costs.

    python benchmarks/speed.py --baseline gdfq --batch-size 200
    python benchmarks/speed.py --deployed --bits 4     # the exported file against float32

All variants are measured in one run, two steps of each in turn, so that only ratios count; printed
is the median over the rounds and, after +-, half the distance between the quartiles. "plain" is
this project's own float32 path: eager, contiguous, formulas as they read, no forward shared.
"""

import argparse
import contextlib
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import benchmarks  # noqa: F401 - first, since it says what is missing

# isort: split
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from agm import AGM, AgmError, frozen_parameters
from baselines import METHODS, RECIPES
from baselines.quantization import checkpoint
from baselines.quantization.copying import image_channels
from baselines.quantization.export import export_onnx, float_onnx
from baselines.quantization.policy import QuantizationConfig
from baselines.quantization.quantizers import observing
from baselines.quantization.student import build_student
from baselines.quantization.tracing import traced
from baselines.training.bn_stats import batch_norm_statistics
from baselines.training.checks import resolve_device
from baselines.training.parallel import bytes_per_step
from baselines.training.trainer import Trainer
from benchmarks import command_line, report
from benchmarks.errors import UsageError
from benchmarks.plain import plain_formulas
from benchmarks.provenance import provenance
from benchmarks.task import teachers

ARMS = ("none", *report.PARTS)
# Steps in a measured round: the add-on's two parts take turns.
TURNS = 2


def make_teacher(args: argparse.Namespace) -> tuple[nn.Module, int]:
    """The network, the same random one each time without weights, and its images' channels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = teachers.build(args.model, num_classes=args.num_classes, weights=args.weights)
    return teacher, image_channels(teacher, args.image_size) or 3


def make(args: argparse.Namespace, method: str, arm: str, *, plain: bool) -> Trainer:
    """A trainer past its warm-up."""
    losses, recipe = getattr(METHODS[method], args.recipe)(args.image_size)
    recipe = replace(
        recipe,
        batch_size=args.batch_size or recipe.batch_size,
        fold_batch_norm=recipe.fold_batch_norm and not plain,
    )
    config = recipe.config(args.bits, args.bits)
    teacher, channels = make_teacher(args)
    with plain_formulas() if plain else contextlib.nullcontext():
        trainer = Trainer(
            teacher,
            method=losses,
            recipe=recipe,
            config=config,
            image_shape=(channels, args.image_size, args.image_size),
            hooks=[] if arm == "none" else [AGM(**report.parts(arm))],
            device=args.device,
            precision="fp32" if plain else args.precision,
        )
    with observing(trainer.student), torch.no_grad():
        trainer.student(trainer.sample_images(recipe.batch_size))
    trainer.step_count = recipe.warmup_steps
    return trainer


def stepper(trainer: Trainer, *, plain: bool) -> Callable[[], Any]:
    """A round of its steps."""

    def steps() -> None:
        with plain_formulas() if plain else contextlib.nullcontext():
            for _ in range(TURNS):
                trainer.step()

    return steps


def parts(trainer: Trainer) -> dict[str, Callable[[], Any]]:
    """The pieces of a step, each on its own."""
    latents, _ = trainer.generator.sample(trainer.recipe.batch_size, trainer.rng)
    images = trainer._run(trainer.generator, *latents).detach()
    logits = trainer._run(trainer.teacher, images).float().detach().requires_grad_()
    answers = trainer._run(trainer.student, images).float().detach().requires_grad_()
    labels = logits.argmax(1)
    hook, seed = AGM(interpolation=False, alternate=False), images.new_zeros(()).requires_grad_()
    for optimizer in (trainer.generator_optimizer, trainer.student_optimizer):
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # the pieces' gradients mean nothing

    def generator() -> None:
        out = trainer._run(trainer.generator, *latents)
        out.backward(torch.ones_like(out))

    def teacher() -> None:
        x = images.clone().requires_grad_()
        with batch_norm_statistics(trainer.layers) as statistics:
            out = trainer._run(trainer.teacher, x)
        (out.float().sum() + statistics.loss()).backward()

    def student() -> None:
        trainer._run(trainer.student, images).float().sum().backward()

    def student_input_gradient() -> None:
        with frozen_parameters(trainer.student):
            out = trainer._run(trainer.student, images.clone().requires_grad_())
        out.float().sum().backward()

    def teacher_again() -> None:
        with torch.no_grad():
            trainer._run(trainer.teacher, images)

    def cross_entropy() -> None:
        F.cross_entropy(logits, labels).backward()

    def and_loss() -> None:  # a step has one backward for both
        other = F.cross_entropy(logits, labels)
        ours = hook.generator_loss(
            images=seed, teacher_logits=logits + seed, student=lambda given: answers + given
        )
        (other + ours).backward()

    def weight_quantizers() -> None:
        for module in trainer.student.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                _ = module.weight

    def optimizers() -> None:
        trainer.generator_optimizer.step()
        trainer.student_optimizer.step()

    return {
        "generator, both ways": generator,
        "teacher and BNS, to the images": teacher,
        "student, both ways": student,
        "optimizers": optimizers,
        "weight quantizers, forward": weight_quantizers,
        "add-on: student, to the images": student_input_gradient,
        "add-on: teacher again": teacher_again,
        "cross-entropy of given logits": cross_entropy,
        "add-on: the same and the loss": and_loss,
    }


def measure(
    variants: dict[str, Callable[[], Any]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each variant, in turn, after one unmeasured round."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds + 1):
        for name, call in variants.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device: str) -> None:
    """Wait for a device that runs ahead of Python."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def gemm_rate(dtype: torch.dtype, device: str, n: int = 1024) -> float:
    """Operations a second of a square matrix product, the best of ten."""
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / min(min(s) for s in measure({"": lambda: a @ a}, 10, device).values())


def peak_memory(args: argparse.Namespace, method: str, arm: str, plain: bool) -> float:
    """MiB of a process of its own that takes four steps."""
    request = json.dumps({"method": method, "arm": arm, "plain": plain})
    run = subprocess.run(
        [sys.executable, __file__, *args.argv, "--peak", request],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(run.stdout.split()[-1])


def print_peak(args: argparse.Namespace) -> None:
    """The other side of :func:`peak_memory`."""
    request = json.loads(args.peak)
    plain = request["plain"]
    steps = stepper(make(args, request["method"], request["arm"], plain=plain), plain=plain)
    for _ in range(2):
        steps()
    if args.device.startswith("cuda"):
        print(torch.cuda.max_memory_allocated() / 2**20)
    else:
        # Not getrusage, whose maximum is inherited from the parent process.
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) / 2**10)


@contextlib.contextmanager
def counting_flops() -> Iterator[FlopCounterMode]:
    """FlopCounterMode without its module tracker, which torch.autograd.grad breaks."""
    tracker = "torch.utils.module_tracker.ModuleTracker"
    with (
        mock.patch(f"{tracker}.__enter__"),
        mock.patch(f"{tracker}.__exit__"),
        FlopCounterMode(display=False) as counter,
    ):
        yield counter


def spread(values: list[float]) -> float:
    """Half the distance between the quartiles."""
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


def profile(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """All figures of one method, printed on the way."""
    trainers = {arm: make(args, method, arm, plain=False) for arm in ARMS}
    plain = stepper(make(args, method, "none", plain=True), plain=True)
    steps = {"plain": plain} | {arm: stepper(t, plain=False) for arm, t in trainers.items()}
    pieces = parts(make(args, method, "none", plain=False))
    seconds = measure(steps | pieces, args.rounds, args.device)
    for name in steps:
        seconds[name] = [s / TURNS for s in seconds[name]]
    batch = trainers["none"].recipe.batch_size
    precision = trainers["none"].precision
    rate = gemm_rate(torch.bfloat16 if precision == "bf16" else torch.float32, args.device)
    print(f"\n{method}, {args.model}, batch {batch}, {precision}, {args.recipe} recipe")
    rows = {}
    base, plain_time = statistics.median(seconds["none"]), statistics.median(seconds["plain"])
    for name, values in seconds.items():
        median = statistics.median(values)
        row = {"seconds": median, "spread": spread(values), "rounds": len(values)}
        if name in steps:
            with counting_flops() as counter:
                steps[name]()
            flops = counter.get_total_flops() / TURNS
            row |= {
                "steps_per_s": 1 / median,
                "images_per_s": batch / median,
                "gflop": flops / 1e9,
                "gemm_share": flops / median / rate,
                "peak_mib": peak_memory(
                    args, method, "none" if name == "plain" else name, name == "plain"
                ),
                "speedup_over_plain": plain_time / median,
                "over_baseline": median / base - 1,
            }
            print(
                f"  step, {name:14s} {1e3 * median:8.1f} ms ± {1e3 * row['spread']:5.1f}  "
                f"{plain_time / median:5.2f}x plain  {100 * row['over_baseline']:+6.1f} %  "
                f"{row['steps_per_s']:6.2f} steps/s  {row['images_per_s']:7.0f} images/s  "
                f"{row['gflop']:7.1f} GFLOP = {100 * row['gemm_share']:3.0f} % of GEMM  "
                f"{row['peak_mib']:6.0f} MiB"
            )
        else:
            print(f"  {name:33s} {1e3 * median:8.2f} ms ± {1e3 * row['spread']:5.2f}")
        rows[name] = row
    sent = sent_per_step(trainers["none"])
    needed = sent / (base / 2)
    print(
        f"  shared by two ranks (--parallel batch): {sent / 1e6:.1f} MB a step each way, which "
        f"pays from {needed / 1e6:.0f} MB/s on, if half a batch takes half the time"
    )
    return {
        "batch_size": batch, "precision": precision, "gemm_flops": rate, "figures": rows,
        "bytes_per_step": sent, "pays_from_bytes_per_s": needed,
    }  # fmt: skip


def sent_per_step(trainer: Trainer) -> int:
    """Bytes that each of two ranks sends in a step of a run that they share, and receives."""
    channels = sum(len(layer.trained) // 2 for layer in trainer.layers)
    return bytes_per_step(trainer.generator, trainer.student, channels)


def deployed_times(args: argparse.Namespace) -> dict[str, Any]:
    """Float32 file against integer file, in every runtime that is installed, printed on the way.

    The student is not trained, which changes neither its layers nor its bits.
    """
    teacher, channels = make_teacher(args)
    shape = (channels, args.image_size, args.image_size)
    network = traced(teacher, shape)
    config = QuantizationConfig(args.bits, args.bits, "inputs", fold_batch_norm=True)
    student = build_student(network, config)
    images = torch.randn(64, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), observing(student):
        student(images)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        whole, integer = Path(folder, "float32.onnx"), Path(folder, "integer.onnx")
        whole.write_bytes(float_onnx(teacher, shape))
        made = export_onnx(student, integer, images)
        print(f"\n{args.model}, W{args.bits}A{args.bits}, one thread")
        print(str(made).splitlines()[-1].removeprefix(f"{integer}: "))
        for runtime, load in RUNTIMES.items():
            for batch in (1, 16):
                x = images[:batch].numpy()
                try:
                    runs = {path.stem: partial(load(path), x) for path in (whole, integer)}
                except ImportError:
                    print(f"  {runtime:12s} is not installed")
                    break
                seconds = measure(runs, args.rounds, "cpu")
                medians = {name: statistics.median(values) for name, values in seconds.items()}
                ratio = medians["integer"] / medians["float32"]
                row = {"seconds": medians, "spread": {k: spread(v) for k, v in seconds.items()}}
                figures[f"{runtime}, batch {batch}"] = row | {"over_float32": ratio}
                times = (f"{name} {1e3 * t:7.2f} ms" for name, t in medians.items())
                print(f"  {runtime:12s} batch {batch:2d}: {', '.join(times)}, {ratio:.2f} of it")
    return {"bytes": made.bytes, "float_bytes": made.float_bytes, "figures": figures}


def _onnxruntime(path: Path) -> Callable[[Any], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"images": x})


def _openvino(path: Path) -> Callable[[Any], Any]:
    import openvino

    hints = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(str(path), "CPU", hints)


RUNTIMES = {"ONNX Runtime": _onnxruntime, "OpenVINO": _openvino}


def main() -> int:
    """Exit status 0, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--baseline", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--model", default="resnet20")
    parser.add_argument(
        "--weights", type=command_line.path, help="default: random ones, as fast as trained"
    )
    parser.add_argument("--num-classes", type=int, default=10)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--recipe", choices=RECIPES, default="paper")
    parser.add_argument("--batch-size", type=int, help="default: the recipe's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=command_line.path, help="JSON of all figures")
    parser.add_argument("--deployed", action="store_true", help="time the exported files instead")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.argv = sys.argv[1:]
    try:
        if args.peak:
            print_peak(args)
            return 0
        if args.rounds < 2:
            raise UsageError(f"--rounds must be at least 2, for a spread; got {args.rounds}")
        for name in ("batch_size", "image_size"):
            value = getattr(args, name)
            if value is not None and value < 1:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} must be at least 1, got {value}")
        if args.out:
            checkpoint.check_place(args.out)
        resolve_device(args.device)
        made = provenance(args.device)
        print(", ".join(f"{k} {v}" for part in made.values() for k, v in part.items()))
        if args.deployed:
            results = {"deployed": deployed_times(args)}
        else:
            results = {method: profile(args, method) for method in args.baseline}
        if args.out:
            command = shlex.join(["python", "benchmarks/speed.py", *args.argv])
            report.write_json(args.out, {"command": command, "methods": results} | made)
    except AgmError as error:
        print(f"speed.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
