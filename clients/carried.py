"""What a client carries from round to round: its own parts of the model, its control variate, the change of its base.

All is kept in plain order in the client's `Drawer`. The recipe asks for the first two, a strategy that changes the base for
the third; without them no disk is touched.
"""

from __future__ import annotations

import torch

from clients.state import Drawer, StateError
from fl.adapter import Adapter, part, ride
from fl.base import follow
from fl.recipe import Recipe

PERSONAL, CONTROL, BASE = "personal", "control", "base"  # the files' names


class Behind(RuntimeError):
    """The change of the base that arrived does not follow on what this client has of it: it needs the whole."""


def start(drawer: Drawer, round: int, recipe: Recipe, first: Adapter, received: Adapter) -> Adapter:
    """Where training starts: what was received, and of what stays at home what the round before left, ``first`` at first."""
    if not recipe.keep:
        return received
    found = drawer.recall(PERSONAL, round - 1)
    return {**first, **received, **(part(found[1], recipe.keep) if found else {})}


def leave(drawer: Drawer, round: int, recipe: Recipe, model: Adapter) -> None:
    """Keep of the trained ``model`` what stays at home."""
    drawer.keep(PERSONAL, round, part(model, recipe.keep))


def present(drawer: Drawer, recipe: Recipe, counted: int) -> None:
    """Raise StateError when what round ``counted`` left is gone: of a part of its own, or a variate whose share the server has."""
    for what, asked in ((PERSONAL, recipe.keep), (CONTROL, recipe.control)):
        found = drawer.recall(what, counted) if asked and counted else None
        if asked and counted and (found is None or found[0] != counted):
            raise StateError(f"what round {counted} left in this client's state folder ({what}) is gone; put the folder back, or start the run anew")


def variate(drawer: Drawer, round: int, control: Adapter) -> Adapter:
    """c_k as the round before left it, zero at first; ``control`` is c, as it was received."""
    found = drawer.recall(CONTROL, round - 1)
    return {n: torch.zeros_like(t) for n, t in control.items()} | (found[1] if found else {})


def renew(drawer: Drawer, round: int, own: Adapter, gradient: Adapter, of: int) -> Adapter:
    """Keep ``gradient`` as the new c_k in the place of ``own``, and return what one of ``of`` clients adds to c.

    c_k+ = mean over the steps of the loss's gradient        sent: (c_k+ - c_k) / of

    Under plain SGD at a constant rate this is option II of the paper, c_k - c + (w - w_k) / (steps * rate).
    """
    drawer.keep(CONTROL, round, {**own, **gradient})
    return ride(CONTROL, {n: (t - own[n]) / of for n, t in gradient.items()})


def settle(drawer: Drawer, steps: Adapter, since: int, upto: int) -> Adapter:
    """The whole change of the base up to round ``upto``, of which ``steps`` (`numbered`) came after ``since``; it is kept.

    Raises Behind when what is kept is not of round ``since``, or cannot be read: unlike all else, the server has it, too.
    """
    before: Adapter = {}
    if since:
        try:
            found = drawer.recall(BASE, since)
        except StateError:
            found = None
        if found is None or found[0] != since:
            raise Behind(f"client {drawer.client} does not have the base of round {since}")
        before = found[1]
    whole = follow(before, steps)
    if upto > since:
        drawer.keep(BASE, upto, whole)
    return whole
