"""What a run is given, looked at before it begins."""

import inspect
import platform
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from agm import Hook
from baselines.errors import ConfigError, UnsupportedLayerError


def check_hooks(hooks: Sequence[Hook]) -> list[Hook]:
    """``hooks`` as a list, once each of them is seen to have all that a hook needs."""
    if not isinstance(hooks, Iterable):
        raise ConfigError(f"hooks must be a list, got {type(hooks).__name__}; write hooks=[...]")
    hooks = list(hooks)
    for hook in hooks:
        needed = ("generator_loss", "student_batch", "state_dict", "load_state_dict")
        lacking = [name for name in needed if not callable(getattr(hook, name, None))]
        if isinstance(hook, type) or lacking:
            what = f"the class {hook.__name__}" if isinstance(hook, type) else type(hook).__name__
            raise ConfigError(
                f"hooks must be objects with {', '.join(needed)}, got {what}; "
                "see agm.Hook, or write hooks=[AGM()]"
            )
        given = ("images", "teacher_logits", "student", "other_terms")
        for name, names in (("generator_loss", given), ("student_batch", ("images", "labels"))):
            try:
                inspect.signature(getattr(hook, name)).bind(**dict.fromkeys(names))
            except TypeError as error:
                raise ConfigError(
                    f"{type(hook).__name__}.{name} must take {', '.join(names)} by name ({error})"
                ) from error
            except ValueError:  # a builtin has none
                pass
    return hooks


BRIGHT = 100.0  # times the images: what stays in [0, 1] then is no logit


@torch.enable_grad()
def number_of_classes(network: nn.Module, images: Tensor) -> int:
    """Of a network's (N, C) logits, of which all methods take the softmax and its gradient.

    Raises:
        UnsupportedLayerError: there is one class alone, they are probabilities already, or have no
            gradient at the images.
    """
    images = torch.cat([images, BRIGHT * images]).requires_grad_()
    try:
        logits = network(images)
        torch.autograd.grad(logits.sum(), images)
    except RuntimeError as error:
        raise UnsupportedLayerError(
            f"the network's logits have no gradient at the images ({error}), and the generator "
            "would have nothing to learn from; leave out what rounds, compares or detaches"
        ) from error
    classes = logits.shape[1]
    if classes == 1:
        raise UnsupportedLayerError(
            "the network gives one logit, of which all methods take the softmax: it is always "
            "1, and there is nothing to learn from; give it two outputs, 0 and the logit"
        )
    if ((logits >= 0) & (logits <= 1)).all() and logits.any():
        raise UnsupportedLayerError(
            "the network gives probabilities: all its outputs lie between 0 and 1, for bright "
            "images too; give it without its last softmax or sigmoid, since the methods take the "
            "softmax themselves"
        )
    return classes


def check_terms(what: str, terms: Any) -> None:
    """Raise :class:`ConfigError` unless these are scalar tensors by name, one at least."""
    scalars = isinstance(terms, dict) and all(
        isinstance(term, Tensor) and not term.ndim for term in terms.values()
    )
    if not scalars or not terms:
        kinds = {k: type(v).__name__ for k, v in terms.items()} if isinstance(terms, dict) else ""
        raise ConfigError(
            f"{what} must return scalar tensors by name, at least one; got "
            f"{kinds or type(terms).__name__}"
        )


def check_batch(batch_size: int, image_shape: tuple[int, int, int]) -> None:
    """Raise :class:`ConfigError` if the generators' first BatchNorm would see one value."""
    size = image_shape[-1]
    if batch_size == 1 and size == 4:
        raise ConfigError(
            "one image of 4 pixels a side starts from one value a channel, of which the "
            "generator's BatchNorm has no spread; set batch_size to 2 or more"
        )


def resolve_device(device: str | torch.device) -> torch.device:
    """The device, once it has been seen to work."""
    try:
        torch.zeros((), device=device).item()
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ConfigError(f"device {str(device)!r} cannot be used: {error}") from error


def resolve_precision(precision: str, device: torch.device) -> str:
    """``"auto"`` becomes ``"bf16"`` where the device has fast bf16 arithmetic, else ``"fp32"``."""
    if precision not in ("auto", "fp32", "bf16"):
        raise ConfigError(f"unknown precision {precision!r}; choose one of auto, fp32, bf16")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif platform.machine() in ("x86_64", "AMD64"):
        # AVX-512's own instructions for bf16 are half as fast as float32's on Sapphire Rapids where
        # a virtual machine has no AMX (measured), and without either oneDNN is slower still.
        fast = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    else:
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if fast else "fp32"
