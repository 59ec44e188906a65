"""Which codec each group travels in, and whether that is as it is or as a difference from what the other side has.

A lossy codec is for differences: it errs by a share of what it encodes, and a difference is small. So with one, clients
remember what they last received, the server remembers what each has, which at first is what all start from, and only the
difference goes down; up goes a difference anyway. What rides along (control variates, a change of the base) and whatever
has to be sent whole is float32.

What is said to be exact of a strategy is so up to what the codec loses. Those that turn or draw anew the factors between
rounds (flora, flexlora, florist, fedsvd) have large differences and lose most.
"""

from __future__ import annotations

from typing import Mapping, NamedTuple

from fl.adapter import GROUPS, RIDERS
from fl.config import Config, build
from fl.wire.flat import Codec
from fl.wire.float32 import float32


class Coding(NamedTuple):
    """A codec for each group's differences; whether any is lossy; whether what it lost is added to the next upload."""

    codecs: Mapping[str, Codec]
    lossy: bool
    feedback: bool

    @property
    def differences(self) -> Codec | Mapping[str, Codec]:
        """What `fl.wire.flat.pack` packs a difference in."""
        return self.codecs if self.lossy else WHOLE


WHOLE = float32()


def coding(config: Config) -> Coding:
    """``config.codec`` for all groups but those that ``config.codecs`` names. Raises ConfigError."""
    codecs = {group: build(config.codecs.get(group, config.codec)) for group in GROUPS} | {rider: WHOLE for rider in RIDERS}
    lossy = any(codec.view is None for codec in codecs.values())
    return Coding(codecs, lossy, lossy and config.feedback)
