"""Whole runs: history, evaluation, files, interruption."""

import contextlib
import copy
import io
import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from agm import AGM, AgmError, LinearInterpolation
from baselines import (
    METHODS,
    RECIPES,
    Interrupted,
    deployed,
    export_onnx,
    load_quantized,
    quantize,
    save_quantized,
)
from baselines.errors import CheckpointError, ConfigError, ExportError, UnsupportedLayerError
from baselines.quantization import checkpoint
from baselines.quantization.student import build_student
from baselines.quantization.tracing import traced
from baselines.training.checks import resolve_precision
from tests.baselines import Tiny, bits, fill, images, raw, same_state, weights

STEPS = 12
TEACHER = Tiny()


def small(monkeypatch, **changes):
    """The methods' generators made narrow, and their recipes changed."""
    for module, recipe in itertools.product(METHODS.values(), RECIPES):
        made = getattr(module, recipe)

        def narrow(size, made=made):
            method, plan = made(size)
            return replace(method, width=4, latent_dim=6), replace(plan, **changes)

        monkeypatch.setattr(module, recipe, narrow)


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    small(monkeypatch)


def run(teacher=TEACHER, **settings):
    defaults = {
        "image_size": 8, "steps": STEPS, "batch_size": 6, "precision": "fp32", "records": 4,
    }  # fmt: skip
    return quantize(teacher, **defaults | settings)


def state_of(model):
    return [(name, raw(value)) for name, value in model.state_dict().items()]


class Accuracy:
    """Says how often it was asked; remembers what it saw."""

    def __init__(self):
        self.seen = []

    def __call__(self, model):
        assert not any(m.training for m in model.modules())
        self.seen.append(state_of(model))
        return float(len(self.seen))


def same_result(a, b):
    return (
        state_of(a.model) == state_of(b.model)
        and same_state(a.history, b.history)
        and torch.equal(a.images, b.images)
        and a.accuracies == b.accuracies
    )


class StopAfter:
    def __init__(self, steps):
        self.steps, self.asked = steps, 0

    def __call__(self):
        self.asked += 1
        return self.asked == self.steps


def interrupted(path, after=5, **settings):
    stop = StopAfter(after)
    with pytest.raises(Interrupted, match=f"step {after} of {STEPS}"):
        run(checkpoint_path=path, stop=stop, **settings)
    assert stop.asked == after


