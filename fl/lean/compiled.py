"""The lean step as one graph for torch.compile: on a GPU the launches of small operations cost more than their work.

The graph has no breaks, so that torch may fuse it and, in its mode "reduce-overhead", replay it as a CUDA graph: one launch. On
a CPU compiling takes minutes and gains nothing, so `lean` stays the choice there.
"""

from __future__ import annotations

import torch
from torch import nn

from fl.lean import lean
from fl.models import Forward

BACKEND, MODE = "inductor", "reduce-overhead"


def compiled(model: nn.Module, precision: str, attention: str) -> Forward:
    """`fl.lean.lean`, compiled at its first step, and again, for batches of any size, when one of another size comes."""
    forward = lean(model, precision, attention)
    return torch.compile(forward, fullgraph=True, backend=BACKEND, mode=MODE if BACKEND == "inductor" else None)
