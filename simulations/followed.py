"""A record followed line by line: which rows stand, which sums were taken, who signed what."""

from __future__ import annotations

from typing import Any, Mapping, NamedTuple, Sequence

from fl.durable import IntegrityError
from fl.record import NAME
from fl.wire.transcript import step


class Signed(NamedTuple):
    """Signatures (hex) by client of the head of ``line``, with the ``transcript`` (hex) that they stood on.

    ``round`` is the round in which they were given, None at the end.
    """

    where: str
    line: int
    transcript: str
    by: Mapping[int, str]
    round: int | None


class Followed(NamedTuple):
    """The rows that stand, by digest, and who is in each sum; all signatures in order; the files that the run left, if it ended."""

    rows: tuple[str, ...]
    members: tuple[frozenset[int], ...]
    signed: tuple[Signed, ...]
    left: Mapping[str, str] | None


def follow(lines: Sequence[Mapping[str, Any]]) -> Followed:
    """Go through the ``lines`` of a chain. Raises IntegrityError for what could not have happened."""
    rows, members, signed, left = [], [], [], None
    secure = "transcript" in lines[0]
    transcripts = [lines[0].get("transcript", "")]
    for n, line in enumerate(lines[1:], 1):
        where, kind = f"line {n} of {NAME}", line["kind"]
        try:
            if left is not None and kind != "resumed" and (kind != "closed" or lines[n - 1]["kind"] != "end"):
                raise ValueError("the run has ended before it")
            if kind == "round":
                if line["round"] != len(rows) + 1:
                    raise ValueError(f"round {len(rows) + 1} comes next, got {str(line['round'])[:40]}")
                if ("sum" in line) != secure:
                    raise ValueError("a secure run has a sum in every round, and another run has none")
                signed += given(line, where, n, transcripts[-1], line["round"])
                transcript, inside = taken(transcripts[-1], line) if secure else ("", frozenset())
                rows.append(line["row"]), members.append(inside), transcripts.append(transcript)
            elif kind == "resumed":
                if type(line["after"]) is not int or not 0 <= line["after"] <= len(rows):
                    raise ValueError(f"a run goes on after one of its rounds, got {str(line['after'])[:40]}")
                left = None
                del rows[line["after"] :], members[line["after"] :], transcripts[line["after"] + 1 :]
            elif kind == "end":
                left = dict(line["files"])
            else:
                signed += given(line, where, n, transcripts[-1], None)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"{where} cannot be: {error}") from None
    return Followed(tuple(rows), tuple(members), tuple(signed), left)


def taken(before: str, line: Mapping[str, Any]) -> tuple[str, frozenset[int]]:
    """The transcript (hex) after a round's sum, and who is in it. Raises ValueError unless it follows from the one before."""
    listed, payload, says = (line["sum"][part] for part in ("members", "payload", "transcript"))
    members = b"".join(int(client).to_bytes(4, "little") + bytes.fromhex(nonce) for client, nonce in listed)
    after = step(bytes.fromhex(before), line["round"], members, bytes.fromhex(payload)).hex()
    if after != says or len(line["sum"]) != 3:
        raise ValueError(f"the transcript of round {line['round']} does not follow from the one before and this sum")
    return after, frozenset(client for client, _ in listed)


def given(line: Mapping[str, Any], where: str, n: int, transcript: str, round: int | None) -> list[Signed]:
    """The signatures in a line, if there are any. Raises ValueError unless they are of a line before it."""
    if "signed" not in line:
        return []
    head, by = line["signed"]["line"], line["signed"]["by"]
    if type(head) is not int or not 0 <= head < n:
        raise ValueError("signatures are of a line before")
    if any(str(int(client)) != client for client in by) or set(line["signed"]) != {"line", "by"}:
        raise ValueError("signatures are listed by client")
    return [Signed(where, head, transcript, {int(client): str(signature) for client, signature in by.items()}, round)]
