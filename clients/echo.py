"""A server that shows clients different histories of one run is named: each hears in every sum on what the others stand.

A lie needs two groups: who took one sum and who took another. In the next round their messages are bound to different
transcripts, and so are the echoes beside them. A server that never mixes the two groups again needs a quorum from each; with
``quorum`` above one half there are not enough clients for two.
"""

from __future__ import annotations

import logging

from clients.local import Client
from clients.notes import Notes
from fl.wire.echo import echo, echoes
from fl.wire.masks import SealError
from fl.wire.sealed import Sealed, Total

VIEWS = "transcript: two views"
log = logging.getLogger("veilora.client")


class Strangers(SealError):
    """A sum with messages that their ``clients`` have not sent in this round with this key."""

    def __init__(self, clients: list[int]) -> None:
        self.clients = clients
        super().__init__(f"transcript: no message of client {', '.join(map(str, clients))}")


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
        log.error("%s: %s: in round %d the coordinator has shown client %s another history than this client (or it lies)", run, VIEWS, round, elsewhere)
        Notes(client.drawer(run)).stop(VIEWS)
        raise SealError(VIEWS)
    if strangers := sorted(c for c, same in heard if same is None):
        error = Strangers(strangers)
        log.error("%s: in the sum of round %d: %s: changed, replayed, or of another key", run, round, error)
        raise error
