"""What a run leaves, of which grid, and on whose network and images."""

import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from baselines import METHODS, load_quantized
from baselines.errors import ExportError
from baselines.quantization import export
from baselines.quantization.checkpoint import fingerprint
from baselines.training.checks import resolve_precision
from benchmarks import command_line, progress
from benchmarks.task import datasets, teachers
from benchmarks.task import task as tasks
from benchmarks.task.folders import image_folder
from benchmarks.task.networks import resnet20
from tests.benchmarks.compare import (
    BRIEF,
    BRIEF3,
    REQUIRED,
    SHARED,
    accuracy,
    call,
    files,
    load,
    never,
    ok,
    same_networks,
    spy,
    untimed,
)

# What a run leaves


def test_report(finished):
    out, _, text = finished
    got = load(out)
    cells = got["cells"]
    assert [(c["hooks"], c["seed"]) for c in cells] == [
        ("none", 0), ("both", 0), ("none", 1), ("both", 1),
    ]  # fmt: skip
    for cell in cells:
        assert cell.keys() >= REQUIRED
        assert (cell["method"], cell["weight_bits"], cell["act_bits"]) == ("gdfq", 3, 3)
        assert cell["accuracy_fp"] > 90
        assert 0 <= cell["accuracy_ptq"] <= 100
        assert cell["accuracy_last"] == cell["history"][-1]["accuracy"]
        assert cell["history"][-1]["step"] == 8
        assert cell["seconds"] > 0
        assert cell["steps_per_s"] == pytest.approx(8 / cell["seconds"])
        assert "conv1.weight" in cell["policy"]
    assert got["versions"].keys() >= {"python", "torch", "torchvision", "numpy", "commit"}
    assert got["versions"]["torch"] == torch.__version__
    assert got["settings"]["teacher_hash"] == fingerprint(teachers.digits_teacher())
    assert got["evaluation_images"] == 899
    assert got["table"] in text


def test_there_is_a_picture(finished):
    with Image.open(finished[0] / "report.png") as image:
        assert image.format == "PNG"
        image.load()


def test_each_cell_leaves_a_network_that_is_as_good_as_reported(finished):
    out, *_ = finished
    cells = load(out)["cells"]
    assert len({c["checkpoint"] for c in cells}) == len(cells) == len(files(out, "*.ckpt"))
    for cell in cells:
        model = load_quantized(out / cell["checkpoint"], teachers.digits_cnn())
        got = accuracy(model, datasets.digits_images())
        assert got == pytest.approx(cell["accuracy_last"], abs=0.25)  # two images
    assert not [n for n in files(out) if n.endswith((".run", ".previous", ".tmp"))]


def test_what_is_printed(finished):
    _, argv, text = finished
    assert re.search(r"full precision 9\d\.\d\d %", text)
    how = (
        f"{resolve_precision('auto', torch.device('cpu'))} on cpu, 1 at a time on 1 CPU thread each"
    )
    assert text.splitlines()[1].endswith(f"; {how}")
    policy = text.index("Bit policy W3A3")
    assert text.count("Bit policy") == 1
    assert "layer3.0.conv2.weight" in text[policy : text.index("Wrote")]
    ended = re.findall(r"^\[(\d)/4\] gdfq-w3a3-\S+: \d+\.\d\d % after \d+ s$", text, re.M)
    assert ended == list("1234")  # where there is no terminal
    assert "\r" not in text
    assert policy < text.index("[1/4]")  # before the training
    assert text.index("[4/4]") < text.index("last step %")  # which the table follows
    assert "report.json" in text[text.index("last step %") :]
    assert argv[-2:] == ["--out", "run"]
    command = shlex.join(["python", "benchmarks/compare.py", *argv[:-2]])
    assert text.splitlines()[-1] == f"Reproduce: {command}"


def test_the_printed_command_takes_no_output_folder(home):
    text = ok(*BRIEF3, "--out", "a", "--out=b", "--out", "c")
    want = shlex.join(["python", "benchmarks/compare.py", *BRIEF3])
    assert text.splitlines()[-1] == f"Reproduce: {want}"


