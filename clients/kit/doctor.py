"""Look before the start: is all there that a node or the coordinator needs? Every finding is given, and none raises.

    veilora doctor node-0            a folder that `veilora deploy init` wrote: its engine.env and node.toml say what to look at
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import tempfile
import tomllib
from pathlib import Path
from typing import Callable, Iterator, Mapping

from clients.kit import Finding, KitError, certificates, ownership, probes, reach

FLAGS = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}
ROOM = 2e9  # bytes free for state and Flower's own files


def doctor(folder: Path) -> list[Finding]:
    """What there is to say about the machine whose ``folder`` of a deployment this is. Raises KitError if it is none."""
    try:
        engine = settings((folder / "engine.env").read_text())
    except OSError as error:
        raise KitError(f"{folder} must be a node's or the coordinator's folder of a deployment, and has no engine.env ({error.strerror})") from None
    look = {"node": node, "coordinator": coordinator}.get(engine.get("VEILORA_ROLE", ""))
    if look is None:
        raise KitError(f"VEILORA_ROLE in {folder}/engine.env must be node or coordinator, got {engine.get('VEILORA_ROLE', '')!r}")
    return list(look(folder, engine))


def settings(text: str) -> dict[str, str]:
    """The NAME=VALUE lines of an engine.env."""
    lines = (line.partition("=") for line in text.splitlines() if "=" in line and not line.startswith("#"))
    return {name.strip(): value.strip() for name, _, value in lines}


def node(folder: Path, engine: Mapping[str, str]) -> Iterator[Finding]:
    """What a SuperNode needs."""
    own: dict = {}
    software, told = probes.software()
    yield software
    yield _try("node.toml", "mend the file", lambda: _place(folder / "node.toml", own))
    yield probes.device(str(own.get("device", "auto")), told)
    places = {"state": "~/veilora/state", "output": "~/veilora/runs"}
    yield from _rooms({name: str(own.get(f"{name}-path", usual)) for name, usual in places.items()} | {"FLWR_HOME": engine.get("FLWR_HOME", "")})
    yield _try("image key", "carry the one that all share from another node, mode 0600; make one on the first alone", lambda: probes.image_key(str(own.get("key-path", "~/veilora/key"))))
    if "seal-key-path" in own:
        do = "have it shared: veilora key pair, then key take; on the first node alone: veilora keygen --seal"
        yield _try("seal key", do, lambda: probes.seal_key(str(own["seal-key-path"])))
    yield _try("data", "set data-path in node.toml", lambda: probes.data(own))
    if "partition-path" in own:
        yield _try("partition", "write it again: veilora partition", lambda: probes.partition(own))
    yield _try("weights", "set weights-path in node.toml", lambda: probes.weights(own.get("weights-path")))
    yield _port(engine, "SuperNode")
    yield from _flags(engine)
    yield _certificate("ca.crt", folder / "ca.crt", None, [])
    yield _secret("node key", folder / "node.key")
    yield _try("policy", "mend policy.toml: until then nothing is let in", lambda: probes.policy(folder / "policy.toml"))
    yield from ownership.ownership(folder, str(own.get("key-path", "~/veilora/key")), folder / "policy.toml")
    yield from _reach(folder, engine)


def coordinator(folder: Path, engine: Mapping[str, str]) -> Iterator[Finding]:
    """What SuperLink and proxy need."""
    yield probes.software()[0]
    places = {"state": "VEILORA_STATE", "output": "VEILORA_OUTPUT", "FLWR_HOME": "FLWR_HOME"}
    yield from _rooms({what: engine.get(name, "") for what, name in places.items()})
    yield _port(engine, "SuperLink")
    yield from _flags(engine)
    public: list[str] = []
    yield _try("address", "set VEILORA_PUBLIC in engine.env", lambda: _address(engine.get("VEILORA_PUBLIC", ""), public))
    yield _certificate("ca.crt", folder / "ca.crt", None, [])
    yield _certificate("server.pem", folder / "server.pem", folder / "ca.crt", [*public, "localhost", "127.0.0.1"])
    yield _secret("server.key", folder / "server.key")
    yield _try("key pair", "renew both: veilora deploy renew FOLDER", lambda: probes.belong(folder / "server.key", folder / "server.pem"))
    yield _try("node keys", "copy nodes/*.pub again", lambda: probes.public_keys(folder / "nodes", int(engine.get("VEILORA_NODES", "0"))))
    strays = [p.name for p in sorted(folder.rglob("*")) if p.name in ("ca.key", "node.key", "seal.key", "key") and p.is_file()]
    yield Finding("foreign keys", not strays, f"found {', '.join(strays)}" if strays else "none", "take them off this machine" if strays else "")
    if shutil.which("nginx"):
        yield _try("nginx", "mend proxy.conf", lambda: _nginx(folder))
    else:
        yield Finding("nginx", False, "not on PATH", "install nginx, or run the proxy of compose.yaml, which brings its own")


def _place(path: Path, own: dict) -> str:
    own |= tomllib.loads(path.read_text())
    index, of = own.get("partition-id"), own.get("num-partitions")
    if not (isinstance(index, int) and isinstance(of, int) and 0 <= index < of):
        raise KitError(f"partition-id and num-partitions must be 0 <= I < N, got {index} and {of}")
    return f"node {index} of {of}"


def _address(text: str, names: list[str]) -> str:
    host, port = reach.address(text)
    names.append(host)
    return f"nodes come in at {host}, port {port}"


def _reach(folder: Path, engine: Mapping[str, str]) -> Iterator[Finding]:
    """The coordinator as this node sees it."""
    try:
        host, port = reach.address(engine.get("VEILORA_SUPERLINK", ""))
        seen = reach.look(host, port, (folder / "ca.crt").read_bytes())
    except (KitError, OSError, ValueError) as error:
        yield Finding("coordinator", False, str(error), "see VEILORA_SUPERLINK in engine.env, and the coordinator's own doctor")
        return
    for line in seen.wrong:
        yield Finding("server certificate", False, f"that of {host}:{port} {line}", "the SuperNode would refuse it; tell the operator")
    if not seen.wrong:
        yield Finding("server certificate", True, f"{host}:{port} is who ca.crt says")
    if seen.ahead is None:
        return
    steady = -reach.BEHIND < seen.ahead < reach.AHEAD
    yield Finding("clock", steady, f"{seen.ahead:+.1f} s from the coordinator's", "" if steady else "set the clock, as with NTP: signatures are dated")
    yield Finding("open doors", not seen.open, ", ".join(seen.open) or "none but /v1/fleet", "close them: nodes go through proxy.conf" if seen.open else "")
    yield _try("registration", "on the coordinator: flwr supernode register NODE.pub, or stop that SuperNode", lambda: _join(folder, engine))


def _join(folder: Path, engine: Mapping[str, str]) -> str:
    from clients.kit import membership  # Flower, whose absence is a finding and no crash

    key = membership.node_key(folder / "node.key")
    return f"the SuperLink knows this node as {membership.join(engine['VEILORA_SUPERLINK'], folder / 'ca.crt', key)}"


def _try(name: str, do: str, look: Callable[[], str]) -> Finding:
    """What ``look`` says, or its error as a finding."""
    try:
        return Finding(name, True, look())
    except Exception as error:  # whatever it is, it is what the doctor was to find
        return Finding(name, False, " ".join(str(error).split()) or type(error).__name__, do)


def _rooms(places: Mapping[str, str]) -> Iterator[Finding]:
    """Folders that must be there to write in, and have room."""
    for name, place in places.items():
        path = Path(place).expanduser()
        there = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
        try:
            if not path.is_absolute():
                raise OSError("is no absolute path")
            with tempfile.TemporaryFile(dir=there):
                free = shutil.disk_usage(there).free
        except OSError as error:
            yield Finding(name, False, f"{path} cannot be written ({error.strerror or error})", f"install -d -o veilora -m 0700 {path}")
            continue
        yield Finding(name, free >= ROOM, f"{path} can be written, {free / 1e9:.1f} GB free", "" if free >= ROOM else f"make room: {ROOM / 1e9:.0f} GB")


def _port(engine: Mapping[str, str], who: str) -> Finding:
    try:
        with socket.create_server(("127.0.0.1", int(engine.get("VEILORA_PORT", "")))):
            return Finding("port", True, f"127.0.0.1:{engine['VEILORA_PORT']} is free")
    except (OSError, ValueError, OverflowError) as error:
        return Finding("port", False, f"127.0.0.1:{engine.get('VEILORA_PORT')} cannot be had ({error})", f"end the {who} that runs, or set VEILORA_PORT")


def _flags(engine: Mapping[str, str]) -> Iterator[Finding]:
    wrong = [f"{name}={value}" for name, value in FLAGS.items() if engine.get(name) != value]
    yield Finding("flags", not wrong, f"engine.env lacks {', '.join(wrong)}" if wrong else "no telemetry, no update check, no install at run time",
                  "set them in engine.env" if wrong else "")  # fmt: skip


def _certificate(name: str, path: Path, root: Path | None, names: list[str]) -> Finding:
    try:
        wrong = certificates.check(path.read_bytes(), root.read_bytes() if root else None, names)
    except (OSError, KitError) as error:
        wrong = [f"cannot be read ({error})"]
    return Finding(name, not wrong, "; ".join(f"{name} {line}" for line in wrong) or "in force", "see above" if wrong else "")


def _secret(name: str, path: Path) -> Finding:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        path.read_bytes()
    except OSError as error:
        return Finding(name, False, f"{path} cannot be read ({error.strerror})", "copy the folder again, as the user who runs the engine")
    told = path.stat()
    own = not mode & 0o077 or mode & 0o077 == 0o040 and told.st_uid == 0 != told.st_gid  # root's, and for one service's group to read
    return Finding(name, own, f"{path.name} has mode {mode:04o}", "" if own else f"chown root:veilora {path} && chmod 0640 {path}")


def _nginx(folder: Path) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        command = ["nginx", "-e", "stderr", "-t", "-p", scratch, "-c", str(folder.resolve() / "nginx.conf")]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    if done.returncode:
        raise KitError(done.stderr.strip().splitlines()[0])
    return "takes nginx.conf and proxy.conf"
