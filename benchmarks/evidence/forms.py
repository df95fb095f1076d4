"""Forms of the add-on beside the one that it has, on the tuning half.

    python benchmarks/evidence/forms.py --baseline adadfq --bits 2 --seeds 10

"two-sided" adds to AGM a margin from above: its loss is weight * mean of E[max(0, m - d)] +
E[max(0, d - m')], m' ~ N(mean + std, std^2), so that images on which the networks disagree far more
than usually are held back. "pool S" is the plain method for the share S of the steps, whose images
are kept; then half of the student's batch are these, and in "pool S, adversary R" the generator has
the loss in every step, at the ratio R. It has no interpolation.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import benchmarks  # noqa: F401 - first, since it says what is missing

# isort: split
import torch
from torch import Tensor

from agm import AGM, Hook
from agm.functional import expected_margin, total_variation
from benchmarks.evidence import paired

RECORDS = Path(__file__).parent / "results" / "search" / "forms-later.jsonl"
KEPT = 16384  # images


class TwoSided(AGM):
    """AGM with a margin from above, a deviation over the one from below."""

    def generator_loss(
        self, *, images: Tensor, teacher_logits: Tensor, student: Any, **given: Any
    ) -> Tensor:
        below = super().generator_loss(
            images=images, teacher_logits=teacher_logits, student=student, **given
        )
        if not below.requires_grad:  # not the loss's turn
            return below
        d = total_variation(teacher_logits, student(images))  # the trainer remembers its logits
        mean, std = self.running["mean"], self.running["variance"].sqrt()
        above = expected_margin(-d, -(mean + std), std).mean()
        return below + self.running.get("weight", 1.0) * above


class Pool(AGM):
    """The plain method first, then a batch of half kept images, half those of now.

    Args:
        plain_steps: how many of the first.
        adversary: the loss's ratio from then on; None for none.
        seed: of which images are kept and drawn.
    """

    def __init__(self, *, plain_steps: int, adversary: float | None, seed: int) -> None:
        loss = {"loss": False} if adversary is None else {"ratio": adversary}
        super().__init__(interpolation=False, alternate=False, **loss)
        self.plain_steps, self.steps, self.seen = plain_steps, 0, 0
        self.rng = torch.Generator().manual_seed(seed)
        self.kept: tuple[Tensor, ...] = ()

    def generator_loss(self, *, teacher_logits: Tensor, **given: Any) -> Tensor:
        if self.steps < self.plain_steps:
            return teacher_logits.new_zeros(())
        return super().generator_loss(teacher_logits=teacher_logits, **given)

    def student_batch(self, *, images: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
        self.steps += 1
        n = len(images)
        if self.steps <= self.plain_steps:
            self.kept = self.kept or tuple(
                x.new_empty(KEPT, *x.shape[1:]) for x in (images, labels)
            )
            place = torch.arange(self.seen, self.seen + n)
            if self.seen + n > KEPT:  # the last free places, then any
                free = torch.arange(self.seen, KEPT)
                place = torch.cat([free, torch.randperm(self.seen, generator=self.rng)])[:n]
            for kept, now in zip(self.kept, (images, labels), strict=True):
                kept[place] = now
            self.seen = min(self.seen + n, KEPT)
            return images, labels
        chosen = torch.randint(self.seen, (n // 2,), generator=self.rng)
        now = (images, labels)
        return tuple(
            torch.cat([k[chosen], x[n // 2 :]]) for k, x in zip(self.kept, now, strict=True)
        )


def pool(share: float, adversary: float | None, seed: int, steps: int) -> list[Hook]:
    return [Pool(plain_steps=round(share * steps), adversary=adversary, seed=seed)]


ARMS: paired.Arms = {
    paired.BASELINE: lambda seed, steps: [],
    "AGM": lambda seed, steps: [AGM(seed=seed)],
    "two-sided": lambda seed, steps: [TwoSided(seed=seed)],
    "pool 0.8": partial(pool, 0.8, None),
    "pool 0.8, adversary 1": partial(pool, 0.8, 1.0),
    "pool 0.5": partial(pool, 0.5, None),
    "pool 0.5, adversary 0.2": partial(pool, 0.5, 0.2),
}


def main(argv: list[str]) -> int:
    """Exit status 0, or 2 for a user's mistake."""
    return paired.main(
        argv, program="forms.py", doc=__doc__, arms=ARMS, records=RECORDS, half="tuning"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
