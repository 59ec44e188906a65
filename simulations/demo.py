"""The first run: a federation on encrypted pictures by `flwr run`, three others to compare it with, one table.

    python -m simulations.demo

Makes a key where there is none. The others run on Flower's Grid in this process, which gives the same to the byte and spares
three starts of an engine. The bytes are those of serialised messages; `full` is measured, not computed.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

from fl import keys
from fl.config import load
from simulations.inprocess import run_apps
from simulations.launch import EngineError, engine

ROWS = {  # experiment: what the table calls it
    "keyed": "lora_patch, keyed start",
    "public": "lora_patch, public start",
    "melo": "melo, public start",
    "full": "full, public start",
}


def main() -> int:
    """The command. Returns 0, or 4 when a run failed, 2 when the key cannot be used."""
    began = time.monotonic()
    key, output = (Path(place).expanduser() for place in (load("").key, load("").output))
    try:
        print(f"key {key}: fingerprint {(keys.read(key) if key.exists() else keys.create(key)).fingerprint}", flush=True)
    except keys.KeyFileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=time.strftime("demo-%Y%m%d-%H%M%S-"), dir=output))
    try:
        for name, title in ROWS.items():
            main_job = name == "keyed"
            print(f"\n{title}, encrypted pictures, {'by flwr run' if main_job else 'in process'}:", flush=True)
            words = [f"experiment=demo/{name}", f"name={name}", f"output={folder}"]
            if not (by_flwr_run(words) if main_job else run_apps(2, shlex.join(words)) == 0):
                print("error: the run failed; its reason stands above", file=sys.stderr)
                return 4
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    print(table(folder))
    print(f"output: {folder}   ({time.monotonic() - began:.0f} s)")
    return 0


def by_flwr_run(words: list[str]) -> bool:
    """`flwr run` with two clients on an engine of its own. Returns whether the run completed."""
    with engine() as own:
        return own.run(2, min(2, os.cpu_count() or 1), words)


def table(folder: Path) -> str:
    """The runs below ``folder`` side by side; bytes are one client's in one round of training, both ways together."""
    found = {name: json.loads(next(folder.glob(f"{name}-*/summary.json")).read_text()) for name in ROWS}
    full = sum(found["full"]["bytes_per_client_round"].values())
    lines = ["", f"{'on encrypted pictures':<26}{'accuracy':>10}{'trained':>10}{'kB a round':>12}{'of full':>9}"]
    for name, title in ROWS.items():
        size = sum(found[name]["bytes_per_client_round"].values())
        trained = f"{found[name]['trained_parameters']:,}"
        lines.append(f"{title:<26}{found[name]['accuracy']:>10.1%}{trained:>10}{size / 1000:>12.1f}{size / full:>9.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
