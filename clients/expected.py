"""The orders that this client's own strategy would give it: a server that asks for anything else is refused.

A strategy is pure, and its recipe depends on the round and on the client alone, never on the state (a test holds that of every
one in conf/strategy). So a client that composed the same config knows its recipe to the last field, and the names and shapes
of all that it is sent. Control variates and a change of the base come only where its strategy makes them, and round 1 begins
at the start that all computed. From round 2 on the values are the server's word: in clear it alone knows what it added.

With `clients.blind` this is the file of the clients that sees the strategies.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Mapping

import torch

from clients.blind import info, strategy_of
from clients.gate import fitting
from clients.local import Client
from fl import adapter as adapters
from fl.adapter import Adapter
from fl.base import modules, names
from fl.recipe import Recipe
from fl.wire.flat import WireError
from strategies.plan import orders, scores_own

ROUNDING = 1e-3  # of a value's size: a start is computed on two machines


def order(client: Client, facts: Mapping[str, Any], round: int) -> Recipe:
    """The recipe in an order for ``round``. Raises WireError, naming the fields, unless it is what the client's own strategy asks."""
    try:
        recipe = Recipe.from_json(facts["recipe"])
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"an order must hold a recipe, got none that can be read ({' '.join(str(error).split())[:200]})") from None
    own, _ = asked(client, round)
    if differ := [f.name for f in fields(Recipe) if getattr(recipe, f.name) != getattr(own, f.name)]:
        says = f"an order must be what this client's own config asks, but its {', '.join(differ)} differ"
        raise WireError(f"{says}; compose both from the same overrides")
    if facts.get("scored") is not scores_own(client.config, round):
        raise WireError(f"an order must ask for the own model's score as the config does, got {str(facts.get('scored'))[:40]}")
    return recipe


def asked(client: Client, round: int) -> tuple[Recipe, Adapter]:
    """The recipe and the adapter that the client's own strategy would give it in ``round``, if nobody had trained yet."""
    strategy = strategy_of(client.config)
    return orders(strategy, client.config, strategy.init(client.bench.start), round, info(client))


def shaped(client: Client, shapes: Mapping[str, tuple[int, ...]], kind: str, round: int) -> None:
    """Raise WireError unless a message has the names and shapes of what the client's own strategy would send it.

    To be asked before anything is decoded.
    """
    fitting(shapes, client.bench.start)
    strategy = strategy_of(client.config)
    given = asked(client, round)[1] if kind == "train" else adapters.apart(strategy.view(strategy.init(client.bench.start))).own
    must = {name: tuple(tensor.shape) for name, tensor in given.items()}
    base = {name: shape for name, shape in shapes.items() if adapters.group(name) == "base"}
    for name in sorted({*must, *shapes} - set(base)):
        if shapes.get(name) != must.get(name):
            raise WireError(f"{name[:80]} must be {must.get(name, 'left out')} under this client's strategy, got {shapes.get(name, 'nothing')}")
    if base and strategy.base is None:
        raise WireError("the frozen weights must stay as they are under this client's strategy, got a change of them")
    known = base_shapes(client.bench.start)
    for name, shape in base.items():
        own = adapters.bare(name).partition(".")[2]
        if len(shape) != 2 or not any(all(w is None or s == w for s, w in zip(shape, must)) for must in known.get(own, ())):
            raise WireError(f"a change of the frozen weights must be of a module with factors and as large, got {name[:80]} {shape}")


def base_shapes(start: Adapter) -> dict[str, list[tuple[int | None, int | None]]]:
    """The shapes that a change of the base may have, by name: of each module with factors, factors of any rank, or the whole matrix.

    A side that is None may be of any length.
    """
    found: dict[str, list[tuple[int | None, int | None]]] = {}
    for module in modules(n for n in start if adapters.group(n) in ("lora_a", "lora_b")):
        a, b, dense = names(module)
        if a in start and b in start:
            wide, high = start[a].shape[1], start[b].shape[0]
            found |= {a: [(None, wide)], b: [(high, None)], dense: [(high, wide)]}
    return found


def begun(client: Client, received: Adapter) -> None:
    """Raise WireError unless round 1's message is what the client's own strategy makes of the start.

    What that leaves as all started with must be so to the bit. What it turned is known up to rounding and to what a codec
    loses of the way there, which is at most its length.
    """
    _, given = asked(client, 1)
    start = client.bench.start
    for name, tensor in given.items():
        first = start.get(adapters.bare(name)) if adapters.group(name) != "control" else torch.zeros_like(tensor)
        same = first is not None and first.shape == tensor.shape and torch.equal(first, tensor)
        far = 0.0 if first is None or first.shape != tensor.shape else float((tensor - first).norm())
        off = float((received[name] - tensor).norm())
        if off > (0.0 if same else far + ROUNDING * float(tensor.norm())):
            raise WireError(f"round 1 must begin at the start that all computed, but {name[:80]} is another")
