"""The warm node: a ClientApp that crashes ends alone, what is warm is no run's code, and the sleeps are short and never longer."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from flwr.supercore.runtime import RuntimeHttpClient

from clients import node
from fl.wire import backoff
from simulations import edge

ATTENDED = """
import logging, multiprocessing, os, signal, sys, time
from clients import node

logging.basicConfig(format="%(message)s", stream=sys.stdout)
told = ["one", "killed", "raises", "", "two"]

def work(token):
    if token == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    assert token != "raises"
    print(token, os.getpid() != parent, flush=True)

def acquire():
    if told:
        return told.pop(0)
    if multiprocessing.active_children() == [supernode]:
        os.kill(supernode.pid, signal.SIGTERM)
        supernode.join()
    return ""

parent, (listens, rings) = os.getpid(), os.pipe()
os.write(rings, b"......")
supernode = node.fork(target=time.sleep, args=(60,))
supernode.start()
node.LAZY = 0.01
node.attend(supernode, listens, acquire, work)
try:
    print("left", os.waitpid(-1, os.WNOHANG))
except ChildProcessError:
    print("none left", flush=True)
"""

WHOLE = """
import os, signal, sys, time
from clients import node

def say(*words):  # in one piece: two processes talk at once
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def supernode(words, parent, secret, bell):
    say("supernode", os.getpid())
    time.sleep(0.3 if "ends" in words else 60)
    sys.exit(7)

tasks = iter(["task"])
node.LAZY, node.supernode, node.acquirer = 0.01, supernode, lambda address, secret: lambda: next(tasks, "")
node.prepare = lambda policy: policy and say("policy", policy)
node.client_app = lambda address, parent, token: (say("client", address), time.sleep(60))
sys.exit(node.main(sys.argv[1:]))
"""


def python(script: str, *words: str, **more) -> subprocess.Popen:
    """A fresh interpreter, in which nobody has started a thread before it forks."""
    return subprocess.Popen([sys.executable, "-W", "error", "-c", script, *words], stdout=subprocess.PIPE, text=True, **more)


def test_a_client_app_that_crashes_ends_alone_and_none_is_left_as_a_zombie():
    with python(ATTENDED, stderr=subprocess.DEVNULL) as process:
        said = process.communicate(timeout=30)[0].splitlines()
    assert [line for line in said if not line.startswith("a ClientApp")] == ["one True", "two True", "none left"]
    assert [line.split(";")[0] for line in said if line.startswith("a ClientApp")] == [
        "a ClientApp's process ended with -9", "a ClientApp's process ended with 1",
    ]  # fmt: skip


GIVEN_UP = """
import logging, multiprocessing, os, signal, sys, time
from clients import node

logging.basicConfig(format="%(message)s", stream=sys.stdout)
told = ["waits", "deaf", "ends", "", "follows"]

def work(token):
    if token != "deaf":
        signal.signal(signal.SIGTERM, lambda *_: (print("Flower hears of", token, flush=True), os._exit(0)))
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep({"waits": 60, "deaf": 60, "ends": 0.2, "follows": 0}[token])
    print(token, "to its end", flush=True)

def acquire():
    if told:
        return told.pop(0)
    if multiprocessing.active_children() == [supernode]:
        supernode.kill()
        supernode.join()
    return ""

listens, rings = os.pipe()
supernode = node.fork(target=time.sleep, args=(60,))
supernode.start()
node.LAZY, node.GRACE = 0.01, 1.5
node.attend(supernode, listens, acquire, work)
"""


def test_a_client_app_that_nobody_waits_for_is_ended_when_the_next_message_comes_and_one_that_is_ending_is_not():
    """A power cut of the server leaves a message whose parts never come: who works on it must not keep the node for itself."""
    with python(GIVEN_UP, stderr=subprocess.DEVNULL) as process:
        said = process.communicate(timeout=30)[0].splitlines()
    ended = "a ClientApp is ended: the SuperNode waits for the answer to another message"
    assert said == [ended, "Flower hears of waits", ended, "ends to its end", "follows to its end"]


def test_a_node_ends_with_its_supernode_and_as_it_did_and_takes_the_work_along():
    with python(WHOLE, "--port", "77", "--policy", "/etc/policy.toml", "ends") as process:
        said = process.communicate(timeout=30)[0]
    assert process.returncode == 7 and "client 127.0.0.1:77" in said and "policy /etc/policy.toml" in said


def test_a_node_that_is_told_to_end_takes_the_supernode_along():
    with python(WHOLE) as process:
        said = dict(process.stdout.readline().split() for _ in range(2))  # in any order
        assert said["client"] == "127.0.0.1:9094"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(said["supernode"]), 0)


def test_a_client_app_that_will_not_end_is_killed():
    deaf = WHOLE.replace("say(\"client\", address)", "signal.signal(signal.SIGTERM, signal.SIG_IGN), print('deaf', flush=True)")
    with python(deaf.replace("node.LAZY", "node.GRACE, node.LAZY").replace("= 0.01", "= 0.1, 0.01"), "ends") as process:
        said = process.communicate(timeout=30)[0]
    assert process.returncode == 7 and "deaf" in said


@pytest.mark.slow
def test_what_is_warm_has_no_thread_and_leaves_cuda_alone():
    script = """
