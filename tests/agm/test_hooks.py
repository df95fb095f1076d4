"""AGM at its two hook points."""

import copy
import difflib
import functools
import inspect
import io
import itertools
import math
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from agm import AGM, AgmError, LinearInterpolation, frozen_parameters
from tests.agm import (
    bits,
    classifier,
    discrepancy_loop,
    elsewhere,
    image_generator,
    margin,
    same_bits,
    values,
)
from tests.strategies import dtypes, half_dtypes, log_uniform, rng, seeds

decays = st.floats(0, 0.99)


def norm(tensor):
    return float(np.linalg.norm(tensor.double().numpy()))


def gradient(loss, images):
    return torch.autograd.grad(loss, images, retain_graph=True)[0]


def stream(seed, classes=3, batch=4):
    """Steps of a float64 loop: (images, teacher's logits, student, other terms)."""
    g = rng(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    while True:
        x, a, b = normal(batch, 2, 3).requires_grad_(), normal(6, classes), normal(6, classes)
        target = normal(batch, 2, 3)
        yield {
            "images": x,
            "teacher_logits": x.flatten(1) @ a,
            "student": lambda x, b=b: x.flatten(1) @ b,
            "other_terms": (x - target).square().mean(),
        }


def steps(seed, n, **settings):
    return list(itertools.islice(stream(seed, **settings), n))


# The generator's term


@given(seeds, st.integers(1, 5), decays, st.integers(1, 5), st.integers(1, 5))
def test_margin_follows_d_as_written_out(seed, n, decay, batch, classes):
    hook, mean, variance = AGM(decay=decay, alternate=False), None, None
    for step in steps(seed, n, batch=batch, classes=classes):
        del step["other_terms"]
        got = hook.generator_loss(**step)
        t, s = step["teacher_logits"], step["student"](step["images"])
        d = discrepancy_loop("total_variation", t.detach(), s.detach())
        now = (float(np.mean(d.numpy())), float(np.var(d.numpy())))
        if mean is None:
            mean, variance = now
        else:
            mean = decay * mean + (1 - decay) * now[0]
            variance = decay * variance + (1 - decay) * now[1]
        # float64 sums of numbers in [0, 1].
        assert float(hook.running["mean"]) == pytest.approx(mean, rel=1e-13, abs=1e-15)
        assert float(hook.running["variance"]) == pytest.approx(variance, rel=1e-12, abs=1e-15)
        want = float(values(margin, d, mean, variance**0.5).mean())
        # An error of 1e-15 in a variance near 0 is one of 3e-8 in std.
        assert got.item() == pytest.approx(want, rel=1e-11, abs=1e-12 if variance > 1e-8 else 1e-7)
        assert got.shape == ()
    assert hook.evaluations == n


@given(seeds, log_uniform(-2, 2), st.integers(1, 4), st.booleans())
def test_gradient_is_ratio_times_the_others(seed, ratio, n, logits_given):
    hook = AGM(ratio=ratio, decay=0, interval=1, alternate=False)
    for step in steps(seed, n):
        x, others = step["images"], step["other_terms"]
        if logits_given:
            ready = step["student"](x)
            step["student"] = lambda _, ready=ready: ready
        ours = hook.generator_loss(**step)
        # Two norms, a quotient and a backward pass, in float64.
        want = ratio * norm(gradient(others, x))
        assert norm(gradient(ours, x)) == pytest.approx(want, rel=1e-12)


def slopes_by_hand(hook, step):
    """Phi((mean - d) / std) of each sample."""
    mean, std = float(hook.running["mean"]), float(hook.running["variance"]) ** 0.5
    t, s = step["teacher_logits"], step["student"](step["images"])
    d = (t.softmax(1) - s.softmax(1)).abs().sum(1) / 2
    return [math.erfc((v - mean) / std / math.sqrt(2)) / 2 for v in d.tolist()]


@given(seeds, log_uniform(-2, 2), decays, st.integers(1, 4), st.integers(1, 9))
def test_weight_follows_as_written_out(seed, ratio, decay, interval, n):
    settings = {"ratio": ratio, "decay": decay, "interval": interval, "alternate": False}
    hook, plain, weight = AGM(**settings), AGM(**settings), None
    for i, step in enumerate(steps(seed, n)):
        x, others = step["images"], step.pop("other_terms")
        term = plain.generator_loss(**step)  # without other terms the weight is 1
        active = slopes_by_hand(plain, step)
        if i % interval == 0 and sum(active) >= 0.1 * len(active):
            now = ratio * norm(gradient(others, x)) / norm(gradient(term, x))
            weight = now if weight is None else decay * weight + (1 - decay) * now
        got = hook.generator_loss(**step, other_terms=others)
        assert got.item() == pytest.approx((weight or 1) * term.item(), rel=1e-12)
    assert "weight" not in plain.running


@given(seeds)
def test_the_margin_and_the_weight_are_constants_to_autograd(seed):
    (step,) = steps(seed, 1)
    x, hook = step["images"], AGM(decay=0, interval=1)
    got = gradient(hook.generator_loss(**step), x)
    # The same term with the numbers put in: weight * mean over samples of margin(d_i).
    t, s = step["teacher_logits"], step["student"](x)
    d = (t.softmax(1) - s.softmax(1)).abs().sum(1) / 2
    slopes = [-slope for slope in slopes_by_hand(hook, step)]
    want = gradient((d * torch.tensor(slopes, dtype=d.dtype)).mean(), x)
    want *= float(hook.running["weight"])
    assert torch.allclose(got, want, rtol=1e-11, atol=1e-12 * norm(want))


@given(seeds, st.integers(1, 3))
def test_equal_networks_have_no_weight_and_stay_finite(seed, n):
    hook = AGM(interval=1, alternate=False)
    for step in steps(seed, n):
        step["student"] = lambda x, t=step["teacher_logits"]: t
        got = hook.generator_loss(**step)
        assert got.item() == 0
        assert (gradient(got, step["images"]) == 0).all()
    assert not hook.running["weight"].isfinite()  # there was nothing to measure


@given(seeds, st.integers(0, 3), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_batch_that_is_not_finite_is_forgotten(seed, before, bad):
    hook, spared = (AGM(interval=1, alternate=False) for _ in range(2))
    healthy, (spoilt,) = steps(seed, before + 2), steps(seed + 1, 1)
    spoilt["student"] = lambda x: x.flatten(1)[:, :3] * bad
    for i, step in enumerate(healthy):
        if i == before:
            assert not hook.generator_loss(**spoilt).isfinite()
        got = hook.generator_loss(**step)
        assert gradient(got, step["images"]).isfinite().all()
        want = spared.generator_loss(**step)
        assert all(same_bits(hook.running[k], spared.running[k]) for k in ("mean", "variance"))
        if before:  # otherwise the weight's average started from 1
            assert same_bits(got, want)


@given(seeds)
def test_a_first_weight_that_is_not_finite_is_forgotten(seed):
    hooks = AGM(interval=1, alternate=False), AGM(interval=1, alternate=False)
    first, *rest = steps(seed, 4)
    hooks[0].generator_loss(**first | {"other_terms": first["other_terms"] * math.nan})
    want = hooks[0].generator_loss(**rest[0] | {"other_terms": None})  # as long as there is none: 1
    hooks[1].generator_loss(**first | {"other_terms": None})
    assert want == hooks[1].generator_loss(**rest[0] | {"other_terms": None})
    for step in rest:
        for hook in hooks:
            hook.generator_loss(**step)
        torch.testing.assert_close(
            hooks[0].running, hooks[1].running, rtol=0, atol=0, equal_nan=True
        )


@given(seeds, st.sampled_from([1, 5, 10]), log_uniform(1, 4))
def test_a_rise_of_the_discrepancy_does_not_lift_the_weight(seed, interval, factor):
    """While d is far above its averages the term has no gradient, which says nothing of later."""
    hook, last = AGM(interval=interval, alternate=False, ratio=1.0), None
    g = rng(seed)
    teacher, way = torch.randn(2, 12, 5, generator=g, dtype=torch.float64)
    for i in range(120):
        x = torch.randn(32, 12, generator=g, dtype=torch.float64).requires_grad_()
        near = 1 / factor + max(0, i - 60) / 20  # it stays near, and then drifts away
        logits = 0.3 * x @ teacher
        hook.generator_loss(
            images=x,
            teacher_logits=logits,
            student=lambda v, near=near: 0.3 * v @ teacher + near * way[0],
            other_terms=logits.square().mean(),
        )
        if i == 60:
            last = hook.running["weight"].item()
    # A tenth of the gradient is measured as ten times the weight, and not more.
    assert hook.running["weight"] <= 10 * last


@given(seeds)
def test_an_infinite_discrepancy_adds_nothing(seed):
    first, d = torch.randn(2, 4, generator=rng(seed), dtype=torch.float64).square()
    d[1] = math.inf
    first.requires_grad_(), d.requires_grad_()
    hook = AGM(alternate=False, discrepancy=lambda t, s: s[:, 0])
    for batch in (first, d):
        logits = batch[:, None]
        got = hook.generator_loss(images=logits, teacher_logits=logits, student=lambda x: x)
    std = first.std(correction=0).item()
    want = values(margin, d[[0, 2, 3]], first.mean().item(), std).sum() / 4
    assert got.item() == pytest.approx(float(want), rel=1e-11, abs=1e-12)


@given(seeds)
def test_a_variance_that_overflows_is_forgotten(seed):
    hook = AGM(alternate=False, discrepancy="logit_l1")
    first, wide = steps(seed, 2)
    hook.generator_loss(**first)
    before = hook.running["variance"]
    wide["student"] = lambda x: x.flatten(1)[:, :3] * 1e200
    hook.generator_loss(**wide)
    assert same_bits(hook.running["variance"], before)


@given(seeds, half_dtypes)
def test_half_precision_is_computed_in_float32(seed, dtype):
    t, s = torch.randn(2, 4, 3, generator=rng(seed)).to(dtype)
    half, wide = AGM(), AGM()
    got, want = (
        hook.generator_loss(
            images=images.requires_grad_(), teacher_logits=images, student=lambda x: s.to(x) + 0 * x
        )
        for hook, images in ((half, t), (wide, t.float()))
    )
    assert same_bits(got, want)
    half.student_batch(images=t)
    other_turn = half.generator_loss(images=t, teacher_logits=t, student=None)
    assert same_bits(other_turn, torch.zeros(()))
    assert all(same_bits(half.running[k], v) for k, v in wide.running.items())
    assert {v.dtype for v in half.running.values()} == {torch.float32}


@given(seeds, half_dtypes)
def test_a_half_precision_discrepancy_is_averaged_in_float32(seed, dtype):
    def narrow(t, s):
        return (t - s).abs().mean(1).to(dtype)

    t, s = torch.randn(2, 4, 3, generator=rng(seed)).requires_grad_()
    call = {"images": t, "teacher_logits": t, "student": lambda x: s + 0 * x}
    half, wide = AGM(discrepancy=narrow), AGM(discrepancy=lambda t, s: narrow(t, s).float())
    assert same_bits(half.generator_loss(**call), wide.generator_loss(**call))
    assert {v.dtype for v in half.running.values()} == {torch.float32}


@given(seeds, st.booleans(), st.booleans())
def test_only_the_generator_feels_its_step(seed, with_others, with_grads):
    teacher, student, generator = classifier(), classifier(1 + seed % 97), image_generator()
    student[0].bias.requires_grad_(False)
    student[2].train()  # a mixture of modes, though none with a state of its own
    if with_grads:
        for p in itertools.chain(teacher.parameters(), student.parameters()):
            p.grad = torch.ones_like(p)
    before, hook = bits(teacher, student), AGM(interval=2, alternate=False)
    for _ in range(2):
        images = generator(torch.randn(3, 5, generator=rng(seed)))
        with frozen_parameters(teacher):
            logits = teacher(images)
        more = {"other_terms": images.square().mean()} if with_others else {}
        loss = hook.generator_loss(images=images, teacher_logits=logits, student=student, **more)
        generator.zero_grad()
        loss.backward()
        assert bits(teacher, student) == before
        assert all(p.grad is not None and p.grad.isfinite().all() for p in generator.parameters())
        assert any((p.grad != 0).any() for p in generator.parameters())
    assert bits(teacher, student) == before


def test_descent_drives_the_networks_apart():
    teacher, student, generator = classifier(0), classifier(3), image_generator()
    z = torch.randn(16, 5, generator=rng(0))
    hook = AGM(decay=0.99, alternate=False)

    def apart():
        images = generator(z)
        return images, discrepancy_loop("total_variation", teacher(images), student(images)).mean()

    optimizer, (_, before) = torch.optim.Adam(generator.parameters(), 1e-2), apart()
    for _ in range(20):
        images = generator(z)
        optimizer.zero_grad()
        hook.generator_loss(
            images=images, teacher_logits=teacher(images), student=student
        ).backward()
        optimizer.step()
    assert apart()[1] > 1.5 * before


@given(seeds)
def test_other_terms_are_read_only(seed):
    (step,) = steps(seed, 1)
    others, x = step["other_terms"], step["images"]
    value, want = others.item(), gradient(others, x)
    AGM().generator_loss(**step)
    assert others.item() == value
    assert same_bits(gradient(others, x), want)  # its graph is still there
    assert x.grad is None


# The student's batch


@given(seeds, dtypes, st.integers(1, 6), st.booleans(), st.booleans())
def test_batch_is_the_interpolation_of_its_seed(seed, dtype, n, soft, regions):
    x = torch.randn(n, 3, 2, generator=rng(seed)).to(dtype)
    hook = AGM(seed=seed, alternate=False, regions=regions)
    mix = LinearInterpolation(seed=seed, regions=regions)
    assert same_bits(hook.student_batch(images=x), mix(x))
    if soft:
        labels, more = torch.rand(n, 3, generator=rng(seed)).softmax(1), {}
    else:
        labels, more = torch.randint(3, (n,), generator=rng(seed)), {"num_classes": 3}
        (step,) = steps(seed, 1)  # three classes
        hook.generator_loss(**step)
    for a, b in zip(
        hook.student_batch(images=x, labels=labels), mix(x, labels, **more), strict=True
    ):
        assert same_bits(a, b)


@given(seeds, decays, st.integers(1, 3), st.integers(1, 7))
def test_loss_and_interpolation_take_turns(seed, decay, interval, n):
    settings = {"decay": decay, "interval": interval, "seed": seed}
    hook, always = AGM(**settings), AGM(**settings, alternate=False)
    mix, calls = LinearInterpolation(seed=seed, regions=True), []
    for i, step in enumerate(steps(seed, n)):
        x, student = step["images"], step["student"]
        y = torch.randint(3, (len(x),), generator=rng(seed + i))
        step["student"] = lambda x, student=student: calls.append(x) or student(x)
        got = hook.generator_loss(**step)
        images, labels = hook.student_batch(images=x.detach(), labels=y)
        if i % 2:
            assert same_bits(got, torch.zeros((), dtype=torch.float64))
            assert calls == []
            mixed, soft = mix(x.detach(), y, num_classes=3)
            assert same_bits(images, mixed)
            assert same_bits(labels, soft)
        else:
            assert calls.pop() is x
            assert same_bits(got, always.generator_loss(**step))
            calls.clear()
            assert same_bits(images, x.detach())
            assert labels is y


@given(seeds)
def test_switched_off_parts_do_nothing(seed):
    (step,) = steps(seed, 1)
    hook = AGM(loss=False, interpolation=False)
    before = hook.state_dict()
    calls = []
    term = hook.generator_loss(**{**step, "student": calls.append})
    assert same_bits(term, torch.zeros((), dtype=torch.float64))
    assert calls == []
    assert hook.running == {}
    x, y = step["images"], torch.zeros(4)
    assert hook.student_batch(images=x) is x
    images, labels = hook.student_batch(images=x, labels=y)
    assert images is x
    assert labels is y
    assert torch.equal(hook.state_dict()["interpolation"]["rng"], before["interpolation"]["rng"])


def test_class_count_is_known_without_the_loss():
    (step,) = steps(0, 1)
    hook = AGM(loss=False, alternate=False)
    hook.generator_loss(**step)
    _, soft = hook.student_batch(images=torch.zeros(2, 5), labels=torch.tensor([0, 1]))
    assert soft.shape == (2, 3)


# State


def use(hook, step):
    x = step["images"].detach()
    labels = torch.arange(len(x)) % step["teacher_logits"].shape[1]
    return [hook.generator_loss(**step).detach(), *hook.student_batch(images=x, labels=labels)]


@given(seeds, decays, st.integers(1, 4), st.integers(0, 5), st.booleans())
def test_state_dict_goes_on_exactly(seed, decay, interval, first, through_a_file):
    settings = {"decay": decay, "interval": interval}
    before, after = (lambda s: (s[:first], s[first:]))(steps(seed, first + 3))
    hook, other = AGM(**settings, seed=seed), AGM(**settings, seed=seed + 1)
    for step in before:
        use(hook, step)
    state = hook.state_dict()
    if through_a_file:
        torch.save(state, file := io.BytesIO())
        file.seek(0)
        state = torch.load(file, weights_only=True)
    want = [use(hook, step) for step in after]  # must not reach into the state taken before
    other.load_state_dict(state)
    for step, tensors in zip(after, want, strict=True):
        assert all(same_bits(a, b) for a, b in zip(use(other, step), tensors, strict=True))
    # Nor may the one that was loaded have written to it.
    again = AGM(**settings)
    again.load_state_dict(state)
    assert all(same_bits(a, b) for a, b in zip(use(again, after[0]), want[0], strict=True))


@given(seeds, st.booleans())
def test_global_rng_is_untouched(seed, loss):
    before = torch.get_rng_state()
    hook = AGM(loss=loss, interval=1, seed=seed)
    for step in steps(seed, 2):
        use(hook, step)
    assert torch.equal(torch.get_rng_state(), before)


# Errors


UNRELATED = torch.ones((), requires_grad=True) * 2


def freed(loss):
    loss.backward()
    return loss


@pytest.mark.parametrize(
    ("changes", "received"),
    [
        ({"other_terms": UNRELATED}, "other_terms must depend on images"),
        ({"other_terms": torch.tensor(1.0)}, "other_terms must depend on images"),
        ({"other_terms": lambda x: x.mean((1, 2))}, "scalar"),
        ({"other_terms": lambda x: freed(x.square().mean())}, "graph is still there"),
        ({"student": lambda x: x.flatten(1)}, r"teacher \(4, 3\), student \(4, 6\)"),
        ({"student": lambda x: x.flatten(1)[:2, :3]}, r"teacher \(4, 3\), student \(2, 3\)"),
        ({"student": lambda x: torch.zeros(4, 3).long()}, "int64"),
        ({"student": lambda x: (x.flatten(1)[:, :3], None)}, "Tensor and tuple; take them out"),
        ({"teacher_logits": torch.zeros(4)}, r"\(4,\)"),
        ({"teacher_logits": torch.zeros(4), "settings": {"loss": False}}, r"\(4,\)"),
        ({"settings": {"discrepancy": lambda t, s: (t - s).abs()}}, r"\(4, 3\)"),
        ({"settings": {"discrepancy": lambda t, s: (t - s).abs().mean()}}, r"\(\)"),
        (
            {"settings": {"discrepancy": lambda t, s: (t.argmax(1) != s.argmax(1)).double()}},
            "the discrepancy must depend on images",
        ),
    ],
)
def test_bad_call_is_a_named_error_and_changes_nothing(changes, received):
    settings = changes.pop("settings", {})
    hook, (good, step) = AGM(interval=1, alternate=False, **settings), steps(0, 2)
    if not settings:
        hook.generator_loss(**good)
    before = hook.state_dict()
    if callable(changes.get("other_terms")):
        changes["other_terms"] = changes["other_terms"](step["images"])
    with pytest.raises(AgmError, match=received) as caught:
        hook.generator_loss(**{**step, **changes})
    assert isinstance(caught.value, ValueError)
    after = hook.state_dict()
    assert all(torch.equal(before.pop(k)["rng"], after.pop(k)["rng"]) for k in ["interpolation"])
    assert after == before


@pytest.mark.parametrize("made", [AGM, LinearInterpolation], ids=["AGM", "interpolation"])
def test_a_state_that_lacks_something_is_a_named_error_and_changes_nothing(made):
    hook = made(seed=1)
    for name in hook.state_dict():
        damaged = made(seed=2).state_dict()
        del damaged[name]
        with pytest.raises(AgmError, match=f"has no {name}.*{made.__name__}"):
            hook.load_state_dict(damaged)
    rng_state = hook.state_dict().get("interpolation", hook.state_dict())["rng"]
    assert torch.equal(rng_state, rng(1).get_state())


def test_terms_that_were_made_together_with_the_images():
    class Together(torch.autograd.Function):  # as one compiled graph of both is
        @staticmethod
        def forward(ctx, z):
            return 2 * z, z.sum()

        @staticmethod
        def backward(ctx, grad, grad_sum):
            return 2 * grad + grad_sum

    (step,) = steps(0, 1)
    images, total = Together.apply(step["images"].detach().requires_grad_())
    logits = images.flatten(1)[:, :3] * 2
    given = {"images": images, "teacher_logits": logits, "student": lambda x: x.flatten(1)[:, :3]}
    with pytest.raises(AgmError, match=r"other_terms must depend on images.*not the step"):
        AGM().generator_loss(**given, other_terms=total)
    AGM().generator_loss(**given, other_terms=total + images.mean()).backward()


def test_a_state_without_its_averages_is_a_named_error_and_changes_nothing():
    """As torch.distributed.checkpoint restores it, which fills in what a new AGM's state has."""
    hook, other = AGM(), AGM()
    use(hook, *steps(0, 1))
    with pytest.raises(AgmError, match="1 evaluations lacks their averages"):
        other.load_state_dict(hook.state_dict() | {"running": {}})
    assert (other.evaluations, other.turn, other.running) == (0, 0, {})


def test_a_state_of_another_discrepancy_is_a_named_error_and_changes_nothing():
    hook, other = AGM(seed=1), AGM(discrepancy="logit_l1", seed=2)
    with pytest.raises(AgmError, match=r"averages are of .*logit_l1.*total_variation"):
        hook.load_state_dict(other.state_dict())
    assert torch.equal(hook.state_dict()["interpolation"]["rng"], rng(1).get_state())


@pytest.mark.parametrize("turns", [1, 2], ids=["the interpolation's turn", "the loss's turn"])
def test_averages_come_to_the_logits_device(turns):
    hook, (first, second) = AGM(), steps(0, 2)
    for _ in range(turns):
        hook.generator_loss(**first)
        hook.student_batch(images=first["images"])
    assert set(hook.running) == {"mean", "variance", "weight"}
    resumed = AGM()
    resumed.load_state_dict(hook.state_dict())
    images = second["images"].detach().to("meta").requires_grad_()  # stands for another device
    logits = images.flatten(1)[:, :3]
    resumed.generator_loss(
        images=images, teacher_logits=logits, student=lambda x: 2 * x.flatten(1)[:, :3]
    )
    assert {value.device.type for value in resumed.running.values()} == {"meta"}


def test_a_state_with_broken_averages_is_an_error_and_changes_nothing():
    hook = AGM(seed=1)
    before = hook.state_dict()
    with pytest.raises(AttributeError):
        hook.load_state_dict(AGM(seed=2).state_dict() | {"running": {"mean": None}})
    assert torch.equal(hook.state_dict()["interpolation"]["rng"], before["interpolation"]["rng"])


def test_a_pickled_hook_goes_on_as_the_first():
    hook = AGM()
    for step in steps(0, 2):
        hook.generator_loss(**step)
    again, (step,) = pickle.loads(pickle.dumps(hook)), steps(1, 1)
    assert same_bits(again.generator_loss(**step), hook.generator_loss(**step))


# What surrounds a call


W = torch.ones((), dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("changes", "received"),
    [
        ({"teacher_logits": lambda x, t, s: t.detach()}, "teacher_logits must depend on images"),
        ({"teacher_logits": lambda x, t, s: t.detach() * W}, "teacher_logits must depend"),
        ({"student": lambda x, t, s: lambda _: s(x).detach()}, "student's logits must depend"),
        ({"student": lambda x, t, s: lambda _: s(x.detach()) * W}, "student's logits must depend"),
        ({"student": lambda x, t, s: torch.no_grad()(s)}, "student's logits must depend"),
        ({"student": lambda x, t, s: torch.inference_mode()(s)}, "student's logits must depend"),
        ({"images": lambda x, t, s: x.detach()}, "images carry no graph"),
    ],
)
def test_without_a_graph_there_is_no_gradient_and_an_error_says_whose(changes, received):
    """W, with a gradient of its own, is as a network's weights: a graph that leads elsewhere."""
    first, step = steps(0, 2)
    hook = AGM(alternate=False, interval=1)  # it follows the graph when it measures the weight
    hook.generator_loss(**first)
    before = hook.state_dict()
    given = step["images"], step["teacher_logits"], step["student"]
    with pytest.raises(AgmError, match=received):
        hook.generator_loss(**step | {k: change(*given) for k, change in changes.items()})
    assert all(hook.state_dict()[k] == v for k, v in before.items() if k != "interpolation")
    # Where no gradient is asked for, none is missed.
    off = AGM(loss=False)
    off.generator_loss(**step | {k: change(*given) for k, change in changes.items()})


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@given(seed=seeds, n=st.integers(0, 4))
def test_without_gradients_it_is_an_evaluation(off, seed, n):
    hook, spared, plain = AGM(interval=1), AGM(interval=1), AGM(interval=1, alternate=False)
    *before, step, last = steps(seed, n + 2)
    for s in before:
        for h in (hook, spared):
            use(h, s)
    state = hook.state_dict()
    plain.running = spared.state_dict()["running"]
    with off():
        got = hook.generator_loss(**step)
    del step["other_terms"]
    assert not got.requires_grad
    assert same_bits(got.clone(), plain.generator_loss(**step).detach())
    after = hook.state_dict()
    assert torch.equal(state.pop("interpolation")["rng"], after.pop("interpolation")["rng"])
    assert state == after
    assert all(same_bits(a, b) for a, b in zip(use(hook, last), use(spared, last), strict=True))


def test_a_state_that_was_loaded_in_inference_mode_can_be_learned_with():
    hook, again, (first, step) = AGM(alternate=False), AGM(alternate=False), steps(0, 2)
    hook.generator_loss(**first)
    with torch.inference_mode():
        again.load_state_dict(hook.state_dict())
    got, want = (gradient(h.generator_loss(**step), step["images"]) for h in (again, hook))
    assert same_bits(got, want)


def test_a_default_dtype_or_device_changes_nothing():
    def narrow(step):
        x = step["images"].detach().float().requires_grad_()
        b = torch.randn(6, 3, generator=rng(1))
        return {
            "images": x,
            "teacher_logits": x.flatten(1)[:, :3],
            "student": lambda x: x.flatten(1) @ b,
            "other_terms": x.square().mean(),
        }

    narrowed = [narrow(step) for step in steps(0, 4)]
    hook = AGM(interval=1, seed=1)
    want = [use(hook, step) for step in narrowed]
    labels = torch.arange(4) % 3
    with elsewhere():
        again = AGM(interval=1, seed=1)
        again.load_state_dict(AGM(seed=1).state_dict())
        for step, tensors in zip(narrowed, want, strict=True):
            loss = again.generator_loss(**step).detach()
            x = step["images"].detach()
            got = [loss, *again.student_batch(images=x, labels=labels)]
            assert all(same_bits(a, b) for a, b in zip(got, tensors, strict=True))
    assert {v.dtype for v in again.running.values()} == {torch.float32}


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.net, self.reentrant = classifier(1), reentrant

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_are_frozen_around_backward_too(reentrant):
    def gradient_at_images(student, frozen):
        x = torch.randn(4, 3, 4, 4, generator=rng(0)).requires_grad_()
        logits, more = classifier(0)(x), {} if reentrant else {"other_terms": x.square().mean()}
        with frozen_parameters(student) if frozen else nullcontext():
            hook = AGM(interval=1)
            hook.generator_loss(images=x, teacher_logits=logits, student=student, **more).backward()
        assert all(p.grad is None for p in student.parameters())
        return x.grad

    want = gradient_at_images(classifier(1), frozen=False)
    assert same_bits(gradient_at_images(Checkpointed(reentrant), frozen=True), want)
    with pytest.raises(AgmError, match=r"checkpoint.*frozen_parameters"):
        gradient_at_images(Checkpointed(reentrant), frozen=False)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_generator_may_checkpoint_its_activations(reentrant):
    z, w = torch.randn(4, 48, generator=rng(0)).requires_grad_(), torch.eye(48).requires_grad_()
    x = checkpoint(lambda z: (z @ w).view(4, 3, 4, 4), z, use_reentrant=reentrant)
    hook = AGM(interval=1)
    hook.generator_loss(images=x, teacher_logits=classifier(0)(x), student=classifier(1)).backward()
    assert z.grad.isfinite().all()


def test_a_gradient_that_is_kept_at_the_images_is_that_of_backward_alone():
    for earlier in (0.0, 1.0):
        kept = []
        for hook in (AGM(interval=1), AGM(interval=1, loss=False)):
            z = torch.randn(4, 3, 4, 4, generator=rng(0)).requires_grad_()
            x = z * 1.0
            x.retain_grad()
            (earlier * x).sum().backward(retain_graph=True)
            logits = classifier(0)(x)
            others = logits.square().mean()
            hook.generator_loss(
                images=x, teacher_logits=logits, student=classifier(1), other_terms=others
            )
            kept.append(x.grad)
        assert torch.equal(*kept)


class Autocast(nn.Module):
    """A network that sees to its precision itself."""

    def __init__(self, network, dtype):
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, x):
        with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype is not None):
            return self.network(x).float()


@pytest.mark.parametrize("inside", [False, True])
def test_the_weight_in_float16_is_that_in_float32(inside):
    """Of 256 images each has a gradient so small that float16 loses most of it."""
    torch.manual_seed(0)
    teacher = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.01 * torch.randn(p.shape, generator=rng(1))
    x = torch.randn(256, 3, 32, 32, generator=rng(2)).requires_grad_()

    def measured(factor, dtype=None):
        hook, p, q = AGM(), teacher, student
        if inside:
            p, q = Autocast(p, dtype), Autocast(q, dtype)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None and not inside):
            logits = p(x)
            others = factor * F.cross_entropy(logits, torch.arange(256) % 10)
            loss = hook.generator_loss(
                images=x, teacher_logits=logits, student=q, other_terms=others
            )
        return hook.running["weight"].item(), loss, others

    want, _, _ = measured(1.0)
    for factor in (1.0, 2.0**14):  # the latter as a GradScaler, which overflows sooner
        got, loss, others = measured(factor, torch.float16)
        assert got / factor == pytest.approx(want, rel=0.02)  # ten bits a number
        assert loss.dtype == torch.float32
        scaler = torch.amp.GradScaler("cpu")
        assert scaler.scale(loss + others / factor).isfinite()


# Gradients accumulated over micro-batches


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("m", [1, 2])
def test_a_turn_is_a_step_of_several_micro_batches(k, m):
    hook, mix = AGM(), LinearInterpolation()
    images = torch.randn(4, 6, generator=rng(0))
    for step in range(4):
        terms = [hook.generator_loss(**s).item() for s in steps(step, k)]
        batches = [hook.student_batch(images=images) for _ in range(m)]
        if step % 2:
            assert terms == [0.0] * k
            assert all(same_bits(b, mix(images)) for b in batches)
        else:
            assert all(t > 0 for t in terms)
            assert all(b is images for b in batches)
    assert hook.evaluations == 2 * k


def test_in_pairs_a_step_has_both_parts():
    hook, images = AGM(), torch.randn(4, 6, generator=rng(0))
    rows = [
        (hook.generator_loss(**s).item() > 0, hook.student_batch(images=images) is images)
        for s in steps(0, 4)
    ]
    assert rows == [(True, True), (False, False)] * 2


def test_without_a_students_batch_every_turn_is_the_losss():
    hook = AGM()
    assert all(hook.generator_loss(**s).item() > 0 for s in steps(0, 3))


def test_repr_tells_the_settings():
    hook = AGM(ratio=0.5, discrepancy="logit_l1", alternate=False)
    assert repr(hook) == (
        "AGM(loss=True, interpolation=True, discrepancy=logit_l1, ratio=0.5, decay=0.95, "
        "interval=10, alternate=False, regions=True)"
    )
    hooks = [AGM(discrepancy=functools.partial(lambda k, t, s: t[:, 0] - s[:, 0], k)) for k in "ab"]
    assert repr(hooks[0]) == repr(hooks[1])  # no address, which another process would not repeat


def test_detached_images_are_a_named_error():
    x = torch.randn(4, 6, requires_grad=True)
    y = (2 * x).detach()
    with pytest.raises(AgmError, match="detached"):
        AGM().generator_loss(
            images=y, teacher_logits=x[:, :3], student=lambda _: x[:, 3:], other_terms=x.mean()
        )


