"""conf/ + overrides -> one validated config, the same on a laptop, on the server and on an edge node.

Words are judged before anything reads them (`fl.overrides`), Hydra composes the YAML, pydantic checks what every run has, and a
part of the system (a cipher, a dataset, a strategy) checks its own arguments by its builder's signature when `build` calls it.
The YAML's `_target_` is the only registry (`fl.builders`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Sequence, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from fl.adapter import GROUPS, Group
from fl.builders import PARTS, build, builders
from fl.overrides import CONF, ConfigError, OverrideError, Word, groups, near_miss, words
from fl.recipe import Recipe
from fl.sections import Checkpoint, Gate, Node, Seal, Tell

__all__ = ["CONF", "Config", "ConfigError", "Node", "OverrideError", "build", "load", "node", "setting_names"]

REFERENCE = re.compile(r"\$\{(\.+)(\w+)\}")
Record = TypeVar("Record", bound=BaseModel)
OWN = frozenset(  # what changes no result: places, and how patient whom is
    "key seal_key node_key output state own engine diagnostics device nodes keep wait timeout rank quorum retries gate checkpoint resume".split()
)


class Config(BaseModel):
    """One run. Parts (model, data, ...) stay mappings with a `_target_`; `build` turns them into objects."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(pattern=r"^[a-z0-9_-]{1,64}$")
    seed: int = Field(ge=0)
    rounds: int = Field(ge=1)
    clients: int = Field(ge=0)                 # 0: as many as the engine brings
    fraction: float = Field(gt=0, le=1)        # of the clients, trained in each round
    evaluate_every: int = Field(ge=1)          # rounds; the last round is always evaluated
    evaluate_on: Literal["test", "validation"]
    validation: float = Field(ge=0, lt=1)      # share of each client's training images held out
    personal: bool                             # evaluate each client's own model, too
    diagnostics: int = Field(ge=0)             # clients in a round, at most, whose updates are compared
    start: Literal["keyed", "public"]
    step: Literal["lean", "compiled", "plain"]
    precision: Literal["auto", "float32", "bfloat16"]
    attention: Literal["auto", "plain", "fused"]
    engine: Literal["ray", "inprocess"]        # what simulations.launch drives
    device: str = Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    threads: int = Field(ge=1)
    together: int = Field(ge=1)                # clients that the plain loop trains at once
    keep: float = Field(ge=0)                  # gigabytes of prepared images that a worker process keeps
    wait: float = Field(gt=0, allow_inf_nan=False)      # seconds for all nodes to come
    timeout: float = Field(gt=0, allow_inf_nan=False)   # seconds without any answer in a round
    quorum: float = Field(gt=0, le=1)          # of those asked, whose answers must be admitted
    retries: int = Field(ge=0)                 # of a round that was below the quorum
    gate: Gate
    checkpoint: Checkpoint
    resume: str | None = Field(default=None, pattern=r"^[a-z0-9_-]{1,128}$")   # the run in output to go on with
    key: str
    seal_key: str                              # read in blind runs alone
    image_keys: Literal["shared", "own"]       # whether all clients' pictures are encrypted with one key
    output: str
    state: str                                 # where a client keeps what outlives a round
    model: dict[str, Any]
    data: dict[str, Any]
    partition: dict[str, Any]
    cipher: dict[str, Any]
    method: dict[str, Any]
    strategy: dict[str, Any]
    codec: dict[str, Any]
    codecs: dict[Group, dict[str, Any]] = {}   # in codec's place, by group
    feedback: bool                             # add what a lossy codec lost to the next upload
    blind: bool                                # hide every update, and their sum, from the server; in the codec's place
    seal: Seal                                 # the fixed point in which a blind server adds
    tell: Tell                                 # how exact the numbers are that a blind server is told
    recipe: Recipe
    nodes: dict[int, Node] = {}
    rank: PositiveInt | None = None            # of this node's LoRA factors, in the place of the method's, which is the largest
    own: str | None = None                     # a folder that `veilora partition` wrote, in data's place
    node_key: str | None = None                # the node's own key, with which it signs the run's record

    @field_validator("key", "seal_key", "output", "state", "own", "node_key")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        if path is not None and not Path(path).expanduser().is_absolute():
            raise ValueError("must be absolute or start with ~, since an engine runs in a folder of its own")
        return path

    @model_validator(mode="after")
    def _pairs(self) -> Config:
        parts = [(part, part, getattr(self, part)) for part in PARTS] + [("codec", f"codecs.{name}", values) for name, values in self.codecs.items()]
        for part, place, values in parts:
            if values.get("_target_") not in builders(part):
                raise ConfigError(f"{place} must name a builder of conf/{part} in _target_, got {values.get('_target_')!r}; choose {part}=NAME", place)
        image, patch = self.model.get("image"), self.model.get("patch")
        for name, side in (("image", image), ("patch", patch)):
            if not isinstance(side, int) or side < 1:
                raise ConfigError(f"model.{name} must be a number of pixels, got {side!r}", f"model.{name}")
        if image % patch:
            raise ConfigError(f"model.image must be a multiple of model.patch, got image={image}, patch={patch}", "model.image", "model.patch")
        for part, name in (("data", "root"), ("model", "weights")):
            place = getattr(self, part).get(name, "/")
            if place not in ("hub", "none") and not Path(str(place)).expanduser().is_absolute():
                raise ConfigError(f"{part}.{name} must be absolute or start with ~, got {place!r}", f"{part}.{name}")
        largest = self.method.get("rank")
        for rank in (self.rank, *(node.rank for node in self.nodes.values())):
            if rank and largest is None:
                raise ConfigError(f"a rank of one's own needs a method with ranks, got rank={rank}; choose method=lora_patch", "rank", "method")
            if rank and isinstance(largest, int) and rank > largest:
                raise ConfigError(f"method.rank is the run's largest rank, got {largest} and a client's {rank=}; raise method.rank", "rank", "method.rank")
        if self.together > 1 and self.step == "plain":
            says = f"together needs the lean step, got together={self.together} and step={self.step}; set step=lean or together=1"
            raise ConfigError(says, "together", "step")
        if self.image_keys == "own" and self.start != "keyed":
            says = f"image keys of the clients' own need start=keyed, got start={self.start}; set start=keyed or image_keys=shared"
            raise ConfigError(says, "image_keys", "start")
        if self.evaluate_on == "validation" and not self.validation:
            raise ConfigError("evaluate_on=validation needs images to hold out; set validation=0.1 or so", "evaluate_on", "validation")
        return self

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    def digest(self) -> str:
        """Sixteen hex digits that two parties share exactly when they compute the same run (places may differ)."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:16]

    def canonical(self) -> str:
        """The values that all parties of a run must have alike, as one JSON text: always the same for the same values."""
        return json.dumps(self.shared(), sort_keys=True)

    def shared(self) -> dict[str, Any]:
        """What all parties of a run must have alike."""
        return self.shared_of(self.model_dump())

    @staticmethod
    def shared_of(values: dict[str, Any]) -> dict[str, Any]:
        """What all must have alike of a config that was written down."""
        shared = {k: v for k, v in values.items() if k not in OWN}
        for part, local in (("data", "root"), ("model", "weights")):
            shared[part] = {k: v for k, v in shared[part].items() if k != local}
        return json.loads(json.dumps(shared))

    def at_node(self, settings: Node) -> Config:
        """This config as one machine sees it: its own key file, data or partition folder, weights file, device, rank."""
        own = settings.model_dump(exclude_none=True)
        parts = {"data_root": ("data", "root"), "weights": ("model", "weights")}
        change = {k: v for k, v in own.items() if k not in parts}
        for name, (part, field) in parts.items():
            if name in own:
                if field in getattr(self, part):  # the demo's pictures need no folder
                    change[part] = getattr(self, part) | {field: own[name]}
        return _checked(self.model_dump() | change)


@lru_cache(maxsize=64)
def load(overrides: str = "") -> Config:
    """The config that ``overrides`` (one string of words, as typed in a shell; see `fl.overrides`) asks for. Raises ConfigError."""
    asked = words(overrides)
    try:
        tree = _composed([word.text for word in asked])
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: for a group set to what is no name
        raise ConfigError(_explain(" ".join(str(error).split()[:40]), asked), *(word.name for word in asked)) from None
    return _checked(_resolved(tree))


def node(settings: dict[str, Any]) -> Node:
    """One machine's settings, as it wrote them. Raises ConfigError."""
    return _checked(settings, Node)


