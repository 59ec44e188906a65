"""The client's end of blind aggregation: it opens the sums, takes the strategy's step itself, and seals what leaves.

    mean_r = open(sum of round r)       state_r = strategy.apply(state_{r-1}, r, [one update: mean_r, of all its images])

That is the server's step, for a `linear` strategy needs no more than the sum, and every client takes the same one. So this
file alone among the clients' sees the strategies. Where a client stands outlives the round in its `Drawer`, as named
tensors. What it opens and seals is bound to the transcript of what it opened before (`fl.wire.transcript`), which it
computes itself: a server that names another round, config or history gets nothing that opens elsewhere.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from clients import local, tell, witness
from clients.carried import CONTROL, Behind
from clients.echo import Strangers, sounding, walk
from clients.keepsakes import final
from clients.notes import Notes
from clients.standing import STEP, Standing, keep, locked, octets_of, opening, recalled, start
from clients.units import flat, measured, shaped, units
from fl import adapter as adapters
from fl.adapter import Adapter, count
from fl.config import Config, build
from fl.randomness import derive
from fl.recipe import Recipe
from fl.wire.flat import Packed, WireError, pack, unpack
from fl.wire.masks import SealError, Terms, seal
from fl.wire.octets import octets
from fl.wire.sealed import Sealed, Total, total_of
from strategies import ClientInfo, Strategy, Update
from strategies.plan import cohort, fewest, orders, teller
from strategies.talk import enough

OCTETS = octets()
CUT = 1e-3     # share of values that may be clipped without a word in the log; no server is told
SHARD = 2**17  # images, at most, that a client is counted with in an evaluation
log = logging.getLogger("veilora.client")

Answer = tuple[dict[str, Any], Packed | None]


class Asked(NamedTuple):
    """An order as a client understands it: the recipe of a round, and from where it trains."""

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
    _of(facts, standing.round + 1)
    return Asked(standing, *orders(strategy_of(client.config), client.config, standing.state, standing.round + 1, info(client)))


def answer(client: local.Client, facts: Mapping[str, Any], asked: Asked, trained: local.Trained) -> Answer:
    """Seal what came of the training."""
    config, (update, examples, metrics), agreed = client.config, trained, terms(client)
    if examples > agreed.largest:
        log.warning("this client has more images than seal.largest=%d, and weighs as one of so many", agreed.largest)
    round, weight = asked.standing.round + 1, agreed.weight(examples) / agreed.largest
    values = flat(update, units(asked.standing.scale, asked.recipe, config.seal.bits, weight))
    chance = None if config.seal.bits == 32 else np.random.default_rng(derive(config.seed, "seal", round, client.index))
    bound = asked.standing.bound("train")
    sealed = seal(client.seal_key, bound, round, client.index, values, examples, metrics["loss"], agreed, chance)
    signed = witness.attest(client, facts, bytes(asked.standing.transcript.tolist()).hex())
    return signed, packed_of(sounding(client, str(facts["run"]), bound, round, sealed))


def evaluate(client: local.Client, facts: Mapping[str, Any], packed: Packed) -> Answer:
    """Follow the sums and evaluate the global adapter on the client's own shard; the score is sealed, too."""
    standing = stand(client, facts, packed)
    _of(facts, standing.round)
    score = local.score(client, strategy_of(client.config).view(standing.state))
    share, loss = np.float32([score.correct / score.examples]), score.loss / score.examples
    bound = standing.bound("evaluate")
    sealed = seal(client.seal_key, bound, standing.round, client.index, share, score.examples, loss, scores(client))
    return {}, packed_of(sounding(client, str(facts["run"]), bound, standing.round, sealed))


def report(client: local.Client, facts: Mapping[str, Any], packed: Packed, says: Callable[[Exception], str] = str) -> Answer:
    """Follow the sums, and tell what they say of all clients together, as far as `clients.tell` lets it; ``refused`` where
    one must not be believed, with what ``says`` of the error leaves this machine.

    Where it was asked to, the client locks its state for those who were away, and after the last round writes the adapter.
    """
    run = str(facts["run"])
    try:
        standing = stand(client, facts, packed)
        _of(facts, standing.round)
        said = tells(client, run, standing, unpack(packed, OCTETS))
    except SealError as error:
        log.warning("a sum is refused: %s", error)
        return {"refused": says(error)} | ({"strangers": error.clients} if isinstance(error, Strangers) else {}), None
    if facts.get("last") and standing.round == client.config.rounds:  # whatever the server calls the last
        said["kept"] = final(client, run, strategy_of(client.config).view(standing.state))
    if not facts.get("state"):
        return said, None
    return said, pack({"sealed.state": locked(client, run, standing)}, OCTETS)


