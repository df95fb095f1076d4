"""Full-precision networks to quantize: two of our own, a library's, or the user's."""

import contextlib
import difflib
import hashlib
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.errors import CheckpointError
from baselines.quantization import checkpoint
from baselines.quantization.checkpoint import load_matching
from benchmarks.errors import TeacherError
from benchmarks.task import datasets, libraries
from benchmarks.task.datasets import DIGITS_INPUTS, Inputs
from benchmarks.task.networks import ResNet, resnet20
from benchmarks.task.weights import load_weights

DIGITS_RECIPE: dict[str, Any] = {
    "version": 1,  # to be raised when the code of the training changes, not just these constants
    "widths": (8, 16, 32),
    "epochs": 30,
    "batch_size": 64,
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "normalisation": (datasets.DIGITS_MEAN, datasets.DIGITS_STD),
    "split": (datasets.DIGITS_TEST_FRACTION, datasets.DIGITS_SPLIT_SEED),
}
DEFAULT_CACHE = Path(".agm-cache")

_CHOICES = (
    "'digits', 'resnet20', 'efficientnet_lite0', 'torchvision:NAME', 'timm:NAME' or "
    "'package.module:factory'"
)
OWN = ("digits", "resnet20", "efficientnet_lite0")
# Whose networks are ImageNet's unless told otherwise, and whose weights are random.
LIBRARIES = ("efficientnet_lite0", "torchvision", "timm")


def digits_cnn() -> ResNet:
    """ResNet-8 for the (N, 1, 8, 8) images of :func:`datasets.digits`, with random weights."""
    return ResNet(in_channels=1, widths=DIGITS_RECIPE["widths"], blocks=1, num_classes=10)


def train_digits_teacher(seed: int = 0) -> ResNet:
    """Train :func:`digits_cnn` on the training half of the digits, in seconds on a CPU.

    Deterministic for one seed, machine and number of threads; leaves the global RNG as it was.

    Returns:
        The network in eval mode, on the CPU.
    """
    recipe = DIGITS_RECIPE
    images, labels, _, _ = datasets.digits()
    # Seeds the CPU's generator alone: torch.manual_seed would reach every GPU's.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        model = digits_cnn()
        steps = len(images) // recipe["batch_size"]  # drops the odd rest, for BatchNorm's sake
        optimizer = torch.optim.SGD(
            model.parameters(),
            lr=recipe["lr"],
            momentum=recipe["momentum"],
            weight_decay=recipe["weight_decay"],
            nesterov=True,
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe["epochs"] * steps)
        for _ in range(recipe["epochs"]):
            for batch in torch.randperm(len(images)).split(recipe["batch_size"])[:steps]:
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def digits_teacher(cache_dir: str | os.PathLike[str] = DEFAULT_CACHE, *, seed: int = 0) -> ResNet:
    """:func:`train_digits_teacher`, from ``cache_dir`` if it was trained before.

    Another recipe or seed is another file. A damaged file is replaced, with a warning.

    Returns:
        The network in eval mode, on the CPU.

    Raises:
        TeacherError: ``cache_dir`` cannot be written.
    """
    key = hashlib.sha256(repr((sorted(DIGITS_RECIPE.items()), seed)).encode()).hexdigest()[:16]
    path = Path(cache_dir, f"digits-{key}.ckpt")
    if path.exists():
        try:
            with torch.random.fork_rng(devices=[]):
                model = digits_cnn()
            load_matching(model, checkpoint.load(path), os.fspath(path))
            return model.eval()
        except CheckpointError as error:
            warnings.warn(f"training the digits teacher again: {error}", stacklevel=2)
    model = train_digits_teacher(seed)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(path, model.state_dict())
    except (OSError, CheckpointError) as error:
        raise TeacherError(
            f"cannot write the digits teacher to {os.fspath(path)!r}: {error}; "
            "free some space, or run it in a folder that can be written to"
        ) from error
    return model


def build(model: str, **options: Any) -> nn.Module:
    """The network alone of :func:`build_with_inputs`."""
    return build_with_inputs(model, **options)[0]


