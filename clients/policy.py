"""The policy of a node's owner: `policy.toml`, and its judgement of a run before anything of the run is opened.

    words of the run  →  a plain grammar (fl.overrides)  →  no places, only what [overrides] allows  →  the composed config  →  [run], [tell]

A missing file is the strict default, never "all". Every refusal has the name of a rule, as ``run.secure_aggregation``: the
coordinator is told that name alone, and the node's log has the rest.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from contextvars import ContextVar
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Iterator, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator

from fl import overrides
from fl.config import CONF, Config, ConfigError, load

PLACES = ("key", "seal_key", "node_key", "state", "output", "own", "nodes", "data.root", "model.weights")
"""Settings that are a machine's own: no policy lets a coordinator set them."""
ALLOWED = (
    "name", "seed", "rounds", "clients", "fraction", "evaluate_every", "evaluate_on", "validation", "personal", "diagnostics",
    "experiment", "model", "model.*", "data", "data.train", "data.test", "data.seed", "partition", "partition.*", "cipher",
    "method", "method.*", "strategy", "strategy.*", "codec", "codecs.*", "feedback", "blind", "seal.*", "tell.*", "start", "step",
    "precision", "attention", "threads", "image_keys", "recipe.*", "wait", "timeout", "quorum", "retries", "gate.*", "checkpoint.*",
    "resume",
)  # fmt: skip
LINEAR = (
    "fedadagrad", "fedadam", "fedavg", "fedavgm", "fedprox", "fedsa_lora", "fedsvd", "fedyogi", "ffa_lora", "local_only", "rolora",
    "scaffold",
)  # fmt: skip
"""Strategies that need no more than a sum, so that a secure run can have them."""

in_force: ContextVar[str] = ContextVar("policy", default="")
"""Sixteen digits of the policy by which this process's run was judged; "" in a simulation, where one person is every site."""


class PolicyError(ValueError):
    """A run that the owner of this node does not let in. ``rule`` names what it breaks and holds nothing of this machine."""

    def __init__(self, rule: str, says: str) -> None:
        super().__init__(f"{rule}: {says}")
        self.rule = rule


class Section(BaseModel):
    """A table of policy.toml: what it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class AtLeast(Section):
    """A lower bound."""

    min: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class AtMost(Section):
    """An upper bound."""

    max: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Code(Section):
    """Code: the bundle of a run must hold what is installed. In both modes that is what runs, and the bundle is only compared."""

    mode: Literal["installed", "signed"] = "installed"
    signers: list[str] = []        # Ed25519 public keys in base64, as `veilora release sign` prints them
    signature: str = ""            # the release signature's file, absolute


class Run(Section):
    """The bounds of a run."""

    secure_aggregation: bool = True                    # true: the server must not be able to read an update
    start: Literal["keyed", "public"] = "keyed"        # public: lets both
    cipher: str = "pixel_shuffle"
    methods: list[str] = list(overrides.options("method"))
    strategies: list[str] = list(LINEAR)
    optimizers: list[Literal["adamw", "sgd"]] = ["adamw", "sgd"]
    lr: AtMost = AtMost(max=0.1)                       # the largest peak of any group
    batch: AtLeast = AtLeast(min=16)                   # images
    epochs: AtMost = AtMost(max=5)                     # of a round
    deadline: AtLeast = AtLeast(min=60)                # seconds, where a run has one
    members: AtLeast = AtLeast(min=3)                  # clients in a sum that this one opens
    quorum: AtLeast = AtLeast(min=0.5)                 # of those asked, of whose sums numbers are told; 1: of all of them alone
    rounds: AtMost = AtMost(max=500)
    approve: Literal["any"] | list[str] = "any"        # or names of runs, and digests of configs as `veilora policy check` prints

    @field_validator("cipher", "methods", "strategies")
    @classmethod
    def _known(cls, names: str | list[str], info: Any) -> str | list[str]:
        group = {"cipher": "cipher", "methods": "method", "strategies": "strategy"}[info.field_name]
        for name in [names] if isinstance(names, str) else names:
            if name not in overrides.options(group):
                raise ValueError(f"must name {group} options of conf/, which has no {name!r}")
        return names


class Overrides(Section):
    """The settings that a run's words may name; NAME.* is all in NAME."""

    allow: list[str] = list(ALLOWED)


class Tell(Section):
    """Decimals, at most, of the numbers that leave."""

    loss: Annotated[int, Field(ge=0, le=6)] = 2
    accuracy: Annotated[int, Field(ge=0, le=6)] = 3


class Policy(Section):
    """The whole of policy.toml; what it leaves out is strict."""

    code: Code = Code()
    run: Run = Run()
    overrides: Overrides = Overrides()
    tell: Tell = Tell()

    def digest(self) -> str:
        """SHA-256, 64 hex digits: the same for two files that allow the same, however they are written."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


def parse(text: str) -> Policy:
    """The policy in ``text``, which is TOML. Raises PolicyError, of the rule ``file``."""
    try:
        return Policy.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise PolicyError("file", f"policy.toml must be TOML, and is not: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise PolicyError("file", f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r}") from None


def read(path: Path | None) -> Policy:
    """The policy in the file ``path``; the strict default where there is none. Raises PolicyError, of the rule ``file``."""
    try:
        return Policy() if path is None else parse(path.read_text())
    except FileNotFoundError:
        return Policy()
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError("file", f"{path} must be readable as text ({error}); a policy that cannot be read lets nothing in") from None


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
    for _ in _verdicts(Policy(), load("")):
        pass


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
