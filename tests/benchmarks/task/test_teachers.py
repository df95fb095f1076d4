import os
import pickle
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import DenseNet

from baselines.quantization.checkpoint import fingerprint
from benchmarks.errors import TeacherError
from benchmarks.task import networks, teachers
from benchmarks.task.datasets import Inputs, digits
from benchmarks.task.folders import image_folder
from benchmarks.task.networks import resnet20
from benchmarks.task.teachers import (
    build,
    digits_cnn,
    digits_teacher,
    hits,
    train_digits_teacher,
)
from benchmarks.task.weights import load_weights
from tests import hostile

SHARED = Path(__file__).parents[4] / "shared"


def fails(function, *args, parts: tuple[str, ...], **kwargs) -> None:
    with pytest.raises(TeacherError) as caught:
        function(*args, **kwargs)
    for part in parts:
        assert part in str(caught.value)
    assert "weights_only=False" not in str(caught.value)


def same(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def short_training(monkeypatch):
    monkeypatch.setitem(teachers.DIGITS_RECIPE, "epochs", 1)


# Networks


def test_resnet20_has_the_published_keys_and_size():
    model = resnet20()
    assert sum(p.numel() for p in model.parameters()) == 269_722
    keys = {k for k in model.state_dict() if not k.endswith("num_batches_tracked")}
    bn = ("weight", "bias", "running_mean", "running_var")
    want = {"conv1.weight", "linear.weight", "linear.bias", *(f"bn1.{k}" for k in bn)}
    for block in (f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1, 2)):
        want |= {f"{block}.conv{i}.weight" for i in (1, 2)}
        want |= {f"{block}.bn{i}.{k}" for i in (1, 2) for k in bn}
    assert keys == want
    assert resnet20(100)(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


def test_the_shortcut_subsamples_and_pads():
    block = networks.BasicBlock(4, 8, 2).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, 6, 6)
    y = block(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert y[:, :2].abs().sum() + y[:, 6:].abs().sum() == 0


@pytest.mark.parametrize(("make", "shape"), [(digits_cnn, (1, 8, 8)), (resnet20, (3, 32, 32))])
def test_fx_traces_the_networks(make, shape):
    model = make().eval()
    x = torch.randn(2, *shape)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


# The digits teacher


def test_the_digits_teacher_is_accurate_and_leaves_the_rng_alone():
    before = torch.get_rng_state()
    model = train_digits_teacher()
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(m.training for m in model.modules())
    _, _, images, labels = digits()
    assert hits(model, [(images, labels)])[:, 0].float().mean() >= 0.975


@pytest.mark.usefixtures("short_training")
def test_training_depends_on_the_seed_alone():
    first = train_digits_teacher(seed=3)
    torch.rand(5)
    with torch.no_grad():
        assert same(train_digits_teacher(seed=3), first)
    assert not same(train_digits_teacher(seed=4), first)


@pytest.mark.usefixtures("short_training")
def test_the_cache_returns_the_same_teacher(tmp_path, monkeypatch):
    cache = tmp_path / "new" / "cache"
    first = digits_teacher(cache)
    monkeypatch.setattr(teachers, "train_digits_teacher", None)  # would fail if called
    before = torch.get_rng_state()
    second = digits_teacher(cache)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first, second)
    assert not any(m.training for m in second.modules())
    assert [f.suffix for f in cache.iterdir()] == [".ckpt"]


