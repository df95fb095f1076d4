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
from baselines.quantization.batch_norms import NormalisedConv
from baselines.quantization.quantizers import ActivationQuantizer, WeightQuantizer, observing
from baselines.quantization.student import QuantizationConfig, build_student
from baselines.training.trainer import Trainer
from tests.baselines import Tiny, bits, fill, images, weights

NETWORKS = ("resnet18", "mobilenet_v2", "vgg11_bn")
WEIGHTED = nn.Conv2d | nn.Linear


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
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
    with torch.no_grad():
        net.train()(images(64, 32))
    return net.eval()


def build(net, **config):
    return build_student(net, QuantizationConfig(**config))[0]


def observe(student, x):
    with torch.no_grad(), observing(student):
        student(x)
    return student


def quantizers(student):
    return [m for m in student.modules() if isinstance(m, ActivationQuantizer)]


def without_rounding(student, kinds=ActivationQuantizer | WeightQuantizer):
    for m in student.modules():
        if isinstance(m, kinds):
            m.forward = lambda x: x
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
    name, net = named
    x = images(16, 32, seed=1)
    eight, five, two = (
        error(observe(build(net, weight_bits=b, act_bits=b), x)(x), net(x)) for b in (8, 5, 2)
    )
    # Untrained networks amplify noise, the more so the deeper they are.
    assert eight < {"resnet18": 0.25, "mobilenet_v2": 0.7, "vgg11_bn": 0.15}[name]
    assert 2 * eight < five < two


def test_without_rounding_the_student_is_the_network(named):
    _, net = named
    x = images(4, 32).double()
    net = copy.deepcopy(net).double()
    want = net(x)
    for fold in (False, True):
        student = without_rounding(build(net, fold_batch_norm=fold))
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
        without_rounding(build(net, scheme=scheme, fold_batch_norm=f), ActivationQuantizer)(x)
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


def test_policy_lists_every_tensor(named):
    name, net = named
    _, policy = build_student(net, QuantizationConfig(weight_bits=4, act_bits=5))
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

    floats = [how for bits, how in activations.values() if bits == "float"]
    blocks = [m for m in net.modules() if hasattr(m, "use_res_connect")]
    expected = {  # the image, sums without a ReLU, linear outputs
        "resnet18": (1, 0, 8 + 3),  # 8 blocks' last BatchNorms, 3 downsamplings
        "mobilenet_v2": (1, sum(b.use_res_connect for b in blocks), 17),
        "vgg11_bn": (1, 0, 0),
    }[name]
    assert tuple(sum(w in how for how in floats) for w in ("image", "sum", "linear")) == expected
    for tensor in [*listed, *activations]:
        assert tensor in str(policy)


def test_layers_receive_what_the_policy_says(named):
    name, net = named
    x = images(4, 32)
    student = observe(build(net, weight_bits=3, act_bits=2), x)
    calls = inputs_and_weights(student, x)
    assert all(count_of_levels(channel) <= 8 for _, _, w in calls for channel in w)
    quantized = [count_of_levels(value) <= 4 for _, value, _ in calls]
    assert not quantized[0]  # the image
    if name != "mobilenet_v2":
        assert all(quantized[1:-1])
    else:  # projections and depthwise convolutions follow a ReLU6, expansions do not
        assert sum(quantized[1:-1]) == 17 + 17


def test_edge_bits(named):
    _, net = named
    student, policy = build_student(net, QuantizationConfig(weight_bits=2, act_bits=2, edge_bits=8))
    names = [f"{n}.weight" for n, m in net.named_modules() if isinstance(m, WEIGHTED)]
    for tensor, (width, _) in rows(policy, "weight").items():
        assert width == ("8" if tensor in (names[0], names[-1]) else "2")
    widths = [bits for bits, _ in rows(policy, "activation").values() if bits != "float"]
    assert widths == ["2"] * (len(widths) - 1) + ["8"]
    x = images(4, 32)
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
    student = observe(build(Functional(inplace), act_bits=2), x)
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
    """Either it is quantized, or it is refused; a policy that is wrong is neither."""
    x = images()
    try:
        student = observe(build(Statement(relu), act_bits=2), x)
    except UnsupportedLayerError:
        return
    _, (_, value, _) = inputs_and_weights(student, x)
    assert count_of_levels(value) <= 4


class Keywords(Tiny):
    def forward(self, x):
        x = F.relu(input=self.bn0(self.conv0(input=x)))
        return self.fc(input=x.mean((2, 3)))


