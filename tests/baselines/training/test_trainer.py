"""One contract for every method, with and without add-ons."""

import copy
import io
import itertools
import math
import platform
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from agm import AGM, AgmError
from baselines import METHODS
from baselines.errors import CheckpointError, ConfigError, NonFiniteLossError
from baselines.methods import gdfq
from baselines.quantization.quantizers import ActivationQuantizer
from baselines.training.checks import resolve_precision
from baselines.training.parallel import ALONE, Ranks
from baselines.training.trainer import Remembered, Trainer
from tests.baselines import Tiny, bits, fill, images, same_state, weights

SMALL = {name: replace(module.paper(8)[0], width=4, latent_dim=6)
         for name, module in METHODS.items()}  # fmt: skip
HOOKS = {
    "none": lambda: (),
    "loss": lambda: (AGM(interpolation=False, interval=2),),
    "interpolation": lambda: (AGM(loss=False),),
    "both": lambda: (AGM(interval=2),),
}
WARMUP, OBSERVE, STEPS = 3, 2, 7
QUICK = {"shift": True, "layer_weight": 1.0, "ste": "clipped", "learned_steps": True}  # a recipe's

contract = pytest.mark.parametrize(("method", "hooks"), list(itertools.product(METHODS, HOOKS)))
each_method = pytest.mark.parametrize("method", METHODS)


def make(
    method="gdfq", hooks=(), teacher=None, *, seed=0, precision="fp32", config=None, ranks=ALONE,
    **recipe,
):  # fmt: skip
    settings = {
        "steps": STEPS, "batch_size": 4, "warmup": WARMUP / STEPS, "observe": OBSERVE / STEPS,
        "student_lr": 1e-3, "schedule": "cosine", **recipe,
    }  # fmt: skip
    plan = replace(gdfq.paper(8)[1], **settings)
    return Trainer(
        Tiny() if teacher is None else teacher,
        method=SMALL[method] if isinstance(method, str) else method,
        recipe=plan,
        config=replace(plan.config(3, 3), **(config or {})),
        image_shape=(3, 8, 8),
        hooks=HOOKS[hooks]() if isinstance(hooks, str) else hooks,
        seed=seed,
        precision=precision,
        ranks=ranks,
    )


def train(trainer, steps=STEPS):
    """The loss terms of each step, as numbers."""
    return [{k: v.item() for k, v in trainer.step().items()} for _ in range(steps)]


def outcome(trainer, steps=STEPS):
    terms = train(trainer, steps)
    return terms, bits(trainer.student, trainer.generator), trainer.state_dict()


class Hook:
    """A third party's: knows nothing of AGM or of the trainer."""

    def __init__(self, change=lambda x: x, term=lambda x: x.abs().mean()):
        self.change, self.term = change, term
        self.seen, self.given, self.labels = [], [], []

    def generator_loss(self, *, images, teacher_logits, student, other_terms=None):
        self.seen.append((images, teacher_logits, student(images)))
        return self.term(images)

    def student_batch(self, *, images, labels=None):
        self.given.append(images)
        self.labels.append(labels)
        changed = self.change(images)
        return changed if labels is None else (changed, labels)

    def state_dict(self):
        return {"calls": len(self.given)}

    def load_state_dict(self, state):
        self.given = [None] * state["calls"]


# The contract


@contract
def test_generator_and_student_learn(method, hooks):
    trainer = make(method, hooks)
    assert trainer.warming_up
    start = weights(trainer.student), weights(trainer.generator)
    warm = train(trainer, WARMUP)
    assert weights(trainer.student) == start[0]
    terms = train(trainer, STEPS - WARMUP)
    assert trainer.step_count == STEPS
    assert all(math.isfinite(v) for row in [*warm, *terms] for v in row.values())
    assert {k[0] for row in warm for k in row} == {"G"}
    assert all({k[0] for k in row} == {"G", "Q"} for row in terms)
    for before, network in zip(start, (trainer.student, trainer.generator), strict=True):
        changed = [a != b for a, b in zip(before, weights(network), strict=True)]
        assert sum(changed) > 0.8 * len(changed)
    assert not any(m.training for m in trainer.student.modules())
    assert not any(m.training for m in trainer.teacher.modules())
    assert trainer.generator.training