def tells(client: local.Client, run: str, standing: Standing, came: Mapping[str, Tensor]) -> dict[str, float]:
    """The numbers of the scores' sum where one came, else of the last training's; none where they are not to be told."""
    config, round = client.config, standing.round

    def may(kind: str, members: Sequence[int], asked: Sequence[int]) -> bool:
        need, mine = max(config.seal.members, enough(config, len(asked))), teller(config, round, asked) == client.index
        return mine and tell.may(Notes(client.drawer(run)), kind, round, members, need)

    if "sealed.scores.payload" in came:
        total = total_of("scores", came)
        opened = opening(client, run, standing.bound("evaluate"), round, total, 1, scores(client))
        told = may("evaluate", [c for c, _ in total.members], range(client.of))
        return tell.evaluated(config.tell, float(opened.mean[0]), opened.loss, opened.images) if told else {}
    told = may("train", standing.members.tolist(), cohort(config, round, client.of))
    return tell.trained(config.tell, float(standing.told[0])) if told else {}


def close(client: local.Client, facts: Mapping[str, Any]) -> dict[str, str]:
    """Sign the end of the run's record with what this client stands on; nothing where it does not stand there."""
    try:
        standing = recalled(client, str(facts["run"]), int(facts["round"]), None, beginning(client, str(facts["run"])))
    except Behind:
        return {}
    return witness.attest(client, facts, bytes(standing.transcript.tolist()).hex())


def stand(client: local.Client, facts: Mapping[str, Any], packed: Packed) -> Standing:
    """Where the client stands after round ``upto``, having taken what came on top of where it stood after ``since``.

    Raises Behind when it stood elsewhere, SealError for what does not open or when too much did not, and WireError.
    """
    run, since, upto = str(facts["run"]), int(facts["since"]), int(facts["upto"])
    came, drawer = unpack(packed, OCTETS), client.drawer(run)
    drawer.tidy(int(facts.get("safe", 0)))
    standing = recalled(client, run, since, came.get("sealed.state"), beginning(client, run))
    for round in range(since + 1, upto + 1):
        standing = follow(client, run, standing, total_of(f"{round:05}", came))
        if client.index not in standing.members:
            drawer.forget(CONTROL, round)  # a share that is in no sum has not been given: the next one holds it
    walk(client, run, standing.path)
    if upto > since or "sealed.state" in came:
        keep(client, run, standing)
    return standing


def follow(client: local.Client, run: str, standing: Standing, total: Total) -> Standing:
    """Open the sum of the next round and take the strategy's step. Raises SealError."""
    config, strategy, round = client.config, strategy_of(client.config), standing.round + 1
    clients = [client for client, _ in total.members]
    if strangers := sorted(set(clients) - set(cohort(config, round, client.of))):
        raise SealError(f"the sum of round {round} must be of that round's cohort, got {strangers}, too")
    recipe, given = strategy.ask(standing.state, round, info(client))
    like = recipe.sent(given)
    opened = opening(client, run, standing.bound("train"), round, total, count(like), terms(client))
    unit = units(standing.scale, recipe, config.seal.bits, opened.images / config.seal.largest)
    step = shaped(opened.mean, like, unit)
    told = [opened.loss, opened.clipped / max(1, count(like)) / len(clients)]
    if told[1] > CUT:
        log.warning("%s: %.2g of the values in the sum of round %d were clipped; raise seal.clip", run, told[1], round)
    state, scale = strategy.apply(standing.state, round, [Update(0, step, opened.images, {})]), {**standing.scale, **measured(step)}
    return Standing(round, state, scale, torch.tensor(told, dtype=torch.float64), torch.tensor(clients), *standing.after(total))


@lru_cache(maxsize=8)
def strategy_of(config: Config) -> Strategy:
    """The strategy whose step this client takes."""
    return build(config.strategy, recipe=config.recipe)


def beginning(client: local.Client, run: str) -> Standing:
    """Where all clients stand before round 1 of ``run``."""
    state = strategy_of(client.config).init(client.bench.start)
    scale = {g: torch.tensor(0.0) for g in (*adapters.GROUPS, *adapters.RIDERS)}
    told, members, path = torch.zeros(2, dtype=torch.float64), torch.zeros(0, dtype=torch.int64), torch.zeros((0, STEP), dtype=torch.uint8)
    return Standing(0, state, scale, told, members, octets_of(start(client, run)), path)


def info(client: local.Client) -> ClientInfo:
    """This client as a server that is not blind would know it."""
    return ClientInfo(client.index, client.holdings.train.size, client.shard.size, client.rank)


def terms(client: local.Client) -> Terms:
    """The terms on which all clients seal updates."""
    agreed = client.config.seal
    most = len(cohort(client.config, 1, client.of))
    return Terms(agreed.bits, most, agreed.largest, agreed.clip, fewest(strategy_of(client.config), client.config, most))


def scores(client: local.Client) -> Terms:
    """The terms on which all clients seal evaluations; a unit is a correct answer."""
    return Terms(32, client.of, SHARD, Terms(32, client.of).limit / SHARD, client.config.seal.members)


def packed_of(sealed: Sealed) -> Packed:
    """A sealed message as it travels; who sent it, the server knows."""
    nonce, echo = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (sealed.nonce, sealed.echo))
    return pack({"sealed.nonce": nonce, "sealed.echo": echo, "sealed.payload": torch.from_numpy(sealed.payload)}, OCTETS)


def _of(facts: Mapping[str, Any], round: int) -> None:
    if facts.get("round") != round:
        raise WireError(f"an order must be of the round that follows from its sums, {round}, got {str(facts.get('round'))[:40]}")
