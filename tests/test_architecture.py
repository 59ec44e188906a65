"""The house: who may import whom, what travels to the engine, what stands at the top."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from fl.config import CONF
from fl.provenance import SHIPPED

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("fl", "clients", "strategies", "simulations")
FILES = sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))
PEER = "simulations/bench/flower_vit/"  # an app of others' making, to compare with: their libraries are its business
EDGES = {
    "fl/wire/records.py", "clients/client_app.py", "clients/flower.py", "clients/node.py", "clients/site.py", "clients/kit/membership.py",
    "strategies/exchange.py", "strategies/flower.py", "strategies/server_app.py",
    "simulations/inprocess.py", "simulations/cost.py", "simulations/bench/aggregate.py", "simulations/bench/rounds.py",
    "simulations/audit/broken.py", "simulations/audit/faults.py", "simulations/bench/echo/client_app.py", "simulations/bench/echo/server_app.py",
}
SERVER_SEES = ("fl.adapter", "fl.base", "fl.config", "fl.durable", "fl.journal", "fl.provenance", "fl.randomness", "fl.recipe", "fl.record", "fl.tree", "fl.wire")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function; `from a import b` counts as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def reaches(found: set[str], *packages: str) -> set[str]:
    return {m for m in found for p in packages if m == p or m.startswith(p + ".")}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_follow_the_house(path):
    found, room = imports(path), name(path).split("/")[0]
    forbidden = {
        "fl": ("clients", "strategies", "simulations"),
        "clients": ("strategies", "simulations"),
        "strategies": ("clients", "simulations"),
        "simulations": (),
    }[room]
    if name(path) in ("clients/blind.py", "clients/expected.py"):  # the server's step is the clients' to take where it is blind, and to expect where not
        forbidden = ("simulations",)
    assert not reaches(found, *forbidden)
    assert not reaches(found, "ray"), "Flower drives Ray"
    if name(path).startswith(PEER):
        return
    assert not reaches(found, "peft"), "the peer's library"
    if not name(path).startswith("simulations/audit/"):
        assert not reaches(found, "scipy"), "what only attacks need"
    if name(path) not in EDGES:
        assert not reaches(found, "flwr")
    if not name(path).startswith("fl/datasets/"):
        assert not reaches(found, "torchvision")
    if not name(path).startswith(("fl/models/", "fl/export/")):  # an export is written, and read back, as timm does it
        assert not reaches(found, "timm")


@pytest.mark.parametrize("path", [p for p in FILES if name(p).startswith("strategies/")], ids=name)
def test_the_server_can_import_no_key_no_cipher_no_data_and_no_training_loop(path):
    ours = reaches(imports(path), "fl")
    assert all(m == "fl" or any(m == s or m.startswith(s + ".") for s in SERVER_SEES) for m in ours), ours


def test_importing_the_server_loads_none_of_them_either():
    script = (
        "import sys, strategies.server_app\n"
        "bad = [m for m in sys.modules if m.startswith(('fl.keys', 'fl.seal_key', 'fl.ciphers', 'fl.datasets', 'fl.learn', 'fl.models', 'clients', 'timm', 'torchvision'))]\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_the_bundle_holds_code_and_yaml_and_nothing_else():
    from flwr.cli.build import build_fab_from_disk

    with zipfile.ZipFile(BytesIO(build_fab_from_disk(ROOT))) as bundle:
        members = {m for m in bundle.namelist() if not m.startswith(".info/")}
    shipped = {p.relative_to(ROOT).as_posix() for pattern in SHIPPED for p in ROOT.glob(pattern)}
    assert members == shipped | {"pyproject.toml"}
    assert {p.relative_to(ROOT).as_posix() for p in CONF.rglob("*.yaml")} <= members


def test_what_is_hashed_as_the_code_is_what_is_shipped():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["fab-include"] == list(SHIPPED)


def test_a_run_has_nothing_to_install_and_asks_no_registry(tmp_path):
    written = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "dependencies" not in written["project"], "Flower would install them anew for every run"
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "README.md").touch()
    offline = os.environ | {"UV_OFFLINE": "1", "UV_CACHE_DIR": str(tmp_path / "cache"), "UV_PROJECT_ENVIRONMENT": str(tmp_path / "env")}
    sync = [sys.executable, "-m", "uv", "sync", "--python", sys.executable, "--no-install-project"]  # as Flower calls it
    done = subprocess.run(sync, cwd=tmp_path, env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_top_level_is_the_agreed_one():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    agreed = {"fl", "clients", "strategies", "conf", "simulations", "tests", "pyproject.toml", "README.md", "Makefile", "LICENSE"}
    assert {t for t in top if not t.startswith(".")} <= agreed
    assert agreed <= top


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_file_grows_past_its_room(path):
    assert len(path.read_text().splitlines()) <= 250
    assert path.stem not in {"utils", "helpers", "common", "misc"}
