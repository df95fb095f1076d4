"""Students of many architectures: what is quantized, what is not, what is refused."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from agm import AgmError
from baselines.errors import UnsupportedLayerError
from baselines.methods import gdfq
from baselines.quantization.batch_norms import NormalisedConv, with_folded_norms
from baselines.quantization.export import export_onnx
from baselines.quantization.policy import QuantizationConfig, bit_policy
from baselines.quantization.quantizers import (
    ActivationQuantizer,
    WeightQuantizer,
    observing,
    unquantized,
)
from baselines.quantization.student import build_student
from baselines.quantization.tracing import traced
from baselines.training.trainer import Trainer
from tests.baselines import Tiny, bits, fill, images, settle, weights

NETWORKS = ("resnet18", "mobilenet_v2", "vgg11_bn")
WEIGHTED = nn.Conv2d | nn.ConvTranspose2d | nn.Linear


def network(name):
    """Random weights and statistics; vgg's classifier made small."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "mobilenet_v2":
            net = torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.25)
        elif name == "vgg11_bn":
            features = torchvision.models.vgg11_bn(num_classes=1, init_weights=False).features
            net = nn.Sequential(features, nn.Flatten(), nn.Linear(512, 32), nn.ReLU(True))
            net += nn.Sequential(nn.Dropout(), nn.Linear(32, 10))
        else:
            net = torchvision.models.get_model(name, num_classes=10)
    return settle(net, 32)


def build(net, x=None, **config):
    """A student of ``net`` for images like ``x``, in their dtype."""
    x = images() if x is None else x
    return build_student(traced(net, tuple(x.shape[1:]), x.dtype), QuantizationConfig(**config))


def observe(student, x):
    with torch.no_grad(), observing(student):
        student(x)
    return student


def quantizers(student):
    return [m for m in student.modules() if isinstance(m, ActivationQuantizer)]


def without_rounding(student, kinds=ActivationQuantizer | WeightQuantizer):
    for m in student.modules():
        if isinstance(m, kinds):
            m.enabled = False
    return student


def error(got, want):
    """Relative, of what tells the images apart."""
    got, want = got - got.mean(0), want - want.mean(0)
    return float(((got - want).norm() / want.norm()).detach())


def inputs_and_weights(student, x):
    """Of every call of a Conv or Linear: (module, input, weight)."""
    seen, handles = [], []

    def see(m, args):
        m = m.conv if isinstance(m, NormalisedConv) else m
        seen.append((m, args[0], m.weight))

    for m in student.modules():
        if isinstance(m, WEIGHTED | NormalisedConv):
            handles.append(m.register_forward_pre_hook(see))
    with torch.no_grad():
        student(x)
    for handle in handles:
        handle.remove()
    return seen


def count_of_levels(tensor):
    return len(tensor.unique())


def rows(policy, kind):
    return {tensor: (bits, how) for tensor, k, bits, how in policy.rows if k == kind}


# Whole networks


@pytest.fixture(scope="module", params=NETWORKS)
def named(request):
    return request.param, network(request.param)


def test_a_step_of_training(named):
    _, net = named
    before = bits(net)
    method, recipe = gdfq.paper(32)
    trainer = Trainer(
        net,
        method=replace(method, width=8, latent_dim=8),
        recipe=replace(recipe, steps=2, batch_size=4, warmup=0.5, observe=0.5),
        config=QuantizationConfig(),
        image_shape=(3, 32, 32),
        precision="fp32",
    )
    trainer.step()
    start = weights(trainer.student)
    terms = trainer.step()
    assert {name[:2] for name in terms} == {"G/", "Q/"}
    assert all(term.isfinite() for term in terms.values())
    changed = [a != b for a, b in zip(start, weights(trainer.student), strict=True)]
    assert sum(changed) > 0.8 * len(changed)
    assert bits(net) == before


def test_eight_bits_are_close_and_fewer_are_further(named):
    net = settle(copy.deepcopy(named[1]), 32, shift=1.0)
    x = images(16, 32, seed=1)
    eight, five, two = (
        (observe(build(net, x, weight_bits=b, act_bits=b), x)(x) - net(x)).norm() / net(x).norm()
        for b in (8, 5, 2)
    )
    assert eight < 0.05
    assert 2 * eight < five < two


