"""Downloads, from a server of our own."""

from __future__ import annotations

import functools
import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from pycnf.data import DataError, describe, fetch, load, remote

pytest.importorskip("pooch")


class Server:
    """Serve a folder and count the requests."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.requests = folder, 0
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests += 1
                super().do_GET()

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "served").mkdir()
    server = Server(tmp_path / "served")
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def publish(server: Server, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, digest: str = "") -> None:
    (server.folder / "file").write_bytes(content)
    checksum = f"sha256:{digest or hashlib.sha256(content).hexdigest()}"
    archive = replace(remote.ARCHIVES[name], url=f"{server.url}/file", checksum=checksum)
    monkeypatch.setitem(remote.ARCHIVES, name, archive)


def maf_archive(*, without: str = "") -> bytes:
    buffer = io.BytesIO()
    x = io.BytesIO()
    np.save(x, np.random.default_rng(0).standard_normal((1000, 43)))
    files = {
        "miniboone/data.npy": x.getvalue(),
        "gas/ethylene_CO.pickle": b"pickle",
        "mnist/mnist.pkl.gz": b"m",
    }
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for path, content in files.items():
            if path != without:
                info = tarfile.TarInfo(f"data/{path}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("progressbar", [True, False])
def test_fetch_places_what_load_finds(
    progressbar: bool,
    server: Server,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    publish(server, monkeypatch, "maf", maf_archive())
    paths = fetch("miniboone", folder, progressbar=progressbar)
    assert ("100%" in capfd.readouterr().err) == progressbar
    assert paths == (folder / "miniboone" / "data.npy",)
    assert files(folder) == ["maf_data.tar.gz", "miniboone/data.npy"]
    assert load("miniboone", data_dir=folder).features == 43
    assert describe("miniboone", data_dir=folder).present
    assert server.requests == 1
    fetch("miniboone", folder)  # there already
    fetch("gas", folder)  # of the same archive
    assert server.requests == 1
    assert (folder / "gas" / "ethylene_CO.pickle").read_bytes() == b"pickle"


def test_fetch_obeys_the_environment(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = "Date;Time;Global_active_power;Global_reactive_power;Voltage;Global_intensity;"
    header += "Sub_metering_1;Sub_metering_2;Sub_metering_3"
    rng = np.random.default_rng(0)
    rows = [f"1/1/2007;00:{j % 60:02d}:00;" + ";".join(map(str, rng.integers(1, 99, 7))) for j in range(200)]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        bundle.writestr("household_power_consumption.txt", "\n".join([header, *rows]))
    publish(server, monkeypatch, "uci-power", buffer.getvalue())
    monkeypatch.setenv("PYCNF_DATA", str(folder))
    fetch("power-full", progressbar=False)
    assert files(folder) == ["power/household_power_consumption.txt", "uci_power.zip"]
    assert len(load("power-full").train) == 162


def test_wrong_checksum_leaves_nothing(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(server, monkeypatch, "maf", maf_archive(), digest="0" * 64)
    with pytest.raises(DataError, match=r"the download of http://127.* failed: its checksum is not sha256:0000"):
        fetch("miniboone", folder, progressbar=False)
    assert files(folder) == []


def test_unreachable_host(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = replace(remote.ARCHIVES["maf"], url="http://127.0.0.1:1/data.tar.gz")
    monkeypatch.setitem(remote.ARCHIVES, "maf", archive)
    with pytest.raises(DataError, match=r"failed: .*refused.*; check the connection .*maf_data\.tar\.gz and try again"):
        fetch("miniboone", folder, progressbar=False)
    assert files(folder) == []


def test_missing_page(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(server, monkeypatch, "maf", b"")
    (server.folder / "file").unlink()
    with pytest.raises(DataError, match="failed: 404"):
        fetch("miniboone", folder, progressbar=False)
    assert files(folder) == []


@pytest.mark.parametrize("cut", [20, -2000])
def test_damaged_archive_leaves_no_half_file(
    cut: int, server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(server, monkeypatch, "maf", maf_archive()[:cut])
    with pytest.raises(DataError, match=r"maf_data\.tar\.gz: the archive is damaged .*delete it and fetch again"):
        fetch("gas", folder, progressbar=False)
    assert files(folder) == ["maf_data.tar.gz"]


def test_archive_without_the_file(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(server, monkeypatch, "maf", maf_archive(without="miniboone/data.npy"))
    with pytest.raises(DataError, match=r"there is no miniboone/data\.npy in the archive"):
        fetch("miniboone", folder, progressbar=False)


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="cannot write to the data folder"):
        fetch("miniboone", tmp_path / "file" / "folder", progressbar=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("moons", "moons needs no download: it is drawn"),
        ("power", "power needs no download: it is part of the package"),
        (
            "magic",
            r"magic has no archive .*power-full, .*read from a folder that holds magic\.npz, see https",
        ),
        ("minibone", r"did you mean miniboone\?"),
    ],
)
def test_nothing_to_fetch(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        fetch(name, tmp_path)
