"""From a traced network to its quantized copy."""

import copy
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from baselines.errors import UnsupportedLayerError
from baselines.quantization.batch_norms import NormalisedConv, fold, normalised_convolutions
from baselines.quantization.graph import (
    BATCH_NORMS,
    FUNCTIONS,
    TRANSPOSED,
    WEIGHTED,
    attribute,
    bypass,
    called,
    cleaned,
    free_name,
)
from baselines.quantization.placement import (
    is_average,
    is_relu,
    last_layers,
    maker,
    makers_before,
    of_images_alone,
    weighted_nodes,
)
from baselines.quantization.policy import QuantizationConfig
from baselines.quantization.quantizers import ActivationQuantizer, WeightQuantizer

EDGE_BITS = 8  # of the image, averages and the last layers' input


def build_student(network: fx.GraphModule, config: QuantizationConfig) -> fx.GraphModule:
    """A quantized copy of a traced network (:func:`baselines.quantization.tracing.traced`).

    Weights of Conv and Linear are quantized per output channel by a parametrization; an activation
    quantizer stands behind each *call* that makes what ``config.activations`` says, so a module
    used twice gets two ranges. ``student.meta["config"]`` is ``config``.

    Raises:
        UnsupportedLayerError: naming what cannot be quantized. ``network`` is untouched.
    """
    student = copy.deepcopy(network)
    _refuse_unsupported(student)
    if config.fold_batch_norm:
        for source, node in normalised_convolutions(student):
            fold(called(student, source), called(student, node))
            bypass(student, node, source)
    _quantize_weights(student, config)
    place = {"inputs": _places_of_inputs, "relu": _places_of_relus}[config.activations]
    for node, bits in place(student, config).items():
        _quantize_activation(student, config, node, bits)
    for source, node in normalised_convolutions(student):  # what was not folded
        joined = NormalisedConv(called(student, source), called(student, node))
        student.set_submodule(str(source.target), joined)
        bypass(student, node, source)
    student.meta["config"] = config
    return cleaned(student)


def _refuse_unsupported(student: fx.GraphModule) -> None:
    for node in student.graph.nodes:
        module, name = called(student, node), str(node.target)
        if node.op == "get_attr" and isinstance(attribute(student, name), nn.Parameter):
            users = ", ".join(repr(user.name) for user in node.users)
            raise UnsupportedLayerError(
                f"parameter {name!r} is used outside of a layer (by {users}); only the weights of "
                "Conv and Linear layers and of BatchNorms are supported: make it part of one"
            )
        if node.op == "call_function" and node.target in FUNCTIONS:
            raise UnsupportedLayerError(
                f"{node.name!r} ({node.target.__name__}) has weights that are computed from the "
                "images; only constant ones can be quantized"
            )
        if node.meta.get("product"):  # no layer's weight is in it, no quantizer would see it
            raise UnsupportedLayerError(
                f"{node.name!r} multiplies matrices outside of a layer, as attention does, and "
                "cannot be quantized; supported are networks of Conv, Linear and BatchNorm layers"
            )
        if module is None:
            continue
        known = isinstance(module, (*WEIGHTED, *BATCH_NORMS, nn.PReLU))
        own = [(key.rpartition(".")[2], value) for key, value in module.state_dict().items()]
        if (
            (not known and any(True for _ in module.parameters()))
            or any(p.is_complex() for p in module.parameters())
            # torch's own quantized layers pack their weights. A module may add what it likes.
            or any(not isinstance(v, Tensor) and k != "_extra_state" for k, v in own)
        ):
            kind = type(module)
            plain = getattr(nn, kind.__name__, kind) is kind  # no other class of such a name
            raise UnsupportedLayerError(
                f"layer {name!r} ({kind.__name__ if plain else kind}) has weights that cannot be "
                "quantized; supported are Conv (also transposed), Linear, BatchNorm and PReLU of "
                "real numbers; of a parallel or compiled layer give the module inside"
            )
    if not weighted_nodes(student):
        raise UnsupportedLayerError("the network has no Conv or Linear layer to quantize")


def _quantize_weights(student: fx.GraphModule, config: QuantizationConfig) -> None:
    names = [str(node.target) for node in weighted_nodes(student)]
    edges = {names[0], *(str(node.target) for node in last_layers(student))}
    for name in dict.fromkeys(names):
        edge = config.edge_bits is not None and name in edges
        bits: Any = config.edge_bits if edge else config.weight_bits
        module = student.get_submodule(name)
        groups = module.groups if isinstance(module, TRANSPOSED) else None
        quantizer = WeightQuantizer(bits, config.scheme, groups)
        parametrize.register_parametrization(module, "weight", quantizer)


def _places_of_inputs(student: fx.GraphModule, config: QuantizationConfig) -> dict[fx.Node, int]:
    """Behind which nodes to quantize with how many bits: all that weighted layers read."""
    images, last = of_images_alone(student), last_layers(student)
    edge = config.edge_bits or EDGE_BITS
    places = {}
    for node in weighted_nodes(student):
        source = maker(student, node.all_input_nodes[0])
        precise = source in images or is_average(student, source) or node in last
        places[source] = max(places.get(source, 0), edge if precise else config.act_bits)
    return places


def _places_of_relus(student: fx.GraphModule, config: QuantizationConfig) -> dict[fx.Node, int]:
    """Behind every ReLU; what enters the last layers may have other bits."""
    relus = [node for node in student.graph.nodes if is_relu(student, node)]
    if not relus:
        raise UnsupportedLayerError(
            "the network has no ReLU or ReLU6, so activations='relu' quantizes none of its "
            "activations; choose activations='inputs'"
        )
    last = set().union(*(makers_before(student, node) for node in last_layers(student)))
    edge = config.edge_bits or config.act_bits
    return {node: edge if node in last else config.act_bits for node in relus}


def _quantize_activation(
    student: fx.GraphModule, config: QuantizationConfig, node: fx.Node, bits: int
) -> None:
    name = free_name(student, f"{node.name}_quantizer")
    quantizer = ActivationQuantizer(
        bits,
        scheme=config.scheme,
        ste=config.ste,
        range_estimator=config.range_estimator,
        learned_steps=config.learned_steps,
        nonnegative=is_relu(student, node),
    )
    student.add_submodule(name, quantizer)
    with student.graph.inserting_after(node):
        quantized = student.graph.call_module(name, (node,))
    node.replace_all_uses_with(quantized, delete_user_cb=lambda user: user is not quantized)