def test_without_rounding_the_student_is_the_network(named):
    _, net = named
    x = images(4, 32).double()
    net = copy.deepcopy(net).double()
    want = net(x)
    for fold in (False, True):
        student = without_rounding(build(net, x, fold_batch_norm=fold))
        assert torch.allclose(student(x), want, rtol=1e-9, atol=1e-9 * want.abs().max().item())
        assert any(isinstance(m, nn.BatchNorm2d) for m in student.modules()) != fold


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
def test_folding_leaves_quantized_weights_as_they_are(named, scheme):
    # Scaling a channel scales its levels, so folding changes nothing but the last digits.
    _, net = named
    net, x = copy.deepcopy(net).double(), images(4, 32).double()
    for m in list(net.modules())[::3]:
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data[::2] *= -1  # mirrors the range
    plain, folded = (
        without_rounding(build(net, x, scheme=scheme, fold_batch_norm=f), ActivationQuantizer)(x)
        for f in (False, True)
    )
    assert error(folded, plain) < 1e-9
    assert error(plain, net(x)) > 1e-3


def test_folding_at_eight_bits():
    net, x = Tiny(), images()
    plain, folded = (
        observe(build(net, weight_bits=8, act_bits=8, fold_batch_norm=f), x)(x)
        for f in (False, True)
    )
    assert error(folded, plain) < 1e-4
    assert error(folded, net(x)) < 0.05


@pytest.mark.parametrize("pool", [nn.AvgPool2d(1, 2), lambda x: F.avg_pool2d(x, 1, 2)])
def test_a_pool_of_one_value_is_no_average(pool):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.second, self.last = nn.Conv2d(4, 5, 3), nn.Linear(5, 6)
            self.pool = pool

        def forward(self, x):
            x = self.pool(F.relu(self.norm(self.first(x))))
            return self.last(self.second(x).mean((2, 3)))

    student = build_student(traced(Net().eval(), (3, 12, 12)), QuantizationConfig(2, 2))
    found = [bits for bits, _ in rows(bit_policy(student), "activation").values()]
    assert found == ["8", "2", "8"]  # the image, what the ReLU gives, the average


def test_policy_of_the_published_placement(named):
    name, net = named
    student = build(net, images(2, 32), weight_bits=4, act_bits=5, activations="relu")
    policy = bit_policy(student)
    listed = rows(policy, "weight")
    assert set(listed) == {f"{n}.weight" for n, m in net.named_modules() if isinstance(m, WEIGHTED)}
    assert {bits for bits, _ in listed.values()} == {"4"}

    calls, relus = [], [m for m in net.modules() if isinstance(m, nn.ReLU | nn.ReLU6)]
    handles = [m.register_forward_hook(lambda *_: calls.append(1)) for m in relus]
    net(images(2, 32))
    for handle in handles:
        handle.remove()
    activations = rows(policy, "activation")
    assert sum(bits == "5" for bits, _ in activations.values()) == len(calls)
    # The image and the last average; in MobileNetV2 also each expansion's input.
    expected = {"resnet18": 2, "mobilenet_v2": 2 + 16 + 1, "vgg11_bn": 1}[name]
    assert policy.floating == sum(bits == "float" for bits, _ in activations.values()) == expected
    for tensor in [*listed, *activations]:
        assert tensor in str(policy)


def test_policy_of_all_that_layers_read(named):
    _, net = named
    student = build(net, images(2, 32), weight_bits=4, act_bits=5, edge_bits=7)
    text = str(bit_policy(student)).splitlines()
    assert text[-1].startswith(f"left in floating point: 0 of {len(quantizers(student))} tensors")
    widths = [bits for bits, _ in rows(bit_policy(student), "activation").values()]
    assert widths[0] == widths[-1] == "7"  # the image, what the last layer reads
    assert set(widths[1:-1]) == {"5"}


@pytest.mark.parametrize("activations", ["inputs", "relu"])
def test_layers_receive_what_the_policy_says(named, activations):
    name, net = named
    x = images(4, 32)
    student = observe(build(net, x, weight_bits=3, act_bits=2, activations=activations), x)
    calls = inputs_and_weights(student, x)
    assert all(count_of_levels(channel) <= 8 for _, _, w in calls for channel in w)
    levels = [count_of_levels(value) for _, value, _ in calls]
    if activations == "inputs":
        assert max(levels[1:-1]) <= 4 < min(levels[0], levels[-1])
        assert max(levels) <= 256
    elif name != "mobilenet_v2":
        assert levels[0] > 256  # the image
        assert max(levels[1:-1]) <= 4
    else:  # projections and depthwise convolutions follow a ReLU6, expansions do not
        assert sum(n <= 4 for n in levels[1:-1]) == 17 + 17


