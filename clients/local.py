"""One client's work without Flower: open its partition, encrypt it, train on it, evaluate on it.

With a keyed start the patch embedding is in cipher order inside this process alone. An adapter that arrives is in plain
order; `_absorb` permutes its patch-embedding columns by the key, and `_release` puts them back before anything leaves.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import torch
from torch import Tensor

from clients import carried
from clients.augmented import augmented
from clients.holdings import Holdings, Share, holdings
from clients.shelf import SHELF
from clients.state import Drawer
from clients.workbench import Workbench, cipher_of, workbench
from fl import adapter as adapters
from fl import keys, seal_key
from fl.adapter import PATCH_EMBED, Adapter
from fl.ciphers import Cipher
from fl.config import Config, ConfigError
from fl.course import ROWS, Course, Prepare
from fl.datasets import Examples
from fl.datasets.images import resize
from fl.learn import Fitted, Score, evaluate, fit
from fl.models import fold
from fl.models.lora import rebase, take_rank
from fl.provenance import code_digest, versions
from fl.randomness import generator
from fl.recipe import Recipe

Trained = tuple[Adapter, int, dict[str, float]]
"""The difference of what trained and is sent from where it started, in plain order; the number of images; metrics."""


@dataclass(frozen=True, eq=False)
class Client:
    """Client ``index`` of ``of``, its parts opened. ``config`` is without its ``rank`` and ``own``: all clients share one model."""

    config: Config
    index: int
    of: int
    key: keys.SharedKey
    cipher: Cipher
    holdings: Holdings
    rank: int | None = None

    def __repr__(self) -> str:
        return f"Client({self.index} of {self.of}, key {self.key.fingerprint})"

    @property
    def seal_key(self) -> seal_key.SealKey:
        """The key that masks, tags, locks and all else of a blind run come from, as its file stands now: it ages."""
        return seal_key.read(Path(self.config.seal_key))

    @property
    def bench(self) -> Workbench:
        """The model, which a process keeps for the clients of one config."""
        return workbench(self.config, self.key, len(self.holdings.classes))

    def drawer(self, run: str) -> Drawer:
        """What this client keeps between the rounds of ``run``."""
        return Drawer(self.config.state, run, self.index)

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 (n, 3, h, w) as the source has them -> uint8 as the model reads them: resized, then encrypted."""
        return self.cipher.encrypt(resize(images, self.config.model["image"]))

    @property
    def augmented(self) -> tuple[Examples, Prepare]:
        """The training images before encryption, and what happens to a batch of them under ``recipe.augment``."""
        return augmented(self.config, self.cipher, self.holdings.train, self._name("spread"), lambda: self.plain)

    @property
    def plain(self) -> Examples:
        """The training images before encryption; what lies encrypted on the disk has the model's size already."""
        images, labels = self.holdings.train.examples()
        return Examples(self.cipher.decrypt(images) if self.holdings.encrypted else images, labels)

    @property
    def train(self) -> Examples:
        """The training images as the model reads them, prepared once while the shelf has room."""
        return self._ready("train", self.holdings.train)

    @property
    def held(self) -> Examples:
        """The images to evaluate on, as the model reads them."""
        return self._ready("held", self.shard)

    @property
    def shard(self) -> Share:
        """The images to evaluate on: the client's test shard, or what it held out."""
        return self.holdings.test if self.config.evaluate_on == "test" else self.holdings.validation

    def _ready(self, name: str, share: Share) -> Examples:
        def ready() -> Examples:
            images, labels = share.examples()
            return Examples(self.prepare(images), labels)

        if self.holdings.encrypted:
            return share.examples()
        return SHELF.get(self.config, self._name(name), ready)

    def _name(self, part: str) -> tuple[str, int, int, str]:
        return self.holdings.name, self.index, self.of, part


@lru_cache(maxsize=128)
def open_client(config: Config, index: int, of: int) -> Client:
    """Open client ``index`` (from 0) of ``of``, once in a process.

    Raises KeyFileError, DataError, WeightsError or ConfigError, each with one line that says what to do.
    """
    torch.set_num_threads(config.threads)
    rank = config.rank or config.method.get("rank")
    key = keys.read(Path(config.key))
    shared = config.model_copy(update={"rank": None, "own": None})
    cipher = cipher_of(shared, key)
    if config.start == "keyed" and cipher.absorb is None:
        raise ConfigError("start=keyed needs a cipher that the patch embedding can absorb; set start=public", "start", "cipher")
    held = holdings(config, index, of, key)
    client = Client(shared, index, of, key, cipher, held, rank)
    client.bench  # so that what is wrong with the weights is said now
    return client


def settle(client: Client, received: Adapter, run: str = "", span: Sequence[int] | None = None) -> Adapter:
    """Let the client's model stand on the base that a message means, and return the message without it.

    ``span`` is the rounds after which and up to which the base's change in the message is; None, that the base is the
    pristine one. To be called before `train` and `score`, since clients share a model. Raises `carried.Behind`.
    """
    own, control, steps = adapters.apart(received)
    whole = carried.settle(client.drawer(run), steps, *span) if span else {}
    rebase(client.bench.model, whole)
    return {**own, **adapters.ride("control", control)} if steps else received


