"""GDFQ, Qimera, AdaDFQ: losses against loops, generators, published settings."""

import copy
import functools
import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from baselines import METHODS
from baselines.errors import ConfigError, UnsupportedLayerError
from baselines.methods import adadfq, gdfq, qimera
from baselines.methods.adadfq import AdaDFQ, normalised_entropy
from baselines.methods.gdfq import GDFQ
from baselines.methods.qimera import Qimera
from baselines.quantization.student import build_student
from baselines.quantization.tracing import traced
from baselines.training.generators import Decoder, upsampled_convolution
from tests.baselines import Tiny, cross_entropy_of, entropy_of, images, kl_of, weights
from tests.baselines.strategies import logit_batches
from tests.strategies import logit_pairs, rng, seeds

SMALL = {name: replace(module.paper(8)[0], width=8, latent_dim=6)
         for name, module in METHODS.items()}  # fmt: skip


def total(terms):
    return sum(term.item() for term in terms.values())


def labels_for(logits, seed, soft):
    n, c = logits.shape
    if soft:
        return torch.randn(n, c, generator=rng(seed), dtype=logits.dtype).softmax(1)
    return torch.randint(c, (n,), generator=rng(seed))


def generator_loss(method, teacher, labels, bns, student=None):
    def student_of(given):
        assert given is pictures
        return student

    pictures = torch.zeros(len(teacher), 1)
    return total(
        method.generator_terms(
            images=pictures,
            labels=labels,
            teacher_logits=teacher,
            bns=torch.tensor(bns, dtype=teacher.dtype),
            student=student_of,
        )
    )


def student_loss(method, teacher, student, labels):
    return total(
        method.student_terms(student_logits=student, teacher_logits=teacher, labels=labels)
    )


# GDFQ and Qimera: the same losses, Qimera's on soft labels

PAIRS = logit_pairs(max_scale=10).filter(lambda pair: pair[0].shape[1] > 1)


@given(PAIRS, st.floats(0, 10), seeds, st.booleans())
def test_gdfq_generator_loss(pair, bns, seed, soft):
    teacher, _ = pair
    y = labels_for(teacher, seed, soft)
    want = cross_entropy_of(teacher.tolist(), y.tolist()) + 0.1 * bns
    for method in (GDFQ(), Qimera()):
        assert generator_loss(method, teacher, y, bns) == pytest.approx(want, rel=1e-9, abs=1e-12)


@given(PAIRS, seeds, st.booleans())
def test_gdfq_student_loss(pair, seed, soft):
    teacher, student = pair
    y = labels_for(teacher, seed, soft)
    rows = list(zip(teacher.tolist(), student.tolist(), strict=True))
    n, c = teacher.shape
    kd = 20**2 * sum(kl_of(p, q, 20) for p, q in rows) / (n * c)
    want = kd + cross_entropy_of(student.tolist(), y.tolist())
    for method in (GDFQ(), Qimera()):
        assert student_loss(method, teacher, student, y) == pytest.approx(want, rel=1e-8, abs=1e-9)


@given(PAIRS, seeds, st.floats(0.5, 50), st.booleans(), st.sampled_from([0.0, 0.3, 1.0]))
def test_gdfq_student_loss_with_other_constants(pair, seed, temperature, over_classes, weight):
    teacher, student = pair
    y = labels_for(teacher, seed, False)
    rows = list(zip(teacher.tolist(), student.tolist(), strict=True))
    kd = temperature**2 * sum(kl_of(p, q, temperature) for p, q in rows) / len(rows)
    kd /= teacher.shape[1] if over_classes else 1
    want = kd + weight * cross_entropy_of(student.tolist(), y.tolist())
    method = GDFQ(temperature=temperature, over_classes=over_classes, ce_weight=weight)
    assert student_loss(method, teacher, student, y) == pytest.approx(want, rel=1e-8, abs=1e-9)


def test_distillation_moves_the_student_towards_the_teacher():
    teacher, student = torch.tensor([[2.0, 0, -1]]), torch.zeros(1, 3, requires_grad=True)
    method = GDFQ(ce_weight=0)
    (term,) = method.student_terms(
        student_logits=student, teacher_logits=teacher, labels=torch.tensor([2])
    ).values()
    (slope,) = torch.autograd.grad(term, student)
    assert slope[0, 0] < 0 < slope[0, 2]


