"""A blind server's memory, and what of it goes to whom."""

from __future__ import annotations

from typing import Any, Iterator, Mapping

import torch
from torch import Tensor

from fl.adapter import Adapter
from fl.record import digest
from fl.wire import sealed
from fl.wire.flat import Packed, pack
from fl.wire.octets import octets
from fl.wire.sealed import Total
from fl.wire.transcript import follow
from strategies.talk import Facts

OCTETS = octets()


class Memory:
    """The memory of a blind server: the newest locked state, the sums of the rounds after it, and what each client has seen.

    ``transcript`` is T of the newest sum that was taken (`fl.wire.transcript`).
    """

    def __init__(self, run: str, config: str = "", transcript: bytes = b"") -> None:
        self.run, self.config, self.safe, self.transcript = run, config, 0, transcript
        self.state: tuple[int, Tensor] | None = None
        self.sums: dict[int, Total] = {}
        self._seen: dict[int, int] = {}

    def kept(self) -> dict[str, Any]:
        """What a checkpoint holds of this memory."""
        sums = {round: (list(_hex(total)), torch.from_numpy(total.payload)) for round, total in self.sums.items()}
        return {"state": self.state, "sums": sums, "seen": dict(self._seen), "transcript": self.transcript.hex()}

    def recall(self, kept: Mapping[str, Any]) -> None:
        """Remember what `kept` gave."""
        self.state, self._seen, self.transcript = kept["state"], dict(kept["seen"]), bytes.fromhex(kept["transcript"])
        self.sums = {r: _total(members, payload) for r, (members, payload) in kept["sums"].items()}

    def add(self, round: int, total: Total) -> None:
        """Keep the sum of ``round``."""
        self.sums[round] = total

    def taken(self, round: int) -> dict[str, Any]:
        """Go on from the sum of ``round``; what the run's record holds of it."""
        total = self.sums[round]
        self.transcript = follow(self.transcript, round, total)
        members = [[client, nonce.hex()] for client, nonce in total.members]
        return {"members": members, "payload": digest(total.payload.tobytes()), "transcript": self.transcript.hex()}

    def drop(self, round: int) -> None:
        """Forget the sum of ``round``, which nobody took."""
        del self.sums[round]
        self._seen = {client: min(seen, round - 1) for client, seen in self._seen.items()}

    def lock(self, round: int, state: Tensor) -> None:
        """Keep the locked state after ``round``; one sum stays, since who is one round behind needs no more."""
        self.state, self.sums = (round, state), {r: t for r, t in self.sums.items() if r >= round}

    def messages(self, client: int, upto: int, facts: Mapping[str, Any]) -> Iterator[tuple[Packed, Facts]]:
        """What ``client`` lacks to stand after round ``upto``, and then, should it be behind even so, all that there is."""
        since = self._seen.get(client, 0)
        self._seen[client] = upto
        held = self.state is None or since >= self.state[0] - 1
        for tensors, start in (self.after(since) if held else self.all(), self.all()):
            yield pack(tensors, OCTETS), {"run": self.run, "config": self.config, "safe": min(self.safe, upto), **facts, "since": start, "upto": upto}

    def after(self, since: int) -> tuple[Adapter, int]:
        """The sums of the rounds after ``since``, named for the wire, and ``since``."""
        return {n: t for r, s in self.sums.items() if r > since for n, t in sealed.named(f"{r:05}", s).items()}, since

    def all(self) -> tuple[Adapter, int]:
        """The locked state with the sums since, and its round."""
        if self.state is None:
            return self.after(0)
        round, state = self.state
        return {"sealed.state": state, **self.after(round)[0]}, round


def _hex(total: Total) -> Iterator[list[int | str]]:
    return ([client, nonce.hex(), echo.hex()] for (client, nonce), echo in zip(total.members, total.echoes, strict=True))


def _total(members: list[list[Any]], payload: Tensor) -> Total:
    pairs = tuple((client, bytes.fromhex(nonce)) for client, nonce, _ in members)
    return Total(pairs, payload.numpy(), tuple(bytes.fromhex(echo) for *_, echo in members))
