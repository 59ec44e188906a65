"""The files of a deployment: a folder for the coordinator, one for each node, one for the authority's key.

    deployment/
      ca/           ca.key: signs the server's certificate; to be kept off every machine of the federation
      coordinator/  SuperLink on loopback, nginx in front of it; certificate and key; the nodes' public keys
      node-0/ ...   SuperNode; the authority's certificate; the node's public key, or for a trial its own key

A node's own key is made on the node (`veilora node init`), and its public half is given to `init`. For a trial on one machine
`init` makes them all, and then whoever made the deployment has had every node's key.
The image key, which all nodes share, is not among them: `veilora keygen` makes it on a node.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Callable, Sequence

from cryptography import x509

from clients.kit import KitError, certificates, containers, policy_file, proxy, readme, start, units
from fl import durable

VERSION = "0.1.0"
LOOPBACK = ("localhost", "127.0.0.1", "::1")  # the proxy and the operator reach the SuperLink by these
PLACE = re.compile(r"/[\w.,+/-]*", re.ASCII)  # safe in a unit, a shell line, a TOML string and nginx's file


@dataclass(frozen=True)
class Plan:
    """A deployment in numbers. Paths are those on the machines, absolute; ``home`` and ``var`` hold a folder for each role."""

    host: str                            # where nodes find the coordinator: a DNS name or an address
    nodes: int
    port: int = 8443                     # of the proxy, for the nodes
    superlink_port: int = 9091           # of the SuperLink, on the coordinator's loopback
    node_port: int = 9094                # of node 0's SuperNode, on its loopback; node i has the i-th after it
    names: tuple[str, ...] = ()          # further names of the coordinator
    home: str = "/etc/veilora"
    var: str = "/var/lib/veilora"
    venv: str = "/opt/veilora"
    key: str = "/etc/veilora/key"        # the image key on a node
    data: str = ""
    weights: str = ""
    device: str = "auto"
    database: bool = True                # the SuperLink keeps registrations in a file
    listen: str = ""                     # the proxy's address; every one of the machine's unless given
    days: int = 365                      # of the server's certificate
    secure: bool = True                  # secure aggregation: the coordinator adds what it cannot read

    def __post_init__(self) -> None:
        """Raises KitError."""
        if not 1 <= self.nodes <= 1000:
            raise KitError(f"a deployment must have 1 to 1000 nodes, got {self.nodes}")
        if not 1 <= self.days <= 3650:
            raise KitError(f"a certificate must last 1 to 3650 days, got {self.days}")
        for name, port in (("port", self.port), ("superlink_port", self.superlink_port), ("node_port", self.node_port + self.nodes - 1)):
            if not 1 <= port <= 65535:
                raise KitError(f"{name} must be 1 to 65535, for every node, got {port}")
        for name in ("home", "var", "venv", "key", "data", "weights"):
            place = getattr(self, name)
            if (place or name not in ("data", "weights")) and not PLACE.fullmatch(place):
                raise KitError(f"{name} must be an absolute path of letters, digits and . , + _ -, got {place!r}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise KitError(f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}")

    @property
    def public(self) -> str:
        """The coordinator as a SuperNode is told it, host:port."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def run(self) -> str:
        """The words of a run that such nodes take part in; a secure sum is of three clients at least."""
        words = f"clients={self.nodes} quorum={max(0.6, min(1.0, 3 / self.nodes)):.2g} retries=3 timeout=600"
        return f"blind=true {words}" if self.secure else words


def init(folder: Path, plan: Plan, now: datetime | None = None, keys: Sequence[bytes] = ()) -> list[str]:
    """Write the deployment ``plan`` to the new ``folder``. Returns what to do next, a line each.

    ``keys`` are the nodes' public keys, in their order; without them private ones are made, too. Raises KitError when
    ``folder`` exists, a name is none, or there are not as many keys as nodes; then nothing is left behind.
    """
    if keys and len(keys) != plan.nodes:
        raise KitError(f"there must be a public key for each node, got {len(keys)} for {plan.nodes}")
    if folder.exists() or folder.is_symlink():
        raise KitError(f"a deployment must not be overwritten: {folder} exists; choose another folder or move it away")
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    draft.mkdir(parents=True, mode=0o700)
    try:
        root = certificates.authority(f"VeiLoRA authority of {plan.host}", max(3650, plan.days), now)
        _pair(draft / "ca", "ca.key", "ca.crt", root)
        _coordinator(draft / "coordinator", plan, root, now)
        for index in range(plan.nodes):
            key = certificates.Pair(b"", keys[index]) if keys else certificates.node_key()
            _node(draft / f"node-{index}", plan, index, root, key)
            _write(draft / "coordinator" / "nodes" / f"node-{index}.pub", key.public)
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return [
        f"{folder}/coordinator belongs on {plan.host} as {plan.home}/coordinator: its README has the commands",
        f"{folder}/node-0 to node-{plan.nodes - 1} belong on the nodes, one each, as {plan.home}/node-N",
        f"{folder}/ca/ca.key belongs on neither: keep it apart, for `veilora deploy renew`",
        *([] if keys else ["the nodes' private keys were made here, for a trial; for real use run `veilora node init` on each, and give --pub"]),
        *([f"a secure sum is of three clients at least, and there are {plan.nodes} nodes: no run will complete"] if plan.secure and plan.nodes < 3 else []),
        f"the image key is not made here: on one node run `veilora keygen {plan.key}`, carry the file to the other nodes by hand,"
        " and never to the coordinator",
    ]


