"""Write the tables of the README from the recorded runs.

A table stands between ``<!-- table: path -->`` and ``<!-- end table -->``, where the path is that of the record; a
record that fills several tables has names for the others, ``<!-- table: path#name -->``.

python benchmarks/tables.py          # rewrite README.md
python benchmarks/tables.py --check  # exit 1 where it differs from the records
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pycnf.experiments import ComparisonResult
from pycnf.experiments.bench_results import load_bench, write_change, write_difference
from pycnf.experiments.presets import list_presets
from pycnf.records import read_json
from pycnf.regularizers import DEFAULT

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"(<!-- table: ([^\s#]+)(?:#([\w-]+))? -->\n)(.*?)(<!-- end table -->)", re.DOTALL)
CASES = {
    "moons": "moons: 2-d, 3×64, batch 100",
    "power": "POWER: 6-d, 3×60, batch 1,000",
    "43d": "43-d, 2×860, batch 1,000",
    "63d": "63-d, 3×1260",
    "63d exact": "63-d, 3×1260",
}
USUAL = ("python", "lightning", "numpy")  # packages not worth naming
Row = Mapping[str, Any]


def markdown(header: list[str], rows: list[list[str]], words: int = 1) -> str:
    """Return a Markdown table whose first columns hold words, and the others numbers."""
    lines = [header, ["---"] * words + ["---:"] * (len(header) - words), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def spread(row: Row, name: str = "ratio", factor: float = 1.0, digits: int = 1) -> str:
    """Write a median and its range."""
    low, high = sorted(factor * row[f"{name}_{end}"] for end in ("min", "max"))
    return f"{factor * row[name]:.{digits}f} ({low:.{digits}f} – {high:.{digits}f})"


def machine(record: Row) -> str:
    """Say where a record was made."""
    return f"\nOn {record['device']} with {record['threads']} threads.\n"


def regularizer(row: Row) -> str:
    """Name the regularizer of a row."""
    return "TPR" if row["regularizer"] != "none" else "none"


def comparison(path: Path) -> str:
    """Return the table of a comparison."""
    table = ComparisonResult.load(path).table()
    rows = [[f"`{arm}`", *(str(cell) for cell in line)] for arm, line in zip(table.index, table.values, strict=True)]
    return markdown(["arm", *table.columns], rows)


def benchmark(path: Path, data: str) -> str:
    """Return the table of one set of a benchmark of regularizers."""
    table = load_bench(path).table(data)
    columns = [c for c in table.columns if not c.startswith(("NFE backward", "last", "training", "time to"))]
    rows = [[f"`{arm}`", *line] for arm, line in zip(table.index, table[columns].to_numpy(), strict=True)]
    return markdown(["arm", *columns], rows)


def experiments(folder: Path) -> str:
    """Return a row for each recorded experiment: what TPR as published, the default and the best free arm change."""
    rows = []
    for name, preset in list_presets().items():
        if not (folder / name / "runs").is_dir():
            continue
        bench = load_bench(folder / name)
        for data in bench.data:
            plain, *arms = [line for line in bench.summary(data) if "tolerance_alone" not in line]
            arms = [line for line in arms if line["nfe_test"].get("change") is not None]
            free = [line for line in arms if line["within"]["paired"] and line["n"] == plain["n"]]
            best = min(free, key=lambda line: line["nfe_test"]["change"], default=None)
            by_name = {line["arm"]: line for line in arms}
            stands_for = preset.substituted(data)
            rows.append(
                [
                    ("VAE of " if preset.kind == "vae" else "") + data + (f" (for {stands_for})" if stands_for else ""),
                    str(plain["n"]),
                    *(change(by_name.get(arm), plain["n"]) for arm in ("tpr:weight=5", DEFAULT)),
                    f"`{best['arm'].replace(DEFAULT, 'default')}`: {change(best, plain['n'])}" if best else "none",
                    str(len(arms)),
                ]
            )
    header = [
        "data",
        "seeds",
        "TPR as published",
        "default",
        "best arm within one standard error of the difference",
        "arms",
    ]
    return markdown(header, rows, 1)


def change(line: Row | None, seeds: int) -> str:
    """Write what an arm changes: evaluations of a test, in brackets the likelihood; and its seeds if they are fewer."""
    if line is None:
        return "–"
    text = f"{write_change(line['nfe_test'])} ({write_difference(line['nll'])})".replace("-", "−")
    return text if line["n"] == seeds else f"{text}, {line['n']} seed{'' if line['n'] == 1 else 's'}"


def step_time(record: Row) -> str:
    """Return the table of step times against the classic recipe, and of what is left without warm start."""
    sides = {(row["case"], row["regularizer"], row["against"]): row for row in record["rows"]}
    rows = [
        [
            CASES[row["case"]],
            regularizer(row),
            f"{row['calls_against']} / {row['nfe']}",
            f"{row['ms_against']:,.0f}",
            f"{row['ms']:,.1f}",
            f"**{row['ratio']:.1f}** ({row['ratio_min']:.1f} – {row['ratio_max']:.1f})",
            spread(sides[row["case"], row["regularizer"], "classic, no warm start"]),
        ]
        for row in record["rows"]
        if row["against"] == "classic"
    ]
    header = ["work", "regularizer", "calls of the field", "classic (ms)", "pycnf (ms)", "ratio: median (range)"]
    return markdown([*header, "without warm start"], rows, 2) + machine(record)


def engines(record: Row) -> str:
    """Return the table of step times against torchdiffeq's engine at the same steps, and of memory."""
    classic = {(r["case"], r["regularizer"]): r for r in record["rows"] if r["against"] == "classic"}
    rows = [
        [
            CASES[row["case"]],
            regularizer(row),
            f"{row['ms_against']:,.1f}",
            f"{row['ms']:,.1f}",
            spread(row, digits=2),
            *(f"{megabytes:,.0f}" for megabytes in (row["peak_mb_against"], row["peak_mb"])),
            f"{classic[row['case'], row['regularizer']]['peak_mb_against']:,.0f}",
        ]
        for row in record["rows"]
        if row["against"] == "torchdiffeq engine"
    ]
    header = ["work", "regularizer", "torchdiffeq (ms)", "pycnf (ms)", "ratio: median (range)"]
    memory = [f"memory {name} (MB)" for name in ("torchdiffeq", "pycnf", "classic")]
    return markdown(header + memory, rows, 2) + machine(record)