def test_a_graph_that_is_gone_through_once_is_a_named_error():
    """As a network's, compiled by torch.compile, after a first backward without retain_graph."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("compiled with non-empty donated buffers")

    hook, (step,) = AGM(), steps(0, 1)
    student = step["student"]
    with pytest.raises(AgmError, match=r"taken: compiled with .*donated_buffer off before"):
        hook.generator_loss(**step | {"student": lambda x: Once.apply(student(x))})
    assert not hook.state_dict()["running"]


def test_a_distributed_student_is_asked_without_its_wrapper():
    """Whose reducer would wait for gradients of the parameters, which are frozen."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        student = DistributedDataParallel(nn.Linear(6, 3).double(), static_graph=True)
        student.register_forward_pre_hook(lambda *_: pytest.fail("the wrapper was asked"))
        (step,) = steps(0, 1)
        flat = step | {"images": step["images"].flatten(1)}
        flat["teacher_logits"] = 2 * flat["images"][:, :3]
        flat["other_terms"] = flat["images"].square().mean()
        want = AGM().generator_loss(**flat | {"student": student.module})
        got = AGM().generator_loss(**flat | {"student": student})
        assert same_bits(got, want)
        for inner in (nn.Sequential(student), torch.compile(student, backend="eager")):
            with pytest.raises(AgmError, match=r"static_graph=True.*give the module that is"):
                AGM().generator_loss(**flat | {"student": inner})
        other = nn.Sequential(DistributedDataParallel(student.module))
        assert same_bits(AGM().generator_loss(**flat | {"student": other}), want)
    finally:
        dist.destroy_process_group()


