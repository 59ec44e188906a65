"""Coordinator, proxy and nodes are different users: each has its own places, and none can look into another's."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_edge import RUN
from test_simulation import home, settings  # noqa: F401

from clients import blind as client_side
from clients import client_app, judgement, keepsakes, local, partition, policy
from clients.state import StateError
from fl import seal_key
from fl.adapter import load as load_adapter
from fl.config import ConfigError, load
from fl.journal import Journal
from simulations import edge as command
from simulations import inprocess, loop, processes, resume, users
from simulations.edge import Site, edge
from strategies import server_app
from strategies.server_app import placed

LACKS = users.lacking()
needs_root = pytest.mark.skipif(bool(LACKS), reason=f"ROLES STAY ONE USER: {LACKS}")


# Places are each machine's own


def test_the_coordinators_output_is_its_own_setting_and_no_word_of_a_run():
    config = load("output=/elsewhere")
    assert placed(config, {"VEILORA_OUTPUT": "/var/runs"}).output == "/var/runs" and placed(config, {}) is config
    assert placed(config, {"VEILORA_OUTPUT": "/var/runs"}).digest() == config.digest()
    with pytest.raises(ConfigError, match="output: must be absolute"):
        placed(config, {"VEILORA_OUTPUT": "here"})


@pytest.mark.parametrize("driver, places", [("deployment", []), ("loop", ["output"])])
def test_a_deployments_run_is_resumed_with_no_place_among_its_words(tmp_path, driver, places):
    told = {"driver": driver, "clients": 3, "overrides": f"blind=true output={tmp_path} rounds=2"}
    (tmp_path / "command.json").write_text(json.dumps(told))
    words = resume.words(tmp_path)[2]
    assert words[-1] == f"resume={tmp_path.name}" and [w.split("=")[0] for w in words if w.startswith(("output=", "key=", "state="))] == places


@pytest.mark.parametrize("more, says", [("", "preview and class list"), ("blind=true seal.largest=200", "the final adapter")])
def test_what_a_client_cannot_keep_ends_no_run_and_is_said_by_a_yes_or_no(home, tmp_path, caplog, capsys, more, says):
    (tmp_path / "taken").write_text("a file, where the client's folder should be")
    inprocess.run(server_app.app, client_app.app, 3, settings(home, tmp_path / "run", more, "rounds=1", f"+nodes.0.output={tmp_path / 'taken'}"))
    out, summaries = capsys.readouterr().out, list(tmp_path.glob("run/demo-*/summary.json"))
    assert len(summaries) == 1 and f"client 0 could not write {'its ' if not more else ''}{says}; its log says why" in out
    assert str(tmp_path / "taken") not in out, "no place of a client leaves it"
    assert any("set output-path to a folder" in line and str(tmp_path / "taken") in line for line in caplog.messages)


def test_the_final_adapter_is_written_once_at_the_end_and_in_its_place_alone(home, tmp_path):
    config = load(settings(home, tmp_path, "blind=true seal.largest=200 rounds=2"))
    client = local.open_client(config, 0, 3)
    mine = Path(config.output) / "mine" / "adapter.safetensors"
    first, other = client.bench.start, {name: tensor + 1 for name, tensor in client.bench.start.items()}
    assert keepsakes.final(client, "mine", first)
    before = mine.read_bytes()
    assert keepsakes.final(client, "mine", other) and mine.read_bytes() == before, "the owner's adapter is not overwritten"
    for run in ("../mine", "/etc", "", "a/b"):
        with pytest.raises(StateError, match="a run's name"):
            keepsakes.final(client, run, other)


def test_a_server_that_calls_an_early_round_the_last_gets_no_adapter_written(home, tmp_path):
    """Asked for a report with last=true before the run's last round, of a run that the client took no part in."""
    config = load(settings(home, tmp_path, "blind=true seal.largest=200 rounds=2"))
    client = local.open_client(config, 0, 3)
    facts = {"run": "theirs", "round": 0, "since": 0, "upto": 0, "last": True, "config": config.digest()}
    client_side.report(client, facts, client_side.pack({}, client_side.OCTETS))
    assert not (Path(config.output) / "theirs").exists()