@pytest.mark.parametrize("activations", ["inputs", "relu"])
def test_edge_bits(named, activations):
    _, net = named
    x = images(4, 32)
    config = dict(weight_bits=2, act_bits=2, edge_bits=6, activations=activations)
    student = build(net, x, **config)
    policy = bit_policy(student)
    names = [f"{n}.weight" for n, m in net.named_modules() if isinstance(m, WEIGHTED)]
    for tensor, (width, _) in rows(policy, "weight").items():
        assert width == ("6" if tensor in (names[0], names[-1]) else "2")
    widths = [bits for bits, _ in rows(policy, "activation").values() if bits != "float"]
    inner = widths[1:-1] if activations == "inputs" else widths[:-1]
    assert widths == widths[: len(widths) - len(inner) - 1] + inner + ["6"]
    assert set(inner) == {"2"}
    calls = inputs_and_weights(observe(student, x), x)
    finest = [max(count_of_levels(channel) for channel in w) for _, _, w in calls]
    assert min(finest[0], finest[-1]) > 4 >= max(finest[1:-1])


# Small networks


class Functional(nn.Module):
    """A ReLU in each of its spellings, the network never quantized the same way twice."""

    def __init__(self, inplace=False):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(7))
        self.act, self.act6, self.fc = nn.ReLU(inplace), nn.ReLU6(inplace), nn.Linear(3, 4)
        self.inplace = inplace
        fill(self, 3)

    def forward(self, x):
        out_of_place = (
            F.relu, torch.relu, lambda x: x.relu(), F.relu6, self.act, self.act6, torch.relu
        )  # fmt: skip
        in_place = (
            F.relu_, torch.relu_, lambda x: x.relu_(), lambda x: F.relu6(x, inplace=True),
            self.act, self.act6, lambda x: F.relu(x, True),
        )  # fmt: skip
        for conv, relu in zip(self.convs, in_place if self.inplace else out_of_place, strict=True):
            x = relu(conv(x))
        return self.fc(x.flatten(2).amax(2))


@pytest.mark.parametrize("inplace", [False, True])
def test_every_spelling_of_relu(inplace):
    x = images()
    student = observe(build(Functional(inplace), act_bits=2, activations="relu"), x)
    assert len(quantizers(student)) == 7
    for _, value, _ in inputs_and_weights(student, x)[1:]:
        assert count_of_levels(value) <= 4
    assert len({q.scale.item() for q in quantizers(student)}) == 7


@pytest.mark.parametrize("ste", ["identity", "clipped"])
def test_in_place_is_out_of_place(ste):
    x, results = images(), []
    for inplace in (False, True):
        student = observe(build(Functional(inplace), ste=ste), x)
        out = student.requires_grad_(True)(x)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in student.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Statement(nn.Module):
    """An in-place ReLU for its effect alone."""

    def __init__(self, relu):
        super().__init__()
        self.conv, self.conv1, self.relu = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), relu
        fill(self, 0)

    def forward(self, x):
        x = self.conv(x)
        self.relu(x)
        return self.conv1(x).mean((2, 3))


@pytest.mark.parametrize("relu", [nn.ReLU(inplace=True), torch.relu_])
def test_an_in_place_relu_whose_result_is_not_used(relu):
    """Who reads its input afterwards reads what it made of it."""
    net, x = Statement(relu), images()
    student = observe(build(net, act_bits=2, edge_bits=2), x)
    _, (_, value, _) = inputs_and_weights(student, x)
    assert count_of_levels(value) <= 4
    with unquantized(student):
        assert torch.allclose(student(x), net(x), atol=1e-6)


class Keywords(Tiny):
    def forward(self, x):
        x = F.relu(input=self.bn0(self.conv0(input=x)))
        return self.fc(input=x.mean((2, 3)))


