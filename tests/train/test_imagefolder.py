import random

import numpy as np
import pytest
import torch
from PIL import Image

from fqt.errors import FqtError
from fqt.train.imagefolder import MEAN, STD, FolderLoader, _centre_crop, _random_crop

from .batches import same_batches

# Python 3.12 warns of fork in a process with threads; PyTorch's loader forks on Linux
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 5), ("val", 3)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20 + 3 * i, 31 - i, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).convert("L" if i == 1 else "RGB")  # some are grey
                image.save(tmp_path / part / name / f"{label}{i}.{'PNG' if i else 'jpeg'}")
    (tmp_path / "train" / "cat" / "readme.txt").write_text("not an image")
    return tmp_path


def _loader(folder, **changes):
    options = {
        "image_size": 16, "augment": True, "seed": 0, "batch_size": 3, "drop_last": False, "workers": 0,
        "device": torch.device("cpu"),
    }  # fmt: skip
    return FolderLoader(str(folder), **{**options, **changes})


def test_layout(folder):
    loader = _loader(folder)
    assert (loader.num_classes, loader.in_channels, loader.steps_per_epoch) == (2, 3, 4)
    batches = list(loader.train(0))
    assert [tuple(x.shape) for x, _ in batches] == [(3, 3, 16, 16)] * 3 + [(1, 3, 16, 16)]
    assert sorted(torch.cat([y for _, y in batches]).tolist()) == [0] * 5 + [1] * 5
    assert torch.cat([y for _, y in loader.eval()]).tolist() == [0] * 3 + [1] * 3
    assert _loader(folder, drop_last=True).steps_per_epoch == 3
    assert len(list(_loader(folder, drop_last=True).train(0))) == 3


def test_batches_depend_on_seed_and_epoch_and_not_on_workers_or_global_state(folder):
    batches = list(_loader(folder).train(1))
    state = torch.get_rng_state()
    assert same_batches(_loader(folder, workers=2).train(1), batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert same_batches(_loader(folder).train(1, start=2), batches[2:])
    assert not same_batches(_loader(folder).train(2), batches)
    assert not same_batches(_loader(folder, seed=1).train(1), batches)


def test_evaluation_is_the_normalized_centre_crop(folder):
    images = next(iter(_loader(folder).eval()))[0]
    with Image.open(folder / "val" / "cat" / "01.PNG") as file:
        crop = np.array(_centre_crop(file.convert("RGB"), 16)) / 255
    expected = torch.from_numpy((crop - np.array(MEAN)) / np.array(STD)).permute(2, 0, 1).float()
    torch.testing.assert_close(images[1], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(300, 256), (256, 300), (20, 900), (1, 1)])
def test_centre_crop_is_the_centre(size):
    width, height = size
    # a ramp along the longer side: the middle of the crop must be the middle of the image
    ramp = np.linspace(0, 255, max(size))
    pixels = np.broadcast_to(ramp[None, :] if width >= height else ramp[:, None], (height, width))
    crop = np.array(_centre_crop(Image.fromarray(pixels.astype(np.uint8)), 224), dtype=float)
    assert crop.shape == (224, 224)
    if max(size) > 1:
        assert crop[111:113, 111:113].mean() == pytest.approx(127, abs=2)


@pytest.mark.parametrize("size", [(32, 32), (200, 3), (3, 200), (1, 1), (2, 7)])
def test_random_crops_fit_any_image(size):
    image = Image.new("RGB", size, (9, 9, 9))
    for seed in range(30):
        crop = _random_crop(image, 8, random.Random(seed))
        assert crop.size == (8, 8)
        assert np.all(np.array(crop) == 9)  # nothing from outside of the image


def test_random_crops_cover_8_to_100_percent_and_mirror_half():
    x, y = np.meshgrid(np.arange(100), np.arange(100))
    image = Image.fromarray(np.stack([x, y, y], -1).astype(np.uint8))
    shares, mirrored = [], 0
    for seed in range(400):
        crop = np.array(_random_crop(image, 50, random.Random(seed)), dtype=float)
        width, height = np.ptp(crop[..., 0]) * 50 / 49, np.ptp(crop[..., 1]) * 50 / 49
        shares.append(width * height / 1e4)
        mirrored += crop[0, 0, 0] > crop[0, -1, 0]
    assert 0.06 < min(shares) < 0.15
    assert 0.9 < max(shares) < 1.05
    assert 0.4 < np.mean(shares) < 0.6
    assert 150 < mirrored < 250


def test_errors(folder, tmp_path):
    with pytest.raises(FqtError, match="train/ and val/ by --data"):
        _loader("")
    with pytest.raises(FqtError, match=r"there is no folder .*train; --data must name"):
        _loader(tmp_path / "nowhere")
    (folder / "val" / "bird").mkdir()
    with pytest.raises(FqtError, match="same class folders"):
        _loader(folder)
    (folder / "val" / "bird").rmdir()
    (folder / "val" / "cat" / "00.jpeg").write_bytes(b"no image")
    with pytest.raises(FqtError, match="cannot read the image"):
        list(_loader(folder).eval())
    for path in (folder / "val").glob("*/*"):
        path.unlink()
    with pytest.raises(FqtError, match="no images in"):
        _loader(folder)
