"""Full-precision networks to quantize: two of our own, torchvision's, or the user's."""

import contextlib
import difflib
import hashlib
import importlib
import inspect
import os
import pickle
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agm.errors import AgmError
from benchmarks import datasets

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

_CHOICES = "'digits', 'resnet20', 'torchvision:NAME' or 'package.module:factory'"
_RESAVE = (
    "re-save it where it was made, with torch.save(model.state_dict(), path) "
    "or safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
)


class TeacherError(AgmError, ValueError):
    """A model or its weights that cannot be built, loaded or evaluated."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters (He et al., 2015, option A)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.pad = (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(x + y)


class ResNet(nn.Module):
    """A CIFAR ResNet of 3 stages, 6 * blocks + 2 layers; torch.fx can trace it.

    Args:
        in_channels: of the images.
        widths: channels of the 3 stages, growing by even steps.
        blocks: per stage.
        num_classes: C.
    """

    def __init__(
        self, *, in_channels: int, widths: Sequence[int], blocks: int, num_classes: int
    ) -> None:
        super().__init__()

        def stage(before: int, width: int, stride: int) -> nn.Sequential:
            rest = [BasicBlock(width, width, 1) for _ in range(blocks - 1)]
            return nn.Sequential(BasicBlock(before, width, stride), *rest)

        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = stage(widths[0], widths[0], 1)
        self.layer2 = stage(widths[0], widths[1], 2)
        self.layer3 = stage(widths[1], widths[2], 2)
        self.linear = nn.Linear(widths[2], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W), H and W divisible by 4, -> logits (N, C)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet20(num_classes: int = 10) -> ResNet:
    """ResNet-20 for (N, 3, 32, 32) images (He et al., 2015), with random weights.

    Its keys are those of Y. Idelbayev's checkpoints (github.com/akamaster/pytorch_resnet_cifar10).
    """
    return ResNet(in_channels=3, widths=(16, 32, 64), blocks=3, num_classes=num_classes)


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
    path = Path(cache_dir, f"digits-{key}.pt")
    if path.exists():
        try:
            cached = torch.load(path, map_location="cpu", weights_only=True)
            with torch.random.fork_rng(devices=[]):
                model = digits_cnn()
            model.load_state_dict(cached["state_dict"])
            if teacher_hash(model) != cached["hash"]:
                raise ValueError("checksum mismatch")
            return model.eval()
        except Exception as error:  # whatever a damaged file may cause
            warnings.warn(
                f"the cached digits teacher {os.fspath(path)!r} is damaged "
                f"({type(error).__name__}); training it again",
                stacklevel=2,
            )
    model = train_digits_teacher(seed)
    try:
        _save({"state_dict": model.state_dict(), "hash": teacher_hash(model)}, path)
    except OSError as error:
        raise TeacherError(
            f"cannot write the digits teacher to {os.fspath(path)!r}: {error.strerror}; "
            "pass a writable directory as cache_dir"
        ) from error
    return model


def build(
    model: str,
    *,
    num_classes: int = 10,
    weights: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] = DEFAULT_CACHE,
) -> nn.Module:
    """A teacher by name.

    Args:
        model: ``"digits"``, ``"resnet20"``, ``"torchvision:NAME"`` (a classifier) or
            ``"package.module:factory"``, a callable that returns an nn.Module. The current
            directory is importable; ``num_classes`` is passed to a factory that takes it.
        num_classes: C, >= 1 (default 10).
        weights: a file for :func:`load_weights`. None: random weights from the global RNG or
            whatever the factory loads, but a trained ``"digits"``.
        cache_dir: for :func:`digits_teacher`.

    Returns:
        The network in eval mode.

    Raises:
        TeacherError: an unknown name, a factory that cannot be imported or fails or returns
            something else, a network without BatchNorm statistics, or weights that do not fit.
    """
    if num_classes < 1:
        raise TeacherError(f"num_classes must be >= 1, got {num_classes}")
    kind, colon, name = model.partition(":")
    if model == "digits":
        if num_classes != 10:
            raise TeacherError(f"the model 'digits' has 10 classes, got num_classes={num_classes}")
        network: nn.Module = digits_cnn() if weights is not None else digits_teacher(cache_dir)
    elif model == "resnet20":
        network = resnet20(num_classes)
    elif kind == "torchvision" and colon:
        network = _torchvision(name, num_classes)
    elif kind and name:
        network = _imported(kind, name, num_classes)
    else:
        raise TeacherError(f"unknown model {model!r}; expected {_CHOICES}")
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
    return network.eval()


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Copy a checkpoint into ``model``, which stays as it is on any error.

    Takes a state dict, bare or under ``state_dict``, ``model`` or ``model_state_dict``, with or
    without DataParallel's ``module.`` prefix, from a ``.safetensors`` file or from ``torch.save``,
    whose files are always read with ``weights_only=True``: no code in them can run. BatchNorm's
    ``num_batches_tracked`` may be missing.

    Raises:
        TeacherError: the file is missing, damaged or holds anything but tensors; keys are missing
            or unexpected; shapes or the number of classes do not match.
    """
    where = os.fspath(path)
    if not os.path.isfile(path):
        raise TeacherError(f"no weights file at {where!r}; pass the path of a saved state_dict")
    state = _unwrap(_read(where), where)
    own = model.state_dict()
    if all(k.startswith("module.") for k in state) and not any(
        k.startswith("module.") for k in own
    ):
        state = {k.removeprefix("module."): v for k, v in state.items()}

    shapes = {k: (tuple(v.shape), tuple(own[k].shape)) for k, v in state.items() if k in own}
    wrong = {k: pair for k, pair in shapes.items() if pair[0] != pair[1]}
    problems = {
        "missing keys": [
            k for k in own if k not in state and not k.endswith("num_batches_tracked")
        ],
        "unexpected keys": [k for k in state if k not in own],
        "mismatched shapes": [f"{k} {got} for {want}" for k, (got, want) in wrong.items()],
    }
    found = [f"{what}: {_some(items)}" for what, items in problems.items() if items]
    if not found:
        model.load_state_dict(state, strict=False)
        return
    # The classifier is registered last; are its rows all that differs?
    got, want = wrong.get(next(reversed(own), ""), ((), ()))
    rows = all((g[:1], g[1:], w[:1]) == (got[:1], w[1:], want[:1]) for g, w in wrong.values())
    if len(found) == 1 and got and want and rows:
        raise TeacherError(
            f"the weights {where!r} are for {got[0]} classes, the model has {want[0]}: "
            f"pass num_classes={got[0]}, or other weights"
        )
    raise TeacherError(
        f"the weights {where!r} do not fit the model; {'; '.join(found)}. "
        "Choose the model that they were saved from"
    )