@pytest.mark.parametrize("config", [{}, {"fold_batch_norm": True}, {"edge_bits": 8}], ids=str)
def test_inputs_by_keyword(config):
    net, x = Keywords(), images()
    student = observe(build(net, weight_bits=8, act_bits=8, **config), x)
    assert len(quantizers(student)) == 2
    assert error(student(x), net(x)) < 0.05


class Joining(nn.Module):
    """Quantized tensors that are joined, cut and shuffled, and one that is not quantized."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.c, self.fc = nn.Conv2d(6, 4, 1), nn.Linear(8, 3)
        fill(self, 0)

    def forward(self, x):
        first, second = self.a(x).relu(), F.relu(self.b(x))
        kept, cut = torch.cat([first, second], 1).transpose(1, 2).chunk(2, 2)
        cut = torch.cat([cut.permute(0, 2, 1, 3), kept.transpose(1, 2)[:, :2]], 1)
        return self.fc(torch.cat([self.c(cut), first], 1).mean((2, 3)))


def test_values_are_followed_through_what_only_moves_them():
    x = images()
    policy = bit_policy(build(Joining(), act_bits=3))
    widths = {name: bits for name, (bits, _) in rows(policy, "activation").items()}
    # The concatenation that is cut and shuffled on its way is no maker: the last one is.
    assert widths == {"images": "8", "cat_1": "3", "mean": "8"}
    policy = bit_policy(build(Joining(), activations="relu", edge_bits=8))
    widths = {name: bits for name, (bits, _) in rows(policy, "activation").items()}
    assert widths["relu"] == "8"
    assert widths["relu_1"] == "3"
    student = observe(build(Joining(), act_bits=2), x)
    _, _, (_, value, _), _ = inputs_and_weights(student, x)
    assert count_of_levels(value) <= 4


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Linear(4, 3)
        fill(self, 0)

    def forward(self, x):
        x = self.act(self.conv(x))
        return self.fc(self.act(10 * x).amax((2, 3)))


def test_one_relu_used_twice_has_two_ranges():
    student = observe(build(Twice(), act_bits=4, activations="relu"), images())
    first, second = (q.scale.item() for q in quantizers(student))
    assert second == pytest.approx(10 * first, rel=1e-5)


class Shared(nn.Module):
    """One convolution with two BatchNorms, and one whose output is used before its BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv, self.conv1 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.a, self.b, self.c = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.first, self.fc = nn.BatchNorm2d(3), nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        fill(self, 5)

    def forward(self, x):
        x = self.a(self.conv(self.first(x))).relu()
        x = self.b(self.conv(x)).relu()
        y = self.conv1(x)
        return self.norm(self.fc((y + self.c(y)).relu().mean((2, 3))))


