"""From a trained network to its quantized copy: torch.fx finds the tensors, a policy lists them."""

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from baselines.errors import UnsupportedLayerError
from baselines.quantization.batch_norms import (
    BATCH_NORMS,
    CONVOLUTIONS,
    NormalisedConv,
    bypass,
    called,
    cleaned,
    fold,
    normalised_convolutions,
    traced,
)
from baselines.quantization.quantizers import (
    RANGE_ESTIMATORS,
    SCHEMES,
    STES,
    ActivationQuantizer,
    WeightQuantizer,
    check_bits,
    check_choice,
)

WEIGHTED = (*CONVOLUTIONS, nn.Linear)
RELUS = (nn.ReLU, nn.ReLU6)
RELU_FUNCTIONS = (F.relu, F.relu6, F.relu_, torch.relu, torch.relu_)
RELU_METHODS = ("relu", "relu_")
# Values pass through these as they are, so a quantized tensor stays one.
TRANSPARENT = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.Flatten, nn.Identity, nn.Dropout)
TRANSPARENT_FUNCTIONS = (
    torch.flatten, F.max_pool2d, F.dropout, F.pad, operator.getitem, torch.reshape, torch.squeeze,
    torch.chunk, torch.split, torch.transpose, torch.permute, torch.cat, torch.stack,
)  # fmt: skip
TRANSPARENT_METHODS = (
    "flatten", "view", "reshape", "contiguous", "squeeze", "chunk", "split", "transpose", "permute",
)  # fmt: skip
SUMS = (operator.add, operator.iadd, torch.add)
AVERAGES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool1d)
# Activation functions without a quantizer here: leaving them in floating point would go unseen.
FOREIGN_ACTIVATIONS = (
    nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU,
    nn.CELU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardtanh, nn.RReLU, nn.Threshold,
    nn.Softsign, nn.LogSigmoid, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.GLU,
)  # fmt: skip
FOREIGN_FUNCTIONS = {
    "silu", "gelu", "hardswish", "hardsigmoid", "leaky_relu", "prelu", "elu", "selu", "celu",
    "mish", "sigmoid", "tanh", "softplus", "hardtanh", "rrelu", "threshold", "softsign",
    "logsigmoid", "tanhshrink", "softshrink", "hardshrink", "glu", "clamp", "clamp_", "clamp_min",
    "clamp_max", "clip", "maximum", "minimum", "conv1d", "conv2d", "conv3d", "linear",
    "conv_transpose2d", "matmul", "bmm", "einsum", "scaled_dot_product_attention",
}  # fmt: skip


@dataclass(frozen=True)
class QuantizationConfig:
    """How the student is quantized.

    Args:
        weight_bits, act_bits: 2 to 8.
        scheme: ``"asymmetric"`` or ``"symmetric"`` weights.
        ste: straight-through gradient of the activations, ``"identity"`` or ``"clipped"``.
        range_estimator: of the activations, ``"max"``, ``"percentile"`` or ``"mse"``.
        edge_bits: bits for the first and last layer's weights and the last layer's input, or None
            to treat them as the others.
        fold_batch_norm: fold each BatchNorm into the convolution before it.
    """

    weight_bits: int = 3
    act_bits: int = 3
    scheme: str = "asymmetric"
    ste: str = "identity"
    range_estimator: str = "max"
    edge_bits: int | None = None
    fold_batch_norm: bool = False

    def __post_init__(self) -> None:
        check_bits("weight_bits", self.weight_bits)
        check_bits("act_bits", self.act_bits)
        if self.edge_bits is not None:
            check_bits("edge_bits", self.edge_bits)
        check_choice("scheme", self.scheme, SCHEMES)
        check_choice("ste", self.ste, STES)
        check_choice("range_estimator", self.range_estimator, RANGE_ESTIMATORS)


@dataclass
class BitPolicy:
    """What is quantized how, and what stays in floating point; ``str()`` is a table."""

    rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    def add(self, tensor: str, kind: str, bits: str, detail: str) -> None:
        self.rows.append((tensor, kind, bits, detail))

    def __str__(self) -> str:
        rows = [("tensor", "kind", "bits", "how"), *self.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)


