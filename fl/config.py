"""conf/ + overrides -> one validated config, the same on a laptop, on the server and on an edge node.

Hydra composes the YAML, pydantic checks what every run has, and a part of the system (a cipher, a dataset, a strategy)
checks its own arguments by its builder's signature when `build` calls it. The YAML's `_target_` is the only registry.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import shlex
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Literal, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator, validate_call

from fl.adapter import Group
from fl.recipe import Recipe
from fl.sections import Checkpoint, Gate, Node, Seal, Tell

CONF = Path(__file__).resolve().parents[1] / "conf"
Record = TypeVar("Record", bound=BaseModel)
OWN = frozenset(  # what changes no result: places, and how patient whom is
    "key seal_key output state own engine diagnostics device nodes keep wait timeout rank quorum retries gate checkpoint resume".split()
)


class ConfigError(ValueError):
    """A config that cannot run: one line that says what must hold, what was got and what to do."""


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

    @field_validator("key", "seal_key", "output", "state", "own")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        if path is not None and not Path(path).expanduser().is_absolute():
            raise ValueError("must be absolute or start with ~, since an engine runs in a folder of its own")
        return path

    @model_validator(mode="after")
    def _pairs(self) -> Config:
        for part in ("model", "data", "partition", "cipher", "method", "strategy", "codec"):
            if not isinstance(getattr(self, part).get("_target_"), str):
                raise ValueError(f"{part} must name its builder in _target_; choose {part}=NAME")
        image, patch = self.model.get("image"), self.model.get("patch")
        for name, side in (("image", image), ("patch", patch)):
            if not isinstance(side, int) or side < 1:
                raise ValueError(f"model.{name} must be a number of pixels, got {side!r}")
        if image % patch:
            raise ValueError(f"model.image must be a multiple of model.patch, got image={image}, patch={patch}")
        for part, name in (("data", "root"), ("model", "weights")):
            place = getattr(self, part).get(name, "/")
            if place not in ("hub", "none") and not Path(str(place)).expanduser().is_absolute():
                raise ValueError(f"{part}.{name} must be absolute or start with ~, got {place!r}")
        largest = self.method.get("rank")
        for rank in (self.rank, *(node.rank for node in self.nodes.values())):
            if rank and largest is None:
                raise ValueError(f"a rank of one's own needs a method with ranks, got rank={rank}; choose method=lora_patch")
            if rank and isinstance(largest, int) and rank > largest:
                raise ValueError(f"method.rank is the run's largest rank, got {largest} and a client's {rank=}; raise method.rank")
        if self.together > 1 and self.step == "plain":
            raise ValueError(f"together needs the lean step, got together={self.together} and step={self.step}; set step=lean or together=1")
        if self.image_keys == "own" and self.start != "keyed":
            raise ValueError(f"image keys of the clients' own need start=keyed, got start={self.start}; set start=keyed or image_keys=shared")
        if self.evaluate_on == "validation" and not self.validation:
            raise ValueError("evaluate_on=validation needs images to hold out; set validation=0.1 or so")
        return self

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    def digest(self) -> str:
        """Sixteen hex digits that two parties share exactly when they compute the same run (places may differ)."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:16]

    def canonical(self) -> str:
        """What all parties of a run must have alike, as one JSON text: always the same for the same values."""
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
    """The config that ``overrides`` (one Hydra override string, as typed in a shell) asks for. Raises ConfigError."""
    try:  # a shell leaves ~ after = as it is, and Hydra reads it in quotes alone
        words = [re.sub(r"=(~[\w./-]*)$", r"='\1'", word) for word in shlex.split(overrides)]
    except ValueError as error:
        raise ConfigError(f"overrides must read like a shell command line, got {overrides!r}: {error}") from None
    try:
        GlobalHydra.instance().clear()
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            composed = OmegaConf.to_container(compose("config", overrides=words), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(str(error), words)) from None
    except ValueError as error:  # Hydra's, for a group set to what is no name
        raise ConfigError(f"overrides must be as Hydra reads them, got {overrides!r}: {error}") from None
    return _checked(composed)


def node(settings: dict[str, Any]) -> Node:
    """One machine's settings, as it wrote them. Raises ConfigError."""
    return _checked(settings, Node)


def _checked(values: dict[str, Any], kind: type[Record] = Config) -> Record:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        got = "" if first["type"] == "missing" else f", got {first['input']!r}"
        raise ConfigError(f"{place}: {reason}{got}" if place else reason) from None


def build(part: dict[str, Any], **given: Any) -> Any:
    """Call the builder that ``part["_target_"]`` names with the part's other values and what is ``given``.

    The builder's annotations are its contract: pydantic checks type and range. Raises ConfigError for whatever is wrong.
    """
    values = {k: v for k, v in part.items() if k != "_target_"} | given
    try:
        builder = get_object(part["_target_"])
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"_target_ must name a function that can be imported, got {part.get('_target_')!r}: {reason}") from None
    try:
        return _contract(builder)(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(p) for p in first["loc"])
        raise ConfigError(f"{part['_target_']}: {name}: {first['msg']}, got {first['input']!r}") from None


@lru_cache(maxsize=64)
def _contract(builder: Callable[..., Any]) -> Callable[..., Any]:
    """``builder`` behind its annotations; read once, since reading them takes longer than what most builders do."""
    return validate_call(config=ConfigDict(arbitrary_types_allowed=True))(builder)


def _explain(message: str, words: list[str]) -> str:
    """Hydra's many lines as one, with the nearest name that exists."""
    missing = re.search(r"Could not (?:find|load) '([^'/]+)/([^']+)'", message)
    if missing:
        folder = CONF / missing[1]
        known = sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.glob("**/*.yaml"))
        near = difflib.get_close_matches(missing[2], known, 1)
        return f"{missing[1]}={missing[2]} does not exist{_hint(near) or '; there are: ' + ', '.join(known)}"
    choices = [word for word in words if (CONF / word.split("=")[0]).is_dir()]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        known = list(_paths(OmegaConf.to_container(compose("config", overrides=choices))))
    for word in (w for w in words if not w.startswith("+")):  # + adds a setting: it need not exist
        key = word.lstrip("~").split("=")[0].split("@")[0]
        if key and key not in known and not (CONF / key).is_dir():
            near = difflib.get_close_matches(key, known + [p.name for p in CONF.iterdir() if p.is_dir()], 1)
            return f"unknown setting {key!r}{_hint(near)}"
    return " ".join(message.split()[:40])


def _hint(near: list[str]) -> str:
    return f"; did you mean {near[0]!r}?" if near else ""


def _paths(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        yield prefix + str(key)
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")
