"""The policy of a node's owner, `policy.toml`: what it lets a coordinator ask. `clients.judgement` holds a run against it.

A missing file is the strict default, never "all". Every refusal has the name of a rule, as ``run.secure_aggregation``: the
coordinator is told that name alone, and the node's log has the rest.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fl import overrides

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