def test_integer_labels_before_any_logits_are_a_named_error():
    with pytest.raises(AgmError, match="number of classes"):
        AGM().student_batch(images=torch.zeros(2, 3), labels=torch.zeros(2).long())
    with pytest.raises(AgmError, match="labels must be a tensor, got ndarray"):
        AGM().student_batch(images=torch.zeros(2, 3), labels=np.zeros(2))


@pytest.mark.parametrize(
    ("setting", "received"),
    [
        ({"ratio": 0}, "ratio.*got 0"),
        ({"ratio": -1.5}, "ratio.*got -1.5"),
        ({"ratio": float("nan")}, "ratio.*got nan"),
        ({"ratio": float("inf")}, "ratio.*got inf"),
        ({"decay": 1}, "decay.*got 1"),
        ({"decay": 1.5}, r"decay.*got 1\.5"),
        ({"decay": -0.1}, "decay.*got -0.1"),
        ({"decay": float("nan")}, "decay.*got nan"),
        ({"interval": 0}, "interval.*got 0"),
        ({"ratio": "0.2"}, "ratio.*got '0.2'"),
        ({"decay": None}, "decay.*got None"),
        ({"interval": "ten"}, "interval.*got 'ten'"),
        ({"interval": float("inf")}, "interval.*got inf"),
        ({"ratio": torch.ones(2)}, r"ratio.*got tensor\(\[1"),
        ({"seed": 1.5}, "seed.*got 1.5"),
        ({"seed": 2**64}, f"seed.*got {2**64}"),
        ({"discrepancy": []}, r"\[\].*total_variation"),
        ({"discrepancy": "l2"}, "'l2'.*total_variation"),
    ],
)
def test_bad_setting_is_a_named_error(setting, received):
    with pytest.raises(AgmError, match=received) as caught:
        AGM(**setting)
    assert isinstance(caught.value, ValueError)