@pytest.mark.usefixtures("exports")
def test_the_printed_command_reproduces_the_run(finished, home):
    python, script, *argv = shlex.split(load(finished[0])["command"])
    assert (python, script) == ("python", "benchmarks/compare.py")
    ok(*argv)  # into a folder of its own
    (out,) = (home / "runs").iterdir()
    assert untimed(load(out)["cells"]) == untimed(load(finished[0])["cells"])
    assert same_networks(out, finished[0], files(finished[0], "*.ckpt"))


def test_the_default_folder_is_new(home):
    ok(*BRIEF)
    (out,) = (home / "runs").iterdir()
    assert out.name.startswith("digits-")
    assert cells_of(out, "weight_bits", "act_bits") == [(2, 2), (3, 3)]


def test_other_files_in_the_folder_are_left_alone(home):
    mine = {"notes.tmp": b"mine", ".draft.tmp": b"mine", "gdfq.json": b"{}"}
    for name, content in mine.items():
        (home / name).write_bytes(content)
    ok(*BRIEF3, "--out", ".")
    assert files(home).items() >= mine.items()


# The grid


def cells_of(out: str | Path, *keys: str) -> list[tuple]:
    return [tuple(c[k] for k in keys) for c in load(out)["cells"]]


def test_the_baseline_alone_and_one_seed(monkeypatch):
    text = ok(*BRIEF3, "--first-seed", 7, "--out", "run")
    assert cells_of("run", "method", "hooks", "seed") == [("gdfq", "none", 7)]
    (row,) = (line for line in text.splitlines() if line.startswith("gdfq  "))
    assert row.count("± n/a") == 6
    # One command for going on, and for looking at the result again.
    spy(monkeypatch, never)
    assert row in ok(*BRIEF3, "--first-seed", 7, "--out", "run", "--resume")


@pytest.mark.usefixtures("exports")
def test_without_onnx_one_line_says_so(monkeypatch):
    find_spec = export.find_spec
    monkeypatch.setattr(
        export, "find_spec", lambda name: None if name.startswith("onnx") else find_spec(name)
    )
    options = ["--bits", 3, "--seeds", 2, "--steps", 8, "--jobs", 1, "--out", "a"]
    status, out, err = call(*options)
    assert status == 0, err
    (line,) = (line for line in (out + err).splitlines() if "pip install" in line)
    assert "onnx, onnxscript" in line
    assert all(cell["onnx"] is None and cell["accuracy_last"] for cell in load("a")["cells"])
    assert not list(Path("a").glob("*.onnx"))


def test_all_methods_at_two_widths():
    text = ok(*BRIEF, "--baseline", "all", "--bits", 2, 3, "--out", "run")
    got = cells_of("run", "method", "weight_bits", "act_bits")
    assert sorted(got) == sorted((m, b, b) for m in METHODS for b in (2, 3))
    assert "Bit policy W2A2" in text
    assert "Bit policy W3A3" in text
    names = "|".join(METHODS)
    assert len(re.findall(rf"^(?:{names}) +W[23]A[23] +baseline", text, re.M)) == 2 * len(METHODS)


def test_several_arms_and_bits_apart():
    argv = ("--with-agm", "loss", "interpolation", "both", "--weight-bits", 2, "--act-bits", 4)
    text = ok(*BRIEF, *argv, "--out", "run")
    assert cells_of("run", "hooks", "weight_bits", "act_bits") == [
        (arm, 2, 4) for arm in ("none", "loss", "interpolation", "both")
    ]
    for name in ("baseline", "+loss", "+interpolation", "+AGM"):
        assert len(re.findall(rf"^gdfq +W2A4 +{re.escape(name)} ", text, re.M)) == 1


def test_real_images_show_the_room():
    text = ok(*BRIEF3, "--with-agm", "--with-real", "--out", "run")
    assert cells_of("run", "hooks") == [("none",), ("both",), ("real",)]
    *_, real = load("run")["cells"]
    assert real["accuracy_last"] == real["accuracy_proof"]
    assert real["accuracy_tuning"] is None  # it has learned from them
    assert len(re.findall(r"^gdfq +W3A3 +real images ", text, re.M)) == 1


@pytest.mark.parametrize("arm", ["loss", "interpolation"])
def test_a_part_of_the_add_on(arm, monkeypatch):
    started = spy(monkeypatch)
    ok(*BRIEF3, "--with-agm", arm, "--out", "run")
    assert started == ["gdfq-none-0", f"gdfq-{arm}-0"]
    assert cells_of("run", "hooks") == [("none",), (arm,)]


