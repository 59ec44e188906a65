"""The model that the clients of one process share: built once, adapted once, its frozen part resident.

Going from one client to the next writes the small tensors that train, and nothing else.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Callable, NamedTuple

import torch
from torch import nn

from fl import adapter as adapters
from fl.adapter import PATCH_EMBED, Adapter
from fl.ciphers import Cipher
from fl.config import Config, ConfigError, build
from fl.flat import Layout
from fl.keys import SharedKey
from fl.lean import lean
from fl.lean.compiled import compiled
from fl.lean.choose import choose
from fl.lean.heap import keep_freed_memory
from fl.lean.stacked import stack
from fl.learn import plain
from fl.models import Forward
from fl.wire.flat import float32_bytes


class Workbench(NamedTuple):
    """A model that the clients of one process share, how it is computed, its public backbone, and what trains at the start.

    ``forward`` computes ``model``, as ``speed`` says in words. ``stacked(clients, layout)`` is a stack of so many clients on it,
    its trained parameters lying as in ``layout``, which ``model`` has by then, and its forward. ``backbone`` is a digest,
    ``full_bytes`` what a message with every parameter would cost. ``start`` is in plain order: public values, a function of
    backbone and seed.
    """

    model: nn.Module
    forward: Forward
    stacked: Callable[[int, Layout], tuple[nn.Module, Forward]]
    speed: str
    backbone: str
    full_bytes: int
    start: Adapter


@lru_cache(maxsize=1)
def cipher_of(config: Config, key: SharedKey) -> Cipher:
    """The cipher of ``config``, one for all clients of a process, since it has tables as large as pictures."""
    return build(config.cipher, key=key, block=config.model["patch"])


@lru_cache(maxsize=1)
def workbench(config: Config, key: SharedKey, classes: int) -> Workbench:
    """The workbench of ``config``; a process keeps the last one. Raises WeightsError and ConfigError."""
    model = build(config.model, classes=classes)
    backbone = adapters.digest({n: t for n, t in model.state_dict().items() if adapters.group(n) != "head"})
    full_bytes = float32_bytes(dict(model.named_parameters()))
    build(config.method)(model, config.seed)
    start = adapters.read(model)
    if config.start == "keyed":
        weight = model.get_parameter(PATCH_EMBED)
        with torch.no_grad():
            weight.copy_(cipher_of(config, key).absorb(weight))
    device = _device(config.device)
    if config.step == "compiled" and device.type == "cpu":
        raise ConfigError("step=compiled is for a GPU: on a CPU compiling gains nothing, got device=cpu; set step=lean", "step", "device")
    precision, attention = choose(config.precision, config.attention, model, device)
    model.to(device)
    if config.step != "plain":
        keep_freed_memory()
    ways = {"lean": lean, "compiled": compiled, "plain": plain}
    computed = partial(ways[config.step], precision=precision, attention=attention)

    @lru_cache(maxsize=2)  # a company of clients, and one for those who are left over
    def stacked(clients: int, layout: Layout) -> tuple[nn.Module, Forward]:
        several = stack(model, clients)
        return several, computed(several)

    speed = f"{config.step} step, {precision}, {attention} attention"
    return Workbench(model, computed(model), stacked, speed, backbone, full_bytes, start)


def _device(wish: str) -> torch.device:
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wish)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={wish} needs a GPU that torch can see, got {torch.cuda.device_count()}; set device=cpu or auto", "device")
    return device
