"""Splits, shifts and the IDX reader: on generated files, whole and broken."""

import gzip
import hashlib
import struct

import numpy as np
import pytest
import torch

from nullbayes import datasets
from nullbayes.errors import InputError, MissingExtraError, StorageError

TYPES = {"u1": 0x08, "i1": 0x09, ">i2": 0x0B, ">i4": 0x0C, ">f4": 0x0D, ">f8": 0x0E}


def idx_bytes(array, dtype="u1"):
    array = np.asarray(array).astype(dtype)
    header = bytes([0, 0, TYPES[dtype], array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("packed", [False, True])
def test_idx_round_trip(tmp_path, dtype, packed):
    array = np.arange(24).reshape(2, 3, 4)
    data = idx_bytes(array, dtype)
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(data) if packed else data)
    got = datasets.read_idx(path)
    assert got.shape == (2, 3, 4)
    torch.testing.assert_close(got.double(), torch.from_numpy(array).double())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-1], "cut off"),
        (lambda data: data[:7], "cut off inside its header"),
        (lambda data: data[:2], "not an IDX file"),
        (lambda data: b"", "not an IDX file"),
        (lambda data: data + b"x", "followed by something else"),
        (lambda data: b"\x89PNG" + data[4:], "not an IDX file"),
        (lambda data: data[:2] + b"\x07" + data[3:], "not an IDX file"),
        (lambda data: gzip.compress(data)[:-9], "gzip stream is damaged"),
        (
            lambda data: gzip.compress(data)[:20] + b"junkjunk" + gzip.compress(data)[28:],
            "gzip stream",
        ),
        (lambda data: gzip.compress(data[:-5]), "cut off"),
    ],
)
def test_broken_idx_files_are_named(tmp_path, damage, words):
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(damage(idx_bytes(np.arange(60).reshape(3, 4, 5))))
    with pytest.raises(StorageError, match=words) as caught:
        datasets.read_idx(path)
    assert path.name in str(caught.value)


def test_more_dimensions_than_arrays_have(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes([0, 0, 8, 200]) + struct.pack(">200I", *[1] * 200) + b"x")
    with pytest.raises(StorageError, match="not an IDX file"):
        datasets.read_idx(path)


def test_a_packed_file_does_not_grow_beyond_its_header(tmp_path):
    path = tmp_path / "file"
    whole = idx_bytes(np.arange(60).reshape(3, 4, 5))
    path.write_bytes(gzip.compress(whole + bytes(10**7)))
    with pytest.raises(StorageError, match="followed by something else: 133 bytes"):
        datasets.read_idx(path)
    huge = bytes([0, 0, 8, 3]) + struct.pack(">3I", *[2**32 - 1] * 3)
    path.write_bytes(gzip.compress(huge))
    with pytest.raises(StorageError, match="cut off"):
        datasets.read_idx(path)
    damaged = bytearray(gzip.compress(whole))
    damaged[-6] ^= 1  # of the checksum
    path.write_bytes(damaged)
    with pytest.raises(StorageError, match="damaged"):
        datasets.read_idx(path)


def test_a_checksum_beside_a_file(tmp_path):
    path = tmp_path / "file"
    whole = idx_bytes(np.arange(60).reshape(3, 4, 5))
    path.write_bytes(whole)
    beside = tmp_path / "file.sha256"
    beside.write_text(f"{hashlib.sha256(whole).hexdigest()}  file\n")
    assert datasets.read_idx(path).shape == (3, 4, 5)
    path.write_bytes(whole[:-1] + b"x")
    with pytest.raises(StorageError, match=r"SHA-256.*file\.sha256"):
        datasets.read_idx(path)
    beside.write_text("")
    with pytest.raises(StorageError, match="SHA-256"):
        datasets.read_idx(path)


def test_a_missing_idx_file_is_an_input_error(tmp_path):
    with pytest.raises(StorageError, match="cannot be read"):
        datasets.read_idx(tmp_path / "nothing")


@pytest.fixture
def fashion_dir(tmp_path):
    """A small Fashion-MNIST: 40 and 20 images, one pair of files packed."""
    rng = np.random.default_rng(0)
    for part, n, pack in (("train", 40, True), ("t10k", 20, False)):
        for name, array in (
            ("images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28))),
            ("labels-idx1-ubyte", np.arange(n) % 10),
        ):
            data = idx_bytes(array)
            (tmp_path / f"{part}-{name}{'.gz' if pack else ''}").write_bytes(
                gzip.compress(data) if pack else data
            )
    return tmp_path


def test_fashion_mnist_from_a_folder(fashion_dir):
    data = datasets.fashion_mnist(fashion_dir, train=30, validation=5, test=10)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [30, 5, 10]
    assert data.train.inputs.shape == (30, 1, 28, 28) and data.train.inputs.dtype == torch.float32
    assert float(data.train.inputs.min()) >= 0 and float(data.train.inputs.max()) == 1
    again = datasets.fashion_mnist(fashion_dir, train=30, validation=5, test=10)
    assert torch.equal(data.test.inputs, again.test.inputs)
    seen = {x.numpy().tobytes() for x in data.validation.inputs}
    assert not seen & {x.numpy().tobytes() for x in data.test.inputs}


def test_missing_fashion_mnist_says_how_to_get_it(tmp_path):
    with pytest.raises(InputError) as caught:
        datasets.find_fashion_mnist(tmp_path)
    for words in (str(tmp_path), "train-images-idx3-ubyte", "dataset-fashion-mnist", "--data-dir"):
        assert words in str(caught.value)


def test_files_that_do_not_belong_together_are_refused(fashion_dir):
    (fashion_dir / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(19)))
    with pytest.raises(StorageError, match="one release"):
        datasets.fashion_mnist(fashion_dir, validation=5)


