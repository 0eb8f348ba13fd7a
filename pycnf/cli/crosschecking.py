"""``pycnf crosscheck`` and ``pycnf julia``: the solves of a trained flow against other software's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.table import Table

from pycnf.cli import options as o
from pycnf.cli.running import data_source, open_run, print_json
from pycnf.cli.sweeps import make_table, read_counts, read_names, read_tolerances, write_order, write_setting
from pycnf.cli.tables import console
from pycnf.data import load
from pycnf.records import run_record, write_json
from pycnf.training.folder import make_folder

if TYPE_CHECKING:
    from pycnf.crosscheck import Crosscheck, Deviation

RECORD = "crosscheck.json"
FOLDER = "crosscheck"
BACKENDS = ("auto", "julia", "scipy")
BEYOND = 1  # exit status


def read_methods(text: str) -> tuple[str, ...]:
    """Read names of methods of pycnf, SciPy and Julia.

    >>> read_methods("dopri5, Tsit5,DOP853")
    ('dopri5', 'Tsit5', 'DOP853')
    """
    from pycnf.crosscheck import ORDERS

    return read_names(text, ORDERS)


def crosscheck(
    run: o.RunFolder,
    backend: Annotated[
        str,
        o.option(
            "--backend",
            o.SOLVER,
            "Where the reference comes from: julia, scipy, or auto: Julia where it is installed, else SciPy.",
            **o.one_of(BACKENDS),
        ),
    ] = "auto",
    methods: Annotated[
        str,
        o.option(
            "--methods",
            o.SOLVER,
            "Methods to sweep, separated by commas: pycnf's (dopri5), SciPy's (DOP853) and Julia's (Tsit5).",
            metavar="NAMES",
            **o.checked(read_methods),
        ),
    ] = "bosh3,dopri5,dopri8",
    tolerances: Annotated[
        str,
        o.option(
            "--tolerances",
            o.SOLVER,
            "Tolerances (rtol = atol) of the methods that choose their steps.",
            metavar="LIST",
            **o.checked(read_tolerances),
        ),
    ] = "1e-4,1e-6,1e-8,1e-10",
    n_steps: Annotated[
        str,
        o.option(
            "--n-steps",
            o.SOLVER,
            "Steps per block of the methods with equal steps.",
            metavar="LIST",
            **o.checked(read_counts),
        ),
    ] = "4,8,16,32",
    bound: Annotated[
        float,
        o.option(
            "--bound",
            o.SOLVER,
            "Largest difference of z and log p between dopri8 at 1e-12 and the reference.",
            **o.positive(),
        ),
    ] = 1e-9,
    timeout: Annotated[
        float | None,
        o.option(
            "--timeout", o.SOLVER, "Seconds that Julia may take for one block. [default: no limit]", **o.positive()
        ),
    ] = None,
    data: o.RunData = None,
    split: o.Split = "test",
    rows: Annotated[int, o.option("--rows", o.WHAT, "Rows, drawn at random; they are solved together.", min=1)] = 32,
    seed: o.Seed = 0,
    data_dir: o.DataDir = None,
    config: o.Config = None,
    output: Annotated[
        Path | None,
        o.option("--output -o", o.OUTPUT, "Folder of record and figure. [default: RUN/crosscheck]", metavar="DIR"),
    ] = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Check the solves of a trained flow against other software's.

    In float64, on the CPU: dopri8 at 1e-12 against the reference at 1e-13 (Julia's Vern9 or SciPy's DOP853), and what
    each method achieves for its evaluations, as a table and a figure. The exit status is 1 if the difference is beyond
    the bound.

    For example:

    - `pycnf crosscheck runs/first`

    - `pycnf crosscheck runs/first --backend julia --methods dopri5,Tsit5,Vern7`
    """
    flow = open_run(run, "cpu")
    if flow.context:
        raise ValueError(
            f"{run} is a conditional flow: check it in code, pycnf.crosscheck.crosscheck(flow, x, context)"
        )
    source = data or data_source(run)

    import torch

    from pycnf.crosscheck import crosscheck as compare
    from pycnf.julia import shared_worker
    from pycnf.plots import save_figure
    from pycnf.plots_diagnostics import crosscheck_figure
    from pycnf.reference import Backend

    folder = make_folder(output or run / FOLDER)
    dataset = load(source, data_dir=data_dir)
    table = getattr(dataset, split)
    drawn = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))[:rows]
    o.say(f"Checking {run} on {len(drawn)} {split} rows of {source}; results go to {folder}", quiet=quiet)
    found = compare(
        flow,
        table[drawn],
        backend=cast(Backend, backend),
        methods=read_methods(methods),
        tolerances=read_tolerances(tolerances),
        n_steps=read_counts(n_steps),
        bound=bound,
        timeout=timeout,
        say=lambda text: o.say(f"  {text}", quiet=quiet),
    )
    drawing = crosscheck_figure(found, title=f"{len(drawn)} {split} rows of {dataset.name}")
    figures = [save_figure(drawing, folder / f"deviations.{kind}") for kind in ("svg", "png")]
    record = run_record(
        command=o.this_command(),
        run=str(run),
        data=dataset.name,
        split=split,
        seed=seed,
        features=flow.features,
        blocks=flow.blocks,
        T=flow.T,
        julia=shared_worker().versions or None,
        **found.summary(),
        figures=[path.name for path in figures],
    )
    write_json(folder / RECORD, record)
    if as_json:
        print_json(record)
    else:
        _show(found, str(run), shared_worker().versions, [folder / RECORD, *figures])
    if not found.passed:
        raise typer.Exit(BEYOND)


