import pytest
import torch
from torch import nn

from fqt.errors import FqtError
from fqt.train import MODELS, build_model
from fqt.train.models.encoders import plane_positions

# ImageNet's two and the speedrun's are the published counts; preact: 6n + 2 layers of 16, 32, 64 channels, two 1×1
# skips of 16·32 and 32·64, a last norm, and no norm after the first convolution
COUNTS = {
    "resnet18": (1000, 11_689_512),
    "resnet50": (1000, 25_557_032),
    "resnet18-cifar": (10, 11_173_962),
    "preact-resnet20": (10, 272_282),
    "speedrun": (10, 1_972_792),
    "preact-resnet56": (10, 855_578),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    classes, expected = COUNTS[name]
    with torch.device("meta"):
        model = build_model(name, in_channels=3, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == expected


def _preact_count(n):
    total, c_in = 3 * 9 * 16, 16
    for c in (16, 32, 64):
        total += 9 * c_in * c + (2 * n - 1) * 9 * c * c  # convolutions
        total += (c_in * c if c != c_in else 0) + 2 * c_in + (2 * n - 1) * 2 * c  # skip, norms
        c_in = c
    return total + 2 * 64 + 64 * 10 + 10


@pytest.mark.parametrize(("name", "n"), [("preact-resnet20", 3), ("preact-resnet56", 9)])
def test_preact_counts_follow_from_the_architecture(name, n):
    assert COUNTS[name][1] == _preact_count(n)


@pytest.mark.parametrize("name", ["convnet", "preact-resnet20", "resnet18-cifar"])
@pytest.mark.parametrize("channels", [1, 3])
def test_small_images_give_logits(name, channels):
    model = build_model(name, in_channels=channels, num_classes=7).eval()
    assert model(torch.zeros(2, channels, 16, 16)).shape == (2, 7)


def test_the_3x3_convolution_carries_the_stride_of_a_bottleneck():
    with torch.device("meta"):
        model = build_model("resnet50", in_channels=3, num_classes=10)
        block = model.get_submodule("layer2.0")
        assert (block.conv1.stride, block.conv2.stride, block.conv2.kernel_size) == ((1, 1), (2, 2), (3, 3))
        assert model.layer4(torch.zeros(1, 1024, 14, 14)).shape == (1, 2048, 7, 7)


def test_names_of_published_weights():
    with torch.device("meta"):
        names = set(build_model("resnet18", in_channels=3, num_classes=1000).state_dict())
    assert {"conv1.weight", "layer2.0.downsample.0.weight", "layer4.1.bn2.running_var", "fc.bias"} <= names


def test_convolutions_start_with_variance_two_over_fan_in():
    torch.manual_seed(0)
    weight = build_model("resnet18-cifar", in_channels=3, num_classes=10).get_parameter("layer4.1.conv2.weight")
    assert weight.var().item() == pytest.approx(2 / (9 * 512), rel=0.01)


def test_a_vision_transformer():
    model = build_model("vit-tiny", in_channels=3, num_classes=7).eval()
    assert (
        sum(p.numel() for p in model.parameters()) == 6 * 12 * 192**2 + 6 * 13 * 192 + 2 * 192 + 49 * 192 + 7 * 193
    )
    x = torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(0))
    assert model(x).shape == (2, 7)
    assert not torch.allclose(model(x.roll(4, 3)), model(x), atol=1e-4)  # patches know their places
    with pytest.raises(FqtError, match="images of 32×30 are not made of patches of 4×4: choose another --model"):
        model(torch.zeros(1, 3, 32, 30))


def test_positions_in_a_plane():
    found = plane_positions(3, 5, 8)
    assert found.shape == (8, 3, 5)
    assert torch.equal(found[:4], found[:4, :, :1].expand(-1, -1, 5))
    assert torch.equal(found[4:], found[4:, :1].expand(-1, 3, -1))
    torch.testing.assert_close(found[0, :, 0], torch.arange(3.0).sin())
    torch.testing.assert_close(found[7, 0], (torch.arange(5.0) / 10_000).cos())
    assert len(found.flatten(1).T.unique(dim=0)) == 15


def factory(num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))


def not_a_model():
    return 3


def needs_more(num_classes, width):
    return None


def test_import_paths():
    path = f"{__name__}:factory"
    assert build_model(path, in_channels=3, num_classes=5)(torch.zeros(2, 3, 4, 4)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet19", "unknown model 'resnet19'; known: " + ", ".join(MODELS)),
        ("no_such_package_at_all:Model", "cannot be imported"),
        ("..:Model", "cannot be imported"),
        (f"{__name__}:Missing", "cannot be imported"),
        (f"{__name__}:COUNTS", "not a class or a function"),
        (f"{__name__}:not_a_model", "returned int, not a torch.nn.Module"),
        (f"{__name__}:needs_more", "cannot be called"),
        ("torch:relu", "cannot be called"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(FqtError, match=message):
        build_model(name, in_channels=3, num_classes=5)
