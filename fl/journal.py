"""What a run leaves behind, and what it shows while it runs.

    <output>/<run>/config.yaml         the resolved config
                   command.json        the overrides, and what drove the run, so that it can be resumed
                   environment.json    versions, machine, commit
                   rounds.jsonl        one line for each round
                   record.jsonl        the chain of digests of all this, signed by the nodes that have a key (fl/record.py)
                   summary.json        accuracy, bytes, seconds, ratio to full-model FedAvg
                   checkpoints/        from which a run that broke off is resumed (strategies/checkpoint.py)
                   adapter.safetensors the final global adapter, in plain order, and as base.<name> how the base has changed;
                                       of a blind run written by a client, and beside it
                   sealed.safetensors  what a blind server has: the sealed sums, from which who has the key gets all, until it steps
                   curve.svg           accuracy and loss by round, where they are known
                   preview.png         plain images above encrypted ones, unless they are encrypted at rest; and
                   split.json          who trains and tests on which image, where one client knows; and
                   classes.json        the classes' names: written by client 0, on its machine

Each file is written whole or not at all, so that a run can be killed at any moment. A folder is one process's at a time.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Sequence

from omegaconf import OmegaConf
from yaml import YAMLError

from fl import durable
from fl.adapter import Adapter, save
from fl.config import Config, ConfigError
from fl.curve import curve
from fl.provenance import environment
from fl.record import NAME, Record, digest

LEFT = ("config.yaml", "command.json", "environment.json", "curve.svg", "adapter.safetensors", "sealed.safetensors")
COUNTDOWN = 30  # seconds


class Journal:
    """The record of one run: lines on the screen and, once it has begun, files in ``folder`` (absolute, new).

    ``command`` is what resuming needs to know: by what the run is driven, and its overrides. A run that is to be resumed has a
    folder. Raises ConfigError when there is none, or when its config was another.
    """

    def __init__(self, config: Config, run: str, **command: str) -> None:
        self.config, self.run = config, config.resume or run
        self.folder = (Path(config.output).expanduser() / self.run).resolve()
        self.rounds: list[dict[str, Any]] = []
        self.record = Record(self.folder / NAME)
        self._lines, self._command = [], command
        self._began, self._waited, self._lock = time.monotonic(), 0.0, -1
        if config.resume:
            same_run(self.folder, config)

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end, once and for all."""
        return bool(self.config.resume) and (self.folder / "summary.json").exists()

    def begin(self, clients: int = 0, **first: Any) -> None:
        """Make the folder and write what is known before round 1, with what is ``first`` in the record; a run that cannot begin
        leaves nothing.

        Raises ConfigError while another process has the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which ends with the process, however that ends
        except BlockingIOError:
            self.close()
            raise ConfigError(f"a run's folder is one process's at a time, but another one is at work in {self.folder}; wait for it, or end it") from None
        if not self.config.resume:
            self._write("command.json", self._command | {"clients": clients})
            asked = OmegaConf.to_yaml(OmegaConf.create(self.config.model_dump()))
            files = digests(self.folder, ["command.json"]) | {"config.yaml": digest(asked)}
            self.record.add("begin", run=self.run, clients=clients, files=files, **{"signers": {}} | first)
            durable.write(self.folder / "config.yaml", asked)  # the last of these: with it a run can be resumed
        self._write("environment.json", environment() | self._earlier())

    def _earlier(self) -> dict[str, Any]:
        try:
            return {"resumed": json.loads((self.folder / "environment.json").read_text())} if self.config.resume else {}
        except (OSError, ValueError):
            return {}

    def rewind(self, round: int) -> None:
        """Of a run that is resumed keep the rows up to ``round``, after which it goes on."""
        if not self.config.resume:
            return
        lines = (self.folder / "rounds.jsonl").read_bytes().splitlines() if (self.folder / "rounds.jsonl").exists() else []
        for line in lines:
            try:
                row = json.loads(line)
                if row["round"] <= round:
                    self._lines.append(json.dumps(row, allow_nan=False) + "\n"), self.rounds.append(row)
            except (ValueError, KeyError, TypeError):
                self.say("warning: a line of rounds.jsonl cannot be read and is left out")
        self.record.reopen()
        self.record.add("resumed", after=round)
        durable.write(self.folder / "rounds.jsonl", "".join(self._lines))  # the rows that the record has from now on
        self.say(f"{self.run}: going on after round {round} of {self.config.rounds}")

    def say(self, line: str) -> None:
        """One line on the screen, over the progress line if there is one."""
        print(("\r\x1b[K" if sys.stdout.isatty() else "") + line, flush=True)

    def progress(self, line: str) -> None:
        """A passing line on a terminal; nothing elsewhere."""
        if sys.stdout.isatty():
            print(f"\r\x1b[K{line}", end="", flush=True)

    def waiting(self, line: str) -> None:
        """Who is waited for: a passing line on a terminal, and elsewhere, as in a log, one every COUNTDOWN seconds."""
        self.progress(line)
        if not sys.stdout.isatty() and time.monotonic() - self._waited > COUNTDOWN:
            self._waited = time.monotonic()
            self.say(line)

    def round(self, row: dict[str, Any], **more: Any) -> None:
        """Keep one round's row in rounds.jsonl, its digest and ``more`` in the record, and say it in a line with the time left.

        A full disk is no end of the run.
        """
        self._lines.append(json.dumps(row, allow_nan=False) + "\n")  # nan and inf are no JSON: the gate keeps them out
        self.rounds.append(row)
        try:
            self.record.add("round", round=row["round"], row=digest(self._lines[-1].rstrip("\n")), **more)
            durable.write(self.folder / "rounds.jsonl", "".join(self._lines))
        except OSError as error:
            self.say(f"warning: rounds.jsonl could not be written ({error.strerror}); make room: the next round tries again")
        done, total = row["round"], self.config.rounds
        left = sum(r["seconds"] for r in self.rounds) / done * (total - done)
        loss = f"train loss {row['train_loss']:.4f}" if "train_loss" in row else "train loss not told"
        test = f"  accuracy {row['accuracy']:6.2%}  loss {row['loss']:.4f}" if "accuracy" in row else ""
        self.say(
            f"round {done:>3}/{total}  {loss}{test}  "
            f"{len(row['cohort'])} clients  {row['seconds']:.1f} s" + (f"  about {span(left)} left" if done < total else "")
        )

    def finish(self, summary: dict[str, Any], adapter: Adapter, name: str = "adapter") -> dict[str, Any]:
        """Write what remains but the summary, the adapter under ``name``, and end the record. Returns the summary.

        Raises IntegrityError when the adapter cannot be written.
        """
        scored = [row for row in self.rounds if "accuracy" in row]  # a blind server may have been told of none
        last = scored[-1] if scored else {}
        summary = {
            "run": self.run,
            **{name: last.get(name) for name in ("accuracy", "loss", "accuracy_p10", "personal")},
            "best_accuracy": max((row["accuracy"] for row in scored), default=None),
            "evaluated_on": self.config.evaluate_on,
            "rounds": len(self.rounds),
            "seconds": round(sum(row["seconds"] for row in self.rounds) if self.config.resume else time.monotonic() - self._began, 3),
        } | summary
        try:
            save(adapter, self.folder / f"{name}.safetensors")
        except OSError as error:
            raise durable.IntegrityError(f"the final adapter could not be written ({error.strerror}); make room, and resume={self.run}") from None
        if scored:
            durable.write(self.folder / "curve.svg", curve([(row["round"], row["accuracy"], row["loss"]) for row in scored], self.run))
        count = f"{summary['examples']} " if summary["examples"] else ""
        self.say(f"accuracy {told(summary)} on {count}{self.config.evaluate_on} images of {summary['clients']} clients")
        if summary["personal"]:
            self.say(f"the clients' own models: {told(summary['personal'])}")
        sent = sum(summary["bytes_per_client_round"].values())
        self.say(f"sent: {sent / 1e3:,.1f} kB a client and round, both ways, {summary['ratio_to_full_fedavg']:.3%} of full-model FedAvg")
        if summary.get("refused"):
            self.say("left out: " + ", ".join(f"{count} x {code}" for code, count in summary["refused"].items()) + "; rounds.jsonl says whose and why")
        self.record.add("end", files=digests(self.folder, LEFT) | {"summary.json": digest(pretty(summary))})
        return summary

    def conclude(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write the ``summary`` and say where all lies; returns the summary."""
        self._write("summary.json", summary)  # the last, since it says that the run is done
        self.say(f"output: {self.folder}")
        return summary

    def close(self) -> None:
        """Let the folder go."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _write(self, name: str, value: Any) -> None:
        durable.write(self.folder / name, pretty(value))


def pretty(value: Any) -> str:
    """JSON for people. Raises ValueError for nan and inf, which are none."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """By name SHA-256 of those of these files that are in ``folder``."""
    return {name: digest((folder / name).read_bytes()) for name in names if (folder / name).exists()}


def same_run(folder: Path, config: Config) -> None:
    """Raise ConfigError, with what differs, unless ``config`` asks for the run that began in ``folder``."""
    try:
        written = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        theirs = flat(config.shared_of(written))
    except (OSError, AttributeError, KeyError, TypeError, YAMLError) as error:
        near = sorted(p.parent.name for p in folder.parent.glob("*/config.yaml"))[-3:]
        raise ConfigError(f"resume must name a run in {folder.parent}, got {folder.name!r} ({type(error).__name__}); the newest are {', '.join(near) or 'none'}") from None
    ours = flat(config.shared())
    differ = [f"{name} was {theirs.get(name)!r}, now {ours.get(name)!r}" for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    if differ:
        raise ConfigError(f"a run is resumed with the config that it began with, but {'; '.join(differ[:5])}{'; ...' if differ[5:] else ''}")


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The ends of a nested mapping under their paths, as in ``recipe.lr.head``."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def run_name(config: Config) -> str:
    """A new run's name: the config's, the moment, the seed."""
    return f"{config.name}-{datetime.now():%Y%m%d-%H%M%S-%f}-s{config.seed}"


def told(score: dict[str, Any]) -> str:
    """An accuracy over all images, and the tenth percentile of the clients' own where it is known."""
    least = score["accuracy_p10"]
    if score["accuracy"] is None:
        return "not told"
    return f"{score['accuracy']:.2%}" + ("" if least is None else f" (10th percentile of clients {least:.2%})")


def span(seconds: float) -> str:
    """A duration in words: seconds, or minutes from 90 seconds on."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
