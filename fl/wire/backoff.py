"""How soon Flower looks again for a part of a message that is still on its way.

A message is announced before its parts are there: who hears of it at once asks for parts that are yet to come. Flower's
`pull_objects` then waits a second, and twice as long each time after. It has a parameter for that, which none of its callers
passes, so the module that calls it is given one that does.
"""

from __future__ import annotations

import inspect
from functools import partial
from types import ModuleType

FIRST = 0.05  # seconds


def sooner(module: ModuleType) -> None:
    """Let the ``pull_objects`` of ``module`` wait 0.05 s first; a module that has none, or one of another shape, stays as it is."""
    pull = getattr(module, "pull_objects", None)
    if pull is not None and "initial_backoff" in inspect.signature(pull).parameters:
        module.pull_objects = partial(pull, initial_backoff=FIRST)
