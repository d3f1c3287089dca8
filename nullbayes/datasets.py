"""Real data that needs no download: for the demo, the experiments, and first steps.

scikit-learn's sets come with that package (``pip install 'nullbayes[demo]'``); Fashion-MNIST is read from IDX files,
which Debian packages as ``dataset-fashion-mnist``. Nothing here uses the network or torch's global random state: what
is random takes a seed or a generator. Images are float32 in [0, 1], shaped (N, 1, H, W).
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from nullbayes.errors import InputError, MissingExtraError, StorageError

FASHION_MNIST_DIRS = (
    Path("/usr/share/datasets/fashion-mnist"),
    Path("/usr/share/datasets/FashionMNIST/raw"),
    Path("data/fashion-mnist"),
    Path("data/FashionMNIST/raw"),
)
FASHION_MNIST_CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
_FASHION_MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_IDX_DIMENSIONS = 32  # what NumPy took for long
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


@dataclass(frozen=True)
class Split:
    """Inputs with their targets: one part of a data set."""

    inputs: Tensor  # (N, ...)
    targets: Tensor  # (N,) int64 labels, or (N, O) float values
    name: str = ""

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise InputError(
                f"Split {self.name!r} needs one target per input: got {len(self.inputs)} inputs and "
                f"{len(self.targets)} targets."
            )

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: Tensor | slice) -> Split:
        return replace(self, inputs=self.inputs[index], targets=self.targets[index])

    def loader(
        self,
        batch_size: int = 256,
        *,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
    ) -> DataLoader[Any]:
        """Batches of (inputs, targets); the last one may be smaller, and nothing is dropped.

        Shuffled by ``generator``, or by one of seed 0: a DataLoader without one would draw from torch's global state.
        """
        data = TensorDataset(self.inputs, self.targets)
        generator = generator or torch.Generator().manual_seed(0)
        return DataLoader(data, batch_size=batch_size, shuffle=shuffle, generator=generator)


@dataclass(frozen=True)
class Dataset:
    """A data set split three ways, with the classes left out of all three, if any, beside them."""

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...] = ()  # names in the order of the labels; empty for regression
    held_out: Split | None = (
        None  # inputs of the classes that training never saw; targets are their first labels
    )
    held_out_classes: tuple[str, ...] = ()


def permutation(n: int, seed: int) -> Tensor:
    """A random order of ``n`` things that depends on ``seed`` alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def hold_out_classes(split: Split, classes: Iterable[int]) -> tuple[Split, Split]:
    """Separate a split into the classes that stay, relabelled 0, 1, ... in order, and the ``classes`` held out."""
    held = sorted(set(classes))
    present = set(split.targets.unique().tolist())
    if unknown := [c for c in held if c not in present]:
        raise InputError(
            f"Classes to hold out are not among the labels {sorted(present)}: {unknown}."
        )
    if not present - set(held):
        raise InputError(f"Holding out {held} would leave no class to train on.")
    out = torch.isin(split.targets, torch.tensor(held, dtype=split.targets.dtype))
    kept = torch.tensor(sorted(present - set(held)), dtype=split.targets.dtype)
    inside = split[~out]
    return (
        replace(inside, targets=torch.searchsorted(kept, inside.targets)),
        replace(split[out], name="held_out"),
    )


def partition(
    split: Split, sizes: Sequence[int | None], *, seed: int, names: Sequence[str]
) -> list[Split]:
    """Shuffle by ``seed`` and cut into parts of the given ``sizes``; one size may be None: all that remains."""
    fixed = sum(size for size in sizes if size is not None)
    rest = len(split) - fixed
    if rest < 0 or list(sizes).count(None) > 1:
        raise InputError(
            f"Cannot cut {len(split)} examples into parts of {list(sizes)}: ask for fewer."
        )
    order = permutation(len(split), seed)
    parts, start = [], 0
    for size, name in zip(sizes, names, strict=True):
        stop = start + (rest if size is None else size)
        parts.append(replace(split[order[start:stop]], name=name))
        start = stop
    return parts


