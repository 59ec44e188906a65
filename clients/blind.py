"""The client's end of blind aggregation: it opens the sums, takes the strategy's step itself, and seals what leaves.

    mean_r = open(sum of round r)       state_r = strategy.apply(state_{r-1}, r, [one update: mean_r, of all its images])

That is the server's step, for a `linear` strategy needs no more than the sum, and every client takes the same one. So this
file alone among the clients' sees the strategies. Where a client stands outlives the round in its `Drawer`, as named
tensors. A narrow word has few steps, so with one each group's values are sealed in units of its scale s: SPREAD times the
root mean square of what the sum before opened to, which all clients know alike; at first FIRST times its learning rate.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Mapping, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clients import local
from clients.carried import CONTROL, Behind
from clients.keepsakes import final
from clients.state import StateError
from fl import adapter as adapters
from fl.adapter import Adapter, count, group, ordered
from fl.config import Config, build
from fl.randomness import derive
from fl.recipe import Recipe
from fl.tree import named, nested
from fl.wire.flat import Packed, pack, unpack
from fl.wire.locked import lock, unlock
from fl.wire.masks import SealError, Terms, open_total, seal
from fl.wire.octets import octets
from fl.wire.sealed import Sealed, Total, total_of
from strategies import ClientInfo, Strategy, Update
from strategies.plan import cohort, orders

OCTETS = octets()
STANDING = "standing"   # the file's name
SPREAD, FIRST = 8.0, 4.0
SHARD = 2**17           # images, at most, that a client is evaluated on

Answer = tuple[dict[str, Any], Packed | None]


class Standing(NamedTuple):
    """After which round a client stands; the strategy's state; by group the root mean square of the last step; and what
    the last sum told: the mean training loss, the share of values that were clipped."""

    round: int
    state: Any
    scale: Mapping[str, Tensor]
    told: Tensor


class Asked(NamedTuple):
    """What a client is to train in a round, and from where."""

    standing: Standing
    recipe: Recipe
    given: Adapter


def train(client: local.Client, facts: Mapping[str, Any], packed: Packed) -> Answer:
    """Follow the sums, train as the strategy asks, and seal the difference."""
    asked = ask(client, facts, packed)
    return answer(client, facts, asked, local.train(client, int(facts["round"]), asked.recipe, asked.given, False, str(facts["run"])))


def ask(client: local.Client, facts: Mapping[str, Any], packed: Packed) -> Asked:
    """Follow the sums to what the strategy asks."""
    standing = stand(client, facts, packed)
    return Asked(standing, *orders(strategy_of(client.config), client.config, standing.state, int(facts["round"]), info(client)))


def answer(client: local.Client, facts: Mapping[str, Any], asked: Asked, trained: local.Trained) -> Answer:
    """Seal what came of the training."""
    config, (update, examples, metrics) = client.config, trained
    run, round, weight = str(facts["run"]), int(facts["round"]), examples / config.seal.largest
    values = flat(update, units(asked.standing, asked.recipe, config, weight))
    chance = None if config.seal.bits == 32 else np.random.default_rng(derive(config.seed, "seal", round, client.index))
    sealed = seal(client.key, run, round, client.index, values, examples, metrics["loss"], terms(client), chance)
    return {}, packed_of(sealed)


def evaluate(client: local.Client, facts: Mapping[str, Any], packed: Packed) -> Answer:
    """Follow the sums and evaluate the global adapter on the client's own shard; the score is sealed, too."""
    standing = stand(client, facts, packed)
    score = local.score(client, strategy_of(client.config).view(standing.state))
    share, loss = np.float32([score.correct / score.examples]), score.loss / score.examples
    sealed = seal(client.key, scoring(facts), int(facts["round"]), client.index, share, score.examples, loss, scores(client))
    return {}, packed_of(sealed)


def report(client: local.Client, facts: Mapping[str, Any], packed: Packed) -> Answer:
    """Follow the sums, and tell what they say of all clients together; ``refused`` where one must not be believed.

    Where it was asked to, the client locks its state for those who were away, and after the last round writes the adapter.
    """
    run, round = str(facts["run"]), int(facts["round"])
    try:
        standing = stand(client, facts, packed)
        said = {name: told for name, told in zip(("train_loss", "clipped"), standing.told.tolist()) if told == told}
        if "sealed.scores.payload" in (came := unpack(packed, OCTETS)):
            total = total_of("scores", came)
            if len(total.members) < 2:
                raise SealError("a score is told of two clients or more, since of one it is that client's own")
            opened = open_total(client.key, scoring(facts), round, total, 1, scores(client))
            said |= {"accuracy": float(opened.mean[0].round(6)), "loss": opened.loss}
    except SealError as error:
        return {"refused": str(error)}, None
    if facts.get("last") and standing.round == client.config.rounds:  # whatever the server calls the last
        said["kept"] = final(client, run, strategy_of(client.config).view(standing.state))
    return said, pack({"sealed.state": lock(client.key, run, round, named(tree(standing)))}, OCTETS) if facts.get("state") else None


