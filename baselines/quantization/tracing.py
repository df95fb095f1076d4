"""A network as a torch.fx graph that computes the same.

network -> own copy, without hooks, reparametrized weights as plain ones (copying)
        -> followed with a real batch beside the proxies                 (here)
        -> one form: weights in torch's own layers, nothing in place     (canonical)
        -> compared with the network, in numbers                         (reference)
"""

import itertools
import keyword
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from baselines.errors import ConfigError, UnsupportedLayerError
from baselines.quantization.canonical import canonical
from baselines.quantization.copying import own_copy, without_hooks
from baselines.quantization.graph import attribute, check_logits_shape, cleaned
from baselines.quantization.quantizers import Quantizer

_TRACING = threading.Lock()  # torch.fx patches nn.Module while it traces
EXAMPLE = 5  # images; a size that is one of a layer, too, could be taken for the batch's
# Of modules that are another spelling of one function, which is followed in their place.
_FUNCTIONS_ALONE = ("torch.nn.modules.padding", "torch.nn.modules.upsampling")
# Products of two activations outside of a layer, by what all their spellings come to.
_PRODUCTS = (
    "mm", "bmm", "addmm", "baddbmm", "addbmm", "dot", "vdot", "mv", "addmv", "convolution",
    "_trilinear", "_cdist_forward", "_euclidean_dist", "_native_multi_head_attention",
)  # fmt: skip


def traced(
    network: nn.Module, image_shape: tuple[int, int, int], dtype: torch.dtype = torch.float32
) -> fx.GraphModule:
    """A copy of ``network`` in eval mode and in ``dtype``, as a graph for images of one size.

    Weights lie in Conv, Linear and BatchNorm modules, also those that were used by functions or by
    subclasses with a forward of their own, and those of buffers, such as a blur's filter, which a
    student then learns; weight_norm, spectral_norm, other parametrizations and pruning are baked
    into them. Defaults of ``forward``'s further arguments are bound. Nothing is done in place. No
    hook is carried over: :class:`baselines.quantization.reference.Reference` says whether that made
    a difference.

    Raises:
        ConfigError: if it does not take such images.
        UnsupportedLayerError: if torch.fx cannot follow its forward, or a weight is not there yet.
    """
    network = without_hooks(own_copy(network, dtype))
    if any(isinstance(module, Quantizer) for module in network.modules()):
        raise UnsupportedLayerError(
            f"{type(network).__name__} is quantized already; give the network that it was made from"
        )
    example = torch.zeros(EXAMPLE, *image_shape, dtype=dtype)
    size = "x".join(map(str, image_shape))
    try:
        with torch.no_grad():
            check_logits_shape(network(example), len(example))
    except UnsupportedLayerError:
        raise
    except Exception as error:  # the user's forward may raise anything
        raise ConfigError(
            f"the network does not take {size} images ({error}); set image_size, or in_channels; "
            "its forward must take a batch of any size"
        ) from error
    _check_other_batches(network, example, type(network).__name__)
    entry = _Entry(network)
    try:
        graph = _graph(entry, example)
    except Exception as error:
        raise UnsupportedLayerError(
            f"{type(network).__name__} cannot be traced by torch.fx ({type(error).__name__}: "
            f"{error}); its forward must not branch on tensor values: rewrite that part. Give a "
            "compiled or parallel network's module inside"
        ) from error
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in vars(entry):  # a tensor that forward made
            node.target = _kept(network, vars(entry)[node.target])
        elif node.op in ("call_module", "get_attr"):
            node.target = node.target.removeprefix("network.")
        node._rename(node.name.removeprefix("network_"))
    own = (*network._modules, *network._parameters, *network._buffers)
    if taken := [name for name in own if name == "meta" or hasattr(fx.GraphModule, name)]:
        raise UnsupportedLayerError(
            f"{type(network).__name__} has attributes that torch.fx.GraphModule needs for itself: "
            f"{', '.join(taken)}; give them other names"
        )
    parts = {part for name, _ in network.named_modules() for part in name.split(".")}
    parts |= {name.rpartition(".")[2] for name in network.state_dict()}
    if taken := sorted(filter(keyword.iskeyword, parts)):
        raise UnsupportedLayerError(
            f"{type(network).__name__} has parts whose names are words of Python: "
            f"{', '.join(taken)}; torch.fx cannot write them: give them other names"
        )
    result = fx.GraphModule(network, graph, type(network).__name__)
    canonical(result)
    result.meta["image_shape"] = tuple(image_shape)
    result = cleaned(result)
    _check_other_batches(result, example, f"the copy of {type(network).__name__}")
    return result


def _graph(entry: nn.Module, example: Tensor) -> fx.Graph:
    """Buffers are values that a forward may branch on, or, if need be, parts of the graph."""
    first = None
    for buffers in (False, True):
        tracer = _ValueTracer(example)
        tracer.proxy_buffer_attributes = buffers
        try:
            with torch.no_grad(), _TRACING:
                return tracer.trace(entry)
        except Exception as error:
            first = first or error
    raise first


def _check_other_batches(network: nn.Module, example: Tensor, what: str) -> None:
    """That it also takes one image more, and one image alone."""
    for images in (torch.cat([example, example[:1]]), example[:1]):
        try:
            with torch.no_grad():
                check_logits_shape(network(images), len(images))
        except Exception as error:
            raise UnsupportedLayerError(
                f"{what} takes {len(example)} images, and not {len(images)} "
                f"({type(error).__name__}: {error}); its forward must take a batch of any size"
            ) from error


def _kept(network: nn.Module, constant: Tensor) -> str:
    """The name of a new buffer that holds it."""
    name = next(n for i in itertools.count() if not hasattr(network, n := f"constant{i}"))
    network.register_buffer(name, constant.detach().clone())
    return name


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
        # The network itself is no layer, also if its class is torch's, such as DataParallel.
        own = "forward" in vars(m) or module_qualified_name == "network"
        own = own or type(m).__module__ in _FUNCTIONS_ALONE
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
            with _Products() as products:
                value = self._value(kind, target, given, named)
        finally:
            self.evaluating = False
        self.values[node] = value
        node.meta["is_tensor"] = isinstance(value, Tensor)
        if kind == "placeholder" or any(n in self.of_images for n in node.all_input_nodes):
            self.of_images.add(node)
            node.meta["product"] = kind in ("call_function", "call_method") and products.found
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


class _Products(TorchDispatchMode):
    """Whether what runs inside multiplies matrices."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.found |= name in _PRODUCTS or name.startswith("_scaled_dot_product")
        return func(*args, **(kwargs or {}))


class _Shape(tuple):
    """As torch.Size, which cannot hold the batch's size, a proxy."""

    def numel(self) -> Any:
        return math.prod(self)

    def __getitem__(self, index: Any) -> Any:
        part = super().__getitem__(index)
        return _Shape(part) if isinstance(index, slice) else part


class _ValueProxy(fx.Proxy):
    @property
    def _value(self) -> Any:
        return self.tracer.values[self.node]

    def __getattr__(self, name: str) -> Any:
        value = self._value
        if isinstance(value, Tensor):
            if name == "shape":
                return _Shape(self.tracer.size(self, i) for i in range(value.ndim))
            if name in ("ndim", "dtype", "is_cuda", "layout", "requires_grad"):
                return getattr(value, name)
            if name == "data":
                return self.tracer.create_proxy("call_method", "detach", (self,), {})
            if isinstance(getattr(value, name, None), Tensor):  # such as .T
                return self.tracer.create_proxy("call_function", getattr, (self, name), {})
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