# AdaDFQ


def normalised_entropy_of(rows):
    entropies = [entropy_of(row) for row in rows]
    least, most = min(entropies), math.log(len(rows[0]))
    return [(h - least) / (most - least) for h in entropies]


@given(PAIRS, st.floats(0, 10), seeds)
def test_adadfq_generator_loss(pair, bns, seed):
    teacher, student = pair[0], pair[1] + labels_for(pair[0], seed, True)  # nowhere equal
    y = labels_for(teacher, seed, False)
    apart, together = (teacher - student).tolist(), (teacher + student).tolist()
    h = normalised_entropy_of(apart)
    want = (
        sum(max(0, 0.1 - x) for x in h) / len(h)
        + sum(max(0, x - 0.8) for x in h) / len(h)
        + 0.2 * cross_entropy_of(apart, y.tolist())
        + 0.1 * cross_entropy_of(together, y.tolist())
        + bns
    )
    assert generator_loss(AdaDFQ(), teacher, y, bns, student) == pytest.approx(want, abs=1e-6)


@given(PAIRS, st.sampled_from([20.0, 5.0]))
def test_adadfq_student_loss(pair, temperature):
    teacher, student = pair
    rows = ((teacher - student) / temperature).tolist()
    want = -(temperature**2) * sum(map(entropy_of, rows)) / len(rows)
    method, y = AdaDFQ(temperature=temperature), labels_for(teacher, 0, False)
    assert student_loss(method, teacher, student, y) == pytest.approx(want, rel=1e-9)


def test_agreement_is_the_least_of_adadfqs_student_loss():
    teacher = torch.randn(4, 5, generator=rng(0))
    y = torch.zeros(4).long()
    least = student_loss(AdaDFQ(), teacher, teacher, y)
    assert least == pytest.approx(-400 * math.log(5), rel=1e-6)
    assert student_loss(AdaDFQ(), teacher, 3 * teacher, y) > least


@given(logit_batches())
def test_normalised_entropy_lies_in_the_unit_interval(logits):
    h = normalised_entropy(logits)
    assert h.min() == 0
    assert h.max() <= 1 + 1e-5


@given(logit_batches(), st.booleans())
def test_equal_entropies_stay_finite(logits, uniform):
    row = (0 if uniform else 1) * logits[:1]
    logits = row.expand_as(logits).clone().requires_grad_()
    h = normalised_entropy(logits)
    h.sum().backward()
    assert h.detach().abs().max() <= 1
    assert logits.grad.isfinite().all()


def test_equal_networks_give_adadfq_finite_losses():
    logits = torch.randn(4, 3, generator=rng(0))
    assert math.isfinite(generator_loss(AdaDFQ(), logits, torch.zeros(4).long(), 1.0, logits))


# Qimera's superposed latents