def stand(client: local.Client, facts: Mapping[str, Any], packed: Packed) -> Standing:
    """Where the client stands after round ``upto``, having taken what came on top of where it stood after ``since``.

    Raises Behind when it stood elsewhere, SealError for what does not open, and WireError.
    """
    run, since, upto = str(facts["run"]), int(facts["since"]), int(facts["upto"])
    came, drawer = unpack(packed, OCTETS), client.drawer(run)
    drawer.tidy(int(facts.get("safe", 0)))
    first = beginning(client.config, client.bench.start)
    if "sealed.state" in came:
        standing = first._replace(**nested(tree(first), unlock(client.key, run, since, came["sealed.state"])))
    elif since:
        try:
            found = drawer.recall(STANDING, since)
        except StateError:
            found = None
        if found is None or found[0] != since:
            raise Behind(f"client {client.index} does not stand after round {since}")
        standing = first._replace(**nested(tree(first), found[1]))
    else:
        standing = first
    sums = {r: total_of(f"{r:05}", came) for r in range(since + 1, upto + 1) if f"sealed.{r:05}.payload" in came}
    for round, total in sums.items():
        standing = follow(client, run, round, standing, total)
    for round in range(since + 1, upto + 1):
        if client.index not in dict(sums[round].members if round in sums else ()):
            drawer.forget(CONTROL, round)  # a share that is in no sum has not been given: the next one holds it
    if upto > since or "sealed.state" in came:
        drawer.keep(STANDING, upto, named(tree(standing)))
    return standing._replace(round=upto)


def follow(client: local.Client, run: str, round: int, standing: Standing, total: Total) -> Standing:
    """Open the sum of ``round`` and take the strategy's step. Raises SealError."""
    config, strategy = client.config, strategy_of(client.config)
    recipe, given = strategy.ask(standing.state, round, info(client))
    like = recipe.sent(given)
    opened = open_total(client.key, run, round, total, count(like), terms(client))
    step = shaped(opened.mean, like, units(standing, recipe, config, opened.images / config.seal.largest))
    state = strategy.apply(standing.state, round, [Update(0, step, opened.images, {})])
    scale = {g: torch.tensor(adapters.norm(part(step, g)) / count(part(step, g)) ** 0.5) for g in adapters.groups(step)}
    told = torch.tensor([opened.loss, opened.clipped / max(1, count(like)) / len(total.members)], dtype=torch.float64)
    told = told if len(total.members) > 1 else told * torch.nan  # one client's own numbers are not for telling
    return Standing(round, state, {**standing.scale, **scale}, told)


@lru_cache(maxsize=8)
def strategy_of(config: Config) -> Strategy:
    """The strategy whose step this client takes."""
    return build(config.strategy, recipe=config.recipe)


def beginning(config: Config, start: Adapter) -> Standing:
    """Where all clients stand before round 1."""
    state = strategy_of(config).init(start)
    scale = {g: torch.tensor(0.0) for g in (*adapters.GROUPS, *adapters.RIDERS)}
    return Standing(0, state, scale, torch.zeros(2, dtype=torch.float64))


def tree(standing: Standing) -> dict[str, Any]:
    """What of it is written down; the round is in the file's name."""
    return {"state": standing.state, "scale": standing.scale, "told": standing.told}


def units(standing: Standing, recipe: Recipe, config: Config, weight: float) -> Mapping[str, float]:
    """By group, what 1 stands for in a sealed value.

    What a client is not to be weighted by its images in, SCAFFOLD's variates, is divided by its ``weight`` beforehand.
    """
    wide = config.seal.bits == 32
    rates = {g: 1.0 if wide else SPREAD * float(s) or FIRST * recipe.lr.get(g, 0.25) or 1.0 for g, s in standing.scale.items()}
    return {**rates, "control": rates["control"] * weight}


def flat(update: Adapter, unit: Mapping[str, float]) -> np.ndarray:
    """float32 (n,): the values of ``update`` in their units, in the order of the wire."""
    parts = [update[n].detach().reshape(-1).numpy() / np.float32(unit[group(n)]) for n in ordered(update)]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def shaped(values: np.ndarray, like: Adapter, unit: Mapping[str, float]) -> Adapter:
    """What `flat` made flat, with the names and shapes of ``like``."""
    names = ordered(like)
    parts = torch.from_numpy(values).split([like[n].numel() for n in names])
    return {n: p.reshape(like[n].shape) * unit[group(n)] for n, p in zip(names, parts)}


def part(step: Adapter, chosen: str) -> Adapter:
    """The tensors of one group."""
    return {n: t for n, t in step.items() if group(n) == chosen}


def info(client: local.Client) -> ClientInfo:
    """What the server would know of this client, were it not blind."""
    return ClientInfo(client.index, client.holdings.train.size, client.shard.size, client.rank)


def terms(client: local.Client) -> Terms:
    """What all clients agree on for updates."""
    seal_ = client.config.seal
    return Terms(seal_.bits, len(cohort(client.config, 1, client.of)), seal_.largest, seal_.clip)


def scores(client: local.Client) -> Terms:
    """What all clients agree on for evaluations."""
    return Terms(32, client.of, SHARD, Terms(32, client.of).limit / SHARD)  # a unit is a correct answer


def scoring(facts: Mapping[str, Any]) -> str:
    """The run's name in the masks of evaluations."""
    return f"{facts['run']} scores"


def packed_of(sealed: Sealed) -> Packed:
    """A sealed message as it travels; who sent it, the server knows."""
    nonce = torch.frombuffer(bytearray(sealed.nonce), dtype=torch.uint8)
    return pack({"sealed.nonce": nonce, "sealed.payload": torch.from_numpy(sealed.payload)}, OCTETS)
