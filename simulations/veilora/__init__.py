"""The command `veilora`: keys, deployments, policies, data folders, a look before the start; reports, exports, predictions, audits.

    veilora keygen ~/veilora/key
    veilora node init /etc/veilora/node-0
    veilora deploy init deployment --host fed.example.org --pub a.pub --pub b.pub --pub c.pub
    veilora doctor node-0
    veilora report ~/veilora/runs/demo-20260101-120000-000000-s0

Exit status: 0 ok, 2 usage or config, 3 a machine that is not ready, 4 a run that failed, 5 too few clients, 6 a result that does
not hold. Where a command answers something, `--format json` answers it to a program.
"""

from __future__ import annotations

import sys

import click
import typer

from simulations.veilora import audits, keyring, machines, models, owners, runs

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Federated LoRA on encrypted pictures.")
for room in (keyring, machines, runs, models):
    app.registered_commands += room.app.registered_commands
app.add_typer(keyring.between, name="key")
app.add_typer(machines.deployments, name="deploy")
app.add_typer(owners.policies, name="policy")
app.add_typer(owners.releases, name="release")
app.add_typer(machines.nodes, name="node")
app.add_typer(audits.app, name="audit")


def expected() -> tuple[type[Exception], ...]:
    """What the user can mend; looked up only once something went wrong."""
    from clients.kit import KitError
    from clients.policy import PolicyError
    from clients.predict import PredictError
    from clients.release import ReleaseError
    from fl.config import ConfigError
    from fl.datasets import DataError
    from fl.export.folder import ExportError
    from fl.keys import KeyFileError
    from fl.models import WeightsError

    return KitError, ConfigError, KeyFileError, DataError, WeightsError, ExportError, PredictError, PolicyError, ReleaseError, OSError


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit status; an error is one line on standard error."""
    try:
        return app(arguments, prog_name="veilora", standalone_mode=False) or 0
    except click.ClickException as error:
        said, status = error.format_message(), 2
    except click.Abort:
        said, status = "stopped", 130
    except Exception as error:
        if not isinstance(error, expected()):
            raise
        said, status = str(error), 2
    if said:  # nothing is, where the help was shown for want of a command
        print(f"error: {' '.join(said.split())}", file=sys.stderr)
    return status
