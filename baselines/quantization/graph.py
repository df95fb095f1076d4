"""A network as a torch.fx graph that computes the same.

network -> own copy, without hooks, reparametrized weights as plain ones
        -> followed with a real batch beside the proxies
        -> one form: weights in Conv, Linear and BatchNorm modules, nothing in place
        -> compared with the network, in numbers (:class:`Reference`)
"""

import copy
import inspect
import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from baselines.errors import ConfigError, UnsupportedLayerError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
TOLERANCE = 1e-3  # of the largest logit; float32 rounds to some 1e-5 of it in deep networks
# What makes a weight before each forward; torch's modules are hidden by functions of their names.
_WEIGHT_HOOKS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)
_TRACING = threading.Lock()  # torch.fx patches nn.Module while it traces


def traced(
    network: nn.Module, image_shape: tuple[int, int, int], dtype: torch.dtype = torch.float32
) -> fx.GraphModule:
    """A copy of ``network`` in eval mode and in ``dtype``, as a graph for images of one size.

    Weights lie in Conv, Linear and BatchNorm modules, also those that were used by functions or by
    subclasses with a forward of their own; weight_norm, spectral_norm, other parametrizations and
    pruning are baked into them. Defaults of ``forward``'s further arguments are bound. Nothing is
    done in place. No hook is carried over: :class:`Reference` says whether that made a difference.

    Raises:
        ConfigError: if it does not take such images.
        UnsupportedLayerError: if torch.fx cannot follow its forward, or a weight is not there yet.
    """
    network = without_hooks(own_copy(network, dtype))
    example = torch.zeros(2, *image_shape, dtype=dtype)
    size = "x".join(map(str, image_shape))
    try:
        with torch.no_grad():
            check_logits_shape(network(example))
    except UnsupportedLayerError:
        raise
    except Exception as error:  # the user's forward may raise anything
        raise ConfigError(
            f"the network does not take {size} images ({error}); set image_size, or in_channels"
        ) from error
    try:
        with torch.no_grad(), _TRACING:
            graph = _ValueTracer(example).trace(_Entry(network))
    except Exception as error:
        raise UnsupportedLayerError(
            f"{type(network).__name__} cannot be traced by torch.fx ({type(error).__name__}: "
            f"{error}); its forward must not branch on tensor values: rewrite that part. Give a "
            "compiled or parallel network's module inside"
        ) from error
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = node.target.removeprefix("network.")
        node._rename(node.name.removeprefix("network_"))
    result = fx.GraphModule(network, graph, type(network).__name__)
    _drop_idle(result)
    _write_elsewhere(result)
    _bake(result)
    _into_modules(result)
    result.meta["image_shape"] = tuple(image_shape)
    return cleaned(result)


def own_copy(network: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """``network`` with its hooks, in eval mode, on the CPU; the given one is untouched.

    Raises:
        UnsupportedLayerError: a weight is on the meta device or not initialised.
    """
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_meta or nn.parameter.is_lazy(tensor):
            what = "has no values, it is on the meta device" if tensor.is_meta else "is lazy"
            raise UnsupportedLayerError(
                f"{name!r} {what}; load its weights, or run the network on a batch, first"
            )
    # What weight_norm keeps between two forwards has a graph, which deepcopy refuses.
    made = [t for m in network.modules() for t in vars(m).values() if isinstance(t, Tensor)]
    memo = {id(t): t.detach().clone() for t in made if not t.is_leaf}
    try:
        return copy.deepcopy(network, memo).eval().to("cpu", dtype)
    except Exception as error:
        raise UnsupportedLayerError(
            f"{type(network).__name__} cannot be copied ({error}); a tensor kept as an attribute "
            "must be a parameter, a buffer, or detached"
        ) from error


def without_hooks(network: nn.Module) -> nn.Module:
    """``network`` itself, its reparametrized weights made plain and all its hooks taken off."""
    for module in network.modules():
        if parametrize.is_parametrized(module):
            _bake_parametrizations(module)
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, _WEIGHT_HOOKS):  # which make the weight before each forward
                _bake_hook(module, hook)
        for hooks in ("forward", "forward_pre", "backward", "backward_pre"):
            getattr(module, f"_{hooks}_hooks").clear()
        module._forward_hooks_with_kwargs.clear()
        module._forward_pre_hooks_with_kwargs.clear()
        module._forward_hooks_always_called.clear()
    return network


def _bake_parametrizations(module: nn.Module) -> None:
    """As remove_parametrizations, which would take them from the class that copies share, too."""
    with torch.no_grad():
        values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
    module.__class__ = type(module).__bases__[0]
    del module.parametrizations
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


def _bake_hook(module: nn.Module, hook: Any) -> None:
    name = hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else hook.name
    with torch.no_grad():
        hook(module, None)
        value = getattr(module, name).detach().clone()
    for suffix in ("g", "v", "orig", "mask", "u"):
        for store in (module._parameters, module._buffers):
            store.pop(f"{name}_{suffix}", None)
    module.__dict__.pop(name, None)
    module._buffers.pop(name, None)
    module.register_parameter(name, nn.Parameter(value))


