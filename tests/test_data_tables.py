"""The loaders of the benchmark tables, on small files of the exact formats and on the real files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pycnf.data import DataError, Dataset, load

h5py = pytest.importorskip("h5py")
pd = pytest.importorskip("pandas")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def real_data() -> Path:
    folder = Path(os.environ.get("PYCNF_DATA", ""))
    if not (folder / "power_household.npz").is_file():
        pytest.skip("set PYCNF_DATA to a folder with the real tables")
    return folder


def gaussian_score(data: Dataset) -> float:
    """Mean test log-likelihood of the Gaussian with the moments of the training and validation rows."""
    x = torch.cat([data.train, data.validation]).double()
    fitted = torch.distributions.MultivariateNormal(x.mean(dim=0), torch.cov(x.T))
    return fitted.log_prob(data.test.double()).mean().item()


def save(path: Path, x: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, x)


def close(actual: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_embedded_power_scores_as_published() -> None:
    data = load("power")
    assert (len(data.train), len(data.validation), len(data.test)) == (40_000, 5_000, 5_000)
    assert data.columns[0] == "global_active_power"
    x = torch.cat([data.train, data.validation]).double()
    torch.testing.assert_close(x.mean(dim=0), torch.zeros(6).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(dim=0, correction=0), torch.ones(6).double(), atol=1e-5, rtol=0)
    assert gaussian_score(data) == pytest.approx(-7.81, abs=3 * 0.15)


def test_embedded_power_noise_is_seeded_and_invertible() -> None:
    data = load("power", seed=0)
    assert torch.equal(data.train, load("power", seed=0).train)
    assert not torch.equal(data.train, load("power", seed=1).train)
    power, *_, minute = data.restore(data.train.double()).T
    assert ((power > 0) & (power < 12)).all()  # kilowatts
    torch.testing.assert_close(minute, minute.round(), atol=1e-3, rtol=0)
    assert minute.round().min() == 0
    assert minute.round().max() == 1439


def power_array(rng: np.random.Generator, n: int = 500) -> np.ndarray:
    measured = rng.integers(0, 3000, (n, 7)) * np.array([1e-3, 1e-3, 1e-2, 1e-1, 1, 1, 1])
    return np.hstack([measured, rng.integers(0, 1440, (n, 1))])


def test_power_follows_maf(tmp_path: Path, rng: np.random.Generator) -> None:
    x = power_array(rng)
    save(tmp_path / "power" / "data.npy", x)
    data = load("power-full", data_dir=tmp_path)
    # by hand: shuffle in place, noise for the voltage before the active power, no statistics of test rows
    legacy = np.random.RandomState(42)
    legacy.shuffle(x)
    voltage, power, meters = legacy.rand(500), legacy.rand(500), legacy.rand(500, 3)
    z = np.column_stack([x[:, 0] + 1e-3 * power, x[:, 2] + 1e-2 * voltage, x[:, 4:7] + meters, x[:, 7]])
    mean, std = z[:450].mean(0), z[:450].std(0)
    close(data.train, ((z - mean) / std)[:405])
    close(data.validation, ((z - mean) / std)[405:450])
    close(data.test, ((z - mean) / std)[450:])
    close(data.restore(data.test.double()), z[450:])


def test_power_formats_agree(tmp_path: Path, rng: np.random.Generator) -> None:
    x = power_array(rng, 100)
    save(tmp_path / "a" / "power" / "data.npy", x)
    names = ["Global_active_power", "Global_reactive_power", "Voltage", "Global_intensity"]
    names += ["Sub_metering_1", "Sub_metering_2", "Sub_metering_3"]
    lines = [";".join(["Date", "Time", *names]), "1/1/2007;00:00:00;?;?;?;?;?;?;"]
    for *measured, minute in x:
        time = f"{int(minute) // 60:02d}:{int(minute) % 60:02d}:00"
        lines.append(";".join(["16/12/2006", time, *(f"{value:.3f}" for value in measured)]))
    (tmp_path / "b" / "power").mkdir(parents=True)
    (tmp_path / "b" / "power" / "household_power_consumption.txt").write_text("\n".join(lines), encoding="ascii")
    units = np.array([1e3, 1e3, 1e2, 1e1, 1, 1, 1, 1])
    columns = (x * units).round().astype(np.int16).T[[7, 0, 1, 2, 3, 4, 5, 6]]
    (tmp_path / "c").mkdir()
    np.savez(tmp_path / "c" / "power_household.npz", columns=columns)
    array, text, integers = (load("power-full", data_dir=tmp_path / folder) for folder in "abc")
    torch.testing.assert_close(text.train, array.train)
    torch.testing.assert_close(integers.train, array.train)


def test_miniboone_keeps_order(tmp_path: Path, rng: np.random.Generator) -> None:
    x = rng.standard_normal((1000, 43))
    save(tmp_path / "data" / "miniboone" / "data.npy", x)
    data = load("miniboone", data_dir=tmp_path)
    mean, std = x[:900].mean(0), x[:900].std(0)
    assert (len(data.train), len(data.validation), len(data.test)) == (810, 90, 100)
    close(data.train, (x[:810] - mean) / std)
    close(data.test, (x[900:] - mean) / std)


def gas_frame(rng: np.random.Generator, n: int = 1000) -> pd.DataFrame:
    a, b, c = rng.standard_normal((3, n))
    near = 0.05 * rng.standard_normal((3, n))
    columns = {
        "Time": np.arange(n),
        "Meth": b,
        "Eth": a,
        "A1": a,
        "A2": a + near[0],
        "A3": a + near[1],
        "minus": -a,
        "B1": b,
        "B2": b + 10 * near[2],
        "C": 5 + 3 * c,
    }
    frame = pd.DataFrame(columns, dtype=float)
    frame.columns = pd.Index(list(columns), dtype=object)
    return frame


def test_gas_drops_the_first_of_similar_sensors(tmp_path: Path, rng: np.random.Generator) -> None:
    frame = gas_frame(rng)
    (tmp_path / "gas").mkdir()
    frame.to_pickle(tmp_path / "gas" / "ethylene_CO.pickle")
    data = load("gas", data_dir=tmp_path)
    assert data.columns == ("A3", "minus", "B1", "B2", "C")  # "minus" has correlation -1, "B2" only 0.9
    kept = frame[list(data.columns)]
    z = ((kept - kept.mean()) / kept.std()).to_numpy()
    close(data.train, z[:810])
    close(data.validation, z[810:900])
    close(data.test, z[900:])


def test_gas_needs_its_columns(tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "gas").mkdir()
    gas_frame(rng).drop(columns="Meth").to_pickle(tmp_path / "gas" / "ethylene_CO.pickle")
    with pytest.raises(DataError, match="expected the columns of the GAS set, Meth is missing"):
        load("gas", data_dir=tmp_path)


def hepmass_files(folder: Path, rng: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame]:
    def frame(n: int) -> pd.DataFrame:
        x = rng.standard_normal((n, 4))
        x[::3, 1] = x[:, 1].min()  # the smallest value repeats: the feature goes
        x[::3, 2] = 0.5  # another value repeats: the feature stays
        return pd.DataFrame({"# label": rng.integers(0, 2, n).astype(float), **{f"f{j}": x[:, j] for j in range(4)}})

    train, test = frame(400), frame(200)
    (folder / "hepmass").mkdir()
    train.to_csv(folder / "hepmass" / "1000_train.csv", index=False)
    test.assign(mass=1000.0).to_csv(folder / "hepmass" / "1000_test.csv", index=False)
    return train, test


def test_hepmass_follows_maf(tmp_path: Path, rng: np.random.Generator) -> None:
    train, test = hepmass_files(tmp_path, rng)
    data = load("hepmass", data_dir=tmp_path)
    assert data.columns == ("f0", "f2", "f3")
    signal, held_out = (frame[frame["# label"] == 1][list(data.columns)] for frame in (train, test))
    z = ((signal - signal.mean()) / signal.std()).to_numpy()
    cut = int(0.1 * len(z))
    close(data.train, z[:-cut])
    close(data.validation, z[-cut:])
    close(data.test, ((held_out - signal.mean()) / signal.std()).to_numpy())


def test_hepmass_refuses_other_columns(tmp_path: Path, rng: np.random.Generator) -> None:
    _, test = hepmass_files(tmp_path, rng)
    test.rename(columns={"f1": "g1"}).to_csv(tmp_path / "hepmass" / "1000_test.csv", index=False)
    with pytest.raises(DataError, match=r"1000_test\.csv: its columns are not those of 1000_train\.csv"):
        load("hepmass", data_dir=tmp_path)


def bsds_file(folder: Path, features: int = 63, keys: tuple[str, ...] = ("train", "validation", "test")) -> None:
    (folder / "BSDS300").mkdir()
    with h5py.File(folder / "BSDS300" / "BSDS300.hdf5", "w") as file:
        for j, key in enumerate(keys):
            file[key] = np.random.default_rng(j).standard_normal((1000, features)).astype(np.float32)


def test_bsds300_is_taken_as_it_is(tmp_path: Path) -> None:
    bsds_file(tmp_path)
    data = load("bsds300", data_dir=tmp_path)
    close(data.validation, np.random.default_rng(1).standard_normal((1000, 63)))


def test_bsds300_refuses_other_files(tmp_path: Path) -> None:
    bsds_file(tmp_path, features=64)
    with pytest.raises(DataError, match=r"expected patches of shape \(\*, 63\), got \(1000, 64\)"):
        load("bsds300", data_dir=tmp_path)
    path = tmp_path / "BSDS300" / "BSDS300.hdf5"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="not an HDF5 file, or damaged"):
        load("bsds300", data_dir=tmp_path)
    path.unlink()
    path.parent.rmdir()
    bsds_file(tmp_path, keys=("train", "test"))
    with pytest.raises(DataError, match="expected the arrays train, validation and test"):
        load("bsds300", data_dir=tmp_path)


def test_bsds300_names_the_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bsds_file(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(DataError, match=r"h5py is needed .*pip install 'pycnf\[tables\]'"):
        load("bsds300", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "features"),
    [("power-full", "power/data.npy", 8), ("miniboone", "miniboone/data.npy", 43)],
)
def test_arrays_of_other_widths_are_refused(name: str, file: str, features: int, tmp_path: Path) -> None:
    save(tmp_path / file, np.zeros((30, 5)))
    with pytest.raises(DataError, match=f"expected the {features} columns of MAF's .* array, got 5"):
        load(name, data_dir=tmp_path)


def test_truncated_array_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "power" / "data.npy"
    save(path, power_array(rng))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"data\.npy: not a NumPy file, or damaged"):
        load("power-full", data_dir=tmp_path)


def test_damaged_values_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    x = rng.standard_normal((1000, 43))
    x[3, 7] = np.nan
    save(tmp_path / "miniboone" / "data.npy", x)
    with pytest.raises(DataError, match=r"miniboone \(train\): 1 of 810 rows hold NaN or infinity, in columns 'x7'"):
        load("miniboone", data_dir=tmp_path)


def test_other_text_is_refused_as_power(tmp_path: Path) -> None:
    (tmp_path / "household_power_consumption.txt").write_text("a;b\n1;2\n", encoding="ascii")
    with pytest.raises(DataError, match=r"household_power_consumption\.txt: not a table"):
        load("power-full", data_dir=tmp_path)


def shapes(data: Dataset) -> tuple[int, int, int]:
    return len(data.train), len(data.validation), len(data.test)


def test_real_power_scores_as_published(real_data: Path) -> None:
    data = load("power-full", data_dir=real_data)
    assert shapes(data) == (1_659_900, 184_433, 204_925)
    assert gaussian_score(data) == pytest.approx(-7.73, abs=3 * 0.02)


def test_real_patches_score_as_published(real_data: Path) -> None:
    data = load("bsds300", data_dir=real_data)
    assert shapes(data) == (100_000, 10_000, 25_000)
    assert data.features == 63
    assert gaussian_score(data) == pytest.approx(96.2, abs=1)


def test_real_miniboone_head(real_data: Path) -> None:
    data = load("miniboone", data_dir=real_data)
    assert sum(shapes(data)) == 1523
    assert data.features == 43
    assert "no result on the benchmark" in data.notes


@pytest.mark.parametrize(
    ("name", "rows", "features"),
    [("gas-drift", 6697, 8), ("higgs", 7500, 24), ("magic", 19_020, 10), ("satimage", 6435, 36)],
)
def test_real_substitutes(name: str, rows: int, features: int, real_data: Path) -> None:
    data = load(name, data_dir=real_data)
    assert sum(shapes(data)) == rows
    assert data.features == features
    torch.testing.assert_close(data.train.mean(dim=0), torch.zeros(features), atol=1e-4, rtol=0)
    assert torch.equal(data.test, load(name, data_dir=real_data).test)
    assert not torch.equal(data.test, load(name, data_dir=real_data, seed=1).test)
