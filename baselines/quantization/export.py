"""From a student to an ONNX file that runs in integers.

student -> integers in torch (:func:`baselines.quantization.integers.deployed`)
        -> QuantizeLinear, DequantizeLinear around each layer, which runtimes run in integers
        -> weights on disk as bit planes, unpacked by the file itself
"""

import copy
import logging
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from baselines.defaults import torch_defaults
from baselines.errors import ExportError
from baselines.quantization import checkpoint
from baselines.quantization.graph import TRANSPOSED, called, check_quantized
from baselines.quantization.integers import IntegerWeight, deployed, has_grid, is_grid
from baselines.quantization.placement import (
    before_layers,
    maker,
    weighted_layer,
    weighted_nodes,
)
from baselines.quantization.policy import aligned
from baselines.quantization.quantizers import WeightQuantizer

OPSET = 18
_INSTALL = "pip install -e '.[export]'"


@dataclass
class Exported:
    """What is in a file; ``str()`` is a table.

    Attributes:
        bytes: of the file.
        float_bytes: of the network's weights and biases in float32, without any graph.
        rows: (layer, bits of its weights, "integer" or "float", why it is not integer).
        difference: of its logits, as :func:`deployed` computes them, to the student's: relative to
            the largest one, that of an image is the largest over its classes, this the median over
            images.
    """

    path: Path
    bytes: int
    float_bytes: int
    rows: list[tuple[str, str, str, str]]
    difference: float

    @property
    def integer_layers(self) -> int:
        """How many layers have integers on all sides, as an integer kernel needs."""
        return sum(row[2] == "integer" for row in self.rows)

    def __str__(self) -> str:
        lines = aligned([("layer", "bits", "runs in", ""), *self.rows])
        lines.append(
            f"{self.path}: {self.bytes} bytes, {self.bytes / self.float_bytes:.2f} of float32's "
            f"{self.float_bytes}; {self.integer_layers} of {len(self.rows)} layers run in integers"
            f"; logits differ from the student's by {self.difference:.1%} of the largest"
        )
        return "\n".join(lines)


@torch_defaults()
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

    Weights of b < 8 bits take b bits on disk (in layers of more than 2^21, which would take seconds
    to unpack, 8), and int8 in memory.

    Raises:
        ExportError: see :func:`deployed`; or onnx and onnxscript are not installed; or ONNX
            Runtime, where it is installed, does not take the file or computes something else.
        CheckpointError: the file cannot be written there; one that was there is intact.
    """
    check_quantized(model, ExportError)
    path = checkpoint.as_path(path)
    checkpoint.check_place(path)
    own = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    if taken := {"images", "logits"} & own:
        raise ExportError(
            f"the network has a tensor of the name {', '.join(taken)}, as the file's input and "
            "output are called; give it another name"
        )
    network = deployed(model, images, arithmetic=arithmetic)
    proto = _proto(network)
    _pack(proto, network)
    _strip(proto)
    data = proto.SerializeToString()
    if images is None:
        shape = network.meta["image_shape"]
        images = torch.randn(16, *shape, generator=torch.Generator().manual_seed(0))
    images = images[:16].detach().cpu().float()
    student = copy.deepcopy(model).cpu().float().eval()
    with torch.no_grad():
        logits = network(images)
        difference = _difference(logits, student(images))
    _check(data, images[:5], logits[:5])
    checkpoint.write(path, data)
    rows = _rows(model, network)
    layers = {weighted_layer(network, node) for node in weighted_nodes(network)}
    size = sum(m.weight.numel() + (0 if m.bias is None else m.bias.numel()) for m in layers)
    return Exported(path, len(data), 4 * size, rows, difference)


@torch_defaults()
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
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        why = str(cause).splitlines()[0] if str(cause) else ""
        raise ExportError(
            f"torch.onnx.export fails on this network ({type(cause).__name__}: {why})"
        ) from error
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _difference(logits: Tensor, wanted: Tensor) -> float:
    """Relative to the largest logit; a rounding that falls otherwise may change an image's logits,
    so it is their median that counts.
    """
    return float((logits - wanted).abs().amax(1).median() / wanted.abs().max())


def _check(data: bytes, images: Tensor, logits: Tensor) -> None:
    """Run the file once, unoptimised, against the logits of the integers in torch."""
    if find_spec("onnxruntime") is None:
        return
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        (given,) = session.run(None, {"images": images.numpy()})
    except Exception as error:  # whatever the runtime may meet
        raise ExportError(
            f"ONNX Runtime does not take the file ({type(error).__name__}: "
            f"{str(error).splitlines()[0]})"
        ) from error
    error = _difference(torch.from_numpy(given), logits)
    if not error <= 1e-2:
        raise ExportError(
            "the file that torch.onnx.export makes computes something else: its logits differ by "
            f"{error:.2g} of the largest; an option of one of its layers is lost on the way"
        )


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

        name = f"/{name}"  # as nothing of a module is called
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
    graph.name = "student"
    graph.doc_string = proto.producer_name = proto.producer_version = ""
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
                    values[i] = names.setdefault(value, f"/{len(names)}")


def _rows(model: fx.GraphModule, network: fx.GraphModule) -> list[tuple[str, str, str, str]]:
    """Of each call of a layer."""
    before, rows = before_layers(network), []
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
        elif not is_grid(network, node.all_input_nodes[0]):
            why = f"it reads {maker(network, node.all_input_nodes[0]).name!r} in floating point"
        elif not has_grid(network, node):
            why = "what it gives stays in floating point; export with images"
            if node not in before:
                why = "the logits stay in floating point"
        rows.append(
            (str(node.target), str(bits[str(node.target)]), "float" if why else "integer", why)
        )
    return rows
