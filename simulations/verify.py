"""Does a run's record hold? Every line of its chain, every row, every file, every signature, without a network.

    veilora verify RUN_FOLDER                    the keys are those that the record itself names
    veilora verify RUN_FOLDER --keys nodes/      a client's key must be the one in nodes/node-N.pub

What a record without signatures shows is damage. With the nodes' keys from elsewhere it shows a forger, too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Sequence

from omegaconf import OmegaConf
from yaml import YAMLError

from fl.config import Config
from fl.durable import IntegrityError
from fl.journal import LEFT
from fl.record import NAME, Head, chain, digest, signer, text
from fl.wire.transcript import begin
from simulations.followed import Followed, follow

SUMMARY = "summary.json"
BEGUN = ("command.json", "config.yaml")  # the files that a run writes before its first round


class Verified(NamedTuple):
    """A record that holds: its rounds, the nodes with a key, those that signed the end, and the head that stands for all of it."""

    run: str
    rounds: int
    ended: bool
    secure: bool
    signers: tuple[int, ...]
    closed: tuple[int, ...]
    head: str


def verify(folder: Path, keys: Path | None = None) -> Verified:
    """Check the record of the run in ``folder``; ``keys`` is a folder of the nodes' public keys, node-N.pub.

    Raises IntegrityError, naming the first thing that does not hold.
    """
    content = read(folder / NAME)
    lines = chain(content)
    first = lines[0]
    if first["run"] != folder.resolve().name:
        raise IntegrityError(f"the record is of the run {str(first['run'])[:128]!r}, but its folder is named {folder.resolve().name!r}")
    files(folder, begun(first), BEGUN)
    found = follow(lines)
    secure, cohorts = "transcript" in first, rows(folder, found.rows)
    ended = found.left is not None
    if not ended and (folder / SUMMARY).exists():
        raise IntegrityError(f"{SUMMARY} is there, but the record does not say that the run has ended")
    if ended:
        files(folder, found.left, (*LEFT, SUMMARY))
    signers = known(first, keys)
    closed = signatures(found, signers, first["run"], [digest(line) for line in content.split(b"\n")], found.members if secure else cohorts)
    if ended and signers and not closed:
        raise IntegrityError("the nodes have keys, but none has signed the end of the run")
    if secure:
        start(folder, first)
    return Verified(first["run"], len(found.rows), ended, secure, tuple(sorted(signers)), closed, digest(content.split(b"\n")[-2]))


def start(folder: Path, first: Mapping[str, Any]) -> None:
    """Raise IntegrityError unless a secure run's T_0 is of its run, its config.yaml and its key's fingerprint."""
    try:
        config = Config.model_validate(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
        must = begin(str(first["run"]), config, str(first["key"])).hex()
    except (KeyError, ValueError, YAMLError) as error:
        raise IntegrityError(f"config.yaml must be that of a secure run of this version ({type(error).__name__})") from None
    if first["transcript"] != must:
        raise IntegrityError("the record's first transcript is not of this run, config and key")


def told(found: Verified) -> str:
    """The line that says what holds."""
    end = "to its end" if found.ended else "so far, for it has not ended"
    if not found.signers:
        whose = "no node has signed it, so it shows damage and no forger"
    else:
        whose = f"signed by {len(found.signers)} clients" + (f", at its end by {', '.join(map(str, found.closed))}" if found.ended else "")
    return f"{found.run}: the record of {found.rounds} rounds holds {end}; {whose}; its head is {found.head}"


def rows(folder: Path, digests: Sequence[str]) -> list[frozenset[int]]:
    """The clients that trained in each round. Raises IntegrityError unless rounds.jsonl holds exactly the rows of these ``digests``."""
    path = folder / "rounds.jsonl"
    *found, rest = read(path).split(b"\n") if digests or path.exists() else [b""]  # before round 1 there is none
    for n, (line, must) in enumerate(zip(found, digests), 1):
        if digest(line) != must:
            raise IntegrityError(f"the row of round {n} in rounds.jsonl is not the one that was written")
    if rest or len(found) != len(digests):
        raise IntegrityError(f"rounds.jsonl must hold the {len(digests)} rows of the record, each a whole line, got {len(found)}")
    return [frozenset(json.loads(line)["cohort"]) for line in found]


def files(folder: Path, digests: Mapping[str, str], names: Sequence[str]) -> None:
    """Raise IntegrityError unless of the files of these ``names`` those are there that have ``digests``, as they were written."""
    for name in names:
        if name in digests and digest(read(folder / name)) != digests[name]:
            raise IntegrityError(f"{name} is not as it was written")
        if name not in digests and (folder / name).exists():
            raise IntegrityError(f"{name} is in the folder and not in the record")
    if strange := sorted(set(digests) - set(names)):
        raise IntegrityError(f"the record names {strange[0][:40]!r}, which no run leaves")


def begun(first: Mapping[str, Any]) -> dict[str, str]:
    """The digests by name of the files that the run began with. Raises IntegrityError where the ``first`` line has none."""
    try:
        return dict(first["files"])
    except (TypeError, ValueError):
        raise IntegrityError(f"line 0 of {NAME} must name the files that the run began with") from None


def known(first: Mapping[str, Any], keys: Path | None) -> dict[int, str]:
    """The nodes' public keys by client, those of the record's ``first`` line. Raises IntegrityError where ``keys`` has others."""
    try:
        own = {int(client): str(public) for client, public in first["signers"].items()}
        of = int(first["clients"])
    except (AttributeError, TypeError, ValueError):
        raise IntegrityError(f"line 0 of {NAME} must name the clients' keys") from None
    if keys is None:
        return own
    for client in range(of):
        path = keys / f"node-{client}.pub"
        must = " ".join(path.read_text().split()[:2]) if path.exists() else None
        if own.get(client) != must:
            raise IntegrityError(f"the record has {'no' if client not in own else 'another'} key of client {client} than {path.name}")
    return own


def signatures(
    found: Followed, signers: Mapping[int, str], run: str, digests: Sequence[str], cohorts: Sequence[frozenset[int]]
) -> tuple[int, ...]:
    """Check all signatures; returns who has signed the end.

    ``digests`` are those of all lines; ``cohorts`` who trained in each round that stands: who of them has a key must have
    signed. Raises IntegrityError, naming the first that is missing or wrong.
    """
    try:
        tests = {client: signer(public) for client, public in signers.items()}
    except ValueError as error:
        raise IntegrityError(f"line 0 of {NAME}: {error}") from None
    for one in found.signed:
        for client, signature in sorted(one.by.items()):
            if client not in tests or not tests[client](signature, text(run, Head(one.line, digests[one.line]), one.transcript)):
                raise IntegrityError(f"{one.where}: what client {client} signed is not this record")
    by = {one.round: set(one.by) for one in found.signed}  # of a round that was done again its last
    for round, inside in enumerate(cohorts, 1):
        if missing := inside & set(tests) - by.get(round, set()):
            raise IntegrityError(f"round {round} must be signed by all who trained in it and have a key, but is not by client {min(missing)}")
    return tuple(sorted(by.get(None, ())))


def read(path: Path) -> bytes:
    """The content of a file of the record. Raises IntegrityError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"{path.name} must be in the run's folder, but cannot be read ({error.strerror})") from None
