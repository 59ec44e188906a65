"""Where a result comes from: the code, the versions, the machine."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("fl/**/*.py", "clients/**/*.py", "strategies/**/*.py", "conf/**/*.yaml")  # = fab-include in pyproject.toml


@lru_cache(maxsize=1)
def shipped() -> dict[str, str]:
    """SHA-256 of every shipped file as this process found it first, by its path under `ROOT`."""
    files = sorted(p for pattern in SHIPPED for p in ROOT.glob(pattern))
    return {p.relative_to(ROOT).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def code_sha256() -> str:
    """SHA-256, 64 hex digits, of `shipped` as the lines that `sha256sum` writes: what a release signature is over."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in shipped().items())
    return hashlib.sha256(lines.encode()).hexdigest()


def code_digest() -> str:
    """The first sixteen digits of `code_sha256`: two parties share them when they run the same code."""
    return code_sha256()[:16]


def versions() -> dict[str, str]:
    """The installed versions that results depend on; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in ("veilora", "torch", "torchvision", "timm", "numpy", "flwr", "ray", "hydra-core"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, object]:
    """Versions, machine, and the commit where there is one."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": versions(),
        "machine": f"{platform.machine()} {processor()}, {os.cpu_count()} cores",
        "gpu": gpu,
        "code": code_digest(),
        "commit": _commit(),
    }


def processor(device: torch.device | None = None) -> str:
    """The name of the processor, or of the GPU that ``device`` is."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _commit() -> str | None:
    """The commit of this checkout, with a + when files differ from it; None in a bundle."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed.strip() else "")
