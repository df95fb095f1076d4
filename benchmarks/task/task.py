"""What a comparison works on: a teacher, and the images that judge it."""

import argparse
import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from baselines.errors import ConfigError
from baselines.quantization.graph import image_channels
from baselines.training.trainer import resolve_device
from benchmarks.errors import UsageError
from benchmarks.task import datasets, teachers


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

    def accuracy(self, model: nn.Module, chosen: Tensor | slice = slice(None)) -> float:
        """In %, on all or the ``chosen`` images, always computed in float32."""
        assert self.images is not None
        assert self.labels is not None
        images, labels = self.images[chosen], self.labels[chosen]
        return teachers.accuracy(model, images, labels, device=self.device)

    def accuracy_of_halves(self, model: nn.Module) -> dict[str, float | None]:
        """``accuracy_tuning``, of the images that choices are made on, and ``accuracy_proof``."""
        if self.labels is None:
            return {"accuracy_tuning": None, "accuracy_proof": None}
        parts = halves(self.labels)
        return {f"accuracy_{name}": self.accuracy(model, part) for name, part in parts.items()}

    def data_hash(self) -> str | None:
        """16 hex digits over the evaluation images."""
        if self.images is None:
            return None
        return hashlib.sha256(self.images.contiguous().numpy().tobytes()).hexdigest()[:16]

    def pixels(self, images: Tensor) -> np.ndarray:
        """Normalised (n, c, h, w) as uint8 (n, h, w, c)."""
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        levels = (images.cpu() * std + mean).clamp(0, 1).mul(255).round().byte()
        return levels.permute(0, 2, 3, 1).numpy()


def load_task(args: argparse.Namespace) -> Task:
    """Build and check everything that can be wrong before the first step."""
    try:
        resolve_device(args.device)
    except ConfigError as error:
        raise UsageError(f"--device: {error}") from error
    on_digits = args.model == "digits" and args.data is None
    zoo = args.model.startswith("torchvision:")
    size = args.image_size
    if size is None:
        size = 8 if on_digits else 224 if zoo else 32
    if size < 1:
        raise UsageError(f"--image-size must be at least 1, got {size}")
    num_classes = args.num_classes
    if num_classes is None:
        num_classes = 1000 if zoo else 10
        if args.data is not None:
            num_classes = len(datasets.class_names(args.data))
    with torch.random.fork_rng(devices=[]):  # a factory may leave its weights random
        torch.default_generator.manual_seed(0)
        teacher = teachers.build(args.model, num_classes=num_classes, weights=args.weights)
    if args.weights is None and (zoo or args.model == "resnet20"):
        raise UsageError(
            f"the model {args.model!r} comes with random weights; pass trained ones by --weights, "
            "a file that torch.save made of a state_dict"
        )
    channels = args.in_channels if args.in_channels is not None else image_channels(teacher, size)
    if channels is not None and channels < 1:
        raise UsageError(f"--in-channels must be at least 1, got {channels}")
    if channels is None:
        raise UsageError(f"the model {args.model!r} has no convolution, so it takes no images")
    if args.data is not None and channels != 3:
        raise UsageError(
            f"the model takes images of {channels} channel(s), --data gives 3-channel ones; "
            "choose a model for colour images, or leave --data out"
        )
    mean, std = args.mean, args.std
    if mean is None:
        mean = datasets.DIGITS_MEAN if channels == 1 else datasets.IMAGENET_MEAN
    if std is None:
        std = datasets.DIGITS_STD if channels == 1 else datasets.IMAGENET_STD
    if len(mean) != channels or len(std) != channels:
        raise UsageError(
            f"--mean and --std need {channels} numbers, one a channel of the images; "
            f"got {len(mean)} and {len(std)}"
        )
    if not all(math.isfinite(v) for v in (*mean, *std)) or min(std) <= 0:
        raise UsageError(f"--mean and --std must be finite, --std > 0; got {mean} and {std}")
    try:
        with torch.no_grad():
            logits = teacher(torch.zeros(2, channels, size, size))
    except Exception as error:  # the user's network may raise anything
        raise UsageError(
            f"the model does not take {channels}x{size}x{size} images ({error}); set --image-size "
            "or --in-channels"
        ) from error
    got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if got != (2, num_classes):
        raise UsageError(
            f"the model returns {got} for 2 images, expected (2, {num_classes}); "
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


def halves(labels: Tensor) -> dict[str, Tensor]:
    """Indices of the first (``"tuning"``) and the second (``"proof"``) half of each class."""
    members = [(labels == label).nonzero().flatten() for label in labels.unique()]
    return {
        "tuning": torch.cat([m[: len(m) // 2] for m in members]),
        "proof": torch.cat([m[len(m) // 2 :] for m in members]),
    }
