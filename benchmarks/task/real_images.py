"""Real images in the place of generated ones: a yardstick for better generators."""

from typing import Any

import torch
from torch import Tensor, nn

from baselines.training.shifted import draw_shift, shifted
from benchmarks.errors import UsageError
from benchmarks.task.task import Task, halves


class RealImages:
    """A hook that gives the student real images, mirrored and shifted by up to an eighth.

    They are the tuning half of the task's evaluation images, so that only the proof half can judge
    the student; all of them are held in memory.

    Args:
        seed: of which images a batch has, and how they are moved.

    Raises:
        UsageError: the task has no images, or only one of each class.
    """

    def __init__(self, task: Task, *, seed: int) -> None:
        if task.images is None:
            raise UsageError("real images for the student need --data, a folder of them")
        chosen = halves(task.images.labels)["tuning"]
        if not len(chosen):
            raise UsageError(
                "real images for the student are half of --data, which has one of each class"
            )
        self.images = torch.cat([batch for batch, _ in task.images])[chosen]
        self.labels = task.images.labels[chosen]
        self.task = task
        self.rng = torch.Generator().manual_seed(seed)

    def generator_loss(self, *, teacher_logits: Tensor, **_: Any) -> Tensor:
        return teacher_logits.new_zeros(())

    def student_batch(self, *, images: Tensor, labels: Tensor | None = None) -> Any:
        chosen = torch.randint(len(self.images), (len(images),), generator=self.rng)
        mirrored = torch.rand(len(images), 1, 1, 1, generator=self.rng) < 0.5
        batch = self.images[chosen]
        batch = torch.where(mirrored, batch.flip(3), batch)
        batch = shifted(batch, *draw_shift(batch.shape[-1], self.rng))
        return batch.to(images.device), self.labels[chosen].to(images.device)

    def figures(self, model: nn.Module) -> dict[str, float]:
        """As the task's, of the proof half alone."""
        proof = self.task.figures(model)["accuracy_proof"]
        return {"accuracy": proof, "accuracy_proof": proof}

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self.rng.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rng.set_state(state["rng"])
