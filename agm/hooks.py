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
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from agm.augment import LinearInterpolation
from agm.errors import AgmValueError, check_argument, check_state
from agm.functional import (
    Discrepancy,
    check_logits,
    margin_and_slope,
    measure,
    resolve_discrepancy,
)
from agm.graph import check_graph, check_recomputation, gradient_norm, in_float16
from agm.networks import Network, frozen_parameters, without_wrapper

ACTIVE = 0.1  # mean Phi(z) of a batch from which on its gradient's norm is taken for the usual one


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
      the term has next to no gradient. Tensor hooks and retained gradients between the images and
      the losses see these passes as well.

    The student's batch is interpolated (:class:`agm.LinearInterpolation`), by default in one region
    of each image; the trainer then asks the teacher about the new images.

    The two take turns, the loss first, also where one of them is switched off: the loss needs the
    student's forward on the generated images, which a trainer can share where the student then
    learns from these images as they are. A turn is what lies between two changes from
    :meth:`student_batch` back to :meth:`generator_loss`: a step, however many micro-batches each
    of the two accumulates gradients over, or a micro-batch where the two are called in pairs, so
    that a step has both. Where :meth:`student_batch` is never called, all turns are the loss's;
    before the first :meth:`generator_loss` it interpolates in every call. A trainer that first
    trains the generator and then the student needs ``alternate=False``; a second generator, an
    AGM of its own.

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
                its observers of ranges off, its weights as they are until ``backward`` has run.
                They receive no gradient if it is a module; wrap another callable in
                :func:`frozen_parameters` yourself, such as one that takes the logits out of what
                the module returns, and a module that checkpoints its activations together with
                ``backward``. Of DistributedDataParallel the module inside is asked: its wrapper
                would wait for gradients of its parameters. Networks that autocast to float16 by
                themselves and are compiled need the same ``torch.autocast`` around this call.
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
        student = without_wrapper(student)
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
                check_graph("teacher_logits", teacher_logits, images, whole=measuring)
                check_graph("the student's logits", student_logits, images, whole=measuring)
                check_graph("the discrepancy", d, images, whole=False)
                if measuring and isinstance(student, nn.Module):
                    check_recomputation(student, student_logits, images)
            with torch.no_grad():
                variance, mean = torch.var_mean(d, correction=0)
                self._follow(running, mean=mean, variance=variance)
                std = running["variance"].sqrt()
            margin, slope = margin_and_slope(d, running["mean"], std)
            term = margin.mean()
            if measuring and other_terms is not None:
                check_graph("other_terms", other_terms, images)
                half = in_float16(images, term, other_terms)
                ours, theirs = (gradient_norm(t, images, half=half) for t in (term, other_terms))
                weight = self.ratio * theirs / ours
                self._follow(running, weight=weight.where(slope.mean() >= ACTIVE, torch.nan))
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
        if state["evaluations"] and not {"mean", "variance"} <= set(state["running"]):
            raise AgmValueError(
                f"the state of {state['evaluations']} evaluations lacks their averages: keep the "
                "whole of state_dict(), as torch.save does and torch.distributed.checkpoint, which "
                "restores what a new AGM's state has, does not"
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
