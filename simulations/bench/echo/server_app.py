"""The server that sends one payload to every client and waits for its echoes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Write the wall seconds of each round to the file ``report``."""
    settings = context.run_config
    while len(list(grid.get_node_ids())) < settings["clients"]:
        time.sleep(0.1)
    seconds = [once(grid, settings["values"]) for _ in range(settings["rounds"])]
    Path(settings["report"]).write_text(json.dumps(seconds))


def once(grid: Grid, values: int) -> float:
    """Wall seconds of one round with a flat payload of ``values`` float32."""
    began = time.monotonic()
    payload = ArrayRecord({"flat": Array(np.zeros(values, np.float32))})
    content = RecordDict({"adapter": payload})
    messages = [Message(content, dst_node_id=n, message_type="train", group_id="1") for n in grid.get_node_ids()]
    waiting = set(grid.push_messages(messages))
    while waiting:
        replies = list(grid.pull_messages(waiting))
        for reply in replies:
            if reply.has_error():
                raise RuntimeError(reply.error.reason)
            waiting.discard(reply.metadata.reply_to_message_id)
        if not replies:
            time.sleep(0.01)
    return time.monotonic() - began
