"""forms.py: what its forms ask of the generator, and which images they give the student."""

import json

import pytest
import torch

from agm import AGM
from agm.functional import total_variation
from benchmarks.evidence import forms
from benchmarks.task import teachers


def towards_one_class(confidence):
    """Logits of two classes whose total variation from (0.5, 0.5) is confidence / 2."""
    share = (1 + torch.as_tensor(confidence)) / 2
    return torch.stack([share.log(), (1 - share).log()], dim=-1)


def test_two_sided_raises_small_discrepancies_and_lowers_large_ones():
    apart = torch.tensor([0.05, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.95])
    images = towards_one_class(apart).requires_grad_()
    teacher_logits = images * 1.0
    given = {"images": images, "teacher_logits": teacher_logits, "student": lambda x: 0 * x}
    gradients = {}
    for hook in (AGM(), forms.TwoSided()):
        (gradient,) = torch.autograd.grad(hook.generator_loss(**given), images, retain_graph=True)
        step = images.detach() - 0.01 * gradient / gradient.abs().max()
        gradients[type(hook)] = total_variation(step, 0 * step) - apart / 2
    small, *_, large = gradients[forms.TwoSided]
    assert small > 0 > large
    assert gradients[AGM][0] > 0
    assert gradients[AGM].min() > -1e-6


def test_two_sided_keeps_to_its_turns():
    hook, images = forms.TwoSided(), torch.randn(4, 5, requires_grad=True)
    given = {"images": images, "teacher_logits": images * 2, "student": lambda x: x}
    assert hook.generator_loss(**given).requires_grad
    hook.student_batch(images=images.detach(), labels=torch.arange(4))
    assert hook.generator_loss(**given).item() == 0


def test_no_place_of_the_pool_stays_empty(monkeypatch):
    monkeypatch.setattr(forms, "KEPT", 20)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *shape: x.new_full(shape, -1))
    hook = forms.Pool(plain_steps=3, adversary=None, seed=0)
    for step in range(3):
        hook.student_batch(images=torch.full((8, 3), float(step)), labels=torch.full((8,), step))
        assert [int((kept < 0).any()) for kept in hook.kept] == [step < 2] * 2
    assert (hook.kept[0][:, 0] == hook.kept[1]).all()
    assert (hook.kept[1] == 2).sum() == 8


@pytest.mark.parametrize("kept", [16, 64])
def test_pool_is_plain_first_and_then_half_of_what_was_made_before(kept, monkeypatch):
    monkeypatch.setattr(forms, "KEPT", kept)
    hook = forms.Pool(plain_steps=4, adversary=1.0, seed=0)
    teacher = torch.nn.Linear(3, 5)

    def asked(images):
        images = images.clone().requires_grad_()
        loss = hook.generator_loss(
            images=images, teacher_logits=teacher(images), student=lambda x: 2 * teacher(x)
        )
        return loss.requires_grad

    for step in range(4):
        now = torch.full((8, 3), float(step))
        assert not asked(now)
        images, labels = hook.student_batch(images=now, labels=torch.full((8,), step))
        assert torch.equal(images, now)
    seen = set()
    for _ in range(20):
        now = torch.full((8, 3), 4.0)
        assert asked(now + torch.randn(8, 3))
        images, labels = hook.student_batch(images=now, labels=torch.full((8,), 4))
        assert torch.equal(images[:, 0].long(), labels)
        assert labels[4:].tolist() == [4] * 4
        seen |= set(labels[:4].tolist())
    assert seen == {0, 1, 2, 3} if kept == 64 else 3 in seen <= {0, 1, 2, 3}


def test_a_pool_without_an_adversary_leaves_the_generator_alone():
    hook = forms.Pool(plain_steps=1, adversary=None, seed=0)
    for _ in range(3):
        images = torch.randn(4, 5, requires_grad=True)
        loss = hook.generator_loss(images=images, teacher_logits=images * 2, student=lambda x: x)
        assert loss.item() == 0
        hook.student_batch(images=images.detach(), labels=torch.arange(4))


def test_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(teachers.DIGITS_RECIPE, "epochs", 1)
    records = tmp_path / "f.jsonl"
    short = ["--bits", "2", "--steps", "10", "--batch-size", "8", "--seeds", "1"]
    assert forms.main([*short, "--records", str(records)]) == 0
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    assert [row["arm"] for row in rows] == list(forms.ARMS)
    assert all(row["kl_tuning"] > 0 and "accuracy_proof" not in row for row in rows)
    assert capsys.readouterr().out.count("n=1") == len(forms.ARMS) - 1
