"""Files of integers: what is in them, what they compute, what is refused."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from agm import AgmError
from baselines.errors import CheckpointError, ExportError
from baselines.quantization import export
from baselines.quantization.export import bit_planes, export_onnx
from baselines.quantization.integers import IntegerWeight, deployed
from baselines.quantization.placement import weighted_layer, weighted_nodes
from baselines.quantization.policy import QuantizationConfig
from baselines.quantization.quantizers import WeightQuantizer, integer_range, observing
from baselines.quantization.student import build_student
from baselines.quantization.tracing import traced
from tests.baselines import Tiny, bits, fill, images, settle
from tests.baselines.strategies import bit_widths, schemes
from tests.strategies import rng, seeds

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")


def student_of(net, x, **config):
    config = {"activations": "inputs", "fold_batch_norm": True} | config
    student = build_student(traced(net, tuple(x.shape[1:])), QuantizationConfig(**config))
    with torch.no_grad(), observing(student):
        student(x)
        for name, gain in student.named_parameters():
            if name.endswith("log_gain"):
                gain.fill_(0.2)
    return student.requires_grad_(False)


def session(path, *, optimized=None):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_DISABLE_ALL
    if optimized is not None:
        options.graph_optimization_level = levels.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path, x, **how):
    return torch.from_numpy(session(path, **how).run(None, {"images": x.numpy()})[0])


def kinds(path):
    return [node.op_type for node in onnx.load(path).graph.node]


def agreement(a, b):
    return float((a.argmax(1) == b.argmax(1)).float().mean())


class Every(nn.Module):
    """ReLU6, a transposed and a grouped convolution, a concatenation, a padded shortcut."""

    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 5, 1)
        self.up = nn.ConvTranspose2d(13, 6, 2, stride=2)
        self.fc = nn.Linear(6, 10)
        fill(self, 0)

    def forward(self, x):
        x = nn.functional.relu6(self.bn0(self.conv0(x)))
        y = nn.functional.relu6(self.bn1(self.conv1(x)))
        y = torch.cat([nn.functional.max_pool2d(x + y, 2), self.conv2(y[:, :, ::2, ::2])], 1)
        return self.fc(nn.functional.relu(self.up(y)).mean((2, 3)))


@given(bit_widths, st.integers(1, 70), seeds)
@settings(max_examples=50)
def test_bit_planes_hold_every_level(b, n, seed):
    levels = torch.randint(2**b, (n,), generator=rng(seed))
    planes = bit_planes(levels, b)
    assert planes.dtype == torch.uint8
    assert planes.shape == (b, -(-n // 8), 1)
    rows = np.unpackbits(planes.numpy()[..., 0], axis=1, bitorder="little")[:, :n].astype(int)
    assert (rows * 2 ** np.arange(b)[:, None]).sum(0).tolist() == levels.tolist()


@given(bit_widths, schemes, st.booleans(), seeds)
@settings(max_examples=40)
def test_the_integers_are_the_students(b, scheme, fold, seed):
    """Times a factor; a BatchNorm's gains, also negative and zero ones, go into the steps."""
    net = fill(Tiny(seed), seed)
    with torch.no_grad():
        net.bn0.weight[0] = 0
        net.bn0.weight[1] *= -1
        net.bn1.weight[2] = -1e-9
    student = student_of(net, images(), weight_bits=b, scheme=scheme, fold_batch_norm=fold)
    network = deployed(student)
    for node in weighted_nodes(student):
        layer = weighted_layer(student, node)
        latent = layer.parametrizations.weight.original
        (quantizer,) = (m for m in layer.modules() if isinstance(m, WeightQuantizer))
        scale, zero_point = quantizer.scale_and_zero_point(latent)
        qmin, qmax = integer_range(b, scheme, signed=True)
        q = ((latent.double() / scale).round() + zero_point).clamp(qmin, qmax)
        stored = weighted_layer(network, node) or network.get_submodule(str(node.target))
        whole = stored.parametrizations.weight.original
        weight = stored.parametrizations.weight[0]
        assert whole.dtype == torch.int8
        if weight.levels is None:  # 8 bits, rounded once more where they do not fit
            assert b == 8
            spare = (q - zero_point).abs().amax((*range(1, q.ndim),), keepdim=True) > 127
            plain = whole.flatten(1).abs().sum(1) > 0
            keep = plain & ~spare.flatten()
            assert torch.equal(whole[keep].abs().double(), (q - zero_point)[keep].abs())
            continue
        assert torch.equal(weight.levels.double(), q - qmin)
        assert torch.equal(weight.zero_points, zero_point - qmin)
        assert torch.equal((weight.levels - weight.zero_points) * weight.factor, whole.float())
    x = images(16, seed=1)
    if b < 8 or scheme == "symmetric":
        want = student(x)
        assert (network(x) - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("activations", ["inputs", "relu"])
@pytest.mark.parametrize("net", [Tiny(classes=10), Every()], ids=["residual", "every"])
def test_without_new_grids_it_is_the_student(net, activations, tmp_path):
    x = images(64, seed=1)
    student = student_of(net, images(64), activations=activations)
    before = bits(student)
    want = student(x)
    assert (deployed(student)(x) - want).abs().max() <= 1e-4 * want.abs().max()
    exported = export_onnx(student, tmp_path / "f.onnx", arithmetic="float")
    assert exported.integer_layers == 0
    got = run(tmp_path / "f.onnx", x, optimized=tmp_path / "o.onnx")
    # Rounded elsewhere where a value lies between two steps, by the order of a sum.
    assert agreement(got, want) >= 0.95
    assert (got - want).abs().median() <= 1e-4 * want.abs().max()
    assert "DequantizeLinear" not in kinds(tmp_path / "f.onnx")
    assert bits(student) == before


@pytest.mark.parametrize("config", [{"weight_bits": 2, "act_bits": 4}, {"scheme": "symmetric"},
                                    {"weight_bits": 8, "act_bits": 8}, {"activations": "relu"},
                                    {"ste": "clipped", "learned_steps": True},
                                    {"fold_batch_norm": False, "weight_bits": 5}],
                         ids=str)  # fmt: skip
def test_the_file_computes_what_deployed_does(config, tmp_path):
    x = images(64, seed=1)
    student = student_of(Every(), images(64), **config)
    path = tmp_path / "network.onnx"
    exported = export_onnx(student, path, images(64))
    reference = deployed(student, images(64))(x)
    spread = reference.std(0).max()
    plain, fast = run(path, x), run(path, x, optimized=tmp_path / "fast.onnx")
    assert (plain - reference).abs().median() <= 1e-3 * spread
    assert (fast - reference).abs().median() <= 0.1 * spread
    assert (plain[:1] - run(path, x[:1])).abs().max() < 1e-5 * spread  # any batch size
    # The transposed convolution has no integer kernel.
    assert kinds(tmp_path / "fast.onnx").count("QLinearConv") == 3
    assert [row[0] for row in exported.rows if row[2] == "float"] == ["up", "fc"]
    assert exported.bytes == path.stat().st_size
    assert f"{exported.bytes} bytes" in str(exported)
    assert "up" in str(exported)


def test_every_layer_of_a_residual_network_runs_in_integers(tmp_path):
    student = student_of(Tiny(), images(64))
    exported = export_onnx(student, tmp_path / "a.onnx", images(64))
    assert [row[0] for row in exported.rows if row[2] == "float"] == ["fc"]
    session(tmp_path / "a.onnx", optimized=tmp_path / "fast.onnx")
    assert kinds(tmp_path / "fast.onnx").count("QLinearConv") == exported.integer_layers == 2
    without = export_onnx(student, tmp_path / "b.onnx")
    assert [row[0] for row in without.rows if row[2] == "float"] == ["conv1", "fc"]
    assert all("floating point" in row[3] for row in without.rows if row[2] == "float")


class Padded(nn.Module):
    """Padding by what lies inside, of the images and of activations, one layer run twice."""

    def __init__(self, mode):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(3 if i == 0 else 8, 8, 3, padding="same" if i == 1 else (1, 2),
                      stride=(1, 1, 2)[i], padding_mode=mode)
            for i in range(3)
        )  # fmt: skip
        self.norm, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 5)
        fill(self, 0)

    def forward(self, x):
        x = self.convs[1](self.norm(self.convs[0](x)).relu()).relu()
        x = self.convs[2](self.convs[2](x).relu()).relu()
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_by_other_values_than_zero_runs_in_integers(mode, tmp_path):
    x = images(64)
    student = student_of(Padded(mode), x, weight_bits=4, act_bits=4)
    assert (deployed(student)(x) - student(x)).abs().max() < 1e-4 * student(x).std()
    exported = export_onnx(student, tmp_path / "a.onnx", x)
    session(tmp_path / "a.onnx", optimized=tmp_path / "fast.onnx")
    found = kinds(tmp_path / "fast.onnx")
    assert found.count("Conv") == 0
    assert found.count("QLinearConv") == exported.integer_layers == 4
    assert student.get_submodule("convs.1").padding_mode == mode  # which is left as it was


