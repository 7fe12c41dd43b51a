import gzip
import pickle

import numpy as np
import pytest
import torch

from fqt.errors import FqtError
from fqt.train.loaders import ArrayLoader, _crop, epoch_order
from fqt.train.readers import Arrays, read_cifar10, read_digits, read_fashion_mnist

from .batches import same_batches


def _arrays(train=23, evaluation=7, channels=2, side=5):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (train + evaluation, channels, side, side), dtype=np.uint8)
    labels = np.arange(train + evaluation) % 3
    return Arrays(
        train_images=images[:train],
        train_labels=labels[:train],
        eval_images=images[train:],
        eval_labels=labels[train:],
    )


def _loader(arrays=None, **changes):
    options = {
        "peak": 255, "mean": (0.5, 0.25), "std": (0.5, 0.2), "pad": 2, "flip": True, "seed": 0, "batch_size": 4,
        "drop_last": False, "device": torch.device("cpu"),
    }  # fmt: skip
    return ArrayLoader(arrays or _arrays(), **{**options, **changes})


def test_an_epoch_is_every_sample_once_normalized():
    arrays = _arrays()
    batches = list(_loader(arrays, pad=0, flip=False).train(0))
    assert [len(y) for _, y in batches] == [4, 4, 4, 4, 4, 3]
    pixels = torch.cat([x for x, _ in batches])
    raw = torch.from_numpy(arrays.train_images).double() / 255
    expected = (raw - torch.tensor([0.5, 0.25]).view(2, 1, 1)) / torch.tensor([0.5, 0.2]).view(2, 1, 1)
    order = [int((expected - x).abs().amax((1, 2, 3)).argmin()) for x in pixels]
    assert sorted(order) == list(range(23))
    assert order != sorted(order)
    torch.testing.assert_close(pixels.double(), expected[order], rtol=0, atol=1e-6)
    labels = torch.cat([y for _, y in batches])
    assert labels.tolist() == arrays.train_labels[order].tolist()


def test_drop_last_and_too_large_a_batch():
    assert len(list(_loader(drop_last=True).train(0))) == 5
    with pytest.raises(FqtError, match="23 training images do not fill a batch of 24"):
        _loader(batch_size=24, drop_last=True)
    assert _loader(batch_size=24).steps_per_epoch == 1


def test_batches_depend_on_seed_and_epoch_and_on_nothing_else():
    batches = list(_loader().train(3))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert same_batches(_loader().train(3), batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert same_batches(_loader().train(3, start=2), batches[2:])
    assert not same_batches(_loader().train(4), batches)
    assert not same_batches(_loader(seed=1).train(3), batches)


def test_every_epoch_and_seed_has_its_own_order():
    orders = [epoch_order(seed, epoch, 50) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order.tolist()) == list(range(50)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 4


def test_crops_equal_a_loop():
    images = torch.arange(3 * 2 * 4 * 6, dtype=torch.uint8).view(3, 2, 4, 6)
    corners = torch.tensor([[0, 0], [2, 1], [4, 4]])
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    expected = torch.stack([padded[i, :, y : y + 4, x : x + 6] for i, (y, x) in enumerate(corners.tolist())])
    assert torch.equal(_crop(images, corners, 2), expected)


def test_crops_of_reflected_images_equal_a_loop():
    images = torch.arange(3 * 2 * 4 * 6, dtype=torch.uint8).view(3, 2, 4, 6)
    corners = torch.tensor([[0, 0], [2, 1], [6, 6]])
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (3, 3), (3, 3)), mode="reflect")
    expected = np.stack([padded[i, :, y : y + 4, x : x + 6] for i, (y, x) in enumerate(corners.tolist())])
    assert np.array_equal(_crop(images, corners, 3, "reflect").numpy(), expected)


def test_images_too_small_to_be_reflected():
    with pytest.raises(FqtError, match="images of 5×5 cannot be mirrored at their edges to 5 pixels: shift less"):
        _loader(pad=5, padding="reflect")


def _mirrored(loader, epoch):
    """Which of the ramps of `test_half_…`, in the set's order, fall from left to right; labels are their places."""
    batches = list(loader.train(epoch))
    falling = torch.cat([x[:, 0, 0, 0] > x[:, 0, 0, -1] for x, _ in batches])
    return falling[torch.cat([y for _, y in batches]).argsort()]


def test_alternating_flips_mirror_one_half_and_then_the_other():
    ramp, places = np.broadcast_to(np.arange(8, dtype=np.uint8), (400, 2, 8, 8)).copy(), np.arange(400)
    arrays = Arrays(train_images=ramp, train_labels=places, eval_images=ramp, eval_labels=places)
    loader = _loader(arrays, pad=0, batch_size=100, alternating=True)
    first, second, third = (_mirrored(loader, epoch) for epoch in range(3))
    assert 150 < int(first.sum()) < 250  # 5 standard deviations
    assert torch.equal(second, ~first)
    assert torch.equal(third, first)
    assert not torch.equal(_mirrored(_loader(arrays, pad=0, alternating=True, seed=1), 0), first)
    assert not _mirrored(_loader(arrays, pad=0, alternating=True, flip=False), 1).any()


