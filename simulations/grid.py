"""A grid of runs: what its cells are, running them side by side, and the file in which the finished ones are kept.

A cell is ``{override key: value}``. Its line of cells.jsonl says what it was, how it ended, each round in a few numbers,
and which code on which machine; a place of the machine (where data and weights lie) is never in it.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import shlex
import signal
import statistics
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from clients.tell import LEAST
from fl import seal_key
from fl.config import Config, ConfigError, load
from fl.journal import Journal, run_name
from fl.provenance import environment
from simulations import loop
from strategies.history import is_training

PLACES = (  # of one machine: in no result, but by rounding
    "data.root", "model.weights", "key", "seal_key", "node_key", "output", "state", "own", "device", "threads", "together", "keep",
)  # fmt: skip
KEPT = (
    "accuracy", "loss", "seconds", "train_seconds", "ratio_to_full_fedavg", "trained_parameters", "bytes_per_client_round",
    "examples", "train_examples", "clients", "evaluated_on", "bytes", "machines",
)  # fmt: skip

Cell = dict[str, str]
Line = dict[str, Any]


def cells(arguments: Sequence[str]) -> list[Cell]:
    """The grid that Hydra overrides span, a comma-separated value being an axis; the last axis is the fastest.

    Raises ConfigError for what Hydra cannot read, and for a value with blanks, since blanks part the words of a cell's name.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(arguments))
    except HydraException as error:
        raise ConfigError(f"overrides must be as Hydra reads them: {' '.join(str(error).split())}") from None
    axes = []
    for text, override in zip(arguments, parsed):
        key, _, value = text.partition("=")
        values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [value]
        axes.append([(key, v if key in PLACES else close(key, v)) for v in values])
    return [dict(choice) for choice in itertools.product(*axes)]


def close(key: str, value: str) -> str:
    """``value`` without the blanks that mean nothing, those of a list or a mapping. Raises ConfigError for any other."""
    tight = value if set("\"'") & set(value) else re.sub(r"\s*([][{},:])\s*", r"\1", value.strip())
    if re.search(r"\s", tight):
        raise ConfigError(f"a value of a grid must have no blanks, got {key}={value}")
    return tight


def identity(cell: Mapping[str, str]) -> str:
    """What a cell is, whatever machine it runs on and in whatever order it was typed."""
    return " ".join(sorted(f"{k}={v}" for k, v in cell.items() if k not in PLACES))


@contextmanager
def configured(cell: Cell, folder: str) -> Iterator[Config]:
    """The config of a cell; where it names no others, output goes below ``folder``, and state and a seal key into one that ends
    with the block.

    A cell that broke off is run anew, so it writes no checkpoints.
    """
    with tempfile.TemporaryDirectory(prefix="veilora-state-") as state:
        places = {"output": folder, "state": state, "seal_key": f"{state}/seal.key", "checkpoint.every": "0"}
        seal_key.create(Path(state) / "seal.key")
        yield load(shlex.join(f"{k}={v}" for k, v in (places | cell).items()))


def named(line: Line) -> str:
    """`identity` of the cell that a line is of, in whatever order and with whatever places older code wrote it."""
    return identity(dict(word.split("=", 1) for word in line["cell"].split()))


def read(store: Path) -> list[Line]:
    """The finished cells; a line that was cut off in the middle is none."""
    return [json.loads(text) for text in store.read_text().splitlines() if text.endswith("}")] if store.exists() else []


def keep(store: Path, line: Line) -> None:
    """Add a finished cell, on a line of its own even after one that was cut off."""
    whole = not store.exists() or store.read_bytes()[-1:] in (b"", b"\n")
    with store.open("a") as file:
        file.write(("" if whole else "\n") + json.dumps(line) + "\n")


def missing(wanted: Sequence[Cell], lines: Sequence[Line]) -> list[Cell]:
    """The cells that no line is of, each once."""
    finished = {named(line) for line in lines}
    return list({identity(cell): cell for cell in wanted if identity(cell) not in finished}.values())


