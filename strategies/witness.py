"""The nodes that sign a run's record: what they are shown, and what is kept of what they answer.

A node that has a key says so in the roll call. With each order to train, and once at the end, it is shown the newest line of
the record; a signature comes back with its answer and goes into the record's next line.
"""

from __future__ import annotations

from typing import Any, Generator, Iterable, Iterator, Sequence

from fl.journal import Journal
from fl.record import signer, text
from fl.wire.coding import WHOLE
from fl.wire.flat import pack
from strategies.gate import Refused
from strategies.rollcall import Roll, RollCallError
from strategies.talk import Answer, Facts, Question


def signers(rolls: Sequence[Roll]) -> dict[str, str]:
    """The public keys of the nodes that have one, by client, as the record's first line holds them. Raises RollCallError."""
    for roll in rolls:
        try:
            if roll.signer:
                signer(roll.signer)
        except ValueError as error:
            raise RollCallError(f"client {roll.client}: {error}; see node-key-path on its machine") from None
    return {str(roll.client): roll.signer for roll in rolls if roll.signer}


class Witnesses:
    """Of one run those clients that sign, and their signatures of the line that was shown last."""

    def __init__(self, journal: Journal, rolls: Sequence[Roll]) -> None:
        self._journal = journal
        self._tests = {int(client): signer(public) for client, public in signers(rolls).items()}
        self._by: dict[str, str] = {}

    def shown(self, client: int) -> Facts:
        """The facts that go with a question to ``client``: the record's head, for one that signs."""
        return {"head": list(self._journal.record.head)} if client in self._tests else {}

    def heard(self, answer: Answer, transcript: str = "") -> None:
        """Keep the signature in an answer; ``transcript`` (hex) is what it must stand on. Raises Refused without a right one."""
        if answer.client not in self._tests:
            return
        signature = str(answer.facts.get("signature", ""))
        if not self._tests[answer.client](signature, text(self._journal.run, self._journal.record.head, transcript)):
            raise Refused(answer.client, "record", "its answer must bring its key's signature of the record that it was shown")
        self._by[str(answer.client)] = signature

    def checked(self, answers: Iterable[Answer], transcript: str) -> Iterator[Answer]:
        """The ``answers``; one without a right signature as one that is refused."""
        for answer in answers:
            try:
                if not answer.refused:
                    self.heard(answer, transcript)
            except Refused as reason:
                answer = answer._replace(refused=reason)
            yield answer

    def given(self, inside: Iterable[int]) -> dict[str, Any]:
        """The signatures for the record's next line: those of those whose messages are ``inside`` the round."""
        members, by, self._by = set(inside), self._by, {}
        kept = {client: signature for client, signature in by.items() if int(client) in members}
        return {"signed": {"line": self._journal.record.head.line, "by": kept}} if self._tests else {}

    def close(self, facts: Facts, transcript: str = "") -> Generator[Question, Iterable[Answer], None]:
        """Ask all who sign for the end of the record, and keep what comes; who is away is not waited for."""
        rounds = self._journal.config.rounds
        messages = {c: iter([(pack({}, WHOLE), {**facts, **self.shown(c), "closing": True})]) for c in self._tests}
        for answer in (yield Question("report", rounds, messages)) if messages else ():
            try:
                if answer.refused:
                    raise answer.refused
                self.heard(answer, transcript)
            except Refused as reason:
                self._journal.say(f"the record is not signed to its end by client {answer.client}: {reason}")
        if messages:
            self._journal.record.add("closed", **self.given(self._tests))
