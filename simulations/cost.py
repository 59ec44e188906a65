"""What one message costs: each method's adapter, serialised as Flower sends it, beside the full model's.

    python -m simulations.cost  [model=vit_base ...]        random weights will do; nothing is trained or downloaded

Upload and download of a round are messages of the same tensors; the ratio is to the method `full` on the same model.
"""

from __future__ import annotations

import shlex
import sys
from typing import NamedTuple

from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from fl import adapter as adapters
from fl.config import Config, ConfigError, build, load
from fl.wire.flat import pack
from fl.wire.float32 import float32
from fl.wire.ledger import Entry, entry
from fl.wire.records import serialised_bytes, to_content

METHODS = ("linear", "melo", "lora_patch", "lora_sb", "ravan", "full")


class Cost(NamedTuple):
    """One method's message: trained parameters and its ledger entry."""

    method: str
    parameters: int
    entry: Entry


def cost(config: Config, method: str, classes: int = 10) -> Cost:
    """Build ``config``'s model with random weights, put its adapter for ``method`` into a message and weigh it."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # a message wants an identity
    model = build(config.model | {"weights": "none"}, classes=classes)
    build(load(f"method={method}").method)(model, 0)
    packed = pack(adapters.read(model), float32())
    facts = {"round": 1, "recipe": config.recipe.to_json()}
    message = Message(to_content(facts, packed), dst_node_id=1, message_type="train", group_id="1")
    return Cost(method, adapters.count(adapters.read(model)), entry("train", "down", packed.header, serialised_bytes(message)))


def main(arguments: list[str]) -> int:
    """The command: a Markdown table on the screen."""
    try:
        config = load(shlex.join(arguments or ["model=vit_base"]))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    costs = [cost(config, method) for method in METHODS]
    full = costs[-1].entry.total
    print(f"{config.model.get('name', 'demo')}, 10 classes, float32\n")
    print("| method | parameters | bytes a message | of full | by group |\n|---|---|---|---|---|")
    for c in costs:
        parts = ", ".join(f"{name} {size:,}" for name, size in c.entry.sizes.items())
        print(f"| {c.method} | {c.parameters:,} | {c.entry.total:,} | {c.entry.total / full:.3%} | {parts} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
