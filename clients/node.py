"""A machine's node whose processes are warm: Flower's SuperNode, and a ClientApp forked for each message.

    python3 -P -m clients.node --policy FILE WORDS...      the words of `flower-supernode`; the `start` of a deployment runs it

    this process ─┬─ the SuperNode, forked while nothing is imported: TLS to the coordinator, Runtime API on loopback
                  └─ a ClientApp for each message: torch, timm, Flower and the installed app are there; CUDA begins anew

What a ClientApp runs is the installed code behind the owner's policy (`clients.site`). A run's bundle is compared with it, and
never imported. After an upgrade the node has to be started again.

Flower's own node starts an interpreter for each message, which imports for seconds, and sleeps for three before it looks for
the next. Here one message at a time is worked on, so that a GPU holds one model. When one of the two lasting processes ends,
so does the other: whoever supervises `start` starts both again.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import multiprocessing
import os
import secrets
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Callable

from clients.hardening import closed, named

WARM = (
    "torch", "timm", "torchvision.transforms.v2", "hydra", "pydantic", "safetensors.torch",
    "flwr.clientapp", "flwr.supernode.runtime.run_clientapp", "clients.site",
)  # fmt: skip
LAZY = 3.0  # seconds between two looks for a task when nothing rings
PATIENCE = 10  # refusals in a row, seconds apart, before the node ends with the SuperNode's own words
GRACE = 10.0  # seconds for a process to end in; Flower's take five at most, and twice this is less than a token lasts, which is 30

fork = multiprocessing.get_context("fork").Process
log = logging.getLogger("veilora.node")


def attend(supernode: BaseProcess, bell: int, acquire: Callable[[], str], work: Callable[[str], None]) -> None:
    """Until the SuperNode ends, fork a process that does ``work(token)`` for each token that ``acquire`` gives, one at a time.

    ``bell`` is a pipe to read: with each byte in it a token may have come. A SuperNode asks for one answer at a time, so a
    token that comes while a process works means that nobody waits for this one: it has `GRACE` seconds to come to its end.
    Then it is asked to, so that Flower hears of it: of one that vanishes Flower makes up an answer a minute later, which the
    SuperNode would take for that to its newest message.
    """
    token = ""
    while supernode.sentinel not in (ready := wait([supernode.sentinel, bell], 0 if token else LAZY)):
        if bell in ready:
            os.read(bell, 65536)
        if token := token or acquire():
            child, token = fork(target=work, args=(token,)), ""
            child.start()
            ends = [child.sentinel, supernode.sentinel]
            while not (ended := wait(ends, GRACE if token else LAZY)) and not token:
                token = acquire()
            if supernode.sentinel in ended:
                return
            if not ended:  # the run of its message has ended with parts yet to come, and Flower lets it wait for hours
                log.warning("a ClientApp is ended: the SuperNode waits for the answer to another message")
                child.terminate()
                child.join(GRACE)
                child.kill()
            child.join()
            if ended and child.exitcode:
                log.error("a ClientApp's process ended with %s; the server is told when its heartbeat is missed", child.exitcode)


def acquirer(address: str, secret: bytes) -> Callable[[], str]:
    """What asks the SuperNode at ``address`` for a ClientApp's token, and gives "" where none waits or it is not up.

    Raises httpx.HTTPStatusError when the SuperNode has refused to say ten times in a row.
    """
    import httpx
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.constant import TaskType
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient

    signed = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={"/flwr.proto.Runtime/AcquireTask"})
    client = RuntimeHttpClient.from_server_address(address, True, None, [RuntimeVersionHttpInterceptor("SuperExec"), signed])
    failures = 0

    def acquire() -> str:
        nonlocal failures
        try:
            token = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])).token
            failures = 0
            return token
        except httpx.TransportError:
            return ""
        except httpx.HTTPError as error:  # once is no reason to end what may be at work on a message
            if (failures := failures + 1) == PATIENCE:
                raise
            log.warning("the SuperNode gave no task: %s", error)
            return ""

    return acquire


def client_app(address: str, parent: int, token: str) -> None:
    """Flower's own work on one message, with the guarded app that `prepare` put there; it ends when the process ``parent`` does."""
    from flwr.supernode.runtime.run_clientapp import run_clientapp

    named("flwr-clientapp")
    gc.freeze()  # a collection would copy the pages that are shared with the process this was forked from
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which Flower goes back to after a first: a second cut its way out short
    run_clientapp(address, token, insecure=True, parent_pid=parent, runtime_dependency_install=False)