@pytest.mark.usefixtures("short_training")
def test_another_recipe_or_seed_is_another_file(tmp_path, monkeypatch):
    digits_teacher(tmp_path)
    digits_teacher(tmp_path, seed=1)
    monkeypatch.setitem(teachers.DIGITS_RECIPE, "lr", 0.05)
    digits_teacher(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.usefixtures("short_training")
@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "keys"])
def test_a_damaged_cache_is_trained_again(tmp_path, damage):
    first = digits_teacher(tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    if damage == "keys":
        torch.save({"a": torch.zeros(1)}, file)
    elif damage == "flipped":
        weights = first.layer3[0].conv1.weight.detach().numpy().tobytes()
        at = content.index(weights)
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    else:
        file.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
    with pytest.warns(UserWarning, match="training the digits teacher again: .*ckpt"):
        assert same(digits_teacher(tmp_path), first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(digits_teacher(tmp_path), first)


@pytest.mark.usefixtures("short_training")
def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    fails(digits_teacher, tmp_path / "file", parts=("cannot write", "can be written to"))


@pytest.mark.usefixtures("short_training")
def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    fails(digits_teacher, tmp_path, parts=("No space left on device",))
    assert not list(tmp_path.iterdir())


# build


@pytest.mark.usefixtures("short_training")
def test_build_digits(tmp_path):
    trained = build("digits", cache_dir=tmp_path / "cache")
    assert same(trained, train_digits_teacher())
    other = digits_cnn()
    torch.save(other.state_dict(), tmp_path / "w.pt")
    assert same(build("digits", weights=tmp_path / "w.pt"), other)
    fails(build, "digits", num_classes=7, parts=("has 10 classes, got num_classes=7",))


@pytest.mark.parametrize("name", ["resnet20", "torchvision:resnet18", "torchvision:mobilenet_v2"])
def test_build_by_name(name):
    model = build(name, num_classes=7)
    assert not any(m.training for m in model.modules())
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the current directory."""
    (tmp_path / "user_model.py").write_text(
        "from torch import nn\n"
        "def net(num_classes=3):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(4, num_classes),\n"
        "                         nn.BatchNorm1d(num_classes))\n"
        "def fixed(): return net(5)\n"
        "def forwards(**kwargs): return net(**kwargs)\n"
        "class Silent(nn.Sequential):\n"
        "    def train(self, mode=True): super().train(mode)\n"
        "def silent(): return Silent(net(5))\n"
        "def stateless(): return nn.BatchNorm1d(3, track_running_stats=False)\n"
        "def plain(): return nn.Linear(1, 1)\n"
        "def text(): return 'net'\n"
        "def greedy(a, b): return net()\n"
        "def two(num_classes=3, pretrained=False): return net(9 if pretrained else num_classes)\n"
        "number = 3\n"
    )
    (tmp_path / "user_broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("user_model", None)


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("name", "classes"), [("net", 7), ("fixed", 5), ("forwards", 7), ("silent", 5)]
)
def test_build_a_users_model(name, classes):
    before = list(sys.path)
    model = build(f"user_model:{name}", num_classes=7)
    assert sys.path == before
    assert not model.training
    assert model(torch.zeros(2, 4)).shape == (2, classes)


@pytest.mark.usefixtures("module")
def test_a_users_model_may_take_pretrained():
    assert build("user_model:two", num_classes=7)(torch.zeros(2, 4)).shape == (2, 7)
    model = build("user_model:two", num_classes=7, pretrained=True)
    assert model(torch.zeros(2, 4)).shape == (2, 9)
    parts = ("'user_model:net' takes no argument pretrained", "--weights")
    fails(build, "user_model:net", pretrained=True, parts=parts)


@pytest.mark.parametrize("name", ["digits", "resnet20"])
def test_our_own_have_no_pretrained_weights(name):
    fails(build, name, pretrained=True, parts=(f"{name!r} has no pretrained weights",))


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "resnet21",
            (
                "unknown model 'resnet21'",
                "'digits', 'resnet20', 'efficientnet_lite0', 'torchvision:NAME'",
            ),
        ),
        ("", ("unknown model ''", "'package.module:factory'")),
        (":net", ("unknown model ':net'",)),
        ("torchvision:resnet19", ("no classifier 'resnet19'", "did you mean", "resnet18")),
        ("torchvision:", ("no classifier ''", "list_models")),
        ("torchvision:fasterrcnn_resnet50_fpn", ("no classifier",)),
        ("torchvision:squeezenet1_1", ("'torchvision:squeezenet1_1' has no BatchNorm", "ResNet")),
        ("user_model:plain", ("'user_model:plain' has no BatchNorm",)),
        ("user_model:stateless", ("has no BatchNorm with running statistics",)),
        ("no_such.module:net", ("cannot import 'no_such.module'", "ModuleNotFoundError")),
        ("user_broken:net", ("cannot import 'user_broken'", "ZeroDivisionError")),
        ("user_model:nothing", ("'user_model' has no callable 'nothing'", "nn.Module")),
        ("user_model:number", ("'user_model' has no callable 'number'",)),
        ("user_model:text", ("'user_model:text' returned str, expected nn.Module",)),
        ("user_model:greedy", ("'user_model:greedy' failed (TypeError", "num_classes alone")),
    ],
)
def test_build_errors(name, parts):
    fails(build, name, parts=parts)


def test_build_needs_a_class():
    fails(build, "resnet20", num_classes=0, parts=("num_classes must be >= 1, got 0",))


# load_weights


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "model.", "backbone.", "module._orig_mod.", "model.backbone."],
)
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
def test_prefix_and_wrappers(tmp_path, prefix, wrapper):
    source, model = digits_cnn(), digits_cnn()
    state = OrderedDict((prefix + k, v) for k, v in source.state_dict().items())
    content = state if wrapper is None else {"epoch": 3, "best": 0.5, wrapper: state}
    torch.save(content, tmp_path / "w.th")
    load_weights(model, tmp_path / "w.th")
    assert same(model, source)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("own", ["module", "model", "backbone"])
def test_a_models_own_prefix_stays(tmp_path, own, prefix):
    source, model = (nn.Sequential(OrderedDict({own: digits_cnn()})) for _ in range(2))
    torch.save({prefix + k: v for k, v in source.state_dict().items()}, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert same(model, source)


def test_a_prefix_of_some_keys_is_not_left_out(tmp_path):
    model = digits_cnn()
    twice = {p + k: v for p in ("model.", "backbone.") for k, v in STATE.items()}
    before = fingerprint(model)
    torch.save(twice, tmp_path / "w.pt")
    parts = ("missing keys: conv1.weight", "unexpected keys: model.conv1.weight")
    fails(load_weights, model, tmp_path / "w.pt", parts=parts)
    assert fingerprint(model) == before


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_names_in_torchvisions_densenet_files(tmp_path, prefix):
    source, model = (DenseNet(4, (2, 1), 8, num_classes=10) for _ in range(2))
    state = {prefix + k: v for k, v in source.state_dict().items()}
    for name in ("norm1", "norm2", "conv1", "conv2"):  # of the layers; features.norm5 is no layer's
        old = f".{name[:-1]}.{name[-1]}."
        state = {
            k.replace(f".{name}.", old) if "denselayer" in k else k: v for k, v in state.items()
        }
    assert f"{prefix}features.denseblock1.denselayer2.norm.1.running_mean" in state
    torch.save(state, tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth")
    assert same(model, source)


EMA_KEYS = ("state_dict_ema", "model_ema", "ema", "ema_model", "ema_state_dict")


@pytest.mark.parametrize("key", EMA_KEYS)
@pytest.mark.parametrize("plain", ["state_dict", "model", None])
def test_the_moving_average_is_taken_and_a_line_says_so(tmp_path, capsys, key, plain):
    averaged, model = digits_cnn(), digits_cnn()
    content = {key: averaged.state_dict(), "epoch": 3}
    if plain:
        content = {plain: digits_cnn().state_dict(), **content}
    torch.save(content, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert same(model, averaged)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path / 'w.pt'}: took the moving average of the weights, {key!r}")
    assert plain is None or line.endswith(f"(it also holds {plain!r})")


def test_the_average_of_swa_utils(tmp_path, capsys):
    averaged, model = AveragedModel(digits_cnn()), digits_cnn()
    torch.save({"model": STATE, "model_ema": averaged.state_dict()}, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert same(model, averaged.module)
    assert "'model_ema'" in capsys.readouterr().out


def test_an_average_that_is_no_state_dict_is_left_and_a_line_says_so(tmp_path, capsys):
    model = digits_cnn()
    shadow = {"decay": 0.999, "shadow_params": list(STATE.values())}
    torch.save({"state_dict": STATE, "ema": shadow}, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert torch.equal(model.conv1.weight, STATE["conv1.weight"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("took the weights, 'state_dict' (it also holds 'ema')")


def test_sparse_weights_beside_dense_ones_are_others(tmp_path):
    sparse = {k: v.to_sparse() for k, v in STATE.items()}
    torch.save({"state_dict": sparse, "model": STATE}, tmp_path / "w.pt")
    fails(load_weights, digits_cnn(), tmp_path / "w.pt", parts=("different weights",))


@pytest.mark.parametrize(
    "keys", [("state_dict", "model"), ("model", "model_state_dict"), ("ema", "model_ema")]
)
def test_several_different_weights_are_refused_by_name(tmp_path, capsys, keys):
    model = digits_cnn()
    before = fingerprint(model)
    torch.save({k: digits_cnn().state_dict() for k in keys}, tmp_path / "w.pt")
    parts = (f"different weights as {min(keys, key=KEYS.index)!r} and as", "re-save it")
    fails(load_weights, model, tmp_path / "w.pt", parts=parts)
    assert fingerprint(model) == before
    torch.save(
        dict.fromkeys(keys, STATE), tmp_path / "w.pt"
    )  # there the choice makes no difference
    load_weights(model, tmp_path / "w.pt")
    assert torch.equal(model.conv1.weight, STATE["conv1.weight"])
    assert capsys.readouterr().out == "" or "ema" in keys


KEYS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model", "model_state_dict")


def test_num_batches_tracked_may_be_missing(tmp_path):
    source, model = digits_cnn(), digits_cnn()
    state = {k: v for k, v in source.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert same(model, source)


def test_safetensors(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    source, model = digits_cnn(), digits_cnn()
    path = tmp_path / "w.safetensors"
    safetensors.save_file(source.state_dict(), path)
    load_weights(model, path)
    assert same(model, source)
    path.write_bytes(path.read_bytes()[:100])
    fails(load_weights, model, path, parts=(str(path), "damaged or not safetensors"))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    fails(load_weights, model, path, parts=("needs safetensors: run `pip install safetensors`",))
    assert same(model, source)


@pytest.mark.parametrize("name", hostile.TRAPS)
@pytest.mark.parametrize("container", hostile.CONTAINERS)
def test_a_malicious_pickle_does_not_run(tmp_path, campaign, monkeypatch, name, container):
    path, canary = tmp_path / "w.pt", tmp_path / "canary"
    monkeypatch.syspath_prepend(tmp_path)
    pickled = hostile.trap(name, canary)
    path.write_bytes(hostile.contained(pickled, container))
    model = digits_cnn()
    before = fingerprint(model)
    what = "cannot read" if container == "tar" else "refused to load"
    fails(load_weights, model, path, parts=(f"{what} '{path}'", "re-save it"))
    assert not canary.exists()
    assert "agm_trap" not in sys.modules
    assert fingerprint(model) == before
    pickle.loads(pickled)  # the trap is a real one
    assert canary.exists()
    sys.modules.pop("agm_trap", None)
    campaign.count("malicious pickles as --weights", files=1, executed=0)


def test_a_whole_pickled_model_is_refused_by_name(tmp_path):
    torch.save(digits_cnn(), tmp_path / "w.pt")
    parts = (
        "a reference to benchmarks.task.networks.ResNet",
        "torch.save(model.state_dict(), path)",
    )
    fails(load_weights, digits_cnn(), tmp_path / "w.pt", parts=parts)


STATE = digits_cnn().state_dict()
WIDE = networks.ResNet(in_channels=1, widths=(8, 16, 64), blocks=1, num_classes=10).state_dict()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ([1], ("expected a state_dict", "found a list")),
        ({}, ("expected a state_dict", "found an empty one")),
        ({"a": 1, "b": "c"}, ("expected a state_dict", "other values than tensors: a, b")),
        (
            {k: v for k, v in STATE.items() if not k.startswith("conv1")},
            ("do not fit", "missing keys: conv1.weight", "Choose the model"),
        ),
        (
            {**STATE, **{f"extra{i}": torch.zeros(1) for i in range(5)}},
            ("unexpected keys: extra0, extra1, extra2 and 2 more",),
        ),
        (WIDE, ("mismatched shapes: layer3.0.conv1.weight (64, 16, 3, 3) for (32, 16, 3, 3)",)),
        (
            networks.ResNet(
                in_channels=1, widths=(8, 16, 32), blocks=1, num_classes=100
            ).state_dict(),
            ("are for 100 classes, the model has 10: pass num_classes=100",),
        ),
        (
            {**STATE, "linear.bias": torch.zeros(())},
            ("mismatched shapes: linear.bias () for (10,)",),
        ),
        *(
            ({**STATE, "linear.weight": other}, ("other kinds of tensors: linear.weight",))
            for other in (
                STATE["linear.weight"].to_sparse(),
                torch.quantize_per_tensor(STATE["linear.weight"], 0.1, 0, torch.qint8),
                STATE["linear.weight"].to("meta"),
                STATE["linear.weight"].to(torch.int8),
                STATE["linear.weight"].to(torch.complex64),
            )
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path, content, parts):
    model = digits_cnn()
    before = fingerprint(model)
    torch.save(content, tmp_path / "w.pt")
    fails(load_weights, model, tmp_path / "w.pt", parts=(str(tmp_path / "w.pt"), *parts))
    assert fingerprint(model) == before


@pytest.mark.parametrize("damage", ["empty", "truncated", "text"])
def test_a_damaged_weights_file(tmp_path, damage):
    path = tmp_path / "w.pt"
    torch.save(STATE, path)
    content = path.read_bytes()
    damaged = {"empty": b"", "truncated": content[: len(content) // 2], "text": b"hello\n" * 9}
    path.write_bytes(damaged[damage])
    model = digits_cnn()
    before = fingerprint(model)
    fails(load_weights, model, path, parts=(f"cannot read '{path}', it is damaged", "re-save it"))
    assert fingerprint(model) == before


def test_missing_weights(tmp_path):
    for path in (tmp_path / "no.pt", tmp_path):
        fails(load_weights, digits_cnn(), path, parts=(f"no weights file at '{path}'", "pass"))


# hits


class Fixed(nn.Module):
    """Images are class numbers; the logits' largest is theirs."""

    def __init__(self, classes: int = 4):
        super().__init__()
        self.classes = classes
        self.part = nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        return nn.functional.one_hot(x.long(), self.classes).float()


def batches(images, labels, size=3):
    return zip(images.split(size), labels.split(size), strict=True)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_hits_over_batches_restore_modes(device):
    model = Fixed().train()
    model.part.eval()
    images = torch.tensor([0.0, 1, 2, 3, 0, 1, 2])
    labels = torch.tensor([0, 1, 2, 3, 1, 1, 0])
    for size in (1, 2, 7, 100):
        got = hits(model, batches(images, labels, size), device=device)
        assert got.tolist() == [[True, True]] * 4 + [[False, True], [True, True], [False, True]]
    assert (model.training, model.part.training) == (True, False)


def test_hits_are_numpys_five_largest():
    rng = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 12, generator=rng), torch.arange(200) % 12
    order = logits.numpy().argsort(1)[:, ::-1]
    want = [[y == row[0], y in row[:5]] for row, y in zip(order, labels.tolist(), strict=True)]
    assert hits(nn.Identity(), batches(logits, labels)).tolist() == want


def test_constant_logits_are_no_hits_of_every_label():
    constant = torch.zeros(30, 10), torch.arange(30) % 10
    first, five = hits(nn.Identity(), batches(*constant)).float().mean(0)
    assert first == pytest.approx(0.1)
    assert five <= 0.6  # whichever five


def test_hits_errors():
    images, labels = torch.zeros(3), torch.tensor([0, 1, 4])
    model = Fixed().train()

    def bad(model, images, labels, *parts):
        fails(hits, model, [(images, labels)], parts=parts)

    bad(model, images, labels, "has 4 classes", "labels need 5", "choose")
    assert model.training
    bad(model, images, labels[:2], "expected 3 labels, got (2,)")
    bad(nn.Identity(), images, labels, "logits (3, C) of the model, got (3,)")
    fails(hits, model, [], parts=("expected images, got none",))

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    bad(Pair(), images, labels, "logits (3, C) of the model, got tuple")


# The published ResNet-20


def test_the_published_resnet20(tmp_path):
    data, weights = SHARED / "data/cifar10/dev", SHARED / "weights/cifar10_resnet20.th"
    if not data.is_dir() or not weights.is_file():
        pytest.skip(f"needs {data} and {weights}")
    for folder in sorted(data.iterdir()):
        (tmp_path / folder.name).mkdir()
        for file in sorted(folder.iterdir())[::10]:
            (tmp_path / folder.name / file.name).symlink_to(file)
    images = image_folder(tmp_path, Inputs(32, 32), num_classes=10)
    assert len(images) == 500
    # This tenth; all 5,000 give the published 91.48. Two images may tip over on other hardware.
    model = build("resnet20", weights=weights)
    accuracy = 100 * hits(model, images)[:, 0].float().mean()
    assert accuracy == pytest.approx(92.8, abs=0.4)
