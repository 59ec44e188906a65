"""What a machine needs to take part: its files, its pictures, a look before the start."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from simulations.veilora.answers import PASSED, As, Format, answer

app = typer.Typer()
deployments = typer.Typer(no_args_is_help=True, help="The files of a deployment.")
nodes = typer.Typer(no_args_is_help=True, help="What a node makes for itself.")


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
    nodes: Annotated[int, typer.Option(help="how many, for a trial: their private keys are made here, too")] = 0,
    pub: Annotated[list[Path] | None, typer.Option(help="a node's public key, from its `veilora node init`; once for each node, in order")] = None,
    port: Annotated[int, typer.Option(help="of the proxy, for the nodes")] = 8443,
    name: Annotated[list[str] | None, typer.Option(help="a further name or address of the coordinator; may be repeated")] = None,
    data: Annotated[str, typer.Option(help="where a node has its pictures")] = "",
    weights: Annotated[str, typer.Option(help="where a node has the backbone's weights")] = "",
    key: Annotated[str, typer.Option(help="where a node has the image key")] = "/etc/veilora/key",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    home: Annotated[str, typer.Option(help="the folder on each machine that will hold its folder")] = "/etc/veilora",
    days: Annotated[int, typer.Option(help="until the server's certificate expires")] = 365,
    secure: Annotated[bool, typer.Option("--secure/--clear", help="whether the nodes' policies demand secure aggregation")] = True,
    format: As = Format.text,
) -> None:
    """Write the files of a deployment: certificates, policies, units, proxy, containers, commands; keys of nodes for a trial alone."""
    from clients.kit import KitError, deploy, nodekey

    if bool(pub) == bool(nodes):
        raise KitError("a deployment must have its nodes' public keys or, for a trial, their number; give --pub FILE for each, or --nodes N")
    keys = nodekey.publics(pub or [])
    plan = deploy.Plan(
        host, nodes or len(keys), port, names=tuple(name or ()), data=data, weights=weights, key=key, device=device, home=home,
        days=days, secure=secure
    )  # fmt: skip
    steps = deploy.init(folder, plan, keys=keys)
    answer(format, {"folder": str(folder), "next": steps}, "\n".join(steps))


@nodes.command("init")
def node_init(folder: Annotated[Path, typer.Argument(help="the node's folder, as /etc/veilora/node-0")], format: As = Format.text) -> None:
    """Make this node's own key, on this node, and show its public half, for the operator's `veilora deploy init --pub`."""
    from clients.kit import nodekey

    public = nodekey.create(folder).decode().strip()
    answer(format, {"public": public, "path": str(folder / "node.pub")}, public)


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
def partition(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(help="the new folder")],
    index: Annotated[int, typer.Option(help="the client's number, from 0")],
    of: Annotated[int, typer.Option(help="how many clients there are")],
    encrypt: Annotated[bool, typer.Option("--encrypt", help="with the image key, before a picture touches the disk")] = False,
    own: Annotated[bool, typer.Option("--own", help="all pictures of data.root are this client's: nothing is cut")] = False,
    format: As = Format.text,
) -> None:
    """Write one client's pictures to a folder for its machine; further words are overrides, as data=folder data.root=/pictures."""
    from clients import partition
    from fl.config import load

    found = partition.write(load(shlex.join(context.args)), index, of, out, encrypt, own)
    counts = ", ".join(f"{n} {part}" for part, n in found["images"].items())
    counts += f" of {' x '.join(map(str, found['side']))} px" + "".join(f", {n} {fault}" for fault, n in found["faults"].items())
    hidden = f"encrypted with key {found['encrypted']['key']}" if found["encrypted"] else "plain"
    answer(format, found, f"{found['folder']}: client {index} of {of}, {counts} images, {hidden}; its node sets partition-path to it")
