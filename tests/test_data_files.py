"""A user's own files, good and bad."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pycnf.data import DataError, load

pd = pytest.importorskip("pandas")
COLUMNS = ["a", "b", "c"]


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((200, 3)) * [1, 10, 100] + [0, 5, -7]


def write(path: Path, x: np.ndarray) -> Path:
    frame = pd.DataFrame(x, columns=COLUMNS)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".tsv":
        frame.to_csv(path, index=False, sep="\t")
    elif path.suffix == ".npy":
        np.save(path, x)
    elif path.suffix == ".npz":
        np.savez(path, x=x, columns=COLUMNS)
    else:
        pytest.importorskip("pyarrow")
        frame.to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".npy", ".npz", ".parquet", ".CSV"])
def test_every_format_gives_the_same(suffix: str, tmp_path: Path, x: np.ndarray) -> None:
    if suffix == ".CSV":
        path = write(tmp_path / "table.csv", x).rename(tmp_path / "table.CSV")
    else:
        path = write(tmp_path / f"table{suffix}", x)
    data = load(path)
    assert (len(data.train), len(data.validation), len(data.test)) == (162, 18, 20)
    assert data.columns == (("x0", "x1", "x2") if suffix == ".npy" else ("a", "b", "c"))
    assert data.name == path.name
    torch.testing.assert_close(data.train.mean(dim=0), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(data.train.std(dim=0, correction=0), torch.ones(3), atol=1e-5, rtol=0)
    rows = torch.cat([data.restore(part.double()) for part in (data.train, data.validation, data.test)])
    np.testing.assert_allclose(np.sort(rows[:, 1].numpy()), np.sort(x[:, 1]), rtol=1e-4, atol=1e-4)
    np.save(tmp_path / "reference.npy", x)
    torch.testing.assert_close(data.test, load(tmp_path / "reference.npy").test)
    assert torch.equal(data.test, load(str(path)).test)
    assert not torch.equal(data.test, load(path, seed=1).test)


def test_csv_without_header_and_with_semicolons(tmp_path: Path, x: np.ndarray) -> None:
    np.savetxt(tmp_path / "bare.csv", x, delimiter=",")
    assert load(tmp_path / "bare.csv").columns == ("x0", "x1", "x2")
    np.savetxt(tmp_path / "semi.csv", x, delimiter=";", header="u;v;w", comments="")
    data = load(tmp_path / "semi.csv")
    assert data.columns == ("u", "v", "w")
    torch.testing.assert_close(data.test, load(tmp_path / "bare.csv").test)


@pytest.mark.parametrize("key", ["val", "validation", "valid"])
def test_divided_npz_keeps_its_division(key: str, tmp_path: Path, x: np.ndarray) -> None:
    np.savez(tmp_path / "d.npz", train=x[:100], test=x[150:], **{key: x[100:150]})
    data = load(tmp_path / "d.npz")
    np.testing.assert_allclose(data.restore(data.train.double()).numpy(), x[:100], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(data.restore(data.validation.double()).numpy(), x[100:150], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(data.shift.numpy(), x[:100].mean(axis=0))


def test_incomplete_npz(tmp_path: Path, x: np.ndarray) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, train=x, val=x)
    with pytest.raises(DataError, match="needs 'validation' and 'test' beside 'train'; it has train, val"):
        load(path)
    np.savez(path, train=x, val=x[:, :2], test=x)
    with pytest.raises(DataError, match="'train' has 3 columns, 'val' has 2"):
        load(path)
    np.savez(path, first=x, second=x)
    with pytest.raises(DataError, match="which array is the table"):
        load(path)
    np.savez(path, x=x, columns=["a"])
    with pytest.raises(DataError, match="'columns' names 1 columns, the table has 3"):
        load(path)
    np.savez(path, train=x, val=x[:0], test=x)
    with pytest.raises(DataError, match=r"d\.npz \(val\): the table is empty, its shape is \(0, 3\)"):
        load(path)


@pytest.mark.parametrize("suffix", [".csv", ".npy", ".npz", ".parquet"])
def test_bad_rows_are_refused_or_left_out(suffix: str, tmp_path: Path, x: np.ndarray) -> None:
    x[[3, 4], 0] = np.nan
    x[4, 2] = np.inf
    path = write(tmp_path / f"t{suffix}", x)
    names = ("x0", "x2") if suffix == ".npy" else ("a", "c")
    message = f"2 of 200 rows hold NaN or infinity, in columns '{names[0]}' \\(2\\), '{names[1]}' \\(1\\)"
    with pytest.raises(DataError, match=f"{message}; repair them, or .*drop_bad_rows=True"):
        load(path)
    with pytest.warns(UserWarning, match=f"{message}; these rows were left out"):
        data = load(path, drop_bad_rows=True)
    assert sum(len(part) for part in (data.train, data.validation, data.test)) == 198


@pytest.mark.parametrize("suffix", [".csv", ".npy"])
def test_constant_column(suffix: str, tmp_path: Path, x: np.ndarray) -> None:
    x[:, 1] = 4.5
    path = write(tmp_path / f"t{suffix}", x)
    with (
        pytest.warns(UserWarning, match="one value fills"),
        pytest.raises(DataError, match=r"constant columns have no density: '(b|x1)' \(always 4\.5\); remove"),
    ):
        load(path)


def test_duplicated_columns_warn(tmp_path: Path, x: np.ndarray) -> None:
    x[:, 2] = 3 - 2 * x[:, 0]
    path = write(tmp_path / "t.csv", x)
    with pytest.warns(UserWarning, match="columns repeat another one up to shift and scale: 'c' = 'a'"):
        load(path)


def test_discrete_and_counting_columns_warn(tmp_path: Path, x: np.ndarray) -> None:
    x[:, 1] = x[:, 1] > 5
    with pytest.warns(UserWarning, match=r"one value fills more than 10% .* 'b' \(2 distinct values\)"):
        load(write(tmp_path / "t.csv", x))
    x[:, 1] = np.random.default_rng(1).standard_normal(200)
    x[:, 0] = np.arange(200)
    np.savez(tmp_path / "t.npz", train=x[:150], val=x[150:170], test=x[170:])
    with pytest.warns(UserWarning, match="column 'x0' counts the rows"):
        load(tmp_path / "t.npz")
    with pytest.warns(UserWarning, match="column 'a' counts the rows"):
        load(write(tmp_path / "t.csv", x))


@pytest.mark.parametrize(("rows", "columns"), [(5, 3), (19, 3), (40, 40)])
def test_too_few_rows(rows: int, columns: int, tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.random.default_rng(0).standard_normal((rows, columns)))
    with pytest.raises(DataError, match=r"t\.npy: too few rows, (5|19|33)[; ].*(needed|needs)"):
        load(tmp_path / "t.npy")


def test_few_rows_warn(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.random.default_rng(0).standard_normal((40, 8)))
    with pytest.warns(UserWarning, match="33 training rows for 8 columns are few"):
        load(tmp_path / "t.npy")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_text_in_a_column(suffix: str, tmp_path: Path, x: np.ndarray) -> None:
    frame = pd.DataFrame(x, columns=COLUMNS)
    frame["b"] = [f"{value:.3f}" for value in x[:, 1]]
    frame.loc[7, "b"] = "abc"
    frame["c"] = "Paris"
    path = tmp_path / f"t{suffix}"
    if suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        pytest.importorskip("pyarrow")
        frame.to_parquet(path)
    expected = r"'b' holds text in 1 of 200 rows \(row 8: 'abc'\), 'c' holds text in every row \(row 1: 'Paris'\)"
    with pytest.raises(DataError, match=f"every column must hold numbers, but {expected}; repair"):
        load(path)


def test_dates_are_refused(tmp_path: Path, x: np.ndarray) -> None:
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame(x, columns=COLUMNS).assign(day=pd.date_range("2020-01-01", periods=200))
    frame.to_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match="'day' holds text in every row"):
        load(tmp_path / "t.parquet")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".npy", ".npz", ".parquet"])
def test_empty_damaged_and_missing_files(suffix: str, tmp_path: Path, x: np.ndarray) -> None:
    path = tmp_path / f"t{suffix}"
    with pytest.raises(DataError, match=rf"t\{suffix}: there is no such file"):
        load(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=rf"t\{suffix}: the file is empty"):
        load(path)
    path.write_bytes(b"\xff\xfe\x00\x93 this is neither text nor an array \x80\x81")
    with pytest.raises(DataError, match=rf"t\{suffix}: not an? .*"):
        load(path)
    if suffix in (".npy", ".npz", ".parquet"):
        whole = write(path, x).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=r"not an? .*damaged"):
            load(path)


def test_header_only_and_ragged_csv(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\n", encoding="ascii")
    with pytest.raises(DataError, match="the table has no rows"):
        load(path)
    path.write_text("a,b\n1,2\n1,2,3,4\n", encoding="ascii")
    with pytest.raises(DataError, match=r"not a table, or damaged: .*line 3"):
        load(path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(5), r"got \(5,\); reshape\(-1, 1\)"),
        (np.zeros((5, 2, 2)), r"got \(5, 2, 2\); flatten"),
        (np.zeros((0, 2)), r"the table is empty, its shape is \(0, 2\)"),
        (np.zeros((5, 2), dtype=complex), "real numbers, got dtype complex128"),
        (np.array([["a", "b"]]), "real numbers, got dtype <U1"),
        (np.array([[1, None]], dtype=object), "holds Python objects"),
    ],
)
def test_wrong_arrays(array: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "t.npy")


def test_unknown_format_and_folder(tmp_path: Path) -> None:
    (tmp_path / "t.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"unknown format '\.xlsx'; expected \.csv, \.tsv"):
        load(tmp_path / "t.xlsx")
    with pytest.raises(DataError, match=r"unknown format '\(no suffix\)'"):
        load(tmp_path)


def test_missing_package_is_named(tmp_path: Path, x: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "t.parquet", x)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pyarrow is needed .*pip install 'pycnf\[tables\]'"):
        load(path)
