"""Real images in the place of generated ones."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from benchmarks.errors import UsageError
from benchmarks.task.real_images import RealImages
from benchmarks.task.task import Task, halves


@dataclass
class Given:
    """As many images as labels, each of its own values: image i in [i, i + 0.5)."""

    labels: Tensor
    batch_size: int = 3

    def __post_init__(self):
        n = len(self.labels)
        self.images = torch.arange(float(n)).view(n, 1, 1, 1) + torch.rand(n, 3, 16, 16) / 2

    def __len__(self):
        return len(self.labels)

    def __iter__(self):
        return zip(
            self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True
        )


class Last(nn.Module):
    """A network that is right about the images from ``first`` on, of two classes."""

    def __init__(self, first, labels):
        super().__init__()
        self.first, self.labels = first, labels

    def forward(self, x):
        number = x.mean((1, 2, 3)).floor().long()
        right = self.labels[number]
        return nn.functional.one_hot(torch.where(number >= self.first, right, 1 - right), 2).float()


def task(labels):
    return Task(nn.Identity(), None, Given(torch.tensor(labels)), "cpu")


def test_they_are_those_of_the_tuning_half_moved():
    its = task([0, 1, 0, 1, 1, 0, 0])
    chosen = halves(its.images.labels)["tuning"].tolist()
    hook = RealImages(its, seed=0)
    shown = [hook.student_batch(images=torch.zeros(40, 3, 16, 16)) for _ in range(3)]
    for batch, labels in shown:
        assert batch.shape == (40, 3, 16, 16)
        assert {int(image.min()) for image in batch} == set(chosen)
        for image, label in zip(batch, labels, strict=True):
            source = int(image.min())
            assert label == its.images.labels[source]
            assert set(image.flatten().tolist()) <= set(
                its.images.images[source].flatten().tolist()
            )
    assert not torch.equal(shown[0][0], shown[1][0])
    assert hook.generator_loss(images=batch, teacher_logits=torch.ones(2, 3), student=None) == 0


def test_a_run_goes_on_with_the_same_batches():
    its = task([0, 0, 1, 1])
    hook, other = (RealImages(its, seed=seed) for seed in (0, 1))
    batch = torch.zeros(5, 3, 16, 16)
    hook.student_batch(images=batch)
    other.load_state_dict(hook.state_dict())
    for got, want in zip(other.student_batch(images=batch), hook.student_batch(images=batch),
                         strict=True):  # fmt: skip
        assert torch.equal(got, want)


def test_the_others_alone_judge():
    its = task([0, 0, 0, 0, 1, 1, 1, 1])  # tuning: 0, 1, 4, 5
    hook = RealImages(its, seed=0)
    assert hook.figures(Last(6, its.images.labels)) == {"accuracy": 50, "accuracy_proof": 50}
    assert hook.figures(Last(0, its.images.labels)) == {"accuracy": 100, "accuracy_proof": 100}


@pytest.mark.parametrize(
    ("labels", "part"), [([0, 1, 2], "one of each class"), (None, "need --data")]
)
def test_without_images_to_learn_from(labels, part):
    its = Task(nn.Identity(), None, None if labels is None else task(labels).images, "cpu")
    with pytest.raises(UsageError, match=part):
        RealImages(its, seed=0)