def build_with_inputs(
    model: str,
    *,
    num_classes: int = 10,
    weights: str | os.PathLike[str] | None = None,
    pretrained: bool = False,
    cache_dir: str | os.PathLike[str] = DEFAULT_CACHE,
) -> tuple[nn.Module, Inputs | None]:
    """A teacher by name, and how an image becomes its input.

    Args:
        model: ``"digits"``, ``"resnet20"``, ``"efficientnet_lite0"``, ``"torchvision:NAME"`` (a
            classifier), ``"timm:NAME"`` or ``"package.module:factory"``, a callable that returns an
            nn.Module. The current directory is importable; ``num_classes`` is passed to a factory
            that takes it.
        num_classes: C, >= 1 (default 10); where ``pretrained``, the weights say.
        weights: a file for :func:`load_weights`. None: random weights from the global RNG or
            whatever the factory loads, but a trained ``"digits"``.
        pretrained: the library's own weights, from its cache or the network; passed to a factory,
            which must take it.
        cache_dir: for :func:`digits_teacher`.

    Returns:
        The network in eval mode and float32, and its inputs, or None where a factory made it.

    Raises:
        TeacherError: an unknown name, a library or weights that are not there, a factory that
            cannot be imported or fails or returns something else, a network without BatchNorm
            statistics, or weights that do not fit.
    """
    if num_classes < 1:
        raise TeacherError(f"num_classes must be >= 1, got {num_classes}")
    kind, colon, name = model.partition(":")
    inputs: Inputs | None = None
    if pretrained and model in ("digits", "resnet20"):
        raise TeacherError(f"the model {model!r} has no pretrained weights to choose")
    if model == "digits":
        if num_classes != 10:
            raise TeacherError(f"the model 'digits' has 10 classes, got num_classes={num_classes}")
        network: nn.Module = digits_cnn() if weights is not None else digits_teacher(cache_dir)
        inputs = DIGITS_INPUTS
    elif model == "resnet20":
        network, inputs = resnet20(num_classes), Inputs(32, 32)
    elif model == "efficientnet_lite0":
        classes = 1000 if pretrained else num_classes
        network, inputs = libraries.efficientnet_lite0(classes, pretrained=pretrained)
    elif kind == "torchvision" and colon:
        network, inputs = libraries.torchvision_network(
            name, num_classes, pretrained=pretrained, weights=weights
        )
    elif kind == "timm" and colon:
        network, inputs = libraries.timm_network(name, num_classes, pretrained=pretrained)
    elif kind and name:
        network = _imported(kind, name, num_classes, pretrained)
    else:
        raise TeacherError(f"unknown model {model!r}{_meant(model)}; expected {_CHOICES}")
    if not any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
        for m in network.modules()
    ):
        raise TeacherError(
            f"the model {model!r} has no BatchNorm with running statistics, which data-free "
            "quantization draws its images from; choose a network that has (such as a ResNet)"
        )
    if weights is not None:
        load_weights(network, weights)
    network.eval()  # whose override may return nothing
    return network.float(), inputs


def hits(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """For each image, whether the label's logit is the largest, and among the five largest.

    The model runs in eval mode without gradients; each submodule's mode is then restored.

    Args:
        model: images -> logits (n, C).
        batches: images (n, ...) and their labels, (n,) integers in [0, C).
        device: where the model is, to which the batches are moved (default: its first parameter's).

    Returns:
        bool (N, 2), on the CPU.

    Raises:
        TeacherError: no images, another number of labels, logits of another shape or with fewer
            classes than the labels.
    """
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = [(m, m.training) for m in model.modules()]
    found: list[list[bool]] = []  # no tensors, small ones between large ones fragment the heap
    try:
        model.eval()
        with torch.no_grad():
            for x, labels in batches:
                if labels.shape != (len(x),):
                    raise TeacherError(f"expected {len(x)} labels, got {tuple(labels.shape)}")
                logits = model(x.to(device))
                shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                if not isinstance(shape, tuple) or len(shape) != 2 or shape[0] != len(x):
                    raise TeacherError(f"expected logits ({len(x)}, C) of the model, got {shape}")
                largest = int(labels.max())
                if shape[1] <= largest:
                    raise TeacherError(
                        f"the model has {shape[1]} classes, but the labels need {largest + 1} "
                        f"(the largest is {largest}): choose a model or images that match"
                    )
                y = labels.to(device)
                first = logits.argmax(1) == y
                five = logits.topk(min(5, shape[1])).indices == y[:, None]
                found += torch.stack([first, first | five.any(1)], 1).tolist()
    finally:
        for module, training in modes:
            module.training = training
    if not found:
        raise TeacherError("expected images, got none")
    return torch.tensor(found)


def _meant(model: str) -> str:
    """A question after names that are written like ``model``; empty if there are none."""
    kind, colon, name = model.partition(":")
    if colon:
        close = [f"{k}:{name}" for k in difflib.get_close_matches(kind, LIBRARIES, n=1)]
    else:
        from torchvision import models

        listed = models.list_models(module=models)
        close = difflib.get_close_matches(model, OWN, n=1)
        close += [f"torchvision:{n}" for n in difflib.get_close_matches(model, listed, n=2)]
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _imported(module: str, name: str, num_classes: int, pretrained: bool) -> nn.Module:
    offered: dict[str, Any] = {"pretrained": True} if pretrained else {"num_classes": num_classes}
    with _importable(os.getcwd()):
        try:
            factory = getattr(importlib.import_module(module), name, None)
        except Exception as error:  # the user's module may raise anything
            raise TeacherError(
                f"cannot import {module!r} for the model '{module}:{name}' "
                f"({type(error).__name__}: {error}){_meant(f'{module}:{name}')}; expected "
                f"{_CHOICES}, its module importable from the current directory or installed"
            ) from error
        if not callable(factory):
            raise TeacherError(
                f"the module {module!r} has no callable {name!r}; "
                "expected a factory that returns an nn.Module"
            )
        accepted = _accepted(factory, **offered)
        if pretrained and not accepted:
            raise TeacherError(
                f"the factory '{module}:{name}' takes no argument pretrained; leave --pretrained "
                "out where it loads its weights itself, or pass them by --weights"
            )
        try:
            network = factory(**accepted)
        except Exception as error:
            raise TeacherError(
                f"the factory '{module}:{name}' failed ({type(error).__name__}: {error}); "
                "it must work without arguments, or with num_classes alone"
            ) from error
    if not isinstance(network, nn.Module):
        raise TeacherError(
            f"the factory '{module}:{name}' returned {type(network).__name__}, expected nn.Module"
        )
    return network


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the import may have removed it
            sys.path.remove(folder)


def _accepted(factory: Any, **offered: Any) -> dict[str, Any]:
    """The offered keyword arguments that a callable takes."""
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # builtins without one
        return {}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return offered
    return {k: v for k, v in offered.items() if k in parameters}