def test_payload_on_disk(tmp_path):
    """A weight takes its bits."""
    sizes = {}
    for b in (2, 3, 4):
        student = student_of(Tiny(width=64), images(8), weight_bits=b)
        sizes[b] = export_onnx(student, tmp_path / f"{b}.onnx").bytes
    numel = 64 * 3 * 9 + 64 * 64 * 9 + 4 * 64
    assert abs(sizes[3] - sizes[2] - numel / 8) < 100
    assert abs(sizes[4] - sizes[3] - numel / 8) < 100


@pytest.mark.parametrize("fold", [True, False])
def test_a_trap_of_biases(fold, tmp_path):
    """A runtime rounds biases to steps of the products; a dead channel is its bias alone."""
    net = Tiny()
    with torch.no_grad():
        net.conv1.weight[0] = 0
        net.conv1.weight[1] *= 1e-12
        net.bn1.bias += 0.3
        net.bn1.weight[2] = net.bn1.bias[2] = 0
    x = images(64, seed=1)
    student = student_of(net, images(64), weight_bits=2, act_bits=8, fold_batch_norm=fold)
    weights = [m for m in deployed(student, images(64)).modules() if isinstance(m, IntegerWeight)]
    assert len(weights) == 3
    assert all((m.step > 0).all() for m in weights)
    export_onnx(student, tmp_path / "a.onnx", images(64))
    want = deployed(student, images(64))(x)
    got = run(tmp_path / "a.onnx", x, optimized=tmp_path / "fast.onnx")
    assert (got - want).abs().mean() <= 0.02 * want.std(0).max()


