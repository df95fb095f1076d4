"""A student as a network of integers, in torch: the oracle for its ONNX file.

student -> every tensor on a grid of uint8 (:class:`Grid`), ReLUs in its bounds
        -> weights as int8 with a step a channel (:class:`IntegerWeight`)
"""

import copy
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from baselines.defaults import torch_defaults
from baselines.errors import ExportError
from baselines.quantization.batch_norms import NormalisedConv
from baselines.quantization.graph import (
    TRANSPOSED,
    bypass,
    called,
    check_quantized,
    cleaned,
    free_name,
)
from baselines.quantization.placement import (
    before_layers,
    is_average,
    is_quantizer,
    is_relu,
    is_transparent,
    maker,
    of_images_alone,
    weighted_layer,
    weighted_nodes,
)
from baselines.quantization.quantizers import (
    WeightQuantizer,
    check_choice,
    integer_range,
    scale_and_zero_point,
)

ARITHMETICS = ("integer", "float")
PACKED_AT_MOST = 2**21  # weights of a layer; more take seconds to unpack when a file is loaded
_JOINING = (
    torch.add, torch.sub, torch.mul, torch.div, torch.cat, torch.stack,
    operator.add, operator.sub, operator.mul, operator.truediv,
)  # fmt: skip
_JOINING_METHODS = ("add", "sub", "mul", "div")


class Grid(nn.Module):
    """x -> scale * (q - zero_point), q in uint8.

    q = clamp(round(x / scale) + zero_point, lower, upper).

    Args:
        scale, zero_point: numbers, scale > 0.
        lower, upper: 0 <= lower <= zero_point <= upper <= 255.
        folded: written with Cast and Mul in place of DequantizeLinear.
    """

    def __init__(
        self, scale: Tensor, zero_point: int, lower: int, upper: int, folded: bool
    ) -> None:
        super().__init__()
        self.lower, self.upper, self.folded = lower, upper, folded
        self.register_buffer("scale", scale.detach().clone().float())
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.uint8))

    def clip(self, low: float, high: float) -> None:
        """Also do what a clamp to [low, high] before it would."""
        zero, scale = int(self.zero_point), float(self.scale)
        ends = (min(max(low / scale, -256), 256), min(max(high / scale, -256), 256))
        below, above = (round(end) + zero for end in ends)
        self.lower, self.upper = max(self.lower, below), min(self.upper, above)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.onnx.is_in_onnx_export():
            q = (x / self.scale).round() + self.zero_point
            return (q.clamp(self.lower, self.upper) - self.zero_point) * self.scale
        q = _symbolic("QuantizeLinear", (x, self.scale, self.zero_point), torch.uint8, x.shape)
        if (self.lower, self.upper) != (0, 255):
            ends = [torch.tensor(end, dtype=torch.uint8) for end in (self.lower, self.upper)]
            q = _symbolic("Clip", (q, *ends), torch.uint8, x.shape)
        if self.folded:
            return (q.float() - self.zero_point.float()) * self.scale
        given = (q, self.scale, self.zero_point)
        return _symbolic("DequantizeLinear", given, torch.float32, x.shape)


class IntegerWeight(nn.Module):
    """Parametrization of a layer whose weight is int8, or folded int16 if need be.

    It gives step * integers, which are ``factor * (levels - zero_points)``, the levels being the
    student's, from 0 on.

    Args:
        step: of each output channel, > 0, in a shape that broadcasts against the weight.
        folded: written with Cast and Mul in place of DequantizeLinear.

    Attributes:
        levels, zero_points, factor, bit_width: None where the integers are stored as they are.
    """

    def __init__(self, step: Tensor, folded: bool) -> None:
        super().__init__()
        self.folded = folded
        self.register_buffer("step", step if folded else step.flatten())
        self.levels: Tensor | None = None
        self.zero_points: Tensor | None = None
        self.factor: Tensor | None = None
        self.bit_width: int | None = None

    def forward(self, integers: Tensor) -> Tensor:
        if self.folded:
            return integers.float() * self.step
        if not torch.onnx.is_in_onnx_export():
            return integers.float() * self.step.view(-1, *(1,) * (integers.ndim - 1))
        given = (integers, self.step)
        return _symbolic("DequantizeLinear", given, torch.float32, integers.shape, {"axis": 0})