@contract
def test_the_teacher_is_left_as_it_was(method, hooks):
    teacher = Tiny()
    teacher.bn0.train()
    teacher.conv0.weight.requires_grad_(False)
    teacher.fc.weight.grad = torch.ones_like(teacher.fc.weight)
    before = bits(teacher)
    trainer = make(method, hooks, teacher)
    inside = bits(trainer.teacher)
    train(trainer)
    assert bits(teacher) == before
    assert bits(trainer.teacher) == inside
    assert all(p.grad is None for p in trainer.teacher.parameters())


@contract
def test_a_seed_repeats_bit_for_bit_and_leaves_the_global_rng(method, hooks):
    teacher, before = Tiny(), torch.get_rng_state()
    first = outcome(make(method, hooks, teacher))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        assert same_state(outcome(make(method, hooks, teacher)), first)
    assert outcome(make(method, hooks, teacher, seed=1))[1] != first[1]


@each_method
def test_a_disabled_add_on_is_none(method):
    terms, state, _ = outcome(make(method))
    idle, same, _ = outcome(make(method, (AGM(loss=False, interpolation=False),)))
    assert same == state
    for a, b in zip(terms, idle, strict=True):
        assert {k: v for k, v in b.items() if k in a} == a
        assert all(v == 0 for k, v in b.items() if k not in a)


@pytest.mark.parametrize(
    "zero", [0, 0.0, torch.zeros(()), np.float32(0)], ids=["int", "float", "tensor", "numpy"]
)
def test_a_hook_may_return_its_neutral_values(zero):
    assert outcome(make(hooks=(Hook(term=lambda x: zero),)))[1] == outcome(make())[1]


@pytest.mark.parametrize("hooks", ["loss", "interpolation", "both"])
@each_method
def test_an_add_on_changes_the_run_after_the_warmup_alone(method, hooks):
    plain, joined = make(method), make(method, hooks)
    assert train(plain, WARMUP) == train(joined, WARMUP)
    train(plain, 3), train(joined, 3)  # the interpolation's turn is the second
    assert weights(plain.student) != weights(joined.student)
    same = weights(plain.generator) == weights(joined.generator)
    # Interpolation reaches the generator only through the student that it asks.
    assert same == (hooks == "interpolation" and not asks_the_student(method))


def asks_the_student(method):
    """Whether the generator's loss does."""
    asked, x, logits = [], images(3), torch.zeros(3, 4)
    SMALL[method].generator_terms(
        images=x, labels=torch.zeros(3).long(), teacher_logits=logits, bns=x.mean(),
        student=lambda x: asked.append(x) or logits,
    )  # fmt: skip
    return bool(asked)


@each_method
def test_in_the_warmup_the_students_activations_pass_as_they_are(method, monkeypatch):
    trainer, seen = make(method), []
    terms = trainer.method.generator_terms

    def spy(_, *, images, student, **others):
        with torch.no_grad():
            seen.append((images, student(images).clone()))
        return terms(images=images, student=student, **others)

    monkeypatch.setattr(type(trainer.method), "generator_terms", spy)
    trainer.step()
    ((x, logits),) = seen
    switches = [m for m in trainer.student.modules() if isinstance(m, ActivationQuantizer)]
    for switch in switches:
        switch.enabled = False
    with torch.no_grad():
        assert torch.equal(trainer.student(x), logits)


