"""What a comparison works on: a teacher, and the images that judge it."""

import argparse
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from baselines.errors import ConfigError
from baselines.quantization.copying import image_channels
from baselines.run import RECORDS
from baselines.training.checks import resolve_device
from benchmarks import progress
from benchmarks.errors import UsageError
from benchmarks.task import datasets, teachers
from benchmarks.task.datasets import DIGITS_INPUTS, DIGITS_MEAN, DIGITS_STD, Images, Inputs

# Images judged in a run, at most, for each that it trains on; to judge one takes some 2/5 of a
# step's time for one.
JUDGED = 0.5
# Of more classes the accuracy among the five largest logits is measured as well.
TOP5_CLASSES = 20
# An evaluation that takes more seconds shows its progress.
PATIENCE = 5


@dataclass
class Task:
    """A teacher, its inputs, and the images that judge it (None without --data)."""

    teacher: nn.Module
    inputs: Inputs
    images: Images | None
    device: str

    def figures(self, model: nn.Module) -> dict[str, float]:
        """Of one pass over the images, always computed in float32, in %.

        ``accuracy`` on all images; ``accuracy_tuning`` and ``accuracy_proof`` on the halves of each
        class, the first of which choices are made on, where they are not empty;
        ``accuracy_top5`` where there are more than ``TOP5_CLASSES`` classes.
        """
        assert self.images is not None
        count = -(-len(self.images) // self.images.batch_size)
        batches = tqdm(
            self.images, "evaluating", count, delay=PATIENCE, leave=False, unit="batch",
            dynamic_ncols=True, disable=not progress.shown(),
        )  # fmt: skip
        first, five = teachers.hits(model, batches, device=self.device).unbind(1)
        labels = self.images.labels
        chosen = {"accuracy": first}
        chosen |= {f"accuracy_{name}": first[part] for name, part in halves(labels).items()}
        if labels.max() >= TOP5_CLASSES:
            chosen["accuracy_top5"] = five
        return {k: 100 * v.sum().item() / len(v) for k, v in chosen.items() if len(v)}

    def eval_every(self, steps: int, batch_size: int) -> int | None:
        """As ``baselines.quantize`` takes it for a run of such batches, chosen by the cost.

        At every record (None), or more rarely, down to the network straight after quantization and
        the last one, so that some ``JUDGED`` images at most are judged for each trained on.
        """
        passes = 0 if self.images is None else JUDGED * steps * batch_size / len(self.images)
        return None if passes >= min(RECORDS, steps) else steps // max(1, int(passes))

    def pixels(self, images: Tensor) -> np.ndarray:
        """Normalised (n, c, h, w) as uint8 (n, h, w, c)."""
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.inputs.mean, self.inputs.std))
        levels = (images.cpu() * std + mean).clamp(0, 1).mul(255).round().byte()
        return levels.permute(0, 2, 3, 1).numpy()


def load_task(args: argparse.Namespace) -> Task:
    """Build and check everything that can be wrong before the first step."""
    try:
        resolve_device(args.device)
    except ConfigError as error:
        raise UsageError(f"--device: {error}") from error
    if args.pretrained and args.weights is not None:
        raise UsageError("give --pretrained or --weights, not both")
    zoo = args.model.partition(":")[0] in teachers.LIBRARIES
    num_classes = args.num_classes
    if num_classes is None:
        num_classes = 1000 if zoo else 10
        if args.data is not None:
            num_classes = len(_folders().class_names(args.data))
    with torch.random.fork_rng(devices=[]):  # a factory may leave its weights random
        torch.default_generator.manual_seed(0)
        teacher, inputs = teachers.build_with_inputs(
            args.model,
            num_classes=num_classes,
            weights=args.weights,
            pretrained=args.pretrained,
        )
    if args.weights is None and not args.pretrained and (zoo or args.model == "resnet20"):
        own = "take the library's by --pretrained, or " if zoo else ""
        raise UsageError(
            f"the model {args.model!r} comes with random weights; {own}pass trained ones by "
            "--weights, a file that torch.save made of a state_dict"
        )
    if args.in_channels is not None:
        channels = args.in_channels
    elif inputs is not None:
        channels = len(inputs.mean)
    else:
        channels = image_channels(teacher, 32 if args.image_size is None else args.image_size)
    if channels is not None and channels < 1:
        raise UsageError(f"--in-channels must be at least 1, got {channels}")
    if channels is None:
        raise UsageError(f"the model {args.model!r} has no convolution, so it takes no images")
    if args.data is not None and channels != 3:
        raise UsageError(
            f"the model takes images of {channels} channel(s), --data gives 3-channel ones; "
            "choose a model for colour images, or leave --data out"
        )
    inputs = chosen_inputs(args, inputs, channels)
    size = inputs.image_size
    try:
        with torch.no_grad():
            logits = teacher(torch.zeros(2, channels, size, size, dtype=torch.float32))
    except Exception as error:  # the user's network may raise anything
        raise UsageError(
            f"the model does not take {channels}x{size}x{size} images ({error}); set --image-size "
            "or --in-channels"
        ) from error
    got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if args.pretrained and args.num_classes is None and isinstance(got, tuple) and len(got) == 2:
        num_classes = got[-1]  # the weights say
    if got != (2, num_classes):
        raise UsageError(
            f"the model returns {got} for 2 images, expected (2, {num_classes}); "
            "set --num-classes, or --data with that many class folders"
        )
    if args.model == "digits" and args.data is None and inputs != DIGITS_INPUTS:
        raise UsageError(
            "the digits are images of 8x8 pixels of their own mean and deviation: leave "
            "--image-size, --resize, --mean and --std out"
        )
    images = None
    if args.data is not None:
        images = _folders().image_folder(args.data, inputs, num_classes=num_classes)
    elif args.model == "digits":
        images = datasets.digits_images()
    teacher.to(args.device)
    return Task(teacher, inputs, images, args.device)


def _folders() -> Any:
    """Imported where it is used: torchvision takes as long as torch, and digits need none."""
    from benchmarks.task import folders

    return folders


def chosen_inputs(args: argparse.Namespace, own: Inputs | None, channels: int) -> Inputs:
    """A network's ``own`` inputs, or 32 pixels and usual constants; flags come first.

    With --image-size alone, --resize keeps its proportion to it.
    """
    if own is None:
        grey = {"mean": DIGITS_MEAN, "std": DIGITS_STD} if channels == 1 else {}
        own = Inputs(32, 32, **grey)
    size = own.image_size if args.image_size is None else args.image_size
    resize = args.resize
    if resize is None:
        resize = round(own.resize * size / own.image_size)
    mean, std = (tuple(v) for v in (args.mean or own.mean, args.std or own.std))
    if len(mean) != channels or len(std) != channels:
        raise UsageError(
            f"--mean and --std need {channels} numbers, one a channel of the model's first "
            f"convolution; got {len(mean)} and {len(std)}"
        )
    return replace(own, image_size=size, resize=resize, mean=mean, std=std)


def halves(labels: Tensor) -> dict[str, Tensor]:
    """Indices of the first (``"tuning"``) and the second (``"proof"``) half of each class."""
    members = [(labels == label).nonzero().flatten() for label in labels.unique()]
    return {
        "tuning": torch.cat([m[: len(m) // 2] for m in members]),
        "proof": torch.cat([m[len(m) // 2 :] for m in members]),
    }