# Users


def test_the_way_through_a_closed_folder_is_opened_for_what_is_needed_alone(tmp_path):
    inner, scratch = tmp_path / "open" / "closed" / "in" / "python", tmp_path / "view"
    for folder in (inner, inner / "lib", tmp_path / "open" / "closed" / "secret"):
        folder.mkdir(parents=True)
    tmp_path.chmod(0o755), (tmp_path / "open" / "closed").chmod(0o700)
    gate = next((p for p in reversed(tmp_path.parents) if not p.stat().st_mode & 1), None)
    assert users.closed(inner) == (gate or tmp_path / "open" / "closed") and users.closed(Path("/usr")) is None
    assert list(users.mounts([Path("/usr")], tmp_path, scratch)) == []
    lines = list(users.mounts([inner, inner / "lib"], tmp_path, scratch))
    assert sum("--rbind" in line for line in lines) == 1 and not any("secret" in line for line in lines)
    assert any("remount,bind,ro" in line for line in lines) and lines[-1].split()[:3] == ["mount", "--move", str(scratch)]


def test_without_root_the_command_says_so_and_goes_on_as_one_user(monkeypatch, capsys):
    seen = {}

    def stop(folder, nodes, proxy, database, **more):
        seen.update(more)
        raise command.EngineError("far enough")

    monkeypatch.setattr(users.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(command, "edge", stop)
    assert command.main(["--users", "blind=true"]) == 4 and seen == {"apart": False, "secure": True}
    assert "all roles run as one user: only root may start processes of other users" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(users, "lacking", lambda: "it cannot")
    with pytest.raises(command.EngineError, match="it cannot; go without --users"), edge(Path("/nowhere"), 1, apart=True):
        pass


def as_user(folder: Path, user: int, words: list[str]) -> list[str]:
    (folder / "view").mkdir(exist_ok=True)
    return users.command(words, user, [], folder / "view", folder)


@needs_root
@pytest.mark.parametrize("hardened", [True, False])
def test_no_other_process_of_the_same_user_looks_into_one_that_holds_keys(tmp_path, hardened):
    tmp_path.chmod(0o755)
    script = f"import os, resource, signal; from clients.hardening import closed; {'closed()' if hardened else 'pass'}; os.fork() and print(resource.getrlimit(resource.RLIMIT_CORE)[0], flush=True); signal.pause()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": users.environment(61000, tmp_path), "cwd": tmp_path}
    with subprocess.Popen(as_user(tmp_path, 61000, [sys.executable, "-c", script]), **pipes) as process:
        try:
            cores = int(process.stdout.readline())
            family = processes.tree(process.pid)
            assert len(family) == 2 and (not hardened or cores == 0)
            for pid in family:
                look = as_user(tmp_path, 61000, ["cat", f"/proc/{pid}/environ", f"/proc/{pid}/maps"])
                assert (subprocess.run(look, cwd=tmp_path, capture_output=True).returncode != 0) == hardened
                told, seen = processes.resident(pid), processes.alone(pid)
                assert 0.9 * seen.rss < told.rss == told.pss < 1.1 * seen.rss, "its size is no secret, as root sees it, too"
        finally:
            process.kill()
            processes.end(process, grace=0)


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Site, Path, dict[str, set[tuple[int, ...]]]]:
    """A secure run of three nodes with pictures of their own, every role a user of its own; and whom its processes belonged to."""
    words = f"blind=true {RUN}"
    judgement.judge(policy.Policy(), words)
    with edge(tmp_path_factory.mktemp("roles") / "site", 3, up=False, apart=True, secure=True) as site:
        for i in range(3):
            place, user = site.folder / "pictures" / f"node-{i}", site.user(f"node-{i}")
            partition.write(load(f"{words} key={site.folder / 'key'}"), i, 3, place, encrypt=True)
            for path in (place, *place.iterdir()):
                users.owned(path, user)
            toml = site.files / f"node-{i}" / "node.toml"
            toml.write_text(toml.read_text() + f'partition-path = "{place}"\n')
        site.start_superlink()
        site.start_proxy()
        site.register()
        for i in range(3):
            site.start(i)
        site.await_nodes()
        ended = site.run(shlex.split(words), show=False)
        assert ended.completed, site.last_words("superlink")
        engines = {"coordinator": site.superlink, "proxy": site.proxy} | {f"node-{i}": node for i, node in enumerate(site.nodes)}
        owners = {role: {belongs(pid) for pid in processes.tree(process.pid)} for role, process in engines.items() if process}
        yield site, ended.output, owners


