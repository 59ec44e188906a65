"""Flower's Grid in this process: the very ClientApp and ServerApp of `flwr run`, with neither Ray nor a daemon.

Clients run one after another in the order of their partitions, so a run is deterministic and a thousand virtual clients
cost no more than their work. For laptops, tests and CI.
"""

from __future__ import annotations

import atexit
import gc
import itertools
import traceback
from collections import deque
from collections.abc import Set
from functools import lru_cache
from typing import Iterable

from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity  # Message() wants an identity; only the engines set one

from clients import client_app
from strategies import server_app


class InProcessGrid(Grid):
    """A Grid whose nodes are contexts in a dictionary; an exception in a client becomes an error reply, as elsewhere."""

    def __init__(self, app: ClientApp, nodes: int, run_config: dict, node_config: dict[int, dict] | None = None) -> None:
        _spare_the_collector()
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        self._app, self._ids, self._waiting = app, itertools.count(1), deque()
        self._run = Run.create_empty(run_id=1)
        self._contexts = {
            1000 + i: Context(
                run_id=1,
                node_id=1000 + i,
                node_config={"partition-id": i, "num-partitions": nodes} | (node_config or {}).get(i, {}),
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for i in range(nodes)
        }

    @property
    def run(self) -> Run:
        """The run, which is always number 1."""
        return self._run

    def set_run(self, run: Run) -> None:
        """Take another run's description."""
        self._run = run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes, at once."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take the messages; returns the ids to pull the replies by."""
        names = []
        for message in messages:
            names.append(f"m{next(self._ids)}")
            message.metadata.__dict__["_message_id"] = names[-1]
            self._waiting.append(message)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Do the work of the first of these messages and return its reply: however many clients, one reply is in memory."""
        wanted = message_ids if isinstance(message_ids, Set) else set(message_ids)
        for place, message in enumerate(self._waiting):  # the first, as a rule: a deque forgets it at no cost, a dict does not
            if message.metadata.message_id in wanted:
                del self._waiting[place]
                return [self._work(message)]
        return []

    def _work(self, message: Message) -> Message:
        try:
            return self._app(message=message, context=self._contexts[message.metadata.dst_node_id])
        except Exception as error:
            return Message(Error(code=2, reason=f"{traceback.format_exc()}\n{error}"), reply_to=message)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, then pull until all have answered."""
        return [reply for name in self.push_messages(messages) for reply in self.pull_messages([name])]


@lru_cache(maxsize=1)
def _spare_the_collector() -> None:
    """Let Python's garbage collector pass over what is there by now, once in a process.

    The libraries are a million objects that stay; walking them whenever many messages are in memory makes a client of ten
    thousand cost twice what one of a hundred does.
    """
    gc.freeze()
    atexit.register(gc.unfreeze)  # the interpreter's end is to find everything, or libraries complain of leaks


def run(server: ServerApp, client: ClientApp, nodes: int, overrides: str, node_config: dict[int, dict] | None = None) -> None:
    """Run both apps with ``nodes`` clients, as `flwr run` would with ``overrides``; what the server raises comes through."""
    run_config = {"overrides": overrides}
    grid = InProcessGrid(client, nodes, run_config, node_config)
    server(grid=grid, context=Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=run_config))


def run_apps(nodes: int, overrides: str) -> int:
    """The project's own apps with ``nodes`` clients. Returns the exit status; what went wrong has been printed."""
    try:
        run(server_app.app, client_app.app, nodes, overrides)
    except Exception as error:  # the ServerApp has said it
        return server_app.status_of(error) or 4
    return 0
