"""What a node's owner decides: which runs come in, and whose releases."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from simulations.veilora.answers import PASSED, As, Format, answer

policies = typer.Typer(no_args_is_help=True, help="What a node's owner lets a coordinator ask.")
releases = typer.Typer(no_args_is_help=True, help="Signatures over the code, for policies that ask for one.")


@policies.command("check", **PASSED)
def check(context: typer.Context, file: Annotated[Path, typer.Argument(help="policy.toml")], format: As = Format.text) -> None:
    """Would this policy let a run in? Further words are the run's overrides; exit status 6 where it is refused."""
    from clients import judgement, policy

    if not file.exists():
        raise policy.PolicyError("file", f"{file} must exist to be checked; a node without one is under the strict policy")
    owner = policy.read(file)
    digests = {"policy": owner.digest()[:16], "policy_sha256": owner.digest()}
    try:
        config = judgement.judge(owner, shlex.join(context.args))
    except policy.PolicyError as error:
        answer(format, {"ok": False, "rule": error.rule, **digests}, f"refused: {error}\npolicy {digests['policy']}")
        raise typer.Exit(6) from None
    digests |= {"config": config.digest(), "config_sha256": judgement.config_sha256(config)}
    says = f"let in: {config.name}\npolicy {digests['policy']}\nconfig {digests['config']}; to approve no other: {digests['config_sha256']}"
    answer(format, {"ok": True, "rule": None, **digests}, says)


@releases.command("sign")
def sign(
    out: Annotated[Path, typer.Argument(help="the signature's file")],
    key: Annotated[Path, typer.Option(help="an Ed25519 private key in PEM: openssl genpkey -algorithm ed25519")],
    format: As = Format.text,
) -> None:
    """Sign the code that is installed here."""
    from clients import release
    from fl.provenance import code_sha256

    code = code_sha256()
    signer = release.sign(key, out, code)
    says = f"code {code}\nsigner {signer}\n{out}: put it where signature of policy.toml says"
    answer(format, {"code": code, "signer": signer, "signature": str(out)}, says)


@releases.command("verify")
def verify(
    signature: Annotated[Path, typer.Argument(help="the signature's file")],
    signer: Annotated[list[str], typer.Option(help="a public key in base64; may be repeated")],
    format: As = Format.text,
) -> None:
    """Is the code that is installed here signed by one of these? Exit status 6 where it is not."""
    from clients import release
    from fl.provenance import code_sha256

    code = code_sha256()
    try:
        by = release.verify(signature, signer, code)
    except release.ReleaseError as error:
        answer(format, {"ok": False, "code": code, "signer": None}, f"not signed: {error}")
        raise typer.Exit(6) from None
    answer(format, {"ok": True, "code": code, "signer": by}, f"code {code}\nsigned by {by}")