# The result


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("hooks", [False, True])
def test_end_to_end(method, recipe, hooks):
    before, seen, policies, evaluate = bits(TEACHER), [], [], Accuracy()
    result = run(
        method=method, recipe=recipe, hooks=[AGM()] if hooks else [], evaluate=evaluate,
        on_step=lambda step, terms: seen.append((step, len(terms))), on_policy=policies.append,
    )  # fmt: skip
    assert bits(TEACHER) == before
    assert [step for step, _ in seen] == list(range(STEPS))
    (told,) = policies  # before the signs are known
    assert [row[:3] for row in told.rows] == [row[:3] for row in result.policy.rows]
    steps = [row["step"] for row in result.history]
    assert steps == sorted({3, 6, 9, 12, result.recipe.warmup_steps})
    measured = [row["step"] for row in result.history if "accuracy" in row]
    assert measured == [s for s in steps if s >= result.recipe.warmup_steps]
    assert result.accuracies == [float(i + 1) for i in range(len(measured))]
    assert result.history[-1]["accuracy"] == result.accuracies[-1]
    assert evaluate.seen[-1] == state_of(result.model)
    assert len({str(seen) for seen in evaluate.seen}) == len(measured)
    for row in [row for row in result.history if row["step"] > 3]:  # the probe compares with 3
        assert all(math.isfinite(v) for v in row.values()), row
    assert {"batch_similarity", "snapshot_similarity", "gradient_norm"} <= set(result.history[-1])
    assert result.images.shape == (64, 3, 8, 8)
    assert result.seconds > 0
    assert result.steps_per_s == pytest.approx(STEPS / result.seconds)
    assert (result.recipe.steps, result.recipe.batch_size, result.precision) == (STEPS, 6, "fp32")
    assert not any(p.requires_grad for p in result.model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_the_first_accuracy_is_straight_after_quantization(method):
    first = []

    def evaluate(model):
        first.append(weights(model))
        return 0.0

    result = run(method=method, evaluate=evaluate)
    assert first[0] == weights(build_student(traced(TEACHER, (3, 8, 8)), result.config))
    assert first[0] != weights(result.model)


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_is_a_run(method):
    before, first = torch.get_rng_state(), run(method=method, hooks=[AGM()])
    assert torch.equal(torch.get_rng_state(), before)
    assert same_result(run(method=method, hooks=[AGM()]), first)
    assert bits(run(method=method, hooks=[AGM()], seed=1).model) != bits(first.model)


def draws_and_differentiates(model):
    torch.rand(3)
    model(images()).sum().backward()
    return 0.5


def leaves_train_mode(model):
    model.train()
    return 0.5


@pytest.mark.parametrize("evaluate", [Accuracy(), draws_and_differentiates, leaves_train_mode])
@pytest.mark.parametrize("recipe", RECIPES)
def test_evaluation_never_changes_the_result(evaluate, recipe):
    plain, result = run(recipe=recipe), run(recipe=recipe, evaluate=evaluate, records=12)
    assert state_of(result.model) == state_of(plain.model)
    assert torch.equal(result.images, plain.images)
    assert not any(m.training for m in result.model.modules())


def test_records_never_change_the_result():
    plain = run()
    for records in (1, 5, 12, 100):
        result = run(records=records)
        assert state_of(result.model) == state_of(plain.model)
        assert len(result.history) == min(records, STEPS)
        assert result.history[-1]["step"] == STEPS


@pytest.mark.parametrize(
    ("every", "want"), [(1, range(3, 13)), (5, [3, 5, 10, 12]), (STEPS, [3, 12]), (1000, [3, 12])]
)
def test_how_often_is_evaluated(every, want):
    evaluate = Accuracy()
    result = run(evaluate=evaluate, eval_every=every, recipe="quick")
    assert result.recipe.warmup_steps == 3
    measured = [row["step"] for row in result.history if "accuracy" in row]
    assert measured == list(want)
    assert {3, 6, 9, 12} <= {row["step"] for row in result.history}  # the records, as ever
    assert evaluate.seen[-1] == state_of(result.model)


def test_an_evaluation_may_give_several_figures():
    result = run(evaluate=lambda _: {"accuracy": 3.0, "accuracy_top5": 5.0})
    for row in result.history:
        assert (row.get("accuracy"), row.get("accuracy_top5")) in ((3.0, 5.0), (None, None))
    assert set(result.accuracies) == {3.0}
    assert result.history[-1]["accuracy_top5"] == 5.0


def test_the_shortest_runs():
    with pytest.raises(ConfigError, match=r"steps=1 is all warm-up.*2 or more"):
        run(steps=1)
    for steps in (2, 3):
        evaluate = Accuracy()
        result = run(steps=steps, evaluate=evaluate)
        assert result.history[-1]["step"] == steps
        assert "accuracy" in result.history[-1]


def test_other_bits_and_schemes():
    for bits_, scheme, edge in ((2, "symmetric", None), (4, "asymmetric", 7)):
        result = run(weight_bits=bits_, act_bits=bits_, scheme=scheme, edge_bits=edge)
        assert result.config.weight_bits == result.config.act_bits == bits_
        widths = {row[2] for row in result.policy.rows}
        assert widths == {str(bits_), str(edge or 8)}
        for name, m in result.model.named_modules():
            if isinstance(m, nn.Conv2d) and not (edge and name == "conv0"):
                assert max(len(channel.unique()) for channel in m.weight) <= 2**bits_


def test_one_channel():
    teacher = Tiny(channels=1)
    assert run(teacher).images.shape == (64, 1, 8, 8)


# Files


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_saved_and_loaded_predicts_the_same(tmp_path, method, recipe):
    result = run(method=method, recipe=recipe, weight_bits=4, edge_bits=8)
    result.save(tmp_path / "net.pt")
    architecture = Tiny(seed=9).train()
    before, rng_state = bits(architecture), torch.get_rng_state()
    model = load_quantized(tmp_path / "net.pt", architecture)
    assert bits(architecture) == before
    assert torch.equal(torch.get_rng_state(), rng_state)
    assert same_state(dict(model.state_dict()), dict(result.model.state_dict()))
    x = images(64)
    assert torch.equal(model(x), result.model(x))
    assert not any(m.training for m in model.modules())
    save_quantized(model, tmp_path / "again.pt")
    again = load_quantized(tmp_path / "again.pt", architecture)
    assert same_state(dict(again.state_dict()), dict(model.state_dict()))


# Interruption


# With a warm-up of 4 steps, of which the last 2 observe.
POINTS = {"warm-up": 1, "observing": 3, "switch": 4, "training": 8, "last step": STEPS - 1}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("hooks", [list, lambda: [AGM(interval=2)]], ids=["plain", "agm"])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("recipe", ["quick", pytest.param("paper", marks=pytest.mark.long)])
def test_resumed_is_uninterrupted(tmp_path, monkeypatch, campaign, method, hooks, seed, recipe):
    small(monkeypatch, warmup=4 / STEPS, observe=2 / STEPS)

    def go(path, **settings):
        """The result, and all that the run knew after its last step."""
        result = run(method=method, hooks=hooks(), seed=seed, recipe=recipe, records=STEPS // 2,
                     evaluate=lambda m: 0.5, checkpoint_path=path, checkpoint_every=STEPS,
                     **settings)  # fmt: skip
        state = checkpoint.load(path)
        del state["seconds"]
        return result, state

    whole, state = go(tmp_path / "whole.pt")
    assert {*state} == {"identity", "trainer", "probe", "history"}
    assert {*state["trainer"]} >= {
        "generator", "student", "generator_optimizer", "student_optimizer", "rng", "hooks",
    }  # fmt: skip
    for point, after in POINTS.items():
        path = tmp_path / f"{after}.pt"
        campaign.count("stopped and resumed", runs=1)
        interrupted(path, after, method=method, hooks=hooks(), seed=seed, recipe=recipe,
                    records=STEPS // 2, evaluate=lambda m: 0.5)  # fmt: skip
        torch.manual_seed(after)
        steps = []
        resumed, resumed_state = go(
            path, resume=True, on_step=lambda step, _, steps=steps: steps.append(step)
        )
        assert steps == list(range(after, STEPS))
        assert same_result(resumed, whole), point
        assert same_state(resumed_state, state), point
        assert resumed.seconds > 0
        campaign.count("stopped and resumed", bit_identical=1)


def test_interrupted_again_and_again(tmp_path):
    whole, path = run(hooks=[AGM()]), tmp_path / "run.pt"
    for _ in range(4):
        with pytest.raises(Interrupted):
            run(hooks=[AGM()], checkpoint_path=path, resume=True, stop=StopAfter(2))
    assert same_result(run(hooks=[AGM()], checkpoint_path=path, resume=True), whole)


def test_checkpoints_come_as_often_as_asked(tmp_path):
    path, times = tmp_path / "run.pt", []

    def on_step(step, _):
        times.append((step, path.stat().st_ino if path.exists() else None))

    result = run(checkpoint_path=path, checkpoint_every=5, on_step=on_step)
    files = [file for _, file in times]
    assert files[:5] == [None] * 5  # step 5 has been taken, and is saved next
    assert None not in files[5:]
    assert files[9] == files[5] != files[10]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.pt", "run.pt.previous"]
    steps = []
    again = run(checkpoint_path=path, resume=True, on_step=lambda step, _: steps.append(step))
    assert steps == [10, 11]
    assert same_result(again, result)


def test_a_damaged_checkpoint_falls_back(tmp_path):
    path, whole = tmp_path / "run.pt", run()
    run(checkpoint_path=path, checkpoint_every=4)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="damaged.*previous"):
        assert same_result(run(checkpoint_path=path, resume=True), whole)


def test_a_run_whose_disk_fills_up(small_disk):
    path, filler, whole = small_disk / "run.pt", small_disk / "filler", run()

    def on_step(step, _):
        if step == 6:
            disk = os.statvfs(small_disk)
            filler.write_bytes(bytes((disk.f_bavail - 1) * disk.f_frsize))

    with pytest.raises(CheckpointError, match=r"No space left.*the file that was there is intact"):
        run(checkpoint_path=path, checkpoint_every=4, on_step=on_step)
    filler.unlink()
    steps = []
    again = run(checkpoint_path=path, resume=True, on_step=lambda step, _: steps.append(step))
    assert steps == list(range(4, STEPS))
    assert same_result(again, whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_teacher_of_another_dtype_is_taken_in_float32(tmp_path, dtype):
    teacher = Tiny().to(dtype)
    before = bits(teacher)
    result, want = run(teacher), run(copy.deepcopy(teacher).float())
    assert same_result(result, want)
    assert bits(teacher) == before
    result.save(tmp_path / "net.pt")
    loaded = load_quantized(tmp_path / "net.pt", teacher)
    assert torch.equal(loaded(images()), want.model(images()))


def test_without_resume_a_checkpoint_is_not_read(tmp_path):
    path = tmp_path / "run.pt"
    interrupted(path)
    steps = []
    run(checkpoint_path=path, on_step=lambda step, _: steps.append(step))
    assert steps == list(range(STEPS))


def test_nothing_to_resume(tmp_path):
    whole = run()
    assert same_result(run(checkpoint_path=tmp_path / "none.pt", resume=True), whole)


def test_a_stop_without_a_checkpoint():
    with pytest.raises(Interrupted):
        run(stop=StopAfter(3))


def test_a_stop_after_the_last_step_is_the_end():
    assert same_result(run(stop=StopAfter(STEPS)), run())


class Doubled(Tiny):
    """Of Tiny's weights, another network."""

    def forward(self, x):
        return 2 * super().forward(x)


OTHER_RUNS = {
    "method": {"method": "adadfq"},
    "same generator": {"method": "qimera"},
    "recipe": {"recipe": "paper"},
    "weight_bits": {"weight_bits": 4},
    "act_bits": {"act_bits": 4},
    "scheme": {"scheme": "symmetric"},
    "edge_bits": {"edge_bits": 8},
    "seed": {"seed": 1},
    "steps": {"steps": STEPS + 1},
    "batch_size": {"batch_size": 7},
    "precision": {"precision": "bf16"},
    "image_size": {"image_size": 12},
    "teacher's weights": {"teacher": Tiny(seed=1)},
    "teacher's classes": {"teacher": Tiny(classes=5)},
    "teacher's width": {"teacher": Tiny(width=5)},
    "teacher's forward": {"teacher": Doubled()},
    "hooks": {"hooks": [AGM()]},
    "records": {"records": 3},
    "evaluations": {"eval_every": 3},
}


@pytest.mark.parametrize("changes", OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_another_runs_checkpoint_is_refused(tmp_path, changes):
    path, steps = tmp_path / "run.pt", []
    interrupted(path)
    with pytest.raises(CheckpointError) as caught:
        run(**changes, checkpoint_path=path, resume=True, on_step=lambda s, _: steps.append(s))
    assert isinstance(caught.value, AgmError)
    assert steps == []


def test_a_run_of_another_kind_of_device_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    interrupted(path)
    state = checkpoint.load(path)
    state["identity"]["device"] = "cuda"
    checkpoint.save(path, state)
    with pytest.raises(CheckpointError, match="is of another run: device differ"):
        run(checkpoint_path=path, resume=True)


def test_a_hook_of_another_class_is_refused(tmp_path):
    class Other(AGM):
        def state_dict(self):
            return {"mine": 1}

    interrupted(tmp_path / "run.pt", hooks=[Other()])
    with pytest.raises(CheckpointError):
        run(hooks=[AGM()], checkpoint_path=tmp_path / "run.pt", resume=True)


def test_an_add_on_of_other_settings_is_refused(tmp_path):
    interrupted(tmp_path / "run.pt", hooks=[AGM(ratio=0.1)])
    with pytest.raises(CheckpointError, match="hooks"):
        run(hooks=[AGM(ratio=0.2)], checkpoint_path=tmp_path / "run.pt", resume=True)


def test_a_quantized_network_is_no_checkpoint(tmp_path):
    run().save(tmp_path / "net.pt")
    with pytest.raises(CheckpointError):
        run(checkpoint_path=tmp_path / "net.pt", resume=True)


def test_a_checkpoint_is_no_quantized_network(tmp_path):
    interrupted(tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match="not a quantized network"):
        load_quantized(tmp_path / "run.pt", Tiny())


def test_a_quantized_network_in_another_architecture(tmp_path):
    class Scaled(Tiny):
        def __init__(self, factor=1.0):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return super().forward(self.factor * x)

    result = run(Scaled(2.0))
    result.save(tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"is of another network: .* gives other logits"):
        load_quantized(tmp_path / "net.pt", Scaled())
    assert torch.equal(load_quantized(tmp_path / "net.pt", Scaled(2.0))(images()),
                       result.model(images()))  # fmt: skip


def test_a_quantized_network_with_another_activation(tmp_path):
    def small(relu):  # whose activations stay below 6 for standard normal images
        first, last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 6)
        layers = first, nn.BatchNorm2d(4), relu, last, nn.Flatten()
        network = fill(nn.Sequential(*layers), seed=0)
        with torch.no_grad():
            network[1].weight.fill_(0.5)
            network[1].bias.fill_(0)
        return network

    run(small(nn.ReLU())).save(tmp_path / "net.pt")
    load_quantized(tmp_path / "net.pt", small(nn.ReLU()))
    with pytest.raises(CheckpointError, match=r"is of another network: .* gives other logits"):
        load_quantized(tmp_path / "net.pt", small(nn.ReLU6()))


def test_a_quantized_network_of_a_file_with_one_batch_of_logits(tmp_path):
    path, result = tmp_path / "net.pt", run()
    result.save(path)
    state = checkpoint.load(path)
    checkpoint.save(path, state | {"logits": state["logits"][:4]})
    assert torch.equal(load_quantized(path, Tiny())(images()), result.model(images()))


def test_figures_of_any_kind_of_number(tmp_path):
    def evaluate(_):
        return {"accuracy": np.float64(0.5), "loss": torch.tensor(0.25)}

    want = run(evaluate=evaluate)
    assert {type(value) for row in want.history for value in row.values()} <= {int, float}
    interrupted(tmp_path / "run.pt", evaluate=evaluate)
    again = run(evaluate=evaluate, checkpoint_path=tmp_path / "run.pt", resume=True)
    assert same_result(again, want)


@pytest.mark.parametrize("figures", [{"accuracy": 0.5, "step": -5}, {"accuracy": "high"}, {}, None])
def test_figures_that_are_none(figures):
    with pytest.raises(ConfigError, match="evaluate must return"):
        run(evaluate=lambda model: figures)


def test_an_evaluation_that_freezes_the_student_changes_nothing():
    want = run(evaluate=lambda model: 0.5)
    assert same_result(run(evaluate=lambda m: 0.5 * (m.requires_grad_(False) is m)), want)


@pytest.mark.parametrize("what", ["evaluate", "stop", "on_step", "on_policy"])
def test_what_must_be_a_function(what):
    with pytest.raises(ConfigError, match=f"{what} must be a function, got 0.5"):
        run(**{what: 0.5})


def test_a_hooks_state_that_could_not_be_read_back_is_told_at_once(tmp_path):
    class Bank(AGM):
        def state_dict(self):
            return {"images": self.value}

    for value, why in (
        (np.zeros(3), "it holds a numpy"),
        (torch.Generator(), "it holds a torch._C.Generator"),
        (lambda: 0, "[Cc]an't"),
    ):
        bank = Bank()
        bank.value = value
        with pytest.raises(CheckpointError, match=rf"not written, .*a hook's state_dict \(.*{why}"):
            run(hooks=[bank], checkpoint_path=tmp_path / "run.pt", checkpoint_every=2)
        assert list(tmp_path.iterdir()) == []


def test_a_hook_that_is_a_dataclass_resumes(tmp_path):
    @dataclass
    class Noise:
        rng: torch.Generator = field(default_factory=torch.Generator)

        def generator_loss(self, *, images, teacher_logits, student, other_terms=None):
            return 0

        def student_batch(self, *, images, labels):
            return images + torch.randn(images.shape, generator=self.rng), labels

        def state_dict(self):
            return {"rng": self.rng.get_state()}

        def load_state_dict(self, state):
            self.rng.set_state(state["rng"])

    interrupted(tmp_path / "run.pt", hooks=[Noise()])
    resumed = run(hooks=[Noise()], checkpoint_path=tmp_path / "run.pt", resume=True)
    assert same_result(resumed, run(hooks=[Noise()]))


@pytest.mark.parametrize("name", ["net.pt", "net.pt.previous"])
def test_a_quantized_network_is_not_overwritten_by_a_run(tmp_path, name):
    run().save(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(CheckpointError, match=f"{name}' is a quantized network; choose another"):
        run(checkpoint_path=tmp_path / "net.pt", checkpoint_every=2)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(name, before)]


def test_another_programs_file_is_not_overwritten(tmp_path):
    path = tmp_path / "teacher.pth"
    torch.save(Tiny().state_dict(), path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="no checkpoint of this program; choose another"):
        run(checkpoint_path=path, checkpoint_every=2)
    assert path.read_bytes() == before
    (tmp_path / "empty.pt").touch()
    run(checkpoint_path=tmp_path / "empty.pt", checkpoint_every=2)


def test_a_caller_under_autocast():
    want = run()
    with torch.autocast("cpu", torch.bfloat16):
        got = run()
        logits = [deployed(result.model, result.images).eval()(images()) for result in (want, got)]
    assert same_result(got, want)
    assert torch.equal(*logits)


def test_a_network_with_an_extra_state_and_a_train_that_returns_nothing():
    class Versioned(nn.Identity):
        def get_extra_state(self):
            return {"version": 2}

        def set_extra_state(self, state):
            pass

    class Silent(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)

    run(Silent(Versioned(), Tiny()))


def test_a_quantized_network_of_another_version(tmp_path):
    run().save(tmp_path / "net.pt")
    state = checkpoint.load(tmp_path / "net.pt")
    state["config"]["rounding"] = "stochastic"
    checkpoint.save(tmp_path / "net.pt", state)
    with pytest.raises(CheckpointError, match=r"net\.pt.*another version.*rounding"):
        load_quantized(tmp_path / "net.pt", Tiny())


# Unusual teachers and callers


class Backwards(Tiny):
    """Its first convolution is registered last, and layers take their inputs by keyword."""

    def __init__(self):
        super().__init__(channels=2)
        first = self.conv0
        del self.conv0
        self.conv0 = first

    def forward(self, x):
        x = F.relu(input=self.bn0(input=self.conv0(input=x)))
        x = F.relu(x + self.bn1(self.conv1(x)))
        return self.fc(input=x.mean((2, 3)))


@pytest.mark.parametrize("method", METHODS)
def test_layers_in_any_order_with_inputs_by_keyword(method):
    result = run(Backwards(), method=method, evaluate=lambda model: 1.0)
    assert result.images.shape == (64, 2, 8, 8)
    assert all(math.isfinite(row["feature_movement"]) for row in result.history[1:])


def test_a_caller_without_gradients():
    want = run()
    with torch.no_grad():
        assert same_result(run(), want)


# The caller's defaults


@contextlib.contextmanager
def float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device():
    torch.set_default_device("meta")  # where no value can be had
    try:
        yield
    finally:
        torch.set_default_device(None)


def defaults():
    device = torch.get_default_device()
    return torch.get_default_dtype(), device, torch.is_inference_mode_enabled()


DEFAULTS = [float64, torch.inference_mode, default_device]


@pytest.mark.parametrize("surroundings", DEFAULTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_callers_defaults_change_nothing(tmp_path, surroundings, method, recipe):
    path, settings = tmp_path / "run.pt", {"method": method, "recipe": recipe}
    asked = []

    def evaluate(model):
        asked.append(defaults())
        return 1.0

    want = run(hooks=[AGM()], **settings, evaluate=evaluate)
    usual = asked.pop()
    asked.clear()
    with surroundings():
        now = defaults()
        interrupted(path, hooks=[AGM()], **settings, evaluate=evaluate, checkpoint_every=2)
        got = run(hooks=[AGM()], **settings, evaluate=evaluate, checkpoint_path=path, resume=True)
        got.save(tmp_path / "w3a3.pt")
        loaded = load_quantized(tmp_path / "w3a3.pt", TEACHER)
        got.export_onnx(tmp_path / "got.onnx")
    want.export_onnx(tmp_path / "want.onnx")
    assert (tmp_path / "got.onnx").read_bytes() == (tmp_path / "want.onnx").read_bytes()
    assert {*asked} == {now} != {usual}  # the user's own function has the user's surroundings
    assert same_result(got, want)
    assert state_of(loaded) == state_of(want.model)
    assert torch.equal(loaded(images()), want.model(images()))
    assert not any(t.is_inference() for t in (*loaded.state_dict().values(), got.images))


def test_a_teacher_made_in_inference_mode(tmp_path):
    with torch.inference_mode():
        teacher = Tiny()
    result = run(teacher)
    assert same_result(result, run())
    result.save(tmp_path / "w3a3.pt")
    assert state_of(load_quantized(tmp_path / "w3a3.pt", teacher)) == state_of(result.model)


def test_runs_in_threads_are_those_of_one_after_the_other():
    settings = [{"method": m, "seed": s, "records": STEPS} for m in METHODS for s in range(2)]
    want = [run(hooks=[AGM()], **s) for s in settings]
    # As the main thread has it: another number of threads inside sums in another order.
    one = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with float64(), ThreadPoolExecutor(len(settings), **one) as pool:
        # The default dtype is the process's, and the first to leave must not give it back.
        runs = [pool.submit(run, hooks=[AGM()], **s) for s in settings]
        got = [r.result() for r in runs]
    assert all(same_result(a, b) for a, b in zip(got, want, strict=True))


# What a network or a setting may lack


@pytest.mark.parametrize("method", METHODS)
def test_images_of_four_pixels_a_side(method):
    result = run(method=method, image_size=4, batch_size=2)
    assert result.images.shape == (64, 3, 4, 4)
    assert all(math.isfinite(v) for row in result.history[1:] for v in row.values())


class Grey(nn.Module):
    """Takes grey images and repeats them to three channels."""

    def __init__(self):
        super().__init__()
        self.net = Tiny()

    def forward(self, x):
        return self.net(x.repeat(1, 3, 1, 1))


def test_grey_images_that_are_repeated_to_three_channels():
    result = run(Grey(), in_channels=1)
    assert result.images.shape == (64, 1, 8, 8)
    assert result.model(torch.zeros(2, 1, 8, 8)).shape == (2, 4)
    with pytest.raises(ConfigError, match=r"does not take 3x8x8 images.*in_channels"):
        run(Grey())


def test_a_checkpoint_in_no_folder_is_refused_before_the_first_step(tmp_path):
    path = tmp_path / "nowhere" / "run.pt"
    with pytest.raises(CheckpointError, match=r"nowhere.*folder"):
        run(checkpoint_path=path, stop=lambda: pytest.fail("a step was taken"))


# Bad settings

EIGHT_PIXELS = nn.Sequential(
    nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)
)


@pytest.mark.parametrize(
    ("settings", "received"),
    [
        ({"method": "zeroq"}, "method 'zeroq'.*adadfq, gdfq, qimera"),
        ({"method": None}, "method None"),
        ({"recipe": "slow"}, "recipe 'slow'.*quick, paper"),
        ({"weight_bits": 1}, "weight_bits.*got 1"),
        ({"act_bits": 9}, "act_bits.*got 9"),
        ({"edge_bits": 3.5}, "edge_bits.*got 3.5"),
        ({"scheme": "affine"}, "scheme 'affine'"),
        ({"steps": 0}, "steps.*got 0"),
        ({"batch_size": 0}, "batch_size.*got 0"),
        ({"image_size": 10}, "image_size.*got 10"),
        ({"image_size": 4, "batch_size": 1}, "one image of 4 pixels.*batch_size to 2"),
        ({"image_size": (8, 8)}, r"image_size.*got \(8, 8\)"),
        ({"seed": None}, "seed.*got None"),
        ({"seed": 2**65}, "seed.*whole number"),
        ({"input_mean": "imagenet", "input_std": 1.0}, "input_mean.*got 'imagenet'"),
        ({"resume": True}, "resume needs checkpoint_path"),
        ({"in_channels": 0}, "in_channels.*got 0"),
        ({"in_channels": 1.5}, "in_channels.*got 1.5"),
        ({"hooks": AGM()}, r"hooks must be a list, got AGM; write hooks=\[...\]"),
        ({"hooks": None}, "hooks must be a list, got NoneType"),
        ({"hooks": [AGM]}, r"the class AGM.*hooks=\[AGM\(\)\]"),
        ({"hooks": [LinearInterpolation()]}, "student_batch.*got LinearInterpolation"),
        ({"precision": "int8"}, "precision 'int8'"),
        ({"device": "toaster"}, "device 'toaster'"),
        ({"device": 1.5}, "device '1.5'"),
        ({"device": "cuda:99"}, "device 'cuda:99'"),
        ({"checkpoint_every": 0}, "checkpoint_every.*got 0"),
        ({"teacher": EIGHT_PIXELS, "image_size": 16}, "3x16x16 images.*set image_size"),
    ],
)
def test_bad_settings(settings, received):
    steps = []
    with pytest.raises(ConfigError, match=received) as caught:
        run(**settings, on_step=lambda step, _: steps.append(step))
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, AgmError)
    assert steps == []


def test_an_evaluation_in_train_mode_changes_nothing():
    """Also where a BatchNorm stands by itself, whose statistics move."""

    class Twice(Tiny):
        def forward(self, x):
            return super().forward(x) + self.fc(
                F.relu(self.bn1(F.relu(self.conv0(x)))).mean((2, 3))
            )

    def evaluate(model):
        model.train()(5 * images())
        return 1.0

    got = run(Twice(), evaluate=evaluate)
    assert state_of(got.model) == state_of(run(Twice(), evaluate=lambda _: 1.0).model)
    assert any(isinstance(m, nn.BatchNorm2d) for m in got.model.modules())


@pytest.mark.parametrize("figures", [None, {"top5": 1.0}])
def test_an_evaluation_without_an_accuracy(figures):
    with pytest.raises(ConfigError, match=r"evaluate must return an accuracy.*'accuracy' one of"):
        run(evaluate=lambda _: figures)


def test_a_folder_in_the_place_of_a_file_is_left_alone(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    result = run()
    for write in (
        lambda: run(checkpoint_path=folder, checkpoint_every=1),
        lambda: result.save(folder),
        lambda: result.export_onnx(folder),
        lambda: checkpoint.save(folder, {}, keep_previous=True),
    ):
        with pytest.raises(CheckpointError, match="is a folder; give the name of a file in it"):
            write()
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "mine.txt"]


@pytest.mark.parametrize("path", [None, 1, io.BytesIO()])
def test_what_is_no_path_is_told(path):
    result = run()
    for use in (
        lambda: run(checkpoint_path=path or 0),
        lambda: result.save(path),
        lambda: result.export_onnx(path),
        lambda: load_quantized(path, Tiny()),
    ):
        with pytest.raises(CheckpointError, match="expected the path of a file, got"):
            use()


def test_a_name_that_is_too_long_is_told(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot be: File name too long"):
        run(checkpoint_path=tmp_path / ("a" * 300))


def test_a_loaded_network_can_be_trained(tmp_path):
    run(recipe="quick").save(tmp_path / "net.pt")
    for architecture in (Tiny(), Tiny().requires_grad_(False)):
        model = load_quantized(tmp_path / "net.pt", architecture)
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_arguments_in_another_order(tmp_path):
    result = run()
    result.save(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"load_quantized\(path, network\)"):
        load_quantized(TEACHER, tmp_path / "a.pt")
    for other in (result, TEACHER):
        with pytest.raises(CheckpointError, match=f"quantized network, got {type(other).__name__}"):
            save_quantized(other, tmp_path / "b.pt")
    assert not (tmp_path / "b.pt").exists()
    with pytest.raises(ExportError, match="quantized network, got Result"):
        export_onnx(result, tmp_path / "b.onnx")


def test_bad_teachers():
    plain = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4))
    foreign = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.GroupNorm(1, 2))
    for teacher, word in (
        (plain, "BatchNorm"),
        (foreign + nn.Sequential(nn.Flatten(), nn.Linear(72, 4)), "GroupNorm"),
    ):
        with pytest.raises(UnsupportedLayerError, match=word):
            run(teacher)
    for teacher in (TEACHER.state_dict(), Tiny):
        with pytest.raises(UnsupportedLayerError, match=r"expected a network.*got (Ordered|type)"):
            run(teacher)
    with pytest.raises(UnsupportedLayerError, match=r"one logit.*two outputs"):
        run(Tiny(classes=1))


