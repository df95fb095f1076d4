"""A network as it is asked: without its wrapper, without gradients of its parameters."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from agm.errors import AgmValueError

Network = Callable[..., Tensor]
T = TypeVar("T", bound=Network)


@contextmanager
def frozen_parameters(module: nn.Module) -> Iterator[nn.Module]:
    """Switch the gradients of a module's parameters off, and back to what they were on leaving.

    A forward inside still carries gradients to its *input*, at the cost of the input gradient
    alone, and never writes to the parameters' ``.grad``, however late ``backward`` runs. With one
    exception: what ``torch.utils.checkpoint`` wraps runs again in ``backward``, with the flags of
    that moment, so call ``backward`` inside too.

    ``parametrize.cached()`` begins anew inside, so that neither side sees the other's tensors.
    For one thread at a time.
    """
    before = [(p, p.requires_grad) for p in module.parameters()]
    cached, parametrize._cache = parametrize._cache, {}
    try:
        for p, _ in before:
            p.requires_grad_(False)
        yield module
    finally:
        parametrize._cache = cached
        for p, requires_grad in before:
            p.requires_grad_(requires_grad)


def without_wrapper(network: T) -> T:
    """The module inside DistributedDataParallel; another network as it is.

    Raises:
        AgmValueError: the wrapper is further inside and counts, by ``static_graph=True``, the
            gradients that arrive: an additional forward would leave the ranks with different ones.
    """
    if isinstance(network, DistributedDataParallel):
        return network.module
    inside = network.modules() if isinstance(network, nn.Module) else ()
    if any(isinstance(m, DistributedDataParallel) and m.static_graph for m in inside):
        raise AgmValueError(
            f"{type(network).__name__} holds a DistributedDataParallel with static_graph=True, "
            "whose gradients would differ between ranks after a forward besides the training's: "
            "give the module that is wrapped, or leave static_graph out"
        )
    return network