def test_half_of_the_training_images_are_mirrored_and_no_others():
    ramp = np.broadcast_to(np.arange(8, dtype=np.uint8), (400, 2, 8, 8)).copy()
    labels = np.zeros(400, dtype=np.int64)
    arrays = Arrays(train_images=ramp, train_labels=labels, eval_images=ramp, eval_labels=labels)
    loader = _loader(arrays, pad=0, batch_size=100)
    falling = [(x[:, 0, 0, 0] > x[:, 0, 0, -1]) for x, _ in loader.train(0)]
    assert 150 < int(torch.cat(falling).sum()) < 250  # 5 standard deviations
    assert not any((x[:, 0, 0, 0] > x[:, 0, 0, -1]).any() for x, _ in loader.eval())


def test_evaluation_is_complete_and_always_the_same():
    assert [len(y) for _, y in _loader(drop_last=True).eval()] == [4, 3]
    assert same_batches(_loader(seed=1).eval(), _loader(seed=2).eval())


def test_digits_are_the_real_ones():
    digits = read_digits()
    assert digits.train_images.shape == (1297, 1, 8, 8)
    assert digits.eval_images.shape == (500, 1, 8, 8)
    assert np.bincount(digits.eval_labels, minlength=10).min() >= 48
    both = np.concatenate([digits.train_images, digits.eval_images]).reshape(1797, -1)
    assert both.max() == 16
    assert len(np.unique(both, axis=0)) == 1797


def write_cifar(folder, count=4):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    for k, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        with open(folder / name, "wb") as file:
            pickle.dump({b"data": data, b"labels": [k] * count}, file, protocol=2)
    return folder


@pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
def test_cifar10(tmp_path, below):
    home = write_cifar(tmp_path / below)
    arrays = read_cifar10(str(tmp_path))
    assert arrays.train_images.shape == (20, 3, 32, 32)
    assert arrays.train_labels.tolist() == [k for k in range(5) for _ in range(4)]
    assert arrays.eval_labels.tolist() == [5] * 4
    with open(home / "test_batch", "rb") as file:
        raw = pickle.load(file)[b"data"]
    assert arrays.eval_images[1, 2, 3, 4] == raw[1, 2 * 1024 + 3 * 32 + 4]


class Evil:
    def __reduce__(self):
        return (print, ("code from a data file ran",))


def test_a_damaged_or_hostile_cifar_file(tmp_path, capsys):
    write_cifar(tmp_path)
    whole = (tmp_path / "data_batch_2").read_bytes()
    (tmp_path / "data_batch_2").write_bytes(whole[:100])
    with pytest.raises(FqtError, match="data_batch_2 is not a batch file"):
        read_cifar10(str(tmp_path))
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(FqtError, match="data_batch_2 is not a batch file"):
        read_cifar10(str(tmp_path))
    assert "ran" not in capsys.readouterr().out
    (tmp_path / "data_batch_2").unlink()
    with pytest.raises(FqtError, match="lacks data_batch_2"):
        read_cifar10(str(tmp_path))


def _idx(array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.tobytes()


def write_idx(folder, *, zipped=False):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(2)
    for part, count in (("train", 12), ("t10k", 5)):
        for kind, array in (
            ("images-idx3", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)),
            ("labels-idx1", rng.integers(0, 10, count).astype(np.uint8)),
        ):
            name = folder / f"{part}-{kind}-ubyte"
            if zipped:
                name.with_name(name.name + ".gz").write_bytes(gzip.compress(_idx(array)))
            else:
                name.write_bytes(_idx(array))


def test_idx_files_plain_and_zipped_are_the_same(tmp_path):
    write_idx(tmp_path / "plain" / "fashion-mnist")
    write_idx(tmp_path / "zipped", zipped=True)
    plain = read_fashion_mnist(str(tmp_path / "plain"))
    zipped = read_fashion_mnist(str(tmp_path / "zipped"))
    assert plain.train_images.shape == (12, 1, 28, 28)
    assert plain.eval_labels.shape == (5,)
    assert plain.train_images.flags.writeable  # else torch warns of undefined behaviour
    assert np.array_equal(plain.train_images, zipped.train_images)
    assert np.array_equal(plain.eval_labels, zipped.eval_labels)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], "cut short"),
        (lambda raw: raw[:6], "cut short"),
        (lambda raw: b"\x89PNG" + raw, "not an idx file"),
        (lambda raw: b"", "not an idx file"),
    ],
)
def test_damaged_idx_files(tmp_path, damage, message):
    write_idx(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FqtError, match=message):
        read_fashion_mnist(str(tmp_path))


@pytest.mark.parametrize(("read", "name"), [(read_cifar10, "data_batch_1"), (read_fashion_mnist, "train-images")])
def test_missing_data_says_what_is_expected(tmp_path, read, name):
    with pytest.raises(FqtError, match=f"--data.*{name}"):
        read("")
    with pytest.raises(FqtError, match=f"there is no folder.*{name}"):
        read(str(tmp_path / "nowhere"))
    with pytest.raises(FqtError, match=f"no .* files in .*{name}"):
        read(str(tmp_path))
