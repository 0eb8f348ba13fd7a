"""Train the small flows that come with the package, without and with regularizers, and record what they came to.

python benchmarks/shipped_models.py                   # writes pycnf/weights/ and results/shipped/models.json
python benchmarks/shipped_models.py --steps 2 --folder runs/weights --output runs/models.json    # a look
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import torch

from pycnf import data, records
from pycnf.experiments import Setup, setup_for, train_and_test
from pycnf.regularizers import parse_regularizers
from pycnf.shipped import CARDS, FOLDER
from pycnf.training import load_flow, save_flow

COMMAND = "python benchmarks/shipped_models.py"
STEPS = {"power": 500, "moons": 1000, "8gaussians": 1500}
BATCH = {"power": 500, "moons": 250, "8gaussians": 250}
ARMS = {"none": "none", "tpr": "tpr:weight=5", "default": "default", "error": "error:weight=0.02"}
CARD = (
    *("data", "regularizer", "seed", "steps", "rtol", "atol", "test_rtol", "test_atol", "test_batch_size"),
    *("nll", "nll_se", "nfe_train", "nfe_test", "parameters"),
)


def setup(name: str, steps: int | None) -> Setup:
    """Return the setup of a set: the model of its preset, trained shortly, all arms alike."""
    settings = {"max_steps": steps or STEPS[name], "batch_size": BATCH[name], "lr": 2e-3, "schedule": "cosine"}
    return setup_for(name, settings | {"validate_every": 100, "device": "cpu"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="training steps of every model")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of the models")
    parser.add_argument("--output", type=Path, default=Path("results/shipped/models.json"), help="file of the record")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in STEPS:
        dataset, chosen = data.load(name), setup(name, args.steps)
        for label, spec in ARMS.items():
            with tempfile.TemporaryDirectory() as scratch:
                run = Path(scratch) / "run"
                row = train_and_test(
                    dataset,
                    parse_regularizers(spec),
                    0,
                    chosen,
                    label=f"{name}-{label}",
                    folder=run,
                    progress=False,
                    command=COMMAND,
                )
                save_flow(load_flow(run), args.folder / f"{name}-{label}")
            print(f"{row['arm']}: NLL {row['nll']:.4f} ± {row['nll_se']:.4f}, NFE {row['nfe_test']:.1f}", flush=True)
            rows.append(row | {"setup": dataclasses.asdict(chosen)})
    args.output.parent.mkdir(parents=True, exist_ok=True)
    records.write_json(args.output, records.run_record(experiment="shipped models", seed=0, command=COMMAND, arms=rows))
    records.write_json(args.folder / CARDS, {row["arm"]: {key: row[key] for key in CARD} for row in rows})


if __name__ == "__main__":
    main()
