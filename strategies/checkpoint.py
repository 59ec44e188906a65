"""A run's checkpoints: after every round all that the server needs to go on, so that what resumes equals what never stopped.

    <run>/checkpoints/round-00007.safetensors     the strategy's state, moments and base changes in it; what each client has;
                                                  bytes so far. Cohorts are a function of seed and round and need no keeping
                      manifest.json               the checkpoints there are, each with its SHA-256: what is not in it is not there

The manifest is renamed into place last, and the one before it stays as ``manifest.before.json``. So a run that is killed at
any moment goes on after the last round that the manifest names. Under ``blind`` the state is sealed: useless without the key.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Callable, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from fl import durable
from fl.config import Config
from fl.durable import IntegrityError
from fl.tree import described, rebuilt

MANIFEST, BEFORE = "manifest.json", "manifest.before.json"
SCHEMA = 1


class Kept(NamedTuple):
    """One line of the manifest."""

    round: int
    file: str
    sha256: str
    accuracy: float | None


class Checkpoints:
    """The checkpoints in ``folder``: the newest ``last`` of them and the most accurate; what they say to a person goes to ``say``."""

    def __init__(self, folder: Path, config: Config, say: Callable[[str], None] = print) -> None:
        self.folder, self._config, self._say = folder, config, say
        self._kept: list[Kept] = []

    def commit(self, round: int, tree: Any, accuracy: float | None = None) -> None:
        """Keep ``tree`` as it stands after ``round``, whole or not at all; a disk that is full is said, and the run goes on."""
        every = self._config.checkpoint.every
        if not every or round % every and round != self._config.rounds:
            return
        try:
            shape, tensors = described(tree)
            content = save({n: t.detach().clone().contiguous() for n, t in tensors.items()}, {"shape": json.dumps(shape)})
            kept = Kept(round, f"round-{round:05}.safetensors", hashlib.sha256(content).hexdigest(), accuracy)
            self.folder.mkdir(parents=True, exist_ok=True)
            durable.write(self.folder / kept.file, content)
            self._write(chosen([k for k in self._kept if k.round < round] + [kept], self._config.checkpoint.last))
        except OSError as error:
            last = f"round {self._kept[-1].round}" if self._kept else "nothing"
            self._say(f"warning: the checkpoint of round {round} could not be written ({error.strerror}); make room: to resume there is {last}")
        except TypeError as error:
            self._say(f"warning: no checkpoint of round {round}, and the run cannot be resumed: {error}; see fl/tree.py")
        else:
            self._clear()

    def safe(self, round: int) -> int:
        """The round after which, at the earliest, the run could go on from ``round``: what clients keep of before is of no use."""
        if not self._config.checkpoint.every:
            return round - 1
        return self._kept[-self._config.checkpoint.last :][0].round if self._kept else 0

    def end(self) -> None:
        """Of a run that is done keep the last checkpoint and the most accurate."""
        try:
            if self._kept:
                self._write(chosen(self._kept, 1))
        except OSError:
            return  # more are kept, then
        self._clear()

    def newest(self) -> tuple[int, Any]:
        """The newest checkpoint that is as it was written, and its round; (0, None) where none was ever written.

        One that is damaged is said, and the one before it is taken. Raises IntegrityError when there are some and all are
        damaged.
        """
        self._kept = self._read()
        for kept in reversed(list(self._kept)):
            try:
                content = (self.folder / kept.file).read_bytes()
                if hashlib.sha256(content).hexdigest() != kept.sha256:
                    raise ValueError("its bytes are not those that were written")
                with safe_open(self.folder / kept.file, "pt") as file:
                    shape = json.loads(file.metadata()["shape"])
                tree = rebuilt(shape, load(content))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
                self._say(f"warning: the checkpoint of round {kept.round} is damaged ({error}); going back to the one before")
                self._kept.remove(kept)
                continue
            self._kept = [k for k in self._kept if k.round <= kept.round]
            return kept.round, tree
        if (self.folder / MANIFEST).exists() or (self.folder / BEFORE).exists():
            raise IntegrityError(f"a checkpoint must be as it was written, but none in {self.folder} is; start the run anew")
        return 0, None

    def _clear(self) -> None:
        for path in self.folder.glob("round-*.safetensors"):
            if path.name not in {k.file for k in self._kept}:
                path.unlink(missing_ok=True)

    def _write(self, kept: list[Kept]) -> None:
        said = {"schema": SCHEMA, "checkpoints": [k._asdict() for k in kept]}
        manifest = self.folder / MANIFEST
        if manifest.exists():
            durable.write(self.folder / BEFORE, manifest.read_bytes())
        durable.write(manifest, json.dumps(said, indent=2) + "\n")
        self._kept = kept

    def _read(self) -> list[Kept]:
        for name in (MANIFEST, BEFORE):
            try:
                said = json.loads((self.folder / name).read_text())
                if said["schema"] != SCHEMA:
                    raise ValueError("of another version")
                return [Kept(**line) for line in said["checkpoints"]]
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError):
                self._say(f"warning: {name} of the checkpoints is damaged; looking at the one before")
        return []


def chosen(kept: list[Kept], last: int) -> list[Kept]:
    """Of these the ``last`` newest and the most accurate, in the order of rounds."""
    best = max((k for k in kept if k.accuracy is not None), key=lambda k: k.accuracy, default=None)
    return [k for i, k in enumerate(kept) if i >= len(kept) - last or k is best]