class _Entry(nn.Module):
    """Binds the defaults of the network's further arguments, and an instance's own forward."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        return self.network(images)


class _ValueTracer(fx.Tracer):
    """torch.fx's tracer with the value of everything beside it, for the sizes.

    The size of a batch stays unknown; the other sizes are numbers, so that a forward may compute
    and branch with them.
    """

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.example = example
        self.values: dict[fx.Node, Any] = {}
        self.of_images: set[fx.Node] = set()
        self.batch: fx.Proxy | None = None
        self.evaluating = False
        self.thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = "forward" in vars(m)
        return not own and super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ValueProxy(node, self)

    @property
    def _aside(self) -> bool:
        # torch.fx patches nn.Module for all, also for another thread's training.
        return self.evaluating or threading.get_ident() != self.thread

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self._aside else super().call_module(
            m, forward, args, kwargs
        )  # fmt: skip

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._aside else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any):
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        node = proxy.node
        if kind == "output":
            return proxy
        self.evaluating = True
        try:
            given, named = fx.node.map_arg((node.args, node.kwargs), self._value_of)
            value = self._value(kind, target, given, named)
        finally:
            self.evaluating = False
        self.values[node] = value
        node.meta["is_tensor"] = isinstance(value, Tensor)
        if kind == "placeholder" or any(n in self.of_images for n in node.all_input_nodes):
            self.of_images.add(node)
        if kind == "placeholder":
            self.batch = proxy.size(0)
        return proxy

    def _value_of(self, node: fx.Node) -> Any:
        # A buffer's node comes without a proxy.
        return attribute(self.root, node.target) if node.op == "get_attr" else self.values[node]

    def _value(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "placeholder":
            return self.example
        if kind == "get_attr":
            return attribute(self.root, target)
        if kind == "call_module":
            return self.root.get_submodule(target)(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)

    def size(self, proxy: fx.Proxy, dim: int) -> Any:
        """A number, or for the batch's size of something that depends on the images a proxy."""
        value = self.values[proxy.node]
        if dim % value.ndim or proxy.node not in self.of_images:
            return value.shape[dim]
        if self.batch is not None and len(value) == len(self.example):
            return self.batch
        return self.create_proxy("call_method", "size", (proxy, 0), {})


class _ValueProxy(fx.Proxy):
    @property
    def _value(self) -> Any:
        return self.tracer.values[self.node]

    def __getattr__(self, name: str) -> Any:
        value = self._value
        if isinstance(value, Tensor):
            if name == "shape":
                return tuple(self.tracer.size(self, i) for i in range(value.ndim))
            if name in ("ndim", "dtype", "is_cuda", "layout", "requires_grad"):
                return getattr(value, name)
        return super().__getattr__(name)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.tracer.size(self, dim)

    def dim(self) -> int:
        return self._value.ndim

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self._value, tuple | list):
            return (self[i] for i in range(len(self._value)))
        return super().__iter__()

    def __len__(self) -> int:
        if isinstance(self._value, tuple | list):
            return len(self._value)
        return super().__len__()


def attribute(root: nn.Module, target: str) -> Any:
    """What ``root.target`` is, the target dotted."""
    return operator.attrgetter(target)(root)


def called(network: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a node calls."""
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


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


_DROPOUTS = (nn.modules.dropout._DropoutNd, nn.Identity)


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


# torch.fx writes x += y as operator.iadd, which changes x itself.
_IN_PLACE = {getattr(operator, f"i{n}"): getattr(operator, n) for n in ("add", "sub", "mul")} | {
    operator.itruediv: operator.truediv
}


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


def _made_new(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` worked in place; it no longer does."""
    module, target = called(network, node), node.target
    if getattr(module, "inplace", False):
        module.inplace = False
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
        module, name = network.get_submodule(owner), f"{leaf}_{node.name}"
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


FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d,
    F.conv_transpose1d: nn.ConvTranspose1d, F.conv_transpose2d: nn.ConvTranspose2d,
    F.conv_transpose3d: nn.ConvTranspose3d, F.linear: nn.Linear,
}  # fmt: skip


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
            made[key] = _settle(network, weights, module)
        with network.graph.inserting_before(node):
            call = network.graph.call_module(made[key], (given,))
        call.meta["is_tensor"] = True
        node.replace_all_uses_with(call)
        network.graph.erase_node(node)
        for weight in {w for w in weights if w is not None and not w.users}:
            network.graph.erase_node(weight)