def peers(record: Row) -> str:
    """Return the table of times and errors beside other libraries."""
    rows = [
        [
            CASES[row["case"]],
            f"{row['work']}, tolerance {row['tolerance']:g}",
            row["against"],
            " + ".join(str(count) for count in row["nfe_against"].values() if count),
            f"{row['ms_against']:,.1f}",
            "1" if row["against"] == "pycnf" else spread(row),
            f"{row['error_mean']:.0e} (at most {row['error_max']:.0e})",
        ]
        for row in record["rows"]
    ]
    header = ["work", "what", "library", "evaluations", "time (ms)", "over pycnf: median (range)", "error of log p"]
    used = ", ".join(f"{name} {record['versions'][name]}" for name in record["versions"] if name not in USUAL)
    return markdown(header, rows, 3) + machine(record).rstrip(".\n") + f"; {used}.\n"


def peers_summary(record: Row) -> str:
    """Return the times of other libraries over that of pycnf, a row for each kind of work."""
    rows, libraries = dict[tuple[str, str], dict[str, Row]](), dict[str, None]()
    for row in record["rows"]:
        rows.setdefault((CASES[row["case"]], f"{row['work']}, tolerance {row['tolerance']:g}"), {})[row["against"]] = (
            row
        )
        libraries.setdefault(row["against"])
    others = [name for name in libraries if name != "pycnf"]
    lines = [
        [*work, f"{found['pycnf']['ms']:,.1f}", *(spread(found[name]) if name in found else "–" for name in others)]
        for work, found in rows.items()
    ]
    header = ["work", "what", "pycnf (ms)", *(f"{name}, over pycnf" for name in others)]
    return markdown(header, lines, 2) + machine(record)


