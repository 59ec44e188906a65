"""The command `veilora`: keys, deployments, a look before the start, comparisons, audits.

    veilora keygen ~/veilora/key
    veilora deploy init deployment --host fed.example.org --nodes 3
    veilora doctor node-0

Exit status: 0 ok, 2 usage or config, 3 a machine that is not ready, 4 a run that failed, 5 too few clients, 6 a result that does
not hold. Where a command answers something, `--format json` answers it to a program.
"""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import click
import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Federated LoRA on encrypted pictures.")
deployments = typer.Typer(no_args_is_help=True, help="The files of a deployment.")
audits = typer.Typer(no_args_is_help=True, help="Attacks on the system, measured.")
app.add_typer(deployments, name="deploy")
app.add_typer(audits, name="audit")

PASSED = {"context_settings": {"allow_extra_args": True, "ignore_unknown_options": True}, "add_help_option": False}


class Format(StrEnum):
    """How a command answers."""

    text = "text"
    json = "json"


As = Annotated[Format, typer.Option("--format", help="text, or json for a program")]


@app.command()
def keygen(path: Annotated[Path, typer.Argument(help="the new file; its folder is made")], format: As = Format.text) -> None:
    """Make the image key that all clients share and no server has."""
    from fl import keys

    key = keys.create(path)
    place = path.expanduser()
    says = f"{place}: fingerprint {key.fingerprint}. Give it to every client, never to the server."
    answer(format, {"path": str(place), "fingerprint": key.fingerprint}, says)


@app.command()
def doctor(folder: Annotated[Path, typer.Argument(help="node-N/ or coordinator/ of a deployment")], format: As = Format.text) -> None:
    """Look at this machine before it joins; exit status 3 where something is missing."""
    from clients.kit.doctor import doctor

    findings = doctor(folder)
    lines = [f"{'ok  ' if f.ok else 'MEND'}  {f.name}: {f.says}" + (f"\n        -> {f.do}" if f.do else "") for f in findings]
    fine = all(f.ok for f in findings)
    answer(format, {"ok": fine, "findings": [f._asdict() for f in findings]}, "\n".join(lines))
    raise typer.Exit(0 if fine else 3)


@deployments.command("init")
def deploy_init(
    folder: Annotated[Path, typer.Argument(help="the new folder")],
    host: Annotated[str, typer.Option(help="where nodes find the coordinator: a DNS name or an address")],
    nodes: Annotated[int, typer.Option(help="how many")],
    port: Annotated[int, typer.Option(help="of the proxy, for the nodes")] = 8443,
    name: Annotated[list[str] | None, typer.Option(help="a further name or address of the coordinator; may be repeated")] = None,
    data: Annotated[str, typer.Option(help="where a node has its pictures")] = "",
    weights: Annotated[str, typer.Option(help="where a node has the backbone's weights")] = "",
    key: Annotated[str, typer.Option(help="where a node has the image key")] = "/etc/veilora/key",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    home: Annotated[str, typer.Option(help="the folder on each machine that will hold its folder")] = "/etc/veilora",
    days: Annotated[int, typer.Option(help="until the server's certificate expires")] = 365,
    format: As = Format.text,
) -> None:
    """Write the files of a deployment: certificates, node keys, units, proxy, containers, commands."""
    from clients.kit import deploy

    plan = deploy.Plan(host, nodes, port, names=tuple(name or ()), data=data, weights=weights, key=key, device=device, home=home, days=days)
    steps = deploy.init(folder, plan)
    answer(format, {"folder": str(folder), "next": steps}, "\n".join(steps))


@deployments.command("renew")
def deploy_renew(
    folder: Annotated[Path, typer.Argument(help="the deployment, with its ca/")],
    days: Annotated[int, typer.Option(help="until it expires")] = 365,
    format: As = Format.text,
) -> None:
    """Give the coordinator a new certificate for the names of its old one."""
    from clients.kit import deploy

    steps = deploy.renew(folder, days)
    answer(format, {"folder": str(folder), "next": steps}, "\n".join(steps))


@app.command(**PASSED)
def compare(context: typer.Context) -> None:
    """Run a grid of federations and write its report (python -m simulations.compare --help)."""
    from simulations import compare

    raise typer.Exit(compare.main(context.args))


@app.command()
def report(out: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="the folder of cells.jsonl")]) -> None:
    """Write the report of a grid anew."""
    from simulations import compare

    raise typer.Exit(compare.main(["--out", str(out)]))


@audits.command("key_recovery", **PASSED)
def key_recovery(context: typer.Context) -> None:
    """What clear updates give away of the key (python -m simulations.audit.key_recovery --help)."""
    from simulations.audit import key_recovery

    raise typer.Exit(key_recovery.main(context.args))


@audits.command("poison", **PASSED)
def poison(context: typer.Context) -> None:
    """What hostile clients do to a strategy (python -m simulations.audit.poison --help)."""
    from simulations.audit import poison

    raise typer.Exit(poison.main(context.args))


def answer(format: Format, facts: dict[str, Any], text: str) -> None:
    """Print what a command found."""
    print(json.dumps(facts, indent=2) if format is Format.json else text)


def expected() -> tuple[type[Exception], ...]:
    """What the user can mend; looked up only once something went wrong."""
    from clients.kit import KitError
    from fl.config import ConfigError
    from fl.keys import KeyFileError

    return KitError, ConfigError, KeyFileError, OSError


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


if __name__ == "__main__":
    sys.exit(main())
