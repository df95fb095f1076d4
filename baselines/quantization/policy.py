"""How a network is to be quantized, and the table of what is."""

from dataclasses import dataclass, field

from torch import fx, nn

from baselines.errors import ConfigError
from baselines.quantization.graph import called
from baselines.quantization.placement import is_quantizer, maker, weighted_layer, weighted_nodes
from baselines.quantization.quantizers import (
    RANGE_ESTIMATORS,
    SCHEMES,
    STES,
    ActivationQuantizer,
    WeightQuantizer,
    check_bits,
    check_choice,
)

PLACEMENTS = ("inputs", "relu")


@dataclass(frozen=True)
class QuantizationConfig:
    """How the student is quantized.

    Args:
        weight_bits, act_bits: 2 to 8 (default 3).
        activations: ``"inputs"``, every tensor that a Conv or Linear reads, once, where it is made
            (the default); or ``"relu"``, what comes out of a ReLU or ReLU6 alone, as published.
        scheme: ``"asymmetric"`` (default), or ``"symmetric"``: all zero points are 0.
        ste: straight-through gradient of the activations, ``"identity"`` (default) or
            ``"clipped"``; see :func:`baselines.quantization.quantizers.fake_quantize`.
        range_estimator: of the activations, ``"max"`` (default), ``"percentile"`` or ``"mse"``.
        learned_steps: train the activations' step sizes with the weights, from the observed ones on
            (needs the clipped gradient; default False).
        edge_bits: bits of the first and last layers' weights and of the last layers' input, and
            with ``"inputs"`` of the image and of averages. None (default): the weights as the
            others', with ``"inputs"`` 8 bits for these activations, with ``"relu"`` as the others'.
        fold_batch_norm: fold each BatchNorm into the convolution before it (default False).

    Raises:
        ConfigError: one of them is unknown or out of range.
    """

    weight_bits: int = 3
    act_bits: int = 3
    activations: str = "inputs"
    scheme: str = "asymmetric"
    ste: str = "identity"
    range_estimator: str = "max"
    learned_steps: bool = False
    edge_bits: int | None = None
    fold_batch_norm: bool = False

    def __post_init__(self) -> None:
        check_bits("weight_bits", self.weight_bits)
        check_bits("act_bits", self.act_bits)
        if self.edge_bits is not None:
            check_bits("edge_bits", self.edge_bits)
        check_choice("activations", self.activations, PLACEMENTS)
        check_choice("scheme", self.scheme, SCHEMES)
        check_choice("ste", self.ste, STES)
        check_choice("range_estimator", self.range_estimator, RANGE_ESTIMATORS)
        if self.learned_steps and self.ste != "clipped":
            raise ConfigError(
                f"learned steps need the gradient of ste='clipped', got ste={self.ste!r}"
            )


@dataclass
class BitPolicy:
    """What is quantized how, and what weighted layers read in floating point.

    ``str()`` is a table; its last line counts the latter.

    Attributes:
        rows: (tensor, kind, bits, how).
        read, floating: how many activations weighted layers read, and how many of them are left in
            floating point.
        beside: the parameters that are left in floating point as well.
    """

    rows: list[tuple[str, str, str, str]] = field(default_factory=list)
    read: int = 0
    floating: int = 0
    beside: str = "biases and BatchNorms"

    def __str__(self) -> str:
        lines = aligned([("tensor", "kind", "bits", "how"), *self.rows])
        left = f"left in floating point: {self.floating} of {self.read} tensors that layers read"
        return "\n".join([*lines, f"{left}; {self.beside}"])


def aligned(rows: list[tuple[str, str, str, str]]) -> list[str]:
    """A table's lines, the last column as it is."""
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return [
        "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    ]


def bit_policy(student: fx.GraphModule) -> BitPolicy:
    """The table of a student; signs are known once its ranges were observed."""
    policy, weighted = BitPolicy(), weighted_nodes(student)
    for name, node in {str(node.target): node for node in weighted}.items():
        policy.rows.append((f"{name}.weight", "weight", *_weight(weighted_layer(student, node))))
    read = dict.fromkeys(maker(student, node.all_input_nodes[0]) for node in weighted)
    for node in student.graph.nodes:
        if is_quantizer(student, node):
            q = called(student, node)
            steps = "" if q.log_gain is None else ", learned step"
            how = f"per tensor, {_sign(q)}, {q.range_estimator} range{steps}, {q.ste} gradient"
            row = (node.all_input_nodes[0].name, "activation", str(q.bit_width), how)
            policy.rows.append(row)
        elif node in read:
            policy.rows.append((node.name, "activation", "float", "not behind a ReLU"))
            policy.floating += 1
    policy.read = len(read)
    if any(isinstance(module, nn.PReLU) for module in student.modules()):
        policy.beside = "biases, BatchNorms and the slopes of PReLUs"
    return policy


def _weight(layer: nn.Module) -> tuple[str, str]:
    (quantizer,) = (m for m in layer.modules() if isinstance(m, WeightQuantizer))
    shape = "x".join(map(str, layer.weight.shape))
    return str(quantizer.bit_width), f"{shape}, per channel, {quantizer.scheme}"


def _sign(quantizer: ActivationQuantizer) -> str:
    if not quantizer.batches and not quantizer.nonnegative:
        return "sign not yet seen"
    _, _, zero_point = quantizer.bounds()
    if quantizer.signed:
        return "signed"
    return f"unsigned, zero point {zero_point}" if zero_point else "unsigned"
