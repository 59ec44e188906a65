"""Builders: the functions that `conf/` names, and nothing else. Whatever a config says, no other function is ever imported or called."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any, Callable, Iterator

import yaml
from pydantic import ConfigDict, ValidationError, validate_call

from fl.overrides import CONF, ConfigError

PARTS = ("model", "data", "partition", "cipher", "method", "strategy", "codec")


@lru_cache(maxsize=16)
def builders(part: str) -> frozenset[str]:
    """The ``_target_`` of every YAML file in the group ``part`` of `conf/`."""
    files = sorted((CONF / part).glob("**/*.yaml"))
    return frozenset(target for file in files for target in _targets(yaml.safe_load(file.read_text())))


def part_of(target: object) -> str | None:
    """The group whose builder ``target`` is; None where `conf/` does not name it."""
    return next((part for part in PARTS if target in builders(part)), None) if isinstance(target, str) else None


def build(part: dict[str, Any], **given: Any) -> Any:
    """Call the builder that ``part["_target_"]`` names with the part's other values and what is ``given``.

    The builder's annotations are its contract: pydantic checks type and range. Raises ConfigError for whatever is wrong, and for
    a builder that `conf/` does not name before anything is imported.
    """
    values, target = {k: v for k, v in part.items() if k != "_target_"} | given, part.get("_target_")
    group = part_of(target)
    if group is None:
        raise ConfigError(f"a builder must be one that a file in conf/ names in _target_, got {target!r}; choose one, as in cipher=plain")
    try:
        return _contract(target)(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(p) for p in first["loc"])
        raise ConfigError(f"{target}: {name}: {first['msg']}, got {first['input']!r}", f"{group}.{name}") from None


@lru_cache(maxsize=64)
def _contract(target: str) -> Callable[..., Any]:
    """The builder behind its annotations; read once, since reading them takes longer than what most builders do."""
    module, _, name = target.rpartition(".")
    return validate_call(config=ConfigDict(arbitrary_types_allowed=True))(getattr(import_module(module), name))


def _targets(tree: Any) -> Iterator[str]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if key == "_target_":
            yield value
        yield from _targets(value)
