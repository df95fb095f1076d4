"""On a GPU: the same results as on the CPU, to rounding, and the same promises."""

import collections
from dataclasses import replace

import pytest
import torch

from agm import AGM, GaussianMarginLoss, LinearInterpolation, functional
from baselines import METHODS, Interrupted, load_quantized, quantize, save_quantized
from baselines.errors import NonFiniteLossError
from baselines.training.trainer import Trainer
from tests.baselines import Tiny, images

DEVICE = "cuda"
TEACHER = Tiny()
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def run(**settings):
    defaults = {
        "image_size": 8, "steps": 12, "batch_size": 6, "precision": "fp32", "device": DEVICE,
    }  # fmt: skip
    return quantize(TEACHER, **defaults | settings)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_and_its_gradient_are_those_of_the_cpu(dtype):
    rng = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 16, 10, generator=rng, dtype=torch.float64).to(dtype)
    found = []
    for device in ("cpu", DEVICE):
        p, q = (t.detach().to(device).requires_grad_() for t in (teacher, student))
        loss = GaussianMarginLoss(mean=0.5, std=0.2, discrepancy="total_variation")
        value = loss(teacher_logits=p, student_logits=q)
        value.backward()
        assert value.dtype == torch.promote_types(dtype, torch.float32)
        found.append([x.cpu().double() for x in (value.detach(), p.grad, q.grad)])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for on_cpu, on_gpu in zip(*found, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("regions", [False, True])
def test_interpolation_mixes_as_on_the_cpu(regions):
    x, labels = images(6, channels=3, size=8), torch.arange(6)
    on_cpu, on_gpu = (
        LinearInterpolation(seed=3, regions=regions)(x.to(d), labels.to(d), num_classes=7)
        for d in ("cpu", DEVICE)
    )
    for a, b in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(b.cpu(), a)


def test_the_closed_form_holds_in_the_far_tails():
    d = torch.linspace(-1e4, 1e4, 2001, dtype=torch.float64)
    expected = functional.expected_margin(d, 0.0, 1.0)
    given = functional.expected_margin(d.to(DEVICE, torch.float32), 0.0, 1.0)
    torch.testing.assert_close(given.cpu().double(), expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("recipe", ["quick", "paper"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_with_the_add_on(method, recipe):
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    result = run(method=method, recipe=recipe, hooks=[AGM()], precision="auto")
    assert torch.equal(torch.cuda.get_rng_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert all(torch.isfinite(p).all() for p in result.model.parameters())


def test_the_student_computes_on_the_cpu_what_it_does_on_the_gpu(tmp_path):
    result = run(hooks=[AGM()])
    x = images(32, channels=3, size=8)
    device = next(result.model.parameters()).device
    with torch.no_grad():
        there = result.model(x.to(device)).cpu()
        here = result.model.cpu()(x)
    # A value on the border between two steps may fall to either side.
    assert ((there - here).abs() < 1e-3).double().mean() > 0.9
    save_quantized(result.model, tmp_path / "model.pt")
    loaded = load_quantized(tmp_path / "model.pt", TEACHER)
    with torch.no_grad():
        assert torch.equal(loaded(x), here)


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        whole = run(hooks=[AGM()])
        kept = {"hooks": [AGM()], "checkpoint_path": tmp_path / "run.pt"}
        asked = iter(range(100))
        with pytest.raises(Interrupted):
            run(**kept, stop=lambda: next(asked) == 6)
        resumed = run(**kept | {"hooks": [AGM()]}, resume=True)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(b, a)


def test_a_loss_that_is_not_finite_is_told_of_with_its_step():
    class Breaks(AGM):
        def generator_loss(self, **given):
            value = super().generator_loss(**given)
            return value + float("nan") if self.turn == 2 else value

    method, recipe = METHODS["gdfq"].quick(8)
    trainer = Trainer(
        TEACHER, method=method, recipe=recipe, config=recipe.config(3, 3), image_shape=(3, 8, 8),
        hooks=[Breaks()], device=DEVICE, precision="fp32",
    )  # fmt: skip
    trainer.step_count = recipe.warmup_steps - recipe.observe_steps
    for _ in range(recipe.observe_steps + 1):
        trainer.step()
    kept = [p.detach().clone() for p in trainer.student.parameters()]
    with pytest.raises(NonFiniteLossError, match=f"step {recipe.warmup_steps + 1}, "):
        collections.deque((trainer.step() for _ in range(100)), maxlen=0)
    assert all(map(torch.equal, kept, trainer.student.parameters()))


@pytest.mark.parametrize("hooks", [(), (AGM,)])
@pytest.mark.parametrize(
    ("method", "recipe"), [("gdfq", "quick"), ("qimera", "quick"), ("adadfq", "paper")]
)
def test_a_step_replayed_as_a_graph_is_that_step(method, recipe, hooks):
    from benchmarks.evidence.graphed import GraphedTrainer
    from benchmarks.evidence.kernels import fused

    losses, runs = [], []
    for capturing in (False, True):
        trainer = GraphedTrainer(
            TEACHER, method=(made := getattr(METHODS[method], recipe)(8))[0],
            recipe=replace(made[1], steps=120, batch_size=6), config=made[1].config(3, 3),
            image_shape=(3, 8, 8), hooks=[hook() for hook in hooks], device=DEVICE,
            precision="fp32",
        )  # fmt: skip
        trainer.capturing = capturing
        with fused():
            losses.append([{k: v.item() for k, v in trainer.step().items()} for _ in range(120)])
        runs.append(trainer)
    as_they_are, replayed = runs
    assert not as_they_are.graphs
    assert replayed.graphs
    for a, b in zip(*losses, strict=True):
        assert b == pytest.approx(a, rel=1e-2, abs=1e-3)
    for a, b in zip(as_they_are.hooks, replayed.hooks, strict=True):
        assert (b.turn, b.evaluations) == (a.turn, a.evaluations)
        of_a, of_b = ({k: v.item() for k, v in hook.running.items()} for hook in (a, b))
        assert of_b == pytest.approx(of_a, rel=1e-2, abs=1e-3)
