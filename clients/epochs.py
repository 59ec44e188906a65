"""The seal key's steps, at a server's word: at the end of a run, and where a client finds itself behind the others.

The server names the epoch and nothing else; a step goes forward, at most `fl.seal_key.LEAP` at once, and can be asked for at
any time. So a server can end any run, and lead nodes so far apart that the key has to be shared anew. It cannot keep a fresh
secret from a node that way, and it cannot be made to ask: a run that it never ends leaves the key in its epoch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping

from clients import local
from clients.local import Client
from fl import seal_key
from fl.wire.flat import Packed, WireError


def step(client: Client, facts: Mapping[str, Any]) -> None:
    """Let this client's seal key stand at the epoch in ``facts``. Raises WireError for none, KeyFileError for one too far on."""
    epoch = facts.get("epoch")
    if not (type(epoch) is int and 0 <= epoch < 2**53):
        raise WireError(f"an epoch must be a number of runs, got {str(epoch)[:40]}")
    seal_key.advance(Path(client.config.seal_key), epoch)


def end(client: Client, facts: Mapping[str, Any], packed: Packed | None = None) -> tuple[dict[str, Any], None]:
    """Step at the end of a run, and answer nothing beside."""
    step(client, facts)
    return {}, None


def catch_up(client: Client, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Step, where this client is behind the others, and answer the roll anew."""
    step(client, facts)
    return local.roll(client)