@pytest.mark.parametrize("fold", [False, True])
def test_convolutions_take_their_batch_norm_only_where_it_is_exact(fold):
    net, x = Shared().double(), images().double()
    student = without_rounding(build(net, x, fold_batch_norm=fold))
    assert torch.allclose(student(x), net(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("parts", [(), ("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fold", [False, True])
def test_batch_norms_with_and_without_bias_and_affine(parts, bias, fold):
    norm = nn.BatchNorm2d(5)
    for part in {"weight", "bias"} - set(parts):
        setattr(norm, part, None)
    net = nn.Sequential(nn.Conv2d(3, 5, 3, bias=bias), norm, nn.ReLU())
    net, x = fill(net + nn.Sequential(nn.Flatten(), nn.Linear(180, 2)), 0).double(), images()
    student = without_rounding(build(net, x.double(), fold_batch_norm=fold))
    assert not any(n.target == "1" for n in student.graph.nodes)  # no BatchNorm call is left
    assert torch.allclose(student(x.double()), net(x.double()), rtol=1e-10)
    teacher = with_folded_norms(traced(net, (3, 8, 8)))
    assert torch.allclose(teacher(x), net.float()(x), atol=1e-5)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_the_teacher_is_untouched_and_unshared(fold, train):
    net = Functional() if train else Tiny()
    net.train(train)
    next(net.parameters()).requires_grad_(False)
    next(net.parameters()).grad = None
    before = bits(net)
    student = build(net, fold_batch_norm=fold)
    assert not any(m.training for m in student.modules())
    with torch.no_grad():
        for value in student.state_dict().values():
            value.add_(1)
    observe(student, images())
    assert bits(net) == before


def test_a_student_of_a_teacher_in_train_mode_is_the_same():
    net, x = Tiny(), images()
    results = [observe(build(net.train(mode)), x)(x) for mode in (True, False)]
    assert torch.equal(*results)


# Refusals


class Holding(nn.Module):
    """conv -> extra layer or function -> linear."""

    def __init__(self, extra):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)
        self.extra = extra

    def forward(self, x):
        return self.fc(self.extra(self.conv(x)).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, unpacked):
        super().__init__()
        self.conv, self.rnn, self.fc = nn.Conv2d(3, 4, 1), nn.LSTM(4, 4), nn.Linear(4, 2)
        self.unpacked = unpacked

    def forward(self, x):
        x = self.conv(x).mean(3).transpose(1, 2)
        if self.unpacked:
            x, _ = self.rnn(x)
        else:
            x = self.rnn(x)[0]
        return self.fc(x.mean(1))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        return self.gain * x


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Borrowing(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return F.conv2d(x, self.conv.weight)


class Computed(nn.Module):
    def __init__(self):
        super().__init__()
        self.make = nn.Linear(4, 16)

    def forward(self, x):
        return F.conv2d(x, self.make(x.mean((0, 2, 3))).view(4, 4, 1, 1))


class Spectrum(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1, dtype=torch.complex64)

    def forward(self, x):
        return self.conv(x.to(torch.complex64)).abs()


class Packed(nn.Linear):
    """As torch's own quantized layers: its weights are no parameters."""

    __module__ = "torch.nn.somewhere"  # so that it is not followed inside

    def __init__(self):
        super().__init__(8, 8)
        self.packed = self.weight.detach().clone()
        del self.weight, self.bias

    def forward(self, x):
        return x @ self.packed

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "_packed_params"] = (self.packed, None)


REFUSED = [
    (Recurrent(False), ("'rnn'", "LSTM")),
    (Recurrent(True), ("'rnn'", "LSTM")),
    (Holding(nn.GroupNorm(2, 4)), ("'extra'", "GroupNorm")),
    (Holding(nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (8, 8)), nn.LayerNorm(8))),
     ("'extra.2'", "LayerNorm")),
    (Holding(lambda x: torch.matmul(x, x)), ("matmul", "attention")),
    (Holding(lambda x: x @ x), ("matmul", "attention")),
    (Holding(lambda x: torch.einsum("nchw,nchv->ncwv", x, x)), ("einsum", "attention")),
    (Holding(lambda x: F.scaled_dot_product_attention(x, x, x)), ("scaled_dot", "attention")),
    (Holding(Scaled()), ("'extra.gain'", "outside of a layer")),
    (Holding(Computed()), ("conv2d", "computed from the images")),
    (Holding(Branching()), ("Holding", "control flow")),
    (nn.Sequential(nn.Flatten(), nn.ReLU()), ("no Conv or Linear",)),
    (Holding(Spectrum()), ("'extra.conv'", "real numbers")),
    (Holding(Packed()), ("'extra'", "Packed", "cannot be quantized")),
]  # fmt: skip


@pytest.mark.parametrize(("net", "parts"), REFUSED, ids=lambda v: v[-1] if type(v) is tuple else "")
@pytest.mark.parametrize("fold", [False, True])
def test_refused_by_name(net, parts, fold):
    before = bits(net)
    with pytest.raises(UnsupportedLayerError) as caught:
        build(net, fold_batch_norm=fold)
    for part in parts:
        assert part in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, AgmError)
    assert bits(net) == before


def test_no_relu_to_quantize_behind():
    with pytest.raises(UnsupportedLayerError, match="choose activations='inputs'"):
        build(Holding(nn.Identity()), activations="relu")


ACTIVATIONS = [
    nn.Hardswish(), nn.SiLU(), nn.LeakyReLU(0.1), nn.Hardtanh(0, 1), F.gelu, F.hardswish,
    lambda x: x.clamp(min=0), lambda x: torch.clamp(x, 0, 6), nn.Threshold(0, 0), nn.Softsign(),
    lambda x: torch.maximum(x, x.new_zeros(())), nn.LogSigmoid(), torch.sigmoid,
    lambda x: x.tanh(), nn.PReLU(), nn.Identity(), lambda x: x * F.relu6(x + 3) / 6,
    lambda x: x.sigmoid_(), lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    lambda x: torch.cat([x[:, ::2], F.silu(x[:, 1::2])], 1), lambda x: x + x.flip(1),
    lambda x: F.pad(F.relu(x), (1, 1, 1, 1)),
    lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), lambda x: x.square().sqrt(),
]  # fmt: skip