def belongs(pid: int) -> tuple[int, ...]:
    """Real, effective, saved and file-system user of a process, and the capabilities that it has or could get."""
    lines = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    return (*map(int, lines["Uid"].split()), *(int(lines[f"Cap{which}"], 16) for which in ("Prm", "Eff", "Bnd")))


@needs_root
@pytest.mark.slow
def test_a_secure_run_of_different_users_over_tls_equals_the_plain_loop_bit_for_bit(ran, tmp_path):
    site, output, owners = ran
    assert owners == {role: {(site.user(role),) * 4 + (0, 0, 0)} for role in owners} and len(owners) == 4 + site.proxied
    seal_key.create(tmp_path / "seal.key")
    config = load(f"blind=true {RUN} clients=3 key={site.folder / 'key'} seal_key={tmp_path / 'seal.key'} output={tmp_path} state={tmp_path / 'state'}")
    loop.run(config, Journal(config, "loop"))
    (theirs, *more), ours = site.adapters(output.name), load_adapter(tmp_path / "loop" / "adapter.safetensors")
    found = load_adapter(theirs)
    assert ours.keys() == found.keys() and all(torch.equal(ours[name], found[name]) for name in ours) and not more
    assert (output / "sealed.safetensors").exists() and not (output / "adapter.safetensors").exists()
    assert [seal_key.read(site.folder / f"var/node-{i}/seal.key").epoch for i in range(3)] == [1, 1, 1], "each node's key has stepped"


@needs_root
@pytest.mark.slow
def test_no_role_reads_what_is_anothers_or_changes_its_own_policy_unit_and_proxy(ran):
    site, output, _ = ran
    assert site.folder in output.parents and output.parent == site.folder / "var/coordinator/runs"
    secret = [p for p in site.folder.rglob("*") if p.is_file() and (p.suffix == ".key" or p.name == "key" or {"var", "pictures"} & {*p.relative_to(site.folder).parts})]
    own = {
        "coordinator": ["var/coordinator", "deployment/coordinator/server.key"], "proxy": ["var/proxy"],
        **{f"node-{i}": [f"var/node-{i}", f"pictures/node-{i}", f"deployment/node-{i}/node.key", f"deployment/node-{i}/image.key"] for i in range(3)},
    }  # fmt: skip
    everything = [str(p) for p in (site.files, *site.files.rglob("*"))]
    for role, places in own.items():
        mine = {str(p) for p in secret if any(site.folder / place in (p, *p.parents) for place in places)}
        assert mine or role == "proxy", "there is something that it can read"
        assert can(site, role, "-r", [str(p) for p in secret]) == mine
        assert can(site, role, "-w", everything) == set()
    assert {p.relative_to(site.folder).parts[1] for p in secret if "runs" in p.parts} == {"coordinator", "node-0"}, "each record lies with its owner"


def can(site: Site, role: str, what: str, paths: list[str]) -> set[str]:
    """Which of ``paths`` the user of ``role`` can read (-r) or write (-w); what is to be read is read."""
    script = f'for p in "$@"; do test {what} "$p" && {"head -c 1 $p >/dev/null 2>&1 && " if what == "-r" else ""}printf "%s\\n" "$p"; done; true'
    words = users.command(["sh", "-c", script, "sh", *paths], site.user(role), [], site.folder / "view", site.folder)
    done = subprocess.run(words, cwd=site.folder, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())