# In a loop of one's own


def plain_loop(teacher, student, g, n=3):
    sgd = torch.optim.SGD(student.parameters(), 0.01)
    adam = torch.optim.Adam(g.parameters(), 0.001)
    for _ in range(n):
        y = torch.randint(3, (8,))
        x = g(torch.randn(8, 5))
        out = teacher(x)
        loss = F.cross_entropy(out, y) + 0.1 * x.mean((0, 2, 3)).square().sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        x = x.detach()
        with torch.no_grad():
            target = teacher(x)
        loss = F.kl_div(student(x).log_softmax(1), target.softmax(1), reduction="batchmean")
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    return loss


def agm_loop(teacher, student, g, n=3, **settings):
    sgd = torch.optim.SGD(student.parameters(), 0.01)
    adam = torch.optim.Adam(g.parameters(), 0.001)
    agm = AGM(**settings)
    for _ in range(n):
        y = torch.randint(3, (8,))
        x = g(torch.randn(8, 5))
        out = teacher(x)
        loss = F.cross_entropy(out, y) + 0.1 * x.mean((0, 2, 3)).square().sum()
        more = {"images": x, "teacher_logits": out, "student": student, "other_terms": loss}
        loss = loss + agm.generator_loss(**more)
        adam.zero_grad()
        loss.backward()
        adam.step()
        x = x.detach()
        x = agm.student_batch(images=x)
        with torch.no_grad():
            target = teacher(x)
        loss = F.kl_div(student(x).log_softmax(1), target.softmax(1), reduction="batchmean")
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    return loss