def prepare(policy: Path | None) -> None:
    """Import what a ClientApp needs, and put the policy's guard where Flower would import a bundle. Raises FlowerError."""
    for name in WARM:
        importlib.import_module(name)
    from clients import flower, judgement, site
    from fl import provenance

    judgement.prepare()
    flower.take_over(sys.modules["flwr.supernode.runtime.run_clientapp"], partial(site.guarded, where=policy))
    print(f"node: installed code {provenance.code_sha256()}, policy {policy or 'strict, since none is given'}", flush=True)


def supernode(words: list[str], parent: int, secret: bytes, bell: int) -> None:
    """Flower's own SuperNode, which gives a task to who has the ``secret`` alone, and ends when the process ``parent`` does.

    The secret keeps other users of the machine out. A ClientApp is a fork of the process that has it, and of the same user.
    """
    from flwr.supercore.app_utils import start_parent_process_monitor
    from flwr.supernode.cli.flower_supernode import flower_supernode

    from clients import flower

    named("flower-supernode")
    read, write = os.pipe()
    os.write(write, secret), os.close(write)
    sys.argv = ["flower-supernode", *words, "--isolation", "process", "--superexec-auth-secret-file", f"/dev/fd/{read}"]
    start_parent_process_monitor(parent)
    loop = importlib.import_module("flwr.supernode.start_client_internal")
    flower.unopened(loop)
    hasten(loop, lambda: os.write(bell, b"."))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as above
    flower_supernode()


def hasten(loop: ModuleType, ring: Callable[[], object]) -> None:
    """Let the ``loop`` of the SuperNode sleep by `pause`, and ``ring`` while it waits for the answer to a message.

    Flower has no setting for its sleeps of 3 s (for a message) and 0.5 s (for an answer), so the module is given a `time` of
    ours. Where it has another shape than the known one it keeps its own sleeps, and the log says so.
    """
    from fl.wire.backoff import sooner  # not above: the SuperNode is forked while nothing is imported

    if getattr(loop, "time", None) is not time:
        log.warning("the loop of flwr's SuperNode is not the known one: it keeps its own sleeps, seconds for each message")
        return
    asked, since = 0.0, 0.0

    def sleep(seconds: float) -> None:
        nonlocal asked, since
        if seconds != asked:
            asked, since = seconds, time.monotonic()
        if seconds < 1:
            with suppress(BlockingIOError):  # nobody has listened for long, and there is ringing enough
                ring()
        time.sleep(pause(seconds, time.monotonic() - since))

    loop.time = SimpleNamespace(**vars(time) | {"sleep": sleep})
    sooner(loop)


def pause(most: float, waited: float) -> float:
    """Seconds to sleep after ``waited`` seconds of waiting: a thirtieth of ``most``, then a twentieth of the wait, up to ``most``."""
    return min(most, max(most / 30, waited / 20))


def main(words: list[str]) -> int:
    """The node, until its SuperNode ends or SIGTERM or SIGINT comes. Returns the SuperNode's exit status."""
    closed()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", default="9094")
    at, _ = parser.parse_known_args(words)
    owner = argparse.ArgumentParser(prog="python3 -m clients.node", add_help=False, allow_abbrev=False)
    owner.add_argument("--policy", type=Path, help="policy.toml; without one the strict policy is in force")
    owners, words = owner.parse_known_args(words)
    address, own, secret = f"{at.host}:{at.port}", os.getpid(), secrets.token_bytes(32)
    listens, rings = os.pipe()
    os.set_blocking(rings, False)
    for end in (signal.SIGTERM, signal.SIGINT):
        signal.signal(end, lambda *_: sys.exit(0))
    node = fork(target=supernode, args=(words, own, secret, rings))
    node.start()
    try:
        prepare(owners.policy)
        attend(node, listens, acquirer(address, secret), partial(client_app, address, own))
    finally:
        ending = multiprocessing.active_children()
        for process in ending:
            process.terminate()
        for process in ending:
            process.join(GRACE)
            process.kill()
        node.join()
    return node.exitcode or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
