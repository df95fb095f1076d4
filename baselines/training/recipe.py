"""How long and with which optimizers a run trains; the methods hold the losses."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from baselines.errors import ConfigError
from baselines.quantization.policy import QuantizationConfig
from baselines.quantization.quantizers import check_choice
from baselines.training.units import in_units


@dataclass(frozen=True)
class Recipe:
    """Lengths, rates and the student's quantizers' habits.

    Args:
        steps: generator steps in all, those of the warm-up and at least one more.
        batch_size: images a step.
        warmup: share of the steps, in [0, 1), in which the generator trains alone.
        observe: share of the steps, the last of the warm-up, in which ranges are observed.
        student_optimizer: ``"sgd"`` (Nesterov, momentum 0.9, weight decay 1e-4) or ``"adam"``.
        student_lr: peak rate; for ``"adam"`` in steps of quantization, see
            :mod:`baselines.training.units`.
        generator_lr: peak rate of the generator's Adam (betas 0.5/0.999).
        schedule: ``"steps"``, x0.1 at each of ``milestones``; ``"cosine"`` to 0; ``"constant"``.
        milestones: shares of the steps (default: each quarter, as published for CIFAR).
        shift: the generated images of a step by up to an eighth, before anything looks at them.
        relative_bns: count a BatchNorm's errors in units of its own variance, see
            :func:`baselines.training.bn_stats.normalising_layers`.
        layer_weight: of the layers' distance in the student's loss, which falls as the learning
            rates do, see :mod:`baselines.training.layers`; 0 for none.
        activations, ste, range_estimator, learned_steps, fold_batch_norm: see
            :class:`baselines.quantization.policy.QuantizationConfig`.
    """

    steps: int
    batch_size: int
    warmup: float
    observe: float
    student_optimizer: str
    student_lr: float
    generator_lr: float
    schedule: str
    shift: bool
    relative_bns: bool
    layer_weight: float
    activations: str
    ste: str
    range_estimator: str
    learned_steps: bool
    fold_batch_norm: bool
    milestones: tuple[float, ...] = (0.25, 0.5, 0.75)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number >= 1, got {value!r}")
        if not 0 < self.observe <= self.warmup < 1:
            raise ConfigError(
                "need 0 < observe <= warmup < 1, shares of the steps, "
                f"got observe={self.observe!r}, warmup={self.warmup!r}"
            )
        if self.steps <= self.warmup_steps:
            raise ConfigError(
                f"steps={self.steps!r} is all warm-up, in which the generator trains alone; "
                "choose 2 or more"
            )
        for name in ("student_lr", "generator_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)!r}")
        if not 0 <= self.layer_weight < math.inf:
            raise ConfigError(f"layer_weight must be >= 0, got {self.layer_weight!r}")
        check_choice("schedule", self.schedule, ("steps", "cosine", "constant"))
        check_choice("student_optimizer", self.student_optimizer, ("sgd", "adam"))

    @property
    def warmup_steps(self) -> int:
        """Steps of the generator alone, at least 1, so that ranges have been observed."""
        return max(1, round(self.steps * self.warmup))

    @property
    def observe_steps(self) -> int:
        """How many of them observe ranges."""
        return min(self.warmup_steps, max(1, round(self.steps * self.observe)))

    def factor(self, step: int) -> float:
        """What both learning rates are multiplied with at a step, counted from 0."""
        if self.schedule == "steps":
            return 0.1 ** sum(step >= share * self.steps for share in self.milestones)
        if self.schedule == "constant" or step < self.warmup_steps:
            return 1.0
        trained = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return (1 + math.cos(math.pi * trained)) / 2

    def config(self, weight_bits: int, act_bits: int, **given: Any) -> QuantizationConfig:
        """The student's, with what else is given of it."""
        return QuantizationConfig(
            weight_bits, act_bits, activations=self.activations, ste=self.ste,
            range_estimator=self.range_estimator, learned_steps=self.learned_steps,
            fold_batch_norm=self.fold_batch_norm, **given,
        )  # fmt: skip

    def optimizers(
        self, generator: nn.Module, student: nn.Module
    ) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        """The generator's and the student's, with fused updates."""
        for_generator = torch.optim.Adam(
            generator.parameters(), lr=self.generator_lr, betas=(0.5, 0.999), fused=True
        )
        if self.student_optimizer == "adam":
            groups = [
                {"params": params, "lr": self.student_lr * unit}
                for unit, params in in_units(student)
            ]
            return for_generator, torch.optim.Adam(groups, fused=True)
        return for_generator, torch.optim.SGD(
            student.parameters(), lr=self.student_lr, momentum=0.9, nesterov=True,
            weight_decay=1e-4, fused=True,
        )  # fmt: skip
