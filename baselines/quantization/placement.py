"""Where the activations that weighted layers read are made."""

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from baselines.quantization.batch_norms import NormalisedConv
from baselines.quantization.graph import WEIGHTED, argument, called
from baselines.quantization.quantizers import ActivationQuantizer

# Values pass through these as they are, so a quantized tensor stays one.
_TRANSPARENT = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.Flatten, nn.Unflatten, nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle,
)  # fmt: skip
_TRANSPARENT_FUNCTIONS = (
    torch.flatten, operator.getitem, torch.reshape, torch.squeeze, torch.unsqueeze, torch.chunk,
    torch.split, torch.transpose, torch.permute, F.max_pool1d, F.max_pool2d, F.max_pool3d,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
    F.pixel_shuffle, F.channel_shuffle, torch.narrow,
)  # fmt: skip
_TRANSPARENT_METHODS = (
    "flatten", "view", "reshape", "contiguous", "squeeze", "unsqueeze", "chunk", "split",
    "transpose", "permute", "expand", "repeat", "narrow", "unflatten", "clone", "detach",
)  # fmt: skip
_RELUS = (nn.ReLU, nn.ReLU6)
_RELU_FUNCTIONS = (F.relu, F.relu6, F.relu_, torch.relu, torch.relu_)
_AVERAGES = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
_AVERAGE_FUNCTIONS = (
    "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
)  # fmt: skip


def weighted_layer(student: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The Conv or Linear that a node calls, also inside of a :class:`NormalisedConv`."""
    module = called(student, node)
    module = module.conv if isinstance(module, NormalisedConv) else module
    return module if isinstance(module, WEIGHTED) else None


def weighted_nodes(student: fx.GraphModule) -> list[fx.Node]:
    """The calls of Conv and Linear, in order."""
    return [node for node in student.graph.nodes if weighted_layer(student, node) is not None]


def before_layers(network: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose values reach a layer with weights."""
    found: set[fx.Node] = set()
    todo = [source for node in weighted_nodes(network) for source in node.all_input_nodes]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def last_layers(student: fx.GraphModule) -> list[fx.Node]:
    """The calls of Conv and Linear that no other one stands behind."""
    before = before_layers(student)
    return [node for node in weighted_nodes(student) if node not in before]


def is_relu(student: fx.GraphModule, node: fx.Node) -> bool:
    """A call of ReLU or ReLU6."""
    return (
        isinstance(called(student, node), _RELUS)
        or (node.op == "call_function" and node.target in _RELU_FUNCTIONS)
        or (node.op == "call_method" and node.target == "relu")
    )


def is_quantizer(student: fx.GraphModule, node: fx.Node) -> bool:
    """A call of an activation quantizer."""
    return isinstance(called(student, node), ActivationQuantizer)


def is_average(student: fx.GraphModule, node: fx.Node) -> bool:
    """A pooled or plain mean, of more than one value each."""
    name = getattr(node.target, "__name__", node.target)
    if _of_one_value(student, node):
        return False
    if node.op == "call_module":
        return isinstance(called(student, node), _AVERAGES)
    return name == "mean" or name in _AVERAGE_FUNCTIONS


def maker(student: fx.GraphModule, value: fx.Node) -> fx.Node:
    """The node where the values of ``value`` come from, however rearranged.

    Behind a padding by some other number than 0 it is the last rearrangement: that number says
    nothing of the values, and may be left out again, as -inf is by a max-pool.
    """
    node, found = value, value
    while is_transparent(student, node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
        # Not the tuple of chunks, whose source may be one.
        if node.meta.get("is_tensor", True) and not _fills(node):
            found = node
    return found


def is_transparent(student: fx.GraphModule, node: fx.Node) -> bool:
    """A call that rearranges values, or leaves some out."""
    if _of_one_value(student, node):
        return True
    if node.op == "call_module":
        return isinstance(called(student, node), _TRANSPARENT)
    if node.op == "call_method":
        return node.target in _TRANSPARENT_METHODS
    if node.op != "call_function":
        return False
    if node.target is F.pad:
        return not _fills(node)
    if node.target is F.interpolate:
        return argument(node, 3, "mode", "nearest").startswith("nearest")
    return node.target in _TRANSPARENT_FUNCTIONS


def _fills(node: fx.Node) -> bool:
    """A padding by some other number than 0."""
    constant = node.target is F.pad and argument(node, 2, "mode", "constant") == "constant"
    return constant and bool(argument(node, 3, "value"))


def _of_one_value(student: fx.GraphModule, node: fx.Node) -> bool:
    """A pooled mean of one value each, which only leaves values out."""
    if node.target in (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d):
        size = argument(node, 1, "kernel_size")
    else:
        module = called(student, node)
        size = module.kernel_size if isinstance(module, _AVERAGES[:3]) else None
    return size == 1 or (isinstance(size, tuple | list) and all(side == 1 for side in size))


def makers_before(student: fx.GraphModule, node: fx.Node) -> set[fx.Node]:
    """Where the values that a node reads are made, also through averages and concatenations."""
    found: set[fx.Node] = set()
    todo = list(node.all_input_nodes[:1])
    while todo:
        source = maker(student, todo.pop())
        found.add(source)
        if is_average(student, source) or source.target in (torch.cat, torch.stack):
            todo += source.all_input_nodes
    return found


def of_images_alone(student: fx.GraphModule) -> set[fx.Node]:
    """The nodes that no layer with weights stands before: the images, shifted and scaled or not."""
    found: set[fx.Node] = set()
    for node in student.graph.nodes:
        if weighted_layer(student, node) is not None:
            continue
        inputs = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if node.op == "placeholder" or (inputs and all(n in found for n in inputs)):
            found.add(node)
    return found