def run(loop, **settings):
    """(bits before, bits after, loss) of a student that is the teacher plus noise."""
    teacher, generator = classifier(), image_generator()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.1 * torch.randn_like(p)
    before = bits(student), bits(generator)
    loss = loop(teacher.requires_grad_(False), student, generator, **settings)
    for p in itertools.chain(student.parameters(), generator.parameters()):
        assert p.isfinite().all()
    return before, (bits(student), bits(generator)), loss


def test_five_added_lines():
    sources = (inspect.getsource(f).splitlines()[1:] for f in (plain_loop, agm_loop))
    changes = [line for line in difflib.ndiff(*sources) if line[0] in "+-"]
    assert all(line[0] == "+" for line in changes)
    assert len(changes) + 1 <= 5  # and the import
    (before, plain, loss), (twin, joined, joint_loss) = run(plain_loop), run(agm_loop)
    assert before == twin
    assert loss.isfinite()
    assert joint_loss.isfinite()
    for a, b, c in zip(before, plain, joined, strict=True):  # the student, the generator
        assert a != b
        assert a != c
        assert b != c


def test_switched_off_it_is_bit_identical_to_nothing():
    _, plain, loss = run(plain_loop)
    _, off, same = run(agm_loop, loss=False, interpolation=False)
    assert plain == off
    assert same_bits(loss, same)