@contract
def test_the_generators_step_leaves_the_student(method, hooks):
    spy = Hook()
    trainer = make(method, (*HOOKS[hooks](), spy))
    before = bits(trainer.student)
    for step in range(WARMUP):
        trainer.step()
        assert (bits(trainer.student) == before) == (step < WARMUP - OBSERVE)
    assert weights(trainer.student) == weights(make(method).student)
    moments = []
    spy.change = lambda x: moments.append(bits(trainer.student)) or x
    for _ in range(2):  # the second time with gradients of the step before
        before = bits(trainer.student)
        trainer.step()
        assert moments.pop() == before
        assert bits(trainer.student) != before


@each_method
def test_ranges_are_observed_at_the_end_of_the_warmup_alone(method):
    trainer = make(method)
    buffers = [{k: v.clone() for k, v in trainer.student.named_buffers()}]
    for _ in range(STEPS):
        trainer.step()
        buffers.append({k: v.clone() for k, v in trainer.student.named_buffers()})
    moved = [not same_state(a, b) for a, b in itertools.pairwise(buffers)]
    assert moved == [False, True, True, False, False, False, False]


@each_method
def test_hooks_are_not_called_in_the_warmup(method):
    spy = Hook()
    trainer = make(method, (spy,))
    train(trainer, WARMUP)
    assert (spy.seen, spy.given) == ([], [])
    train(trainer, 3)
    assert (len(spy.seen), len(spy.given)) == (3, 3)


@each_method
def test_what_a_hook_is_given(method):
    spy = Hook()
    trainer = make(method, (spy,))
    train(trainer, WARMUP)
    for _ in range(2):
        before = copy.deepcopy(trainer.student)
        terms = trainer.step()
        (pictures, teacher_logits, student_logits), batch = spy.seen[-1], spy.given[-1]
        assert pictures.requires_grad
        assert teacher_logits.requires_grad
        assert torch.equal(teacher_logits, trainer.teacher(pictures))
        assert torch.allclose(student_logits, before(pictures), atol=1e-6)
        assert torch.equal(batch, pictures)
        assert not batch.requires_grad
        (term,) = (v.item() for k, v in terms.items() if k.startswith("G/Hook"))
        assert term == pytest.approx(batch.abs().mean().item())
        assert len(spy.labels[-1]) == len(batch)


# Which logits the student learns from


@each_method
@pytest.mark.parametrize(
    ("hooks", "forwards"),
    [
        (lambda: (), 2),
        (lambda: (Hook(),), 2),
        (lambda: (AGM(interpolation=False),), 2),
        (lambda: (AGM(loss=False, interpolation=False),), 2),
        (lambda: (AGM(),), 3),
        (lambda: (Hook(), AGM(loss=False)), 3),
        (lambda: (Hook(), AGM(loss=False, alternate=False)), 4),
        (lambda: (Hook(lambda x: x + 1), Hook()), 4),
    ],
    ids=["none", "idle", "loss", "disabled", "both", "interpolation", "each", "changed"],
)
def test_the_teacher_is_asked_again_only_about_changed_images(method, hooks, forwards):
    trainer = make(method, hooks())
    train(trainer, WARMUP)
    calls = []
    trainer.teacher.register_forward_hook(lambda *call: calls.append(call))
    train(trainer, 2)
    assert len(calls) == forwards


class Recording:
    """A method that remembers what its student's loss was given."""

    def __init__(self, method):
        self.method, self.given = method, []

    def __getattr__(self, name):
        return getattr(self.method, name)

    def student_terms(self, **given):
        self.given.append(given)
        return self.method.student_terms(**given)


def shift(x):
    return x + 1


def shift_in_place(x):
    return x.add_(1)


@each_method
@pytest.mark.parametrize("change", [lambda x: x, shift, shift_in_place], ids=["no", "yes", "in"])
def test_the_student_learns_the_teachers_answers_to_its_images(method, change):
    recording, hook = Recording(SMALL[method]), Hook(change)
    trainer = make(recording, (hook, last := Hook()))
    train(trainer, WARMUP)
    before = copy.deepcopy(trainer.student)
    trainer.step()
    (given,), batch = recording.given, last.given[-1]
    assert not given["teacher_logits"].requires_grad
    assert torch.allclose(given["teacher_logits"], trainer.teacher(batch), atol=1e-6)
    assert torch.allclose(given["student_logits"], before(batch), atol=1e-6)
    assert given["labels"] is last.labels[-1]