import importlib, os, sys, threading, torch
asked = []
for name in ("is_available", "device_count", "_lazy_init"):
    setattr(torch.cuda, name, lambda *a, n=name: asked.append(n))
from clients.node import prepare
prepare(None)
print(asked, torch.cuda.is_initialized(), threading.active_count(), flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[1:] == ["[] False 1"] and "policy strict" in done.stdout, done.stderr


@pytest.mark.slow
def test_the_policys_judgement_reads_no_file_for_each_message():
    script = """
from pathlib import Path
from clients.node import prepare
prepare(None)
def read_text(path, *_, **__): raise SystemExit(f"read {path.name}")
Path.read_text = read_text
from clients.judgement import judge
from clients.policy import Policy
print(judge(Policy(), "blind=true strategy=fedadam method=melo seed=7").seed, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[1:] == ["7"], done.stdout + done.stderr


def test_a_refusal_is_said_and_borne_and_ten_in_a_row_end_the_node(monkeypatch, caplog):
    answers = [500, 200, *[401] * 10]

    def acquire_task(request):
        request = httpx.Request("POST", "http://127.0.0.1/v1/runtime/acquire-task")
        httpx.Response(answers.pop(0), request=request).raise_for_status()
        return SimpleNamespace(token="t")

    client = SimpleNamespace(AcquireTask=acquire_task)
    monkeypatch.setattr(RuntimeHttpClient, "from_server_address", lambda *words: client)
    acquire = node.acquirer("127.0.0.1:1", b"0" * 32)
    assert [acquire() for _ in range(11)] == ["", "t", *[""] * 9] and "500" in caplog.text
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        acquire()


@pytest.mark.parametrize("most, waited, seconds", [(3, 0, 0.1), (3, 2, 0.1), (3, 20, 1), (3, 60, 3), (3, 900, 3), (0.6, 0, 0.02), (0.6, 6, 0.3)])
def test_a_pause_is_short_at_first_and_never_longer_than_asked(most, waited, seconds):
    assert node.pause(most, waited) == pytest.approx(seconds)


def test_the_supernodes_loop_sleeps_less_and_rings_while_it_waits_for_an_answer(monkeypatch):
    slept, now, rung = [], [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: (slept.append(seconds), now.__setitem__(0, now[0] + seconds)))
    loop = SimpleNamespace(time=time)
    node.hasten(loop, lambda: rung.append(now[0]))
    for seconds in (3, 3, 0.5, 0.5, 3):
        loop.time.sleep(seconds)
    assert slept == pytest.approx([0.1, 0.1, 0.5 / 30, 0.5 / 30, 0.1]) and len(rung) == 2 and loop.time.perf_counter is time.perf_counter
    now[0] += 3600
    loop.time.sleep(3)
    assert slept[-1] == 3


def test_a_bell_that_is_full_stops_nobody():
    read, write = os.pipe()
    os.set_blocking(write, False)
    loop = SimpleNamespace(time=time)
    node.hasten(loop, lambda: os.write(write, bytes(65536)))
    for _ in range(3):
        loop.time.sleep(0.01)
    os.close(read), os.close(write)


def test_a_loop_of_another_shape_keeps_its_sleeps_and_the_log_says_so(caplog):
    loop = SimpleNamespace(sleep=time.sleep)
    with caplog.at_level(logging.WARNING):
        node.hasten(loop, lambda: None)
    assert vars(loop) == {"sleep": time.sleep} and "keeps its own sleeps" in caplog.text


def test_flowers_own_modules_have_the_shape_that_is_known():
    from flwr.superlink.grid import http_grid
    from flwr.supernode import start_client_internal as loop

    assert loop.time is time and "time.sleep(3)" in Path(loop.__file__).read_text()
    assert all(backoff.sooner(copy := SimpleNamespace(**vars(m))) is None and copy.pull_objects is not m.pull_objects for m in (loop, http_grid))


def test_a_part_that_is_still_on_its_way_is_asked_for_again_at_once():
    from flwr.supercore.inflatable import inflatable_utils

    copy, asked = SimpleNamespace(pull_objects=inflatable_utils.pull_objects), []

    def pull(name: str) -> bytes:
        asked.append(name)
        if len(asked) == 1:
            raise inflatable_utils.ObjectUnavailableError(name)
        return b"part"

    backoff.sooner(copy), backoff.sooner(copy)
    began = time.monotonic()
    assert copy.pull_objects(["a"], pull) == {"a": b"part"} and len(asked) == 2 and time.monotonic() - began < 0.5


def test_a_module_without_such_a_function_stays_as_it_is():
    for known in ({}, {"pull_objects": len}):
        module = SimpleNamespace(**known)
        backoff.sooner(module)
        assert vars(module) == known


def test_what_a_round_costs_beyond_its_slowest_clients_training_is_told(tmp_path):
    rows = [(1.5, [0.5, 1.0]), (3.0, [1.0, 0.25]), (9.0, [2.0])]
    lines = [json.dumps({"seconds": s, "clients": [{"seconds": c} for c in clients]}) for s, clients in rows]
    (tmp_path / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    assert edge.pace(tmp_path) == "a round took 3.00 s, 2.00 s more than its slowest client's training"
    (tmp_path / "rounds.jsonl").write_text(json.dumps({"seconds": 2.0, "clients": []}) + "\n")
    assert edge.pace(tmp_path) == "a round took 2.00 s", "a blind server hears of no client's training"
