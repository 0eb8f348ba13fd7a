"""Write the tables of the README from the recorded runs.

python benchmarks/tables.py          # rewrite README.md
python benchmarks/tables.py --check  # exit 1 where it differs from the records
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from pycnf.experiments import ComparisonResult
from pycnf.records import read_json

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end table -->)", re.DOTALL)
CASES = {
    "moons": "moons: 2-d, 3×64, batch 100",
    "power": "POWER: 6-d, 3×60, batch 1,000",
    "43d": "43-d, 2×860, batch 1,000",
}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def comparison(path: Path) -> str:
    """Return the table of a comparison."""
    table = ComparisonResult.load(path).table()
    rows = [[f"`{arm}`", *(str(cell) for cell in line)] for arm, line in zip(table.index, table.values, strict=True)]
    return markdown(["arm", *table.columns], rows)


def step_time(path: Path) -> str:
    """Return the table of step times."""
    record = read_json(path)
    rows = [
        [
            CASES[row["case"]],
            "TPR" if row["regularizer"] != "none" else "none",
            f"{row['ms_against']:,.0f}",
            f"{row['ms']:,.0f}",
            f"{row['ratio']:.1f} ({row['ratio_min']:.1f} – {row['ratio_max']:.1f})",
        ]
        for row in record["rows"]
    ]
    header = ["work", "regularizer", "classic (ms)", "pycnf (ms)", "ratio: median (range)"]
    return markdown(header, rows) + f"\nOn {record['device']} with {record['threads']} threads.\n"


def render(text: str) -> str:
    """Return the README with its tables written anew."""

    def write(found: re.Match[str]) -> str:
        path = ROOT / found[2]
        table = comparison(path) if path.name == "comparison.json" else step_time(path)
        return f"{found[1]}\n{table}\n{found[4]}"

    return MARK.sub(write, text)


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
