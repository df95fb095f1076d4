"""Traced copies against the networks themselves: the same numbers, or a named error."""

import copy
import threading
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.spectral_norm import spectral_norm
from torch.nn.utils.weight_norm import weight_norm

from agm import AGM
from baselines import quantize
from baselines.errors import ConfigError, UnsupportedLayerError
from baselines.quantization.copying import image_channels
from baselines.quantization.policy import QuantizationConfig
from baselines.quantization.quantizers import observing
from baselines.quantization.reference import Reference
from baselines.quantization.student import build_student
from baselines.quantization.tracing import traced
from tests.agm import elsewhere
from tests.baselines import Head, Tiny, bits, fill, images

SHAPE = (3, 8, 8)


def check(network, x=None):
    """The traced copy, once it has been compared."""
    x = images() if x is None else x
    graph = traced(network, tuple(x.shape[1:]), x.dtype)
    Reference(network, x).check(graph, "traced")
    return graph


# Arguments, branches, sizes


class Tasks(Tiny):
    """Without a task it adds a constant that it does not add with one."""

    def forward(self, x, task=None, *, scale=2.0, more=()):
        logits = super().forward(x) * scale
        if task is not None:
            return -logits
        return logits + 1 if not more else logits


def test_defaults_of_further_arguments_are_bound():
    net, x = Tasks(), images()
    assert torch.equal(check(net)(x), net(x))