class Task(NamedTuple):
    """Where one round of a client's training starts, in cipher order, what it reads, and the client's control variate."""

    start: Adapter
    course: Course
    variate: Adapter


def train(client: Client, round: int, recipe: Recipe, received: Adapter, scored: bool = False, run: str = "") -> Trained:
    """Train from ``received`` as ``recipe`` asks; what is to outlive the round is kept under the name of the ``run``.

    Metrics are loss, steps, seconds, and where the client's own model is to be ``scored`` on its shard own_loss, own_correct,
    own_examples.
    """
    began, bench, task = time.monotonic(), client.bench, begin(client, round, recipe, received, run)
    put(client, task.start)
    examples, stream, prepare, correction = task.course
    with adapters.only(bench.model, recipe.groups):
        fitted = fit(bench.model, examples, recipe, stream, prepare, bench.forward, correction)
    fold(bench.model)
    update, size, metrics = end(client, round, recipe, task, fitted, adapters.read(bench.model), run)
    return update, size, metrics | {"seconds": time.monotonic() - began} | (own_score(client) if scored else {})


def begin(client: Client, round: int, recipe: Recipe, received: Adapter, run: str) -> Task:
    """What a round of training needs; the model is not touched."""
    drawer, given = client.drawer(run), adapters.apart(received)
    start = _absorb(client, carried.start(drawer, round, recipe, client.bench.start, given.own))
    variate = carried.variate(drawer, round, given.control) if recipe.control else {}
    correction = _absorb(client, {n: c - variate[n] for n, c in recipe.sent(given.control).items()}) if recipe.control else None
    images, prepare = client.augmented if recipe.augment else (client.train, ROWS)
    return Task(start, Course(images, generator(client.config.seed, "train", round, client.index), prepare, correction), variate)


def end(client: Client, round: int, recipe: Recipe, task: Task, fitted: Fitted, whole: Adapter, run: str) -> Trained:
    """What is answered of the ``whole`` model, as training left it; of that what is to outlive the round is kept."""
    drawer, (trained, start) = client.drawer(run), (adapters.part(a, recipe.groups) for a in (whole, task.start))
    update = recipe.sent(_release(client, adapters.sub(trained, start)))
    if recipe.keep:
        carried.leave(drawer, round, recipe, _release(client, whole))
    if recipe.control:
        update = {**update, **carried.renew(drawer, round, task.variate, recipe.sent(_release(client, fitted.gradient)), client.of)}
    return update, client.holdings.train.size, {"loss": fitted.loss, "steps": fitted.steps}


def own_score(client: Client) -> dict[str, float]:
    """The model as it stands, on the client's own shard."""
    own = evaluate(client.bench.model, client.held, client.bench.forward)
    return {f"own_{name}": value for name, value in own._asdict().items()}


def score(client: Client, received: Adapter) -> Score:
    """Evaluate the adapter on the client's own encrypted shard."""
    put(client, _absorb(client, received))
    return evaluate(client.bench.model, client.held, client.bench.forward)


def roll(client: Client) -> dict:
    """The client's answer to the roll call, as `strategies.rollcall.Roll` names it: to a blind server no number of images."""
    config, train, held, faults = client.config, client.holdings.train.size, client.shard.size, client.holdings.faults
    return {
        "client": client.index,
        "of": client.of,
        "digests": {
            "code": code_digest(),
            "config": config.digest(),
            "key": client.key.fingerprint if config.image_keys == "shared" else "own",
            "seal": client.seal_key.fingerprint if config.blind else "",
            "backbone": client.bench.backbone,
            "classes": client.holdings.named(client.key if config.image_keys == "shared" else client.seal_key if config.blind else None),
            "split": client.holdings.digest,
            "start": adapters.digest(client.bench.start),
        },
        "train": None if config.blind else train,
        "evaluate": None if config.blind else held,
        "trained": adapters.count(client.bench.start),
        "full_bytes": client.bench.full_bytes,
        "faults": dict.fromkeys(faults, True) if config.blind else faults,
        "machine": f"torch {versions()['torch']} on {next(client.bench.model.parameters()).device.type}, {client.bench.speed}",
        "rank": client.rank,
    }


def put(client: Client, adapter: Adapter) -> None:
    """Set the model, at the rank of the ``adapter``, which is in cipher order."""
    take_rank(client.bench.model, adapter)
    adapters.write(client.bench.model, adapter)


def _absorb(client: Client, adapter: Adapter) -> Adapter:
    """From plain order, as it travels, to the order in which this client's model reads encrypted patches."""
    return _reorder(client, adapter, client.cipher.absorb)


def _release(client: Client, adapter: Adapter) -> Adapter:
    """Back to plain order: what leaves the client holds no key."""
    return _reorder(client, adapter, client.cipher.release)


def _reorder(client: Client, adapter: Adapter, move: Callable[[Tensor], Tensor]) -> Adapter:
    if client.config.start != "keyed" or PATCH_EMBED not in adapter:
        return adapter
    moved = adapters.flat(adapter)
    moved[PATCH_EMBED].copy_(move(adapter[PATCH_EMBED]))
    return moved