@contract
def test_shifts_layers_and_learned_steps(method, hooks):
    """The warm-up's images are shifted too; the layers count once the student trains."""
    trainer, plain = make(method, hooks, **QUICK), make(method, hooks)
    assert trainer.step()["G/bns"] != plain.step()["G/bns"]
    warm = train(trainer, WARMUP - 1)
    assert not any("Q/layers" in row for row in warm)
    gains = [p for n, p in trainer.student.named_parameters() if n.endswith("log_gain")]
    assert len(gains) == len([q for q in trainer.student.modules() if hasattr(q, "observing")])
    assert not any(gains)
    assert all(0 < row["Q/layers"] < math.inf for row in train(trainer, STEPS - WARMUP))
    assert all(gains)
    assert not any(m._forward_hooks for m in trainer.student.modules())
    assert not any(m._forward_hooks for m in trainer.teacher.modules())


def test_a_network_of_one_layer_has_no_layers_to_compare():
    teacher = fill(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 4)), 0)
    trainer = make(teacher=teacher, config={"activations": "inputs"}, **QUICK)
    assert all("Q/layers" not in row for row in train(trainer))


# Not AdaDFQ with the loss: the two terms' gradients at the student's logits are added in another
# order there.
@pytest.mark.parametrize(
    ("method", "hooks"),
    [("gdfq", "loss"), ("qimera", "loss"), ("adadfq", "none"), ("adadfq", "interpolation")],
)
@pytest.mark.parametrize("recipe", [{}, QUICK], ids=["paper", "quick"])
def test_a_shared_forward_changes_nothing(monkeypatch, method, hooks, recipe):
    shared = outcome(make(method, hooks, **recipe))
    monkeypatch.setattr(Remembered, "__call__", lambda self, images: self.network(images))
    terms, end, _ = outcome(make(method, hooks, **recipe))
    assert shared[0] == terms
    assert shared[1] == end


@each_method
@pytest.mark.parametrize("recipe", [{}, QUICK], ids=["paper", "quick"])
@pytest.mark.parametrize("first", [0, 2], ids=["other images", "the same"])
def test_a_hook_that_looks_at_the_student_without_gradients_changes_nothing(method, recipe, first):
    looked = []

    class Look(Hook):
        def generator_loss(self, *, images, student, **_):
            if self.looks:
                with torch.no_grad():
                    looked.append(student(images if first else images[:2]).requires_grad)
                    student(images.flip(0))
            return images.new_zeros(())

    ends = []
    for looks in (True, False):
        hook = Look()
        hook.looks = looks
        ends.append(outcome(make(method, (hook,), **recipe))[:2])
    assert ends[0] == ends[1]
    assert looked == [False] * (STEPS - WARMUP)


@each_method
@pytest.mark.parametrize("whose", ["teacher_logits", "student"])
@pytest.mark.parametrize("learning", [True, False])
def test_a_hook_that_writes_into_shared_logits_is_refused(method, whose, learning):
    class Halve(Hook):
        def generator_loss(self, *, images, teacher_logits, student, **_):
            logits = teacher_logits if whose == "teacher_logits" else student(images)
            with torch.set_grad_enabled(learning):
                logits /= 2
            return 0

    trainer = make(method, (Halve(),))
    train(trainer, WARMUP)
    before = weights(trainer.generator, trainer.student)
    with pytest.raises(ConfigError, match=r"Halve.generator_loss wrote into .* change a copy"):
        trainer.step()
    assert weights(trainer.generator, trainer.student) == before


def test_layers_of_more_dimensions():
    class Volume(Tiny):
        def __init__(self):
            super().__init__()
            self.conv3 = nn.Conv3d(3, 3, 1)
            self.register_buffer("grid", torch.zeros(1, 1, 1, 1, 1))
            fill(self, 0)

        def forward(self, x):
            return super().forward((self.conv3(x.unsqueeze(2)) + self.grid).squeeze(2))

    train(make(teacher=Volume()))