class Sizes(nn.Module):
    """Computes and branches with sizes, also that of the batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(36, 5)
        fill(self, 0)

    def forward(self, x):
        h, w = x.size()[-2:]
        if h % 2 == 0 and max(h, w) > 4 and x.dim() == 4 and x.ndim == 4:
            x = F.pad(x, (0, -h % 3, 0, w // 100))
        batch, channels, h, w = self.conv(x).shape
        x = self.norm(self.conv(x)).view(batch, channels, -1)
        x = x.reshape(len_of(x), 2, channels // 2, h * w).transpose(1, 2)
        first, second = x.chunk(2, dim=1)
        x = torch.cat([first, second], 1).reshape(x.size(0), -1)
        assert x.shape == (batch, 2 * (h * w) * channels // 2)
        return self.fc(x[:, :36])


def len_of(x):
    return x.size(0)


@pytest.mark.parametrize("n", [1, 5])
def test_sizes_are_numbers_and_the_batch_is_free(n):
    net = Sizes()
    graph, x = check(net), images(n, seed=3)
    assert torch.equal(graph(x), net(x))


class Value(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Tiny()

    def forward(self, x):
        return self.net(x) if x.mean() > -100 else self.net(-x)


def test_a_branch_on_values_is_refused():
    with pytest.raises(UnsupportedLayerError, match=r"Value cannot be traced.*control flow"):
        check(Value())


class Frozen(Tiny):
    """Keeps a number that it computed from values, which a trace takes for a constant."""

    def forward(self, x):
        level, self.level = self.level, 3.0
        return super().forward(x) * level


def test_a_network_that_changes_by_being_asked_is_refused():
    net = Frozen()
    net.level = 1.0
    with pytest.raises(UnsupportedLayerError, match="something else"):
        check(net)
    assert net.level == 1.0


def test_a_noisy_network_is_refused():
    with pytest.raises(UnsupportedLayerError, match="must be deterministic"):
        check(Head(lambda x: F.dropout(x, 0.5, training=True)))


def test_images_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"does not take 2x8x8 images.*in_channels"):
        check(Tiny(), images(channels=2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(value):
    net = Tiny()
    with torch.no_grad():
        net.fc.bias[1] = value
    with pytest.raises(UnsupportedLayerError, match="not finite"):
        check(net)


# Hooks and patched forwards


def hooked(kind):
    net = Tiny()
    change = {
        "forward": lambda: net.bn0.register_forward_hook(lambda m, i, o: o + 1),
        "pre": lambda: net.conv1.register_forward_pre_hook(lambda m, i: (i[0] + 1,)),
        "pre with keywords": lambda: net.fc.register_forward_pre_hook(
            lambda m, i, k: ((i[0] + 1,), k), with_kwargs=True
        ),
        "network": lambda: net.register_forward_hook(lambda m, i, o: 2 * o),
    }
    change[kind]()
    return net


@pytest.mark.parametrize(
    ("kind", "where"), [("forward", "'bn0' (BatchNorm2d)"), ("pre", "'conv1' (Conv2d)"),
                        ("pre with keywords", "'fc' (Linear)"), ("network", "no layer's output")]
)  # fmt: skip
def test_what_depends_on_a_hook_is_refused_by_the_first_layer_that_differs(kind, where):
    net = hooked(kind)
    before = bits(net)
    with pytest.raises(UnsupportedLayerError) as caught:
        check(net)
    assert where in str(caught.value)
    assert "Hooks" in str(caught.value)
    assert bits(net) == before


def test_a_hook_that_only_looks_is_not_copied_and_hardly_run():
    net, seen = Tiny(), []
    net.conv0.register_forward_hook(lambda m, i, o: seen.append(1))
    net.register_full_backward_hook(lambda m, i, o: seen.append(2))
    result = quantize(
        net, steps=6, batch_size=4, image_size=8, weight_bits=4, act_bits=4, hooks=[AGM()]
    )
    assert seen == [1]  # the one comparison
    assert not any(m._forward_hooks or m._backward_hooks for m in result.model.modules())


def test_a_forward_of_the_instance_is_followed():
    net, x = Tiny(), images()
    net.forward = types.MethodType(lambda self, x: Tiny.forward(self, x) + 1, net)
    net.bn0.forward = types.MethodType(lambda self, x: nn.BatchNorm2d.forward(self, x) - 1, net.bn0)
    assert torch.allclose(check(net)(x), net(x))


def test_a_patched_forward_that_holds_the_network_itself_is_refused():
    net = Tiny()
    inner = net.conv0.forward
    net.conv0.forward = lambda x: inner(x) + 1
    with pytest.raises(UnsupportedLayerError):
        check(net)


@pytest.mark.parametrize("masked", [-1e4, -1e9])
def test_a_masked_class_hides_no_difference(masked):
    class Masked(Tiny):
        def forward(self, x):
            y = super().forward(x)
            return torch.cat([y, y[:, :1] + masked, torch.full_like(y[:, :1], masked)], 1)

    net = Masked()
    check(net)
    net.conv1.register_forward_hook(lambda m, i, o: -3 * o)
    with pytest.raises(UnsupportedLayerError, match="'conv1'"):
        check(net)


def test_tensors_that_the_forward_makes():
    class Normalised(Tiny):
        def __init__(self):
            super().__init__()
            self.constant0 = "taken"

        def forward(self, x):
            x = (x - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)) * torch.full((1, 3, 1, 1), 2.0)
            return super().forward(x[:, torch.arange(3).flip(0)])

    graph = check(Normalised())
    assert torch.equal(check(graph)(images()), graph(images()))  # a copy of the copy


def test_a_copy_that_knows_one_size_of_batch_alone():
    class Two(Tiny):
        def forward(self, x):
            return super().forward(x.view(2, 3, 8, 8))

    with pytest.raises(ConfigError, match=r"does not take 3x8x8 images.*a batch of any size"):
        quantize(Two(), image_size=8, steps=4)


def test_a_parallel_networks_module_is_traced():
    check(nn.DataParallel(Tiny()).eval())


# Weights that are made by something


def wrapped(kind):
    net = Head(conv=nn.Conv2d(3, 4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if kind == "weight_norm":
            weight_norm(net.conv)
        elif kind == "spectral_norm":
            spectral_norm(net.fc)
            net.train()(images())  # its vectors settle
        elif kind == "parametrized weight_norm":
            parametrizations.weight_norm(net.conv)
        elif kind == "parametrized spectral_norm":
            parametrizations.spectral_norm(net.fc)
        elif kind == "orthogonal":
            parametrizations.orthogonal(net.fc)
        elif kind == "own":
            parametrize.register_parametrization(net.conv, "weight", nn.Tanh())
        elif kind == "pruned":
            prune.l1_unstructured(net.conv, "weight", 0.5)
            prune.random_unstructured(net.conv, "bias", 1)
        elif kind == "pruned twice":
            prune.l1_unstructured(net.fc, "weight", 0.3)
            prune.ln_structured(net.fc, "weight", 0.5, 2, 0)
    return net.eval()


WRAPPED = (
    "weight_norm", "spectral_norm", "parametrized weight_norm", "parametrized spectral_norm",
    "orthogonal", "own", "pruned", "pruned twice",
)  # fmt: skip


@pytest.mark.parametrize("kind", WRAPPED)
def test_reparametrized_weights_are_baked(kind):
    net, x = wrapped(kind), images(32)
    before, want = bits(net), net(x)
    graph = check(net)
    assert {name for name, _ in graph.named_parameters()} == {
        "conv.weight", "conv.bias", "norm.weight", "norm.bias", "fc.weight", "fc.bias",
    }  # fmt: skip
    assert torch.allclose(graph(x), want, atol=1e-6)
    student = build_student(graph, QuantizationConfig(8, 8, fold_batch_norm=True))
    with torch.no_grad(), observing(student):
        student(x)
    assert (student(x) - want).norm() < 0.03 * want.norm()
    assert bits(net) == before


class Standardised(nn.Conv2d):
    """Weight standardisation, and a learned gain."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, self.gain * w / (w.std((1, 2, 3), keepdim=True) + 1e-5), None)


