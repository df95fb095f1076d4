"""DiversityProbe: what it measures, and that it leaves nothing behind."""

import io
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from agm import AgmError, DiversityProbe
from tests.agm import classifier, elsewhere, image_generator, same_bits
from tests.strategies import rng, seeds

FIRST = ("image_movement", "feature_movement", "snapshot_similarity")  # NaN in the first call
KEYS = {*FIRST, "batch_similarity", "gradient_norm"}


class Noisy(nn.Module):
    """A generator with everything that a forward pass can disturb."""

    def __init__(self, fails=False):
        super().__init__()
        self.net, self.fails = image_generator(), fails
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5))
        self.drop = nn.Dropout(0.5)

    def forward(self, z):
        x = self.net(self.drop(self.spectral(z)) + torch.randn_like(z))
        if self.fails:
            raise KeyError("on purpose")
        return x


def latents(seed=0, n=6):
    return torch.randn(n, 5, generator=rng(seed))


def everything(*modules):
    """Parameters, buffers, gradients, flags, modes and hooks of every submodule, and the RNG."""
    state = [torch.get_rng_state().numpy().tobytes()]
    for module in modules:
        for name, t in (*module.named_parameters(), *module.named_buffers()):
            grad = None if t.grad is None else t.grad.numpy().tobytes()
            state.append((name, t.detach().numpy().tobytes(), t.requires_grad, grad))
        for m in module.modules():
            hooks = (m._forward_pre_hooks, m._forward_hooks, m._backward_hooks)
            state.append((m.training, [len(h) for h in hooks]))
    return state


def by_hand(now, before):
    """Mean over samples of the relative distance, and of the cosines of different samples."""
    now, before = (np.asarray(x, dtype=np.float64).reshape(len(x), -1) for x in (now, before))
    movement, cosines = [], []
    for i in range(len(now)):
        movement.append(np.sqrt(((now[i] - before[i]) ** 2).sum() / (before[i] ** 2).sum()))
        for j in range(len(now)):
            if i != j:
                lengths = np.linalg.norm(now[i]) * np.linalg.norm(before[j])
                cosines.append((now[i] * before[j]).sum() / lengths)
    return np.mean(movement), np.mean(cosines)


def watched(seed, n, teacher):
    """Three sets of random images, and the probe's rows about them."""
    images = torch.randn(3, n, 3, 4, 4, generator=rng(seed))
    coming = iter(images)
    probe = DiversityProbe(lambda z: next(coming), latents(n=n), teacher)
    return images, [probe() for _ in images]


# Measurements


@given(seeds, st.integers(2, 6))
def test_rows_are_the_formulas_by_hand(seed, n):
    teacher = classifier(seed % 89)
    images, rows = watched(seed, n, teacher)
    with torch.no_grad():
        features = [teacher[:-1](x) for x in images]  # what the linear layer receives
    # float32: sums of at most 48 products, and cosines in [-1, 1].
    close = {"rel": 1e-4, "abs": 1e-5}
    for i, row in enumerate(rows):
        assert set(row) == KEYS
        assert all(type(v) is float for v in row.values())
        assert math.isnan(row["gradient_norm"])  # a lambda has no parameters
        assert row["batch_similarity"] == pytest.approx(by_hand(*2 * [features[i]])[1], **close)
        if not i:
            assert all(math.isnan(row[k]) for k in FIRST)
            continue
        moved, _ = by_hand(images[i], images[i - 1])
        features_moved, similarity = by_hand(features[i], features[i - 1])
        assert row["image_movement"] == pytest.approx(moved, **close)
        assert row["feature_movement"] == pytest.approx(features_moved, **close)
        assert row["snapshot_similarity"] == pytest.approx(similarity, **close)


@given(seeds, st.integers(2, 6))
def test_a_teacher_without_linear_layers_gives_its_output(seed, n):
    teacher = nn.Conv2d(3, 2, 2)
    images, rows = watched(seed, n, teacher)
    with torch.no_grad():
        a, b, _ = (teacher(x) for x in images)
    assert rows[0]["batch_similarity"] == pytest.approx(by_hand(a, a)[1], rel=1e-4, abs=1e-5)
    assert rows[1]["feature_movement"] == pytest.approx(by_hand(b, a)[0], rel=1e-4)


def test_features_are_what_the_last_of_several_linear_layers_receives():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.Tanh(), nn.Linear(5, 4))
    images, rows = watched(0, 4, teacher)
    with torch.no_grad():
        features = teacher[:-1](images[0])
    assert rows[0]["batch_similarity"] == pytest.approx(by_hand(features, features)[1], abs=1e-5)