def renew(folder: Path, days: int = 365, now: datetime | None = None) -> list[str]:
    """Give the coordinator in ``folder`` a new certificate for the names of its old one. Returns what to do next."""
    try:
        root = certificates.Pair((folder / "ca/ca.key").read_bytes(), (folder / "ca/ca.crt").read_bytes())
        names = certificates.held(x509.load_pem_x509_certificate((folder / "coordinator/server.pem").read_bytes()))
    except (OSError, ValueError) as error:
        raise KitError(f"a deployment must have ca/ca.key, ca/ca.crt and coordinator/server.pem, and {folder} has not ({error})") from None
    _pair(folder / "coordinator", "server.key", "server.pem", certificates.server(root, names, days, now))
    return [f"copy {folder}/coordinator/server.pem and server.key to the coordinator, reload nginx, restart the SuperLink"]


def _coordinator(folder: Path, plan: Plan, root: certificates.Pair, now: datetime | None) -> None:
    text = _filled(
        plan, "coordinator", public=plan.public, host=plan.host, port=plan.port, superlink_port=plan.superlink_port,
        listen=f"{plan.listen}:{plan.port}" if plan.listen else plan.port,
        database=f"{plan.var}/coordinator/superlink.db" if plan.database else "",
        run=plan.run, told=readme.SECURE if plan.secure else readme.CLEAR,
        register="\n".join(
            f"     flwr supernode register {plan.home}/coordinator/nodes/node-{i}.pub veilora --name node-{i}" for i in range(plan.nodes)
        ),
    )  # fmt: skip
    _pair(folder, "server.key", "server.pem", certificates.server(root, [plan.host, *plan.names, *LOOPBACK], plan.days, now))
    _write(folder / "ca.crt", root.public)
    _write(folder / "start", text(start.COORDINATOR_START), 0o755)
    _write(folder / "engine.env", text(start.COORDINATOR_ENV))
    _write(folder / "operator" / "config.toml", text(start.OPERATOR), 0o600)
    _write(folder / "superlink.service", text(units.SUPERLINK))
    _write(folder / "proxy.conf", text(proxy.SERVER))
    _write(folder / "nginx.conf", text(proxy.MAIN))
    _write(folder / "compose.yaml", text(containers.COORDINATOR))
    _write(folder / "Containerfile", text(containers.CONTAINERFILE))
    _write(folder / "README", text(readme.COORDINATOR))


def _node(folder: Path, plan: Plan, index: int, root: certificates.Pair, key: certificates.Pair) -> None:
    mounts = "".join(f'      - "{place}:{place}:ro"\n' for place in dict.fromkeys((plan.data, plan.weights)) if place)
    text = _filled(
        plan, folder.name, index=index, public=plan.public, node_port=plan.node_port + index, key=plan.key, device=plan.device,
        data=_setting("data-path", plan.data, "/data"), weights=_setting("weights-path", plan.weights, "/weights/vit.safetensors"),
        mounts=mounts, gpus="    gpus: all\n" if plan.device.startswith("cuda") else "",
        gpu_note="" if plan.device == "cpu" else " A GPU needs `gpus: all` and the NVIDIA container toolkit.",
        egress=units.egress([plan.host, *plan.names]),
        key_note=readme.MADE if key.private else readme.BROUGHT.replace("@home@", f"{plan.home}/{folder.name}"),
    )  # fmt: skip
    _write(folder / "ca.crt", root.public)
    if key.private:
        _write(folder / "node.key", key.private, 0o600)
    _write(folder / "node.pub", key.public)
    _write(folder / "start", text(start.NODE_START), 0o755)
    _write(folder / "engine.env", text(start.NODE_ENV))
    _write(folder / "node.toml", text(start.NODE_TOML))
    _write(folder / "policy.toml", policy_file.text(plan.secure).encode())
    _write(folder / "supernode.service", text(units.SUPERNODE))
    _write(folder / "compose.yaml", text(containers.NODE))
    _write(folder / "Containerfile", text(containers.CONTAINERFILE))
    _write(folder / "README", text(readme.NODE))


def _setting(name: str, value: str, example: str) -> str:
    return f'{name} = "{value}"' if value else f'# {name} = "{example}"'


def _filled(plan: Plan, role: str, **values: object) -> Callable[[str], bytes]:
    """A template with every @name@ in it replaced."""
    values |= {"home": f"{plan.home}/{role}", "var": f"{plan.var}/{role}", "venv": plan.venv, "nodes": plan.nodes, "version": VERSION}
    return lambda template: re.sub("@([a-z_]+)@", lambda match: str(values[match[1]]), template).encode()


def _pair(folder: Path, private: str, public: str, pair: certificates.Pair) -> None:
    _write(folder / private, pair.private, 0o600)
    _write(folder / public, pair.public)


def _write(path: Path, content: bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(mode=0o755, exist_ok=True)
    durable.write(path, content, mode)