class SamePadded(nn.Conv2d):
    """Pads by itself, as TensorFlow does."""

    def forward(self, x):
        h, w = x.shape[-2:]
        return F.conv2d(
            F.pad(x, (0, max(w % 2 + 1, 0), 0, h % 2 + 1)), self.weight, self.bias, self.stride
        )


class NormAct(nn.BatchNorm2d):
    """As timm's: a BatchNorm that also activates, by functions."""

    def __init__(self, features):
        super().__init__(features)
        self.act = nn.SiLU()

    def forward(self, x):
        torch._assert(x.ndim == 4, "expected 4D")
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1,
            self.eps,
        )  # fmt: skip
        return self.act(x)


class Borrowing(nn.Module):
    """Uses the weights of a layer by functions, twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return F.conv2d(F.conv2d(x, self.conv.weight), self.conv.weight)


class Loose(nn.Module):
    """A weight of its own, beside a layer."""

    def __init__(self):
        super().__init__()
        self.weight, self.conv = nn.Parameter(torch.randn(3, 3, 1, 1)), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return F.conv2d(self.conv(x), self.weight, padding="same")


class Tied(nn.Module):
    """There and back by one weight, of a name that no layer has."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 3, 3, 3))

    def forward(self, x):
        x = F.relu(F.conv2d(x, self.kernel, padding=1))
        return F.conv_transpose2d(x, self.kernel, padding=1)