def digits(
    *,
    train: int = 600,
    validation: int = 300,
    held_out: Sequence[int] = (),
    seed: int = 0,
    dtype: Any = torch.float32,
) -> Dataset:
    """scikit-learn's handwritten digits: 1,797 images of 8 × 8, in [0, 1].

    ``held_out`` digits are seen by neither training, validation nor test, so they can be asked for later as a shift.
    """
    images, labels = _sklearn("load_digits")
    inputs = torch.as_tensor(images, dtype=dtype).reshape(-1, 1, 8, 8) / 16
    every = Split(inputs, torch.as_tensor(labels, dtype=torch.int64))
    inside, outside = hold_out_classes(every, held_out)
    parts = partition(
        inside, (train, validation, None), seed=seed, names=("train", "validation", "test")
    )
    return Dataset(
        "digits",
        parts[0],
        parts[1],
        parts[2],
        classes=tuple(str(c) for c in range(10) if c not in held_out),
        held_out=outside if held_out else None,
        held_out_classes=tuple(str(c) for c in sorted(held_out)),
    )


def breast_cancer(*, seed: int = 0, dtype: Any = torch.float32) -> Dataset:
    """Breast-cancer diagnosis, 569 × 30, two classes; features standardised by the training part."""
    return _table("load_breast_cancer", ("malignant", "benign"), seed, dtype)


def wine(*, seed: int = 0, dtype: Any = torch.float32) -> Dataset:
    """Origin of wines, 178 × 13, three classes; features standardised by the training part."""
    return _table("load_wine", ("cultivar 0", "cultivar 1", "cultivar 2"), seed, dtype)


def diabetes(*, seed: int = 0, dtype: Any = torch.float32) -> Dataset:
    """Progress of diabetes, 442 × 10, regression; features and target standardised by the training part."""
    return _table("load_diabetes", (), seed, dtype)


def in_between(
    n: int = 80, *, noise: float = 0.1, seed: int = 0, dtype: Any = torch.float32
) -> Split:
    """Regression in one dimension with a gap in the middle: what does the model say where it saw nothing?

    Inputs lie evenly at random in [-2, -0.7] and [0.7, 2]; targets are :func:`in_between_truth` plus noise.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = 0.7 + 1.3 * torch.rand(n, 1, generator=generator, dtype=torch.float64)
    inputs[: n // 2] *= -1
    targets = in_between_truth(inputs) + noise * torch.randn(
        n, 1, generator=generator, dtype=torch.float64
    )
    return Split(inputs.to(dtype), targets.to(dtype), "in-between")


def in_between_truth(inputs: Tensor) -> Tensor:
    """The noise-free function behind :func:`in_between`."""
    return torch.sin(2.5 * inputs) + 0.3 * inputs


def fashion_mnist(
    data_dir: str | Path | None = None,
    *,
    train: int | None = None,
    validation: int = 2000,
    test: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Fashion-MNIST: 60,000 training and 10,000 test images, 28 × 28, ten classes.

    ``validation`` images are taken from the 10,000, which training never sees, and the rest is the test split: so
    ``train=None`` trains on all 60,000. ``data_dir`` may be left out where the Debian package is installed.
    """
    folder = find_fashion_mnist(data_dir)
    everything = {}
    for part, (images, labels) in _FASHION_MNIST_FILES.items():
        pixels, targets = read_idx(_idx_file(folder, images)), read_idx(_idx_file(folder, labels))
        if pixels.ndim != 3 or targets.ndim != 1 or len(pixels) != len(targets):
            raise StorageError(
                f"{folder}: {images} has shape {tuple(pixels.shape)} and {labels} {tuple(targets.shape)}; expected "
                "(N, 28, 28) and (N,). Get both files of one release again."
            )
        everything[part] = Split(pixels.float().div_(255).unsqueeze(1), targets.long())
    order = permutation(len(everything["train"]), seed)[:train]
    rest = len(everything["test"]) - validation
    sizes = (validation, min(test or rest, rest), None)
    held = partition(everything["test"], sizes, seed=seed + 1, names=("validation", "test", ""))
    return Dataset(
        "fashion-mnist",
        replace(everything["train"][order], name="train"),
        held[0],
        held[1],
        classes=FASHION_MNIST_CLASSES,
    )


