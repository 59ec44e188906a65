"""`flwr run` as one blocking command with a true exit code, on an engine of its own.

    python -m simulations.launch [--clients N] [--workers N] [overrides ...]

Flower's shared local SuperLink keeps the folder, environment and code of whoever started it first, and `flwr run --stream`
returns 0 for failed runs. This launcher starts a SuperLink with a fresh home, a neutral folder and a free port, submits
this checkout, shows what the run says, asks how it ended, and takes everything down again. Ray, too, is its own: a cluster
that is up on the machine, or that died and left its address behind, is not joined. With ``engine=inprocess`` the
same apps run in this process instead, one client after the other, with neither Ray nor a daemon.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from fl.config import ConfigError, load
from fl.provenance import ROOT

NOISE = re.compile(r"^(\x1b\[[0-9;]*m)*(INFO|DEBUG|WARNING|\(ClientAppActor|\(raylet|\(pid|Loading project|Using SuperLink|Successfully installed|\s*$)|^\s*warnings?\.warn")


STATUS = re.compile(r"^error: .*\(exit status ([2-6])\)$")
PATIENCE = 120  # seconds until a run that was taken must have begun, or `flwr` must have answered


class EngineError(RuntimeError):
    """An engine that did not start or stopped answering, or a run that it refused; one line with its last words."""


class Engine:
    """A SuperLink of our own, in the folder ``home``, whose config.toml knows it as ``link``."""

    def __init__(self, home: Path, port: int, link: str = "own") -> None:
        self.home, self.port, self.link, self.failed, self.status = home, port, link, False, 4
        scripts = Path(sys.executable).parent
        self.env = os.environ | {
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "RAY_ADDRESS": "local",  # or Ray would join whatever cluster it finds, and refuse Flower's number of CPUs
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "PYTHONUNBUFFERED": "1",
            "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}",
        }

    def run(self, clients: int, workers: int, overrides: list[str], show: bool = True) -> bool:
        """Run this checkout with ``clients`` virtual nodes on ``workers`` worker processes; whether it completed."""
        return self.submit(ROOT, clients, workers, ["--run-config", f"overrides={json.dumps(shlex.join(overrides))}"], show)

    def submit(self, app: Path, clients: int, workers: int, options: list[str] | None = None, show: bool = True) -> bool:
        """Run the Flower app in the folder ``app`` with `flwr run`'s own ``options``; whether it completed."""
        federation = f"num-supernodes={clients} client-resources-num-cpus=1 init-args-num-cpus={workers}"
        return self.follow(app, ["--federation-config", federation, *(options or [])], show)

    def follow(self, app: Path, options: list[str], show: bool = True) -> bool:
        """Submit ``app`` with these ``options`` of `flwr run`, show what it says, and return whether it completed."""
        reply = self._flwr("run", str(app), self.link, "--format", "json", *options)
        try:
            report = json.loads(reply.stdout[reply.stdout.index("{") :])
            run = str(report["run-id"])
        except (ValueError, KeyError):
            raise EngineError(f"the engine refused the run: {(reply.stdout + reply.stderr).strip()[-400:]}") from None
        log = self.home / f"run-{run}.log"
        submitted = time.monotonic()
        while True:
            self._stream(run, log, show)
            status = self._status(run)
            if status.startswith("finished"):
                self.failed |= status != "finished:completed"
                return status == "finished:completed"
            if status in ("pending", "starting") and time.monotonic() - submitted > PATIENCE:
                raise EngineError(f"the engine must start a run within {PATIENCE} s, but it is still {status}")
            time.sleep(0.5)

    def _status(self, run: str) -> str:
        listed = self._flwr("list", "--run-id", run, self.link, "--format", "json").stdout
        try:
            return json.loads(listed)["runs"][0]["status"]
        except (ValueError, KeyError, IndexError):
            raise EngineError(f"the engine must list its runs, but said {listed.strip()[-200:]!r}") from None

    def _stream(self, run: str, log: Path, show: bool) -> None:
        command = ["flwr", "log", run, self.link, "--stream"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        with log.open("w") as keep, subprocess.Popen(command, cwd=self.home, env=self.env, **pipes) as stream:
            try:
                for line in stream.stdout:
                    keep.write(line)
                    if (said := STATUS.search(line)):
                        self.status = int(said[1])
                    if show and not NOISE.match(line) and not line.startswith(("Traceback", " ", "\x1b")):
                        print(line, end="", flush=True)
            except BaseException:  # leaving the block waits for the command, which follows the run to its end
                stream.kill()
                raise

    def _flwr(self, *words: str) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(["flwr", *words], cwd=self.home, env=self.env, capture_output=True, text=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise EngineError(f"`flwr {words[0]}` must answer within {PATIENCE} s; see the engine's log") from None


@contextmanager
def engine(started_in: Path | None = None) -> Iterator[Engine]:
    """An engine that is up when the block begins, and gone when it ends; it starts in an empty folder unless told otherwise.

    The logs go with it, unless a run failed: then their folder is named on standard error.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = Engine(Path(tempfile.mkdtemp(prefix="veilora-engine-")), port)
    (own.home / "config.toml").write_text(
        f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    command = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    with (own.home / "superlink.log").open("w") as log:
        process = subprocess.Popen(command, cwd=started_in or own.home, env=own.env, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for(process, own)
        yield own
    except EngineError:
        own.failed = True
        raise
    finally:
        _stop(process)
        if own.failed:
            print(f"the logs of the engine: {own.home}", file=sys.stderr)
        else:
            shutil.rmtree(own.home, ignore_errors=True)


def _stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)  # whatever of its group is left
    except ProcessLookupError:
        pass


def _wait_for(process: subprocess.Popen, own: Engine, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{own.port}/health", timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    tail = (own.home / "superlink.log").read_text()[-400:]
    raise EngineError(f"the SuperLink must answer within {seconds:.0f} s; its log ends: {tail}")


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status.

    0 when the run completed, 2 for a bad override, 4 when the run failed or no engine started, 5 for a quorum that was lost, 6
    for checkpoints that are damaged.
    """
    parser = argparse.ArgumentParser(prog="python -m simulations.launch", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--clients", type=int, default=2, help="virtual nodes (default 2)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="worker processes (default: one for each core)")
    options, overrides = parser.parse_known_args(arguments)
    try:
        if load(shlex.join(overrides)).engine == "inprocess":  # and a slip of the pen is not worth an engine
            from simulations import inprocess  # the client's libraries, which an engine's own processes load

            return inprocess.run_apps(options.clients, shlex.join(overrides))
        with engine() as own:
            return 0 if own.run(options.clients, options.workers, overrides) else own.status
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 4


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
