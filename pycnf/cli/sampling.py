"""``pycnf sample``: new rows, images or pictures of a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from pycnf.cli import options as o
from pycnf.cli.running import check_target, data_card, npy, open_run, print_json, refuse, units_of
from pycnf.cli.tables import console
from pycnf.experiments.trained import kind_of
from pycnf.images.flow import ImageFlow
from pycnf.records import run_record, write_bytes
from pycnf.rows import cut
from pycnf.scale import sample as draw_samples
from pycnf.training.batches import preserved_rng
from pycnf.training.options import resolve_device
from pycnf.vae.training import load_vae

ENCODED = 10_000  # samples written at once
ROWS, PICTURES = 1000, 100  # samples where no number is asked for


def sample(
    run: o.RunFolder,
    n: Annotated[
        int | None, o.option("--n -n", o.WHAT, "Number of samples. [default: 1000, of pictures 100]", min=1)
    ] = None,
    seed: o.Seed = 0,
    standardized: o.Standard = False,
    config: o.Config = None,
    batch_size: Annotated[int, o.option("--batch-size", o.SOLVER, "Samples of one solve.", min=1)] = 1000,
    workers: o.Workers = 1,
    device: o.Device = None,
    output: Annotated[
        Path | None,
        o.option(
            "--output -o",
            o.OUTPUT,
            "A .csv or .npy file, of pictures also a grid as .png. [default: samples.csv, of pictures samples.png]",
            metavar="FILE",
        ),
    ] = None,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Draw samples from a trained model, in the units of its data.

    Samples of a flow of images are whole levels; those of an auto-encoder are what its decoder expects, from 0 to 1.

    For example:

    - `pycnf sample runs/first -n 1000 --seed 1 --output samples.npy`

    - `pycnf sample runs/mnist/some-run --output grid.png`
    """
    check_target(output, (".csv", ".npy", ".png"), overwrite)
    kind = kind_of(run)
    rows = kind == "table"
    if output is None:
        output = Path("samples.csv" if rows else "samples.png")
    suffix = check_target(output, (".csv", ".npy") if rows else (".csv", ".npy", ".png"), overwrite)
    n = n or (ROWS if rows else PICTURES)
    o.say(f"Sampling {n:,} {'rows' if rows else 'pictures'} from {run}", quiet=quiet)
    record: dict[str, Any] = {"run": str(run), "output": str(output), "n": n, "seed": seed}
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "progress": not quiet}
    shift: Any = 0.0
    scale: Any = 1.0
    columns: list[str] = []
    told: dict[str, Any]
    if rows:
        flow = open_run(run, device)
        if not standardized:
            shift, scale = units_of(run)
        drawn = draw_samples(flow, n, seed=seed, **options)
        values, columns = drawn.values, data_card(run).get("columns") or []
        told = {"units": "standardized" if standardized else "data", "nfe": drawn.stats.nfe}
    else:
        refuse(kind, {"standardized": standardized, "workers": workers > 1 and kind == "vae"})
        pictures, levels, told = _draw_pictures(run, kind, n, seed, device, options)
        values = pictures.flatten(1)
    features = values.shape[1]
    columns = columns or [f"x{i + 1}" for i in range(features)]
    if rows or suffix == ".csv":
        form: Literal["csv", "npy"] = "npy" if suffix == ".npy" else "csv"
        write_bytes(output, _encode(values, columns, form, shift, scale))
    else:
        _write_pictures(output, pictures, levels)
    if as_json:
        print_json(run_record(command=o.this_command(), columns=columns, **told, **record))
    else:
        console().print(f"{n:,} samples of {features} features: {output}", soft_wrap=True)


def _draw_pictures(
    run: Path, kind: str, n: int, seed: int, device: str | None, options: dict[str, Any]
) -> tuple[Tensor, int, dict[str, Any]]:
    """Return pictures (n, C, H, W), the number of their levels (2 for values from 0 to 1), and what a record tells."""
    if kind == "images":
        flow = open_run(run, device)
        assert isinstance(flow, ImageFlow)
        drawn = draw_samples(flow, n, seed=seed, **options)
        values = drawn.values if flow.dequantization == "none" else flow.quantize(drawn.values)
        told = {"units": "levels", "shape": list(flow.shape), "nfe": drawn.stats.nfe}
        return values.unflatten(1, flow.shape), flow.logit.levels, told
    vae, size = load_vae(run).to(resolve_device(device or "auto")), options["batch_size"]
    with preserved_rng(next(vae.parameters()).device):
        torch.manual_seed(seed)
        values = torch.cat([vae.sample(min(size, n - start)).cpu() for start in range(0, n, size)])
    return values.unflatten(1, (1, *vae.shape)), 2, {"units": "expected pixels", "shape": [1, *vae.shape], "nfe": 0}


def _write_pictures(path: Path, pictures: Tensor, levels: int) -> None:
    """Write pictures (n, C, H, W): an array of that shape (.npy), whole levels as bytes, or a grid (.png)."""
    if path.suffix.lower() == ".png":
        from pycnf.plots import save_figure
        from pycnf.plots_images import image_grid

        save_figure(image_grid(pictures, levels=levels), path)
        return
    whole = 2 < levels <= 256 and bool((pictures == pictures.floor()).all())
    write_bytes(path, npy(pictures, "uint8" if whole else "float32"))


def _encode(values: Any, columns: list[str], kind: Literal["csv", "npy"], shift: Any, scale: Any) -> bytes:
    """Return rows · scale + shift in float64 as the content of a file."""
    import csv
    import io

    import numpy as np

    parts = (values[rows].numpy() * np.asarray(scale) + np.asarray(shift) for rows in cut(len(values), ENCODED))
    if kind == "npy":
        x = np.empty(values.shape)
        for rows, part in zip(cut(len(values), ENCODED), parts, strict=True):
            x[rows] = part
        return npy(x)
    pieces, text = [], io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    for part in parts:
        writer.writerows([f"{value:.9g}" for value in row] for row in part)
        pieces.append(text.getvalue().encode())
        text.seek(0)
        text.truncate()
    return b"".join(pieces)
