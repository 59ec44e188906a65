"""What one message costs, serialised as Flower sends it, beside the full model's: each method, each codec, and blind.

    python -m simulations.cost  [model=vit_base ...]        random weights will do; nothing is trained or downloaded

An update goes up and, once a client has something to take the difference from, its like comes down: both cost the same.
What a client is sent first is whole, in float32; a blind one is sent nothing before round 2.
"""

from __future__ import annotations

import shlex
import sys
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from fl import adapter as adapters
from fl.config import Config, ConfigError, build, load
from fl.randomness import generator
from fl.wire import sealed
from fl.wire.coding import coding
from fl.wire.flat import Packed, pack
from fl.wire.ledger import Entry, entry
from fl.wire.octets import octets
from fl.wire.records import serialised_bytes, to_content

MARK = {"run": "demo-20260101-000000-000000-s0", "config": "0123456789abcdef", "round": 1}  # what each message says it is of
METHODS = ("linear", "melo", "lora_patch", "lora_sb", "ravan", "full")
LOW_RANK = "+codec@codecs.patch_embed=low_rank"
ROADS = (  # method and overrides of the wire
    ("lora_patch", "codec=float32"), ("lora_patch", "codec=bfloat16"), ("lora_patch", "codec=int8"), ("lora_patch", "codec=int4"),
    ("lora_patch", f"codec=int8 {LOW_RANK}"), ("lora_patch", "codec=int4_low_rank"),
    ("melo", "codec=float32"), ("melo", "codec=int8"), ("melo", "codec=int4"),
    ("lora_patch", "blind=true"), ("lora_patch", "blind=true seal.bits=16"), ("lora_patch", "blind=true seal.bits=12"),
    ("melo", "blind=true"), ("melo", "blind=true seal.bits=12"),
)  # fmt: skip


class Cost(NamedTuple):
    """Trained parameters, and the ledger entry of a message."""

    parameters: int
    entry: Entry


def cost(config: Config, method: str, road: str = "codec=float32", classes: int = 10) -> Cost:
    """An update of ``config``'s model under ``method``, on the road that the overrides ``road`` describe, weighed.

    The model has random weights and the update random values; of a blind run it is the sum of ten clients that is weighed,
    which is what goes down, and larger than what goes up by their list.
    """
    model = build(config.model | {"weights": "none"}, classes=classes)
    build(load(f"method={method}").method)(model, 0)
    update = {n: torch.randn(t.shape, generator=generator(0, n)) for n, t in adapters.read(model).items()}
    way = load(road)
    if not way.blind:
        return Cost(adapters.count(update), weighed(pack(update, coding(way).differences, generator(0)), {"recipe": config.recipe.to_json()}))
    size, bits = adapters.count(update), way.seal.bits
    total = sealed.Total(tuple((k, bytes(sealed.NONCE)) for k in range(10)), np.zeros(sealed.size(size, bits), np.uint8), 10 * (bytes(sealed.ECHO),))
    facts = {"round": 2, "since": 1, "upto": 1}
    return Cost(size, weighed(pack(sealed.named("00001", total), octets()), facts))


def weighed(packed: Packed, facts: dict[str, Any]) -> Entry:
    """The ledger entry of a message with this adapter."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # a message wants an identity
    message = Message(to_content({**MARK, **facts}, packed), dst_node_id=1, message_type="train", group_id="1")
    return entry("train", "down", packed.header, serialised_bytes(message))


def line(name: str, found: Cost, full: int) -> str:
    """A row of the table."""
    parts = ", ".join(f"{group} {size:,}" for group, size in found.entry.sizes.items())
    return f"| {name} | {found.parameters:,} | {found.entry.total:,} | {found.entry.total / full:.3%} | {parts} |"


def main(arguments: list[str]) -> int:
    """The command: two Markdown tables on the screen."""
    try:
        config = load(shlex.join(arguments or ["model=vit_base"]))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    costs = {method: cost(config, method) for method in METHODS}
    full = costs["full"].entry.total
    print(f"{config.model.get('name', 'demo')}, 10 classes\n")
    print("| method, float32 | parameters | bytes a message | of full | by group |\n|---|---|---|---|---|")
    print("\n".join(line(method, found, full) for method, found in costs.items()))
    print("\n| method and road | parameters | bytes a message | of full | by group |\n|---|---|---|---|---|")
    for method, road in ROADS:
        print(line(f"{method} {road}", cost(config, method, road), full))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
