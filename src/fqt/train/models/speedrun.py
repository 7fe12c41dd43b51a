"""The net of CIFAR-10 speedruns (Jordan 2024, 2404.00498): like VGG, and at 94 % after ten short epochs.

Fast because of what it starts from: patches whitened by a frozen convolution, and convolutions that hand on their
input. Learning rates, flips and averages, which it also needs, are in the preset ``cifar10-speedrun``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fqt.errors import FqtError

__all__ = ["Speedrun", "Whitening", "principal_components"]

IMAGES = 5000  # whose patches are whitened
SMALLEST = 9  # pixels: 8 after the whitening, halved three times


class Speedrun(nn.Module):
    """Whitened patches, three groups of two 3×3 convolutions with max pooling, batch norm and GELU, a linear head.

    Norms have no factor to learn. The logits are a ninth of the head's output.

    Args:
        in_channels: channels of an image.
        num_classes: outputs.
        images: gives a number of training images (n, C, H, W) as the net will see them, float32; without, patches
            are not whitened, as before weights that were saved are loaded.
        width: channels of the first group; the others have four times as many.

    Raises:
        FqtError: images of less than 9×9 pixels.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        images: Callable[[int], Tensor] | None = None,
        width: int = 64,
    ) -> None:
        super().__init__()
        whitening = Whitening(in_channels, None if images is None else images(IMAGES))
        layers: list[nn.Module] = [whitening, nn.GELU()]
        c_in = 2 * whitening.components
        for c_out in (width, 4 * width, 4 * width):
            layers += [_convolution(c_in, c_out), nn.MaxPool2d(2), _norm(c_out), nn.GELU()]
            layers += [_convolution(c_out, c_out), _norm(c_out), nn.GELU()]
            c_in = c_out
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(c_in, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, classes)
        """The logits."""
        return self.head(F.adaptive_max_pool2d(self.features(x), 1).flatten(1)) / 9


class Whitening(nn.Module):
    """The principal components of 2×2 patches, each of variance one, their negatives, and a bias that is learned.

    The filters are frozen. They have length one, and the components' scales stand beside them: scales differ by a
    factor of about a hundred, and one quantization step for filters that contain them would be about as large as
    the entries of those for the largest components.

    Args:
        channels: of an image.
        images: whose patches to whiten (n, C, H, W); without, the components are the pixels.
    """

    def __init__(self, channels: int, images: Tensor | None = None) -> None:
        super().__init__()
        self.components = channels * 4
        self.filters = nn.Conv2d(channels, 2 * self.components, 2, bias=False)
        if images is None:
            scales, basis = torch.ones(self.components), torch.eye(self.components)
        else:
            variances, basis = principal_components(images)
            scales = (variances + 5e-4).rsqrt()
        self.filters.weight.requires_grad_(False).copy_(torch.cat([basis, -basis]).view_as(self.filters.weight))
        self.scale: Tensor
        self.register_buffer("scale", scales.repeat(2))
        self.bias = nn.Parameter(torch.zeros(2 * self.components))

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, 8·C, H − 1, W − 1)
        """Scaled components, their negatives, plus the bias."""
        y = self.filters(x)
        scale, bias = (v.to(y.dtype).view(-1, 1, 1) for v in (self.scale, self.bias))
        return torch.addcmul(bias, y, scale)


def principal_components(images: Tensor) -> tuple[Tensor, Tensor]:
    """Second moments (C·4,) of the 2×2 patches of images (n, C, H, W) along their principal axes, and these.

    Returns:
        The moments, from the largest on, and the axes of length one as rows (C·4, C·4), pixels in the order of a
        filter's entries; float32 on the CPU.

    Raises:
        FqtError: images of less than 9×9 pixels, too small for the net.
    """
    height, width = images.shape[-2:]
    if min(height, width) < SMALLEST:
        raise FqtError(
            f"the speedrun nets take images of {SMALLEST}×{SMALLEST} pixels at least, these have "
            f"{height}×{width}: choose another --model"
        )
    size = images.shape[1] * 4
    moments = torch.zeros(size, size, dtype=torch.float64)
    for part in images.split(500):  # all patches at once would be four times the images
        patches = F.unfold(part, 2).transpose(1, 2).reshape(-1, size)
        moments += (patches.T @ patches).double().cpu()
    values, axes = torch.linalg.eigh(moments / (len(images) * (height - 1) * (width - 1)))
    return values.flip(0).clamp(min=0).float(), axes.T.flip(0).float()


def _convolution(c_in: int, c_out: int) -> nn.Conv2d:
    """A 3×3 convolution whose first filters hand on their input; the others are as torch draws them."""
    convolution = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
    nn.init.dirac_(convolution.weight[:c_in])
    return convolution


def _norm(channels: int) -> nn.BatchNorm2d:
    """A batch norm with quick statistics and without a factor to learn."""
    norm = nn.BatchNorm2d(channels, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm
