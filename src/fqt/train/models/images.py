"""The nets for images, by name, and any other by its import path.

A factory takes ``in_channels`` and ``num_classes``, one that starts from data also ``images``. Convolutions here
start from a normal distribution of variance 2/fan_in (He et al. 2015), as in the paper's runs; batch norms start as
the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from fqt.train.models.encoders import ViT
from fqt.train.models.speedrun import Speedrun
from fqt.train.named import construct

__all__ = ["MODELS", "build_model"]


def build_model(
    name: str,
    *,
    in_channels: int,
    num_classes: int,
    images: Callable[[int], Tensor] | None = None,
    dropout: float = 0.0,
) -> nn.Module:
    """Builds a model with fresh weights from torch's global generator.

    Args:
        name: one of `MODELS`, or ``package.module:ClassOrFactory``, which is called with those of the keywords
            ``in_channels``, ``num_classes``, ``images`` and ``dropout`` that its signature names.
        in_channels: channels of an image.
        num_classes: outputs of the model.
        images: gives a number of training images (n, C, H, W), for models that start from them.
        dropout: of transformers.

    Raises:
        FqtError: an unknown name, or an import path that leads to no module.
    """
    return construct(name, MODELS, in_channels=in_channels, num_classes=num_classes, images=images, dropout=dropout)


class ConvNet(nn.Module):
    """Three 3×3 convolutions with batch norm, then one linear layer on 2×2 pooled features; for small images."""

    def __init__(self, in_channels: int, num_classes: int, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        plan = [(in_channels, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)]
        for c_in, c_out, stride in plan:
            conv = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(c_out), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(8 * width, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, classes)
        """The logits."""
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 2).flatten(1))


class PreActBlock(nn.Module):
    """Pre-activation basic block (He et al. 2016): norm, ReLU, conv, twice; 1×1 where shapes change."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False) if c_in != c_out or stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        """The block's output, not yet normalized."""
        y = F.relu(self.bn1(x))
        skip = x if self.skip is None else self.skip(y)
        return skip + self.conv2(F.relu(self.bn2(self.conv1(y))))


class PreActResNet(nn.Module):
    """CIFAR's pre-activation ResNet of depth 6n + 2: stages of n blocks with 16, 32 and 64 channels."""

    def __init__(self, blocks: int, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        stages, c_in = [], 16
        for stage, c_out in enumerate((16, 32, 64)):
            strides = [1 if stage == 0 else 2] + [1] * (blocks - 1)
            stages.append(
                nn.Sequential(*(PreActBlock(c_in if i == 0 else c_out, c_out, s) for i, s in enumerate(strides)))
            )
            c_in = c_out
        self.layer1, self.layer2, self.layer3 = stages
        self.bn = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, classes)
        """The logits."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(F.relu(self.bn(x)).mean((2, 3)))


class ResNetBlock(nn.Module):
    """A residual block of ResNet v1, basic (3×3, 3×3) or bottleneck (1×1, 3×3 with the stride, 1×1 to 4 times)."""

    def __init__(self, c_in: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        c_out = 4 * width if bottleneck else width
        plan = (
            [(c_in, width, 1, 1), (width, width, 3, stride), (width, c_out, 1, 1)]
            if bottleneck
            else [(c_in, width, 3, stride), (width, c_out, 3, 1)]
        )
        for i, (a, b, kernel, s) in enumerate(plan, start=1):
            self.add_module(f"conv{i}", nn.Conv2d(a, b, kernel, stride=s, padding=kernel // 2, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(b))
        self.depth = len(plan)
        self.downsample = (
            nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False), nn.BatchNorm2d(c_out))
            if c_in != c_out or stride != 1
            else None
        )

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        """The block's output after the last ReLU."""
        y = x
        for i in range(1, self.depth + 1):
            y = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(y))
            if i < self.depth:
                y = F.relu(y)
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet v1 (He et al. 2015), with the parameter names that published weights have.

    ``small_images`` gives the form used on CIFAR: a 3×3 stem without stride and no max pooling.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        in_channels: int,
        num_classes: int,
        *,
        bottleneck: bool = False,
        small_images: bool = False,
    ) -> None:
        super().__init__()
        kernel, stride = (3, 1) if small_images else (7, 2)
        self.conv1 = nn.Conv2d(in_channels, 64, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(3, stride=2, padding=1)
        c_in, stages = 64, []
        for stage, count in enumerate(blocks):
            width, rows = 64 * 2**stage, []
            for i in range(count):
                rows.append(ResNetBlock(c_in, width, 2 if stage > 0 and i == 0 else 1, bottleneck))
                c_in = 4 * width if bottleneck else width
            stages.append(nn.Sequential(*rows))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(c_in, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, classes)
        """The logits."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def _initialize(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")


MODELS: dict[str, Callable[..., nn.Module]] = {
    "convnet": ConvNet,
    "preact-resnet20": partial(PreActResNet, 3),
    "preact-resnet56": partial(PreActResNet, 9),
    "resnet18": partial(ResNet, (2, 2, 2, 2)),
    "resnet50": partial(ResNet, (3, 4, 6, 3), bottleneck=True),
    "resnet18-cifar": partial(ResNet, (2, 2, 2, 2), small_images=True),
    "vit-tiny": partial(ViT, 6, 3, 192, 4),
    "speedrun": Speedrun,
    "speedrun-small": partial(Speedrun, width=32),
}
