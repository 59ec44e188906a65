"""Questions out, answers back, over any Grid: in the order of the questions, each as soon as its turn has come.

Flower's own ``send_and_receive`` sleeps three seconds between looks and gives all the answers at the end.
"""

from __future__ import annotations

import time
from typing import Iterator, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from fl.journal import Journal
from fl.wire.flat import WireError
from fl.wire.records import facts_of

POLL = 0.05  # seconds between looks for replies


class RunFailed(RuntimeError):
    """A run that cannot go on; the message names the client and its reason."""


def exchange(
    grid: Grid, seconds: float, messages: list[Message], client: Mapping[int, int], journal: Journal | None = None, doing: str = ""
) -> Iterator[Message]:
    """Send, and give out one reply for each message in the order of the messages, each as soon as its turn has come.

    ``client`` numbers the node ids that are known by a number. Raises RunFailed, naming who, when a message could not be
    sent, when a reply is an error, and when ``seconds`` pass without any.
    """

    def name(node: int) -> str:
        return f"client {client[node]}" if node in client else f"node {node}"

    sent = list(grid.push_messages(messages))
    if len(sent) != len(messages) or not all(sent):
        raise RunFailed("the engine must take every message, but refused some (too large, or the node has left)")
    waiting = {str(i): m.metadata.dst_node_id for i, m in zip(sent, messages)}
    turns, early = iter([str(i) for i in sent]), {}
    turn, deadline = next(turns, None), time.monotonic() + seconds
    while turn is not None:
        came = list(grid.pull_messages(waiting.keys())) if waiting else []
        for reply in came:
            question = str(reply.metadata.reply_to_message_id)
            if waiting.get(question) != reply.metadata.src_node_id:
                continue  # an answer that was there already, or from a node that was not asked
            del waiting[question]
            _check(reply, name(reply.metadata.src_node_id))
            early[question] = reply
        if came:
            deadline = time.monotonic() + seconds  # clients of one worker take turns: what must end is silence
        if journal and came:
            journal.progress(f"{doing}: {len(messages) - len(waiting)} of {len(messages)} clients")
        if waiting and time.monotonic() > deadline:
            late = ", ".join(sorted(name(node) for node in waiting.values()))
            raise RunFailed(f"{late} did not answer within {seconds:.0f} s; look at its log, or raise wait and timeout")
        if turn not in early:
            time.sleep(0 if came else POLL)
        while turn in early:
            yield early.pop(turn)
            turn = next(turns, None)
            deadline = time.monotonic() + seconds  # who takes the answers may have been long: a client was behind, say


def _check(reply: Message, name: str) -> None:
    if reply.has_error():
        raise RunFailed(f"{name} failed: {_last_line(reply.error.reason)}")
    try:
        facts = facts_of(reply)
    except WireError as error:
        raise RunFailed(f"{name}: {error}") from None
    if "error" in facts:
        raise RunFailed(f"{name if facts.get('client') is None else 'client ' + str(facts['client'])}: {facts['error']}")


def _last_line(reason: str) -> str:
    lines = [line.strip() for line in (reason or "no reason given").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason given"
