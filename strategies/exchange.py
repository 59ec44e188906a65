"""Questions out, answers back, over any Grid: in the order of the questions, each as soon as its turn has come.

Flower's own ``send_and_receive`` sleeps three seconds between looks and gives all the answers at the end. Here a client that
fails, is silent or is not there costs the others nothing but the wait: its answer is the reason why there is none.
"""

from __future__ import annotations

import re
import sys
import time
from typing import Callable, Iterator, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from fl.journal import Journal
from fl.wire.flat import WireError
from fl.wire.records import facts_of
from strategies.gate import Refused
from strategies.talk import RunFailed

POLL = 0.05  # seconds between looks for replies; the longer nothing comes, the longer, up to
LAZY = 0.5
DEAD = re.compile(r"ActorDied|ActorUnavailable|RayActorError|WorkerCrashed|The actor (is dead|died)|OutOfMemoryError: Task was killed")


def exchange(
    grid: Grid, seconds: float, messages: list[Message], client: Mapping[int, int], journal: Journal | None = None, doing: str = ""
) -> Iterator[Message | Refused]:
    """Send, and give out for each message, in their order and each as soon as its turn has come, the reply or why there is none.

    ``client`` numbers the node ids that are known by a number. Who has not answered when ``seconds`` pass without any answer is
    silent. Raises RunFailed when a worker of the engine has died: it would not be started again, and whose turn it is would
    fail from then on.
    """

    def refused(node: int, code: str, reason: str) -> Refused:
        return Refused(client.get(node), code, reason, "" if node in client else f"node {node}")

    taken = {str(i) for i in grid.push_messages(messages) if i}
    turns = [(str(m.metadata.message_id), m.metadata.dst_node_id) for m in messages]
    waiting = {name: node for name, node in turns if name in taken}
    early: dict[str, Message | Refused] = {
        name: refused(node, "lost", "the engine must take every message, but refused this one (too large, or the node has left)")
        for name, node in turns if name not in waiting
    }  # fmt: skip
    deadline = time.monotonic() + seconds
    for name, node in turns:
        while name not in early:
            came = list(grid.pull_messages(waiting.keys()))
            answers = {q: r for r in came if (q := str(r.metadata.reply_to_message_id)) in waiting and _meant(r, waiting[q])}
            early |= {question: _judged(reply, waiting.pop(question), refused) for question, reply in answers.items()}
            if answers:
                deadline = time.monotonic() + seconds  # clients of one worker take turns: what must end is silence
                if journal:
                    journal.progress(f"{doing}: {len(messages) - len(waiting)} of {len(messages)} clients")
            if time.monotonic() > deadline:
                says = f"it did not answer within {seconds:.0f} s; look at its log, or raise wait and timeout"
                early |= {late: refused(node, "silent", says) for late, node in waiting.items()}
                waiting.clear()
            elif name not in early:
                waited = time.monotonic() + seconds - deadline
                time.sleep(0 if answers else min(LAZY, max(POLL, waited / 20)))  # a look over HTTP costs the SuperLink some milliseconds
        yield early.pop(name)
        deadline = max(deadline, time.monotonic() + seconds)  # who takes the answers may have been long: a client was behind, say


def _meant(reply: Message, node: int) -> bool:
    """Whether a reply answers for ``node``: its own does, and an error of the engine, which comes under the engine's own name."""
    return reply.metadata.src_node_id == node or reply.has_error()


def _judged(reply: Message, node: int, refused: Callable[[int, str, str], Refused]) -> Message | Refused:
    """The reply itself, unless it is an error."""
    if reply.has_error() and reply.metadata.src_node_id != node:
        return refused(node, "lost", f"the engine has no answer of it: {_last_line(reply.error.reason)}")
    if reply.has_error():
        reason = reply.error.reason or ""
        if "ray" in sys.modules and DEAD.search(reason):  # in a deployment that would be a node's own word
            whose = str(refused(node, "lost", "")).rstrip(": ")
            raise RunFailed(f"a worker of the engine died at the work of {whose}, and those left would fail in turn; resume the run")
        return refused(node, "client_error", f"it failed: {_last_line(reason)}")
    try:
        facts = facts_of(reply)
    except WireError as error:
        return refused(node, "schema", str(error))
    if "error" in facts:
        reason = refused(node, "client_error", str(facts["error"]))
        return Refused(facts["client"], reason.code, reason.reason) if reason.client is None and isinstance(facts.get("client"), int) else reason
    return reply


def _last_line(reason: str) -> str:
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason given"
