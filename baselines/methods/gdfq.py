"""GDFQ: Xu et al., "Generative Low-bitwidth Data Free Quantization", ECCV 2020.

L_G = CE(P(x), y) + 0.1 BNS
L_Q = CE(Q(x), y) + T^2 KL(softmax(P / T) || softmax(Q / T))

BNS is a mean over layers and their channels, where the paper's formula has a sum.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from agm.networks import Network
from baselines.training.generators import LabelledGenerator
from baselines.training.losses import distillation
from baselines.training.recipe import Recipe


@dataclass(frozen=True)
class Labelled:
    """The generator of GDFQ and AdaDFQ.

    Args:
        latent_dim: of z (default 100).
        width: of the generator's first convolution (default 128).
        many_classes: from this number of classes on, the label enters by class-conditional BNs on
            small images, too; None (default) for large images alone, as published.
        largest_start: side of the grid that it starts from, at most, see
            :class:`baselines.training.generators.Decoder`; None (default) as published.
    """

    latent_dim: int = 100
    width: int = 128
    many_classes: int | None = None
    largest_start: int | None = None

    def make_generator(
        self, teacher: nn.Module, num_classes: int, image_shape: tuple[int, int, int]
    ) -> nn.Module:
        """A generator of images of ``image_shape`` (channels, s, s), with its ``sample``."""
        channels, size, _ = image_shape
        return LabelledGenerator(
            num_classes, size, channels, latent_dim=self.latent_dim, width=self.width,
            many_classes=self.many_classes, largest_start=self.largest_start,
        )  # fmt: skip


@dataclass(frozen=True)
class GDFQ(Labelled):
    """The published losses and constants, besides the generator's.

    Args:
        bns_weight: of BNS in L_G (default 0.1).
        ce_weight: of the student's cross-entropy (default 1).
        temperature: T of the distillation (default 20).
        over_classes: average the KL over the classes too, as published (default True).
    """

    bns_weight: float = 0.1
    ce_weight: float = 1.0
    temperature: float = 20.0
    over_classes: bool = True

    def generator_terms(
        self,
        *,
        images: Tensor,
        labels: Tensor,
        teacher_logits: Tensor,
        bns: Tensor,
        student: Network,
    ) -> dict[str, Tensor]:
        """L_G, term by term."""
        return {"ce": F.cross_entropy(teacher_logits, labels), "bns": self.bns_weight * bns}

    def student_terms(
        self, *, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """L_Q, term by term."""
        kd = distillation(
            student_logits, teacher_logits, self.temperature, over_classes=self.over_classes
        )
        if not self.ce_weight:
            return {"kd": kd}
        return {"kd": kd, "ce": self.ce_weight * F.cross_entropy(student_logits, labels)}


def paper(image_size: int) -> tuple[GDFQ, Recipe]:
    """The published settings, for CIFAR up to 64 pixels and for ImageNet above.

    Two exceptions. The activations' straight-through gradient is clipped: with the published one,
    the identity, AdaDFQ's student grows without end beyond its frozen ranges from step 10,000 on
    (``benchmarks/evidence/results/ablation.md``). And above 64 pixels, too, ranges are observed in
    the warm-up's last 4 epochs, not in its first, whose images are noise.
    """
    small = image_size <= 64
    recipe = Recipe(
        steps=80_000,
        batch_size=200 if small else 16,
        warmup=4 / 400 if small else 50 / 400,
        observe=4 / 400,
        student_optimizer="sgd",
        student_lr=1e-4 if small else 1e-6,
        generator_lr=1e-3,
        schedule="steps",
        shift=False,
        relative_bns=False,
        layer_weight=0.0,
        activations="relu",
        ste="clipped",
        range_estimator="max",
        learned_steps=False,
        fold_batch_norm=False,
    )
    return GDFQ(), recipe


def quick(image_size: int) -> tuple[GDFQ, Recipe]:
    """What two CPU cores can wait for; chosen in ``benchmarks/evidence/results/ablation.md``."""
    large = image_size > 64
    recipe = Recipe(
        steps=600 if large else 3_600,
        batch_size=16 if large else 64,
        warmup=0.25,
        observe=0.01,
        student_optimizer="adam",
        student_lr=3e-3,
        generator_lr=1e-3,
        schedule="cosine",
        shift=image_size >= 32,  # of digits of 8 pixels an eighth is a stroke
        relative_bns=True,
        layer_weight=10.0,
        activations="inputs",
        ste="clipped",
        range_estimator="mse",
        learned_steps=True,
        fold_batch_norm=True,
    )
    method = GDFQ(
        width=64,
        many_classes=50,
        largest_start=8,
        bns_weight=50.0,
        ce_weight=0.0,
        temperature=4.0,
        over_classes=False,
    )
    return method, recipe