def _symbolic(
    name: str, inputs: Any, dtype: torch.dtype, shape: Any, attributes: Any = None
) -> Tensor:
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape)


@torch_defaults()
def deployed(
    model: fx.GraphModule, images: Tensor | None = None, *, arithmetic: str = "integer"
) -> fx.GraphModule:
    """What an exported file computes, in torch: float32 on the CPU, in eval mode.

    The file is that of :func:`baselines.quantization.export.export_onnx`.

    Args:
        model: a student; untouched.
        images: (N, C, s, s), normalised as the teacher's. With them, what layers, sums and averages
            give gets a grid of 8 bits over the range that is seen there, where the student has
            none. Without them no grid is added and the logits are the student's, but for rounding:
            asymmetric weights of 8 bits once more where q - zero_point exceeds 127.
        arithmetic: ``"integer"``; or ``"float"``, which adds no grids either.

    Raises:
        ExportError: not a student, ranges not observed or not finite, images of another shape.
    """
    check_choice("arithmetic", arithmetic, ARITHMETICS)
    _check(model, images)
    network, folded = copy.deepcopy(model).cpu().float().eval(), arithmetic == "float"
    for node in network.graph.nodes:
        if is_quantizer(network, node):
            network.set_submodule(str(node.target), _grid_of(network, node, folded))
    _pad_apart(network)
    if images is not None and not folded:
        _add_grids(network, images.detach().cpu().float())
    _repeat_grids(network)
    _fold_relus(network)
    for name in dict.fromkeys(str(node.target) for node in weighted_nodes(network)):
        calls = [node for node in weighted_nodes(network) if str(node.target) == name]
        inputs = [called(network, node.all_input_nodes[0]) for node in calls]
        scale = min((float(g.scale) for g in inputs if isinstance(g, Grid)), default=1.0)
        network.set_submodule(name, _integer_layer(name, called(network, calls[0]), scale, folded))
    return cleaned(network)


def _check(model: Any, images: Tensor | None) -> None:
    check_quantized(model, ExportError)
    shape = model.meta["image_shape"]
    if images is not None and not isinstance(images, Tensor):
        raise ExportError(f"expected images as a tensor, got {type(images).__name__}")
    if images is not None and (
        images.ndim != 4 or not len(images) or tuple(images.shape[1:]) != tuple(shape)
    ):
        raise ExportError(f"expected images (N, {', '.join(map(str, shape))}), N >= 1, got "
                          f"{tuple(images.shape)}")  # fmt: skip
    if images is not None and not bool(images.isfinite().all()):
        raise ExportError("the images must be finite, some of their values are not")


def _pad_apart(network: fx.GraphModule) -> None:
    """Padding by other values than 0 as a step of its own, behind which a grid can be repeated."""
    for node in weighted_nodes(network):
        layer, x = weighted_layer(network, node), node.all_input_nodes[0]
        if getattr(layer, "padding_mode", "zeros") == "zeros":
            continue
        with network.graph.inserting_before(node):
            given = (x, layer._reversed_padding_repeated_twice, layer.padding_mode)
            node.replace_input_with(x, network.graph.call_function(F.pad, given))
    for layer in {weighted_layer(network, node) for node in weighted_nodes(network)}:
        if getattr(layer, "padding_mode", "zeros") != "zeros":
            layer.padding, layer.padding_mode = (0,) * len(layer.kernel_size), "zeros"
    network.recompile()


