"""Keys: make them, share them between nodes, let them age."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simulations.veilora.answers import As, Format, answer

app = typer.Typer()
between = typer.Typer(no_args_is_help=True, help="Keys between nodes: pairs, sharing, taking, rotation, another image key.")

Own = Annotated[Path, typer.Option("--pair", help="this node's own pair")]
OWN = Path("~/veilora/pair")


@app.command()
def keygen(
    path: Annotated[Path, typer.Argument(help="the new file; its folder is made")],
    seal: Annotated[bool, typer.Option("--seal", help="a seal key, for secure aggregation, in the image key's place")] = False,
    format: As = Format.text,
) -> None:
    """Make the image key, or with --seal the seal key, that clients share and no server has."""
    from fl import keys, seal_key

    key = (seal_key if seal else keys).create(path)
    place = path.expanduser()
    says = f"{place}: fingerprint {key.fingerprint}. Give it to every client, never to the server."
    answer(format, {"path": str(place), "fingerprint": key.fingerprint}, says)


@between.command()
def pair(path: Annotated[Path, typer.Argument(help="the new file; its public half is FILE.pub")] = OWN, format: As = Format.text) -> None:
    """Make this node's pair, to which others wrap keys."""
    from clients import wrapped

    public, known = wrapped.public_of(path.expanduser()), wrapped.pair(path)
    says = f"{public}: fingerprint {known}. Give this file to whoever shares a key; read the fingerprint out to them."
    answer(format, {"path": str(path.expanduser()), "public": str(public), "fingerprint": known}, says)


@between.command()
def share(
    path: Annotated[Path, typer.Argument(help="the seal key, or the image key")],
    to: Annotated[Path, typer.Option(help="the public half of the node that is to have it")],
    out: Annotated[Path, typer.Option(help="the new file, which anyone may carry")],
    own: Own = OWN,
    format: As = Format.text,
) -> None:
    """Wrap a key for one node."""
    from clients import wrapped

    known = wrapped.share(path, to, own, out)
    says = f"{out}: key {known}, for {to} alone; there: veilora key take {out} --from {wrapped.public_of(own).name} --to KEY"
    answer(format, {"file": str(out), "fingerprint": known}, says)


@between.command()
def take(
    file: Annotated[Path, typer.Argument(help="what veilora key share or rotate wrote")],
    sender: Annotated[Path, typer.Option("--from", help="the public half of the node that shared it")],
    to: Annotated[Path, typer.Option(help="where the key is to lie")],
    own: Own = OWN,
    keep: Annotated[bool, typer.Option("--keep-pair", help="keep the pair: with it a stolen disk opens this file, if recorded")] = False,
    format: As = Format.text,
) -> None:
    """Unwrap a key that another node shared; this node's pair has then served, and is destroyed."""
    from clients import wrapped

    known, new = wrapped.take(file, sender, own, to, keep)
    says = f"{to}: key {known}" + ("" if new else ", which was there already")
    answer(format, {"path": str(to.expanduser()), "fingerprint": known, "new": new}, says)


@between.command()
def rotate(
    path: Annotated[Path, typer.Argument(help="the seal key")],
    to: Annotated[list[Path], typer.Option(help="the public half of a node that stays; once for each")],
    out: Annotated[Path, typer.Option(help="the folder for the wrapped keys")],
    revoke: Annotated[list[Path] | None, typer.Option(help="the public half of a node that goes: left out of --to")] = None,
    own: Own = OWN,
    format: As = Format.text,
) -> None:
    """Put a fresh secret in the place of the seal key and wrap it for each node that stays."""
    from clients import wrapped
    from fl import seal_key

    files, known = wrapped.rotate(path, to, revoke or [], own, out), seal_key.read(path).fingerprint
    lines = [f"{path}: key {known}; who has not taken it opens nothing new"] + [f"{file}: for the node {node}" for file, node in files.items()]
    answer(format, {"fingerprint": known, "files": files}, "\n".join(lines))


@between.command()
def reencrypt(
    folder: Annotated[Path, typer.Argument(help="a partition folder that is encrypted")],
    old: Annotated[Path, typer.Option(help="the image key that it was encrypted with")],
    new: Annotated[Path, typer.Option(help="the image key that it is to have")],
    format: As = Format.text,
) -> None:
    """Encrypt a partition folder under another image key, in place."""
    from clients import partition

    found = partition.reencrypt(folder, old, new)
    answer(format, found, f"{found['folder']}: encrypted with key {found['encrypted']['key']}")
