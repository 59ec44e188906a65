"""What each round is, the same for every driver: who takes part, and which part of the run it covers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Iterable

import torch

from fl.adapter import Adapter
from fl.config import CONF, Config, ConfigError, build, load
from fl.randomness import generator
from fl.recipe import Recipe
from strategies import ClientInfo, State, Strategy


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


def one_rank(strategy: Strategy, config: Config, clients: Iterable[ClientInfo]) -> None:
    """Raise ConfigError, before anybody trains, when ranks differ and ``strategy`` gives one to all."""
    largest = config.method.get("rank")
    other = next((c for c in clients if c.rank != largest), None)
    if strategy.ranks or other is None:
        return
    name = config.strategy["_target_"].rpartition(".")[2]
    names = sorted(path.stem for path in (CONF / "strategy").glob("*.yaml"))
    able = [n for n in names if build(load(f"strategy={n}").strategy, recipe=config.recipe).ranks]
    raise ConfigError(
        f"{name} gives all clients one rank, but client {other.client} has rank {other.rank} and the run {largest}; "
        f"take its own rank away, or use strategy={'|'.join(able)}"
    )


def orders(strategy: Strategy, config: Config, state: State, round: int, client: ClientInfo) -> tuple[Recipe, Adapter]:
    """What ``strategy`` asks of ``client``, with the recipe's place in the whole run filled in."""
    recipe, adapter = strategy.ask(state, round, client)
    return replace(recipe, span=((round - 1) / config.rounds, round / config.rounds)), adapter


def evaluates(config: Config, round: int) -> bool:
    """Whether the global adapter is evaluated after ``round``; always after the last."""
    return round % config.evaluate_every == 0 or round == config.rounds


def scores_own(config: Config, round: int) -> bool:
    """Whether each client of ``round`` also evaluates its own model, as its training left it."""
    return config.personal and evaluates(config, round)
