"""What each round is, the same for every driver: who takes part, and which part of the run it covers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Callable, Iterable, Sequence

import torch

from fl.adapter import Adapter
from fl.config import CONF, Config, ConfigError, build, load
from fl.randomness import generator
from fl.recipe import Recipe
from fl.wire.sealed import ROOM
from strategies import ClientInfo, State, Strategy

ONE_RANK = ("lora_sb", "ravan")  # methods whose factors cannot be cut to a lower rank: between them is a matrix of their own


def cohort(config: Config, round: int, clients: int) -> list[int]:
    """The sorted client numbers that train in ``round`` (from 1): a draw from (seed, round) alone, at least one."""
    size = max(1, math.ceil(config.fraction * clients - 1e-9))
    order = torch.randperm(clients, generator=generator(config.seed, "cohort", round))
    return sorted(order[:size].tolist())


def enough(strategy: Strategy, config: Config, clients: int) -> None:
    """Raise ConfigError, before anybody trains, when a round has fewer clients than ``strategy`` needs."""
    got = len(cohort(config, 1, clients))
    if got < strategy.fewest:
        name = config.strategy["_target_"].rpartition(".")[2]
        raise ConfigError(
            f"{name} needs at least {strategy.fewest} clients in a round, got {got}; "
            "raise clients or fraction, or change its settings"
        )


def fewest(strategy: Strategy, config: Config, asked: int) -> int:
    """Messages that a secure sum must hold of ``asked`` clients: more than half, so that no two histories can both go on."""
    return max(strategy.fewest, config.seal.members, asked // 2 + 1)


def one_rank(strategy: Strategy, config: Config, clients: Iterable[ClientInfo]) -> None:
    """Raise ConfigError, before anybody trains, when ranks differ and ``strategy`` gives one to all, or when one cannot be."""
    largest = config.method.get("rank")
    for client in clients:
        if client.rank == largest:
            continue
        if client.rank not in range(1, largest or 1):
            raise ConfigError(f"client {client.client} must have a rank of at most the run's {largest}, got {client.rank!r}; raise method.rank")
        method = config.method["_target_"].rpartition(".")[2]
        if method in ONE_RANK:
            raise ConfigError(
                f"{method} has one rank for all, but client {client.client} has rank {client.rank} and the run {largest}; "
                "take its own rank away, or choose method=lora_patch or method=melo"
            )
        if not strategy.ranks:
            name = config.strategy["_target_"].rpartition(".")[2]
            raise ConfigError(
                f"{name} gives all clients one rank, but client {client.client} has rank {client.rank} and the run {largest}; "
                f"take its own rank away, or use strategy={'|'.join(_all_that(config, lambda s: s.ranks))}"
            )


def may_be_blind(strategy: Strategy, config: Config, clients: Sequence[ClientInfo]) -> None:
    """Raise ConfigError, before anybody trains, when the server could not do without what ``blind`` hides from it."""
    name = config.strategy["_target_"].rpartition(".")[2]
    if not strategy.linear:
        names = "|".join(_all_that(config, lambda s: s.linear))
        raise ConfigError(f"a blind server can add and nothing else, but {name} needs more; use strategy={names}, or blind=false")
    members, seal = len(cohort(config, 1, len(clients))), config.seal
    most = min(2 ** (seal.bits - 1) - 1, ROOM // seal.largest)
    if not seal.members <= members <= most:
        needs = f"seal.members={seal.members} to {most} clients at seal.bits={seal.bits} and seal.largest={seal.largest}"
        raise ConfigError(f"a blind round needs {needs}, got {members}; change clients, fraction or these")
    if len({client.rank for client in clients}) > 1:
        raise ConfigError("a blind server adds updates of one shape, but clients have different ranks; give all one, or use blind=false")


def _all_that(config: Config, holds: Callable[[Strategy], bool]) -> list[str]:
    names = sorted(path.stem for path in (CONF / "strategy").glob("*.yaml"))
    return [name for name in names if holds(build(load(f"strategy={name}").strategy, recipe=config.recipe))]


def orders(strategy: Strategy, config: Config, state: State, round: int, client: ClientInfo) -> tuple[Recipe, Adapter]:
    """What ``strategy`` asks of ``client``, with the recipe's place in the whole run filled in."""
    recipe, adapter = strategy.ask(state, round, client)
    return replace(recipe, span=((round - 1) / config.rounds, round / config.rounds)), adapter


def teller(config: Config, round: int, asked: Sequence[int]) -> int:
    """The one of the ``asked`` clients that tells a blind server the numbers of a round's sum; they take turns, and the first has the last round.

    One alone, whatever list of clients the server makes: numbers of two lists would tell a client's own by their difference.
    """
    return asked[(config.rounds - round) % len(asked)]


def evaluates(config: Config, round: int) -> bool:
    """Whether the global adapter is evaluated after ``round``; always after the last."""
    return round % config.evaluate_every == 0 or round == config.rounds


def scores_own(config: Config, round: int) -> bool:
    """Whether each client of ``round`` also evaluates its own model, as its training left it."""
    return config.personal and evaluates(config, round)
