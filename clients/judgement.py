"""The judgement of a run by a node owner's policy, before anything of the run is opened: words first, then what they compose.

    words of the run  →  a plain grammar (fl.overrides)  →  no places, only what [overrides] allows  →  the composed config  →  [run], [tell]
"""

from __future__ import annotations

import hashlib
import re
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, Iterator

import yaml

from clients.policy import PLACES, Policy, PolicyError
from fl import overrides
from fl.config import CONF, Config, ConfigError, load

REHEARSED = "blind=true name=a seed=1 recipe.lr.head=1e-3"  # words of no run, to be judged before any run's

def judge(policy: Policy, text: str) -> Config:
    """The config that the words ``text`` compose, if the ``policy`` lets it in. Raises PolicyError."""
    judge_words(policy, text)
    try:
        config = load(text)
    except ConfigError as error:
        raise PolicyError("overrides.config", f"the words must compose a config: {error}") from None
    judge_config(policy, config)
    return config


def judge_words(policy: Policy, text: str) -> None:
    """Raise PolicyError unless every override in ``text`` is data, sets no place, and is one that may be set."""
    try:
        words = overrides.words(text)
    except overrides.OverrideError as error:
        raise PolicyError(f"overrides.{error.rule}", str(error)) from None
    for word in words:
        for name, value in _leaves(word.name, word.value):
            if any(within(name, place) for place in PLACES) and (name, value) != ("model.weights", "none"):
                raise PolicyError("overrides.places", f"{name} is this machine's own, and a run must not set it; leave it out")
            if not any(fnmatchcase(name, pattern) for pattern in policy.overrides.allow):
                raise PolicyError("overrides.allow", f"{name} must be among policy.toml's overrides.allow, or be left out")


def judge_config(policy: Policy, config: Config) -> None:
    """Raise PolicyError for the first rule of [run], [tell] or the places that the composed ``config`` breaks."""
    for rule, holds, got in _verdicts(policy, config):
        if not holds:
            raise PolicyError(rule, f"policy.toml does not let a run have {got}")


def _verdicts(policy: Policy, config: Config) -> Iterator[tuple[str, bool, str]]:
    """Each rule's name, whether it holds, and what the run has."""
    run, recipe, tell, own = policy.run, config.recipe, config.tell, load("")
    steepest = max(recipe.lr.values(), default=0.0)
    for place in (place for place in PLACES if "." not in place):
        yield "overrides.places", getattr(config, place) == getattr(own, place), f"another {place}"
    yield "overrides.places", config.data.get("root") in _written("data", "root"), "another data.root"
    yield "overrides.places", config.model.get("weights") in (*_written("model", "weights"), "none"), "another model.weights"
    yield "overrides.places", not set(":/\\") & set(str(config.model.get("name", ""))), "a model.name that is a place"
    yield "run.secure_aggregation", config.blind or not run.secure_aggregation, f"blind={config.blind}"
    yield "run.start", config.start == "keyed" or run.start == "public", f"start={config.start}"
    yield "run.cipher", config.cipher["_target_"] == _builder("cipher", run.cipher), "another cipher"
    yield "run.methods", config.method["_target_"] in [_builder("method", m) for m in run.methods], "this method"
    yield "run.strategies", config.strategy["_target_"] in [_builder("strategy", s) for s in run.strategies], "this strategy"
    yield "run.optimizers", recipe.optimizer in run.optimizers, f"recipe.optimizer={recipe.optimizer}"
    yield "run.lr", steepest <= run.lr.max, f"recipe.lr={steepest}"
    yield "run.batch", recipe.batch >= run.batch.min, f"recipe.batch={recipe.batch}"
    yield "run.epochs", recipe.epochs <= run.epochs.max, f"recipe.epochs={recipe.epochs}"
    yield "run.deadline", not recipe.deadline or recipe.deadline >= run.deadline.min, f"recipe.deadline={recipe.deadline}"
    yield "run.members", not config.blind or config.seal.members >= run.members.min, f"seal.members={config.seal.members}"
    yield "run.quorum", config.quorum >= run.quorum.min, f"quorum={config.quorum}"  # in no digest, so approval does not bind it
    yield "run.rounds", config.rounds <= run.rounds.max, f"rounds={config.rounds}"
    yield "tell.loss", tell.loss <= policy.tell.loss, f"tell.loss={tell.loss}"
    yield "tell.accuracy", tell.accuracy <= policy.tell.accuracy, f"tell.accuracy={tell.accuracy}"
    yield "run.approve", run.approve == "any" or any(approves(entry, config) for entry in run.approve), f"name={config.name}"


def approves(entry: str, config: Config) -> bool:
    """Whether an ``entry`` of run.approve means ``config``. What reads as a digest is none's name: a run could be named by it."""
    return entry == (config_sha256(config) if re.fullmatch(r"[0-9a-f]{64}", entry) else config.name)


def prepare() -> None:
    """Read once what every judgement reads: a process that is forked for one message then need not."""
    judge(Policy(), REHEARSED)


def config_sha256(config: Config) -> str:
    """SHA-256, 64 hex digits, of what all parties of a run have alike: what an owner approves."""
    return hashlib.sha256(config.canonical().encode()).hexdigest()


def within(name: str, place: str) -> bool:
    """Whether to set ``name`` is to set ``place`` or something in it, or all that it is in."""
    return name == place or name.startswith(f"{place}.")


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The settings that an override sets, one by one where its ``value`` is a mapping."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    else:
        yield name, value


@lru_cache(maxsize=256)
def _builder(group: str, name: str) -> str:
    return yaml.safe_load((CONF / group / f"{name}.yaml").read_text())["_target_"]


@lru_cache(maxsize=16)
def _written(group: str, name: str) -> tuple[Any, ...]:
    """The values of a setting in the files of a group; None where a file has none."""
    return tuple(yaml.safe_load((CONF / group / f"{option}.yaml").read_text()).get(name) for option in overrides.options(group))
