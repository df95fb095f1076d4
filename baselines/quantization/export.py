"""From a student to an ONNX file that runs in integers.

student -> every tensor on a grid of uint8 (:class:`Grid`), ReLUs in its bounds
        -> weights as int8 with a step a channel (:class:`IntegerWeight`)
        -> QuantizeLinear, DequantizeLinear around each layer, which runtimes run in integers
        -> weights on disk as bit planes, unpacked by the file itself

:func:`deployed` is the same in torch, an oracle for the file.
"""

import copy
import logging
import math
import operator
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from baselines.errors import ExportError
from baselines.quantization import checkpoint
from baselines.quantization.batch_norms import NormalisedConv
from baselines.quantization.graph import TRANSPOSED, bypass, called, cleaned
from baselines.quantization.placement import (
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

OPSET = 18
ARITHMETICS = ("integer", "float")
PACKED_AT_MOST = 2**21  # weights of a layer; more take seconds to unpack when a file is loaded
_JOINING = (
    torch.add, torch.sub, torch.mul, torch.div, torch.cat, torch.stack,
    operator.add, operator.sub, operator.mul, operator.truediv,
)  # fmt: skip
_JOINING_METHODS = ("add", "sub", "mul", "div")
_INSTALL = "pip install -e '.[export]'"


class Grid(nn.Module):
    """x -> scale * (clamp(round(x / scale) + zero_point, lower, upper) - zero_point), q in uint8.

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
    """Parametrization of a layer whose weight is int8: -> step * integers.

    The integers are ``factor * (levels - zero_points)``, the levels being the student's, from 0 on.

    Attributes:
        step: of each channel, > 0, in a shape that broadcasts against the weight.
        levels, zero_points, bit_width: None where the integers are stored as they are.
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


def deployed(
    model: fx.GraphModule, images: Tensor | None = None, *, arithmetic: str = "integer"
) -> fx.GraphModule:
    """What the file of :func:`export_onnx` computes, in torch: float32 on the CPU, in eval mode.

    Args:
        model: a student; untouched.
        images: (N, C, s, s), normalised as the teacher's. With them, what layers, sums and averages
            give gets a grid of 8 bits over the range that is seen there, where the student has
            none. Without them no grid is added and the logits are the student's.
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
    if not isinstance(model, fx.GraphModule) or "config" not in model.meta:
        raise ExportError(
            f"expected a quantized network, got {type(model).__name__}; give what quantize() "
            "returns as .model, or what load_quantized reads"
        )
    shape = model.meta["image_shape"]
    if images is not None and (
        images.ndim != 4 or not len(images) or tuple(images.shape[1:]) != tuple(shape)
    ):
        raise ExportError(f"expected images (N, {', '.join(map(str, shape))}), N >= 1, got "
                          f"{tuple(images.shape)}")  # fmt: skip
    if images is not None and not bool(images.isfinite().all()):
        raise ExportError("the images must be finite, some of their values are not")


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


def _is_grid(network: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(called(network, node), Grid)


def _before_grid(network: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The node itself, or the ReLU that alone reads it, which a grid does too."""
    users = list(node.users)
    return users[0] if len(users) == 1 and is_relu(network, users[0]) else node


def _has_grid(network: fx.GraphModule, node: fx.Node) -> bool:
    return all(_is_grid(network, user) for user in _before_grid(network, node).users)


def _add_grids(network: fx.GraphModule, images: Tensor) -> None:
    """8 bits for all that layers read and give, and that is added, averaged or concatenated."""
    nodes, weighted = list(network.graph.nodes), weighted_nodes(network)
    given, before = of_images_alone(network), _before_layers(network)
    places: dict[fx.Node, None] = {}
    for node in nodes:
        name = getattr(node.target, "__name__", node.target)
        joins = (node.op == "call_function" and node.target in _JOINING) or (
            node.op == "call_method" and name in _JOINING_METHODS
        )
        if node in weighted:
            source = maker(network, node.all_input_nodes[0])
            if not _is_grid(network, source):
                places[source] = None
        if node not in before or node in given or not node.meta.get("is_tensor", True):
            continue
        if (node in weighted or joins or is_average(network, node)) and not _has_grid(
            network, node
        ):
            places[_before_grid(network, node)] = None
    ranges = _Ranges(network, places)
    ranges.run(images)
    for node, (low, high) in ranges.seen.items():
        scale, zero_point = scale_and_zero_point(low, high, 8, "asymmetric", signed=False)
        name = f"{node.name}_grid"
        network.add_submodule(name, Grid(scale, int(zero_point), 0, 255, False))
        with network.graph.inserting_after(node):
            grid = network.graph.call_module(name, (node,))
        node.replace_all_uses_with(grid, delete_user_cb=lambda user, grid=grid: user is not grid)
    network.recompile()


def _before_layers(network: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose values reach a layer with weights."""
    found: set[fx.Node] = set()
    todo = [source for node in weighted_nodes(network) for source in node.all_input_nodes]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


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
        if n in self.places:
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
        readers = [
            u for u in node.users if not (is_transparent(network, u) or _is_grid(network, u))
        ]
        if not _is_grid(network, source) or not readers:
            continue
        with network.graph.inserting_after(node):
            again = network.graph.call_module(str(source.target), (node,))
        for reader in readers:
            reader.replace_input_with(node, again)


def _fold_relus(network: fx.GraphModule) -> None:
    """round(clamp(x)) = clamp(round(x)) with rounded ends: grids do what ReLUs before them do."""
    for node in list(network.graph.nodes):
        users = list(node.users)
        if not is_relu(network, node) or len(users) != 1 or not _is_grid(network, users[0]):
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
        idle = (step * 2**6 < finest) | (too_long == 0)
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


@dataclass
class Exported:
    """What is in a file; ``str()`` is a table.

    Attributes:
        bytes: of the file.
        float_bytes: of the network's weights and biases in float32, without any graph.
        rows: (layer, bits of its weights, "integer" or "float", why it is not integer).
    """

    path: Path
    bytes: int
    float_bytes: int
    rows: list[tuple[str, str, str, str]]

    @property
    def integer_layers(self) -> int:
        """How many layers have integers on all sides, as an integer kernel needs."""
        return sum(row[2] == "integer" for row in self.rows)

    def __str__(self) -> str:
        rows = [("layer", "bits", "runs in", ""), *self.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in rows
        ]
        lines.append(
            f"{self.path}: {self.bytes} bytes, {self.float_bytes / self.bytes:.2f}x smaller than "
            f"{self.float_bytes} bytes of float32; {self.integer_layers} of {len(self.rows)} "
            "layers run in integers"
        )
        return "\n".join(lines)


def export_onnx(
    model: fx.GraphModule,
    path: str | Path,
    images: Tensor | None = None,
    *,
    arithmetic: str = "integer",
) -> Exported:
    """Write a student as an ONNX file (opset 18, any batch size) that runtimes run in integers.

    Input ``images``, float32 (N, C, s, s) normalised as the teacher's; output ``logits``, (N, C).
    See :func:`deployed` for ``images`` and ``arithmetic``: ``"integer"`` is made of QuantizeLinear
    and DequantizeLinear, which ONNX Runtime and OpenVINO turn into integer kernels; ``"float"`` of
    the same integers with Cast and Mul, which no runtime rewrites.

    Weights of b < 8 bits take b bits on disk, and int8 in memory.

    Raises:
        ExportError: see :func:`deployed`; or onnx and onnxscript are not installed.
        CheckpointError: the file cannot be written; one that was there is intact.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ExportError(f"{str(path)!r} is in no folder; make the folder first")
    network = deployed(model, images, arithmetic=arithmetic)
    proto = _proto(network)
    _pack(proto, network)
    _strip(proto)
    data = proto.SerializeToString()
    checkpoint.write(path, data)
    rows = _rows(model, network)
    layers = {id(m): m for m in map(lambda n: weighted_layer(network, n), weighted_nodes(network))}
    size = sum(
        m.weight.numel() + (0 if m.bias is None else m.bias.numel()) for m in layers.values()
    )
    return Exported(path, len(data), 4 * size, rows)


def float_onnx(network: nn.Module, image_shape: tuple[int, int, int]) -> bytes:
    """A network in full precision as an ONNX file, to compare sizes and times with."""
    network = copy.deepcopy(network).cpu().float().eval()
    proto = _proto(network, image_shape)
    _strip(proto)
    return proto.SerializeToString()


def lacking() -> str | None:
    """Why no file can be written on this machine, in one line; None if one can."""
    if not hasattr(torch.onnx, "ops"):
        return f"torch {torch.__version__} has no torch.onnx.ops; install torch >= 2.8"
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    return f"an ONNX file needs {', '.join(missing)}: {_INSTALL}" if missing else None


def _proto(network: nn.Module, image_shape: tuple[int, int, int] | None = None) -> Any:
    if why := lacking():
        raise ExportError(why)
    shape = image_shape or network.meta["image_shape"]
    levels = {n: logging.getLogger(n).level for n in ("torch.onnx", "onnxscript", "onnx_ir")}
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network, (torch.zeros(2, *shape),), dynamo=True, verbose=False, opset_version=OPSET,
                input_names=["images"], output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )  # fmt: skip
        return program.model_proto
    except Exception as error:  # whatever the exporter may meet
        why = str(error).splitlines()[0] if str(error) else ""
        raise ExportError(
            f"torch.onnx.export fails on this network ({type(error).__name__}: {why})"
        ) from error
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _pack(proto: Any, network: fx.GraphModule) -> None:
    """Put bit planes and the nodes that unpack them in the place of weights of few bits."""
    graph = proto.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    builder = _Builder(graph)
    for name, module in network.named_modules():
        parametrizations = getattr(module, "parametrizations", None)
        if parametrizations is None:
            continue
        weight = parametrizations.weight[0]
        tensor = stored.get(f"{name}.parametrizations.weight.original")
        if tensor is None or weight.levels is None:
            continue
        builder.unpack(name, weight, tensor.name, module.parametrizations.weight.original.dtype)
        graph.initializer.remove(tensor)
    nodes = [*builder.nodes, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


class _Builder:
    """Adds nodes and constants to a graph."""

    def __init__(self, graph: Any) -> None:
        self.graph, self.nodes, self.constants = graph, [], set()

    def constant(self, name: str, value: Tensor) -> str:
        import onnx

        if name not in self.constants:
            self.constants.add(name)
            self.graph.initializer.append(onnx.numpy_helper.from_array(value.numpy(), name))
        return name

    def call(self, kind: str, name: str, *inputs: str, **attributes: Any) -> str:
        import onnx

        self.nodes.append(onnx.helper.make_node(kind, inputs, [name], **attributes))
        return name

    def unpack(self, name: str, weight: IntegerWeight, result: str, dtype: torch.dtype) -> None:
        """In int32: 64-bit shifts are wrong in OpenVINO, and no runtime has 8-bit arithmetic."""
        import onnx

        levels, b = weight.levels, weight.bit_width
        count, int32 = levels.numel(), onnx.TensorProto.INT32
        x = self.constant(f"{name}.bits", bit_planes(levels, b))
        x = self.call("Cast", f"{name}.0", x, to=int32)
        powers = self.constant("powers", 2 ** torch.arange(8, dtype=torch.int32))
        x = self.call("Div", f"{name}.1", x, powers)
        x = self.call("Mod", f"{name}.2", x, self.constant("two", torch.tensor(2).int()))
        places = 2 ** torch.arange(b, dtype=torch.int32).view(b, 1, 1)
        x = self.call("Mul", f"{name}.3", x, self.constant(f"places{b}", places))
        axis = self.constant("axis", torch.tensor([0]))
        x = self.call("ReduceSum", f"{name}.4", x, axis, keepdims=0)
        if count % 8:
            flat = self.constant("flat", torch.tensor([-1]))
            x = self.call("Reshape", f"{name}.5", x, flat)
            end = self.constant(f"end{count}", torch.tensor([count]))
            x = self.call("Slice", f"{name}.6", x, axis, end)
        shape = "shape" + "x".join(map(str, levels.shape))
        shape = self.constant(shape, torch.tensor(levels.shape))
        x = self.call("Reshape", f"{name}.7", x, shape)
        x = self.call("Sub", f"{name}.8", x, self._small(f"{name}.zero", weight.zero_points))
        x = self.call("Mul", f"{name}.9", x, self._small(f"{name}.factor", weight.factor))
        to = onnx.TensorProto.INT8 if dtype == torch.int8 else onnx.TensorProto.INT16
        self.call("Cast", result, x, to=to)

    def _small(self, name: str, values: Tensor) -> str:
        """Numbers of 8 bits as int32, one for all where they are the same."""
        import onnx

        first = int(values.flatten()[0])
        if bool((values == first).all()):
            return self.constant(f"int{first}", torch.tensor(first).int())
        small = self.constant(name, values.to(torch.int8))
        return self.call("Cast", f"{name}.0", small, to=onnx.TensorProto.INT32)


def bit_planes(levels: Tensor, bit_width: int) -> Tensor:
    """(b, ceil(n / 8), 1) uint8: bit j of eight levels is a byte of plane j, the first lowest."""
    flat = F.pad(levels.flatten().to(torch.uint8), (0, -levels.numel() % 8)).view(-1, 8).int()
    planes = [(flat >> j & 1) << torch.arange(8) for j in range(bit_width)]
    return torch.stack(planes).sum(2, keepdim=True).to(torch.uint8)


def _strip(proto: Any) -> None:
    """Take out what only the exporter knows, and give short names to what lies between."""
    graph = proto.graph
    kept = {value.name for value in (*graph.input, *graph.output, *graph.initializer)} | {""}
    names: dict[str, str] = {}
    del graph.value_info[:], graph.metadata_props[:], proto.metadata_props[:]
    graph.name, proto.producer_name, proto.producer_version, graph.doc_string = (
        "student",
        "",
        "",
        "",
    )
    for tensor in graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    for node in graph.node:
        node.ClearField("name")
        node.ClearField("doc_string")
        del node.metadata_props[:]
        for values in (node.input, node.output):
            for i, value in enumerate(values):
                if value not in kept:
                    values[i] = names.setdefault(value, f"v{len(names)}")


def _rows(model: fx.GraphModule, network: fx.GraphModule) -> list[tuple[str, str, str, str]]:
    """Of each call of a layer."""
    before, rows = _before_layers(network), []
    bits = {
        str(n.target): next(
            m.bit_width
            for m in weighted_layer(model, n).modules()
            if isinstance(m, WeightQuantizer)
        )
        for n in weighted_nodes(model)
    }
    for node in weighted_nodes(network):
        layer, why = called(network, node), ""
        if layer.parametrizations.weight[0].folded:
            why = "runtimes have no integer kernel for it" if isinstance(layer, TRANSPOSED) else (
                "arithmetic='float'")  # fmt: skip
        elif not _is_grid(network, node.all_input_nodes[0]):
            why = f"it reads {maker(network, node.all_input_nodes[0]).name!r} in floating point"
        elif node in before and not _has_grid(network, node):
            why = "what it gives stays in floating point; export with images"
        rows.append(
            (str(node.target), str(bits[str(node.target)]), "float" if why else "integer", why)
        )
    return rows