def build_student(
    teacher: nn.Module, config: QuantizationConfig
) -> tuple[fx.GraphModule, BitPolicy]:
    """A quantized copy of ``teacher`` in eval mode, and its bit policy.

    Weights of Conv and Linear are quantized per output channel by a parametrization; an activation
    quantizer follows every ReLU or ReLU6 *call*, so a module used twice gets two ranges.

    Raises:
        UnsupportedLayerError: naming what cannot be traced or quantized. ``teacher`` is untouched.
    """
    student = traced(teacher)
    _refuse_unsupported(student)
    if config.fold_batch_norm:
        _fold_batch_norms(student)
    policy = BitPolicy()
    _quantize_weights(student, config, policy)
    _quantize_activations(student, config, policy)
    _list_floating_point(student, policy)
    _join_batch_norms(student)
    return cleaned(student), policy


def _refuse_unsupported(student: fx.GraphModule) -> None:
    weighted = 0
    for node in student.graph.nodes:
        module, name = called(student, node), str(node.target)
        kind = (
            type(module).__name__ if module is not None else getattr(node.target, "__name__", name)
        )
        if node.op == "get_attr" and isinstance(_attribute(student, name), nn.Parameter):
            raise UnsupportedLayerError(
                f"parameter {name!r} is used outside of a layer; only the weights of Conv and "
                "Linear modules can be quantized"
            )
        what = repr(kind) if module is None else f"{name!r} ({kind})"
        foreign = node.op in ("call_function", "call_method") and kind in FOREIGN_FUNCTIONS
        if foreign or (isinstance(module, FOREIGN_ACTIVATIONS) and not isinstance(module, RELUS)):
            raise UnsupportedLayerError(
                f"{what} cannot be quantized: activations must be ReLU or ReLU6, and "
                "weights must belong to Conv or Linear modules; replace it and fine-tune first"
            )
        if isinstance(module, WEIGHTED):
            weighted += 1
        elif (
            module is not None
            and not isinstance(module, BATCH_NORMS)
            and any(True for _ in module.parameters())
        ):
            raise UnsupportedLayerError(
                f"layer {name!r} ({kind}) has weights that cannot be quantized; supported are "
                "Conv1d/2d/3d, Linear and BatchNorm"
            )
    if not weighted:
        raise UnsupportedLayerError("the network has no Conv or Linear module to quantize")


def _attribute(student: fx.GraphModule, target: str) -> Any:
    value: Any = student
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _fold_batch_norms(student: fx.GraphModule) -> None:
    """conv -> BatchNorm becomes one conv with weights of its own; exact in eval mode."""
    for source, node in normalised_convolutions(student):
        fold(called(student, source), called(student, node))
        bypass(student, node, source)


def _join_batch_norms(student: fx.GraphModule) -> None:
    """conv -> BatchNorm becomes one :class:`NormalisedConv`; the parameters stay what they are."""
    for source, node in normalised_convolutions(student):
        joined = NormalisedConv(called(student, source), called(student, node))
        student.set_submodule(str(source.target), joined)
        bypass(student, node, source)


def _quantize_weights(
    student: fx.GraphModule, config: QuantizationConfig, policy: BitPolicy
) -> None:
    names = [n.target for n in student.graph.nodes if isinstance(called(student, n), WEIGHTED)]
    for name in dict.fromkeys(names):
        edge = config.edge_bits is not None and name in (names[0], names[-1])
        bits = config.edge_bits if edge else config.weight_bits
        assert bits is not None
        module = student.get_submodule(name)
        shape = "x".join(map(str, module.weight.shape))
        parametrize.register_parametrization(module, "weight", WeightQuantizer(bits, config.scheme))
        policy.add(f"{name}.weight", "weight", str(bits), f"{shape}, per channel, {config.scheme}")


def _is_relu(student: fx.GraphModule, node: fx.Node) -> bool:
    return (
        isinstance(called(student, node), RELUS)
        or (node.op == "call_function" and node.target in RELU_FUNCTIONS)
        or (node.op == "call_method" and node.target in RELU_METHODS)
    )


def _quantize_activations(
    student: fx.GraphModule, config: QuantizationConfig, policy: BitPolicy
) -> None:
    relus = [node for node in student.graph.nodes if _is_relu(student, node)]
    if not relus:
        raise UnsupportedLayerError(
            "the network has no ReLU or ReLU6, so none of its activations could be quantized"
        )
    _refuse_hidden_writes(student, relus)
    last = [n for n in student.graph.nodes if isinstance(called(student, n), WEIGHTED)][-1]
    before_last = _sources(student, last.all_input_nodes[0], through_averages=True)
    for node in relus:
        edge = config.edge_bits is not None and node in before_last
        bits = config.edge_bits if edge else config.act_bits
        assert bits is not None
        name = f"{node.name}_quantizer"
        student.add_submodule(
            name, ActivationQuantizer(bits, ste=config.ste, range_estimator=config.range_estimator)
        )
        with student.graph.inserting_after(node):
            quantized = student.graph.call_module(name, (node,))
        node.replace_all_uses_with(
            quantized, delete_user_cb=lambda user, q=quantized: user is not q
        )
        how = f"per tensor, unsigned, {config.range_estimator} range, {config.ste} gradient"
        policy.add(node.name, "activation", str(bits), how)


