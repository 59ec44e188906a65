"""A long run of a real deployment on loopback, with accidents: nodes and servers are killed while it goes on.

    python -m simulations.soak --rounds 200 --nodes 3 --restarts 8                     memory, over many rounds
    python -m simulations.soak --rounds 12 --kills 3 --restarts 2 --cuts 1 quorum=1.0  is the adapter that of the plain loop?

At seeded moments a node loses its power and starts again, or the SuperLink does, and with it the run, which is then resumed,
or the network is cut for a while (the proxy is).
Every second the memory of what lives long is read: SuperLink and ServerApp together, and each SuperNode without its passing
ClientApps. It is flat when the median of the last quarter is that of the first within five percent. With ``quorum=1.0`` no
update may be missing, and the final adapter must be the plain loop's, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from fl.adapter import digest
from fl.adapter import load as load_adapter
from fl.config import ConfigError, load
from fl.journal import Journal
from fl.provenance import environment
from simulations import loop, processes
from simulations.edge import Site, edge
from simulations.launch import EngineError

SMALL = "data.train=120 data.test=60 model.weights=none recipe.batch=16 precision=float32 evaluate_every=50 diagnostics=0 quorum=0.6 retries=20 timeout=60"
PASSING = "flwr-clientapp"  # a process for one message


class Watch(threading.Thread):
    """Reads the memory of a site every second, until told to stop: (seconds, {what: MB})."""

    def __init__(self, site: Site) -> None:
        super().__init__(daemon=True)
        self.site, self.samples, self._over, self._began = site, [], threading.Event(), time.monotonic()

    def run(self) -> None:
        while not self._over.wait(1):
            named = {"server": self.site.superlink} | {f"node {i}": node for i, node in enumerate(self.site.nodes)}
            self.samples.append((time.monotonic() - self._began, {name: lasting(p.pid) / 1e6 for name, p in named.items() if p}))

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        self.join()


def lasting(root: int) -> int:
    """The resident bytes of the process ``root`` and its descendants but those that live for one message.

    Not the proportional ones: a warm process shares its pages with the ClientApp that it forks, and they would halve meanwhile.
    """
    passing = {pid for pid in processes.tree(root) if called(pid) == PASSING}
    gone = {below for pid in passing for below in processes.tree(pid)}
    return sum(processes.alone(pid).rss for pid in processes.tree(root) if pid not in gone)


def called(pid: int) -> str:
    """What a process calls itself; nothing once it is gone."""
    try:
        return (processes.PROC / str(pid) / "comm").read_text().strip()
    except OSError:
        return ""


def flat(samples: list[tuple[float, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """For each process the median MB of the first and the last quarter of the time, and their ratio."""
    end, found = samples[-1][0], {}
    for name in samples[-1][1]:
        first, last = (
            statistics.median(mb[name] for t, mb in samples if low <= t / end <= high and mb.get(name)) for low, high in ((0.02, 0.27), (0.75, 1.0))
        )
        found[name] = {"first_mb": round(first, 1), "last_mb": round(last, 1), "ratio": round(last / first, 4)}
    return found


def accidents(site: Site, numbers: dict[str, int], rounds: int, stream: random.Random, over: threading.Event, log: list[dict]) -> None:
    """Let each kind of accident happen so often, each time in the first half of the round that follows one drawn beforehand."""
    due = sorted((r, what) for what, number in numbers.items() for r in stream.sample(range(1, rounds), number))
    for round, what in due:
        while written(site) < round and not over.is_set():
            time.sleep(0.1)
        time.sleep(stream.uniform(0, 0.5) * lasted(site))
        if over.is_set():
            return
        log.append({"round": written(site), "killed": (node := f"node {stream.randrange(site.plan.nodes)}") if what == "node" else what})
        print(f"  {log[-1]['killed']} is killed after round {log[-1]['round']}", flush=True)
        if what == "server":
            site.kill_superlink()
            while site.superlink is None and not over.is_set():  # whoever drives the run starts it again
                time.sleep(0.1)
        elif what == "network":
            processes.end(site.proxy, grace=0)
            time.sleep(10)
            site.start_proxy()
        else:
            site.kill(index := int(node.split()[1]))
            time.sleep(1)
            site.start(index)


def written(site: Site) -> int:
    """The rounds that the newest run has written."""
    return len(lines(site))


def lasted(site: Site) -> float:
    """The seconds of the quickest round that the newest run has written: others may have had an accident."""
    return min((json.loads(line)["seconds"] for line in lines(site)), default=0.0)


def lines(site: Site) -> list[str]:
    """The whole lines of the newest run's rounds."""
    runs = sorted(site.runs.glob("*/rounds.jsonl"))
    return [line for line in runs[-1].read_text().splitlines(keepends=True) if line.endswith("\n")] if runs else []