def julia(
    install: Annotated[
        bool, o.option("--install", o.WHAT, "Download Julia and its packages where they are missing; takes minutes.")
    ] = False,
) -> None:
    """Say whether Julia can be used for cross-checks, and with which versions.

    Nothing is downloaded unless asked for: `pycnf julia --install`.
    """
    from pycnf.julia import JuliaWorker

    worker = JuliaWorker(install=install)
    worker.start()
    typer.echo(", ".join(f"{name} {version}" for name, version in worker.versions.items()))
    worker.close()


def _show(found: Crosscheck, run: str, versions: dict[str, str], files: list[Path]) -> None:
    source = {"julia": f"Julia {versions.get('julia', '')}'s Vern9", "scipy": "SciPy's DOP853"}.get(found.backend, "")
    name = f"{source} at 1e-13 ({found.reference_nfe} evaluations)" if source else "the closed form"
    out, check = console(), found.agreement
    out.print(deviation_table(out, found, f"{run}, {found.rows} rows, against {name}"))
    verdict = "agrees with" if found.passed else "DIFFERS from"
    compared = f"{check.worst:.1e} at most, bound {write_setting(found.bound, None)}"
    setting = write_setting(check.tolerance, check.n_steps)
    out.print(f"{check.method} at {setting} {verdict} the reference: {compared}", soft_wrap=True)
    for path in files:
        out.print(str(path), soft_wrap=True)


def deviation_table(out: Console, found: Crosscheck, title: str) -> Table:
    """Return a row per solve: what it was solved with, what it cost, and how far it is from the reference.

    Args:
        out: Where it will be printed.
        found: The cross-check.
        title: Title.
    """
    heads = (
        *("method", "tolerance\nor steps", "NFE", "steps +\nrejected", "z\nlargest", "\nRMS", "log p\nlargest"),
        *("\nRMS", "order\nseen"),
    )
    caption = (
        "NFE: function evaluations of the batch; differences of z and of log p (nats); order seen: of the largest "
        "difference in NFE, in brackets that of the method"
    )
    table = make_table(out, title, heads, caption)
    table.add_row(*_cells(found.agreement), "", end_section=True)
    seen: set[str] = set()
    for row in found.sweep:
        table.add_row(*_cells(row), "" if row.method in seen else write_order(found.orders[row.method], row.order))
        seen.add(row.method)
    return table


def _cells(row: Deviation) -> list[str]:
    errors = (row.max_z, row.rms_z, row.max_logp, row.rms_logp)
    setting = write_setting(row.tolerance, row.n_steps)
    return [row.label, setting, str(row.nfe), f"{row.accepted}+{row.rejected}", *(f"{error:.1e}" for error in errors)]