def test_digits_are_split_without_overlap_and_in_range():
    data = datasets.digits(train=300, validation=100, held_out=(3, 7))
    parts = [data.train, data.validation, data.test, data.held_out]
    assert sum(map(len, parts)) == 1797
    for part in parts:
        assert part.inputs.shape[1:] == (1, 8, 8) and part.inputs.dtype == torch.float32
        assert float(part.inputs.min()) == 0 and float(part.inputs.max()) == 1
    assert data.classes == ("0", "1", "2", "4", "5", "6", "8", "9")
    for part in parts[:3]:
        assert sorted(part.targets.unique().tolist()) == list(range(8))
    assert sorted(data.held_out.targets.unique().tolist()) == [3, 7]


def test_digits_depend_on_the_seed_alone():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, again, other = (datasets.digits(seed=seed).train for seed in (0, 0, 1))
    assert torch.equal(first.inputs, again.inputs) and not torch.equal(first.inputs, other.inputs)
    assert torch.equal(before, torch.random.get_rng_state())


def test_relabelled_classes_keep_their_images():
    split = datasets.Split(torch.arange(6.0)[:, None], torch.tensor([5, 2, 9, 2, 5, 7]))
    inside, outside = datasets.hold_out_classes(split, (9, 2))
    assert inside.targets.tolist() == [0, 0, 1] and inside.inputs.flatten().tolist() == [0, 4, 5]
    assert outside.targets.tolist() == [2, 9, 2] and outside.inputs.flatten().tolist() == [1, 2, 3]
    with pytest.raises(InputError, match="not among the labels"):
        datasets.hold_out_classes(split, (3,))
    with pytest.raises(InputError, match="no class"):
        datasets.hold_out_classes(split, (2, 5, 7, 9))


def test_too_many_examples_asked_for():
    with pytest.raises(InputError, match="1797"):
        datasets.digits(train=1700, validation=300)


def test_a_split_needs_as_many_targets_as_inputs():
    with pytest.raises(InputError, match="3 inputs and 2 targets"):
        datasets.Split(torch.zeros(3, 1), torch.zeros(2))


def test_loaders_drop_nothing():
    split = datasets.Split(torch.arange(10.0)[:, None], torch.arange(10))
    batches = list(split.loader(4, shuffle=True, generator=torch.Generator().manual_seed(0)))
    assert [len(y) for _, y in batches] == [4, 4, 2]
    assert sorted(torch.cat([y for _, y in batches]).tolist()) == list(range(10))


@pytest.mark.parametrize(
    ("load", "features", "classes"),
    [(datasets.breast_cancer, 30, 2), (datasets.wine, 13, 3), (datasets.diabetes, 10, 0)],
)
def test_tables_are_standardised_by_the_training_part(load, features, classes):
    data = load()
    assert data.train.inputs.shape[1] == features and len(data.classes) == classes
    torch.testing.assert_close(data.train.inputs.mean(0), torch.zeros(features), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train.inputs.std(0), torch.ones(features), atol=1e-4, rtol=0)
    assert abs(float(data.test.inputs.mean())) > 1e-4  # not standardised by itself
    if classes:
        assert data.train.targets.dtype == torch.int64
    else:
        assert data.train.targets.shape[1:] == (1,) and data.train.targets.dtype == torch.float32


def test_in_between_leaves_its_gap():
    data = datasets.in_between(100, noise=0.0)
    assert float(data.inputs.abs().min()) >= 0.7 and float(data.inputs.abs().max()) <= 2
    assert int((data.inputs < 0).sum()) == 50
    torch.testing.assert_close(data.targets, datasets.in_between_truth(data.inputs))


def test_quarter_turns_are_exact():
    images = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    turned = datasets.rotated(images, (0, 90, 180))
    expected = torch.cat([images, images.rot90(1, (2, 3)), images.rot90(2, (2, 3))])
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=0)


def test_rotation_keeps_angles_in_oblong_images():
    images = torch.rand(
        1, 1, 6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    torch.testing.assert_close(datasets.rotated(images, 180), images.flip(2, 3))
    quarter = datasets.rotated(images, 90)[0, 0]
    torch.testing.assert_close(quarter[:, 2:8], images[0, 0].rot90(1)[2:8], atol=1e-9, rtol=0)
    with pytest.raises(InputError, match="N, C, H, W"):
        datasets.rotated(images[0], 90)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_seeded_and_keeps_the_dtype(dtype):
    images = torch.zeros(4, 1, 8, 8, dtype=dtype)
    one, again, other = (datasets.noise_like(images, seed=seed) for seed in (0, 0, 1))
    assert one.dtype == dtype and torch.equal(one, again) and not torch.equal(one, other)
    noisy = datasets.noisy(images + 0.5, 0.1)
    assert noisy.dtype == dtype and 0 < float((noisy - 0.5).std()) < 0.2


def test_rescaled_digits_fit_another_network():
    images = torch.rand(3, 1, 8, 8)
    big = datasets.rescaled(images, 28)
    assert big.shape == (3, 1, 28, 28)
    assert float(big.min()) >= 0 and float(big.max()) <= 1
    torch.testing.assert_close(
        datasets.rescaled(torch.full((1, 1, 8, 8), 0.3), 28), torch.full((1, 1, 28, 28), 0.3)
    )


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"nullbayes\[demo\]"):
        datasets.digits()