@pytest.mark.parametrize("part", ["loss", "interpolation"])
def test_either_part_alone_changes_the_run(part):
    _, plain, _ = run(plain_loop)
    _, joined, _ = run(agm_loop, **{part: False})
    assert plain[0] != joined[0]


# What two tensors of one shape could be mistaken for is given by name.


def test_arguments_are_given_by_name():
    (step,) = steps(0, 1)
    agm, images = AGM(), step["images"].detach()
    for call in (
        lambda: AGM(True),
        lambda: agm.generator_loss(*step.values()),
        lambda: agm.student_batch(images),
        lambda: agm.student_batch(images, torch.zeros(len(images), 3)),
    ):
        with pytest.raises(TypeError, match="positional"):
            call()


def test_the_documented_defaults():
    plain, spelled_out = AGM(), AGM(
        loss=True, interpolation=True, discrepancy="total_variation", ratio=0.2, decay=0.95,
        interval=10, alternate=True, regions=True, seed=0,
    )  # fmt: skip
    for step, again in zip(steps(1, 25), steps(1, 25), strict=True):
        got, want = (
            (agm.generator_loss(**s), agm.student_batch(images=s["images"].detach()))
            for agm, s in ((plain, step), (spelled_out, again))
        )
        assert all(same_bits(a.detach(), b.detach()) for a, b in zip(got, want, strict=True))