def _refuse_hidden_writes(student: fx.GraphModule, relus: list[fx.Node]) -> None:
    """An in-place ReLU changes its input too, and no quantizer would see who reads that."""
    position = {node: i for i, node in enumerate(student.graph.nodes)}
    for node in relus:
        in_place = (
            getattr(called(student, node), "inplace", False)
            or node.kwargs.get("inplace", False)
            or node.target in (F.relu_, torch.relu_, "relu_")
        )
        source = node.all_input_nodes[0]
        if in_place and any(position[user] > position[node] for user in source.users):
            raise UnsupportedLayerError(
                f"the input of the in-place ReLU {node.name!r} is used again after it; use its "
                "result instead, or a ReLU that is not in place"
            )


def _sources(
    student: fx.GraphModule, value: fx.Node, *, through_averages: bool = False
) -> list[fx.Node]:
    """The nodes whose values are those of ``value``, however rearranged."""
    passing = TRANSPARENT + (AVERAGES if through_averages else ())
    if value.all_input_nodes and (
        isinstance(called(student, value), passing)
        or (value.op == "call_function" and value.target in TRANSPARENT_FUNCTIONS)
        or (value.op == "call_method" and value.target in TRANSPARENT_METHODS)
        or (value.target is F.avg_pool2d and value.args[1:2] == (1,))  # of one value each
        or (through_averages and _is_average(student, value))
    ):
        joined = value.target in (torch.cat, torch.stack)
        inputs = value.all_input_nodes if joined else value.all_input_nodes[:1]
        found = [_sources(student, i, through_averages=through_averages) for i in inputs]
        return [node for nodes in found for node in nodes]
    return [value]


def _is_average(student: fx.GraphModule, node: fx.Node) -> bool:
    return (
        isinstance(called(student, node), AVERAGES)
        or (node.op == "call_function" and "avg_pool" in getattr(node.target, "__name__", ""))
        or (node.op in ("call_method", "call_function") and "mean" in str(node.target))
    )


def _list_floating_point(student: fx.GraphModule, policy: BitPolicy) -> None:
    """What enters a weighted layer or a sum and that no quantizer has seen."""
    listed: set[fx.Node] = set()
    for node in student.graph.nodes:
        is_sum = node.op == "call_function" and node.target in SUMS
        weighted = isinstance(called(student, node), WEIGHTED)
        inputs = node.all_input_nodes if is_sum else node.all_input_nodes[:1] if weighted else ()
        for source in (s for value in inputs for s in _sources(student, value)):
            if source in listed:
                continue
            why = _why_floating_point(student, source)
            if why is not None:
                listed.add(source)
                policy.add(source.name, "activation", "float", why)
    policy.add("biases, BatchNorm, logits", "other", "float", "not quantized")


def _why_floating_point(student: fx.GraphModule, node: fx.Node) -> str | None:
    module = called(student, node)
    if isinstance(module, ActivationQuantizer):
        return None
    if node.op == "placeholder":
        return "the input image"
    if node.op == "call_function" and node.target in SUMS:
        return "sum after a residual add"
    if isinstance(module, (*WEIGHTED, *BATCH_NORMS)):
        return "output without a ReLU (linear bottleneck or residual branch)"
    if _is_average(student, node):
        return "average"
    return "no ReLU between it and the next layer"


def image_channels(network: nn.Module) -> int | None:
    """Those of the first convolution that ``network`` runs; None if it has none."""
    graph = traced(network)
    modules = (called(graph, node) for node in graph.graph.nodes)
    return next((m.in_channels for m in modules if isinstance(m, CONVOLUTIONS)), None)


def check_logits_shape(logits: Tensor) -> int:
    """The number of classes of (N, C) logits."""
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UnsupportedLayerError(f"the network must return logits (N, C), got {got}")
    return logits.shape[1]
