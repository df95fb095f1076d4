"""One form for every traced network: weights in torch's own layers, nothing done in place."""

import inspect
import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from baselines.quantization.graph import (
    FUNCTIONS,
    TRANSPOSED,
    argument,
    attribute,
    bypass,
    called,
    free_name,
)

_DROPOUTS = (nn.modules.dropout._DropoutNd, nn.Identity)
# torch.fx writes x += y as operator.iadd, which changes x itself.
_IN_PLACE = {getattr(operator, f"i{n}"): getattr(operator, n) for n in ("add", "sub", "mul")} | {
    operator.itruediv: operator.truediv
}


def canonical(network: fx.GraphModule) -> None:
    """Bring a traced network into that form; what it computes stays the same."""
    _drop_idle(network)
    _write_elsewhere(network)
    _in_any_layout(network)
    _bake(network)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            _complete(module)
    _into_modules(network)


def _drop_idle(network: fx.GraphModule) -> None:
    """Take out what does nothing in eval mode, and what was true when it was traced."""
    for node in list(network.graph.nodes):
        if node.op == "call_module" and set(node.kwargs) == {"input"}:
            node.args, node.kwargs = (node.kwargs["input"],), {}
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_function" and name == "_assert":
            network.graph.erase_node(node)
            continue
        idle = isinstance(called(network, node), _DROPOUTS)
        if node.op == "call_function" and name in ("dropout", "dropout2d", "feature_dropout"):
            idle = argument(node, 2, "training", True) is False
        if node.op == "call_function" and name == "stochastic_depth":
            idle = argument(node, 3, "training", True) is False
        if idle:
            bypass(network, node, node.all_input_nodes[0])


def _write_elsewhere(network: fx.GraphModule) -> None:
    """What changes its input in place gives a new value instead; who read the old one reads it."""
    nodes = list(network.graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    for node in nodes:
        if not _made_new(network, node):
            continue
        source = node.all_input_nodes[0]
        source.replace_all_uses_with(
            node, delete_user_cb=lambda user, at=position[node]: position[user] > at
        )
    for module in network.modules():  # after all of its calls
        if getattr(module, "inplace", False):
            module.inplace = False


def _in_any_layout(network: fx.GraphModule) -> None:
    """A view of another shape, which asks for NCHW in memory, becomes a reshape."""
    for node in network.graph.nodes:
        of_dtype = any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values()))
        if node.op == "call_method" and node.target in ("view", "view_as") and not of_dtype:
            node.target = node.target.replace("view", "reshape")