@functools.cache
def make_qimera(p=0.4, k=3, classes=5, **settings):
    method = Qimera(width=4, latent_dim=6, probability=p, superposed=k, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return method.make_generator(Tiny(classes=classes), classes, (3, 8, 8))


@given(seeds, st.floats(0, 1), st.integers(1, 7), st.integers(1, 5))
def test_soft_labels_are_probabilities(seed, p, k, n):
    (chosen, _, w), labels = make_qimera(p, k).sample(n, rng(seed))
    assert labels.shape == (n, 5)
    assert torch.allclose(labels.sum(1), torch.ones(n), atol=1e-6)
    assert labels.min() >= 0
    for classes, shares, row in zip(chosen.tolist(), w.tolist(), labels.tolist(), strict=True):
        want = [sum(s for c, s in zip(classes, shares, strict=True) if c == i) for i in range(5)]
        assert row == pytest.approx(want, abs=1e-6)


def is_superposed(sample):
    (_, _, w), _ = sample
    rows = [row.tolist() == [1.0, 0.0, 0.0] for row in w]
    assert len(set(rows)) == 1  # the whole batch alike
    return not rows[0]


@given(seeds)
def test_probability_zero_and_one(seed):
    assert not is_superposed(make_qimera(0).sample(4, rng(seed)))
    assert is_superposed(make_qimera(1).sample(4, rng(seed)))
    _, labels = make_qimera(0).sample(4, rng(seed))
    assert labels.amax(1).tolist() == [1.0] * 4


def test_probability_between():
    generator, g = make_qimera(0.4), rng(0)
    share = np.mean([is_superposed(generator.sample(3, g)) for _ in range(1000)])
    assert share == pytest.approx(0.4, abs=4 * math.sqrt(0.24 / 1000))


@given(seeds, st.integers(1, 4), st.booleans())
def test_latents_as_written_out(seed, n, superposing):
    generator = make_qimera(float(superposing))
    inputs, _ = generator.sample(n, rng(seed))
    seen = []
    handle = generator.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    generator(*inputs)
    handle.remove()
    table, m = generator.embedding.weight.tolist(), generator.disentangle
    for i, (classes, noise, w) in enumerate(zip(*(x.tolist() for x in inputs), strict=True)):
        want = np.zeros(6)
        for c, z, share in zip(classes, noise, w, strict=True):
            v = np.array(table[c]) + np.array(z)
            v = (v - v.mean()) / math.sqrt(((v - v.mean()) ** 2).mean() + 1e-5)
            want += share * (m.weight.detach().numpy() @ v + m.bias.detach().numpy())
        assert seen[0][i].tolist() == pytest.approx(want.tolist(), abs=1e-5)


def test_without_superposition_only_the_first_class_counts():
    generator = copy.deepcopy(make_qimera(0)).eval()
    (classes, noise, w), _ = generator.sample(4, rng(0))
    other = torch.cat([classes[:, :1], (classes[:, 1:] + 1) % 5], 1)
    assert torch.equal(generator(classes, noise, w), generator(other, noise, w))


def test_embeddings_from_the_classifier():
    teacher = Tiny(classes=5, width=7)
    before = weights(teacher)
    generator = Qimera(width=4, from_classifier=True).make_generator(teacher, 5, (3, 8, 8))
    assert torch.equal(generator.embedding.weight, teacher.fc.weight)
    images = generator(*generator.sample(3, rng(0))[0])
    images.square().mean().backward()
    assert generator.embedding.weight.grad is not None
    with torch.no_grad():
        generator.embedding.weight.add_(1)
    assert weights(teacher) == before


@pytest.mark.parametrize(
    ("classes", "size", "from_classifier", "k"),
    [(10, 32, False, 2), (100, 32, True, 10), (1000, 224, False, 100)],
)
def test_published_starts(classes, size, from_classifier, k):
    teacher = Tiny(classes=classes)
    generator = Qimera(width=2).make_generator(teacher, classes, (3, size, size))
    rows = generator.embedding.weight
    assert (rows.shape == teacher.fc.weight.shape) == from_classifier
    assert rows.shape == ((classes, 4) if from_classifier else (classes, 64))
    (chosen, _, _), _ = generator.sample(2, rng(0))
    assert chosen.shape == (2, k)


def test_embeddings_from_a_convolutional_classifier():
    teacher = nn.Sequential(
        nn.Linear(3, 20), nn.Conv2d(3, 20, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    generator = Qimera(width=4, from_classifier=True).make_generator(teacher, 20, (3, 8, 8))
    assert generator.embedding.weight.tolist() == teacher[1].weight[:, :, 0, 0].tolist()
    assert generator(*generator.sample(3, rng(0))[0]).shape == (3, 3, 8, 8)


def test_the_last_layer_is_the_one_that_runs_last():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.ends = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.Linear(20, 20)])
            self.body = nn.Conv2d(4, 20, 1)

        def forward(self, x):
            return self.ends[1](self.body(self.ends[0](x)).mean((2, 3)))

    teacher = traced(Listed(), (3, 8, 8))
    generator = Qimera(width=4, from_classifier=True).make_generator(teacher, 20, (3, 8, 8))
    assert torch.equal(generator.embedding.weight, teacher.get_parameter("ends.1.weight"))


@pytest.mark.parametrize(
    ("teacher", "shape"),
    [
        (Tiny(classes=7), (7, 4)),
        (nn.Sequential(nn.Linear(3, 20), nn.Conv2d(3, 20, 3)), (20, 3, 3, 3)),
        (nn.Sequential(nn.Linear(3, 20), nn.Conv2d(20, 7, 1)), (7, 20, 1, 1)),
        (nn.ReLU(), ()),
    ],
)
def test_no_classifier_to_start_from(teacher, shape):
    received = rf"20 outputs.*weights {re.escape(str(shape))}; choose another method"
    with pytest.raises(UnsupportedLayerError, match=received):
        Qimera(from_classifier=True).make_generator(teacher, 20, (3, 8, 8))


# Generators


def make(name, size=8, classes=4, channels=3, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = (channels, size, size)
        return replace(SMALL[name], **settings).make_generator(
            Tiny(classes=classes), classes, shape
        )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("size", "channels"), [(4, 1), (8, 3), (12, 2), (32, 3), (68, 3)])
def test_images_are_standardised(name, size, channels):
    generator = make(name, size, channels=channels).train()
    inputs, labels = generator.sample(6, rng(0))
    pictures = generator(*inputs)
    assert pictures.shape == (6, channels, size, size)
    assert len(labels) == 6
    for c in range(channels):
        values = pictures[:, c].detach().double()
        assert values.mean().item() == pytest.approx(0, abs=1e-4)
        assert values.var(correction=0).item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("name", ["gdfq", "adadfq"])
@pytest.mark.parametrize(
    ("size", "many", "conditional"),
    [(8, None, False), (68, None, True), (8, 4, True), (8, 5, False), (68, 5, True)],
)
def test_each_image_has_its_own_label(name, size, many, conditional):
    generator = make(name, size, many_classes=many).train()
    assert (generator.embedding is None) == conditional
    (z, y), labels = generator.sample(3, rng(0))
    assert torch.equal(y, labels)
    with torch.no_grad():
        generator(z, y)
        for p in generator.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=rng(1)))
        generator.eval()  # in train mode the batch's statistics tie the images together
        first = generator(z, torch.tensor([0, 1, 2]))
        second = generator(z, torch.tensor([0, 3, 2]))
    same = [torch.allclose(a, b, atol=1e-6) for a, b in zip(first, second, strict=True)]
    assert same == [True, False, True]


