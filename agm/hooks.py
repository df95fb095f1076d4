"""The two points where an add-on joins a data-free quantization loop, and AGM, which uses both.

images = generator(latents)
loss = <the method's own terms>
loss = loss + hook.generator_loss(images=images, teacher_logits=teacher(images),
                                  student=student, other_terms=loss)            # point 1
loss.backward(); generator_optimizer.step()

batch, labels = hook.student_batch(images=images.detach(), labels=labels)       # point 2
<the student's step on batch, labels and teacher(batch)>
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils.checkpoint import CheckpointFunction

from agm.augment import LinearInterpolation
from agm.errors import AgmValueError, check_argument, check_state
from agm.functional import (
    Discrepancy,
    at_least_float32,
    check_logits,
    margin_parts,
    measure,
    resolve_discrepancy,
)

Network = Callable[[Tensor], Tensor]
ACTIVE = 0.1  # mean Phi(z) of a batch from which on its gradient's norm is taken for the usual one


@contextmanager
def frozen_parameters(module: nn.Module) -> Iterator[nn.Module]:
    """Switch the gradients of a module's parameters off, and back to what they were on leaving.

    A forward inside still carries gradients to its *input*, at the cost of the input gradient
    alone, and never writes to the parameters' ``.grad``, however late ``backward`` runs. With one
    exception: what ``torch.utils.checkpoint`` wraps runs again in ``backward``, with the flags of
    that moment, so call ``backward`` inside too.

    Parametrized tensors are computed once, on entering, and are constants inside; so under
    ``parametrize.cached()`` what is cached has its graph, for the forwards after this one. For one
    thread at a time.
    """
    before = [(p, p.requires_grad) for p in module.parameters()]
    parametrized = [
        (m, type(m), {name: _with_graph(m, name) for name in _parametrized_names(m)})
        for m in module.modules()
        if _parametrized_names(m)
    ]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        for m, _, tensors in parametrized:
            m.__class__ = parametrize.type_before_parametrizations(m)
            vars(m).update({name: tensor.detach() for name, tensor in tensors.items()})
        yield module
    finally:
        for m, kind, tensors in parametrized:
            for name in tensors:
                del vars(m)[name]
            m.__class__ = kind
        for p, requires_grad in before:
            p.requires_grad_(requires_grad)


def _parametrized_names(module: nn.Module) -> list[str]:
    """The tensors that parametrizations compute; none where they are constants for now."""
    if not parametrize.is_parametrized(module) or not isinstance(
        module.parametrizations, nn.ModuleDict
    ):
        return []
    return [
        n for n in module.parametrizations if isinstance(getattr(type(module), n, None), property)
    ]


def _with_graph(module: nn.Module, name: str) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        return getattr(module, name)


class Hook(Protocol):
    """What a trainer calls; each method may return its neutral value (0, or what it was given).

    Nobody writes into the tensors given, nor into the logits that ``student(images)``, any callable
    images -> logits, gives, nor calls ``backward`` behind them: torch.autograd.grad takes gradients
    and leaves the graph to the others.
    """

    def generator_loss(
        self,
        *,
        images: Tensor,
        teacher_logits: Tensor,
        student: Network,
        other_terms: Tensor | None = None,
    ) -> Tensor:
        """An extra scalar term of the generator's loss."""

    def student_batch(self, *, images: Tensor, labels: Tensor | None = None) -> Any:
        """The batch the student is to learn from: images, or (images, labels) if given labels."""

    def state_dict(self) -> dict[str, Any]:
        """All that the hook needs to go on exactly from here.

        Tensors in a dict under ``"running"`` are averages over the batch: where ranks share one,
        they are averaged over the ranks, too.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly from there."""


