"""A network whose parameters receive no gradients."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


@contextmanager
def frozen_parameters(module: nn.Module) -> Iterator[nn.Module]:
    """Switch the gradients of a module's parameters off, and back to what they were on leaving.

    A forward inside still carries gradients to its *input*, at the cost of the input gradient
    alone, and never writes to the parameters' ``.grad``, however late ``backward`` runs. With one
    exception: what ``torch.utils.checkpoint`` wraps runs again in ``backward``, with the flags of
    that moment, so call ``backward`` inside too.

    Parametrized tensors are computed once, on entering, and are constants inside; so under
    ``parametrize.cached()`` what is cached has its graph, for the forwards after this one. For one
    thread at a time.
    """
    before = [(p, p.requires_grad) for p in module.parameters()]
    parametrized = [
        (m, type(m), {name: _with_graph(m, name) for name in _parametrized_names(m)})
        for m in module.modules()
        if _parametrized_names(m)
    ]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        for m, _, tensors in parametrized:
            m.__class__ = parametrize.type_before_parametrizations(m)
            vars(m).update({name: tensor.detach() for name, tensor in tensors.items()})
        yield module
    finally:
        for m, kind, tensors in parametrized:
            for name in tensors:
                del vars(m)[name]
            m.__class__ = kind
        for p, requires_grad in before:
            p.requires_grad_(requires_grad)


def _parametrized_names(module: nn.Module) -> list[str]:
    """The tensors that parametrizations compute; none where they are constants for now."""
    if not parametrize.is_parametrized(module) or not isinstance(
        module.parametrizations, nn.ModuleDict
    ):
        return []
    return [
        n for n in module.parametrizations if isinstance(getattr(type(module), n, None), property)
    ]


def _with_graph(module: nn.Module, name: str) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        return getattr(module, name)