def test_hooks_work_in_order_and_each_of_their_terms_counts():
    first = Hook(lambda x: x + 1, lambda x: 2 * x.mean())
    second = Hook(lambda x: 2 * x, lambda x: 3 * x.mean())
    third = type("Third", (Hook,), {})(term=lambda x: 5 * x.mean())
    trainer = make(hooks=(first, second, third))
    train(trainer, WARMUP)
    trainer.step()
    assert torch.equal(second.given[0], first.given[0] + 1)
    assert torch.equal(third.given[0], 2 * second.given[0])


def test_two_hooks_of_one_class_both_count():
    def hook(factor):
        return Hook(term=lambda x: factor * x.abs().mean())

    pictures = []
    for hooks in ((hook(50.0),), (hook(49.0), hook(1.0)), (hook(1.0),)):
        trainer = make(hooks=hooks)
        train(trainer, WARMUP + 2)
        pictures.append(trainer.sample_images(4))
    together, apart, only = pictures
    assert torch.allclose(together, apart, atol=1e-4)
    assert not torch.allclose(together, only, atol=1e-3)


def test_a_hook_named_as_a_loss_term_leaves_that_term():
    hook = type("ce", (Hook,), {})(term=lambda x: 0 * x.sum())
    plain, joined = make(), make(hooks=(hook,))
    assert train(plain)[-1]["G/bns"] == pytest.approx(train(joined)[-1]["G/bns"])
    assert weights(plain.generator) == weights(joined.generator)


# Broken numbers


def assert_stops(trainer, *parts):
    """The next step is refused, named, and all weights are those before it."""
    trainer.student.zero_grad()
    before = weights(trainer.generator), bits(trainer.student)
    count = trainer.step_count
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.step()
    for part in (f"step {count}", "seed 5", *parts):
        assert part in str(caught.value)
    assert isinstance(caught.value, AgmError)
    trainer.student.zero_grad()  # all but its gradients is as it was
    assert bits(trainer.student) == before[1], "the student changed"
    assert weights(trainer.generator) == before[0], "the generator changed"
    assert trainer.step_count == count


@each_method
@pytest.mark.parametrize("asked", ["in time", "by the last step", "by saving"])
def test_a_broken_loss_that_is_asked_for_later(method, asked):
    # As on a device that runs ahead of Python.
    trainer = make(method, seed=5)
    trainer.ask_every = 3 if asked == "in time" else 1000

    def learnt():
        optimizers = trainer.generator_optimizer, trainer.student_optimizer
        return [
            weights(trainer.generator, trainer.student),
            *(copy.deepcopy(optimizer.state_dict()["state"]) for optimizer in optimizers),
        ]

    train(trainer, STEPS - 3)
    trainer.refuse_non_finite()
    before = learnt()
    trainer.teacher.fc.bias[0] = torch.nan
    train(trainer, 2)
    with pytest.raises(NonFiniteLossError, match=f"step {STEPS - 3}, seed 5.*nan"):
        trainer.state_dict() if asked == "by saving" else trainer.step()
    assert trainer.step_count == STEPS - 3
    assert same_state(learnt(), before)
    trainer.teacher.fc.bias[0] = 0.0
    train(trainer, 1)
    assert not same_state(learnt(), before)


@each_method
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_term_of_a_hook(method, value):
    hook = Hook()
    trainer = make(method, (hook,), seed=5)
    train(trainer, WARMUP + 1)
    hook.term = lambda x: x.mean() + value
    assert_stops(trainer, "Hook", str(value))


