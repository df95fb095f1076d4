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

from agm.augment import LinearInterpolation
from agm.errors import AgmValueError, check_state
from agm.functional import (
    Discrepancy,
    at_least_float32,
    check_logits,
    margin_parts,
    measure,
    resolve_discrepancy,
)

Network = Callable[[Tensor], Tensor]


@contextmanager
def frozen_parameters(module: nn.Module) -> Iterator[nn.Module]:
    """Switch the gradients of a module's parameters off, and back to what they were on leaving.

    A forward inside still carries gradients to its *input*, at the cost of the input gradient
    alone, and never writes to the parameters' ``.grad``, however late ``backward`` runs.
    """
    before = [(p, p.requires_grad) for p in module.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        yield module
    finally:
        for p, requires_grad in before:
            p.requires_grad_(requires_grad)


class Hook(Protocol):
    """What a trainer calls; each method may return its neutral value (0, or what it was given)."""

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
        """All that the hook needs to go on exactly from here."""

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
      passes to the images) and averaged; without ``other_terms`` it stays 1.

    The student's batch is interpolated (:class:`agm.LinearInterpolation`); the trainer then asks
    the teacher about the new images.

    The two take turns, the loss first, also where one of them is switched off: the loss needs the
    student's forward on the generated images, which a trainer can share where the student then
    learns from these images as they are.

    Args:
        loss, interpolation: switch either part off (default: both on).
        discrepancy: a name of ``agm.functional.DISCREPANCIES`` or a callable
            (teacher_logits, student_logits) -> (N,).
        ratio: of the gradients' norms, > 0 (default 0.1, chosen in
            ``benchmarks/evidence/results/ablation.md``).
        decay: of the running averages, in [0, 1) (default 0.95).
        interval: evaluations from one measurement of the weight to the next, >= 1 (default 10).
        alternate: take turns (default); False for both in every call.
        seed: of the interpolation's own random generator.

    Under DistributedDataParallel each rank has an AGM of the same seed for its part of the batch.
    Pass ``student=student.module``, as the wrapper awaits gradients that the generator's turn does
    not give, and let the ranks average what they measured, once a step::

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
        ratio: float = 0.1,
        decay: float = 0.95,
        interval: int = 10,
        alternate: bool = True,
        seed: int = 0,
    ) -> None:
        if not 0 < ratio < math.inf:
            raise AgmValueError(f"ratio must be finite and > 0, got {ratio!r}")
        if not 0 <= decay < 1:
            raise AgmValueError(f"decay must be in [0, 1), got {decay!r}")
        if interval < 1:
            raise AgmValueError(f"interval must be >= 1, got {interval!r}")
        self.discrepancy = resolve_discrepancy(discrepancy)
        self.ratio, self.decay, self.interval = ratio, decay, interval
        self.loss, self.interpolation, self.alternate = loss, interpolation, alternate
        self.mix = LinearInterpolation(seed=seed)
        self.num_classes: int | None = None
        self.calls = 0
        # 0-dim tensors on the logits' device once seen, so that no step waits for the device.
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

        Args:
            images: (N, ...), with the generator's graph behind them.
            teacher_logits: (N, C), the teacher on these images, with their graph.
            student: images -> logits, in eval mode (in train mode its BatchNorm statistics move).
                Its own parameters receive no gradient if it is a module; wrap another callable
                in :func:`frozen_parameters` yourself.
            other_terms: the generator's loss without this term, a scalar depending on ``images``.

        Returns:
            A scalar of the logits' dtype, for first derivatives; 0, without a call of the student,
            in the interpolation's turn.
        """
        evaluation, other_turn = divmod(self.calls, 2) if self.alternate else (self.calls, 0)
        running = dict(self.running)  # all checks come before the first change of state
        if not self.loss or other_turn:
            check_logits(teacher_logits, teacher_logits)
            loss = teacher_logits.new_zeros(())
        else:
            with frozen_parameters(student) if isinstance(student, nn.Module) else nullcontext():
                student_logits = student(images)
            d = measure(self.discrepancy, teacher_logits, student_logits)
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
            if other_terms is not None and evaluation % self.interval == 0:
                self._follow(running, weight=self._balance(term, other_terms, images))
            loss = (term * running.get("weight", 1.0)).to(teacher_logits.dtype)
        self.running, self.num_classes = running, teacher_logits.shape[1]
        self.calls += 1
        return loss

    def student_batch(self, *, images: Tensor, labels: Tensor | None = None) -> Any:
        """Interpolate the student's batch.

        Args:
            images: (N, ...), without a graph.
            labels: (N,) integers, the number of classes being that of the teacher's logits last
                seen by :meth:`generator_loss`, or (N, C) probabilities.

        Returns:
            Images, or (images, soft labels) if labels were given; as they came without
            interpolation, or after a call of :meth:`generator_loss` that was the loss's turn. The
            teacher must be asked again about new images.
        """
        if not self.interpolation or (self.alternate and self.calls % 2):
            return images if labels is None else (images, labels)
        if labels is None:
            return self.mix(images)
        if self.num_classes is None and not labels.is_floating_point():
            raise AgmValueError(
                "the number of classes is not known before the first generator_loss; "
                "until then give labels as (N, C) probabilities"
            )
        return self.mix(images, labels, num_classes=self.num_classes)

    def state_dict(self) -> dict[str, Any]:
        """Running averages, call count and the interpolation's random state."""
        return {
            "calls": self.calls,
            "num_classes": self.num_classes,
            "running": {name: value.clone() for name, value in self.running.items()},
            "interpolation": self.mix.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where :meth:`state_dict` was taken."""
        check_state(self, state, "calls", "num_classes", "running", "interpolation")
        self.mix.load_state_dict(state["interpolation"])
        self.calls, self.num_classes = state["calls"], state["num_classes"]
        self.running = {name: value.clone() for name, value in state["running"].items()}

    def _follow(self, running: dict[str, Tensor], **now: Tensor) -> None:
        """Move the averages; a value that is not finite is forgotten, also if it is the first."""
        for name, value in now.items():
            old = running[name].to(value) if name in running else value
            change = (value - old).nan_to_num(0.0, 0.0, 0.0)
            moved = torch.add(old, change, alpha=1 - self.decay)
            running[name] = torch.where(old.isfinite(), moved, value)

    def __repr__(self) -> str:
        # Not the repr of a callable object, which tells its address.
        name = getattr(self.discrepancy, "__name__", type(self.discrepancy).__name__)
        return (
            f"{type(self).__name__}(loss={self.loss}, interpolation={self.interpolation}, "
            f"discrepancy={name}, ratio={self.ratio}, decay={self.decay}, "
            f"interval={self.interval}, alternate={self.alternate})"
        )

    def _balance(self, term: Tensor, other_terms: Tensor, images: Tensor) -> Tensor:
        """The weight that holds the gradients' norms at the images in ``ratio``."""
        try:
            ours, theirs = (
                at_least_float32(torch.autograd.grad(t, images, retain_graph=True)[0]).norm()
                for t in (term, other_terms)
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise AgmValueError(
                "other_terms must be a scalar that depends on images, and images must carry a "
                f"graph: pass the generator's output itself, not a detached copy ({error})"
            ) from error
        old = self.running.get("weight", torch.ones_like(ours))
        weight = self.ratio * theirs / ours
        return torch.where(weight.isfinite(), weight, old.to(weight))
