"""controls.py: its arms are as strong as what they control, and what it records."""

import json

import pytest
import torch
from torch import nn

from agm import AGM
from benchmarks import report
from benchmarks.evidence import controls, paired
from benchmarks.task import teachers

SHORT = ("--bits", "2", "--steps", "8", "--batch-size", "16", "--seeds", "2")


def turn(hook, images):
    """One call of each hook point; the gradient at the images, and the student's batch."""
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(nn.Flatten(), nn.Linear(48, 5)) for _ in range(2))
    images = images.clone().requires_grad_()
    logits = teacher(images)
    term = hook.generator_loss(
        images=images, teacher_logits=logits, student=student, other_terms=logits.square().sum()
    )
    gradient = torch.autograd.grad(term, images)[0] if term.requires_grad else None
    labels = torch.arange(len(images)) % 5
    return gradient, hook.student_batch(images=images.detach(), labels=labels)


def both(arm, turns):
    """The same turns of a part and of its control, and what each of them was given."""
    (part,), (control,) = controls.hooks(arm, 3), controls.hooks(f"{arm}, control", 3)
    for seed in range(turns):
        images = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        yield images, turn(part, images), turn(control, images)


def test_noise_is_as_long_as_the_loss_gradient_and_nowhere_near_it():
    taken = 0
    for _, (ours, batch), (noise, same) in both("loss", 6):
        assert (ours is None) == (noise is None)
        assert torch.equal(batch[0], same[0])
        if ours is not None:
            taken += 1
            assert noise.norm() == pytest.approx(ours.norm().item(), rel=1e-4)
            assert ours.norm() > 0
            assert abs(nn.functional.cosine_similarity(ours.flatten(), noise.flatten(), 0)) < 0.5
    assert taken == 3


def test_noise_moves_images_as_far_as_interpolation_and_keeps_the_labels():
    taken = 0
    for images, (_, (mixed, soft)), (_, (noisy, kept)) in both("interpolation", 6):
        far, as_far = ((x - images).flatten(1).norm(dim=1) for x in (mixed, noisy))
        torch.testing.assert_close(as_far, far)
        if not torch.equal(mixed, images):
            taken += 1
            assert not torch.allclose(mixed, noisy, atol=0.1)
            assert soft.shape == kept.shape
            assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert taken == 3


def test_the_control_of_the_whole_is_that_of_its_parts_in_turns():
    turns = zip(both("both", 6), both("loss", 6), both("interpolation", 6), strict=True)
    for (_, _, (noise, noisy)), (_, _, (of_loss, _)), (_, _, (_, of_mixing)) in turns:
        assert (noise is None) == (of_loss is None)
        if noise is not None:
            torch.testing.assert_close(noise, of_loss)
        for got, expected in zip(noisy, of_mixing, strict=True):
            torch.testing.assert_close(got, expected)


def test_records_and_going_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(teachers.DIGITS_RECIPE, "epochs", 1)
    monkeypatch.chdir(tmp_path)
    assert controls.main([*SHORT, "--records", "new/c.jsonl"]) == 0
    first = (tmp_path / "new" / "c.jsonl").read_text()
    rows = [json.loads(line) for line in first.splitlines()]
    assert [(row["seed"], row["arm"]) for row in rows] == [
        (seed, arm) for seed in (0, 1) for arm in controls.ARMS
    ]
    assert len({row["accuracy_proof"] for row in rows}) > 2
    assert {row["precision"] for row in rows} <= {"fp32", "bf16"}  # "auto" tells nothing elsewhere
    printed = capsys.readouterr().out
    lost = first.splitlines(keepends=True)[:-2]
    (tmp_path / "new" / "c.jsonl").write_text("".join(lost))
    assert controls.main([*SHORT, "--records", "new/c.jsonl"]) == 0
    assert (tmp_path / "new" / "c.jsonl").read_text() == first
    assert capsys.readouterr().out == printed
    assert printed.startswith(
        "|  | loss | loss, control | interpolation | interpolation, control |"
    )
    assert printed.count("n=2") == len(controls.ARMS) - 1
    assert controls.main([*SHORT, "--batch-size", "8", "--records", "new/c.jsonl"]) == 0
    rows = (tmp_path / "new" / "c.jsonl").read_text()
    assert rows.startswith(first)  # of other settings: neither taken nor touched
    assert len(rows.splitlines()) == 4 * len(controls.ARMS)
    assert capsys.readouterr().out != printed
    (tmp_path / "new" / "c.jsonl").write_text(first.replace('classes": null', 'classes": 100'))
    assert controls.main([*SHORT, "--records", "new/c.jsonl"]) == 0
    assert len((tmp_path / "new" / "c.jsonl").read_text().splitlines()) == 4 * len(controls.ARMS)


@pytest.mark.parametrize("argv", [["--bits", "1"], [], ["--bits", "2", "--with-agm"]])
def test_a_mistake(capsys, argv):
    assert controls.main(argv) == 2
    assert "controls.py: error: " in capsys.readouterr().err


def test_the_methods_of_a_seed_count_once():
    accuracies = {"none": {"gdfq": [80, 82], "qimera": [70, 71]}}
    accuracies["both"] = {"gdfq": [81, 84], "qimera": [70.5, 70]}
    rows = [
        {"arm": arm, "method": method, "seed": seed, "accuracy_proof": value}
        for arm, methods in accuracies.items()
        for method, values in methods.items()
        for seed, value in enumerate(values)
    ]
    line = paired.table({"both methods": rows}, controls.ARMS, "proof").splitlines()[-1]
    want = report.paired_difference({0: 0.0, 1: 0.0}, {0: 0.75, 1: 0.5})
    assert line == f"| both methods | {report.difference_text(want)} |"


def test_the_arms_are_the_add_ons_parts():
    (loss,), (mix,) = controls.hooks("loss", 0), controls.hooks("interpolation", 0)
    assert (type(loss), loss.loss, loss.interpolation) == (AGM, True, False)
    assert (type(mix), mix.loss, mix.interpolation) == (AGM, False, True)
    assert controls.hooks("none", 0) == []