@pytest.mark.parametrize("config", [{}, {"fold_batch_norm": True}, {"edge_bits": 8}], ids=str)
def test_inputs_by_keyword(config):
    net, x = Keywords(), images()
    student = observe(build(net, weight_bits=8, act_bits=8, **config), x)
    assert len(quantizers(student)) == 1
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
    _, policy = build_student(Joining(), QuantizationConfig(weight_bits=3, act_bits=3))
    bits = [bits for bits, _ in rows(policy, "activation").values()]
    assert sorted(bits) == ["3", "3", "float", "float"]  # and the image, and the average
    _, policy = build_student(Joining(), QuantizationConfig(edge_bits=8))
    widths = {name: bits for name, (bits, _) in rows(policy, "activation").items()}
    assert widths["relu"] == "8"
    assert widths["relu_1"] == "3"


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Linear(4, 3)
        fill(self, 0)

    def forward(self, x):
        x = self.act(self.conv(x))
        return self.fc(self.act(10 * x).amax((2, 3)))


def test_one_relu_used_twice_has_two_ranges():
    student = observe(build(Twice(), act_bits=4), images())
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
    student = without_rounding(build(net, fold_batch_norm=fold))
    assert torch.allclose(student(x), net(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fold", [False, True])
def test_batch_norms_with_and_without_bias_and_affine(affine, bias, fold):
    net = nn.Sequential(nn.Conv2d(3, 5, 3, bias=bias), nn.BatchNorm2d(5, affine=affine), nn.ReLU())
    net = fill(net + nn.Sequential(nn.Flatten(), nn.Linear(180, 2)), 0).double()
    student = without_rounding(build(net, fold_batch_norm=fold))
    assert not any(n.target == "1" for n in student.graph.nodes)  # no BatchNorm call is left
    assert torch.allclose(student(images().double()), net(images().double()), rtol=1e-10)


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


REFUSED = [
    (Recurrent(False), ("'rnn'", "LSTM")),
    (Recurrent(True), ("'rnn'", "LSTM")),
    (Holding(nn.ConvTranspose2d(4, 4, 2)), ("'extra'", "ConvTranspose2d")),
    (Holding(nn.GroupNorm(2, 4)), ("'extra'", "GroupNorm")),
    (Holding(nn.Sequential(nn.ReLU(), nn.PReLU())), ("'extra.1'", "PReLU")),
    (Holding(nn.Hardswish()), ("'extra'", "Hardswish")),
    (Holding(nn.SiLU()), ("'extra'", "SiLU")),
    (Holding(nn.LeakyReLU(0.1)), ("'extra'", "LeakyReLU")),
    (Holding(nn.Hardtanh(0, 1)), ("'extra'", "Hardtanh")),
    (Holding(F.gelu), ("gelu",)),
    (Holding(lambda x: x.clamp(min=0)), ("clamp",)),
    (Holding(lambda x: torch.clamp(x, 0, 6)), ("clamp",)),
    (Holding(lambda x: torch.maximum(x, x.new_zeros(()))), ("maximum",)),
    (Holding(nn.Threshold(0, 0)), ("'extra'", "Threshold")),
    (Holding(nn.Softsign()), ("'extra'", "Softsign")),
    (Holding(nn.LogSigmoid()), ("'extra'", "LogSigmoid")),
    (Holding(nn.Identity()), ("no ReLU",)),
    (Holding(F.hardswish), ("hardswish",)),
    (Holding(torch.sigmoid), ("sigmoid",)),
    (Holding(lambda x: x.tanh()), ("tanh",)),
    (Holding(lambda x: torch.matmul(x, x)), ("matmul",)),
    (Holding(lambda x: x @ x), ("matmul",)),
    (Holding(Scaled()), ("'extra.gain'",)),
    (Holding(Borrowing()), ("'extra.conv.weight'",)),
    (Holding(Branching()), ("Holding", "control flow")),
    (nn.Sequential(nn.Flatten(), nn.ReLU()), ("no Conv or Linear",)),
]


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


def test_refused_before_training_starts():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Tiny()

        def forward(self, x):
            return F.relu(self.net.bn0(self.net.conv0(x)))

    method, recipe = gdfq.paper(8)
    with pytest.raises(UnsupportedLayerError, match=r"logits \(N, C\), got \(2, 4, 8, 8\)"):
        Trainer(
            Features(), method=method, recipe=recipe, config=QuantizationConfig(),
            image_shape=(3, 8, 8),
        )  # fmt: skip