def _grid_of(network: fx.GraphModule, node: fx.Node, folded: bool) -> Grid:
    quantizer = called(network, node)
    if not quantizer.batches:
        raise ExportError(
            f"the range of {node.name!r} was never observed; train the network, or run it on some "
            "images inside of baselines.quantization.quantizers.observing"
        )
    if not (quantizer.scale.isfinite() and quantizer.zero_point.isfinite()):
        raise ExportError(
            f"the step of {node.name!r} is {float(quantizer.scale)}; the training diverged, go "
            "back to a checkpoint before"
        )
    qmin, qmax, zero_point = quantizer.bounds()
    shift = 2 ** (quantizer.bit_width - 1) if qmin < 0 else 0  # to uint8
    return Grid(quantizer.scale, zero_point + shift, qmin + shift, qmax + shift, folded)


def is_grid(network: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(called(network, node), Grid)


def _before_grid(network: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The node, or the ReLU that is its only reader: a grid behind that does the ReLU too."""
    users = list(node.users)
    return users[0] if len(users) == 1 and is_relu(network, users[0]) else node


def has_grid(network: fx.GraphModule, node: fx.Node) -> bool:
    return all(is_grid(network, user) for user in _before_grid(network, node).users)


def _add_grids(network: fx.GraphModule, images: Tensor) -> None:
    """8 bits for all that layers read and give, and that is added, averaged or concatenated."""
    nodes, weighted = list(network.graph.nodes), weighted_nodes(network)
    given, before = of_images_alone(network), before_layers(network)
    places: dict[fx.Node, None] = {}
    for node in nodes:
        name = getattr(node.target, "__name__", node.target)
        joins = (node.op == "call_function" and node.target in _JOINING) or (
            node.op == "call_method" and name in _JOINING_METHODS
        )
        if node in weighted:
            source = maker(network, node.all_input_nodes[0])
            if not is_grid(network, source):
                places[source] = None
        if node not in before or node in given or not node.meta.get("is_tensor", True):
            continue
        if (node in weighted or joins or is_average(network, node)) and not has_grid(network, node):
            places[_before_grid(network, node)] = None
    ranges = _Ranges(network, places)
    ranges.run(images)
    for node, (low, high) in ranges.seen.items():
        scale, zero_point = scale_and_zero_point(low, high, 8, "asymmetric", signed=False)
        name = free_name(network, f"{node.name}_grid")
        network.add_submodule(name, Grid(scale, int(zero_point), 0, 255, False))
        with network.graph.inserting_after(node):
            grid = network.graph.call_module(name, (node,))
        node.replace_all_uses_with(grid, delete_user_cb=lambda user, grid=grid: user is not grid)
    network.recompile()


class _Ranges(fx.Interpreter):
    """Runs a network and keeps the smallest and the largest value of some nodes."""

    def __init__(self, network: fx.GraphModule, places: dict[fx.Node, None]) -> None:
        super().__init__(network)
        self.places = places
        self.seen: dict[fx.Node, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def run(self, *args: Any, **kwargs: Any) -> Any:
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.places and value.is_floating_point():  # no mask, no index
            if not bool(value.isfinite().all()):
                raise ExportError(f"{n.name!r} gives values that are not finite for the images")
            self.seen[n] = value.aminmax()
        return value


def _repeat_grids(network: fx.GraphModule) -> None:
    """Behind what rearranges quantized values the same grid once more, which changes nothing.

    Runtimes make an integer kernel of a layer that has a grid right before it and right behind it.
    """
    for node in list(network.graph.nodes):
        if not is_transparent(network, node) or not node.meta.get("is_tensor", True):
            continue
        source = maker(network, node)
        readers = [u for u in node.users if not (is_transparent(network, u) or is_grid(network, u))]
        if not is_grid(network, source) or not readers:
            continue
        with network.graph.inserting_after(node):
            again = network.graph.call_module(str(source.target), (node,))
        for reader in readers:
            reader.replace_input_with(node, again)


def _fold_relus(network: fx.GraphModule) -> None:
    """round(clamp(x)) = clamp(round(x)) with rounded ends: grids do what ReLUs before them do."""
    for node in list(network.graph.nodes):
        users = list(node.users)
        if not is_relu(network, node) or len(users) != 1 or not is_grid(network, users[0]):
            continue
        six = isinstance(called(network, node), nn.ReLU6) or node.target is F.relu6
        called(network, users[0]).clip(0, 6 if six else math.inf)
        bypass(network, node, node.all_input_nodes[0])


def _integer_layer(name: str, layer: nn.Module, input_scale: float, folded: bool) -> nn.Module:
    """A layer with an :class:`IntegerWeight`; a BatchNorm's gain goes into the steps."""
    norm = layer.norm if isinstance(layer, NormalisedConv) else None
    layer = layer.conv if isinstance(layer, NormalisedConv) else layer
    latent = layer.parametrizations.weight.original.detach()
    (quantizer,) = (m for m in layer.modules() if isinstance(m, WeightQuantizer))
    integers, zero_points, step = integers_of(quantizer, latent)
    if not bool(step.isfinite().all()):
        raise ExportError(f"a step of the weights of {name!r} is not finite; the training diverged")
    transposed = isinstance(layer, TRANSPOSED)
    bias = layer.bias
    if norm is not None:
        gain = (norm.running_var + norm.eps).rsqrt() * (norm.weight if norm.affine else 1)
        shift = -norm.running_mean if bias is None else bias - norm.running_mean
        bias = shift * gain + (norm.bias if norm.affine else 0)
        step = step * gain.view(step.shape)
    sign = torch.where(step < 0, -1, 1)
    step = step.abs()
    # A runtime rounds each bias to a multiple of input_scale * step: the smaller a step the better.
    factor = sign * max(1, 64 // max(1, int(integers.abs().max())))
    step = step / factor.abs()
    whole = integers * factor
    too_long = whole.abs().amax(tuple(range(1, whole.ndim)), keepdim=True)
    if not transposed:  # of which there are no integer kernels
        over = (too_long / 127).clamp(min=1)
        whole, step = (whole / over).round(), step * over
        nothing = torch.zeros(len(step)) if bias is None else bias.detach().abs()
        # A bias has 32 bits. A channel below that, as one without any weight, is its bias alone.
        finest = nothing.view(step.shape) / (input_scale * 2**24)
        idle = (step * 2**6 < finest) | (too_long == 0) | (step == 0)
        step = torch.where(idle, finest.clamp(min=1e-30), step)
        step = torch.where(idle & (finest == 0), step.amax().clamp(min=1e-30), step)
        factor = factor * ~idle
        whole = whole * ~idle
    layer.requires_grad_(False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    weight = IntegerWeight(step.detach(), folded or transposed)
    fits = bool((whole == integers * factor).all()) and whole.abs().max() <= 127
    if quantizer.bit_width < 8 and fits and whole.numel() <= PACKED_AT_MOST:
        qmin, _ = integer_range(quantizer.bit_width, quantizer.scheme, signed=True)
        weight.zero_points = zero_points - qmin
        weight.levels = integers + weight.zero_points
        weight.factor, weight.bit_width = factor, quantizer.bit_width
    dtype = torch.int8 if whole.abs().max() <= 127 else torch.int16
    # In its place: a copy shares its class with the student, whose weight would go with this one's.
    layer.parametrizations.weight[0] = weight
    layer.parametrizations.weight.original = nn.Parameter(whole.to(dtype), requires_grad=False)
    return layer


def integers_of(quantizer: WeightQuantizer, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(q - zero_point, zero_point, step): a student's weight is step * the first."""
    step, zero_points = quantizer.scale_and_zero_point(latent)
    if quantizer.transposed_groups == 1:
        step, zero_points = step[:1], zero_points[:1]
    qmin, qmax = integer_range(quantizer.bit_width, quantizer.scheme, signed=True)
    steps = (latent / step).round()
    return steps.clamp(qmin - zero_points, qmax - zero_points), zero_points, step
