"""What the doctor looks at on the machine itself: software, GPU, image key, data, weights, the coordinator's keys."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any, Mapping

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key, load_ssh_public_key
from packaging.requirements import Requirement
from safetensors import SafetensorError, safe_open

from clients import bundle
from clients import policy as policies
from clients.kit import Finding, KitError
from fl import keys
from fl import seal_key as seal_keys
from fl.datasets.own import read
from fl.provenance import code_sha256

# In a process of its own: libraries that do not go together may end it.
TOGETHER = """
import json, flwr, hydra, numpy, timm, torch, torchvision
from importlib.metadata import version
torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
gpus = [[torch.cuda.get_device_name(i), *torch.cuda.mem_get_info(i)] for i in range(torch.cuda.device_count())]
names = ("flwr", "torch", "torchvision", "timm", "numpy", "hydra-core")
print("\\n" + json.dumps({"versions": {n: version(n) for n in names}, "gpus": gpus}))
"""


def software(python: str = sys.executable) -> tuple[Finding, dict[str, Any]]:
    """The libraries imported together in a fresh process, beside what the extra `node` asks for; and what it told of GPUs."""
    done = subprocess.run([python, "-W", "ignore", "-c", TOGETHER], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"])[-1]
        says = f"flwr, torch, torchvision and timm cannot be imported together: {last}"
        return Finding("software", False, says, 'pip install ".[node]" in a fresh environment'), {}
    told = json.loads(done.stdout.splitlines()[-1])
    versions = {"python": ".".join(map(str, sys.version_info[:3]))} | told["versions"]
    says = ", ".join(f"{name} {version}" for name, version in versions.items()) + f"; code {code_sha256()}"
    if wrong := outside(versions):
        return Finding("software", False, f"{says}; wanted {', '.join(wrong)}", 'pip install ".[node]"'), told
    return Finding("software", True, says), told


def outside(versions: Mapping[str, str]) -> list[str]:
    """Which of the requirements of the extra `node` these versions do not meet; none where the package is not installed."""
    try:
        wanted = [Requirement(line) for line in requires("veilora") or []]
    except PackageNotFoundError:
        return []
    node = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": "node"})]
    return [str(r).partition(";")[0].strip() for r in node if r.name in versions and not r.specifier.contains(versions[r.name], prereleases=True)]


def device(wish: str, told: Mapping[str, Any]) -> Finding:
    """The GPU that ``device`` in node.toml means, and its free memory."""
    gpus = told.get("gpus", [])
    seen = "; ".join(f"cuda:{i} {name}, {free / 2**30:.1f} of {whole / 2**30:.1f} GiB free" for i, (name, free, whole) in enumerate(gpus))
    number = wish.partition(":")[2] or "0"
    if wish.startswith("cuda") and not (number.isdecimal() and int(number) < len(gpus)):
        return Finding("device", False, f"device={wish}, and torch sees {seen or 'no GPU'}", "set device = \"auto\" or mend the driver")
    return Finding("device", True, seen if gpus and wish != "cpu" else "CPU")


def seal_key(path: str) -> str:
    """The epoch and fingerprint of the seal key, which must be able to step. Raises KeyFileError and KitError."""
    try:
        tempfile.TemporaryFile(dir=Path(path).expanduser().parent).close()
    except OSError as error:
        raise KitError(f"{path} must be in a folder that this user may write, since the key steps when a run ends ({error.strerror})") from None
    return f"{path}, epoch and fingerprint {seal_keys.read(Path(path)).fingerprint}; compare it with the other nodes'"


def image_key(path: str) -> str:
    """The fingerprint of the key file. Raises KeyFileError."""
    return f"{path}, fingerprint {keys.read(Path(path)).fingerprint}; compare it with the other nodes'"


def policy(path: Path) -> str:
    """The digest of the node's policy, and that the installed code is signed where it must be. Raises PolicyError."""
    owner = policies.read(path)
    bundle.signed(owner.code, code_sha256())
    whose = "its file" if path.exists() else "strict, since there is no file"
    return f"{whose}, digest {owner.digest()}; secure aggregation is {'demanded' if owner.run.secure_aggregation else 'not demanded'}"


def data(own: Mapping[str, Any]) -> str:
    """That the folder of pictures can be listed. Raises KitError."""
    if "partition-path" in own:
        return "not needed: partition-path is in its place"
    path = own.get("data-path")
    if path is None:
        return "none set; the run's own data.root stands, or its demo data"
    folder = Path(path).expanduser()
    try:
        inside = next(iter(sorted(folder.iterdir())), None)
    except OSError as error:
        raise KitError(f"data folder {folder} cannot be listed ({error.strerror})") from None
    if inside is None:
        raise KitError(f"data folder {folder} must hold pictures, and is empty")
    return f"{folder}, with {inside.name}"


def partition(own: Mapping[str, Any]) -> str:
    """Whose pictures the folder of a node's settings holds, and that they are as they were written, and under its own key.

    Raises DataError, KeyFileError and KitError.
    """
    path, index, of = own["partition-path"], own.get("partition-id"), own.get("num-partitions")
    facts, parts = read(Path(path).expanduser())
    if facts.cut is not None and (facts.index, facts.of) != (index, of):
        raise KitError(f"partition folder {path} must be that of node {index} of {of}, and is that of {facts.index} of {facts.of}")
    if facts.encrypted and (key := keys.read(Path(str(own.get("key-path", "~/veilora/key")))).fingerprint) != facts.encrypted.key:
        raise KitError(f"partition folder {path} was encrypted with key {facts.encrypted.key}, and this node has key {key}")
    hidden = f"encrypted with key {facts.encrypted.key}" if facts.encrypted else "plain"
    counts = ", ".join(f"{len(part.labels)} {name}" for name, part in parts.items())
    return f"{path}, {counts} images of {facts.image} px for {len(facts.classes)} classes, {hidden}"


def weights(path: str | None) -> str:
    """The digest of the weights file. Raises KitError."""
    if path is None:
        return "none set; the run's own model.weights stands"
    file = Path(path).expanduser()
    try:
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()[:16]
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                return f"{file}, {len(tensors.keys())} tensors, sha256 {digest}"
    except (OSError, SafetensorError) as error:
        raise KitError(f"weights file {file} cannot be opened ({error})") from None
    return f"{file}, sha256 {digest}"


def belong(key: Path, certificate: Path) -> str:
    """That a private key is that of a certificate. Raises KitError."""
    private = load_pem_private_key(key.read_bytes(), None).public_key()
    public = x509.load_pem_x509_certificate(certificate.read_bytes()).public_key()
    told = [k.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) for k in (private, public)]
    if told[0] != told[1]:
        raise KitError(f"{key.name} must be the key of {certificate.name}, and is another")
    return f"{key.name} is the key of {certificate.name}"


def public_keys(folder: Path, number: int) -> str:
    """That the nodes' public keys are there and are keys. Raises KitError."""
    files = sorted(folder.glob("*.pub"))
    for file in files:
        try:
            load_ssh_public_key(file.read_bytes())
        except ValueError:
            raise KitError(f"{file.name} must be a public key in OpenSSH's format, and is not") from None
    if len(files) != number:
        raise KitError(f"there must be {number} node keys, got {len(files)}")
    return f"{number}, to be registered once: flwr supernode register"
