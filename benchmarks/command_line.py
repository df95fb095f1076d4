"""compare.py's command line, and what it asks for."""

import argparse
import inspect
import os
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from agm import AGM
from baselines import METHODS, RECIPES
from baselines.quantization.policy import PLACEMENTS
from baselines.quantization.quantizers import check_bits
from baselines.training.checks import resolve_device, resolve_precision
from benchmarks import report
from benchmarks.errors import UsageError
from benchmarks.report import Cell

# The digits' images have 16 times fewer pixels than CIFAR's and need fewer steps.
DIGITS_STEPS = 600
_COMMANDS = """\
Quantize a network without data, with and without the add-on, and compare:

  compare.py --baseline gdfq --with-agm                                on digits
  compare.py --model resnet20 --weights FILE --data FOLDER --with-agm  on yours
  compare.py (the same options) --out FOLDER --resume                  go on
"""


def path(text: str) -> Path:
    """With the home folder for ``~``, which a shell leaves alone after ``=``."""
    return Path(os.path.expanduser(text))


class Parser(argparse.ArgumentParser):
    """Complains in one line, as of every other mistake."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, with every default that needs no model filled in."""
    parser = Parser(
        usage="python benchmarks/compare.py [options]", description=_COMMANDS, add_help=False,
        allow_abbrev=False,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=28),
    )  # fmt: skip
    # fmt: off
    add = parser.add_argument_group("what to quantize (defaults are in parentheses)").add_argument
    add("--model", default="digits", metavar="NAME",
        help="(digits), resnet20, efficientnet_lite0, timm:NAME, torchvision:NAME, module:factory")
    add("--weights", type=path, metavar="FILE", help="a state_dict, bare or in a checkpoint")
    add("--pretrained", action="store_true", help="the library's own weights, which it downloads")
    add("--data", type=path, metavar="FOLDER",
        help="ImageFolder to judge on (none: no accuracies)")
    add("--image-size", type=int, metavar="N",
        help="a side (the library's, else 224, or 32; digits 8)")
    add("--resize", type=int, metavar="N",
        help="shorter side, before a crop (the library's; none)")
    add("--in-channels", type=int, metavar="N", help="(the first convolution's)")
    add("--num-classes", type=int, metavar="N",
        help="(--data's or --pretrained's; 10 or 1000)")
    add("--mean", type=float, nargs="+", metavar="X",
        help="of inputs (the library's, ImageNet's; grey 0.5)")
    add("--std", type=float, nargs="+", metavar="X", help="likewise")
    add = parser.add_argument_group("how").add_argument
    add("--baseline", nargs="+", default=["gdfq"], choices=[*METHODS, "all"], metavar="M",
        help=f"{', '.join(METHODS)} or all (gdfq)")
    add("--with-agm", nargs="*", choices=report.PARTS, metavar="PART",
        help="and with loss, interpolation, (both) or several")
    add("--with-real", action="store_true",
        help="and with real images, half of --data's: the room")
    add("--bits", type=int, nargs="+", metavar="N",
        help="of weights and activations (3 4; digits 2 3)")
    add("--weight-bits", type=int, metavar="N", help="in place of --bits, with --act-bits")
    add("--act-bits", type=int, metavar="N", help="in place of --bits, with --weight-bits")
    add("--seeds", type=int, default=3, metavar="N", help="how many runs of each (3)")
    add("--first-seed", type=int, default=0, metavar="N", help="(0)")
    add("--recipe", choices=RECIPES, default="quick",
        help="ours, or nearly as the methods' papers say (quick)")
    add("--steps", type=int, metavar="N", help="(the recipe's; digits 600)")
    add("--batch-size", type=int, metavar="N", help="in place of the recipe's")
    add("--activations", choices=PLACEMENTS, metavar="WHICH",
        help="quantized: inputs (of quick) or relu (of paper)")
    add("--eval-every", type=int, metavar="STEPS",
        help="(20 times a run, fewer if that takes long)")
    add = parser.add_argument_group("where").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (auto)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", metavar="P",
        help="fp32, bf16 or (auto)")
    add("--jobs", type=int, metavar="N",
        help="runs side by side, a thread or GPU each (as fit)")
    add("--parallel", choices=["batch"],
        help="under torchrun, ranks share a batch (else runs)")
    add("--out", type=path, metavar="FOLDER", help="(runs/MODEL-TIME)")
    add("--resume", action="store_true", help="go on in --out with what is not finished")
    add("--checkpoint-every", type=int, default=200, metavar="STEPS", help="(200)")
    add("--debug", action="store_true", help="show tracebacks")
    add("-h", "--help", action="help", help=argparse.SUPPRESS)
    # fmt: on
    args = parser.parse_args(argv)
    args.argv = argv
    args.methods = list(METHODS) if "all" in args.baseline else list(dict.fromkeys(args.baseline))
    args.arms = ["none"]
    if args.with_agm is not None:
        args.arms += dict.fromkeys(args.with_agm or ["both"])
    if args.with_real:
        if args.parallel:  # each rank would draw the same images
            raise UsageError("--with-real is for runs of one process each: leave --parallel out")
        args.arms.append("real")
    for name in ("seeds", "checkpoint_every", "eval_every"):
        count = getattr(args, name)
        if count is not None and count < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {count}")
    if not 0 <= args.first_seed < 2**32:
        raise UsageError(f"--first-seed must be in [0, 2^32), got {args.first_seed}")
    if args.resume and args.out is None:
        raise UsageError("--resume needs --out, the folder to go on in")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    bits = args.bits if args.bits is not None else ([2, 3] if args.model == "digits" else [3, 4])
    args.widths = [(b, b) for b in dict.fromkeys(bits)]
    given = [w for w in (args.weight_bits, args.act_bits) if w is not None]
    if given:
        if args.bits or len(given) == 1:
            raise UsageError("give --bits, or --weight-bits and --act-bits together, not both")
        args.widths = [(args.weight_bits, args.act_bits)]
    options = ("--weight-bits", "--act-bits") if given else ("--bits", "--bits")
    for width in args.widths:
        for option, bits in zip(options, width, strict=True):
            check_bits(option, bits)
    if args.model == "digits" and args.steps is None and args.recipe == "quick":
        args.steps = DIGITS_STEPS
    return args


def parse_setting(argv: list[str]) -> argparse.Namespace:
    """As :func:`parse`, for programs that have arms of their own, and one width at a time.

    Their records take the precision from here, so it is no ``"auto"`` any more.
    """
    args = parse(argv)
    if args.arms != ["none"]:
        raise UsageError("--with-agm and --with-real are compare.py's; --help has the arms of this")
    if len(args.widths) > 1:
        raise UsageError("one width is taken at a time, give --bits N")
    args.precision = resolve_precision(args.precision, resolve_device(args.device))
    return args


def grid(args: argparse.Namespace) -> list[Cell]:
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


def training(args: argparse.Namespace) -> dict[str, Any]:
    """The options that :func:`baselines.quantize` takes by the same name."""
    names = (
        "in_channels", "recipe", "steps", "batch_size", "activations", "device", "precision",
    )  # fmt: skip
    return {name: getattr(args, name) for name in names}


def constants(recipe: str, image_size: int) -> dict[str, str]:
    """What the methods and the add-on take where the command line says nothing."""
    made = {name: str(getattr(method, recipe)(image_size)) for name, method in METHODS.items()}
    add_on = {p.name: p.default for p in inspect.signature(AGM).parameters.values()}
    return made | {"agm": str(add_on)}
