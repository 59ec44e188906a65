"""A real deployment on loopback: SuperLink, proxy and SuperNodes, from the very files that `veilora deploy init` writes.

    python -m simulations.edge --nodes 3 rounds=3 data.train=400        Hydra overrides, as `flwr run` takes them
    python -m simulations.edge --users blind=true rounds=3              each role a user of its own, as on machines of their own

TLS and node authentication as on real machines; where there is an nginx, nodes come in through it. Every engine runs in a
process group with a FLWR_HOME and a folder of its own, nothing leaves 127.0.0.1, and every process goes when the command ends.
The folder, which holds an image key and a seal key of its own, stays.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Iterator

from clients.kit import KitError, deploy
from clients.policy import PLACES
from fl import keys
from fl.config import ConfigError, load
from simulations import processes, users
from simulations.deployment import Site, nginx
from simulations.launch import EngineError


@contextmanager
def edge(
    folder: Path, nodes: int, proxied: bool | None = None, database: bool = False, up: bool = True, apart: bool = False, secure: bool = False
) -> Iterator[Site]:
    """A deployment of ``nodes`` nodes in the new ``folder``, all of it up when the block begins, gone when it ends.

    ``proxied``: nodes come in through nginx; by default where there is one. ``database``: the SuperLink keeps registrations
    and runs in a file, so that it can be killed and started. ``up=False`` leaves starting and registering to the block.
    ``apart``: coordinator, proxy and each node are users of their own. ``secure``: the nodes' policies demand blind runs.
    Raises EngineError and KitError.
    """
    proxied = nginx() is not None if proxied is None else proxied
    if proxied and nginx() is None:
        raise EngineError("a proxy needs nginx on PATH; install it, or go without")
    if apart and (lacks := users.lacking()):
        raise EngineError(f"roles can be users of their own where root may make them, but {lacks}; go without --users")
    folder = folder.resolve()
    superlink, port, node_port, *_ = processes.free_ports(3 + max(0, nodes))
    plan = deploy.Plan(
        "127.0.0.1", nodes, port if proxied else superlink, superlink, home=str(folder / "deployment"), var=str(folder / "var"),
        key=str(folder / "key"), listen="127.0.0.1", database=database, node_port=node_port, secure=secure,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    deploy.init(folder / "deployment", plan)
    site = Site(folder, plan, proxied, apart)
    site.settle()
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
    """How long the rounds of a run were, and where the server knows it how much of that was not their slowest client's training.

    Both are medians.
    """
    rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    took = f"a round took {median(row['seconds'] for row in rows):.2f} s"
    beyond = [row["seconds"] - max(client["seconds"] for client in row["clients"]) for row in rows if row["clients"]]
    return took + (f", {median(beyond):.2f} s more than its slowest client's training" if beyond else "")


def main(arguments: list[str]) -> int:
    """The command. Returns 0 when the run completed, 2 for a bad override, 4 when the run failed or an engine did not start."""
    parser = argparse.ArgumentParser(prog="python -m simulations.edge", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--nodes", type=int, default=3, help="SuperNodes (default 3)")
    parser.add_argument("--folder", type=Path, help="a new folder for all of it, kept; by default a temporary one")
    parser.add_argument("--proxy", action=argparse.BooleanOptionalAction, default=None, help="nodes come in through nginx; by default where there is one")
    parser.add_argument("--database", action="store_true", help="the SuperLink keeps its state in a file")
    parser.add_argument("--users", action="store_true", help="coordinator, proxy and nodes are users of their own; needs root")
    options, overrides = parser.parse_known_args(arguments)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="veilora-edge-"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the engines are taken down, too
    try:
        config = load(shlex.join(overrides))  # a slip of the pen is not worth an engine
        if taken := [word for word in overrides if word.split("=")[0] in {*PLACES, "clients"} - {"model.weights"}]:
            raise ConfigError(f"a site has places and nodes of its own, got {taken[0]}; see --folder and --nodes")
        if options.users and (lacks := users.lacking()):
            print(f"all roles run as one user: {lacks}", file=sys.stderr)
            options.users = False
        with edge(folder, options.nodes, options.proxy, options.database, apart=options.users, secure=config.blind) as site:
            came = "through nginx" if site.proxied else "straight to the SuperLink"
            came += f", as users {users.FIRST} to {site.user(f'node-{options.nodes - 1}')}" if site.apart else ""
            print(f"{options.nodes} nodes are online, over TLS, {came}", flush=True)
            completed, output = site.run(overrides)
        if completed:
            print(pace(output))
        print(f"output: {output}\nlogs: {folder / 'logs'}; the folder stays, with this site's keys, {folder / 'key'} and seal.key")
        return 0 if completed else site.operator.status
    except (ConfigError, KitError, keys.KeyFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except EngineError as error:
        print(f"error: {error}\nlogs: {folder / 'logs'}", file=sys.stderr)
        return 4


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
