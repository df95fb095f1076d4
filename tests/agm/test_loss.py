"""GaussianMarginLoss against sample-by-sample oracles."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agm import AgmError, GaussianMarginLoss
from tests.agm import (
    LOOPS,
    discrepancy_loop,
    elsewhere,
    eps,
    logit_error,
    margin,
    same_bits,
    values,
)
from tests.strategies import dtypes, half_dtypes, logit_pairs, rng, seeds

REDUCE = {"mean": torch.mean, "sum": torch.sum, "none": lambda x: x}

names = st.sampled_from(sorted(LOOPS))
modes = st.sampled_from(["expected", "sampled"])
numbers = st.tuples(st.floats(-1, 3), st.just(0.0) | st.floats(1e-3, 2))  # mean, std


def logits(n=4, c=3, seed=0, dtype=torch.float32):
    t, s = torch.randn(2, n, c, generator=rng(seed), dtype=torch.float64).to(dtype)
    return {"teacher_logits": t, "student_logits": s}


def randomness(mode, seed=0):
    return {"generator": rng(seed)} if mode == "sampled" else {}


@given(logit_pairs(), names, numbers)
def test_expected_loss_is_the_margin_of_each_sample(pair, name, margins):
    t, s = pair
    loss = GaussianMarginLoss(*margins, discrepancy=name, reduction="none")
    want = values(margin, discrepancy_loop(name, t, s), *margins)
    got = loss(teacher_logits=t, student_logits=s)
    assert got.shape == t.shape[:1]
    # The slope is at most 1: an error of d, and as much again for mean and std, at most 3.
    assert torch.allclose(got, want, rtol=0, atol=2 * logit_error(t, s))


@given(logit_pairs(), names, numbers, seeds)
def test_sampled_loss_is_the_hinge_of_each_draw(pair, name, margins, seed):
    t, s = pair
    noise = torch.randn(len(t), generator=rng(seed), dtype=t.dtype)
    loss = GaussianMarginLoss(*margins, discrepancy=name, mode="sampled", reduction="none")
    got = loss(teacher_logits=t, student_logits=s, noise=noise)
    for x, d, e in zip(got, discrepancy_loop(name, t, s), noise, strict=True):
        want = max(0.0, margins[0] + margins[1] * float(e) - float(d))
        assert float(x) == pytest.approx(want, rel=0, abs=2 * logit_error(t, s))


@given(logit_pairs(), names, modes, seeds)
def test_reductions_agree(pair, name, mode, seed):
    t, s = pair
    each, total, mean = (
        GaussianMarginLoss(discrepancy=name, mode=mode, reduction=reduction)(
            teacher_logits=t, student_logits=s, **randomness(mode, seed)
        )
        for reduction in ("none", "sum", "mean")
    )
    assert total.shape == mean.shape == ()
    # At most 6 non-negative terms.
    assert float(total) == pytest.approx(sum(each.tolist()), rel=8 * eps(t.dtype))
    assert float(mean) == pytest.approx(sum(each.tolist()) / len(t), rel=8 * eps(t.dtype))


@pytest.mark.parametrize("mode", ["expected", "sampled"])
@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize(("n", "c"), [(1, 5), (4, 1), (1, 1)])
def test_a_batch_of_one_and_a_single_class(mode, name, n, c):
    pair = logits(n, c)
    pair["student_logits"].requires_grad_()
    loss = GaussianMarginLoss(1.0, 0.5, discrepancy=name, mode=mode)
    value = loss(**pair, **randomness(mode))
    value.backward()
    d = discrepancy_loop(name, *(x.detach() for x in pair.values()))
    if mode == "expected":
        assert value.item() == pytest.approx(float(values(margin, d, 1.0, 0.5).mean()), rel=1e-5)
    if c == 1 and not name.startswith("logit"):
        assert d.tolist() == [0.0] * n
    assert pair["student_logits"].grad.isfinite().all()


@given(logit_pairs(dtype=torch.float32), names, st.floats(-1, 3))
def test_zero_std_is_the_hinge_in_both_modes(pair, name, mean):
    t, s = pair
    want = [max(0.0, mean - d) for d in discrepancy_loop(name, t, s).tolist()]
    for mode in ("expected", "sampled"):
        loss = GaussianMarginLoss(mean, 0, discrepancy=name, mode=mode, reduction="none")
        got = loss(teacher_logits=t, student_logits=s, **randomness(mode))
        assert got.tolist() == pytest.approx(want, rel=0, abs=2 * logit_error(t, s))


@given(logit_pairs(), names, modes)
def test_nan_logits_give_a_nan_loss(pair, name, mode):
    t, s = (x.clone() for x in pair)
    s[0, 0] = torch.nan
    loss = GaussianMarginLoss(discrepancy=name, mode=mode)
    assert loss(teacher_logits=t, student_logits=s, **randomness(mode)).isnan()


@given(st.data(), names, half_dtypes, modes, st.sampled_from(sorted(REDUCE)))
def test_half_precision_is_computed_and_returned_in_float32(data, name, dtype, mode, reduction):
    t, s = data.draw(logit_pairs(dtype))
    loss = GaussianMarginLoss(discrepancy=name, mode=mode, reduction=reduction)
    got = loss(teacher_logits=t, student_logits=s, **randomness(mode))
    wide = loss(teacher_logits=t.float(), student_logits=s.float(), **randomness(mode))
    assert same_bits(got, wide)


@given(logit_pairs(dtype=torch.float32), names, modes)
def test_autocast_changes_nothing(pair, name, mode):
    t, s = pair
    loss = GaussianMarginLoss(discrepancy=name, mode=mode)
    want = loss(teacher_logits=t, student_logits=s, **randomness(mode))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(loss(teacher_logits=t, student_logits=s, **randomness(mode)), want)
        half = t @ torch.eye(t.shape[1])
        assert half.dtype == torch.bfloat16
        assert loss(teacher_logits=half, student_logits=s, **randomness(mode)).isfinite()


@given(seeds, names, modes)
def test_a_default_dtype_or_device_changes_nothing(seed, name, mode):
    pair, loss = logits(seed=seed), GaussianMarginLoss(discrepancy=name, mode=mode)
    want, again = loss(**pair, **randomness(mode)), randomness(mode)
    with elsewhere():
        assert same_bits(loss(**pair, **again), want)


@pytest.mark.parametrize("given", ["teacher_logits", "student_logits"])
def test_the_gradient_flows_to_whichever_logits_have_a_graph(given):
    both = {k: v.requires_grad_() for k, v in logits().items()}
    (want,) = torch.autograd.grad(GaussianMarginLoss()(**both), both[given])
    alone = {k: v if k == given else v.detach() for k, v in both.items()}
    (got,) = torch.autograd.grad(GaussianMarginLoss()(**alone), both[given])
    assert same_bits(got, want)


@given(seeds, dtypes, names)
def test_same_seed_same_loss_and_another_seed_another(seed, dtype, name):
    loss = GaussianMarginLoss(5.0, 1.0, discrepancy=name, mode="sampled", reduction="none")
    pair = logits(seed=seed, dtype=dtype)
    first, again, other = (loss(**pair, generator=rng(k)) for k in (seed, seed, seed + 1))
    assert same_bits(first, again)
    assert not torch.equal(first, other)
    used = rng(seed)
    assert same_bits(loss(**pair, generator=used), first)
    assert not torch.equal(loss(**pair, generator=used), first)  # the generator has moved on


@given(seeds)
def test_generator_draws_standard_normals(seed):
    n = 4000
    same = torch.zeros(n, 2)
    loss = GaussianMarginLoss(100.0, 2.0, mode="sampled", reduction="none")  # never clipped
    z = (loss(teacher_logits=same, student_logits=same, generator=rng(seed)) - 100) / 2
    # Standard errors of mean and variance: 1 / sqrt(n), sqrt(2 / n).
    assert abs(z.mean()) <= 5 / n**0.5
    assert abs(z.var() - 1) <= 5 * (2 / n) ** 0.5


@given(logit_pairs(), names, modes, numbers)
def test_global_rng_is_untouched(pair, name, mode, margins):
    before = torch.get_rng_state()
    t, s = (x.clone().requires_grad_() for x in pair)
    loss = GaussianMarginLoss(*margins, discrepancy=name, mode=mode)
    loss(teacher_logits=t, student_logits=s, **randomness(mode)).backward()
    assert torch.equal(torch.get_rng_state(), before)


@given(seeds, names, modes)
def test_descent_drives_the_networks_apart(seed, name, mode):
    pair = logits(1, 4, seed=seed, dtype=torch.float64)
    s = pair["student_logits"].requires_grad_()
    d = discrepancy_loop(name, pair["teacher_logits"], s.detach())
    loss = GaussianMarginLoss(10.0, 1.0, discrepancy=name, mode=mode)  # far above d: gate 1
    (slope,) = torch.autograd.grad(loss(**pair, **randomness(mode)), s)
    moved = discrepancy_loop(name, pair["teacher_logits"], s.detach() - 1e-6 * slope)
    assert moved > d


def test_logit_gradcheck():
    pair = logits(dtype=torch.float64).values()
    t, s = (x.requires_grad_() for x in pair)
    for name in LOOPS:
        loss = GaussianMarginLoss(discrepancy=name)
        assert torch.autograd.gradcheck(
            lambda t, s, f=loss: f(teacher_logits=t, student_logits=s), (t, s)
        )


def test_vmap_over_batches():
    t, s = torch.randn(2, 3, 4, 5, generator=rng(0), dtype=torch.float64)
    loss = GaussianMarginLoss()
    got = torch.func.vmap(lambda t, s: loss(teacher_logits=t, student_logits=s))(t, s)
    want = [loss(teacher_logits=t[i], student_logits=s[i]) for i in range(3)]
    assert torch.allclose(got, torch.stack(want), rtol=4 * eps(t.dtype))


@pytest.mark.parametrize("mode", ["expected", "sampled"])
def test_compiled_in_one_graph(mode):
    pair = logits(5, 7)
    t = pair["teacher_logits"].requires_grad_()
    loss = GaussianMarginLoss(mode=mode)
    noise = {"noise": torch.linspace(-2, 2, 5)} if mode == "sampled" else {}
    want, got = loss(**pair, **noise), torch.compile(loss, fullgraph=True)(**pair, **noise)
    # Fused differently: a few roundings of numbers below 1.
    assert torch.allclose(got, want, rtol=0, atol=8 * eps(t.dtype))
    (a,), (b,) = (torch.autograd.grad(x, t) for x in (got, want))
    assert torch.allclose(a, b, rtol=0, atol=8 * eps(t.dtype))


def test_repr_shows_the_settings():
    text = repr(
        GaussianMarginLoss(1.5, 0.75, discrepancy="logit_l1", mode="sampled", reduction="sum")
    )
    for part in ("mean=1.5", "std=0.75", "discrepancy=logit_l1", "mode=sampled", "reduction=sum"):
        assert part in text


def test_any_callable_is_a_discrepancy():
    loss = GaussianMarginLoss(4.0, 0, discrepancy=lambda t, s: (t - s)[:, 0] ** 2, reduction="none")
    t = torch.tensor([[1.0, 9.0], [3.0, 9.0]])
    assert loss(teacher_logits=t, student_logits=torch.zeros(2, 2)).tolist() == [3.0, 0.0]


def test_logits_are_keyword_only():
    with pytest.raises(TypeError):
        GaussianMarginLoss()(torch.zeros(2, 3), torch.zeros(2, 3))


def call(
    mode="expected", discrepancy="total_variation", shapes=((4, 3), (4, 3)), dtype=None, **more
):
    t, s = (torch.zeros(shape, dtype=dtype) for shape in shapes)
    loss = GaussianMarginLoss(mode=mode, discrepancy=discrepancy)
    return loss(teacher_logits=t, student_logits=s, **more)


@pytest.mark.parametrize(
    ("arguments", "received"),
    [
        ({"shapes": ((4, 3), (4, 2))}, r"teacher \(4, 3\), student \(4, 2\)"),
        ({"shapes": ((4, 3), (1, 3))}, r"teacher \(4, 3\), student \(1, 3\)"),
        ({"shapes": ((0, 3), (0, 3))}, r"\(0, 3\)"),
        ({"shapes": ((4,), (4,))}, r"\(4,\)"),
        ({"shapes": ((4, 3, 1), (4, 3, 1))}, r"\(4, 3, 1\)"),
        ({"dtype": torch.int64}, "int64"),
        ({"discrepancy": lambda t, s: (t - s).abs()}, r"\(4,\).*\(4, 3\)"),
        ({"discrepancy": lambda t, s: (t - s).abs().mean()}, r"\(4,\).*\(\)"),
        ({"discrepancy": lambda t, s: float((t - s).mean())}, r"\(4,\).* 0\.\d"),
        ({"noise": torch.zeros(4)}, "expected.*neither"),
        ({"generator": rng(0)}, "expected.*neither"),
        ({"mode": "sampled"}, "sampled.*exactly one"),
        ({"mode": "sampled", "noise": torch.zeros(4), "generator": rng(0)}, "exactly one"),
        ({"mode": "sampled", "noise": torch.zeros(5)}, r"\(4,\).*\(5,\)"),
        ({"mode": "sampled", "noise": torch.zeros(4, 3)}, r"\(4,\).*\(4, 3\)"),
    ],
)
def test_bad_call_is_a_named_error(arguments, received):
    with pytest.raises(AgmError, match=received) as caught:
        call(**arguments)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("setting", "received"),
    [
        ({"mode": "mean"}, "mode.*'mean'"),
        ({"reduction": "max"}, "reduction.*'max'"),
        ({"std": -0.5}, "std.*-0.5"),
        ({"std": float("nan")}, "std.*nan"),
        ({"std": float("inf")}, "std.*inf"),
        ({"mean": float("nan")}, "mean.*nan"),
        ({"mean": "0.5"}, "mean.*'0.5'"),
        ({"std": None}, "std.*None"),
        ({"reduction": []}, r"reduction.*\[\]"),
        ({"mean": float("-inf")}, "mean.*-inf"),
        ({"mean": 10**400}, "mean.*1000"),
        ({"discrepancy": "l2"}, "'l2'.*total_variation"),
        ({"discrepancy": None}, "None"),
    ],
)
def test_bad_setting_is_a_named_error(setting, received):
    with pytest.raises(AgmError, match=received) as caught:
        GaussianMarginLoss(**setting)
    assert isinstance(caught.value, ValueError)


@given(logit_pairs())
def test_the_documented_defaults(logits):
    teacher, student = logits
    spelled_out = GaussianMarginLoss(
        0.5, 0.25, discrepancy="total_variation", mode="expected", reduction="mean"
    )
    got, want = (
        loss(teacher_logits=teacher, student_logits=student)
        for loss in (GaussianMarginLoss(), spelled_out)
    )
    assert same_bits(got, want)
