"""Runs: compare, tell of them, go on with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simulations.veilora.answers import FORWARDED, As, Format, answer

app = typer.Typer()


@app.command(**FORWARDED)
def compare(context: typer.Context) -> None:
    """Run a grid of federations and write its report (python -m simulations.compare --help)."""
    from simulations import compare

    raise typer.Exit(compare.main(context.args))


@app.command()
def report(folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="of a run, or of a grid (cells.jsonl)")], format: As = Format.text) -> None:
    """Tell of one run, or write the report of a grid anew."""
    if (folder / "cells.jsonl").exists():
        from simulations import compare

        raise typer.Exit(compare.main(["--out", str(folder)]))
    from simulations.report import run

    record = run.read(folder)
    answer(format, record, run.markdown(record))


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="of a run that broke off")],
    show: Annotated[bool, typer.Option("--show", help="only show the `flwr run` for a deployment")] = False,
) -> None:
    """Go on with a run after its last checkpoint."""
    from simulations import resume

    if show:
        print(resume.shown(folder))
        return
    raise typer.Exit(resume.resume(folder))
