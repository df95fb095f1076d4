"""The words that all speak of a traced network in."""

import operator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from baselines.errors import UnsupportedLayerError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d,
    F.conv_transpose1d: nn.ConvTranspose1d, F.conv_transpose2d: nn.ConvTranspose2d,
    F.conv_transpose3d: nn.ConvTranspose3d, F.linear: nn.Linear,
}  # fmt: skip


def attribute(root: nn.Module, target: str) -> Any:
    """What ``root.target`` is, the target dotted."""
    return operator.attrgetter(target)(root)


def free_name(module: nn.Module, name: str) -> str:
    """``name``, which may be dotted, or what is free of it with underscores behind."""
    while True:
        try:
            attribute(module, name)
        except AttributeError:
            return name
        name += "_"


def called(network: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a node calls."""
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def run_order(network: fx.GraphModule) -> list[nn.Module]:
    """The modules that it calls, in order."""
    return [m for node in network.graph.nodes if (m := called(network, node)) is not None]


def bypass(network: fx.GraphModule, node: fx.Node, source: fx.Node) -> None:
    """``source`` in place of ``node``."""
    node.replace_all_uses_with(source)
    network.graph.erase_node(node)


def cleaned(network: fx.GraphModule) -> fx.GraphModule:
    """``network`` as its changed graph says, in eval mode."""
    network.graph.eliminate_dead_code()
    network.delete_all_unused_submodules()
    network.graph.lint()
    network.recompile()
    return network.eval()


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by place or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def check_quantized(model: Any, error: type[Exception]) -> None:
    """Raise ``error`` unless this is a student."""
    if not isinstance(model, fx.GraphModule) or "config" not in model.meta:
        raise error(
            f"expected a quantized network, got {type(model).__name__}; give what quantize() "
            "returns as .model, or what load_quantized reads"
        )


def check_logits_shape(logits: Any, n: int) -> int:
    """The number of classes of (N, C) logits, of ``n`` images."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != n:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UnsupportedLayerError(
            f"the network must return logits (N, C), and for {n} images it returned {got}; put "
            "what has other outputs into a module whose forward returns the logits alone"
        )
    return logits.shape[1]