def batch_norm(x, eps, gain=1.0, shift=0.0):
    mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    over_channels = (1, -1, 1, 1)
    gain, shift = np.reshape(gain, over_channels), np.reshape(shift, over_channels)
    return (x - mean) / np.sqrt(var + eps) * gain + shift


def convolve(x, weight, bias):
    """3 x 3, zero padding, pixel by pixel."""
    n, _, height, width = x.shape
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.zeros((n, len(weight), height, width))
    for i, j in np.ndindex(height, width):
        window = x[:, :, i : i + 3, j : j + 3].reshape(n, -1)
        out[:, :, i, j] = window @ weight.reshape(len(weight), -1).T + bias
    return out


@given(seeds, *[st.integers(1, 4)] * 5)
def test_upsampled_convolution_and_its_gradients(seed, n, channels, outputs, height, width):
    g = rng(seed)
    shapes = (n, channels, height, width), (outputs, channels, 3, 3), (outputs,)
    inputs = [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]
    got = upsampled_convolution(*inputs)
    x, weight, bias = inputs
    want = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    direction = torch.randn(got.shape, generator=g, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(got, inputs, direction),
        torch.autograd.grad(want, inputs, direction),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["gdfq", "adadfq"])
@pytest.mark.parametrize(("largest_start", "start"), [(None, 2), (7, 2), (1, 1)])
def test_the_generator_as_written_out(name, largest_start, start):
    generator = make(name, largest_start=largest_start).double().train()
    with torch.no_grad():
        for p in generator.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=rng(1)))
    (z, y), _ = generator.sample(5, rng(0))
    got = generator(z.double(), y).detach().numpy()
    p = [p.detach().numpy() for p in generator.parameters()]
    table, linear, bias, *p = p
    x = ((z.numpy() * table[y.numpy()]) @ linear.T + bias).reshape(5, 8, start, start)
    x = batch_norm(x, 1e-5, *p[:2])
    last = len(p) - 2
    for i in range(2, last, 4):
        weight, bias, gain, shift = p[i : i + 4]
        x = convolve(x.repeat(2, 2).repeat(2, 3), weight, bias)
        x = batch_norm(x, 0.8, gain, shift)
        x = np.where(x > 0, x, 0.2 * x)
    want = batch_norm(np.tanh(convolve(x, *p[last:])), 1e-5)
    assert np.allclose(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("size", "largest_start"), [(8, None), (68, None), (8, 1), (80, 7)])