def teacher_hash(model: nn.Module) -> str:
    """16 hex digits of a SHA-256 over the names, dtypes, shapes and bytes of the state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def accuracy(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int = 250,
    device: torch.device | str | None = None,
) -> float:
    """Percentage of images whose largest logit is the label's, in [0, 100].

    The model runs in eval mode without gradients; each submodule's mode is then restored.

    Args:
        model: images -> logits (n, C).
        images: (N, ...), N >= 1.
        labels: (N,) integers in [0, C).
        batch_size: images per forward, >= 1.
        device: where the model is, to which the batches are moved (default: its first parameter's).

    Raises:
        TeacherError: no images, another number of labels, a wrong ``batch_size``, logits of another
            shape or with fewer classes than the labels.
    """
    if not len(images) or labels.shape != (len(images),):
        raise TeacherError(
            "expected images (N, ...), N >= 1, and labels (N,), "
            f"got {tuple(images.shape)} and {tuple(labels.shape)}"
        )
    if batch_size < 1:
        raise TeacherError(f"batch_size must be >= 1, got {batch_size}")
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    classes = int(labels.max()) + 1
    modes = [(m, m.training) for m in model.modules()]
    correct = torch.zeros((), dtype=torch.int64, device=device)
    try:
        model.eval()
        with torch.no_grad():
            for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
                logits = model(x.to(device))
                shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                if not isinstance(shape, tuple) or len(shape) != 2 or shape[0] != len(x):
                    raise TeacherError(f"expected logits ({len(x)}, C) of the model, got {shape}")
                if shape[1] < classes:
                    raise TeacherError(
                        f"the model has {shape[1]} classes, but the labels need {classes} "
                        f"(the largest is {classes - 1}): choose a model or images that match"
                    )
                correct += (logits.argmax(1) == y.to(device)).sum()
    finally:
        for module, training in modes:
            module.training = training
    return 100 * correct.item() / len(images)


def _torchvision(name: str, num_classes: int) -> nn.Module:
    from torchvision import models

    names = models.list_models(module=models)  # classifiers alone
    if name not in names:
        close = difflib.get_close_matches(name, names, n=5) or ["resnet18", "mobilenet_v2"]
        raise TeacherError(
            f"torchvision has no classifier {name!r}; did you mean {' or '.join(close)}? "
            f"All of its {len(names)}: torchvision.models.list_models(module=torchvision.models)"
        )
    return models.get_model(name, weights=None, num_classes=num_classes)


def _imported(module: str, name: str, num_classes: int) -> nn.Module:
    with _importable(os.getcwd()):
        try:
            factory = getattr(importlib.import_module(module), name, None)
        except Exception as error:  # the user's module may raise anything
            raise TeacherError(
                f"cannot import {module!r} for the model '{module}:{name}' "
                f"({type(error).__name__}: {error}); expected {_CHOICES}, its module importable "
                "from the current directory or installed"
            ) from error
        if not callable(factory):
            raise TeacherError(
                f"the module {module!r} has no callable {name!r}; "
                "expected a factory that returns an nn.Module"
            )
        try:
            network = factory(**_accepted(factory, num_classes=num_classes))
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


def _read(path: str) -> Any:
    """The unchecked contents of a weights file."""
    if path.endswith(".safetensors"):
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise TeacherError(
                f"reading {path!r} needs safetensors: run `pip install safetensors`"
            ) from error
        try:
            return load_file(path)
        except Exception as error:  # SafetensorError is a plain Exception
            raise TeacherError(
                f"cannot read {path!r}, it is damaged or not safetensors ({error}); {_RESAVE}"
            ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Not the whole message of torch, which offers weights_only=False.
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f"a reference to {refused[1]}" if refused else "something else"
        raise TeacherError(
            f"refused to load {path!r}: expected tensors alone, found {what}, which might run "
            f"code, or the file is damaged; {_RESAVE}"
        ) from error
    except Exception as error:  # whatever a damaged file may cause
        first = str(error).split(". ")[0]  # torch goes on with its offer of weights_only=False
        raise TeacherError(
            f"cannot read {path!r}, it is damaged or not from torch.save "
            f"({type(error).__name__}: {first}); {_RESAVE}"
        ) from error


def _unwrap(loaded: Any, path: str) -> dict[str, Tensor]:
    """The state dict inside what a file held."""
    found = f"a {type(loaded).__name__}"
    if isinstance(loaded, Mapping):
        inner = (loaded.get(key) for key in ("state_dict", "model", "model_state_dict"))
        state = next((i for i in inner if isinstance(i, Mapping)), loaded)
        other = [str(k) for k, v in state.items() if not isinstance(v, Tensor)]
        if state and not other:
            return {str(k): v for k, v in state.items()}
        found = f"other values than tensors: {_some(other)}" if other else "an empty one"
    raise TeacherError(f"expected a state_dict in {path!r}, found {found}; {_RESAVE}")


def _save(content: dict[str, Any], path: Path) -> None:
    """torch.save, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
