"""The application: its commands, and how errors reach the user."""

from __future__ import annotations

import re
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import pycnf
from pycnf.cli.benching import bench_app
from pycnf.cli.comparing import compare
from pycnf.cli.crosschecking import crosscheck, julia
from pycnf.cli.datasets import data_app
from pycnf.cli.diagnosing import diagnose
from pycnf.cli.evaluating import evaluate
from pycnf.cli.experimenting import experiment_app
from pycnf.cli.running import train
from pycnf.cli.sampling import sample
from pycnf.experiments.runs import FAILURES

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


class _Group(TyperGroup):
    """Report what goes wrong in a command as one message, and choose the exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except KeyboardInterrupt as err:
            _complain(_message(err) if str(err) else "interrupted", "stopped")
            raise typer.Exit(INTERRUPTED) from None
        except (*FAILURES, ValueError, OSError, ImportError) as err:
            if ctx.params.get("debug"):
                raise
            _complain(_message(err), "error")
            expected = (ValueError, FileNotFoundError, ImportError)
            raise typer.Exit(BAD_INPUT if isinstance(err, expected) else FAILED) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,  # what is not foreseen shows Python's own traceback
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"pycnf {pycnf.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
) -> None:
    """Train continuous normalizing flows that are cheap to solve.

    Begin with `pycnf compare --data power`: a flow without and a flow with trajectory polynomial
    regularization (TPR), on data that come with the package, in minutes.
    """


for _command in (compare, train, evaluate, sample, diagnose, crosscheck, julia):
    app.command()(_command)
app.add_typer(experiment_app, name="experiment")
app.add_typer(bench_app, name="bench")
app.add_typer(data_app, name="data")


def main() -> None:
    """Run the command line."""
    app(prog_name="pycnf")


def _message(err: BaseException) -> str:
    """Return the message of an error, with arguments of functions written as options."""
    text = str(err) or type(err).__name__
    text = re.sub(r"\b(resume|overwrite)=True", r"--\1", text)
    return re.sub(r"\bdata_dir\b", "--data-dir", text)


def _complain(text: str, kind: str) -> None:
    """Write a message to stderr as it is: no wrapping, no markup."""
    color = {"error": typer.colors.RED, "stopped": typer.colors.YELLOW}[kind]
    typer.secho(f"{kind}: ", fg=color, bold=True, nl=False, err=True)
    typer.echo(text, err=True)
    sys.stderr.flush()
