"""A server that shows clients different histories of one run is named: each hears in every sum on what the others stand.

A lie needs two groups: who took one sum and who took another. In the next round their messages are bound to different
transcripts, and so are the echoes beside them. A server that never mixes the two groups needs more than half of a round's
clients for each, so some in both. Those it must lead back and forth, and a client that has left a history for another, as it
does where a round is tried again, is never led back to it.
"""

from __future__ import annotations

import logging

from torch import Tensor

from clients.local import Client
from clients.notes import Notes
from fl.wire.echo import echo, echoes
from fl.wire.masks import SealError
from fl.wire.sealed import Sealed, Total

VIEWS = "transcript: two views"
WALKED, LEFT = "walked", "left"  # lists in the notes
log = logging.getLogger("veilora.client")


class Strangers(SealError):
    """A sum with messages that their ``clients`` have not sent in this round with this key."""

    def __init__(self, clients: list[int]) -> None:
        self.clients = clients
        super().__init__(f"transcript: no message of client {', '.join(map(str, clients))}")


def walk(client: Client, run: str, path: Tensor) -> None:
    """Note the ``path`` that a client has come by, uint8 (round, n). Raises SealError where it has left it before for another."""
    notes = Notes(client.drawer(run))
    now, before = [bytes(step.tolist()).hex() for step in path], notes.listed(WALKED)
    left = set(notes.listed(LEFT)) | {old for old, new in zip(before, now) if old != new}
    if any(old != new for old, new in zip(before, now)):
        left |= set(before[len(now) :])
    if again := sorted(left & set(now)):
        log.error("%s: %s: the coordinator leads this client back to a history that it has left (%d rounds)", run, VIEWS, len(again))
        notes.stop(VIEWS)
        raise SealError(VIEWS)
    if now[: len(before)] != before[: len(now)] or len(now) > len(before):
        notes.put({WALKED: now, LEFT: sorted(left)})


def sounding(client: Client, run: str, bound: str, round: int, sealed: Sealed) -> Sealed:
    """The message with its echo."""
    return sealed._replace(echo=echo(client.seal_key, run, bound, round, client.index, sealed.nonce))


def listen(client: Client, run: str, bound: str, round: int, total: Total) -> None:
    """Raise SealError unless every member of a sum stands where this client does, before the sum is opened.

    Where one stands elsewhere, this client takes no further part in the run. Where one has sent no such message, `Strangers`
    names it, so that a server can leave it out.
    """
    members = zip(total.members, total.echoes, strict=True)
    heard = [(c, echoes(client.seal_key, run, bound, round, c, nonce, told)) for (c, nonce), told in members]
    if elsewhere := sorted(c for c, same in heard if same is False):
        says = "%s: %s: in round %d the coordinator has shown client %s another history than this client (or it lies)"
        log.error(says, run, VIEWS, round, elsewhere)
        Notes(client.drawer(run)).stop(VIEWS)
        raise SealError(VIEWS)
    if strangers := sorted(c for c, same in heard if same is None):
        error = Strangers(strangers)
        log.error("%s: in the sum of round %d: %s: changed, replayed, or of another key", run, round, error)
        raise error
