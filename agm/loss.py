"""The adversarial Gaussian-margin loss."""

import math

import torch
from torch import Tensor, nn

from agm.errors import AgmValueError, check_argument
from agm.functional import (
    Discrepancy,
    expected_margin,
    measure,
    resolve_discrepancy,
    sampled_margin,
)


class GaussianMarginLoss(nn.Module):
    """Adversarial Gaussian-margin loss, L = max(0, m - d) with m ~ N(mean, std^2) per sample.

    d >= 0 is the discrepancy between the full-precision teacher and the quantized student. The
    *generator* minimises L, so it is pushed towards images on which the two disagree, and only
    where they disagree too little. Stateless; the margin is fixed (:class:`agm.AGM` adapts it).

    Args:
        mean: of the margin, in the discrepancy's units (default 0.5, for ``total_variation``).
        std: of the margin, >= 0 (default 0.25); 0 is the plain hinge.
        discrepancy: a name of ``agm.functional.DISCREPANCIES`` or a callable
            (teacher_logits, student_logits) -> (N,) (default ``"total_variation"``, in [0, 1]).
        mode: ``"expected"`` (default), the closed form std * (phi(z) + z * Phi(z)) with
            z = (mean - d) / std, free of sampling noise; or ``"sampled"``.
        reduction: ``"mean"`` (default), ``"sum"`` or ``"none"``.

    Raises:
        AgmValueError: one of them is out of range or unknown.

    Source: the idea is Luo et al., IEEE TCSVT 2024, doi 10.1109/TCSVT.2024.3399311; the formula and
    the constants are this project's.
    """

    def __init__(
        self,
        mean: float = 0.5,
        std: float = 0.25,
        *,
        discrepancy: str | Discrepancy = "total_variation",
        mode: str = "expected",
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_argument("mean", mean, "finite", math.isfinite)
        check_argument("std", std, "finite and >= 0", lambda x: 0 <= x < math.inf)
        check_argument(
            "mode", mode, "'expected' or 'sampled'", ("expected", "sampled").__contains__
        )
        check_argument(
            "reduction", reduction, "'mean', 'sum' or 'none'", ("mean", "sum", "none").__contains__
        )
        self.mean, self.std, self.mode, self.reduction = mean, std, mode, reduction
        self.discrepancy = resolve_discrepancy(discrepancy)

    def forward(
        self,
        *,
        teacher_logits: Tensor,
        student_logits: Tensor,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            teacher_logits, student_logits: (N, C). Half precision is computed in float32.
            noise: standard normal draws, (N,); only for ``mode="sampled"``.
            generator: draws that noise, on its own device; only for ``mode="sampled"``.

        Returns:
            A scalar, or (N,) for ``reduction="none"``, in the wider dtype of the two, float32 at
            least: a half-precision loss would overflow in a ``GradScaler``. Gradients flow to
            whichever logits have a graph.

        Raises:
            AgmValueError: logits that are not floating, of different shapes or not (N, C) with
                N, C >= 1; a callable discrepancy of another shape than (N,), or noise; neither or
                both of noise and generator where one is needed, or either in the other mode.
        """
        d = measure(self.discrepancy, teacher_logits, student_logits)
        if self.mode == "expected":
            if noise is not None or generator is not None:
                raise AgmValueError("mode='expected' takes neither noise nor generator")
            loss = expected_margin(d, self.mean, self.std)
        else:
            if (noise is None) == (generator is None):
                raise AgmValueError("mode='sampled' needs exactly one of noise= and generator=")
            if noise is None:
                assert generator is not None
                noise = torch.randn(
                    d.shape, dtype=d.dtype, device=generator.device, generator=generator
                )
            loss = sampled_margin(d, self.mean, self.std, noise)
        return loss if self.reduction == "none" else getattr(loss, self.reduction)()

    def extra_repr(self) -> str:
        name = getattr(self.discrepancy, "__name__", repr(self.discrepancy))
        return (
            f"mean={self.mean}, std={self.std}, discrepancy={name}, "
            f"mode={self.mode}, reduction={self.reduction}"
        )
