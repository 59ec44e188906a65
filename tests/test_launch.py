"""An engine is its own from the first process to the last, and what waits for it does not wait for ever."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from test_simulation import home, settings  # noqa: F401

from fl.provenance import ROOT
from simulations import launch, processes
from simulations.launch import Engine, EngineError, engine


@pytest.fixture
def scripted(tmp_path):
    """An engine whose `flwr` is a line of shell."""

    def build(script: str) -> Engine:
        own = Engine(tmp_path, 1)
        (tmp_path / "flwr").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "flwr").chmod(0o755)
        own.env["PATH"] = f"{tmp_path}{os.pathsep}{own.env['PATH']}"
        return own

    return build


@pytest.mark.slow
def test_an_engine_joins_no_ray_that_it_finds(home, tmp_path, monkeypatch):
    """Neither a cluster that died and left its address, nor one that the environment names."""
    address = "192.0.2.2:6399"  # reserved: nobody answers there
    rays = Path(tempfile.mkdtemp(prefix="r-"))  # short, since sockets lie below it
    try:
        (rays / "ray").mkdir()
        (rays / "ray" / "ray_current_cluster").write_text(address)
        monkeypatch.setenv("RAY_TMPDIR", str(rays))
        monkeypatch.setenv("RAY_ADDRESS", address)
        with engine() as own:
            assert own.run(2, 1, settings(home, tmp_path, "clients=2 rounds=1").split())
        assert list((rays / "ray").glob("session_2*")), "Ray must have started where the address lay"
    finally:
        shutil.rmtree(rays, ignore_errors=True)


def test_a_flwr_that_does_not_answer_is_an_error_in_time(scripted, monkeypatch):
    monkeypatch.setattr(launch, "PATIENCE", 0.5)
    with pytest.raises(EngineError, match="`flwr run` must answer within 0.5 s"):
        scripted("exec sleep 60").run(2, 1, [])


@pytest.mark.timeout(30)
def test_what_shows_a_run_ends_with_whoever_looks(scripted, monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    own, before = scripted("echo a line; exec sleep 60"), set(processes.tree(os.getpid()))
    monkeypatch.setattr("builtins.print", interrupted)
    with pytest.raises(KeyboardInterrupt):
        own._stream("1", tmp_path / "log", show=True)
    assert set(processes.tree(os.getpid())) <= before


HANGS = """
import subprocess, threading, time, pytest

def test_a_lock(): threading.Event().wait()

def test_a_process(): subprocess.run(["sleep", "60"])

@pytest.mark.slow
def test_slow(): time.sleep(0.6)

@pytest.mark.slow
@pytest.mark.timeout(0.3)
def test_slow_with_a_limit_of_its_own(): time.sleep(60)

def test_after_them(): pass
"""


@pytest.mark.slow
def test_a_test_that_hangs_fails_alone(tmp_path):
    """The limits of this suite, in a suite with less patience."""
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    ours = (ROOT / "pyproject.toml").read_text()
    assert "\ntimeout = 120 " in ours
    (tmp_path / "pyproject.toml").write_text(ours.replace("\ntimeout = 120 ", "\ntimeout = 0.3 ").replace('testpaths = ["tests"]\n', ""))
    (tmp_path / "test_hangs.py").write_text(HANGS)
    began, search = time.monotonic(), os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": search}, capture_output=True, text=True)
    failed = [line.split()[1].partition("::")[2] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert failed == ["test_a_lock", "test_a_process", "test_slow_with_a_limit_of_its_own"], done.stdout
    assert time.monotonic() - began < 50