def test_openvino_computes_it_too(tmp_path):
    openvino = pytest.importorskip("openvino")
    x = images(64, seed=1)
    student = student_of(Every(), images(64))
    export_onnx(student, tmp_path / "a.onnx", images(64))
    compiled = openvino.Core().compile_model(str(tmp_path / "a.onnx"), "CPU")
    got, want = torch.from_numpy(compiled(x.numpy())[0]), deployed(student, images(64))(x)
    assert (got - want).abs().median() <= 0.1 * want.std(0).max()


class Pooled(nn.Module):
    """Its buffer is named as a test likes, and its pool divides by what a test likes."""

    def __init__(self, name="offset", divisor=None):
        super().__init__()
        self.name, self.conv, self.fc = name, nn.Conv2d(3, 4, 3, padding=1), nn.Linear(36, 5)
        self.norm = nn.BatchNorm2d(4)
        self.pool = nn.AvgPool2d(3, 2, divisor_override=divisor)
        self.register_buffer(name, torch.ones(4, 1, 1))
        fill(self, 0)

    def forward(self, x):
        x = (self.norm(self.conv(x)) + getattr(self, self.name)).relu()
        return self.fc(self.pool(x).flatten(1))


@pytest.mark.parametrize("name", ["powers", "two", "axis", "v0", "v1", "flat", "bits"])
def test_a_buffer_may_have_any_name(name, tmp_path):
    student = student_of(Pooled(name), images())
    export_onnx(student, tmp_path / "a.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]


# What is refused


def test_an_option_that_is_lost_on_the_way_is_told_and_nothing_written(tmp_path):
    student = student_of(Pooled(divisor=4), images())
    with pytest.raises(ExportError, match=r"computes something else.*of the largest"):
        export_onnx(student, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_no_runtime_takes_is_told_and_nothing_written(tmp_path, monkeypatch):
    unknown = onnx.helper.make_node("Unheard", ["images"], ["of"])
    monkeypatch.setattr(export, "_pack", lambda proto, _: proto.graph.node.append(unknown))
    with pytest.raises(ExportError, match="does not take the file"):
        export_onnx(student_of(Tiny(), images()), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_a_tensor_of_the_files_own_names_is_told_and_nothing_written(tmp_path):
    student = student_of(Pooled("logits"), images())
    with pytest.raises(ExportError, match=r"tensor of the name logits.*another name"):
        export_onnx(student, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


class Layers(nn.Module):
    """A layer of the name that a grid would have, masks and indices that are computed with."""

    def __init__(self):
        super().__init__()
        self.conv, self.conv_grid = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv1, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(4, 5)
        fill(self, 0)

    def forward(self, x):
        x = nn.functional.relu(self.conv_grid(nn.functional.avg_pool2d(self.conv(x), 2)))
        x = torch.where((x > 0.1) * (x < 2), x, 0.5)
        x = x.gather(1, (x.argmax(1, keepdim=True) + 1).remainder(4).expand_as(x))
        return self.fc(self.conv1(x).mean((2, 3)))


def test_a_file_is_near_the_student_whatever_its_layers_are_called_and_says_how_near(tmp_path):
    x = images(64)
    student = student_of(Layers(), x, act_bits=8, weight_bits=8)
    exported = export_onnx(student, tmp_path / "a.onnx", x)
    with torch.no_grad():
        want = student(x[:16])
    far = (run(tmp_path / "a.onnx", x[:16]) - want).abs().amax(1) / want.abs().max()
    assert exported.difference == pytest.approx(float(far.median()), rel=0.02)
    assert 0 < exported.difference < 0.05
    assert f"differ from the student's by {exported.difference:.1%} of" in str(exported)


def test_bad_input(tmp_path, monkeypatch):
    student, path = student_of(Tiny(), images()), tmp_path / "a.onnx"
    for call, said in (
        (lambda: export_onnx(Tiny(), path), "quantized network"),
        (lambda: export_onnx(student, tmp_path / "no" / "a.onnx"), "folder"),
        (lambda: export_onnx(student, path, images(size=12)), "(8, 3, 12, 12)"),
        (lambda: export_onnx(student, path, images() / 0), "finite"),
        (lambda: export_onnx(student, path, images().numpy()), "got ndarray"),
        (lambda: export_onnx(student, path, arithmetic="int"), "'int'"),
        (lambda: export_onnx(build_student(traced(Tiny(), (3, 8, 8)), QuantizationConfig()), path),
         "never observed"),
    ):  # fmt: skip
        with pytest.raises(AgmError) as caught:
            call()
        assert said in str(caught.value)
    find_spec = export.find_spec
    monkeypatch.setattr(
        export, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name)
    )
    with pytest.raises(ExportError, match=r"onnxscript.*pip install"):
        export_onnx(student, path)
    monkeypatch.undo()
    monkeypatch.delattr(torch.onnx, "ops")
    with pytest.raises(ExportError, match=r"torch >= 2\.8"):
        export_onnx(student, path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["scale", "weight"])
def test_a_step_that_is_nan(where):
    student = student_of(Tiny(), images())
    if where == "scale":
        next(m for n, m in student.named_modules() if n.endswith("quantizer")).observed_scale.fill_(
            torch.nan
        )
    else:
        student.get_submodule("conv1").parametrizations.weight.original.fill_(torch.nan)
    with pytest.raises(ExportError, match="diverged"):
        deployed(student)


def test_a_full_disk_leaves_nothing(small_disk):
    path = small_disk / "network.onnx"
    path.write_bytes(b"before")
    (small_disk / "filler").write_bytes(bytes(2**20 - 2**13))
    with pytest.raises(CheckpointError, match="intact"):
        export_onnx(student_of(Tiny(width=64), images()), path)
    assert path.read_bytes() == b"before"
    assert sorted(p.name for p in small_disk.iterdir()) == ["filler", "network.onnx"]


# Layers that stay in floating point, of all; and how much smaller than float32 the file is.
COUNTS = {
    "torchvision:mobilenet_v2": (2, 6.0),
    "torchvision:densenet121": (0.1, 1.0),
    "torchvision:googlenet": (0.1, 1.0),
    "torchvision:shufflenet_v2_x1_0": (0.1, 1.0),
    "efficientnet_lite_pytorch": (2, 1.0),
}


@pytest.mark.long
@pytest.mark.parametrize("name", COUNTS)
def test_convolutions_that_run_in_integers(name, tmp_path):
    from tests.baselines.quantization.test_architectures import network

    left, smaller = COUNTS[name]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        net = settle(network(name), 64, shift=1.0)
    x = images(16, 64)
    exported = export_onnx(student_of(net, x, weight_bits=4, act_bits=4), tmp_path / "a.onnx", x)
    session(tmp_path / "a.onnx", optimized=tmp_path / "fast.onnx")
    found = kinds(tmp_path / "fast.onnx")
    whole, of_floats = found.count("QLinearConv"), found.count("Conv")
    assert of_floats <= (left if left >= 1 else left * (whole + of_floats))
    assert exported.float_bytes >= smaller * exported.bytes