@pytest.mark.parametrize("places", ["as samples", "as a dimension"])
def test_a_linear_layer_at_every_place_gives_no_features_of_a_sample(places):
    class Everywhere(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 5)

        def forward(self, x):
            rows = x.flatten(2).transpose(1, 2)
            rows = rows.flatten(0, 1) if places == "as samples" else rows
            return self.fc(rows).tanh().view(len(x), -1, 5).sum(1)

    teacher = Everywhere()
    images, rows = watched(0, 4, teacher)
    with torch.no_grad():
        logits = teacher(images[0])
    assert rows[0]["batch_similarity"] == pytest.approx(by_hand(logits, logits)[1], abs=1e-5)


@pytest.mark.parametrize("how", ["by keyword", "scaled"])
def test_features_are_found_however_the_layer_is_called(how):
    class Scaled(nn.Linear):
        def forward(self, input, scale=1.0):
            return super().forward(input) * scale

    class Teacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = Scaled(48, 5)

        def forward(self, x):
            x = x.flatten(1)
            return self.fc(input=x) if how == "by keyword" else self.fc(x, 2.0)

    images, rows = watched(0, 4, Teacher())
    features = images[0].flatten(1)
    assert rows[0]["batch_similarity"] == pytest.approx(by_hand(features, features)[1], abs=1e-5)


def test_images_of_one_number_each():
    images = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    coming = iter(images)

    class Teacher(nn.Module):
        def forward(self, x):
            return torch.stack([x, -x], 1)

    probe = DiversityProbe(lambda z: next(coming), latents(n=2), Teacher())
    probe()
    assert probe()["image_movement"] == pytest.approx(1.0)


@pytest.mark.parametrize("n", [19, 73])
def test_autocast_changes_no_similarity(n):
    """Of features that are nearly alike, whose difference bfloat16 would not tell."""
    features = 1 + 1e-3 * torch.randn(n, 12, generator=rng(n))

    def similarities():
        probe = DiversityProbe(lambda z: features, latents(n=n), nn.Identity())
        return [row[k] for row in (probe(), probe()) for k in row if k.endswith("similarity")]

    want = similarities()
    with torch.autocast("cpu", torch.bfloat16):
        got = similarities()
    assert repr(got) == repr(want)  # NaN too
    assert want[0] == pytest.approx(by_hand(features, features)[1], abs=1e-6)


@given(seeds, st.integers(2, 6))
def test_a_frozen_generator_does_not_move(seed, n):
    probe = DiversityProbe(image_generator(), latents(seed, n), classifier())
    first, second = probe(), probe()
    assert second["image_movement"] == second["feature_movement"] == 0
    assert second["snapshot_similarity"] == first["batch_similarity"]


def test_noise_is_as_fixed_as_the_latents():
    """What a frozen generator draws in its forward is no movement."""
    probe = DiversityProbe(Noisy(), latents(), classifier())
    probe()
    torch.rand(1)
    row = probe()
    assert row["image_movement"] == row["feature_movement"] == 0