class Between(nn.Module):
    """conv -> BatchNorm -> anything -> conv -> BatchNorm -> linear."""

    def __init__(self, anything, conv=nn.Conv2d):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.anything, self.next, self.norm1 = anything, conv(4, 6, 3), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)
        fill(self, 1)

    def forward(self, x):
        x = self.anything(self.norm(self.conv(x)))
        return self.fc(self.norm1(self.next(x)).mean((2, 3)))


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("anything", ACTIVATIONS, ids=range(len(ACTIVATIONS)))
def test_whatever_made_it_a_layer_reads_a_quantized_tensor(anything, fold):
    net, x = Between(anything), images()
    student = observe(build(net, act_bits=2, fold_batch_norm=fold), x)
    (_, image, _), (_, value, _), (_, average, _) = inputs_and_weights(student, x)
    assert count_of_levels(value) <= 4
    assert 4 < count_of_levels(image) <= 256
    assert 4 < count_of_levels(average) <= 256
    assert bit_policy(student).floating == 0
    with unquantized(student):
        assert torch.allclose(student(x), net(x), atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.5, -1e4, -torch.inf])
@pytest.mark.parametrize("module", [False, True])
def test_what_a_max_pool_leaves_out_again_takes_no_part_in_a_range(value, module, tmp_path):
    anything = nn.Sequential(nn.ReLU(), nn.ConstantPad2d((0, 1, 0, 1), value), nn.MaxPool2d(3, 2))
    if not module:
        anything = lambda x: F.max_pool2d(F.pad(F.relu(x), (0, 1, 0, 1), value=value), 3, 2)  # noqa: E731
    net, x = Between(anything), images()
    student = observe(build(net, weight_bits=8, act_bits=8, range_estimator="mse"), x)
    assert error(student(x), net(x)) < 0.05
    assert len(bit_policy(student).rows) == 6
    exported = export_onnx(student, tmp_path / "a.onnx", x)
    assert exported.integer_layers == 2  # the last layer gives logits


def test_a_range_that_is_not_finite_is_named():
    quantizer = ActivationQuantizer(3, scheme="asymmetric", ste="clipped", range_estimator="max")
    quantizer.observing = True
    with pytest.raises(UnsupportedLayerError, match=r"not finite: its range is \[-inf, 1\]"):
        quantizer(torch.tensor([1.0, -torch.inf]))


class Volumes(nn.Module):
    """Images as volumes of two layers, through a pooled mean of three dimensions."""

    def __init__(self, pool):
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4), pool
        self.next, self.fc = nn.Conv3d(4, 6, 1), nn.Linear(6, 5)
        fill(self, 0)

    def forward(self, x):
        x = self.norm(self.conv(x.unflatten(2, (2, 4)))).relu()
        return self.fc(self.next(self.pool(x)).relu().mean((2, 3, 4)))


@pytest.mark.parametrize(
    ("pool", "bits"),
    [(nn.AvgPool3d(2), "8"), (nn.AdaptiveAvgPool3d(2), "8"), (nn.AvgPool3d(1), "3"),
     (lambda x: F.avg_pool3d(x, 2), "8"), (lambda x: F.adaptive_avg_pool3d(x, 1), "8"),
     (lambda x: F.avg_pool3d(x, (1, 1, 1)), "3")],
)  # fmt: skip
def test_averages_of_any_dimension_have_eight_bits(pool, bits):
    policy = bit_policy(build(Volumes(pool), act_bits=3))
    assert [b for b, _ in rows(policy, "activation").values()] == ["8", bits, "8"]


@pytest.mark.parametrize("upsample", [nn.Upsample(scale_factor=2), nn.UpsamplingNearest2d(16)])
def test_copies_of_pixels_are_no_new_tensor(upsample):
    student = build(Between(nn.Sequential(nn.ReLU(), upsample)))
    assert quantizers(student)[1].nonnegative


@pytest.mark.parametrize("pool", [nn.AdaptiveMaxPool3d(1), lambda x: F.adaptive_max_pool3d(x, 1)])
def test_the_largest_of_volumes_are_no_new_tensor(pool):
    assert quantizers(build(Volumes(pool)))[1].nonnegative