class RootOfZero:
    """A method with a term of 0 whose gradient is not a number, of ``part``'s loss."""

    def __init__(self, method, part):
        self.method, self.part = method, part

    def __getattr__(self, name):
        asked = getattr(self.method, name)
        if name != f"{self.part}_terms":
            return asked
        logits = "teacher_logits" if self.part == "generator" else "student_logits"

        def terms(**given):
            x = given[logits]
            return asked(**given) | {"root": (x - x.detach()).square().sum().sqrt()}

        return terms


@each_method
@pytest.mark.parametrize("part", ["generator", "student"])
def test_a_broken_gradient_of_a_loss_that_is_finite(method, part):
    trainer = make(method, seed=5)
    train(trainer, WARMUP + 1)
    trainer.method = RootOfZero(trainer.method, part)
    assert_stops(trainer, "'norm of all gradients': nan", "root': 0.0")


def test_going_back_forgets_what_was_not_finite():
    # As on a device that runs ahead of Python.
    trainer = make(seed=5)
    trainer.ask_every = 1000
    train(trainer, STEPS - 3)
    state = copy.deepcopy(trainer.state_dict())
    expected = outcome(trainer, 3)
    trainer.load_state_dict(copy.deepcopy(state))
    trainer.teacher.fc.bias[0], bias = torch.nan, trainer.teacher.fc.bias[0].clone()
    train(trainer, 1)
    trainer.teacher.fc.bias[0] = bias
    trainer.load_state_dict(state)
    assert same_state(outcome(trainer, 3), expected)


BATCH = torch.ones(4, 3, 8, 8)


@pytest.mark.parametrize(
    ("call", "value", "message"),
    [
        ("generator_loss", None, r"Hook.generator_loss must return a scalar, or 0; got None"),
        ("generator_loss", torch.ones(3), r"got a tensor of shape \(3,\)"),
        ("student_batch", torch.ones(8, 3, 8, 8), r"return \(images, labels\); got a tensor of"),
        ("student_batch", (None, None), "got a tuple"),
        ("student_batch", None, r"Hook.student_batch .* got None"),
        ("generator_loss", 1j, "got a complex"),
        ("student_batch", (BATCH, torch.ones(8).long()), r"int64 \(8,\)"),
        ("student_batch", (BATCH, torch.tensor(1)), r"int64 \(\)"),
        ("student_batch", (BATCH, torch.ones(4).int()), r"int32 \(4,\)"),
        ("student_batch", (BATCH, torch.ones(4, 1).long()), r"int64 \(4, 1\)"),
        ("student_batch", (BATCH, torch.ones(4, 4).long()), r"int64 \(4, 4\)"),
        ("student_batch", (BATCH, torch.ones(4, 5)), r"floating \(N, 4\); .* \(4, 5\)"),
        ("student_batch", (BATCH[:0], torch.ones(0).long()), "N >= 1"),
        ("student_batch", (BATCH[:, :1], torch.ones(4).long()), r"float32 .*\(N, 3, 8, 8\)"),
        ("student_batch", (BATCH.double(), torch.ones(4).long()), "got torch.float64"),
    ],
)
def test_what_a_hook_must_return(call, value, message):
    hook = Hook()
    trainer = make(hooks=(hook,))
    train(trainer, WARMUP)
    before = weights(trainer.generator, trainer.student)
    setattr(hook, call, lambda **_: value)
    with pytest.raises(ConfigError, match=message):
        trainer.step()
    assert weights(trainer.generator, trainer.student) == before


def test_a_hook_that_does_not_take_what_it_is_given_is_told_before_the_first_step():
    class Short(Hook):
        def generator_loss(self, *, images, teacher_logits, student):
            return 0

    with pytest.raises(ConfigError, match=r"Short.generator_loss must take .*other_terms by name"):
        make(hooks=(Short(),))


def test_a_hook_that_writes_into_the_images_is_refused():
    class Clamps(Hook):
        def generator_loss(self, *, images, **_):
            with torch.no_grad():
                images.clamp_(-0.1, 0.1)
            return 0

    trainer = make(hooks=(Clamps(),))
    train(trainer, WARMUP)
    with pytest.raises(ConfigError, match=r"Clamps.generator_loss wrote into the images"):
        trainer.step()