def _settle(network: fx.GraphModule, weights: list[Any], module: nn.Module) -> str:
    """Put ``module`` where its weights lie: in a layer's place if it has no others, or inside."""
    targets = {w.target for w in weights if w is not None}
    owner = min(targets).rpartition(".")[0]
    layer = network.get_submodule(owner)
    elsewhere = any(
        str(n.target) == owner or (n.op == "get_attr" and n.target not in targets)
        for n in network.graph.nodes
        if str(n.target).rpartition(".")[0] == owner or str(n.target) == owner
    )
    name = owner
    if not owner or elsewhere or any(True for _ in layer.children()):
        name = f"{owner}.{type(module).__name__.lower()}".lstrip(".")
        while _exists(network, name):
            name += "_"
    network.add_submodule(name, module)
    return name


def _exists(network: nn.Module, target: str) -> bool:
    try:
        attribute(network, target)
    except AttributeError:
        return False
    return True


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
    norm = nn.BatchNorm2d(len(mean), eps=eps, affine=weight is not None or bias is not None)
    norm.running_mean, norm.running_var = mean.detach().clone(), var.detach().clone()
    if norm.affine:
        norm.weight = _parameter(torch.ones_like(mean) if weight is None else weight)
        norm.bias = _parameter(torch.zeros_like(mean) if bias is None else bias)
    norm._check_input_dim = _any_dim
    return norm


def _any_dim(_input: Tensor) -> None:
    """F.batch_norm takes any number of dimensions."""


def _plain_norm(module: nn.Module) -> nn.Module:
    norm = nn.BatchNorm2d(module.num_features, eps=module.eps, affine=module.affine)
    norm = norm.to(module.running_mean.dtype).eval()
    norm.load_state_dict(module.state_dict())
    norm._check_input_dim = _any_dim
    return norm


class Reference:
    """What a network gives for a batch, to compare its copies with.

    Args:
        network: the given one, which runs once, in a copy in eval mode; its own hooks run too.
        images: (N, C, s, s) in the range of its inputs.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self.network, self.images = network, images
        self.logits = self._run(own_copy(network, images.dtype))

    def check(self, other: fx.GraphModule, what: str) -> None:
        """Refuse a copy that computes something else.

        Raises:
            UnsupportedLayerError: naming the first layer whose output differs.
        """
        logits = self._run(other)
        if _same(logits, self.logits):
            return
        if not (self.logits.isfinite().all()):
            raise UnsupportedLayerError(
                "the network gives logits that are not finite for a random batch in the range of "
                "its inputs; check its weights, and input_mean and input_std"
            )
        again = self._run(own_copy(self.network, self.images.dtype))
        if not _same(again, self.logits):
            raise UnsupportedLayerError(
                "the network in eval mode gives other logits for the same images when it is asked "
                "again; it must be deterministic: switch off its dropout or noise"
            )
        where = self._first_difference(other)
        error = float((logits - self.logits).abs().max() / self.logits.abs().max())
        raise UnsupportedLayerError(
            f"the {what} copy of {type(self.network).__name__} computes something else: {where}, "
            f"and its logits by {error:.2g} of the largest. Hooks and a patched forward are "
            "not copied, and code that depends on tensor values cannot be: make what they do a "
            "part of a module's forward"
        )

    @torch.no_grad()
    def _run(self, network: nn.Module) -> Tensor:
        logits = network(self.images)
        check_logits_shape(logits)
        return logits.detach()

    def _first_difference(self, other: fx.GraphModule) -> str:
        """The first module, in the order of the copy, that gives something else there."""
        network = own_copy(self.network, self.images.dtype)
        theirs, ours = _outputs(network, self._run), _outputs(copy.deepcopy(other), self._run)
        for name, output in ours.items():
            if name in theirs and not _same(output, theirs[name]):
                kind = type(network.get_submodule(name)).__name__
                return f"the output of layer {name!r} ({kind}) differs"
        return "no layer's output differs, but what the forward does with them"


def _outputs(network: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
    """What each of its modules gives when it runs for the first time, in order."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.setdefault(name, output.detach().clone())

    for name, module in network.named_modules():
        if name:
            module.register_forward_hook(lambda _m, _in, output, name=name: keep(name, output))
    run(network)
    return outputs


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max())


def check_logits_shape(logits: Any) -> int:
    """The number of classes of (N, C) logits."""
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UnsupportedLayerError(f"the network must return logits (N, C), got {got}")
    return logits.shape[1]


def image_channels(network: nn.Module, image_size: int) -> int | None:
    """Those of the first convolution that ``network`` runs, or has; None if it has none."""
    network = without_hooks(own_copy(network))
    first: list[int] = []
    convolutions = [m for m in network.modules() if isinstance(m, CONVOLUTIONS)]
    for module in convolutions:
        module.register_forward_pre_hook(lambda m, _inputs: first.append(m.in_channels))
    try:
        with torch.no_grad():
            network(torch.zeros(2, 3, image_size, image_size))
    except Exception:  # grey images, as a rule; what else may be wrong shows when it is traced
        pass
    first += [module.in_channels for module in convolutions[:1]]
    return first[0] if first else None