def test_an_image_that_a_batch_norm_reads_first_has_eight_bits():
    net = nn.Sequential(nn.BatchNorm2d(3), Tiny())
    policy = bit_policy(build(fill(net, 0), act_bits=3))
    assert [b for b, _ in rows(policy, "activation").values()] == ["8", "3", "8"]


def test_every_layer_that_no_other_stands_behind_is_a_last_one():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.inner = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
            self.fc, self.gate = nn.Linear(256, 5), nn.Linear(4, 5)
            fill(self, 0)

        def forward(self, x):
            x = F.relu(self.inner(F.relu(self.conv(x))))
            return self.fc(x.flatten(1)) * self.gate(F.relu(x.amax((2, 3)) - 0.1)).sigmoid()

    policy = bit_policy(build(Heads(), act_bits=3, weight_bits=3))
    read = {name: width for name, (width, _) in rows(policy, "activation").items()}
    assert read == {"images": "8", "relu": "3", "relu_1": "8", "relu_2": "8"}
    edges = bit_policy(build(Heads(), weight_bits=3, edge_bits=6))
    weights = {name: width for name, (width, _) in rows(edges, "weight").items()}
    assert weights == {
        "conv.weight": "6",
        "inner.weight": "3",
        "fc.weight": "6",
        "gate.weight": "6",
    }


def test_a_layer_of_a_quantizers_name_stays_that_layer():
    class Named(Tiny):
        def __init__(self):
            super().__init__()
            self.relu_quantizer = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.fc(self.relu_quantizer(F.relu(self.conv0(x))).mean((2, 3)))

    net = fill(Named(), 0)
    student = build(net)
    with torch.no_grad(), unquantized(student):
        assert torch.allclose(student(images()), net(images()), atol=1e-5)
    assert "relu_quantizer.weight" in rows(bit_policy(student), "weight")


def test_signs_and_zero_points():
    x = images()
    expected = {
        "unsigned,": nn.ReLU(), "unsigned, zero point": nn.SiLU(), "unsigned, max": torch.sigmoid,
    }  # fmt: skip
    for how, activation in expected.items():
        student = observe(build(Between(activation), act_bits=4), x)
        row = [r for r in bit_policy(student).rows if r[1] == "activation"][1]
        assert how in row[3].replace("unsigned, max", "unsigned, max")
        assert ("zero point" in row[3]) == ("zero" in how)
        student = observe(build(Between(activation), act_bits=4, scheme="symmetric"), x)
        row = [r for r in bit_policy(student).rows if r[1] == "activation"][1]
        assert ("unsigned" not in row[3]) == ("zero" in how)
        assert all(q.zero_point == 0 for q in quantizers(student))
    assert "not yet seen" in str(bit_policy(build(Between(nn.SiLU()))))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
def test_a_transposed_convolution_is_quantized_per_output_channel(groups, scheme):
    net = Between(nn.ReLU(), lambda a, b, k: nn.ConvTranspose2d(a, b, k, groups=groups))
    with torch.no_grad():  # channels of very different sizes
        net.next.weight.mul_(torch.logspace(-3, 3, 6 // groups)[:, None, None])
    x = images()
    student = observe(build(net, weight_bits=3, act_bits=8, scheme=scheme), x)
    (_, _, _), (_, _, weight), (_, _, _) = inputs_and_weights(student, x)
    for group in range(groups):
        rows_in = slice(group * 4 // groups, (group + 1) * 4 // groups)
        for channel in range(6 // groups):
            got, want = weight[rows_in, channel], net.next.weight[rows_in, channel]
            assert 2 < count_of_levels(got) <= 8
            assert (got - want).abs().max() <= want.abs().max()
    without_rounding(student)
    assert torch.allclose(student(x), net(x), rtol=1e-4, atol=1e-4)


def test_refused_before_training_starts():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Tiny()

        def forward(self, x):
            return F.relu(self.net.bn0(self.net.conv0(x)))

    method, recipe = gdfq.paper(8)
    with pytest.raises(UnsupportedLayerError, match=r"logits \(N, C\).*returned \(5, 4, 8, 8\)"):
        Trainer(
            Features(), method=method, recipe=recipe, config=QuantizationConfig(),
            image_shape=(3, 8, 8),
        )  # fmt: skip
