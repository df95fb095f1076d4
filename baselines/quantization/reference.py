"""Copies compared with the network that they were made from, in numbers."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from baselines.errors import UnsupportedLayerError
from baselines.quantization.copying import own_copy
from baselines.quantization.graph import check_logits_shape

TOLERANCE = 1e-3  # of the largest logit; float32 rounds to some 1e-5 of it in deep networks
CONSTANT = 1e-2  # of a class's largest logit: what varies less does not count for the others


class Reference:
    """What a network gives for a batch, to compare its copies with.

    Args:
        network: the given one, which runs once, in a copy in eval mode; its own hooks run too.
        images: (N, C, s, s) in the range of its inputs; the copies get them channels last.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self.network, self.images = network, images
        self.logits = self._run(own_copy(network, images.dtype), images)

    def check(self, other: fx.GraphModule, what: str) -> None:
        """Refuse a copy that computes something else.

        Raises:
            UnsupportedLayerError: naming the first layer whose output differs.
        """
        images = self.images.contiguous(memory_format=torch.channels_last)
        logits = self._run(other, images)
        if same(logits, self.logits):
            return
        if not (self.logits.isfinite().all()):
            raise UnsupportedLayerError(
                "the network gives logits that are not finite for a random batch in the range of "
                "its inputs; check its weights, and input_mean and input_std"
            )
        again = self._run(own_copy(self.network, self.images.dtype), self.images)
        if not same(again, self.logits):
            raise UnsupportedLayerError(
                "the network in eval mode gives other logits for the same images when it is asked "
                "again; it must be deterministic: switch off its dropout or noise"
            )
        where = self._first_difference(other, images)
        error = float((logits - self.logits).abs().max() / self.logits.abs().max())
        raise UnsupportedLayerError(
            f"the {what} copy of {type(self.network).__name__} computes something else: {where}, "
            f"and its logits by {error:.2g} of the largest. Hooks and a patched forward are "
            "not copied, and code that depends on tensor values cannot be: make what they do a "
            "part of a module's forward"
        )

    @torch.no_grad()
    def _run(self, network: nn.Module, images: Tensor) -> Tensor:
        logits = network(images.clone())  # which it may write into
        check_logits_shape(logits, len(images))
        return logits.detach()

    def _first_difference(self, other: fx.GraphModule, images: Tensor) -> str:
        """The first module, in the order of the copy, that gives something else there."""
        network = own_copy(self.network, self.images.dtype)
        theirs = _outputs(network, lambda it: self._run(it, self.images))
        ours = _outputs(copy.deepcopy(other), lambda it: self._run(it, images))
        for name, output in ours.items():
            if name in theirs and not same(output, theirs[name]):
                kind = type(network.get_submodule(name)).__name__
                return f"the output of layer {name!r} ({kind}) differs"
        return "no layer's output differs, but what the forward does with them"


def _outputs(network: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
    """What each of its modules gives when it runs for the first time, in order."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.setdefault(name, output.detach().clone())

    for name, module in network.named_modules():
        if name:
            module.register_forward_hook(lambda _m, _in, output, name=name: keep(name, output))
    run(network)
    return outputs


def same(a: Tensor, b: Tensor) -> bool:
    """Whether they differ by at most ``TOLERANCE`` of the largest value.

    Of that in the same class, if it is larger: values that are nearly the same for all of a batch,
    such as the -1e6 of a masked class, say nothing about the other classes.
    """
    if a.shape != b.shape:
        return False
    a, b = (x.flatten(1) if x.ndim > 1 else x.reshape(1, -1) for x in (a, b))
    largest = b.abs().amax(0)
    varied = b.amax(0) - b.amin(0) > CONSTANT * largest
    usual = largest[varied].max() if varied.any() else largest.max()
    return bool(((a - b).abs() <= TOLERANCE * largest.clamp(min=usual)).all())
