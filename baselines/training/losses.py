"""Loss terms that several methods share; each a scalar."""

import torch.nn.functional as F
from torch import Tensor


def distillation(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, *, over_classes: bool
) -> Tensor:
    """T^2 * KL(softmax(P / T) || softmax(Q / T)), averaged over the batch.

    Args:
        student_logits, teacher_logits: Q and P, (N, C).
        over_classes: average over the C classes as well, as the published GDFQ code does, which
            makes the term C times smaller.
    """
    log_q = F.log_softmax(student_logits / temperature, 1)
    log_p = F.log_softmax(teacher_logits / temperature, 1)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    return temperature**2 * (kl.mean() if over_classes else kl.sum(1).mean())
