"""Numbers of an opened sum, as a client tells a blind server of them: few decimals, of enough clients, of one list a round.

Exact numbers are fractions whose denominator is a count of images, and sums of two lists of clients differ by a client's
own numbers. So a number is rounded until many counts could have given it, and a large loss has no more digits than a small
one; of the clients that were asked one alone tells in each round (`strategies.plan.teller`); and what it told of one list it
never tells of another.

The share of values that were clipped is not told: who chose the config knows what decay alone does to the start, and would
read each client's images from the shares of some rounds. It is in the clients' logs.
"""

from __future__ import annotations

import math
from typing import Literal, Sequence

from clients.notes import Notes
from fl.sections import Tell

LEAST = 3           # clients in a sum of which numbers are told, at least
FEW, COARSE = 1000, 2   # images below which a share has so many decimals


def may(notes: Notes, kind: Literal["train", "evaluate"], round: int, members: Sequence[int], need: int) -> bool:
    """Whether the client whose turn it is tells the numbers of a sum of ``members``, of whom there must be LEAST and ``need``."""
    names = ",".join(map(str, members))
    return len(members) >= max(LEAST, need) and notes.first(f"told {kind} {round}", names) == names


def short(loss: float, decimals: int) -> float:
    """``loss`` with so many decimals, and from 10 on with fewer, so that it has one digit more than that in all."""
    return round(loss, decimals - max(0, math.floor(math.log10(loss))) if loss > 0 else decimals)


def trained(tell: Tell, loss: float) -> dict[str, float]:
    """The mean training loss as it is told."""
    return {"train_loss": short(loss, tell.loss)}


def evaluated(tell: Tell, accuracy: float, loss: float, images: int) -> dict[str, float]:
    """The accuracy and loss over so many ``images`` as they are told."""
    return {"accuracy": round(accuracy, min(tell.accuracy, COARSE) if images < FEW else tell.accuracy), "loss": short(loss, tell.loss)}
