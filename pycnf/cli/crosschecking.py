"""``pycnf crosscheck`` and ``pycnf julia``: the solves of a trained flow against other software's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from pycnf.cli import options as o
from pycnf.cli.running import data_source, open_run, print_json
from pycnf.cli.tables import console
from pycnf.data import load
from pycnf.records import run_record, write_json

if TYPE_CHECKING:
    from pycnf.crosscheck import Crosscheck

BACKENDS = ("auto", "julia", "scipy")
BEYOND = 1  # exit status


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.replace(",", " ").split() if word)


def read_methods(text: str) -> tuple[str, ...]:
    """Read names of methods of pycnf, SciPy and Julia, separated by commas.

    >>> read_methods("dopri5, Tsit5,DOP853")
    ('dopri5', 'Tsit5', 'DOP853')
    """
    from pycnf.crosscheck import NAMES

    found = _words(text)
    for name in found:
        if name not in NAMES:
            raise ValueError(f"{name!r} is not one of {', '.join(NAMES)}")
    return found


def read_tolerances(text: str) -> tuple[float, ...]:
    """Read tolerances between 0 and 1, separated by commas.

    >>> read_tolerances("1e-4,1e-6") == (1e-4, 1e-6)
    True
    """
    try:
        found = tuple(float(word) for word in _words(text))
    except ValueError as err:
        raise ValueError(f"expected numbers separated by commas, such as 1e-4,1e-6, got {text!r}") from err
    if not found or not all(0 < value < 1 for value in found):
        raise ValueError(f"expected tolerances between 0 and 1, got {text!r}")
    return found


def read_steps(text: str) -> tuple[int, ...]:
    """Read numbers of steps >= 1, separated by commas.

    >>> read_steps("4,8")
    (4, 8)
    """
    found = _words(text)
    if not found or not all(word.isdigit() and int(word) for word in found):
        raise ValueError(f"expected whole numbers >= 1, separated by commas, such as 4,8,16, got {text!r}")
    return tuple(int(word) for word in found)


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
            **o.checked(read_steps),
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
        o.option("--output -o", o.OUTPUT, "Also write the record to a file.", metavar="FILE"),
    ] = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Check the solves of a trained flow against other software's.

    In float64, on the CPU: dopri8 at 1e-12 against the reference at 1e-13 (Julia's Vern9 or SciPy's DOP853), and what
    each method achieves for its evaluations. The exit status is 1 if the difference is beyond the bound.

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
    from pycnf.reference import Backend

    dataset = load(source, data_dir=data_dir)
    table = getattr(dataset, split)
    drawn = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))[:rows]
    o.say(f"Checking {run} on {len(drawn)} {split} rows of {source}", quiet=quiet)
    found = compare(
        flow,
        table[drawn],
        backend=cast(Backend, backend),
        methods=read_methods(methods),
        tolerances=read_tolerances(tolerances),
        n_steps=read_steps(n_steps),
        bound=bound,
        timeout=timeout,
        say=lambda text: o.say(f"  {text}", quiet=quiet),
    )
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
    )
    if output is not None:
        write_json(output, record)
    if as_json:
        print_json(record)
    else:
        _show(found, str(run), shared_worker().versions)
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


def _show(found: Crosscheck, run: str, versions: dict[str, str]) -> None:
    source = {"julia": f"Julia {versions.get('julia', '')}'s Vern9", "scipy": "SciPy's DOP853"}.get(found.backend, "")
    name = f"{source} at 1e-13 ({found.reference_nfe} evaluations)" if source else "the closed form"
    table = Table(title=f"{run}, {found.rows} rows, against {name}", box=SIMPLE_HEAD)
    table.add_column("method", overflow="fold")
    columns = ("tolerance", "evaluations", "steps\naccepted", "\nrejected", "z\nlargest", "\nRMS", "log p\nlargest")
    for title in (*columns, "\nRMS", "order\nseen"):
        table.add_column(title, justify="right")
    check = found.agreement
    table.add_row(*_cells(check), "", end_section=True)
    seen: set[str] = set()
    for row in found.sweep:
        order = found.orders[row.method]
        table.add_row(*_cells(row), "" if row.method in seen or order is None else f"{order:.1f}")
        seen.add(row.method)
    out = console()
    out.print(table)
    verdict = "agrees with" if found.passed else "DIFFERS from"
    compared = f"{check.worst:.1e} at most, bound {found.bound:g}"
    out.print(f"{check.method} at {check.tolerance:g} {verdict} the reference: {compared}", soft_wrap=True)


def _cells(row: Any) -> list[str]:
    setting = f"{row.n_steps} steps" if row.tolerance is None else f"{row.tolerance:g}"
    name = row.method if row.software == "pycnf" else f"{row.method} ({row.software})"
    errors = (row.max_z, row.rms_z, row.max_logp, row.rms_logp)
    return [name, setting, *(str(n) for n in (row.nfe, row.accepted, row.rejected)), *(f"{e:.1e}" for e in errors)]
