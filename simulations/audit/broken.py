"""What can be wrong with a client's answer, each fault said once, and a grid on which one client has it."""

from __future__ import annotations

from collections import deque
from typing import Callable, NamedTuple

import numpy as np
from flwr.app import Message
from flwr.clientapp import ClientApp

from simulations.inprocess import InProcessGrid

HONEST, BAD, ROUNDS, EXAMPLES = 6, 6, 3, 100
START = {"head.weight": np.zeros((2, 3), np.float32), "blocks.0.attn.qkv.q.lora_a.weight": np.ones((4, 8), np.float32)}
STEP = 0.01

Arrays = dict[str, np.ndarray]


class Fault(NamedTuple):
    """What the bad client sends in the place of honest ``arrays`` (a difference) and ``examples``; ``replies`` what becomes of its reply."""

    name: str
    arrays: Callable[[Arrays], Arrays] = lambda arrays: arrays
    examples: float | list = EXAMPLES
    replies: str = "one"  # one | none | first, and none after it | old, the first again and again | twice | error | nobody's in round 2


def spoil(**change) -> Callable[[Arrays], Arrays]:
    """Put other values into the head, or other arrays beside it."""
    return lambda arrays: arrays | {n.replace("head", "head.weight"): f(arrays["head.weight"]) for n, f in change.items()}


def cell(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """One cell of an array replaced."""
    return lambda a: np.where(np.arange(a.size).reshape(a.shape) == 1, np.float32(value), a)


FAULTS = (
    Fault("one NaN", spoil(head=cell(np.nan))),
    Fault("one infinity", spoil(head=cell(np.inf))),
    Fault("wrong shape", spoil(head=lambda a: np.zeros((3, 3), np.float32))),
    Fault("shape that broadcasts, (1, 1)", spoil(head=lambda a: np.full((1, 1), 7, np.float32))),
    Fault("float64 in the place of float32", spoil(head=lambda a: a.astype(np.float64))),
    Fault("an extra array", spoil(extra=lambda a: a)),
    Fault("a missing array", lambda arrays: {n: a for n, a in arrays.items() if n != "head.weight"}),
    Fault("update a million times too long", lambda arrays: {n: a * np.float32(1e6) for n, a in arrays.items()}),
    Fault("weight 1e15", examples=10**15),
    Fault("weight 0", examples=0),
    Fault("weight -500", examples=-500),
    Fault("weight NaN", examples=float("nan")),
    Fault("zero update", lambda arrays: {n: 0 * a for n, a in arrays.items()}),
    Fault("it raises an exception", replies="error"),
    Fault("it is silent", replies="none"),
    Fault("its reply comes twice", replies="twice"),
    Fault("its reply of round 1, again and again", replies="old"),
    Fault("all are silent in round 2", replies="nobody's"),
)


class Faulty(InProcessGrid):
    """The grid of a fault: what becomes of the bad client's replies to training."""

    first: Message | None = None
    asked = 0

    def __init__(self, app: ClientApp, clients: int, fault: Fault | None) -> None:
        super().__init__(app, clients, {})
        self.fault = fault or Fault("none")

    def push_messages(self, messages):
        names = super().push_messages(messages)
        self.asked += any(m.metadata.message_type == "train" for m in self._waiting)
        self._waiting = deque(m for m in self._waiting if not (m.metadata.message_type == "train" and self._silent(m.metadata.dst_node_id - 1000)))
        return names

    def _silent(self, client: int) -> bool:
        mute = {"none": True, "first": self.asked > 1, "nobody's": self.asked == 2}.get(self.fault.replies, False)
        return mute and (client == BAD or self.fault.replies == "nobody's")

    def _work(self, message: Message) -> Message:
        reply = super()._work(message)
        if self.fault.replies != "old" or message.metadata.message_type != "train" or message.metadata.dst_node_id - 1000 != BAD:
            return reply
        self.first = self.first or reply
        return Message(self.first.content, reply_to=message)

    def pull_messages(self, ids):
        twice = self.fault.replies == "twice"
        return [r for r in super().pull_messages(ids) for _ in range(1 + (twice and r.metadata.src_node_id == 1000 + BAD))]

    def send_and_receive(self, messages, *, timeout=None):
        return [reply for name in self.push_messages(messages) for reply in self.pull_messages([name])]


def difference(client: int, fault: Fault | None) -> tuple[Arrays, float]:
    """What a client found: its arrays and its weight."""
    arrays = {name: np.full_like(a, STEP * client) for name, a in START.items()}
    return (fault.arrays(arrays), fault.examples) if fault and client == BAD else (arrays, EXAMPLES)
