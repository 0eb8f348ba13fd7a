"""Sets of images: files in their published formats, their division, damaged and hostile ones, downloads."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data_pickles import OldPickler, Text, old_array

from pycnf.data import DataError
from pycnf.images import ImageSet, describe, fetch, load, sets
from pycnf.images.files import read_idx
from pycnf.images.flow import ImageFlow

IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CIFAR = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
RNG = np.random.default_rng(0)


def idx_bytes(x: np.ndarray) -> bytes:
    """The format of the MNIST files: magic number 0x08nn, sizes as big-endian integers, bytes."""
    return struct.pack(f">I{x.ndim}I", 0x0800 + x.ndim, *x.shape) + x.astype(np.uint8).tobytes()


def digits() -> tuple[np.ndarray, ...]:
    train, test = (RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8) for n in (40, 10))
    return train, np.arange(40) % 10, test, np.arange(10)


def write_idx(folder: Path, arrays: tuple[np.ndarray, ...], *, packed: bool = True) -> None:
    folder.mkdir(parents=True)
    for name, array in zip(IDX, arrays, strict=True):
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
        else:
            (folder / name).write_bytes(idx_bytes(array))


def write_cifar(folder: Path) -> tuple[np.ndarray, list[int]]:
    """Write batches as Python 2 wrote those that are published; return all images and labels in order."""
    folder.mkdir(parents=True)
    images, labels = [], []
    for name in CIFAR:
        data, own = RNG.integers(0, 256, (4, 3072), dtype=np.uint8), RNG.integers(0, 10, 4).tolist()
        batch = {
            Text(b"batch_label"): Text(f"training batch of {name}".encode()),
            Text(b"labels"): own,
            Text(b"data"): old_array(data),
            Text(b"filenames"): [Text(b"leptodactylus_pentadactylus_s_000004.png")] * 4,
        }
        buffer = io.BytesIO()
        OldPickler(buffer, protocol=2).dump(batch)
        (folder / name).write_bytes(buffer.getvalue())
        images.append(data.reshape(4, 3, 32, 32))
        labels += own
    return np.concatenate(images), labels


def assert_digits(found: ImageSet, arrays: tuple[np.ndarray, ...]) -> None:
    train, train_labels, test, test_labels = arrays
    assert found.shape == (1, 28, 28)
    assert found.features == 784
    assert (len(found.train), len(found.validation), len(found.test)) == (36, 4, 10)
    np.testing.assert_array_equal(torch.cat([found.train, found.validation])[:, 0], train)
    np.testing.assert_array_equal(found.test[:, 0], test)
    np.testing.assert_array_equal(torch.cat([found.labels["train"], found.labels["validation"]]), train_labels)
    np.testing.assert_array_equal(found.labels["test"], test_labels)


@pytest.mark.parametrize(
    ("name", "folder", "packed"),
    [
        ("mnist", "mnist", True),
        ("mnist", "MNIST/raw", False),
        ("fashion-mnist", "fashion-mnist", True),
        ("fashion-mnist", "FashionMNIST/raw", True),
    ],
)
def test_idx_files(name: str, folder: str, packed: bool, tmp_path: Path) -> None:
    arrays = digits()
    write_idx(tmp_path / folder, arrays, packed=packed)
    assert_digits(load(name, data_dir=tmp_path), arrays)


@pytest.mark.parametrize(
    "keys", [("train", "train_labels", "test", "test_labels"), ("x_train", "y_train", "x_test", "y_test")]
)
def test_mnist_in_an_archive(keys: tuple[str, ...], tmp_path: Path) -> None:
    arrays = digits()
    np.savez(tmp_path / "mnist.npz", **dict(zip(keys, arrays, strict=True)))
    assert_digits(load("mnist", data_dir=tmp_path), arrays)


def test_cifar10_batches(tmp_path: Path) -> None:
    images, labels = write_cifar(tmp_path / "cifar-10-batches-py")
    found = load("cifar10", data_dir=tmp_path)
    assert found.shape == (3, 32, 32)
    np.testing.assert_array_equal(torch.cat([found.train, found.validation, found.test]), images)
    assert torch.cat([found.labels[part] for part in ("train", "validation", "test")]).tolist() == labels
    assert "CIFAR" not in repr(found)
    assert repr(found) == "ImageSet('cifar10', shape=(3, 32, 32), train=18, validation=2, test=4)"


def test_batches_of_todays_python(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    images, labels = write_cifar(folder)
    for i, name in enumerate(CIFAR):
        own = slice(4 * i, 4 * i + 4)
        (folder / name).write_bytes(pickle.dumps({"data": images[own].reshape(4, 3072), "labels": labels[own]}))
    np.testing.assert_array_equal(load("cifar10", data_dir=tmp_path).test, images[20:])


def test_rows_are_what_a_flow_takes(tmp_path: Path) -> None:
    write_idx(tmp_path / "mnist", digits())
    found = load("mnist", data_dir=tmp_path)
    rows = found.rows("test")
    assert rows.dtype == torch.float32
    assert torch.equal(rows.view(10, 1, 28, 28), found.test.float())
    small = found.shrink(7)
    assert small.shape == (1, 4, 4)
    mean = found.test[3, 0, 7:14, 21:28].float().mean()
    assert small.test[3, 0, 1, 3] == mean.round()
    assert ImageFlow(small.shape, (4,)).eval()().log_prob(small.rows("train")).shape == (36,)
    assert "means of 7 x 7 pixels" in small.notes
    with pytest.raises(ValueError, match="expected a factor that divides 28 and 28, got 3"):
        found.shrink(3)


def test_real_mnist() -> None:
    folder = Path(os.environ.get("PYCNF_DATA", ""))
    if not (folder / "mnist.npz").is_file():
        pytest.skip("set PYCNF_DATA to a folder with mnist.npz")
    found = load("mnist")
    assert (len(found.train), len(found.validation), len(found.test)) == (54_000, 6_000, 10_000)
    assert torch.bincount(found.labels["test"]).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    everything = torch.cat([found.train, found.validation]).double() / 255
    assert float(everything.mean()) == pytest.approx(0.1307, abs=1e-4)
    assert float(everything.std()) == pytest.approx(0.3081, abs=1e-4)


# --- absent, damaged, hostile ------------------------------------------------------------------


def test_absent_sets_are_named_with_the_command_that_fetches_them(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"cifar10: found no cifar-10-batches-py/data_batch_1.*pycnf data fetch cifar10"
    ):
        load("cifar10", data_dir=tmp_path)
    with pytest.raises(DataError, match=r"no such folder"):
        load("fashion-mnist", data_dir=tmp_path / "nowhere")
    with pytest.raises(
        DataError, match="no set of images is called 'imagenet'; there are mnist, fashion-mnist, cifar10"
    ):
        load("imagenet")
    assert not describe("mnist", tmp_path).present
    write_idx(tmp_path / "mnist", digits())
    found = describe("mnist", tmp_path)
    assert found.present
    assert found.path == tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    assert found.features == 784


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file of bytes, it begins with nothing"),
        (b"\0\0\x0d\x03" + b"\0" * 12, "not an IDX file of bytes, it begins with 00 00 0d 03"),
        (idx_bytes(np.zeros((3, 4)))[:9], "not an IDX file of bytes"),
        (idx_bytes(np.zeros((3, 4)))[:-1], r"damaged, it announces \(3, 4\) bytes and holds 11"),
        (gzip.compress(idx_bytes(np.zeros((3, 4))), mtime=0)[:-9], "cannot be read, or damaged"),
    ],
    ids=["empty", "of floats", "cut header", "cut values", "cut archive"],  # an archive names the second it was made in
)
def test_damaged_idx_files(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_idx(path)


def test_missing_idx_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path / "images")


def test_files_that_do_not_fit_together(tmp_path: Path) -> None:
    train, labels, test, test_labels = digits()
    write_idx(tmp_path / "mnist", (train, labels[:-1], test, test_labels))
    with pytest.raises(DataError, match="expected one label for each of 40 images"):
        load("mnist", data_dir=tmp_path)
    write_idx(tmp_path / "fashion-mnist", (train[:, 1:], labels, test, test_labels))
    with pytest.raises(DataError, match=r"images of shape \(1, 28, 28\), got uint8 of shape \(1, 27, 28\)"):
        load("fashion-mnist", data_dir=tmp_path)


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_hostile_and_damaged_batches(tmp_path: Path) -> None:
    folder, target = tmp_path / "cifar-10-batches-py", tmp_path / "made"
    write_cifar(folder)
    for content, message in (
        (pickle.dumps({"data": Hostile(target), "labels": []}), "it names posix.mkdir"),
        (b"no pickle", "not a batch of CIFAR10, or damaged"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8)}), "without the data and labels of a batch"),
        (
            pickle.dumps({"data": np.zeros((2, 3071), np.uint8), "labels": [1, 2]}),
            r"expected bytes of shape \(N, 3072\)",
        ),
    ):
        (folder / "data_batch_2").write_bytes(content)
        with pytest.raises(DataError, match=message):
            load("cifar10", data_dir=tmp_path)
    assert not target.exists()


# --- downloads ---------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder, and the address under which it is served."""
    pytest.importorskip("pooch")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def publish(name: str, folder: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take what the archives of a set are called from a folder that is served."""
    archives = []
    for archive in sets.SOURCES[name].archives:
        file = Path(archive.file).name
        digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        archives.append(replace(archive, url=f"{address}/{file}", checksum=f"sha256:{digest}"))
    monkeypatch.setitem(sets.SOURCES, name, replace(sets.SOURCES[name], archives=tuple(archives)))


def test_fetched_sets_can_be_loaded(served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, address = served
    arrays, data = digits(), tmp_path / "data"
    for name, array in zip(IDX, arrays, strict=True):
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
    np.savez(folder / "mnist.npz", x_train=arrays[0], y_train=arrays[1], x_test=arrays[2], y_test=arrays[3])
    images, _ = write_cifar(tmp_path / "cifar" / "cifar-10-batches-py")
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "cifar" / "cifar-10-batches-py", "cifar-10-batches-py")
    for name in sets.SOURCES:
        publish(name, folder, address, monkeypatch)
        paths = fetch(name, data, progressbar=False)
        assert all(path.is_file() for path in paths)
        assert fetch(name, data, progressbar=False) == paths
    assert_digits(load("mnist", data_dir=data), arrays)
    assert_digits(load("fashion-mnist", data_dir=data), arrays)
    np.testing.assert_array_equal(load("cifar10", data_dir=data).test, images[20:])


def test_a_wrong_checksum_is_refused(served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, address = served
    (folder / "mnist.npz").write_bytes(b"something")
    publish("mnist", folder, address, monkeypatch)
    (folder / "mnist.npz").write_bytes(b"something else")
    with pytest.raises(DataError, match="its checksum is not sha256"):
        fetch("mnist", tmp_path / "data", progressbar=False)
    assert not describe("mnist", tmp_path / "data").present