def test_an_option_given_twice_counts_once(monkeypatch):
    started = spy(monkeypatch)
    argv = ("--baseline", "gdfq", "gdfq", "--with-agm", "loss", "loss", "--bits", 3, 3)
    ok(*BRIEF, *argv, "--out", "run")
    assert started == ["gdfq-none-0", "gdfq-loss-0"]
    assert len(load("run")["cells"]) == 2


def test_the_shortest_run_can_be_looked_at_again():
    argv = (*BRIEF3, "--steps", 2, "--out", "run")
    text = ok(*argv)
    assert "nan" not in text.lower()
    assert load("run")["table"] in ok(*argv, "--resume")


# A user's own model and images


def test_resnet20_with_weights_on_a_folder_of_images(weights, folder):
    argv = ("--model", "resnet20", "--weights", weights, "--data", folder, "--bits", 3)
    text = ok(*argv, *BRIEF, "--out", "run")
    assert "on 20 evaluation images" in text
    (cell,) = load("run")["cells"]
    model = resnet20()
    model.load_state_dict(
        {k.removeprefix("module."): v for k, v in torch.load(weights)["state_dict"].items()}
    )
    assert load("run")["settings"]["teacher_hash"] == fingerprint(model)
    images = image_folder(folder, datasets.Inputs(32, 32))
    assert cell["accuracy_fp"] == accuracy(model.eval(), images)
    quantized = load_quantized(Path("run", cell["checkpoint"]), resnet20())
    got = accuracy(quantized, images)
    assert got == pytest.approx(cell["accuracy_last"], abs=5)  # one image


def test_a_factory_from_the_current_directory_at_the_default_widths(folder):
    ok("--model", "nets:cnn", "--data", folder, *BRIEF, "--out", "run")
    assert cells_of("run", "weight_bits", "act_bits") == [(3, 3), (4, 4)]
    assert load("run")["evaluation_images"] == 20


def test_many_classes_are_judged_by_their_five_largest_logits_too(home):
    rng = np.random.default_rng(0)
    for i in range(21):
        (home / "many" / f"{i:02}").mkdir(parents=True)
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(home / "many" / f"{i:02}" / "1.png")
    text = ok("--model", "nets:cnn", "--data", "many", *BRIEF3, "--out", "run")
    (cell,) = load("run")["cells"]
    for which in ("fp", "ptq", "last"):
        assert 0 <= cell[f"accuracy_{which}"] <= cell[f"accuracy_{which}_top5"] <= 100
    assert cell["accuracy_last_top5"] == cell["history"][-1]["accuracy_top5"] > 0
    assert cell["accuracy_tuning"] is None  # the first half of one image
    assert cell["accuracy_proof"] == cell["accuracy_last"]
    first, five = cell["accuracy_fp"], cell["accuracy_fp_top5"]
    assert f"full precision {first:.2f} % top-1, {five:.2f} % top-5 on 21 " in text
    assert "last step %, top-5" in load("run")["table"]


@pytest.mark.parametrize(("patience", "shown"), [(0, True), (1e9, False)])
def test_a_long_evaluation_shows_its_progress(monkeypatch, patience, shown):
    monkeypatch.setattr(tasks, "PATIENCE", patience)
    monkeypatch.setattr(progress, "shown", lambda: True)
    status, text, _ = call(*BRIEF3, "--out", "run", together=True)
    assert status == 0
    assert ("evaluating: " in text) == shown


@pytest.mark.usefixtures("exports")
def test_why_there_is_no_file_of_integers_is_told_once(monkeypatch):
    def missing(*_, **__):
        raise ExportError("an ONNX file needs onnx, which is missing")

    monkeypatch.setattr("baselines.run.export_onnx", missing)
    text = ok(*BRIEF, "--out", "run")
    assert text.count("needs onnx") == text.count("No ONNX file: an ONNX file needs onnx") == 1
    assert cells_of("run", "onnx", "onnx_bytes") == [(None, None)] * 2


def test_few_classes_are_not(finished):
    for cell in load(finished[0])["cells"]:
        assert cell["accuracy_last_top5"] is None
    assert "top-5" not in finished[2]