def find_fashion_mnist(data_dir: str | Path | None = None) -> Path:
    """The folder with Fashion-MNIST's four IDX files: ``data_dir``, or the first usual place that has them."""
    places = [Path(data_dir)] if data_dir is not None else list(FASHION_MNIST_DIRS)
    names = [name for pair in _FASHION_MNIST_FILES.values() for name in pair]
    for place in places:
        if all(_idx_path(place, name) for name in names):
            return place
    looked = "\n".join(f"  {place}" for place in places)
    raise InputError(
        f"Fashion-MNIST's files were not found. Looked for {', '.join(names)} (each may end in .gz) in\n{looked}\n"
        "On Debian and Ubuntu `apt-get install dataset-fashion-mnist` brings them; otherwise get the four files from "
        "the project zalandoresearch/fashion-mnist and pass their folder as `data_dir` (`--data-dir`)."
    )


def read_idx(path: str | Path) -> Tensor:
    """Read one IDX file, packed by gzip or not, and check that it is whole.

    The format: two zero bytes, the element type, the number of dimensions, the sizes as big-endian 32-bit integers,
    then the elements. A packed file carries a checksum; one that is not packed is checked against ``NAME.sha256``
    (what `sha256sum NAME > NAME.sha256` writes) where that lies beside it.

    Raises:
        StorageError: missing, damaged, cut off, or no IDX file.
    """
    path = Path(path)
    again = f"Get the file {path.name} again."
    try:
        raw = path.read_bytes()
        _check_digest(path, raw)
        data = _unpacked(raw) if raw[:2] == b"\x1f\x8b" else raw
    except StorageError:
        raise
    except (EOFError, zlib.error, MemoryError) as error:
        raise StorageError(
            f"{path}: the gzip stream is damaged or cut off ({error}). {again}"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"{path} cannot be read: {reason}.") from error
    if (
        len(data) < 4
        or data[:2] != b"\0\0"
        or data[2] not in _IDX_TYPES
        or data[3] > _IDX_DIMENSIONS
    ):
        raise StorageError(
            f"{path} is not an IDX file: its first bytes are {data[:4].hex(' ') or 'missing'}. {again}"
        )
    dtype, shape, expected = _idx_header(data)
    if len(shape) < data[3]:
        raise StorageError(
            f"{path} is cut off inside its header: {len(data)} bytes, expected at least {4 + 4 * data[3]}. {again}"
        )
    if len(data) != expected:
        kind = "cut off" if len(data) < expected else "followed by something else"
        raise StorageError(
            f"{path} is {kind}: {len(data)} bytes, its header {shape} means {expected}. {again}"
        )
    array = np.frombuffer(data, dtype=dtype, offset=4 + 4 * len(shape)).reshape(shape)
    return torch.from_numpy(array.astype(dtype.newbyteorder("=")))


