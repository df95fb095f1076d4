"""A network's own copy: no hooks, weights that are plain tensors."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from baselines.defaults import torch_defaults
from baselines.errors import UnsupportedLayerError
from baselines.quantization.graph import CONVOLUTIONS, check_logits_shape

# What makes a weight before each forward; torch's modules are hidden by functions of their names.
_WEIGHT_HOOKS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)

_HOOKS = (
    "forward", "forward_pre", "backward", "backward_pre", "state_dict", "state_dict_pre",
    "load_state_dict_pre", "load_state_dict_post",
)  # fmt: skip


def own_copy(network: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """``network`` with its hooks, in eval mode, on the CPU; the given one is untouched.

    Raises:
        UnsupportedLayerError: not a module, a weight is on the meta device or not initialised, or
            copy.deepcopy gives parts of the network itself.
    """
    if not isinstance(network, nn.Module):
        raise UnsupportedLayerError(
            f"expected a network, a torch.nn.Module, got {type(network).__name__}; build it and "
            "load its weights first"
        )
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedLayerError(
                f"{name or type(network).__name__!r} is a TorchScript program; give the Python "
                "module that it was made from, with its weights loaded"
            )
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_meta or nn.parameter.is_lazy(tensor):
            what = "has no values, it is on the meta device" if tensor.is_meta else "is lazy"
            raise UnsupportedLayerError(
                f"{name!r} {what}; load its weights, or run the network on a batch, first"
            )
    # What weight_norm keeps between two forwards has a graph, which deepcopy refuses.
    made = [t for m in network.modules() for t in vars(m).values() if isinstance(t, Tensor)]
    memo = {id(t): t.detach().clone() for t in made if not t.is_leaf}
    try:
        own = copy.deepcopy(network, memo)
        if {id(m) for m in own.modules()} & {id(m) for m in network.modules()}:
            raise TypeError("its __deepcopy__ gives the network itself, or a part of it")
        own.eval()  # whose override may return nothing
        return own._apply(lambda t: t.to("cpu", _dtype(t, dtype)))
    except Exception as error:
        raise UnsupportedLayerError(
            f"{type(network).__name__} cannot be copied ({error}); a tensor kept as an attribute "
            "must be a parameter, a buffer, or detached"
        ) from error


def _dtype(tensor: Tensor, real: torch.dtype) -> torch.dtype:
    """What a tensor of a network whose numbers are ``real`` has; integers stay as they are."""
    if tensor.is_complex():  # torch's Module.to would drop the imaginary part
        return real.to_complex()
    return real if tensor.is_floating_point() else tensor.dtype


def channels_last(network: nn.Module) -> nn.Module:
    """``network`` itself, its tensors of four dimensions in torch's faster memory format."""
    return network._apply(lambda t: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t)


def without_hooks(network: nn.Module) -> nn.Module:
    """``network`` itself, its reparametrized weights made plain and all its hooks taken off."""
    for module in network.modules():
        if parametrize.is_parametrized(module):
            _bake_parametrizations(module)
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, _WEIGHT_HOOKS):  # which make the weight before each forward
                _bake_hook(module, hook)
        for hooks in _HOOKS:
            getattr(module, f"_{hooks}_hooks").clear()
        module._forward_hooks_with_kwargs.clear()
        module._forward_pre_hooks_with_kwargs.clear()
        module._forward_hooks_always_called.clear()
    return network


def _bake_parametrizations(module: nn.Module) -> None:
    """As remove_parametrizations, which would take them from the class that copies share, too."""
    with torch.no_grad():
        values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
    module.__class__ = type(module).__bases__[0]
    del module.parametrizations
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


def _bake_hook(module: nn.Module, hook: Any) -> None:
    name = hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else hook.name
    with torch.no_grad():
        hook(module, None)
        value = getattr(module, name).detach().clone()
    for suffix in ("g", "v", "orig", "mask", "u"):
        for store in (module._parameters, module._buffers):
            store.pop(f"{name}_{suffix}", None)
    module.__dict__.pop(name, None)
    module._buffers.pop(name, None)
    module.register_parameter(name, nn.Parameter(value))


@torch_defaults()
def image_channels(network: nn.Module, image_size: int) -> int | None:
    """3 if ``network`` takes such images, else those of the first convolution that it runs, or has.

    None if it has no convolution either.
    """
    network = without_hooks(own_copy(network))
    first: list[int] = []
    convolutions = [m for m in network.modules() if isinstance(m, CONVOLUTIONS)]
    for module in convolutions:
        module.register_forward_pre_hook(lambda m, _inputs: first.append(m.in_channels))
    try:
        with torch.no_grad():
            check_logits_shape(network(torch.zeros(2, 3, image_size, image_size)), 2)
        return 3
    except Exception:  # grey images, as a rule; what else may be wrong shows when it is traced
        pass
    first += [module.in_channels for module in convolutions[:1]]
    return first[0] if first else None
