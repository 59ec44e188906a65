"""Flower's ways with a bundle, closed: on a node no code of a run is unpacked, and none is imported.

Flower has no setting for this, so names in its modules are replaced. Where a module has another shape than the known one, the
node does not start.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Callable

BUNDLED = ("install_from_fab", "get_project_dir", "get_load_client_app_fn")
"""The functions by which Flower's `run_clientapp` handles a bundle, and no others."""


class FlowerError(RuntimeError):
    """A Flower whose way with bundles is not the known one."""


def take_over(flower: ModuleType, app_of: Callable[[bytes], Callable]) -> None:
    """Let ``flower``'s run_clientapp run ``app_of(bundle)``; its own ways to a bundle's code raise from then on.

    ``flower`` is flwr.supernode.runtime.run_clientapp. Raises FlowerError when it, or what it calls, has another shape.
    """
    from flwr.cli import install
    from flwr.clientapp import utils
    from flwr.supercore import object_ref

    known(flower, "run_clientapp", *BUNDLED)
    for module, name in ((object_ref, "load_app"), (utils, "load_app"), (install, "install_from_fab"), (install, "validate_and_install")):
        known(module, name)
        setattr(module, name, _never)
    held: list[bytes] = []
    flower.install_from_fab = lambda content, **_: held.append(content)
    flower.get_project_dir = lambda *_: None
    flower.get_load_client_app_fn = lambda **_: lambda *_: app_of(held[-1])


def unopened(loop: ModuleType) -> None:
    """Let the SuperNode's ``loop`` take a run's words from the run alone: it opens no bundle, so that a broken one ends nothing.

    ``loop`` is flwr.supernode.start_client_internal. Raises FlowerError when it has another shape.
    """
    known(loop, "_pull_and_store_message", "get_fused_config_from_fab")
    loop.get_fused_config_from_fab = lambda _, run: {"overrides": str(run.override_config.get("overrides", ""))}


def known(module: ModuleType, function: str, *names: str) -> None:
    """Raise FlowerError unless ``module`` has the ``function``, and that uses the global ``names``."""
    code = getattr(getattr(module, function, None), "__code__", None)
    if code is None or not set(names) <= set(code.co_names) & set(vars(module)):
        uses = f"{function} with {', '.join(names)}" if names else function
        raise FlowerError(f"{module.__name__} must have {uses}, and has not; a node needs a release of flwr that was tried")


def _never(*_: Any, **__: Any) -> None:
    raise FlowerError("a node imports no code of a bundle")