def check(wanted: Sequence[Cell]) -> None:
    """Raise ConfigError for the first cell whose config cannot be; of cells that differ in their seed alone one is tried."""
    seen: set[str] = set()
    for cell in wanted:
        new = {identity({k: v for k, v in cell.items() if k != "seed"}), f"seed={cell.get('seed')}"} - seen
        if new:
            config = load(shlex.join(f"{k}={v}" for k, v in cell.items()))
            if config.blind and (config.clients or 2) < LEAST:
                says = f"a cell of a grid needs an accuracy, and blind clients tell none of fewer than {LEAST}"
                raise ConfigError(f"{says}; raise clients, or set blind=false")
        seen |= new


def run_cell(cell: Cell, folder: str) -> Line:
    """Run one cell; its output goes below ``folder``. Returns its line."""
    with configured(cell, folder) as config:
        journal = Quiet(config, run_name(config))
        summary = loop.run(config, journal)
    scored = [row for row in journal.rounds if "accuracy" in row]
    origin = {k: v for k, v in environment().items() if k in ("machine", "gpu", "commit", "code")}
    return {
        "cell": identity(cell),
        **{name: summary[name] for name in KEPT},
        "curve": [[row["round"], row["accuracy"]] for row in scored],
        "client_accuracies": [compact(e["correct"] / e["examples"]) for e in (scored[-1] if scored else {}).get("evaluations", []) if e["examples"]],
        "rounds": rounds(journal.rounds),
        "places": sorted(set(cell) & {"data.root", "model.weights"}),
        **origin,
    }


def rounds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The history in a few numbers a round.

    ``mb`` is what one client of the cohort has sent and received for training until then, in 10^6 bytes; ``norms`` are
    medians over the clients. Accuracies are there in the rounds that were evaluated, diagnostics where they were kept.
    """
    kept, sent = [], 0.0
    for row in rows:
        sent += sum(sizes["total"] for name, sizes in row["bytes"].items() if is_training(name, row["bytes"])) / len(row["cohort"])
        personal = row.get("personal") or {}
        diagnostics = row.get("diagnostics") or {}
        groups = sorted({group for client in row["clients"] for group in client["norms"]})
        numbers = {
            "accuracy": row.get("accuracy"),
            "accuracy_p10": row.get("accuracy_p10"),
            "personal_accuracy": personal.get("accuracy"),
            "personal_p10": personal.get("accuracy_p10"),
            "mb": sent / 1e6,
            "seconds": row["seconds"],
            "train_seconds": row.get("train_seconds"),
        }
        kept.append(
            {"round": row["round"]}
            | {name: compact(value) for name, value in numbers.items() if value is not None}
            | ({"diagnostics": {name: compact(value) for name, value in diagnostics.items()}} if diagnostics else {})
            | {"norms": {g: compact(statistics.median(c["norms"][g] for c in row["clients"] if g in c["norms"])) for g in groups}}
        )
    return kept


def compact(value: float) -> float:
    """Six significant digits: more would only fill the file."""
    return float(f"{value:.6g}")


class Quiet(Journal):
    """A journal that writes and does not speak."""

    def say(self, line: str) -> None:
        pass

    progress = say


def run_side_by_side(todo: Sequence[Cell], jobs: int, folder: str) -> Iterator[tuple[Cell, Line | Exception]]:
    """Run the cells in ``jobs`` processes; yields each with its line, or with what it failed by, as they end.

    The processes take the machine's GPUs in turn. None outlives this process, whichever way it ends.
    """
    context = multiprocessing.get_context("spawn")
    shares = context.SimpleQueue()
    devices = visible_gpus()
    for i in range(jobs):
        shares.put(devices[i % len(devices)] if devices else None)
    with ProcessPoolExecutor(jobs, context, _begin_worker, (shares,)) as pool:
        futures = {pool.submit(run_cell, cell, folder): cell for cell in todo}
        try:
            for done in as_completed(futures):
                yield futures[done], done.exception() or done.result()
        except BaseException:  # Ctrl-C, or the caller wants no more: stop now, not when the cells have ended
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _begin_worker(shares: Any) -> None:
    """Take a GPU, leave Ctrl-C to the parent, and end when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if (device := shares.get()) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named or [str(i) for i in range(torch.cuda.device_count())]


def room(wanted: Sequence[Cell]) -> int:
    """How many cells fit side by side: one a GPU, or as many as the cores hold at the cells' own ``threads``."""
    threads = max((int(cell.get("threads", 1)) for cell in wanted), default=1)
    return len(visible_gpus()) or max(1, len(os.sched_getaffinity(0)) // threads)
