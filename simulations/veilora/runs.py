"""Runs: compare, tell of them, go on with them."""

from __future__ import annotations

import sys
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
def verify(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="of a run")],
    keys: Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="the nodes' public keys, node-N.pub")] = None,
    format: As = Format.text,
) -> None:
    """Check a run's record: its chain, rows, files and signatures; exit status 6 where something does not hold."""
    from fl.durable import IntegrityError
    from simulations import verify

    try:
        found = verify.verify(folder, keys)
    except IntegrityError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(6) from None
    answer(format, found._asdict(), verify.told(found))


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