@pytest.mark.parametrize("last", [nn.Softmax(1), nn.Sigmoid(), nn.Hardsigmoid()])
def test_probabilities_are_refused_and_their_logarithm_is_not(last):
    with pytest.raises(UnsupportedLayerError, match=r"probabilities.*without its last softmax"):
        run(nn.Sequential(Tiny(), last))
    assert run(nn.Sequential(Tiny(), nn.LogSoftmax(1))).history


def test_small_logits_are_no_probabilities():
    net = Tiny(classes=5)
    with torch.no_grad():
        net.fc.weight.mul_(0.01)
        net.fc.bias.fill_(0.5)
        assert ((net(images()) > 0) & (net(images()) < 1)).all()
    assert run(net).history


@pytest.mark.parametrize(
    "network",
    [
        lambda: nn.Sequential(Tiny(), Then(lambda y: y.detach())),
        lambda: nn.Sequential(Tiny(), Then(lambda y: (10 * y).long())),
        lambda: nn.Sequential(Then(lambda x: (x > 0).float()), Tiny()),
        lambda: nn.Sequential(Then(lambda x: x.data), Tiny()),
        lambda: nn.Sequential(Then(lambda x: (8 * x) // 1), Tiny()),
    ],
    ids=["detached", "integers", "compared", "data", "rounded"],
)
def test_logits_without_a_gradient_at_the_images_are_refused(network):
    with pytest.raises(UnsupportedLayerError, match="no gradient at the images"):
        run(network())


class Then(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_a_hook_of_the_state_is_not_carried_over(tmp_path):
    net = Tiny()
    net.fc.register_state_dict_post_hook(
        lambda _m, state, prefix, _: state.__delitem__(f"{prefix}bias")
    )
    result = run(net)
    result.save(tmp_path / "net.pt")
    again = load_quantized(tmp_path / "net.pt", net)
    assert torch.equal(again(images()), result.model(images()))
    assert "fc.bias" not in net.state_dict()


def test_a_network_that_does_not_run_in_bf16():
    class Mixed(Tiny):
        def __init__(self):
            super().__init__()
            self.register_buffer("offset", torch.zeros(1, 4, 1, 1))

        def forward(self, x):
            x = self.conv(x)
            return super().forward(x[:, :3] + torch.lerp(x, self.offset.expand_as(x), 0.5)[:, :3])

    network = Mixed()
    network.conv = nn.Conv2d(3, 4, 3, padding=1)
    with pytest.raises(ConfigError, match=r"does not run in bf16.*set precision to fp32"):
        run(network, precision="bf16")
    if resolve_precision("auto", torch.device("cpu")) == "bf16":
        with pytest.warns(UserWarning, match=r"does not run in bf16.*trains in fp32"):
            assert run(network, precision="auto").precision == "fp32"
    assert run(network, precision="fp32").precision == "fp32"


def test_numpys_integers_are_integers(tmp_path):
    lengths = {"steps": 6, "batch_size": 4, "image_size": 8, "seed": 3, "in_channels": 3}
    lengths |= {"weight_bits": 3, "act_bits": 4, "edge_bits": 8}
    counts = {"records": 2, "eval_every": 2, "checkpoint_every": 2}
    asked = {"evaluate": lambda model: 0.5}
    plain = run(**lengths, **counts, **asked)
    given = {name: np.int64(value) for name, value in (lengths | counts).items()}
    result = run(**given, **asked, checkpoint_path=tmp_path / "run.pt")
    assert same_result(result, plain)
    result.save(tmp_path / "net.pt")
    load_quantized(tmp_path / "net.pt", Tiny())


def test_a_student_in_inference_mode(tmp_path):
    result = run()
    result.save(tmp_path / "net.pt")
    x = images()
    want = result.model(x)
    with torch.inference_mode():
        moved = load_quantized(tmp_path / "net.pt", Tiny()).double().float()
        assert torch.equal(moved(x), want)
        assert torch.equal(copy.deepcopy(result.model)(x), want)


def test_an_evaluation_that_changes_the_students_dtype():
    with pytest.raises(ConfigError, match=r"evaluate left the student in another dtype.*deepcopy"):
        run(evaluate=lambda model: (model.double(), 0.5)[1])
