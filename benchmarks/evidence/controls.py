"""What of the add-on's effect is its own: it and its parts, each beside a control as strong.

    python benchmarks/evidence/controls.py --baseline all --bits 2 --seeds 10 --first-seed 100

The loss's control adds noise to the images' gradient, as long as the loss's own. Interpolation's
moves an image as far as interpolation would, in a random direction. Both keep to the same turns,
and are the control of the whole. Judged on the proof half.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import benchmarks  # noqa: F401 - first, since it says what is missing

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor

from agm import AGM, Hook, LinearInterpolation
from benchmarks import report
from benchmarks.evidence import paired

CONTROL = ", control"
RECORDS = Path(__file__).parent / "results" / "controls.jsonl"


class NoiseForLoss(AGM):
    """Gaussian noise at the images, as long as the gradient that the loss would have there."""

    def __init__(self, *, seed: int, **parts: bool) -> None:
        super().__init__(seed=seed, **parts)
        self.rng = torch.Generator().manual_seed(seed)

    def generator_loss(self, *, images: Tensor, **given: Any) -> Tensor:
        term = super().generator_loss(images=images, **given)
        if not term.requires_grad:  # not the loss's turn
            return term
        (gradient,) = torch.autograd.grad(term, images, retain_graph=True)
        noise = torch.randn(images.shape, generator=self.rng).to(gradient)
        return (images * (noise * (gradient.norm() / noise.norm()))).sum()


class NoiseForInterpolation(LinearInterpolation):
    """Each image moved as far as interpolation would, in a random direction; labels kept."""

    def __init__(self, *, seed: int) -> None:
        super().__init__(seed=seed, regions=True)  # as AGM's
        self.rng = torch.Generator().manual_seed(seed)

    def __call__(self, images: Tensor, labels: Tensor, **given: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        mixed, soft = super().__call__(images, labels, **given)
        noise = torch.randn(images.shape, generator=self.rng).to(images)
        far, length = (x.flatten(1).norm(dim=1) for x in (mixed - images, noise))
        if not labels.is_floating_point():
            labels = F.one_hot(labels, soft.shape[1]).to(soft)
        return images + noise * (far / length)[:, None, None, None], labels


def hooks(arm: str, seed: int, steps: int = 0) -> list[Hook]:
    """Of an arm, all of one seed; ``steps``, which arms are given, is not asked for here."""
    if arm == "none":
        return []
    part = arm.removesuffix(CONTROL)
    if part == arm:
        return [AGM(seed=seed, **report.parts(part))]
    hook = NoiseForLoss(seed=seed, **report.parts(part))
    hook.mix = NoiseForInterpolation(seed=seed)
    return [hook]


ARMS = {
    arm: partial(hooks, arm)
    for arm in (paired.BASELINE, *(part + kind for part in report.PARTS for kind in ("", CONTROL)))
}


def main(argv: list[str]) -> int:
    """Exit status 0, or 2 for a user's mistake."""
    return paired.main(
        argv, program="controls.py", doc=__doc__, arms=ARMS, records=RECORDS, half="proof"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