def test_a_hooks_own_images_are_asked_about_again_once_they_were_changed():
    """As a projected gradient's loop changes them."""
    differ = []

    class Attacks(Hook):
        def generator_loss(self, *, images, student, **_):
            x = images.detach().clone().requires_grad_()
            for _ in range(2):
                (slope,) = torch.autograd.grad(student(x).square().sum(), x)
                with torch.no_grad():
                    x += 0.5 * slope.sign()
            differ.append((student(x) - student(x.detach().clone())).abs().max().item())
            return 0

    trainer = make(hooks=(Attacks(),))
    train(trainer, WARMUP + 2)
    assert differ == [0.0, 0.0]


@pytest.mark.parametrize("whose", ["generator", "student"])
@pytest.mark.parametrize(
    ("terms", "got"),
    [
        ({}, "dict"),
        ({"one": 0.0}, "{'one': 'float'}"),
        ({"one": torch.ones(3)}, "{'one': 'Tensor'}"),
        (torch.ones(()), "Tensor"),
    ],
)
def test_what_a_method_must_return(whose, terms, got):
    class Wrong(gdfq.GDFQ):
        pass

    setattr(Wrong, f"{whose}_terms", lambda self, **_: terms)
    trainer = make(Wrong(width=4, latent_dim=6))
    with pytest.raises(ConfigError, match=rf"Wrong.{whose}_terms must return scalar.* got {got}"):
        train(trainer)


@pytest.mark.parametrize(("size", "inputs"), [(12, tuple), (8, lambda pair: pair[0])])
def test_what_a_methods_generator_must_give(size, inputs):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3 * size * size)

        def sample(self, n, rng):
            return inputs([torch.randn(n, 5, generator=rng)]), torch.randint(4, (n,), generator=rng)

        def forward(self, z):
            return self.linear(z).view(-1, 3, size, size)

    class Method(gdfq.GDFQ):
        def make_generator(self, *_):
            return Own()

    message = r"tuple of its forward's inputs" if size == 8 else r"\(3, 8, 8\), got \(3, 12, 12\)"
    with pytest.raises(ConfigError, match=message):
        make(Method()).step()


def test_a_part_of_one_image_of_four_pixels_is_refused(monkeypatch):
    """Which a rank's generator cannot normalise on the CPU."""
    monkeypatch.setattr(Ranks, "first", lambda self, call: call())
    plan = replace(gdfq.paper(4)[1], batch_size=2)
    with pytest.raises(ConfigError, match="one image of 4 pixels"):
        Trainer(
            Tiny(), method=SMALL["gdfq"], recipe=plan, config=plan.config(3, 3),
            image_shape=(3, 4, 4), ranks=Ranks(0, 2),
        )  # fmt: skip


def test_a_hook_may_give_float32_images_where_the_generator_gives_bfloat16():
    hook = Hook(change=lambda images: images.float() + 0.1)
    trainer = make(hooks=(hook,), precision="bf16")
    train(trainer, WARMUP)
    before = weights(trainer.student)
    train(trainer, 2)
    assert hook.given[0].dtype == torch.bfloat16
    assert weights(trainer.student) != before


@each_method
@pytest.mark.parametrize("steps", [0, WARMUP - 1, WARMUP, WARMUP + 2])
def test_a_broken_teacher(method, steps):
    trainer = make(method, "both", seed=5)
    train(trainer, steps)
    trainer.teacher.fc.bias[0] = torch.nan
    assert_stops(trainer, "'G/", ": nan")


@each_method
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_batch_of_a_hook(method, value):
    hook = Hook()
    trainer = make(method, (hook,), seed=5)
    train(trainer, WARMUP + 1)
    hook.change = lambda x: x * value
    assert_stops(trainer, "'Q/", ": nan")


# Precision


