"""A convolution and the eval-mode BatchNorm behind it, as one: found, folded, joined."""

import copy
from collections import Counter

from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from baselines.quantization.graph import BATCH_NORMS, CONVOLUTIONS, bypass, called, cleaned


class NormalisedConv(nn.Module):
    """Both with their parameters, for a network that is trained.

    norm(conv(x)) = conv(x; a W) + a (b - mean) + shift, with a = gain / sqrt(var + eps) a channel:
    the small weight is scaled in place of the large activation.
    """

    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, input: Tensor) -> Tensor:  # named as the convolution's
        conv, norm = self.conv, self.norm
        scale = (norm.running_var + norm.eps).rsqrt()
        offset = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
        if norm.affine:
            scale = scale * norm.weight
        bias = offset * scale
        if norm.affine:
            bias = bias + norm.bias
        weight = conv.weight * scale.view(-1, *(1,) * (conv.weight.ndim - 1))
        return conv._conv_forward(input, weight, bias)


class FoldedConv(nn.Module):
    """The convolution with the BatchNorm folded in, for a network that is not trained.

    ``norm`` never runs; it is kept for what it knows of the training data.
    """

    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        fold(conv, norm)
        self.conv, self.norm = conv, norm

    def forward(self, input: Tensor) -> Tensor:
        return self.conv(input)


def with_folded_norms(teacher: fx.GraphModule) -> fx.GraphModule:
    """A copy of a traced network in which a conv and its BatchNorm are one :class:`FoldedConv`.

    A pair stays as it is where the moments of what the conv gives could not be told from those of
    what the BatchNorm gives, or where the BatchNorm serves another conv too.
    """
    network = copy.deepcopy(teacher)
    calls = _calls(network)
    for source, node in normalised_convolutions(network):
        conv, norm = called(network, source), called(network, node)
        if calls[str(node.target)] == 1 and _invertible(norm):
            network.set_submodule(str(source.target), FoldedConv(conv, norm))
            bypass(network, node, source)
    return cleaned(network)


def _invertible(norm: nn.Module) -> bool:
    """Whether each channel's spread, its gain, is more than bfloat16's rounding of its shift."""
    if not norm.affine:
        return True
    gain, shift = norm.weight.abs(), norm.bias.abs()
    return bool(((gain > 1e-10) & (shift < 256 * gain)).all())


def fold(conv: nn.Module, norm: nn.Module) -> None:
    """Give ``conv`` new weights that do what ``norm`` does too."""
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps,
        norm.weight, norm.bias,
    )  # fmt: skip


def normalised_convolutions(network: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """Every (conv, folded or not, BatchNorm) of which that alone reads what the conv gives."""
    calls = _calls(network)
    pairs = []
    for node in network.graph.nodes:
        norm = called(network, node)
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        conv = called(network, source) if source is not None else None
        if not (isinstance(norm, BATCH_NORMS) and isinstance(conv, (*CONVOLUTIONS, FoldedConv))):
            continue
        if len(source.users) > 1 or calls[str(source.target)] > 1 or norm.running_mean is None:
            continue
        pairs.append((source, node))
    return pairs


def _calls(network: fx.GraphModule) -> Counter[str]:
    """How often each module runs."""
    return Counter(str(node.target) for node in network.graph.nodes)
