"""Attacks and faults, measured."""

from __future__ import annotations

import typer

from simulations.veilora.answers import FORWARDED

app = typer.Typer(no_args_is_help=True, help="Attacks on the system and faults in it, measured.")


@app.command("key_recovery", **FORWARDED)
def key_recovery(context: typer.Context) -> None:
    """What clear updates give away of the key (python -m simulations.audit.key_recovery --help)."""
    from simulations.audit import key_recovery

    raise typer.Exit(key_recovery.main(context.args))


@app.command("leakage", **FORWARDED)
def leakage(context: typer.Context) -> None:
    """What one update tells an honest server of its pictures (python -m simulations.audit.leakage --help)."""
    from simulations.audit import leakage

    raise typer.Exit(leakage.main(context.args))


@app.command("faults", **FORWARDED)
def faults(context: typer.Context) -> None:
    """What one broken client does, beside Flower's FedAvg (python -m simulations.audit.faults --help)."""
    from simulations.audit import faults

    raise typer.Exit(faults.main(context.args))


@app.command("poison", **FORWARDED)
def poison(context: typer.Context) -> None:
    """What hostile clients do to a strategy (python -m simulations.audit.poison --help)."""
    from simulations.audit import poison

    raise typer.Exit(poison.main(context.args))
