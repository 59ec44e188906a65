"""The lean step through torch.compile: on a GPU the launches of small operations cost more than their work.

The step is one graph without breaks, so that torch may fuse what lies between its products. Every process compiles for itself,
for a minute or more, and again for other shapes: it is for long runs in one process. On a CPU it gains nothing.
"""

from __future__ import annotations

import torch
from torch import nn

from fl.lean import lean
from fl.models import Forward


def compiled(model: nn.Module, precision: str, attention: str, backend: str = "inductor") -> Forward:
    """`fl.lean.lean`, compiled at its first step, and again for the shapes that come later; beyond torch's limit as it is."""
    return torch.compile(lean(model, precision, attention), backend=backend)
