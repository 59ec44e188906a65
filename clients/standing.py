"""Where a client stands in a blind run, and what it opens from there.

It outlives the round in the client's `Drawer` as named tensors, and the same tensors, locked, are what a server keeps of the
run for clients that were away. Nothing of it rests on a round that the server names: every sum up to there was opened.
"""

from __future__ import annotations

import logging
from typing import Any, Mapping, NamedTuple

import torch
from torch import Tensor

from clients.carried import Behind
from clients.echo import listen
from clients.local import Client
from clients.notes import Notes
from clients.state import StateError
from fl.tree import named, nested
from fl.wire import transcript
from fl.wire.locked import lock, unlock
from fl.wire.masks import Opened, SealError, Terms, open_total
from fl.wire.sealed import Total

FILE = "standing"
STEP = 16     # bytes of a transcript in a path
REFUSALS = 3  # sums of one round that did not open, after which a client takes no further part
log = logging.getLogger("veilora.client")


class Stepped(SealError):
    """A run whose epoch is over: what it sealed does not open any more."""

    rule = "another run has ended since this one began"
    RULES = (rule,)


class Standing(NamedTuple):
    """The round after which a client stands; the strategy's state; by group the root mean square of the last step; what the last
    sum told, the mean training loss and the share of values that were clipped, float64 (2,), and who was in it, int64 (m,);
    the transcript, uint8 (32,); and the beginnings of all transcripts after round 0, uint8 (round, 16).
    """

    round: int
    state: Any
    scale: Mapping[str, Tensor]
    told: Tensor
    members: Tensor
    transcript: Tensor
    path: Tensor

    def bound(self, kind: str) -> str:
        """The text that a message of this ``kind`` is bound to, sealed or opened where the client stands."""
        return transcript.bound(self.transcript.numpy().tobytes(), kind)

    def after(self, total: Total) -> tuple[Tensor, Tensor]:
        """The transcript and the path once ``total``, the sum of the next round, is taken."""
        after = octets_of(transcript.follow(self.transcript.numpy().tobytes(), self.round + 1, total))
        return after, torch.cat([self.path, after[None, :STEP]])


def start(client: Client, run: str) -> bytes:
    """T_0 of ``run`` as this client has it: its own config, its own key."""
    return transcript.begin(run, client.config, client.seal_key.fingerprint)


def recalled(client: Client, run: str, since: int, locked: Tensor | None, first: Standing) -> Standing:
    """Where the client stood after round ``since``: what was ``locked`` if anything, what its drawer keeps, or ``first``.

    Raises SealError for a state that does not open, and for a client that takes no further part in the run; Behind when it
    stood elsewhere.
    """
    drawer = client.drawer(run)
    if reason := Notes(drawer).stopped:
        raise SealError(reason)
    now = client.seal_key.fingerprint
    began = Notes(drawer).first("seal", now)
    if began != now:
        raise Stepped(f"this run began with the seal key {began}, and it is {now} by now: another run has ended since; start this one anew")
    if locked is not None:
        return first._replace(round=since, **nested(tree(first), unlock(client.seal_key, start(client, run), since, locked)))
    if not since:
        return first
    try:
        kept = drawer.recall(FILE, since)
    except StateError:
        kept = None
    if kept is None or kept[0] != since:
        raise Behind(f"client {client.index} does not stand after round {since}")
    return first._replace(round=since, **nested(tree(first), kept[1]))


def keep(client: Client, run: str, standing: Standing) -> None:
    """Put it into the drawer."""
    client.drawer(run).keep(FILE, standing.round, named(tree(standing)))


def locked(client: Client, run: str, standing: Standing) -> Tensor:
    """uint8 (n,): what the server may keep of it for others."""
    return lock(client.seal_key, start(client, run), standing.round, named(tree(standing)))


def tree(standing: Standing) -> dict[str, Any]:
    """The parts of it that are written down; the round is in the file's name."""
    return {name: value for name, value in standing._asdict().items() if name != "round"}


def opening(client: Client, run: str, bound: str, round: int, total: Total, count: int, terms: Terms) -> Opened:
    """`open_total`, once all in it are heard to stand here; where REFUSALS sums of one round do not open, the client takes no
    further part in the run.
    """
    try:
        listen(client, run, bound, round, total)
        return open_total(client.seal_key, bound, round, total, count, terms)
    except SealError:
        notes = Notes(client.drawer(run))
        if notes.count(f"refused {round}") >= REFUSALS:
            notes.stop(f"{REFUSALS} sums of round {round} did not open, so this client takes no further part in the run")
            log.error("%s: %s", run, notes.stopped)
        raise


def octets_of(digest: bytes) -> Tensor:
    """uint8 (n,)."""
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)
