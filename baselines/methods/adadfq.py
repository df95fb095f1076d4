"""AdaDFQ: Qian et al., "Adaptive Data-Free Quantization", CVPR 2023.

p_ds = softmax(P - Q), p_as = softmax(P + Q), H' = (H(p_ds) - min H) / (log C - min H)
L_G = mean max(0, lambda_l - H') + mean max(0, H' - lambda_u)
      + beta (alpha_ds CE(P - Q, y) + alpha_as CE(P + Q, y)) + gamma BNS
L_Q = -T^2 H(softmax((P - Q) / T))
"""

import math
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from agm.networks import Network
from baselines.methods import gdfq
from baselines.training.recipe import Recipe


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of the softmax in nats, (N, C) -> (N,)."""
    return -(F.softmax(logits, 1) * F.log_softmax(logits, 1)).sum(1)


def normalised_entropy(logits: Tensor) -> Tensor:
    """H', (N, C) -> (N,): 0 for the batch's least entropy, 1 for log C, above by rounding alone."""
    h = entropy(logits)
    least = h.min()
    return (h - least) / (math.log(logits.shape[1]) - least).clamp(min=1e-6)


@dataclass(frozen=True)
class AdaDFQ(gdfq.Labelled):
    """The published losses and constants, besides the generator's, which is GDFQ's.

    Args:
        lower, upper: lambda_l, lambda_u, the bounds of the normalised disagreement (0.1, 0.8).
        disagreement, agreement: alpha_ds, alpha_as (0.2, 0.1).
        bns_weight: gamma (1); beta is 1 as well.
        temperature: T (20; 5 on ImageNet).
    """

    lower: float = 0.1
    upper: float = 0.8
    disagreement: float = 0.2
    agreement: float = 0.1
    bns_weight: float = 1.0
    temperature: float = 20.0

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
        student_logits = student(images)
        apart, together = teacher_logits - student_logits, teacher_logits + student_logits
        h = normalised_entropy(apart)
        return {
            "bounds": F.relu(self.lower - h).mean() + F.relu(h - self.upper).mean(),
            "ds": self.disagreement * F.cross_entropy(apart, labels),
            "as": self.agreement * F.cross_entropy(together, labels),
            "bns": self.bns_weight * bns,
        }

    def student_terms(
        self, *, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """L_Q; the labels play no part in it."""
        h = entropy((teacher_logits - student_logits) / self.temperature)
        return {"agreement": -(self.temperature**2) * h.mean()}


def paper(image_size: int) -> tuple[AdaDFQ, Recipe]:
    """The published settings, with GDFQ's exceptions; ImageNet's are those of ResNet-18."""
    _, recipe = gdfq.paper(image_size)
    if image_size <= 64:
        return AdaDFQ(), replace(recipe, batch_size=16)
    recipe = replace(
        recipe, batch_size=16, student_lr=1e-5, warmup=4 / 400, milestones=(350 / 400,)
    )
    return AdaDFQ(temperature=5.0), recipe


def quick(image_size: int) -> tuple[AdaDFQ, Recipe]:
    """GDFQ's quick recipe with AdaDFQ's losses."""
    method = AdaDFQ(width=64, many_classes=50, largest_start=8, bns_weight=50.0)
    return method, gdfq.quick(image_size)[1]