def roofline(record: Row) -> str:
    """Return the table of operations a second."""
    rows = [
        [
            f"{CASES[row['case']].partition(', batch')[0]}, batch {row['batch']:,}",
            row["divergence"],
            f"{row['gflop']:,.2f}",
            f"{row['ms']:,.0f}",
            f"{row['gflop_per_second']:,.0f}",
            f"{row['matrix_gflop_per_second']:,.0f}",
            f"{spread(row, 'share', 100, 0)}",
        ]
        for row in record["rows"]
    ]
    header = ["training step", "divergence", "GFLOP", "time (ms)", "GFLOP/s", "matrix rate (GFLOP/s)", "share (%)"]
    return markdown(header, rows, 2) + machine(record)


def at_scale(record: Row) -> str:
    """Return the table of log p of many rows."""
    rows = [
        [
            f"{row['rows']:,} rows, batches of {row['batch']:,}, {row['workers']} process(es)",
            f"{row['seconds']:,.0f}",
            f"{row['memory_mb']:,.0f}",
            f"in batches of {row['batch_against']:,}",
            f"{row['seconds_against']:,.0f}",
            f"{row['ratio_full']:.1f}",
            spread(row),
        ]
        for row in record["rows"]
    ]
    header = ["pycnf", "time (s)", "memory (MB)", "classic recipe", "time (s), by proportion", "ratio"]
    return markdown([*header, "in one process: median (range)"], rows) + machine(record)


def ordering(record: Row) -> str:
    """Return the table of batches by difficulty."""
    rows = [
        [
            CASES[row["case"]].partition(":")[0],
            f"{row['tolerance']:.0e}",
            *(f"{row[name]:.1f}" for name in ("nfe_against", "nfe")),
            spread(row, digits=2),
            *(f"{row[f'error_{kind}{side}']:.0e}" for kind in ("mean", "99") for side in ("_against", "")),
        ]
        for row in record["rows"]
    ]
    header = ["data", "tolerance", "evaluations, as given", "by difficulty", "time saved: ratio (range)"]
    errors = [f"{what}, {order}" for what in ("mean error", "99 % below") for order in ("as given", "by difficulty")]
    return markdown(header + errors, rows) + machine(record)


def scaling(record: Row) -> str:
    """Return the table of the first and the last point of every series."""
    rows = [
        [
            name,
            series["name"],
            *(f"{point['x']:g}: {point['ms']:,.1f} ms, {point['nfe']} evaluations" for point in ends),
        ]
        for name, group in record["rows"].items()
        for series in group
        if (ends := (series["points"][0], series["points"][-1]))
    ]
    return markdown(["over", "series", "from", "to"], rows, 2) + machine(record)


TABLES: dict[str, Callable[[Row], str]] = {
    "step_time": step_time,
    "step_time#engines": engines,
    "peers": peers,
    "peers#summary": peers_summary,
    "roofline": roofline,
    "at_scale": at_scale,
    "ordering": ordering,
    "scaling": scaling,
}


def table(path: Path, name: str | None = None) -> str:
    """Return a table of a record; those made on a GPU have the tables of the others."""
    if path.is_dir():
        return experiments(path)
    if path.name == "comparison.json":
        return comparison(path)
    if path.name == "bench.json":
        return benchmark(path, name or sys.exit("a benchmark has a table for each set: name it after a #"))
    kind = path.stem.removesuffix("_gpu") + (f"#{name}" if name else "")
    if kind not in TABLES:
        sys.exit(f"no table {kind}: there are {', '.join(TABLES)}")
    return TABLES[kind](read_json(path))


def render(text: str) -> str:
    """Return the README with its tables written anew."""
    return MARK.sub(lambda found: f"{found[1]}\n{table(ROOT / found[2], found[3])}\n{found[5]}", text)


def main() -> None:
    """Rewrite the README, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 where the README differs")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = render(old)
    if args.check:
        sys.exit("README.md differs from the records: run make tables" if new != old else 0)
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