def test_of_a_distributed_network_the_module_is_asked():
    """One rank may probe alone: the wrapper's forward is a collective."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = [DistributedDataParallel(m) for m in (image_generator(), classifier())]
        for network in wrapped:
            network.register_forward_pre_hook(lambda *_: pytest.fail("the wrapper was asked"))
        got = DiversityProbe(wrapped[0], latents(), wrapped[1])()
    finally:
        dist.destroy_process_group()
    want = DiversityProbe(image_generator(), latents(), classifier())()
    assert got["batch_similarity"] == want["batch_similarity"]


@given(seeds, st.integers(2, 6))
def test_a_generator_deaf_to_its_latents_is_homogeneous(seed, n):
    image = torch.randn(3, 4, 4, generator=rng(seed))
    probe = DiversityProbe(lambda z: image.expand(len(z), -1, -1, -1), latents(n=n), classifier())
    assert probe()["batch_similarity"] == pytest.approx(1, abs=1e-5)


def test_black_images_that_stay_black_do_not_move():
    probe = DiversityProbe(lambda z: torch.zeros(4, 3, 4, 4), latents(n=4), nn.Flatten())
    probe()
    row = probe()
    assert row["image_movement"] == row["feature_movement"] == 0


@given(seeds, st.floats(0.125, 4))
def test_movement_is_relative(seed, factor):
    x = torch.randn(4, 3, 4, 4, generator=rng(seed))
    images = iter((x, (1 + factor) * x))
    probe = DiversityProbe(lambda z: next(images), latents(n=4), classifier())
    probe()
    assert probe()["image_movement"] == pytest.approx(factor, rel=1e-5)


@given(seeds, st.lists(st.booleans(), min_size=4, max_size=4))
def test_gradient_norm_is_the_loop(seed, present):
    generator = image_generator()
    g, square = rng(seed), 0.0
    for p, has in zip(generator.parameters(), present, strict=True):
        if has:
            p.grad = torch.randn(p.shape, generator=g)
            square += sum(v * v for v in p.grad.flatten().tolist())
    got = DiversityProbe(generator, latents(), classifier())()["gradient_norm"]
    if any(present):
        assert got == pytest.approx(math.sqrt(square), rel=1e-5)  # a float32 sum of 294 squares
    else:
        assert math.isnan(got)


def test_gradient_norm_of_large_float16_gradients():
    class Half(nn.Linear):
        def forward(self, z):
            return super().forward(z.half()).float().view(-1, 3, 4, 4)

    generator = Half(5, 48, bias=False).half()
    generator.weight.grad = torch.full_like(generator.weight, 3e4)  # whose norm is no float16
    got = DiversityProbe(generator, latents(), classifier())()["gradient_norm"]
    assert got == pytest.approx(3e4 * math.sqrt(5 * 48), rel=1e-3)


def test_several_latents_and_a_generator_that_is_no_module():
    z, labels = latents(), torch.arange(6)
    seen = []

    def generator(*arguments):
        seen.append(arguments)
        return torch.ones(6, 3, 4, 4) * labels.view(-1, 1, 1, 1)

    row = DiversityProbe(generator, (z, labels), classifier())()
    assert torch.equal(seen[0][0], z)
    assert torch.equal(seen[0][1], labels)
    assert set(row) == KEYS


def test_latents_that_are_written_to_later_stay_what_they_were():
    z = latents()
    probe = DiversityProbe(nn.Sequential(nn.Linear(z.shape[1], 12), nn.Unflatten(1, (3, 2, 2))), z,
                           nn.Flatten())  # fmt: skip
    probe()
    z.normal_()
    assert probe()["image_movement"] == 0


def test_features_are_those_of_the_linear_layer_that_runs_last():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.gate, self.aux = nn.Linear(12, 5), nn.Linear(12, 12), nn.Linear(5, 2)

        def forward(self, x):
            x = x.flatten(1)
            return self.fc(x * self.gate(x).sigmoid())

    teacher = Gated()
    seen = []
    teacher.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    probe = DiversityProbe(lambda z: z.view(-1, 3, 2, 2), torch.randn(4, 12), teacher)
    probe()
    assert torch.equal(probe.features, seen[0])


def test_images_changed_in_place_have_moved():
    bank = torch.ones(4, 3, 4, 4)
    probe = DiversityProbe(lambda z: bank, latents(n=4), nn.Flatten())
    probe()
    bank *= 3
    row = probe()
    assert row["image_movement"] == pytest.approx(2)
    assert row["feature_movement"] == pytest.approx(2)


# Leaving nothing behind


@given(seeds, st.booleans(), st.lists(st.booleans(), min_size=12, max_size=12), st.integers(1, 3))
def test_leaves_nothing_behind(seed, fails, modes, calls):
    generator, teacher = Noisy(fails), classifier()
    for m, mode in zip(generator.modules(), modes, strict=False):
        m.training = mode
    teacher.train(modes[-1])
    torch.manual_seed(seed)
    next(generator.parameters()).grad = torch.ones(48, 5)
    z = latents(seed)
    before, held = everything(generator, teacher), z.clone()
    probe = DiversityProbe(generator, z, teacher)
    for _ in range(calls):
        if fails:
            with pytest.raises(KeyError):
                probe()
        else:
            probe()
        assert everything(generator, teacher) == before
    assert same_bits(z, held)


def test_a_buffer_that_is_replaced_comes_back():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, z):
            self.count = self.count + 1
            return z.new_ones(len(z), 3, 4, 4)

    generator = Counting()
    DiversityProbe(generator, latents(), classifier())()
    assert generator.count.item() == 0


class TwoNames(nn.Module):
    """A BatchNorm that is registered twice."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(48)
        self.net = nn.Sequential(nn.Linear(5, 48), self.norm, nn.Unflatten(1, (3, 4, 4)))

    def forward(self, z):
        return self.net(z)