def test_every_parameter_learns(name, size, largest_start):
    generator = make(name, size, largest_start=largest_start).train()
    pictures = generator(*generator.sample(8, rng(0))[0])
    (pictures * torch.randn(pictures.shape, generator=rng(1))).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in generator.parameters())


@pytest.mark.parametrize(
    ("size", "start"), [(4, 1), (8, 2), (28, 7), (32, 4), (64, 4), (112, 7), (224, 7), (232, 29)]
)
def test_the_first_grid_is_halved_until_it_is_small_or_odd(size, start):
    decoder = Decoder(3, size, 3, width=4, largest_start=7)
    assert decoder.start == (4, start, start)
    assert decoder(torch.randn(2, 3)).shape == (2, 3, size, size)


@pytest.mark.parametrize("name", METHODS)
@given(seed=seeds)
def test_samples_come_from_the_given_rng(name, seed):
    generator, before = make(name), torch.get_rng_state()
    (first, y), (second, again) = (generator.sample(5, rng(seed)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(y, again)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["gdfq", "adadfq"])
def test_labels_are_uniform_and_latents_normal(name):
    (z, _), labels = make(name).sample(20_000, rng(0))
    counts = np.bincount(labels.numpy(), minlength=4)
    assert np.abs(counts - 5000).max() < 5 * math.sqrt(20_000 * 3 / 16)
    assert z.mean().abs() < 5 / math.sqrt(z.numel())
    assert z.var().item() == pytest.approx(1, abs=5 * math.sqrt(2 / z.numel()))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("size", [0, 2, 30, 33, -4, 66])
def test_odd_sizes_are_refused(name, size):
    with pytest.raises(ConfigError, match=f"multiple of 4, got {size}"):
        make(name, size)


# Published settings


@pytest.mark.parametrize(
    ("module", "size", "method", "recipe"),
    [
        (gdfq, 32, {"temperature": 20, "bns_weight": 0.1, "ce_weight": 1, "latent_dim": 100},
         {"batch_size": 200, "student_lr": 1e-4}),
        (gdfq, 224, {"temperature": 20, "bns_weight": 0.1},
         {"batch_size": 16, "student_lr": 1e-6, "warmup_steps": 50 * 200}),
        (qimera, 32, {"temperature": 20, "bns_weight": 0.1, "ce_weight": 1, "latent_dim": 64,
                      "probability": 0.4},
         {"batch_size": 200, "student_lr": 1e-4}),
        (qimera, 224, {"temperature": 20, "probability": 0.4},
         {"batch_size": 16, "student_lr": 1e-6, "warmup_steps": 50 * 200}),
        (adadfq, 32, {"temperature": 20, "lower": 0.1, "upper": 0.8, "disagreement": 0.2,
                      "agreement": 0.1, "bns_weight": 1, "latent_dim": 100},
         {"batch_size": 16, "student_lr": 1e-4}),
        (adadfq, 224, {"temperature": 5, "lower": 0.1, "upper": 0.8, "disagreement": 0.2,
                       "agreement": 0.1, "bns_weight": 1},
         {"batch_size": 16, "student_lr": 1e-5}),
    ],
)  # fmt: skip
def test_published_constants(module, size, method, recipe):
    losses, plan = module.paper(size)
    assert {k: getattr(losses, k) for k in method} == method
    recipe = {"steps": 400 * 200, "observe_steps": 4 * 200, "warmup_steps": 4 * 200,
              "student_optimizer": "sgd", "generator_lr": 1e-3, "range_estimator": "max",
              "ste": "clipped"} | recipe  # fmt: skip
    assert {k: getattr(plan, k) for k in recipe} == recipe
    assert plan.factor(0) == 1
    steps = (350, 400) if (module, size) == (adadfq, 224) else (100, 200, 300, 400)
    for i, epoch in enumerate(steps[:-1]):
        before, after = (plan.factor(epoch * 200 + k) for k in (-1, 0))
        assert (before, after) == (pytest.approx(0.1**i), pytest.approx(0.1 ** (i + 1)))


@pytest.mark.parametrize("module", METHODS.values(), ids=METHODS)
@given(steps=st.integers(1, 400))
def test_a_shorter_run_keeps_the_proportions(module, steps):
    plan = replace(module.paper(32)[1], steps=steps * 400)
    assert plan.warmup_steps == plan.observe_steps == 4 * steps
    assert plan.factor(100 * steps - 1) == 1
    assert plan.factor(100 * steps) == pytest.approx(0.1)
    assert plan.factor(399 * steps) == pytest.approx(1e-3)


@pytest.mark.parametrize("recipe", ["paper", "quick"])
@pytest.mark.parametrize("module", METHODS.values(), ids=METHODS)
@given(steps=st.integers(2, 5000))
def test_schedules(module, recipe, steps):
    plan = replace(getattr(module, recipe)(32)[1], steps=steps)
    assert 1 <= plan.observe_steps <= plan.warmup_steps < steps
    for schedule in ("steps", "cosine", "constant"):
        plan = replace(plan, schedule=schedule)
        factors = [plan.factor(step) for step in range(0, steps, 1 + steps // 50)]
        assert factors[0] == 1
        assert all(0 <= b <= a for a, b in itertools.pairwise(factors))
    assert factors[-1] == 1


def test_cosine_ends_near_zero_after_the_warmup():
    plan = replace(gdfq.paper(32)[1], schedule="cosine", warmup=0.25)
    middle = plan.steps * 5 // 8
    assert [plan.factor(s) for s in (0, plan.steps // 4)] == [1, 1]
    assert plan.factor(middle) == pytest.approx(0.5)
    assert plan.factor(plan.steps - 1) == pytest.approx(0, abs=1e-6)


def test_optimizers():
    net, other = Tiny(), Tiny()
    plan = gdfq.paper(32)[1]
    adam, sgd = plan.optimizers(net, other)
    assert (type(adam), type(sgd)) == (torch.optim.Adam, torch.optim.SGD)
    assert (adam.defaults["lr"], adam.defaults["betas"]) == (1e-3, (0.5, 0.999))
    keys = ("lr", "momentum", "nesterov", "weight_decay")
    assert [sgd.defaults[k] for k in keys] == [1e-4, 0.9, True, 1e-4]
    for optimizer, module in ((adam, net), (sgd, other)):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in module.parameters()}
    student = build_student(traced(Tiny(), (3, 8, 8)), plan.config(3, 3))
    _, other = replace(plan, student_optimizer="adam").optimizers(net, student)
    assert type(other) is torch.optim.Adam


@pytest.mark.parametrize(
    ("changes", "received"),
    [
        ({"steps": 0}, "steps.*got 0"),
        ({"steps": 1.5}, "steps.*got 1.5"),
        ({"batch_size": -1}, "batch_size.*got -1"),
        ({"observe": 0.0}, "observe=0.0"),
        ({"observe": 0.5, "warmup": 0.4}, "observe=0.5, warmup=0.4"),
        ({"warmup": 1.0}, "warmup=1.0"),
        ({"warmup": math.nan}, "warmup=nan"),
        ({"student_lr": 0.0}, "student_lr.*got 0.0"),
        ({"generator_lr": math.inf}, "generator_lr.*got inf"),
        ({"student_lr": math.nan}, "student_lr.*got nan"),
        ({"schedule": "linear"}, "schedule 'linear'.*cosine"),
        ({"student_optimizer": "lion"}, "student_optimizer 'lion'.*sgd"),
    ],
)
def test_bad_recipe(changes, received):
    with pytest.raises(ConfigError, match=received):
        replace(gdfq.paper(32)[1], **changes)


def test_a_methods_terms_carry_gradients_to_the_images():
    teacher, student, x = Tiny(0), Tiny(1), images().requires_grad_()
    for method in SMALL.values():
        terms = method.generator_terms(
            images=x, labels=torch.zeros(8).long(), teacher_logits=teacher(x),
            bns=x.square().mean(), student=student,
        )  # fmt: skip
        for name, term in terms.items():
            (slope,) = torch.autograd.grad(term, x, retain_graph=True)
            assert slope.isfinite().all(), name
            assert term.shape == ()