def soak(folder: Path, nodes: int, rounds: int, numbers: dict[str, int], seed: int, more: list[str]) -> dict[str, Any]:
    """The run with so many accidents of each kind; returns what was measured.

    Raises EngineError when the run cannot be brought to its end, and when there is no proxy whose end could cut the network.
    """
    kills = numbers["server"]
    words, over, log = [*SMALL.split(), f"rounds={rounds}", *more], threading.Event(), []
    with edge(folder, nodes, proxied=True if numbers["network"] else None, database=kills > 0) as site:
        watch = Watch(site)
        watch.start()
        fate = threading.Thread(target=accidents, args=(site, numbers, rounds, random.Random(seed), over, log), daemon=True)
        fate.start()
        began, resumed = time.monotonic(), 0
        try:
            while not (completed := attempt(site, words, resumed)) and (site.superlink is None or kills > resumed):
                resumed += 1
                site.start_superlink() if site.superlink is None else None
                site.await_nodes()
        finally:
            over.set()
            watch.stop()
        seconds = time.monotonic() - began
        if not completed:
            raise EngineError(f"the run must complete, but did not; see {folder / 'logs'}")
        (run,) = site.runs.glob("*/summary.json")
        rows = [json.loads(line) for line in (run.parent / "rounds.jsonl").read_text().splitlines()]
        summary = json.loads(run.read_text())
    return {
        "rounds": len(rows), "nodes": nodes, "seconds": round(seconds), "accidents": log, "resumed": resumed, "refused": summary["refused"],
        "median_round_seconds": round(statistics.median(row["seconds"] for row in rows), 2), "accuracy": summary["accuracy"],
        "memory": flat(watch.samples), "adapter": digest(load_adapter(run.parent / "adapter.safetensors")),
        "samples": [[round(t), {n: round(mb, 1) for n, mb in row.items()}] for t, row in watch.samples[:: max(1, len(watch.samples) // 200)]],
    }  # fmt: skip


def attempt(site: Site, words: list[str], resumed: int) -> bool:
    """Run, or go on with the run that there is; whether it came to its end."""
    runs = sorted(path.parent.name for path in site.runs.glob("*/config.yaml"))
    try:
        return site.run([*words, *([f"resume={runs[-1]}"] if resumed and runs else [])], show=False).completed
    except EngineError:  # the SuperLink is gone
        return False


def by_the_loop(folder: Path, nodes: int, rounds: int, more: list[str]) -> str:
    """The digest of the adapter that the plain loop makes of the same words and key."""
    config = load(shlex.join([*SMALL.split(), f"rounds={rounds}", *more, f"clients={nodes}", f"key={folder / 'key'}", f"output={folder / 'loop'}", f"state={folder / 'loop'}"]))
    loop.run(config, Journal(config, "loop"))
    return digest(load_adapter(folder / "loop" / "loop" / "adapter.safetensors"))


def main(arguments: list[str]) -> int:
    """The command. Returns 0, 4 for a run that failed, 6 for memory that grew or, under quorum=1.0, another adapter."""
    parser = argparse.ArgumentParser(prog="python -m simulations.soak", description=__doc__.splitlines()[0], allow_abbrev=False)
    for name, default in (("nodes", 3), ("rounds", 200), ("restarts", 8), ("kills", 0), ("cuts", 0), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="a folder for soak.json")
    options, more = parser.parse_known_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="veilora-soak-"))
    try:
        load(shlex.join([*SMALL.split(), *more]))
        numbers = {"node": options.restarts, "server": options.kills, "network": options.cuts}
        found = soak(folder, options.nodes, options.rounds, numbers, options.seed, more)
    except ConfigError as error:
        return loop.failed(error, 2)
    except EngineError as error:
        return loop.failed(error, 4)
    same = "quorum=1.0" not in more or found["adapter"] == by_the_loop(folder, options.nodes, options.rounds, more)
    steady = all(0.95 <= row["ratio"] <= 1.05 for row in found["memory"].values())
    found |= {"command": shlex.join(["python", "-m", "simulations.soak", *arguments]), "equals_the_loop": same if "quorum=1.0" in more else None, "environment": environment()}
    print(json.dumps({name: value for name, value in found.items() if name != "samples"}, indent=1))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "soak.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0 if same and (steady or options.kills) else 6


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