class Lists(nn.Module):
    """Weights in lists, and one bias for two of them."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(3, 3, 1, 1) for _ in range(2)])
        self.shared = nn.ParameterDict({"offset": torch.randn(3)})

    def forward(self, x):
        for weight in self.weights:
            x = F.relu(F.conv2d(x, weight, self.shared["offset"]))
        return x


class Product(nn.Module):
    """What torch.fx calls the product is the name of the bias, too."""

    def __init__(self):
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(3, 3, 1, 1)), nn.Parameter(torch.ones(1))
        self.weight_mul = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return F.conv2d(x, self.weight * self.gain, self.weight_mul)


def norm_without(part):
    norm = nn.BatchNorm2d(4)
    setattr(norm, part, None)
    return norm


OWN_FORWARDS = {
    "tied": (Head(Tied()), 1),
    "lists": (Head(Lists()), 1),
    "product": (Head(Product()), 1),
    "scale alone": (Head(norm=norm_without("bias")), 1),
    "shift alone": (Head(norm=norm_without("weight")), 1),
    "neither": (Head(norm=setattr(n := norm_without("weight"), "bias", None) or n), 1),
    "standardised": (Head(conv=Standardised(3, 4, 3)), 1),
    "same padding": (Head(conv=SamePadded(3, 4, 3, stride=2)), 1),
    "norm and activation": (Head(norm=NormAct(4)), 1),
    "all three": (Head(SamePadded(3, 3, 3), Standardised(3, 4, 3), NormAct(4)), 1),
    "borrowed": (Head(Borrowing()), 1),
    "loose": (Head(Loose()), 1),
    "sync": (Head(norm=nn.SyncBatchNorm(4)), 1),
    "norm first": (Head(nn.BatchNorm2d(3)), 2),
    "norm first, by a function": (Head(nn.Sequential(NormAct(3), nn.ReLU())), 2),
    "without affine": (Head(norm=nn.BatchNorm2d(4, affine=False)), 1),
    "affine by a function": (Head(norm=NormAct(4)), 1),
    "transposed": (Head(conv=nn.ConvTranspose2d(3, 4, 3, stride=2, groups=1)), 1),
    "reflecting": (Head(conv=nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")), 1),
}


@pytest.mark.parametrize(("net", "norms"), OWN_FORWARDS.values(), ids=OWN_FORWARDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_end_up_in_torchs_own_layers(net, norms, dtype):
    net, x = copy.deepcopy(fill(net, 3)).to(dtype), images(4, 8).to(dtype)
    graph = check(net, x)
    error = (graph(x) - net(x)).abs().max()
    assert error <= (1e-12 if dtype == torch.float64 else 1e-5) * net(x).abs().max()
    assert sum(isinstance(m, nn.BatchNorm2d) for m in graph.modules()) == norms
    student = build_student(graph, QuantizationConfig(act_bits=2, fold_batch_norm=True))
    assert not any(n.op == "get_attr" for n in student.graph.nodes)
    assert {name for name, _ in graph.named_parameters()} >= {"fc.weight", "fc.bias"}


def test_a_weight_used_twice_is_one_weight():
    graph = check(Head(Borrowing()))
    assert sum(isinstance(m, nn.Conv2d) for m in graph.modules()) == 2  # and the head's own


def test_gradients_are_those_of_the_network():
    net = OWN_FORWARDS["norm and activation"][0].double()
    graph, x = check(net, images().double()), images().double().requires_grad_()
    ours = torch.autograd.grad(graph(x).square().sum(), x)
    theirs = torch.autograd.grad(net(x).square().sum(), x)
    assert torch.allclose(*ours, *theirs)


# In place


def shared_after(x):
    y = x * 1.0
    z = F.relu(y, inplace=True)
    return y + z


def shared_before(x):
    y = x * 1.0
    kept = y + 1
    y += 2
    y.mul_(3.0)
    torch.relu_(y)
    return kept * y.sub_(0.5)


@pytest.mark.parametrize("anything", [shared_after, shared_before], ids=["after", "before"])
def test_what_is_done_in_place_is_done_elsewhere(anything):
    net, x = Head(anything), images()
    graph = check(net)
    assert torch.equal(graph(x), net(x))
    assert "inplace = True" not in graph.code
    assert not any(str(n.target).endswith("_") for n in graph.graph.nodes if n.op == "call_method")


class Residual(nn.Module):
    """One in-place ReLU, called twice: the second time it writes into what is read once more."""

    def __init__(self):
        super().__init__()
        self.head, self.relu = Head(), nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        fill(self, 0)

    def forward(self, x):
        x = self.conv(self.relu(self.conv(x)))
        return self.head(self.conv(self.relu(x)) + x)


def test_a_module_that_works_in_place_may_be_called_twice():
    net, x = Residual(), images()
    assert torch.equal(check(net)(x), net(x))
    assert net.relu.inplace


def test_images_may_be_written_into():
    check(Head(lambda x: x.sub_(0.5).div_(0.25)))


def test_a_write_through_a_view_is_caught():
    def through_a_view(x):
        y = x * 1.0
        y[:, 0].zero_()
        return y

    with pytest.raises(UnsupportedLayerError, match="something else"):
        check(Head(through_a_view))


# One weight of a layer and of functions, names of torch.fx's own


def dilated(net, x):
    return net.conv(x) + F.conv2d(x, net.conv.weight, net.conv.bias, padding=2, dilation=2)


def functions_alone(net, x):
    return (
        F.conv2d(x, net.conv.weight, padding=1)
        + F.conv2d(x, net.conv.weight, padding=0)[:, :, :1, :1]
    )


def there_and_back(net, x):
    return F.conv_transpose2d(net.norm(net.conv(x)).relu(), net.conv.weight, padding=1)


@pytest.mark.parametrize("how", [dilated, functions_alone, there_and_back])
def test_a_weight_of_several_calls_is_quantized_in_each(how):
    class Sharing(Head):
        def forward(self, x):
            return self.fc(self.norm(how(self, x)).relu().mean((2, 3)))

    net = Sharing(conv=nn.Conv2d(3, 3, 3, padding=1), norm=nn.BatchNorm2d(3))
    net.fc = nn.Linear(3, 5)
    check(fill(net, 0))
    result = quantize(net, steps=3, batch_size=4, image_size=8, weight_bits=3)
    rows = [line for line in str(result.policy).splitlines() if "weight " in line]
    assert len(rows) == 3  # both calls' and the linear layer's


@pytest.mark.parametrize("name", ["graph", "code", "meta"])
def test_a_name_that_torch_fx_needs_is_told(name):
    class Named(Head):
        def forward(self, x):
            return getattr(self, name)(super().forward(x))

    net = Named()
    setattr(net, name, nn.Linear(5, 5))
    with pytest.raises(UnsupportedLayerError, match=f"GraphModule.*: {name}; give"):
        check(net)


@pytest.mark.parametrize("name", ["in", "class"])
def test_a_name_that_is_a_word_of_python_is_told(name):
    net = nn.Sequential()
    net.add_module(name, Head())
    with pytest.raises(UnsupportedLayerError, match=f"words of Python: {name};.* other names"):
        traced(net, SHAPE)


def test_a_student_is_told_to_be_quantized_already():
    student = build_student(traced(Tiny(), SHAPE), QuantizationConfig())
    with pytest.raises(UnsupportedLayerError, match="quantized already"):
        traced(student, SHAPE)


# Memory formats: the copies run on images with channels last


class Lenet(nn.Module):
    """Its linear layer reads all pixels, in the order of NCHW."""

    def __init__(self, flat):
        super().__init__()
        self.head, self.flat, self.fc = Head(), flat, nn.Linear(256, 5)
        fill(self, 0)

    def forward(self, x):
        return self.fc(self.flat(F.relu(self.head.norm(self.head.conv(x)))))


@pytest.mark.parametrize(
    "flat",
    [lambda x: x.view(x.size(0), -1), lambda x: x.view(-1, 256), lambda x: x.flatten(1)],
    ids=["view", "sizes", "flatten"],
)
def test_views_of_the_pixels_are_taken_in_any_memory_format(flat):
    net, x = Lenet(flat), images()
    graph = check(net)
    assert torch.allclose(graph(x.contiguous(memory_format=torch.channels_last)), net(x), atol=1e-5)
    quantize(net, steps=3, batch_size=4, image_size=8)


def test_what_reads_memory_itself_is_refused():
    with pytest.raises(UnsupportedLayerError, match="something else"):
        check(Lenet(lambda x: x.as_strided((x.size(0), 256), (256, 1))))


def test_a_view_of_another_dtype_stays_one():
    check(Head(lambda x: x.view(torch.int32).view(torch.float32)))


# Weights that are not there, the caller's state


@pytest.mark.parametrize(
    ("net", "part"),
    [
        (nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten()), "'0.weight' is lazy"),
        (Tiny().to("meta"), "'conv0.weight' has no values"),
    ],
    ids=["lazy", "meta"],
)
def test_weights_that_are_not_there(net, part):
    with pytest.raises(UnsupportedLayerError, match=part):
        check(net)
    with pytest.raises(UnsupportedLayerError, match=part):
        quantize(net, steps=2, image_size=8)


def test_the_network_is_untouched_in_every_mode():
    for training in (False, True):
        net = wrapped("pruned").train(training)
        before = bits(net)
        check(net)
        assert bits(net) == before


def test_another_thread_may_train_meanwhile():
    net, x, wrong, stop = Tiny(), images(), [], threading.Event()
    want = net(x)

    def work():
        while not stop.is_set():
            try:
                if not torch.equal(net(x), want):
                    wrong.append("other logits")
            except Exception as error:
                wrong.append(repr(error))

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(10):
        traced(Tiny(1), SHAPE)
    stop.set()
    thread.join()
    assert wrong == []


def test_channels_of_the_images():
    assert image_channels(Tiny(channels=1), 8) == 1
    assert image_channels(nn.Sequential(nn.PixelUnshuffle(2), Tiny(channels=12)), 8) == 3
    assert image_channels(Tiny(channels=5), 8) == 5
    assert image_channels(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), 8) == 3
    assert image_channels(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), 8) is None
    # Three grey images are not one of three channels.
    assert image_channels(Head(lambda x: x.reshape(-1, 1, 8, 8), nn.Conv2d(1, 4, 3)), 8) == 1
    made_grey = Head(lambda x: x.mean(1, keepdim=True), nn.Conv2d(1, 4, 3))
    with elsewhere():
        assert image_channels(made_grey, 8) == 3


def test_logits_of_more_images_than_were_given_are_refused():
    with pytest.raises(UnsupportedLayerError, match=r"for 5 images it returned \(15, 5\)"):
        check(Head(lambda x: x.reshape(-1, 1, 8, 8), nn.Conv2d(1, 4, 3)))


def test_a_network_that_is_its_own_copy_is_refused_and_left_alone():
    class Single(Tiny):
        def __deepcopy__(self, memo):
            return self

    net = Single().train()
    handle = net.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedLayerError, match=r"cannot be copied.*itself"):
        check(net)
    assert net.training
    assert handle.id in net._forward_hooks


class Inside(Head):
    """What ``inside`` does, on 6 channels of 8 x 8."""

    def __init__(self, inside):
        super().__init__(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3))
        self.register_buffer("square", torch.linspace(-1, 1, 36).view(6, 6))
        self.register_buffer("row", torch.linspace(-1, 1, 8).view(1, 1, 1, 8))
        self.inside = inside

    def forward(self, x):
        x = self.inside(self, self.anything(x))
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))


PRODUCTS = {
    "operator": lambda net, x: x @ x,
    "matmul": lambda net, x: torch.linalg.matmul(x, x),
    "multi_dot": lambda net, x: x * torch.linalg.multi_dot([x[0, 0], x[0, 0], x[0, 0]]),
    "bmm": lambda net, x: x[:, 0].bmm(x[:, 1])[:, None] + x,
    "addbmm": lambda net, x: x + torch.addbmm(x[0, 0], x[:, 0], x[:, 1]),
    "cdist": lambda net, x: torch.cdist(x, x),
    "einsum": lambda net, x: torch.einsum("bchw,bcwk->bchk", x, x),
    "tensordot": lambda net, x: torch.tensordot(x, net.square, ([1], [0])).permute(0, 3, 1, 2),
    "attention": lambda net, x: F.scaled_dot_product_attention(x, x, x),
    "convolution": lambda net, x: torch.convolution(
        x, x[:1, :, :3, :3].repeat(4, 1, 1, 1), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    ).repeat(1, 2, 1, 1)[:, :6],
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_of_activations_in_any_spelling(name):
    graph = traced(Inside(PRODUCTS[name]), SHAPE)
    with pytest.raises(UnsupportedLayerError, match="multiplies matrices outside of a layer"):
        build_student(graph, QuantizationConfig(3, 3))


def shuffled(net, x):
    n, c, h, w = x.data.size()
    assert c % 2 == 0
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


@pytest.mark.parametrize(
    "inside",
    [
        lambda net, x: x * (net.square @ net.square)[:, :1, None].mT.reshape(1, 6, 1, 1),
        shuffled,
        lambda net, x: x - x.data.mean(),
        lambda net, x: x + x.mT,
        lambda net, x: x + net.row.expand(x.size(0), -1, -1, -1),
        lambda net, x: (lambda both: both.sum(0) / both.shape[0])(torch.stack([x, x.square()])),
        lambda net, x: x * 2 if net.row.sum() < 1 else x,
        lambda net, x: x.view(-1, x.shape[1:].numel()).view(x.shape),
        lambda net, x: x.new_zeros(x.shape).reshape(x.shape[0], x.shape[1:][0], *x.shape[-2:]) + x,
    ],
    ids=[
        "product of constants",
        "data.size",
        "data",
        "mT",
        "expanded",
        "two branches",
        "branch",
        "numel",
        "shape",
    ],
)
def test_what_a_forward_does(inside):
    network = Inside(inside)
    build_student(check(network), QuantizationConfig(3, 3))
    check(network, images(3))


@pytest.mark.parametrize("made", [torch.jit.script, lambda n: torch.jit.trace(n, images())])
def test_torchscript_is_refused_by_name(made):
    part = made(nn.Conv2d(3, 3, 3, padding=1))
    for net, name in ((made(Head()), ""), (Head(part), "anything")):
        with pytest.raises(UnsupportedLayerError, match=rf"{name}.*TorchScript.*the Python module"):
            traced(net, SHAPE)


class Squeezed(Head):
    def forward(self, x):
        return super().forward(x).squeeze()


@pytest.mark.parametrize(
    ("network", "why"),
    [
        (Squeezed(), r"for 1 images it returned \(5,\)"),
        (nn.Sequential(Squeezed(), nn.BatchNorm1d(5)).eval(), "expected 2D or 3D input"),
        (nn.Sequential(Head(), nn.BatchNorm1d(5, track_running_stats=False)).eval(), "more than 1"),
    ],
)
def test_a_network_that_does_not_take_one_image(network, why):
    with pytest.raises(UnsupportedLayerError, match=rf"5 images, and not 1 .*{why}.*any size"):
        traced(network, SHAPE)


class Phase(nn.Module):
    """A shift by half a pixel, by a buffer of complex numbers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("phase", torch.exp(1j * torch.pi * torch.fft.rfftfreq(8)))

    def forward(self, x):
        return torch.fft.irfft(torch.fft.rfft(x) * self.phase, n=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_complex_buffers_keep_their_imaginary_part(dtype):
    net, x = Head(Phase()), images()
    with torch.no_grad():
        assert torch.allclose(traced(net, SHAPE, dtype)(x.to(dtype)).float(), net(x), atol=1e-6)


def test_a_network_for_one_number_of_images():
    class One(Head):
        def forward(self, x):
            if len(x) % 5:
                raise ValueError("fives, please")
            return super().forward(x)

    with pytest.raises(UnsupportedLayerError, match=r"One takes 5 images, and not 6.*any size"):
        traced(One(), SHAPE)