@lru_cache(maxsize=1)
def setting_names() -> frozenset[str]:
    """The dotted name of every setting that a config can have: words that any machine may hear."""
    trees = {"": yaml.safe_load((CONF / "config.yaml").read_text())}
    trees |= {f"{part}.": yaml.safe_load(file.read_text()) for part in PARTS for file in (CONF / part).glob("**/*.yaml")}
    names = {name for prefix, tree in trees.items() for name in _paths(tree, prefix)}
    return frozenset({*names, *Config.model_fields, *(f"{part}.{group}" for part in ("recipe.lr", "codecs") for group in GROUPS)})


def _composed(texts: list[str]) -> dict[str, Any]:
    """`conf/` with the overrides that were judged. No resolver runs: what reads as an interpolation stays text."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return OmegaConf.to_container(compose("config", overrides=texts), resolve=False)


def _resolved(tree: dict[str, Any], above: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    """``tree`` with `conf/`'s own ``${.name}`` (beside it) and ``${..name}`` (one level up) in place. Raises ConfigError for any other $."""
    scopes = (tree, *above)

    def resolved(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _resolved(value, scopes)
        if isinstance(value, str) and (reference := REFERENCE.fullmatch(value)) and len(reference[1]) <= len(scopes):
            value = scopes[len(reference[1]) - 1].get(reference[2], value)
        if "$" in str(value):
            raise ConfigError(f"{name} must be a value, or a setting beside it as ${{.name}}, got {value!r}", str(name))
        return value

    return {name: resolved(name, value) for name, value in tree.items()}


def _checked(values: dict[str, Any], kind: type[Record] = Config) -> Record:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        got = "" if first["type"] == "missing" else f", got {first['input']!r}"
        named = getattr(first.get("ctx", {}).get("error"), "settings", ())
        raise ConfigError(f"{place}: {reason}{got}" if place else reason, *(named or (place,))) from None


def _explain(message: str, asked: Sequence[Word]) -> str:
    """Hydra's ``message``, or the nearest name that exists."""
    try:
        known = [*_paths(_composed([word.text for word in asked if word.name in groups()])), *groups()]
    except (HydraException, ValueError):  # it is an option that Hydra does not take
        return message
    for word in (w for w in asked if not w.text.startswith("+")):  # + adds a setting: it need not exist
        if word.name not in known:
            return f"unknown setting {word.name!r}{near_miss(difflib.get_close_matches(word.name, known, 1))}"
    return message


def _paths(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        yield prefix + str(key)
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")