def _idx_header(data: bytes) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Element type, sizes (fewer than promised where the data end), and the bytes that the whole file has."""
    dtype = np.dtype(_IDX_TYPES[data[2]])
    there = min(data[3], (len(data) - 4) // 4)
    shape = struct.unpack(f">{there}I", data[4 : 4 + 4 * there])
    return dtype, shape, 4 + 4 * data[3] + math.prod(shape) * dtype.itemsize


def _unpacked(raw: bytes) -> bytes:
    """What a gzip file holds, and no more than one byte beyond what an IDX header at its beginning promises."""
    stream = zlib.decompressobj(wbits=31)
    data = stream.decompress(raw, 4 + 4 * _IDX_DIMENSIONS)
    expected = len(data)
    if len(data) >= 4 and data[2] in _IDX_TYPES and data[3] <= _IDX_DIMENSIONS:
        # A stream grows to no more than 1032 times its length, whatever the header says.
        expected = max(expected, min(_idx_header(data)[2], 1100 * len(raw)))
    while not stream.eof and len(data) <= expected:
        more = stream.decompress(stream.unconsumed_tail, expected + 1 - len(data))
        if not more and not stream.eof:
            raise EOFError("it ends before its end")
        data += more
    return data + stream.unused_data


def _check_digest(path: Path, raw: bytes) -> None:
    beside = path.with_name(path.name + ".sha256")
    if not beside.is_file():
        return
    told = beside.read_text(errors="replace").split()
    if not told or told[0].lower() != hashlib.sha256(raw).hexdigest():
        raise StorageError(
            f"{path} is damaged: its SHA-256 is not the one in {beside.name}. Get the file {path.name} again."
        )


def rotated(images: Tensor, angles: float | Sequence[float]) -> Tensor:
    """``images`` (N, C, H, W) turned counter-clockwise by each angle in degrees: (len(angles) · N, C, H, W), in order.

    Bilinear; what turns in from outside is zero.
    """
    if images.ndim != 4:
        raise InputError(
            f"`rotated` needs images of shape (N, C, H, W), got {tuple(images.shape)}."
        )
    turned = []
    height, width = images.shape[-2:]
    for angle in [angles] if isinstance(angles, (int, float)) else angles:
        c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        # affine_grid works in coordinates that run from -1 to 1 over each side, so unequal sides need a correction.
        matrix = images.new_tensor([[c, -s * height / width, 0.0], [s * width / height, c, 0.0]])
        grid = F.affine_grid(
            matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False
        )
        turned.append(
            F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        )
    return torch.cat(turned)


def noise_like(images: Tensor, *, seed: int = 0) -> Tensor:
    """Images of independent uniform noise in [0, 1], of the shape, dtype and device of ``images``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images.shape, generator=generator, dtype=torch.float64).to(images)


def noisy(images: Tensor, sd: float, *, seed: int = 0) -> Tensor:
    """``images`` with Gaussian noise of standard deviation ``sd`` added, clipped to [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float64).to(images)
    return (images + sd * noise).clamp(0, 1)


def rescaled(images: Tensor, size: int) -> Tensor:
    """``images`` (N, C, H, W) resampled bilinearly to ``size`` × ``size``: say, 8 × 8 digits for a 28 × 28 network."""
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False).clamp(
        0, 1
    )


def _table(loader: str, classes: tuple[str, ...], seed: int, dtype: Any) -> Dataset:
    features, labels = _sklearn(loader)
    inputs = torch.as_tensor(features, dtype=torch.float64)
    targets = (
        torch.as_tensor(labels).long()
        if classes
        else torch.as_tensor(labels, dtype=torch.float64)[:, None]
    )
    n = len(inputs)
    parts = partition(
        Split(inputs, targets),
        (int(0.6 * n), int(0.2 * n), None),
        seed=seed,
        names=("train", "validation", "test"),
    )
    scale_inputs, scale_targets = _standardiser(parts[0].inputs), _standardiser(parts[0].targets)

    def scaled(part: Split) -> Split:
        y = part.targets if classes else scale_targets(part.targets).to(dtype)
        return replace(part, inputs=scale_inputs(part.inputs).to(dtype), targets=y)

    name = loader.removeprefix("load_").replace("_", "-")
    return Dataset(name, scaled(parts[0]), scaled(parts[1]), scaled(parts[2]), classes)


def _standardiser(values: Tensor) -> Callable[[Tensor], Tensor]:
    mean, sd = values.double().mean(0), values.double().std(0)
    sd = torch.where(sd > 0, sd, torch.ones_like(sd))  # a constant column stays zero instead of NaN
    return lambda x: (x - mean) / sd


def _sklearn(loader: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        import sklearn.datasets
    except ImportError as error:
        raise MissingExtraError(
            f"`{loader}` reads a data set that comes with scikit-learn: pip install 'nullbayes[demo]'."
        ) from error
    bunch = getattr(sklearn.datasets, loader)()
    return bunch.data, bunch.target


def _idx_path(folder: Path, name: str) -> Path | None:
    for suffix in ("", ".gz"):
        if (path := folder / (name + suffix)).is_file():
            return path
    return None


def _idx_file(folder: Path, name: str) -> Path:
    path = _idx_path(folder, name)
    if path is None:  # removed since find_fashion_mnist looked
        raise InputError(f"{folder / name} has disappeared.")
    return path