@pytest.mark.parametrize("wrap", [nn.Identity, nn.DataParallel], ids=["itself", "parallel"])
def test_modules_of_two_names_and_parallel_ones_are_left_as_they_are(wrap):
    generator, teacher = TwoNames(), classifier()
    if wrap is nn.DataParallel:
        generator, teacher = wrap(generator), wrap(teacher)
    before, own = everything(generator, teacher), [id(b) for b in generator.buffers()]
    DiversityProbe(generator, latents(), teacher)()
    assert everything(generator, teacher) == before
    assert [id(b) for b in generator.buffers()] == own


def test_a_compiled_teacher_has_the_features_of_the_network():
    teacher, rows = classifier(), []
    for network in (teacher, torch.compile(teacher, backend="eager")):
        with torch.no_grad():
            network(torch.zeros(6, 3, 4, 4))  # compiled for as many as the probe's
        probe = DiversityProbe(image_generator(), latents(), network)
        rows.append((probe(), probe.features))
    assert rows[0][0]["batch_similarity"] == rows[1][0]["batch_similarity"]
    assert same_bits(rows[0][1], rows[1][1])


def test_a_teacher_that_fails_leaves_nothing_behind():
    generator, teacher = image_generator(), nn.Sequential(classifier().train(), nn.Linear(7, 2))
    before = everything(generator, teacher)
    with pytest.raises(RuntimeError):
        DiversityProbe(generator, latents(), teacher)()
    assert everything(generator, teacher) == before


@pytest.mark.parametrize("training", [True, False])
def test_may_be_called_between_forward_and_backward(training):
    z, gradients = latents(), []
    for probed in (False, True):
        generator, teacher = image_generator().train(training), classifier()
        probe = DiversityProbe(generator, z, teacher)
        loss = teacher(generator(z)).square().sum()
        if probed:
            probe()
        loss.backward()
        gradients.append([p.grad for p in generator.parameters()])
    assert all(same_bits(a, b) for a, b in zip(*gradients, strict=True))


def test_keeps_no_graph():
    generator = image_generator()
    probe = DiversityProbe(generator, latents(), classifier())
    probe()
    state = probe.state_dict()
    assert not any(t.requires_grad for t in (*state.pop("latents"), *state.values()))
    assert all(p.requires_grad for p in generator.parameters())
    assert torch.is_grad_enabled()


# State and errors


@given(seeds, st.booleans())
def test_state_dict_goes_on_exactly(seed, through_a_file):
    z, teacher = latents(seed), classifier()
    probe = DiversityProbe(image_generator(1), z, teacher)
    probe()
    state = probe.state_dict()
    if through_a_file:
        torch.save(state, file := io.BytesIO())
        file.seek(0)
        state = torch.load(file, weights_only=True)
    moved = image_generator(2)
    other = DiversityProbe(moved, latents(seed + 1), teacher)  # as in a process of its own
    other.load_state_dict(state)
    probe.generator = moved
    want, got = probe(), other()
    for row in (got, want):
        assert math.isnan(row.pop("gradient_norm"))  # no gradients yet
    assert got == want
    assert got["image_movement"] > 0


def test_state_dict_before_the_first_call():
    probe = DiversityProbe(image_generator(), latents(), classifier())
    probe.load_state_dict(DiversityProbe(image_generator(), latents(), classifier()).state_dict())
    assert math.isnan(probe()["image_movement"])


@pytest.mark.parametrize("name", ["latents", "images", "features"])
def test_a_state_that_lacks_something_is_a_named_error(name):
    probe = DiversityProbe(image_generator(), latents(), classifier())
    state = probe.state_dict()
    del state[name]
    with pytest.raises(AgmError, match=f"has no {name}.*DiversityProbe"):
        probe.load_state_dict(state)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_latents_are_a_named_error(n):
    generator, teacher = image_generator().eval(), classifier()
    before = everything(generator, teacher)
    with pytest.raises(AgmError, match=f"at least 2.*{n}") as caught:
        DiversityProbe(generator, latents(n=n), teacher)()
    assert isinstance(caught.value, ValueError)
    assert everything(generator, teacher) == before


def test_a_default_dtype_or_device_or_inference_mode_changes_nothing():
    probes = [DiversityProbe(image_generator(), latents(), classifier()) for _ in range(2)]
    want = [probes[0]() for _ in range(2)]
    with elsewhere():
        got = [probes[1]()]
    with torch.inference_mode():
        got.append(probes[1]())
    assert repr(got) == repr(want)  # NaN too
    probes[1].generator(latents()).sum().backward()  # nothing of inference mode is left behind
