"""A convolution and the eval-mode BatchNorm behind it, as one: found, folded, joined."""

import copy
import operator
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from baselines.errors import UnsupportedLayerError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class NormalisedConv(nn.Module):
    """Both with their parameters, for a network that is trained.

    norm(conv(x)) = conv(x; a W) + a (b - mean) + shift, with a = gain / sqrt(var + eps) a channel:
    the small weight is scaled in place of the large activation.
    """

    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, input: Tensor) -> Tensor:  # named as the convolution's
        conv, norm = self.conv, self.norm
        scale = (norm.running_var + norm.eps).rsqrt()
        offset = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
        if norm.affine:
            scale = scale * norm.weight
        bias = offset * scale
        if norm.affine:
            bias = bias + norm.bias
        weight = conv.weight * scale.view(-1, *(1,) * (conv.weight.ndim - 1))
        return conv._conv_forward(input, weight, bias)


class FoldedConv(nn.Module):
    """The convolution with the BatchNorm folded in, for a network that is not trained.

    ``norm`` never runs; it is kept for what it knows of the training data.
    """

    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        fold(conv, norm)
        self.conv, self.norm = conv, norm

    def forward(self, input: Tensor) -> Tensor:
        return self.conv(input)


def traced(network: nn.Module) -> fx.GraphModule:
    """A copy of ``network`` in eval mode, as a graph.

    Raises:
        UnsupportedLayerError: if torch.fx cannot follow its forward.
    """
    try:
        return fx.symbolic_trace(copy.deepcopy(network).eval())
    except Exception as error:
        raise UnsupportedLayerError(
            f"{type(network).__name__} cannot be traced by torch.fx ({error}); its forward must "
            "not branch on tensor values: rewrite that part. Give a compiled or parallel network's "
            "module inside"
        ) from error


def with_folded_norms(teacher: nn.Module) -> fx.GraphModule:
    """A copy of ``teacher`` in eval mode; a conv and its BatchNorm become one :class:`FoldedConv`.

    A pair stays as it is where the moments of what the conv gives could not be told from those of
    what the BatchNorm gives, where something unknown might write to the latter in place, or where
    the BatchNorm serves another conv too.
    """
    network = traced(teacher)
    calls = _calls(network)
    for source, node in normalised_convolutions(network):
        conv, norm = called(network, source), called(network, node)
        if calls[str(node.target)] == 1 and _invertible(norm) and _read_only(network, node):
            network.set_submodule(str(source.target), FoldedConv(conv, norm))
            bypass(network, node, source)
    return cleaned(network)


def _invertible(norm: nn.Module) -> bool:
    """Whether each channel's spread, its gain, is more than bfloat16's rounding of its shift."""
    if not norm.affine:
        return True
    gain, shift = norm.weight.abs(), norm.bias.abs()
    return bool(((gain > 1e-10) & (shift < 256 * gain)).all())


def _read_only(network: fx.GraphModule, value: fx.Node) -> bool:
    """Whether nothing writes to ``value``; a ReLU that does is made to write elsewhere."""
    users = list(value.users)
    for user in users:
        module = called(network, user)
        relu = isinstance(module, (nn.ReLU, nn.ReLU6)) or user.target in (F.relu, F.relu6)
        total = user.target in (operator.add, torch.add)  # which torch.fx makes of += too
        if not (relu or total or user.op == "output" or isinstance(module, CONVOLUTIONS)):
            return False
        writes = getattr(module, "inplace", False) or user.kwargs.get("inplace", False)
        if relu and writes and len(users) > 1:
            return False
    for user in users:
        if user.target in (F.relu, F.relu6):
            user.kwargs = {}
        elif hasattr(called(network, user), "inplace"):
            called(network, user).inplace = False
    return True


def cleaned(network: fx.GraphModule) -> fx.GraphModule:
    """``network`` as its changed graph says, in eval mode."""
    network.delete_all_unused_submodules()
    network.graph.lint()
    network.recompile()
    return network.eval()


def fold(conv: nn.Module, norm: nn.Module) -> None:
    """Give ``conv`` new weights that do what ``norm`` does too."""
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps,
        norm.weight, norm.bias,
    )  # fmt: skip


def normalised_convolutions(network: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """Every (conv, BatchNorm) of which the BatchNorm alone reads what the conv gives."""
    calls = _calls(network)
    pairs = []
    for node in network.graph.nodes:
        norm = called(network, node)
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        conv = called(network, source) if source is not None else None
        if not (isinstance(norm, BATCH_NORMS) and isinstance(conv, CONVOLUTIONS)):
            continue
        if len(source.users) > 1 or calls[str(source.target)] > 1 or norm.running_mean is None:
            continue
        pairs.append((source, node))
    return pairs


def _calls(network: fx.GraphModule) -> Counter[str]:
    """How often each module runs."""
    return Counter(str(node.target) for node in network.graph.nodes)


def called(network: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a node calls."""
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def bypass(network: fx.GraphModule, node: fx.Node, source: fx.Node) -> None:
    """``source`` in place of ``node``."""
    node.replace_all_uses_with(source)
    network.graph.erase_node(node)
