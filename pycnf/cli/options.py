"""Options that several commands share: their types, their checks and what their help says."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from pycnf.cli.config import read_config
from pycnf.divergence import parse_divergence
from pycnf.experiments import parse_seeds, read_hidden
from pycnf.fields import ACTIVATIONS, TimeConditioning
from pycnf.regularizers import parse_regularizers
from pycnf.solve import METHODS
from pycnf.training.options import OptimizerName, ScheduleName, resolve_device

WHAT, MODEL, SOLVER = "What to run", "Model", "Solver"
TRAINING, OUTPUT = "Training", "Files and output"
PRESET = "[default: by data set]"
TIMES, SCHEDULES, OPTIMIZERS = get_args(TimeConditioning), get_args(ScheduleName), get_args(OptimizerName)


def option(flags: str, panel: str, text: str, **more: Any) -> Any:
    """Return a typer option.

    Args:
        flags: Its names, separated by spaces.
        panel: Panel of the help page.
        text: Help text.
        **more: Further settings of ``typer.Option``.
    """
    return typer.Option(*flags.split(), rich_help_panel=panel, help=text, **more)


def checked(read: Callable[[Any], Any]) -> dict[str, Any]:
    """Let an option be checked by reading its value; a ValueError becomes a message."""

    def check(value: Any) -> Any:
        if value is not None:
            try:
                read(value)
            except ValueError as err:
                raise typer.BadParameter(str(err)) from err
        return value

    return {"callback": check}


def one_of(names: Iterable[str]) -> dict[str, Any]:
    """Let an option take one of these names, and the shell complete them."""
    allowed = tuple(names)

    def read(value: str) -> None:
        if value not in allowed:
            raise ValueError(f"{value!r} is not one of {', '.join(allowed)}")

    return {"metavar": "NAME", "autocompletion": lambda: list(allowed), **checked(read)}


def positive() -> dict[str, Any]:
    """Let an option take a finite number > 0."""

    def read(value: float) -> None:
        if not 0 < value < float("inf"):
            raise ValueError(f"expected a finite number > 0, got {value:g}")

    return checked(read)


Data = Annotated[
    str,
    option(
        "--data",
        WHAT,
        "Data set: a name that `pycnf data list` shows, or a .csv, .npy, .npz or .parquet file.",
        metavar="NAME|PATH",
    ),
]
DataDir = Annotated[
    Path | None,
    option(
        "--data-dir",
        WHAT,
        "Folder with the benchmark tables. [default: that of the variable PYCNF_DATA, then a cache]",
        metavar="DIR",
    ),
]
Regularizers = Annotated[
    list[str] | None,
    option(
        "--regularizers",
        WHAT,
        "The arms, separated by spaces (or repeat the option); the first is the reference. A spec is none, "
        "tpr, tpr:weight=50,degree=1,times=2, or several joined by +; default is what the benchmark recommends. "
        "[default: none tpr:weight=5 default]",
        metavar="SPECS",
    ),
]
Regularizer = Annotated[
    str,
    option(
        "--regularizers",
        WHAT,
        "What is added to the loss: none, tpr (as published), tpr:weight=50,degree=1, several joined by +, or default: "
        "what the benchmark recommends.",
        metavar="SPEC",
        **checked(parse_regularizers),
    ),
]
RunData = Annotated[
    str | None, option("--data", WHAT, "Data set. [default: that of the training]", metavar="NAME|PATH")
]
Split = Annotated[
    str,
    option("--split", WHAT, "Rows to use: test, validation or train.", **one_of(("test", "validation", "train"))),
]
Workers = Annotated[int, option("--workers", SOLVER, "Processes that share the work, one thread each.", min=1)]
Standard = Annotated[
    bool, option("--standardized", WHAT, "The rows are in the flow's own units instead of those of the data.")
]
Seeds = Annotated[
    str,
    option(
        "--seeds",
        WHAT,
        "A number N for the seeds 0 to N-1, or a list: 0,3,7 means exactly those (7, means only 7).",
        metavar="N|LIST",
        **checked(parse_seeds),
    ),
]
Seed = Annotated[int, option("--seed", WHAT, "Seed of everything random.", min=0)]
Config = Annotated[
    Path | None,
    option(
        "--config",
        WHAT,
        "TOML or YAML file that gives any of these options (max-steps = 500); flags win over the file.",
        metavar="FILE",
        is_eager=True,
        callback=read_config,
    ),
]

Hidden = Annotated[
    str | None,
    option(
        "--hidden",
        MODEL,
        f"Widths of the hidden layers, such as 60,60,60. {PRESET}",
        metavar="WIDTHS",
        **checked(read_hidden),
    ),
]
Blocks = Annotated[int | None, option("--blocks", MODEL, f"Number of blocks. {PRESET}", min=1)]
Activation = Annotated[
    str | None,
    option("--activation", MODEL, f"One of {', '.join(ACTIVATIONS)}. {PRESET}", **one_of(ACTIVATIONS)),
]
Time = Annotated[
    str | None,
    option("--time", MODEL, f"How the field sees time: {', '.join(TIMES)}. {PRESET}", **one_of(TIMES)),
]
EndTime = Annotated[
    float | None, option("--end-time", MODEL, f"End time of a block. {PRESET}", metavar="T", **positive())
]
DivergenceName = Annotated[
    str | None,
    option(
        "--divergence",
        MODEL,
        f"Divergence in training: exact, hutchinson, hutchinson-rademacher; tests are exact. {PRESET}",
        metavar="NAME",
        **checked(parse_divergence),
    ),
]

Method = Annotated[
    str | None,
    option("--method", SOLVER, f"One of {', '.join(METHODS)}. [default: dopri5]", **one_of(METHODS)),
]
Rtol = Annotated[
    float | None,
    option("--rtol", SOLVER, "Relative tolerance in training. [default: 1e-4]", **positive()),
]
Atol = Annotated[
    float | None,
    option("--atol", SOLVER, "Absolute tolerance in training. [default: 1e-4]", **positive()),
]
TestRtol = Annotated[
    float | None,
    option("--test-rtol", SOLVER, "Relative tolerance in validation and test. [default: 1e-5]", **positive()),
]
TestAtol = Annotated[
    float | None,
    option("--test-atol", SOLVER, "Absolute tolerance in validation and test. [default: 1e-5]", **positive()),
]
RunRtol = Annotated[
    float | None,
    option("--rtol", SOLVER, "Relative tolerance. [default: the run's in test]", **positive()),
]
RunAtol = Annotated[
    float | None,
    option("--atol", SOLVER, "Absolute tolerance. [default: the run's in test]", **positive()),
]
Gradient = Annotated[
    str | None,
    option(
        "--gradient",
        SOLVER,
        "How gradients pass the solver: backprop (through its steps), checkpoint (the same, evaluating again what it "
        "does not keep) or adjoint (by a second solve, in constant memory). [default: backprop]",
        **one_of(("backprop", "checkpoint", "adjoint")),
    ),
]
TestTolerance = Annotated[
    float | None,
    option(
        "--test-tolerance",
        SOLVER,
        "Tolerance in validation and test, rtol = atol. [default: 1e-5]",
        **positive(),
    ),
]
Jobs = Annotated[
    int | None,
    option(
        "--jobs -j",
        TRAINING,
        "Runs at a time, each in a process with one thread. [default: one a core; one for a GPU]",
        min=1,
    ),
]
Runs = Annotated[
    Path | None,
    option(
        "--runs",
        OUTPUT,
        "Folder for checkpoints and curves. [default: runs/ with the name of the output]",
        metavar="DIR",
    ),
]
KeepRuns = Annotated[
    bool,
    option("--resume/--overwrite", OUTPUT, "Keep the runs that are recorded, or make those asked for anew."),
]
NSteps = Annotated[
    int | None,
    option("--n-steps", SOLVER, "Number of equal steps, for fixed-step methods such as rk4.", min=1),
]
MaxNfe = Annotated[
    int | None,
    option("--max-nfe", SOLVER, "Budget of evaluations of one solve; a solve that needs more fails.", min=1),
]

MaxSteps = Annotated[
    int | None,
    option("--max-steps", TRAINING, "Training steps at most. [default: by data set; power 1000]", min=1),
]
BatchSize = Annotated[int | None, option("--batch-size", TRAINING, f"Rows per training step. {PRESET}", min=1)]
Lr = Annotated[float | None, option("--lr", TRAINING, f"Learning rate at the start. {PRESET}", **positive())]
Schedule = Annotated[
    str | None,
    option(
        "--schedule",
        TRAINING,
        f"Learning rate: cosine, constant, plateau (drops when held-out NLL stalls) or auto. {PRESET}",
        **one_of(SCHEDULES),
    ),
]
Optimizer = Annotated[
    str | None,
    option("--optimizer", TRAINING, f"One of {', '.join(OPTIMIZERS)}. {PRESET}", **one_of(OPTIMIZERS)),
]
Clip = Annotated[
    float | None,
    option("--clip", TRAINING, "Largest norm of the gradient. [default: no limit]", **positive()),
]
Device = Annotated[
    str | None,
    option(
        "--device",
        TRAINING,
        "cpu, cuda, cuda:1, or auto: a GPU where there is one. [default: auto]",
        metavar="NAME",
        **checked(resolve_device),
    ),
]

Json = Annotated[bool, option("--json", OUTPUT, "Print the machine-readable record to stdout, and nothing else there.")]
Quiet = Annotated[bool, option("--quiet -q", OUTPUT, "Show no progress.")]
Overwrite = Annotated[bool, option("--overwrite", OUTPUT, "Replace what is there.")]
RunFolder = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="Folder of a training run: that of `pycnf train`, or one below runs/ of `pycnf compare`.",
    ),
]

SETTINGS = (
    *("blocks", "activation", "time", "divergence"),
    *("method", "rtol", "atol", "test_rtol", "test_atol", "gradient", "n_steps", "max_nfe"),
    *("max_steps", "batch_size", "lr", "schedule", "optimizer", "clip", "device"),
)
"""Options that are settings of an experiment by the same name."""


def settings_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Collect the settings of an experiment from a command's options; None stands for those not given."""
    hidden = options["hidden"]
    own = {"T": options["end_time"], "hidden": None if hidden is None else read_hidden(hidden)}
    return own | {name: options[name] for name in SETTINGS}


def this_command() -> str:
    """Return the command line as it was typed, for the records."""
    return shlex.join(["pycnf", *sys.argv[1:]])


def say(text: str, *, quiet: bool = False) -> None:
    """Write a line of progress to stderr, at once."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)
