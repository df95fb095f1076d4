"""The CIFAR ResNets, in plain PyTorch."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters (He et al., 2015, option A)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.pad = (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1:
            # x[:, :, ::stride, ::stride], whose gradient would leave the channels_last layout.
            x = F.avg_pool2d(x, 1, self.stride)
            x = F.pad(x, (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(x + y)


class ResNet(nn.Module):
    """A CIFAR ResNet of 3 stages, 6 * blocks + 2 layers; torch.fx can trace it.

    Args:
        in_channels: of the images.
        widths: channels of the 3 stages, growing by even steps.
        blocks: per stage.
        num_classes: C.
    """

    def __init__(
        self, *, in_channels: int, widths: Sequence[int], blocks: int, num_classes: int
    ) -> None:
        super().__init__()

        def stage(before: int, width: int, stride: int) -> nn.Sequential:
            rest = [BasicBlock(width, width, 1) for _ in range(blocks - 1)]
            return nn.Sequential(BasicBlock(before, width, stride), *rest)

        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = stage(widths[0], widths[0], 1)
        self.layer2 = stage(widths[0], widths[1], 2)
        self.layer3 = stage(widths[1], widths[2], 2)
        self.linear = nn.Linear(widths[2], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W), H and W divisible by 4, -> logits (N, C)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet20(num_classes: int = 10) -> ResNet:
    """ResNet-20 for (N, 3, 32, 32) images (He et al., 2015), with random weights.

    Its keys are those of Y. Idelbayev's checkpoints (github.com/akamaster/pytorch_resnet_cifar10).
    """
    return ResNet(in_channels=3, widths=(16, 32, 64), blocks=3, num_classes=num_classes)