@contract
def test_bfloat16(method, hooks):
    trainer = make(method, hooks, precision="bf16")
    start = weights(trainer.student)
    terms = train(trainer)
    assert all(math.isfinite(v) for row in terms for v in row.values())
    assert weights(trainer.student) != start
    for network in (trainer.student, trainer.generator):
        assert all(p.dtype == torch.float32 for p in network.parameters())
    pictures = trainer.sample_images(3)
    assert (pictures.shape, pictures.dtype) == ((3, 3, 8, 8), torch.float32)


def test_bfloat16_is_chosen_where_it_is_fast(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    # AVX-512 alone has bf16 at half of float32's speed.
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for fast, chosen in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda fast=fast: fast)
        assert resolve_precision("auto", cpu) == chosen
        assert resolve_precision("bf16", cpu) == "bf16"
        assert resolve_precision("fp32", cpu) == "fp32"


def test_no_gpus_generator_is_seeded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded"))
    train(make(), 1)


def test_unknown_precision():
    with pytest.raises(ConfigError, match=r"precision 'fp16'.*bf16"):
        make(precision="fp16")


def test_sampling_leaves_the_run():
    trainer = make(hooks="both")
    train(trainer, 4)
    before = bits(trainer.generator), trainer.rng.get_state(), torch.get_rng_state()
    first = trainer.sample_images(5)
    assert torch.equal(trainer.sample_images(5), first)
    assert not torch.equal(trainer.sample_images(5, seed=1), first)
    assert not first.requires_grad
    assert same_state((bits(trainer.generator), trainer.rng.get_state(), torch.get_rng_state()),
                      before)  # fmt: skip


# Resuming


def through_a_file(state):
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


@each_method
@pytest.mark.parametrize("hooks", ["none", "both"])
@pytest.mark.parametrize(
    "recipe",
    [{"student_optimizer": "sgd"}, {"student_optimizer": "adam", **QUICK}],
    ids=["paper", "quick"],
)
def test_resumed_is_uninterrupted(method, hooks, recipe):
    def fresh(seed=0):
        return make(method, hooks, seed=seed, **recipe)

    whole, states = fresh(), []
    terms = []
    for _ in range(STEPS):
        states.append(through_a_file(whole.state_dict()))
        terms += train(whole, 1)
    for step in (1, WARMUP - 1, WARMUP, STEPS - 2):
        resumed = fresh(seed=9)
        train(resumed, 2)  # whatever it was before
        resumed.load_state_dict(states[step])
        assert resumed.step_count == step
        assert train(resumed, STEPS - step) == terms[step:]
        assert same_state(through_a_file(resumed.state_dict()), through_a_file(whole.state_dict()))
        assert torch.equal(resumed.sample_images(2), whole.sample_images(2))


def test_a_third_partys_hook_resumes():
    trainer = make(hooks=(Hook(),))
    train(trainer, WARMUP + 2)
    resumed = make(hooks=(hook := Hook(),))
    resumed.load_state_dict(through_a_file(trainer.state_dict()))
    assert len(hook.given) == 2


@pytest.mark.parametrize(("saved", "ours"), [(0, 1), (1, 0), (1, 2), (2, 1)])
def test_another_number_of_hooks(saved, ours):
    trainer = make(hooks=[AGM() for _ in range(ours)])
    before = bits(trainer.student, trainer.generator)
    state = make(hooks=[AGM() for _ in range(saved)], seed=1).state_dict()
    with pytest.raises(CheckpointError, match=f"{saved} hooks?.*{ours}"):
        trainer.load_state_dict(state)
    assert bits(trainer.student, trainer.generator) == before


def test_a_teacher_without_batch_norm_is_a_named_error():
    teacher = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4))
    with pytest.raises(AgmError, match="the network has no BatchNorm"):
        make(teacher=teacher).step()


def test_the_pictures_classes_and_channels_are_the_teachers():
    trainer = make(teacher=Tiny(classes=6))
    assert trainer.num_classes == 6
    assert images().shape[1:] == trainer.sample_images(1).shape[1:]
