"""Which precision and which attention are fastest on this machine: tried for a moment, then kept.

No rule of thumb holds: in bfloat16 torch's fused attention is 3 to 6 times slower than plain products on some CPUs and the
other way round on GPUs, and a CPU without bfloat16 units multiplies it four times slower than float32. The answer is kept
by machine, so that every process and every later run on it computes the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from fl.lean.attention import ATTENTIONS
from fl.provenance import processor
from fl.randomness import generator

KEPT = Path("~/veilora/cache/fastest")  # or the folder that the environment names in VEILORA_FASTEST
MEASURED: dict[Path, dict] = {}         # what this process has found out: all there is where nothing can be written
CLEARLY = 1.15  # how much faster what comes later in a list has to be: at less, the exacter and the more usual one stays


def choose(precision: str, attention: str, model: nn.Module, device: torch.device, kept: Path | None = None) -> tuple[str, str]:
    """What ``auto`` means for ``model`` on ``device``; a value that is not ``auto`` stays. Returns (precision, attention).

    Processes that ask at the same time get the same answer: the first one to finish decides. Where nothing can be kept, the
    answer is this process's own.
    """
    if "auto" not in (precision, attention):
        return precision, attention
    precisions = ("float32", "bfloat16") if precision == "auto" else (precision,)
    attentions = tuple(ATTENTIONS) if attention == "auto" else (attention,)
    candidates = list(product(precisions, attentions))
    tokens, width = model.patch_embed.num_patches + model.num_prefix_tokens, model.embed_dim
    heads = next(module.num_heads for module in model.modules() if hasattr(module, "num_heads"))
    question = (
        f"{processor(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{tokens} tokens of {width} in {heads} heads, {precision}, {attention}"
    )
    folder = kept or Path(os.environ.get("VEILORA_FASTEST", KEPT)).expanduser()
    path = folder / f"{hashlib.sha256(question.encode()).hexdigest()[:16]}.json"
    if (answer := _read(path, candidates)) is None:
        if path not in MEASURED:
            seconds = measure(candidates, tokens, width, heads, device)
            MEASURED[path] = {"question": question, "answer": fastest(seconds), "seconds": {" ".join(c): t for c, t in seconds.items()}}
        _keep(MEASURED[path], path)
        answer = _read(path, candidates) or MEASURED[path]["answer"]
    return answer


def fastest(seconds: Mapping[tuple[str, str], float]) -> tuple[str, str]:
    """The last one that is `CLEARLY` faster than what was the best before it."""
    answer, *others = seconds
    for candidate in others:
        answer = candidate if seconds[candidate] * CLEARLY < seconds[answer] else answer
    return answer


def _read(path: Path, candidates: list[tuple[str, str]]) -> tuple[str, str] | None:
    """The answer in ``path``, if one of the candidates can be read there; what cannot is removed."""
    try:
        precision, attention = json.loads(path.read_text())["answer"]
        if (precision, attention) in candidates:
            return precision, attention
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    with suppress(OSError):
        path.unlink()
    return None


def _keep(record: dict, path: Path) -> None:
    """Write ``path`` whole, unless another process was first or nothing can be written there."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(record, indent=1))
        os.link(fresh, path)
    except OSError:
        pass
    with suppress(OSError):
        fresh.unlink()


def measure(
    candidates: list[tuple[str, str]], tokens: int, width: int, heads: int, device: torch.device, repeats: int = 5
) -> dict[tuple[str, str], float]:
    """Median seconds of one frozen block, forward and backward, for each (precision, attention), taken in turn."""
    stream = generator(0, "choose")
    x = torch.randn(8, tokens, width, generator=stream).to(device)
    shapes = ((3, 1), (1, 1), (4, 1), (1, 4))
    weights = [(torch.randn(m * width, k * width, generator=stream) / width).to(device) for m, k in shapes]
    taken: dict[tuple[str, str], list[float]] = {c: [] for c in candidates}
    for _ in range(repeats + 1):
        for candidate in candidates:
            dtype = getattr(torch, candidate[0])
            given = x.to(dtype).requires_grad_()
            cast = [w.to(dtype) for w in weights]
            _wait(device)
            began = time.perf_counter()
            _block(given, cast, heads, candidate[1]).sum().backward()
            _wait(device)
            taken[candidate].append(time.perf_counter() - began)
    return {c: statistics.median(times[1:]) for c, times in taken.items()}


def _block(x: Tensor, weights: list[Tensor], heads: int, attention: str) -> Tensor:
    qkv, proj, fc1, fc2 = weights
    x = x + linear(ATTENTIONS[attention](linear(x, qkv), heads), proj)
    return x + linear(gelu(linear(x, fc1)), fc2)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
