"""What AGM asks of autograd's graph: whether it leads to the images, and gradients there."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.checkpoint import CheckpointFunction

from agm.errors import AgmValueError
from agm.functional import at_least_float32


def check_graph(what: str, value: Tensor, images: Tensor, *, whole: bool = True) -> None:
    """Raise :class:`AgmValueError` unless the graph of ``value`` leads to ``images``.

    Args:
        whole: follow it; else see only whether there is one.
    """
    if not isinstance(value, Tensor):
        raise AgmValueError(f"{what} must be a tensor, got {value!r}")
    if not images.requires_grad:
        raise AgmValueError(
            "images carry no graph: pass the generator's output itself, not a detached copy"
        )
    if not value.requires_grad or (whole and not _leads(value, images)):
        raise AgmValueError(
            f"{what} must depend on images, and the graph does not lead there: compute them from "
            "the images that are given, without torch.no_grad() or detach(), and compile the "
            "networks, not the step"
        )


def _leads(value: Tensor, images: Tensor) -> bool:
    """Whether the graph of ``value`` leads to ``images``, not to what was made together with it."""
    start, goal = get_gradient_edge(value)[:2], get_gradient_edge(images)[:2]
    return start == goal or any(goal in n.next_functions for n in _graph(value, goal[0]))


def _graph(value: Tensor, goal: Node) -> Iterator[Node]:
    """The nodes of the graph behind ``value``, as far back as ``goal``, which is not among them."""
    seen, found = {goal}, [get_gradient_edge(value).node]
    while found:
        node = found.pop()
        if node not in seen:
            yield node
            seen.add(node)
            found += [n for n, _ in node.next_functions if n is not None]


def check_recomputation(student: nn.Module, logits: Tensor, images: Tensor) -> None:
    """Raise :class:`AgmValueError` if ``backward`` would run parts of the student unfrozen."""
    behind = _graph(logits, get_gradient_edge(images).node)  # not the generator's own checkpoint
    name = f"{CheckpointFunction.__name__}Backward"
    if any(p.requires_grad for p in student.parameters()) and name in (n.name() for n in behind):
        raise AgmValueError(
            "the student checkpoints its activations with use_reentrant=True, and when backward "
            "runs them again its parameters would receive gradients of the generator's loss: call "
            "generator_loss and backward inside frozen_parameters(student)"
        )


def in_float16(images: Tensor, *values: Tensor) -> bool:
    """Whether a gradient may pass through float16, whose smallest number is 6e-8.

    Of networks that autocast by themselves the graph tells, if it is not compiled.
    """
    kind, goal = images.device.type, get_gradient_edge(images).node
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    nodes = (node for value in values for node in _graph(value, goal))
    between = (made.dtype for node in nodes for made in getattr(node, "_input_metadata", ()))
    return torch.float16 in (autocast, images.dtype, *between)


def gradient_norm(term: Tensor, images: Tensor, *, half: bool) -> Tensor:
    """The norm of the term's gradient at the images, whose graph stays.

    Args:
        half: it may pass through float16: the term is scaled up on the way.

    Raises:
        AgmValueError: no gradient can be taken.
    """
    kept = images.grad if images.retains_grad else None
    scale = 2.0**16 if half else 1.0
    while True:
        scaled = at_least_float32(term) * scale
        try:
            (gradient,) = torch.autograd.grad(scaled, images, retain_graph=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise AgmValueError(
                f"no gradient at the images could be taken: {error} (other_terms must be a scalar "
                "whose graph is still there; networks under torch.compile need donated_buffer off "
                "before their first step; a student that checkpoints its activations needs "
                "use_reentrant=False, and frozen_parameters(student) around generator_loss and "
                "backward)"
            ) from error
        if images.retains_grad:  # to which autograd.grad adds, too
            images.grad = kept
        norm = at_least_float32(gradient).norm() / scale
        # In float16 large gradients overflow as small ones vanish; only there the device is asked.
        if scale == 1 or norm.isfinite():
            return norm
        scale /= 16