class AGM:
    """Adversarial Gaussian margin and linear interpolation, with nothing to tune.

    The generator's term is weight * mean over the batch of E[max(0, m - d)], m ~ N(mean, std^2):

    * d is the total variation between the softmaxes of teacher and student, in [0, 1] for every
      network, bit width and number of classes;
    * mean and std follow d itself: running averages of its batch mean and batch variance;
    * weight holds the norm of this term's gradient at the images at ``ratio`` times that of the
      generator's other terms. It is measured every ``interval`` evaluations (two extra backward
      passes to the images) and averaged; without ``other_terms`` it stays 1. Not measured where the
      margin hardly acts (a batch's mean Phi(z) below 0.1, as when d has just risen), since there
      the term has next to no gradient.

    The student's batch is interpolated (:class:`agm.LinearInterpolation`), by default in one region
    of each image; the trainer then asks the teacher about the new images.

    The two take turns, the loss first, also where one of them is switched off: the loss needs the
    student's forward on the generated images, which a trainer can share where the student then
    learns from these images as they are. A turn is what lies between two changes from
    :meth:`student_batch` back to :meth:`generator_loss`: a step, however many micro-batches each
    of the two accumulates gradients over, or a micro-batch where the two are called in pairs, so
    that a step has both. Where :meth:`student_batch` is never called, all turns are the loss's;
    before the first :meth:`generator_loss` it interpolates in every call. A trainer that first
    trains the generator and then the student needs ``alternate=False``.

    Args:
        loss, interpolation: switch either part off (default: both on).
        discrepancy: a name of ``agm.functional.DISCREPANCIES`` or a callable
            (teacher_logits, student_logits) -> (N,).
        ratio: of the gradients' norms, > 0 (default 0.2; it and ``regions`` are chosen in
            ``benchmarks/evidence/results/ablation.md``).
        decay: of the running averages, in [0, 1) (default 0.95).
        interval: evaluations of the term, one a micro-batch, from one measurement of the weight to
            the next, >= 1 (default 10).
        alternate: take turns (default); False for both in every call.
        regions: interpolate one region of each image (default); False for all of it.
        seed: of the interpolation's own random generator (default 0).

    Raises:
        AgmValueError: one of them is out of range, or no discrepancy has that name.

    Graphs are gone through more than once, for which networks under torch.compile need, before
    their first step, ``import torch._functorch.config as c; c.donated_buffer = False``.

    Under DistributedDataParallel each rank has an AGM of the same seed for its part of the batch,
    and the ranks average what they measured, once a step::

        state = agm.state_dict()
        for average in state["running"].values():
            torch.distributed.all_reduce(average)
            average /= torch.distributed.get_world_size()
        agm.load_state_dict(state)

    Source: Luo et al., IEEE TCSVT 2024, doi 10.1109/TCSVT.2024.3399311; how margin and weight adapt
    is this project's.
    """

    def __init__(
        self,
        *,
        loss: bool = True,
        interpolation: bool = True,
        discrepancy: str | Discrepancy = "total_variation",
        ratio: float = 0.2,
        decay: float = 0.95,
        interval: int = 10,
        alternate: bool = True,
        regions: bool = True,
        seed: int = 0,
    ) -> None:
        check_argument("ratio", ratio, "finite and > 0", lambda x: 0 < x < math.inf)
        check_argument("decay", decay, "in [0, 1)", lambda x: 0 <= x < 1)
        check_argument(
            "interval", interval, "a whole number >= 1", lambda x: x >= 1 and x == int(x)
        )
        self.discrepancy = resolve_discrepancy(discrepancy)
        self.ratio, self.decay, self.interval = ratio, decay, interval
        self.loss, self.interpolation, self.alternate = loss, interpolation, alternate
        self.mix = LinearInterpolation(seed=seed, regions=regions)
        self.num_classes: int | None = None
        self.evaluations = 0
        self.turn = 0  # the first one, which is the loss's, is 1
        self.student_asked = False  # in this turn
        # 0-dim tensors on the device of the logits seen last, so that no step waits for it.
        self.running: dict[str, Tensor] = {}

    def generator_loss(
        self,
        *,
        images: Tensor,
        teacher_logits: Tensor,
        student: Network,
        other_terms: Tensor | None = None,
    ) -> Tensor:
        """The weighted Gaussian-margin term; add it to the generator's other terms.

        Call it from the first step on at which the student is quantized: measured while the two
        networks are the same to rounding, the weight is far off, and its average slow to return.

        Under ``torch.no_grad()`` or ``inference_mode()`` it is an evaluation: the term's value,
        whoever's turn it is, with the weight as it is, and no state changes.

        Args:
            images: (N, ...), with the generator's graph behind them.
            teacher_logits: (N, C), the teacher on these images, with their graph.
            student: images -> logits, in eval mode (in train mode its BatchNorm statistics move),
                its weights as they are until ``backward`` has run. They receive no gradient if it
                is a module; wrap another callable in :func:`frozen_parameters` yourself, and a
                module that checkpoints its activations together with ``backward``. Of
                DistributedDataParallel the module inside is asked: its wrapper would wait for
                gradients of its parameters.
            other_terms: the generator's loss without this term, a scalar depending on ``images``.

        Returns:
            A scalar, float32 for half-precision logits and else of their dtype, for first
            derivatives; 0, without a graph or a call of the student, in the interpolation's turn.

        Raises:
            AgmValueError: logits of different or wrong shapes; in the loss's turn images or logits
                without a graph; where the weight is measured logits or other terms whose graph
                does not lead to ``images``, or where no gradient can be taken there, and a student
                whose activations ``backward`` would compute again unfrozen. No state has changed.
        """
        if isinstance(student, DistributedDataParallel):
            student = student.module
        learning = torch.is_grad_enabled()
        turn = self.turn + int(self.student_asked or not self.turn)
        evaluations = self.evaluations
        running = dict(self.running)  # all checks come before the first change of state
        if not self.loss or (learning and self.alternate and turn % 2 == 0):
            check_logits(teacher_logits, teacher_logits)
            loss = teacher_logits.new_zeros(
                (), dtype=torch.promote_types(teacher_logits.dtype, torch.float32)
            )
        else:
            with frozen_parameters(student) if isinstance(student, nn.Module) else nullcontext():
                student_logits = student(images)
            d = measure(self.discrepancy, teacher_logits, student_logits)
            measuring = learning and evaluations % self.interval == 0
            if learning:  # the whole graph only now and then: a step is short
                _check_graph("teacher_logits", teacher_logits, images, whole=measuring)
                _check_graph("the student's logits", student_logits, images, whole=measuring)
                _check_graph("the discrepancy", d, images, whole=measuring)
                if measuring and isinstance(student, nn.Module):
                    _check_recomputation(student, student_logits, images)
            with torch.no_grad():
                variance, mean = torch.var_mean(d, correction=0)
                self._follow(running, mean=mean, variance=variance)
                std = running["variance"].sqrt()
            # Not -inf, whose product with Phi = 0 is NaN.
            excess = (running["mean"] - d).clamp(min=torch.finfo(d.dtype).min)
            # expected_margin as excess * Phi(z) + std * phi(z), its two derivatives held: what they
            # would add to the gradient cancels. It takes two thirds of expected_margin's time.
            below, density = margin_parts(excess.detach(), std)
            term = torch.addcmul(std * density, excess, below).mean()
            if measuring and other_terms is not None:
                _check_graph("other_terms", other_terms, images)
                half = _in_float16(images, teacher_logits, student_logits)
                weight = self._balance(term, other_terms, images, 2.0**16 if half else 1.0)
                self._follow(running, weight=weight.where(below.mean() >= ACTIVE, torch.nan))
            loss = term
            if "weight" in running:
                weight = running["weight"].to(term)
                loss = term * weight.where(weight.isfinite(), 1.0)
            evaluations += 1
        if learning:
            self.running = {name: value.to(loss.device) for name, value in running.items()}
            self.num_classes = teacher_logits.shape[1]
            self.evaluations, self.turn, self.student_asked = evaluations, turn, False
        return loss

    def student_batch(self, *, images: Tensor, labels: Tensor | None = None) -> Any:
        """Interpolate the student's batch.

        Args:
            images: (N, ...), without a graph.
            labels: (N,) integers, the number of classes being that of the teacher's logits last
                seen by :meth:`generator_loss`, or (N, C) probabilities.

        Returns:
            Images, or (images, soft labels) if labels were given; as they came without
            interpolation, or in the loss's turn. The teacher must be asked again about new images.

        Raises:
            AgmValueError: integer labels before the first :meth:`generator_loss`, or what
                :class:`agm.LinearInterpolation` refuses.
        """
        batch = images if labels is None else (images, labels)
        if self.interpolation and not (self.alternate and self.turn % 2):
            integers = isinstance(labels, Tensor) and not labels.is_floating_point()
            if integers and self.num_classes is None:
                raise AgmValueError(
                    "the number of classes is not known before the first generator_loss; "
                    "until then give labels as (N, C) probabilities"
                )
            if labels is None:
                batch = self.mix(images)
            else:
                batch = self.mix(images, labels, num_classes=self.num_classes)
        self.student_asked = True
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Running averages, the turn and the interpolation's random state."""
        return {
            "evaluations": self.evaluations,
            "turn": self.turn,
            "student_asked": self.student_asked,
            "num_classes": self.num_classes,
            "discrepancy": self._measure,
            "running": {name: value.clone() for name, value in self.running.items()},
            "interpolation": self.mix.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where :meth:`state_dict` was taken, on whatever device its tensors are.

        Raises:
            AgmValueError: ``state`` lacks something, or is of another discrepancy; nothing has
                changed.
        """
        counts = ("evaluations", "turn", "student_asked", "num_classes")
        check_state(self, state, *counts, "discrepancy", "running", "interpolation")
        if state["discrepancy"] != self._measure:
            raise AgmValueError(
                f"the state's averages are of the discrepancy {state['discrepancy']}, whose units "
                f"are not those of {self._measure}; make the AGM with the former"
            )
        with torch.inference_mode(False):  # whose tensors no graph could save
            running = {name: value.clone() for name, value in state["running"].items()}
        self.mix.load_state_dict(state["interpolation"])
        self.running = running
        for name in counts:
            setattr(self, name, state[name])

    def _follow(self, running: dict[str, Tensor], **now: Tensor) -> None:
        """Move the averages; a value that is not finite is forgotten, also if it is the first."""
        for name, value in now.items():
            old = running[name].to(value) if name in running else value
            change = (value - old).nan_to_num(0.0, 0.0, 0.0)
            moved = torch.add(old, change, alpha=1 - self.decay)
            running[name] = torch.where(old.isfinite(), moved, value)

    @property
    def _measure(self) -> str:
        """The discrepancy's name; not the repr of a callable object, which tells its address."""
        return getattr(self.discrepancy, "__name__", type(self.discrepancy).__name__)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(loss={self.loss}, interpolation={self.interpolation}, "
            f"discrepancy={self._measure}, ratio={self.ratio}, decay={self.decay}, "
            f"interval={self.interval}, alternate={self.alternate}, regions={self.mix.regions})"
        )

    def _balance(self, term: Tensor, other_terms: Tensor, images: Tensor, scale: float) -> Tensor:
        """The weight that holds the gradients' norms at the images in ``ratio``, now."""
        try:
            ours, theirs = (_gradient_norm(t, images, scale) for t in (term, other_terms))
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
        return self.ratio * theirs / ours


def _check_graph(what: str, value: Tensor, images: Tensor, *, whole: bool = True) -> None:
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


def _check_recomputation(student: nn.Module, logits: Tensor, images: Tensor) -> None:
    """Raise :class:`AgmValueError` if ``backward`` would run parts of the student unfrozen."""
    behind = _graph(logits, get_gradient_edge(images).node)  # not the generator's own checkpoint
    name = f"{CheckpointFunction.__name__}Backward"
    if any(p.requires_grad for p in student.parameters()) and name in (n.name() for n in behind):
        raise AgmValueError(
            "the student checkpoints its activations with use_reentrant=True, and when backward "
            "runs them again its parameters would receive gradients of the generator's loss: call "
            "generator_loss and backward inside frozen_parameters(student)"
        )


def _in_float16(*tensors: Tensor) -> bool:
    """Whether a gradient may pass through float16, whose smallest number is 6e-8."""
    kind = tensors[0].device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return torch.float16 in (autocast, *(t.dtype for t in tensors))


def _gradient_norm(term: Tensor, images: Tensor, scale: float) -> Tensor:
    """The norm of the gradient at the images, taken of ``scale`` times the term."""
    kept = images.grad if images.retains_grad else None
    while True:
        scaled = at_least_float32(term) * scale
        (gradient,) = torch.autograd.grad(scaled, images, retain_graph=True)
        if images.retains_grad:  # to which autograd.grad adds, too
            images.grad = kept
        norm = at_least_float32(gradient).norm() / scale
        # In float16 large gradients overflow as small ones vanish; only there the device is asked.
        if scale == 1 or norm.isfinite():
            return norm
        scale /= 16