def _made_new(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` worked in place; a function or a method no longer does."""
    module, target = called(network, node), node.target
    if getattr(module, "inplace", False):
        return True
    if node.kwargs.get("inplace", False) is True:
        node.kwargs = {**node.kwargs, "inplace": False}
        return True
    if node.op == "call_function":
        if target in _IN_PLACE:
            node.target = _IN_PLACE[target]
            return True
        name = getattr(target, "__name__", "")
        signature = _parameters(target)
        if "inplace" in signature:
            place = list(signature).index("inplace")
            if argument(node, place, "inplace", False) is True:
                node.args = (*node.args[:place], False, *node.args[place + 1 :])
                return True
        if name.endswith("_") and not name.endswith("__"):
            for owner in (torch, F):
                if hasattr(owner, name[:-1]):
                    node.target = getattr(owner, name[:-1])
                    return True
    if node.op == "call_method" and target.endswith("_") and hasattr(Tensor, target[:-1]):
        node.target = target[:-1]
        return True
    return False


def _parameters(function: Any) -> Iterable[str]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # built in
        return ()


def _bake(network: fx.GraphModule) -> None:
    """What is computed from weights alone becomes a weight: standardised or scaled ones."""
    of_weights: dict[fx.Node, Any] = {}
    for node in list(network.graph.nodes):
        inputs = node.all_input_nodes
        if node.op == "get_attr":
            of_weights[node] = attribute(network, node.target)
        elif inputs and all(n in of_weights for n in inputs) and node.op != "output":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), of_weights.__getitem__)
            with torch.no_grad():
                if node.op == "call_function":
                    value = node.target(*args, **kwargs)
                elif node.op == "call_method":
                    value = getattr(args[0], node.target)(*args[1:], **kwargs)
                else:
                    value = called(network, node)(*args, **kwargs)
            of_weights[node] = value
    for node, value in of_weights.items():
        used = any(user not in of_weights for user in node.users)
        if node.op == "get_attr" or not used or not isinstance(value, Tensor):
            continue
        # In the place of the weight that most of it is made of.
        sources = [n for n in _ancestors(node) if n.op == "get_attr"]
        source = max(sources, key=lambda n: of_weights[n].numel()).target
        owner, _, leaf = source.rpartition(".")
        module = network.get_submodule(owner)
        name = free_name(module, f"{leaf}_{node.name}")
        value = value.detach().clone()
        is_weight = any(isinstance(attribute(network, n.target), nn.Parameter) for n in sources)
        if is_weight and value.is_floating_point():
            module.register_parameter(name, nn.Parameter(value))
        else:
            module.register_buffer(name, value)
        with network.graph.inserting_before(node):
            baked = network.graph.get_attr(f"{owner}.{name}" if owner else name)
        baked.meta["is_tensor"] = True
        for user in [u for u in node.users if u not in of_weights]:
            user.replace_input_with(node, baked)
    network.graph.eliminate_dead_code()


def _ancestors(node: fx.Node) -> list[fx.Node]:
    found, todo = [], [node]
    while todo:
        found.append(todo.pop())
        todo += [n for n in found[-1].all_input_nodes if n not in found]
    return found


def _into_modules(network: fx.GraphModule) -> None:
    """Functions on a network's own weights, and foreign BatchNorms, become torch's modules."""
    made: dict[Any, str] = {}
    for node in list(network.graph.nodes):
        module = called(network, node)
        if (
            isinstance(module, nn.SyncBatchNorm) and module.running_mean is not None
        ):  # in eval mode the same numbers
            network.set_submodule(str(node.target), _plain_norm(module))
        if node.op != "call_function":
            continue
        if node.target in FUNCTIONS:
            weights = [argument(node, 1, "weight"), argument(node, 2, "bias")]
        elif node.target is F.batch_norm and argument(node, 5, "training", False) is False:
            names = ("running_mean", "running_var", "weight", "bias")
            weights = [argument(node, i + 1, name) for i, name in enumerate(names)]
        else:
            continue
        if not all(w is None or (isinstance(w, fx.Node) and w.op == "get_attr") for w in weights):
            continue
        given = node.args[0] if node.args else node.kwargs["input"]
        targets = [w and w.target for w in weights]
        others = [a for a in (*node.args[1:], *node.kwargs.items()) if a not in weights]
        key = (node.target, *targets, str(others))
        if key not in made:
            values = [None if w is None else attribute(network, w.target) for w in weights]
            if node.target is F.batch_norm:
                module = _norm_of(node, *values)
            else:
                module = _weighted_of(node, *values)
            made[key] = _settle(network, node, weights, module)
        with network.graph.inserting_before(node):
            call = network.graph.call_module(made[key], (given,))
        call.meta["is_tensor"] = True
        node.replace_all_uses_with(call)
        network.graph.erase_node(node)
        for weight in {w for w in weights if w is not None and not w.users}:
            network.graph.erase_node(weight)


def _settle(network: fx.GraphModule, node: fx.Node, weights: list[Any], module: nn.Module) -> str:
    """Put ``module`` where the weights of ``node`` lie: in the place of a layer that nothing else
    asks for its weights, or beside it.

    Not inside: the layer may be called, too, and have a place in another module by itself.
    """
    owner = min(w.target for w in weights if w is not None).rpartition(".")[0]
    layer = network.get_submodule(owner)
    elsewhere = any(
        str(n.target) == owner
        or (n.op == "get_attr" and n.target.rpartition(".")[0] == owner and set(n.users) != {node})
        for n in network.graph.nodes
    )
    name = owner
    if not owner or elsewhere or any(True for _ in layer.children()):
        name = free_name(network, f"{owner}_{type(module).__name__.lower()}".lstrip("_"))
    network.add_submodule(name, module)
    return name


def _weighted_of(node: fx.Node, weight: Tensor, bias: Tensor | None) -> nn.Module:
    kind = FUNCTIONS[node.target]
    if kind is nn.Linear:
        module: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    else:
        transposed = kind in TRANSPOSED
        names = ["stride", "padding", "dilation", "groups"]
        if transposed:
            names = ["stride", "padding", "output_padding", "groups", "dilation"]
        how = {}
        for place, name in enumerate(names, 3):
            value = argument(node, place, name, 0 if "padding" in name else 1)
            how[name] = tuple(value) if isinstance(value, list | tuple) else value
        ins, outs = weight.shape[1] * how["groups"], weight.shape[0]
        if transposed:
            ins, outs = weight.shape[0], weight.shape[1] * how["groups"]
        module = kind(ins, outs, tuple(weight.shape[2:]), bias=False, device="meta", **how)
    module.weight = _parameter(weight)
    module.bias = None if bias is None else _parameter(bias)
    return module


def _parameter(value: Tensor) -> nn.Parameter:
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach().clone())


def _norm_of(
    node: fx.Node, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None
) -> nn.Module:
    eps = argument(node, 7, "eps", 1e-5)
    norm = nn.BatchNorm2d(len(mean), eps=eps)
    norm.running_mean, norm.running_var = mean.detach().clone(), var.detach().clone()
    norm.weight = None if weight is None else _parameter(weight)
    norm.bias = None if bias is None else _parameter(bias)
    _complete(norm)
    norm._check_input_dim = _any_dim
    return norm


def _complete(norm: nn.Module) -> None:
    """A BatchNorm that scales or shifts alone does both, by 1 or 0; ``affine`` says whether."""
    weight, bias = norm.weight, norm.bias
    norm.affine = weight is not None or bias is not None
    if weight is None and bias is not None:
        norm.register_parameter("weight", nn.Parameter(torch.ones_like(bias)))
    if bias is None and weight is not None:
        norm.register_parameter("bias", nn.Parameter(torch.zeros_like(weight)))


def _any_dim(_input: Tensor) -> None:
    """F.batch_norm takes any number of dimensions."""


def _plain_norm(module: nn.Module) -> nn.Module:
    norm = nn.BatchNorm2d(module.num_features, eps=module.eps, affine=module.affine)
    norm = norm.to(module.running_mean.dtype).eval()
    norm.load_state_dict(module.state_dict())
    norm._check_input_dim = _any_dim
    return norm
