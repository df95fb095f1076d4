"""What generated images are made to look like."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from baselines import quantize
from baselines.errors import ConfigError
from baselines.quantization.tracing import traced
from baselines.training.input_range import input_range
from benchmarks.task import datasets, teachers
from tests.baselines import Tiny, fill


class Normalising(nn.Module):
    """Takes images of another range and normalises them itself."""

    def __init__(self, network, mean, std):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x):
        return self.network((x - self.mean) / self.std)


@pytest.fixture(scope="module")
def digits():
    teacher = teachers.build("digits")
    _, _, x, y = datasets.digits()
    return teacher, x, y


@pytest.mark.parametrize("top", [1.0, 255.0, 2.0**16])
def test_the_first_batch_norm_tells_the_range(digits, top):
    teacher, x, _ = digits
    net = Normalising(teacher, [top / 2], [top / 2])
    pixels = (x + 1) / 2 * top
    with pytest.warns(UserWarning, match="first BatchNorm says.*input_mean"):
        mean, std = input_range(traced(net, (1, 8, 8)), None, None)
    assert abs(mean - pixels.mean()) < 0.2 * pixels.std()
    assert 0.7 < std / pixels.std() < 1.4


def test_near_standardised_inputs_are_taken_for_that(digits):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for net in (digits[0], Tiny()):
            shape = (1 if net is digits[0] else 3, 8, 8)
            mean, std = input_range(traced(net, shape), None, None)
            assert torch.equal(mean, torch.zeros(shape[0]))
            assert torch.equal(std, torch.ones(shape[0]))


def test_where_the_first_batch_norm_sees_no_affine_function_nothing_is_told():
    class Late(Tiny):
        def forward(self, x):
            return super().forward(F.relu(1000 * x) ** 2)

    class Rectified(nn.Module):
        """Linear on bright images, whose probes all are."""

        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.fc = nn.Linear(4, 5)
            fill(self, 1)
            with torch.no_grad():
                self.norm.running_var *= 1e4

        def forward(self, x):
            return self.fc(self.norm(F.relu(self.conv(x))).mean((2, 3)))

    for net in (Late(), Rectified()):
        mean, std = input_range(traced(net, (3, 8, 8)), None, None)
        assert (mean.tolist(), std.tolist()) == ([0.0] * 3, [1.0] * 3)


@pytest.mark.parametrize("given", [(0.5, 0.25), ([0.1, 0.2, 0.3], [1.0, 2.0, 3.0])], ids=str)
def test_generated_images_have_what_was_given(given):
    result = quantize(
        Tiny(), steps=3, batch_size=32, image_size=8, input_mean=given[0], input_std=given[1]
    )
    mean, std = (torch.tensor(v).expand(3) for v in given)
    got = result.images.transpose(0, 1).flatten(1)
    assert torch.allclose(got.mean(1), mean, atol=1e-3)
    assert torch.allclose(got.std(1), std, rtol=0.05)


def test_a_network_that_normalises_itself_is_quantized_as_well(digits):
    """At 2 bits, images of another range cost it some 20 points."""
    teacher, x, y = digits
    accuracies = {}
    for top in (None, 255.0):
        net = teacher if top is None else Normalising(teacher, [top / 2], [top / 2])
        pixels = x if top is None else (x + 1) / 2 * top
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = quantize(net, weight_bits=2, act_bits=2, image_size=8, steps=200, records=1)
        hits = result.model(pixels).argmax(1) == y
        accuracies[top] = 100 * float(hits.float().mean())
    assert accuracies[255.0] > accuracies[None] - 5


@pytest.mark.parametrize(
    ("mean", "std", "part"),
    [
        (0.5, None, "both"),
        (None, 0.5, "both"),
        ([0.5, 0.5], 0.5, "input_mean must be"),
        (0.5, 0.0, "input_std must be > 0"),
        (0.5, [1.0, 1.0, -1.0], "input_std must be > 0"),
        (float("nan"), 1.0, "input_mean must be"),
    ],
)
def test_bad_ranges(mean, std, part):
    with pytest.raises(ConfigError, match=part):
        quantize(Tiny(), steps=2, image_size=8, input_mean=mean, input_std=std)
