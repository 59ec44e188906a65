"""Numbers of an opened sum, as a client tells a blind server of them: few decimals, of enough clients, of one list a round.

Exact numbers are fractions whose denominator is a count of images, and sums of two lists of clients differ by a client's
own numbers. So a number is rounded until many counts could have given it; of the clients that were asked one alone tells
in each round (`strategies.plan.teller`); and what it told of one list it never tells of another.
"""

from __future__ import annotations

from typing import Literal, Sequence

from clients.notes import Notes
from fl.sections import Tell

LEAST = 3           # clients in a sum of which numbers are told, at least
FEW, COARSE = 1000, 2   # images below which a share has so many decimals


def may(notes: Notes, kind: Literal["train", "evaluate"], round: int, members: Sequence[int], need: int) -> bool:
    """Whether the client whose turn it is tells the numbers of a sum of ``members``, of whom there must be LEAST and ``need``."""
    names = ",".join(map(str, members))
    return len(members) >= max(LEAST, need) and notes.first(f"told {kind} {round}", names) == names


def trained(tell: Tell, loss: float, clipped: float) -> dict[str, float]:
    """The mean training loss and the share of clipped values as they are told."""
    return {"train_loss": round(loss, tell.loss), "clipped": round(clipped, tell.accuracy)}


def evaluated(tell: Tell, accuracy: float, loss: float, images: int) -> dict[str, float]:
    """The accuracy and loss over so many ``images`` as they are told."""
    return {"accuracy": round(accuracy, min(tell.accuracy, COARSE) if images < FEW else tell.accuracy), "loss": round(loss, tell.loss)}
