"""Draw the same density three times, from flows that come with the package, and what it takes to compute each.

python benchmarks/front_figure.py                     # writes results/shipped/moons.svg and moons.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import pycnf
from pycnf import data, records
from pycnf.plots import save_figure
from pycnf.plots_flows import densities_figure, solve_paths

COMMAND = "python benchmarks/front_figure.py"
ARMS = {"no regularizer": "none", "TPR as published": "tpr", "pycnf's default": "default"}
WINDOWS = {"moons": (-3.5, 3.5, -3.0, 3.0), "8gaussians": (-4.0, 4.0, -4.0, 4.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=WINDOWS, default="moons", help="set of points in the plane")
    parser.add_argument("--rows", type=int, default=1000, help="held-out rows that are solved in one batch")
    parser.add_argument("--folder", type=Path, default=Path("results/shipped"), help="folder of figure and record")
    args = parser.parse_args()
    torch.set_num_threads(1)
    flows = {label: pycnf.load(f"{args.data}-{arm}") for label, arm in ARMS.items()}
    x = data.load(args.data).test[: args.rows]
    save_figure(densities_figure(flows, x, extent=WINDOWS[args.data]), args.folder / f"{args.data}.svg")
    arms = []
    for label, flow in flows.items():
        card, paths = pycnf.models()[f"{args.data}-{ARMS[label]}"], solve_paths(flow, x)
        arms.append(
            {
                "label": label,
                "regularizer": card["regularizer"],
                "rtol": flow.eval_solver.rtol,
                "atol": flow.eval_solver.atol,
                "rows": len(x),
                "nll": -float(paths.log_prob.mean()),
                "nfe": paths.stats.nfe,
                "accepted": paths.stats.accepted,
                "rejected": paths.stats.rejected,
            }
        )
        print(f"{label}: NLL {arms[-1]['nll']:.3f} nats, {arms[-1]['nfe']} evaluations")
    command = COMMAND if args.data == "moons" else f"{COMMAND} --data {args.data}"
    record = records.run_record(experiment="same density, fewer evaluations", seed=0, command=command, solves=arms)
    records.write_json(args.folder / f"{args.data}.json", record)


if __name__ == "__main__":
    main()