@pytest.mark.parametrize(
    ("argv", "judged", "steps"),
    [
        ((), 5, range(5, 21)),  # up to 400 images, 20 times all 20 of the folder, for 80 trained on
        ((), 1, [5, 10, 15, 20]),
        ((), 0.1, [5, 20]),
        (("--eval-every", 7), 0.1, [5, 7, 14, 20]),
        (("--steps", 8), 7.5, range(2, 9)),  # fewer steps than passes
    ],
)
def test_how_often_images_are_judged(folder, monkeypatch, argv, judged, steps):
    monkeypatch.setattr(tasks, "JUDGED", judged)
    argv = ("--model", "nets:cnn", "--data", folder, "--out", "run", *argv)
    ok(*BRIEF3, "--steps", 20, *argv)
    (cell,) = load("run")["cells"]
    assert [row["step"] for row in cell["history"] if "accuracy" in row] == list(steps)
    assert len(cell["history"]) >= min(20, max(steps))  # of losses and images


def test_the_halves_of_each_class(folder):
    ok("--model", "nets:cnn", "--data", folder, *BRIEF3, "--out", "run")
    (cell,) = load("run")["cells"]
    model = load_quantized(Path("run", cell["checkpoint"]), teachers.build("nets:cnn"))
    hits = teachers.hits(model, image_folder(folder, datasets.Inputs(32, 32)))[:, 0]
    first, second = (100 * hits[start::2].float().mean().item() for start in (0, 1))
    assert cell["accuracy_tuning"] == pytest.approx(first, abs=10.1)  # one image
    assert cell["accuracy_proof"] == pytest.approx(second, abs=10.1)
    assert cell["accuracy_last"] == (cell["accuracy_tuning"] + cell["accuracy_proof"]) / 2


@pytest.mark.parametrize(
    ("argv", "inputs"),
    [
        ((), "Inputs(image_size=224, resize=256, "),
        (("--image-size", 32), "Inputs(image_size=32, resize=37, "),
        (("--image-size", 32, "--resize", 32), "Inputs(image_size=32, resize=32, "),
        (("--image-size", 32, "--mean", 0, 0.5, 1), "mean=(0.0, 0.5, 1.0), std=(0.229, "),
        (("--image-size", 32, "--std", 2, 0.5, 1), "0.406), std=(2.0, 0.5, 1.0)"),
    ],
)
def test_a_librarys_inputs_and_flags_before_them(argv, inputs, monkeypatch):
    state = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    args = command_line.parse(["--model", "torchvision:resnet18", "--pretrained", *map(str, argv)])
    task = tasks.load_task(args)
    assert inputs in str(task.inputs)


def test_torchvision_without_images_to_judge(recwarn):
    network = torchvision.models.resnet18(num_classes=10)
    torch.save(network.state_dict(), "resnet18.pth")
    argv = ("--model", "torchvision:resnet18", "--num-classes", 10, "--image-size", 32)
    argv += ("--weights", "resnet18.pth")
    text = ok(*argv, "--bits", 3, *BRIEF, "--with-agm", "--out", "run")
    for line in text.splitlines():
        if line.startswith("gdfq"):
            assert line.split()[3:6] == ["n/a"] * 3
    keys = ("accuracy_fp", "accuracy_ptq", "accuracy_last")
    assert cells_of("run", *keys) == [(None,) * 3] * 2
    assert len(files(Path("run"), "*.ckpt")) == 2
    assert not [w for w in recwarn if "legend" in str(w.message)]  # from the empty plot


def test_the_shared_network_and_images():
    source, data = SHARED / "weights" / "cifar10_resnet20.th", SHARED / "data/cifar10/dev"
    if not (source.exists() and data.exists()):
        pytest.skip(f"{SHARED} is absent")
    for name in sorted(os.listdir(data)):
        few = sorted((data / name).iterdir())[:10]
        Path("few", name).mkdir(parents=True)
        for path in few:
            Path("few", name, path.name).symlink_to(path)
    ok("--model", "resnet20", "--weights", source, "--data", "few", "--bits", 8, *BRIEF,
       "--out", "run")  # fmt: skip
    (cell,) = load("run")["cells"]
    assert cell["accuracy_fp"] > 80
    assert cell["accuracy_ptq"] > 60  # 8 bits
