"""No secret leaves: all that a run says, sends and writes is searched for the key, what is made of it, and the pictures.

What is searched is first unwrapped: base64, hexadecimal, lists of numbers, zip archives, the pixels of a PNG.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import re
import subprocess
import sys
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

import numpy as np
import pytest
import torch
from flwr.app import Message
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hostile import OVERRIDES
from PIL import Image
from test_simulation import SMALL, settings

from clients import client_app, failure, holdings, local, partition, workbench
from fl import keys
from fl.adapter import PATCH_EMBED
from fl.config import ConfigError, OverrideError, load
from fl.datasets import own
from fl.provenance import ROOT
from fl.wire.records import facts_of, to_content
from simulations import grid, inprocess
from simulations.report.page import write as write_report
from strategies.exchange import RunFailed
from strategies.server_app import app as server_app

CLIENTS = 3
PNG, WRAPPED = b"\x89PNG\r\n\x1a\n", re.compile(rb"[A-Za-z0-9+/_-]{40,}")
NUMBERS = re.compile(rb"\d+(?:[,\s]+\d+){7,}")
FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64)


class Blocks:
    """Pieces of ``width`` bytes of what must not be found; they lie end to end, so that twice the width holds a whole one.

    Pieces of few different bytes, as an empty buffer or a black corner has them, tell nothing.
    """

    def __init__(self, width: int, *sources: np.ndarray) -> None:
        self.width = width
        rows = np.concatenate([np.frombuffer(s.tobytes(), np.uint8)[: s.nbytes // width * width].reshape(-1, width) for s in sources])
        varied = (np.diff(np.sort(rows, axis=1), axis=1) != 0).sum(1) >= 5
        self.known = {row.tobytes() for row in rows[varied]}
        assert len(self.known) > 10
        self.marks = np.unique(self._marks(b"".join(self.known))[::width])
        self.likely = np.zeros(2**20, bool)  # by a mark's first bits: almost all of what is searched ends here
        self.likely[self.marks >> np.uint64(44)] = True

    def _marks(self, blob: bytes) -> np.ndarray:
        """A number for the ``width`` bytes at each place of ``blob``."""
        places = len(blob) - self.width + 1
        words = np.ndarray((len(blob) - 7,), "<u8", buffer=blob, strides=(1,))
        return sum(words[8 * i : 8 * i + places] * FACTORS[i % 4] * np.uint64(2 * i + 1) for i in range(self.width // 8))

    def within(self, blob: bytes) -> bool:
        """Whether any piece is anywhere in ``blob``."""
        if len(blob) < self.width:
            return False
        marks = self._marks(blob)
        places = np.flatnonzero(self.likely[marks >> np.uint64(44)])
        marks = marks[places]
        near = self.marks[np.searchsorted(self.marks, marks).clip(max=len(self.marks) - 1)] == marks
        return any(blob[i : i + self.width] in self.known for i in places[near])


class Exactly(NamedTuple):
    """Strings that must not be found."""

    texts: tuple[bytes, ...]

    def within(self, blob: bytes) -> bool:
        return any(text in blob for text in self.texts)


def unwrapped(blob: bytes, deep: int = 2) -> Iterator[bytes]:
    """``blob``, and what is in it in another form."""
    yield blob
    inner: list[bytes] = []
    for run in WRAPPED.findall(blob):
        run = run.replace(b"-", b"+").replace(b"_", b"/")
        inner += [base64.b64decode(run[at : at + (len(run) - at) // 4 * 4]) for at in range(4)]
        inner += [base64.b64decode(run + b"=" * (-len(run) % 4))] if len(run) % 4 != 1 else []
        for digits in re.findall(rb"[0-9a-fA-F]{40,}", run):
            inner += [bytes.fromhex(digits[at : at + (len(digits) - at) // 2 * 2].decode()) for at in (0, 1)]
    for listed in NUMBERS.findall(blob):
        values = [int(v) for v in re.findall(rb"\d+", listed)]
        if max(values) < 2**15:
            inner += [np.array(values).astype(kind).tobytes() for kind in ("u1", "<u2", "<i8")]
    for at in (m.start() for m in re.finditer(re.escape(PNG), blob)):
        inner += drawn(blob[at:])
    if blob.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            inner += [archive.read(name) for name in archive.namelist()]
    for one in inner if deep else ():
        yield from unwrapped(one, deep - 1)


def drawn(png: bytes) -> list[bytes]:
    """The pixels of a picture, channels last and first, as they are and as if it had been enlarged."""
    pixels = np.array(Image.open(io.BytesIO(png)).convert("RGB"))
    zooms = (z for z in range(1, 9) if pixels.shape[0] % z == pixels.shape[1] % z == 0)
    smaller = [pixels[::z, ::z] for z in zooms]
    return [layout.tobytes() for p in smaller for layout in (p, p.transpose(2, 0, 1))]


Needles = dict[str, Blocks | Exactly]


def search(hay: dict[str, bytes], needles: Needles) -> set[tuple[str, str]]:
    """(where, what) for everything that is found."""
    opened = {where: b"\n".join(unwrapped(blob)) for where, blob in hay.items()}
    return {(where, what) for where, blob in opened.items() for what, n in needles.items() if n.within(blob)}


def secrets_of(words: str) -> Needles:
    """What the clients of a run have and nobody else may see."""
    config = load(words)
    key = keys.read(Path(config.key))
    client = local.open_client(config, 0, CLIENTS)
    order = key.permutation("image pixel_shuffle", 3 * config.model["patch"] ** 2)
    whole = client.cipher.encrypt(torch.arange(3 * 32 * 32).view(1, 3, 32, 32)).flatten()
    orders = [t.numpy() for t in (order, order.argsort(), whole)]
    absorbed = client.cipher.absorb(client.bench.start[PATCH_EMBED])
    return {
        "key": Exactly(((Path(config.key).expanduser()).read_bytes(),)),
        "permutation": Blocks(64, *(o.astype("<i8") for o in orders)),
        "permutation of 4 bytes": Blocks(32, *(o.astype("<i4") for o in orders)),
        "permutation of 2 bytes": Blocks(16, *(o.astype("<u2") for o in orders)),
        "permutation of 1 byte": Blocks(16, *(o.astype("u1") for o in orders[:2])),
        "absorbed patch embedding": Blocks(32, absorbed.numpy()),
        **pictures(),
    }


@lru_cache
def pictures() -> Needles:
    """All pictures of the run, straight and mirrored, colour by colour and pixel by pixel."""
    data = holdings.whole(load(SMALL))
    images = np.concatenate([data.train.images.numpy(), data.test.images.numpy()])
    layouts = [side.transpose(axes) for side in (images, images[..., ::-1]) for axes in ((0, 1, 2, 3), (0, 2, 3, 1))]
    floats = [one.astype("<f4") / np.float32(127.5) - np.float32(1) for one in layouts[:2]]
    return {"pictures": Blocks(16, *layouts), "pictures as the model reads them": Blocks(64, *floats)}


@pytest.fixture
def jane(tmp_path, monkeypatch) -> Path:
    """A person's home, with a key; everything of hers lies below it, and no message may name it."""
    home = tmp_path / "users" / "jane"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("VEILORA_FASTEST", str(home / "fastest"))
    keys.create(home / "veilora" / "key")
    for cache in (local.open_client, workbench.workbench, holdings._source, holdings._split):
        cache.cache_clear()
    local.SHELF.__init__()
    return home


def words_of(*more: str) -> str:
    """The tests' small run, in the places where a user has things; ~ is her home."""
    words = " ".join([settings(Path("~/veilora"), Path("~/veilora/runs")), "state=~/veilora/state", *more])
    return words.replace("~", str(Path.home()))


@pytest.fixture
def sent(monkeypatch) -> dict[str, bytes]:
    """Every message that crosses the grid, either way, as Flower serialises it."""
    messages: dict[str, bytes] = {}
    push, pull = inprocess.InProcessGrid.push_messages, inprocess.InProcessGrid.pull_messages

    def seen(way, several):
        for message in (several := list(several)):
            parts = get_all_nested_objects(message).values()
            error = message.error.reason.encode() if message.has_error() else b""
            messages[f"message {len(messages)} {way}"] = b"".join(part.deflate() for part in parts) + error
        return several

    monkeypatch.setattr(inprocess.InProcessGrid, "push_messages", lambda self, several: push(self, seen("down", several)))
    monkeypatch.setattr(inprocess.InProcessGrid, "pull_messages", lambda self, ids: seen("up", pull(self, ids)))
    return messages


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def said(capfd, caplog) -> dict[str, bytes]:
    out, err = capfd.readouterr()
    return {"standard output": out.encode(), "standard error": err.encode(), "log": caplog.text.encode()}


def slow(kinds: Iterable[str], *those: str) -> list:
    """``kinds``, of which ``those`` are for the slow tests."""
    return [pytest.param(kind, marks=pytest.mark.slow) if kind in those else kind for kind in kinds]


RUNS = {
    "in clear": "codec=int4_low_rank strategy=fedsa_lora",
    "blind": "blind=true seal.largest=200 strategy=scaffold recipe.optimizer=sgd",
    "encrypted at rest": "codec=int4_low_rank recipe.augment=true",
    "public start": "codec=bfloat16 start=public method=full",
}


@pytest.mark.parametrize("kind", slow(RUNS, "blind", "encrypted at rest", "public start"))
def test_a_run_says_sends_and_keeps_no_secret(jane, sent, capfd, caplog, kind):
    caplog.set_level(logging.DEBUG)
    words = words_of(RUNS[kind])
    if kind == "encrypted at rest":
        for i in range(CLIENTS):
            partition.write(load(words), i, CLIENTS, jane / f"own-{i}", encrypt=True)
        words += "".join(f" +nodes.{i}.own={jane / f'own-{i}'}" for i in range(CLIENTS))
    before = (jane / "veilora/runs/seal.key").read_bytes()
    inprocess.run(server_app, client_app.app, CLIENTS, words)
    kept = files(jane)
    key, seal = kept.pop("veilora/key"), kept.pop("veilora/runs/seal.key")
    assert (seal != before) == (kind == "blind"), "the seal key steps at the end of a blind run"
    hay = kept | sent | said(capfd, caplog)
    found = search(hay, secrets_of(words) | {"seal key": Exactly((before[:32], seal[:32]))})

    plain = {(name, "pictures") for name in kept if name.endswith("/preview.png")}
    assert found == plain and len(plain) == (0 if kind == "encrypted at rest" else 1)
    assert key not in b"".join(hay.values())
    assert {where for where, _ in search(sent, {"home": Exactly((str(jane.parents[1]).encode(),))})} == set()
    public = {"fingerprint": Exactly((keys.read(jane / "veilora" / "key").fingerprint.encode(),)), "round 1": Exactly((b"round   1/2",))}
    told = search(hay, public)  # that the search sees what there is
    assert {("standard output", "round 1"), (next(n for n in kept if n.endswith("summary.json")), "fingerprint")} <= told
    assert sum(where.endswith(" up") for where, what in told if what == "fingerprint") == CLIENTS
    kinds = ["adapter.safetensors", "summary.json", "config.yaml", "rounds.jsonl", *(["own-1/" + own.TENSORS] if "rest" in kind else [])]
    assert all(any(name.endswith(k) for name in kept) for k in kinds) and len(sent) >= 2 * CLIENTS * 5
    assert any("/state/" in name for name in kept) and any("checkpoint" in name for name in kept)


@pytest.mark.slow
def test_the_bundle_and_a_report_hold_no_secret(jane, tmp_path):
    cell = dict(word.split("=", 1) for word in words_of("clients=3", "rounds=1").split())
    line = grid.run_cell(cell, str(jane / "veilora" / "runs"))
    (tmp_path / "report").mkdir()
    write_report(tmp_path / "report", [line], [])
    hay = files(tmp_path / "report") | {"cells.jsonl": json.dumps(line).encode(), "bundle": build_fab_from_disk(ROOT)}
    assert set(hay) >= {"report.html", "report.md", "report.csv"} and len(hay["bundle"]) > 10_000
    home = {"home": Exactly((str(jane.parents[1]).encode(), str(ROOT).encode() + b"/"))}
    assert search(hay, secrets_of(words_of()) | home) == set()


def short_key(jane: Path) -> str:
    keys.create(jane / "short")
    (jane / "short").write_bytes((jane / "veilora" / "key").read_bytes()[:31])
    return "+nodes.1.key=~/short"


def open_key(jane: Path) -> str:
    keys.create(jane / "open")
    (jane / "open").write_bytes((jane / "veilora" / "key").read_bytes())
    (jane / "open").chmod(0o644)
    return "+nodes.1.key=~/open"


def damaged(jane: Path) -> str:
    partition.write(load(words_of()), 1, CLIENTS, jane / "own-1")
    content = bytearray((jane / "own-1" / own.TENSORS).read_bytes())
    content[-1] ^= 1
    (jane / "own-1" / own.TENSORS).write_bytes(content)
    return "+nodes.1.own=~/own-1"


def no_state(jane: Path) -> str:
    (jane / "file").touch()
    return "strategy=scaffold recipe.optimizer=sgd +nodes.1.state=~/file/state"


def strange_class(jane: Path) -> str:
    for place in ("train/disc", "train/ring", "test/disc", "test/Mary_Smith"):
        (jane / "classes" / place).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(jane / "classes" / place / "Mary_Smith.png")
    return "data=folder data.root=~/classes"


FAILURES = {
    "missing key": (lambda jane: "+nodes.1.key=~/elsewhere/key", "its key: key"),
    "short key": (short_key, "its key: key"),
    "open key": (open_key, "its key: key"),
    "missing pictures": (lambda jane: "data=folder data.root=~/pictures", "its pictures: data.root"),
    "missing CIFAR": (lambda jane: "data=cifar10 data.root=~/cifar", "its pictures: data.root"),
    "a class of nobody else": (strange_class, "its pictures: data.root"),
    "missing weights": (lambda jane: "+nodes.1.weights=~/some/weights.safetensors", "its model: model.weights"),
    "damaged folder": (damaged, "its pictures: own"),
    "no place for state": (no_state, "its files: state: Not a directory"),
    "something else": (lambda jane: "", "a fault inside"),
}


@pytest.fixture
def deployed(monkeypatch) -> None:
    """Clients that answer as on machines of different owners."""
    monkeypatch.setattr(failure, "simulated", lambda: False)


@pytest.mark.parametrize("kind", slow(FAILURES, *(kind for kind in FAILURES if kind not in ("damaged folder", "a class of nobody else", "something else"))))
def test_a_failure_tells_the_server_neither_secrets_nor_places(jane, deployed, sent, capfd, caplog, kind, monkeypatch):
    caplog.set_level(logging.DEBUG)
    if kind == "something else":
        monkeypatch.setattr(local, "train", lambda *_: (_ for _ in ()).throw(ValueError(f"no such thing\nas {jane}/a.png, {jane}/veilora/key")))
    prepare, says = FAILURES[kind]
    words = words_of(prepare(jane))
    if "data=folder" in words or "data=cifar10" in words:
        words = words.replace("data.train=120 data.test=60", "")
    with pytest.raises(RunFailed) as caught:
        inprocess.run(server_app, client_app.app, CLIENTS, words)
    assert re.search(rf"client \d: {re.escape(says)}; its log says why", str(caught.value)) and "\n" not in str(caught.value)
    needles = secrets_of(words_of())
    secret = (jane / "veilora" / "key").read_bytes()
    hay = sent | said(capfd, caplog)
    assert search(hay, needles | {"most of the key": Exactly((secret[:31], secret[:16], repr(secret)[2:30].encode()))}) == set()
    hay.pop("log")  # which stays at home
    personal = {"home": Exactly((str(jane.parents[1]).encode(),)), "a name": Exactly((b"Mary_Smith", b"no such thing"))}
    assert search(hay | {"reason": str(caught.value).encode()}, personal) == set()


def test_in_a_simulation_a_failure_is_told_in_full(jane):
    with pytest.raises(RunFailed, match=f"client 1: key file {jane}/elsewhere/key is missing"):
        inprocess.run(server_app, client_app.app, CLIENTS, words_of("+nodes.1.key=~/elsewhere/key"))


@pytest.mark.slow
def test_a_node_of_a_deployment_is_no_simulation():
    script = (
        "import clients.client_app, clients.node, flwr.supernode.runtime.run_clientapp, flwr.supernode.start_client_internal\n"
        "from clients import failure\n"
        "assert not failure.simulated()\n"
        "import simulations.inprocess\n"
        "assert failure.simulated()\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


TELLTALE = "s3cret-" + os.urandom(6).hex()
"""What the errors of the next tests are full of: a value of the environment, of node.toml, of a YAML file, a file's name, a class."""


def raised(jane: Path) -> dict[str, Exception]:
    """An error of each kind, with what may not leave in all that it has."""
    kinds = {kind.__name__: kind(TELLTALE) for kind, _, _ in failure.PARTS}
    named = OverrideError(TELLTALE, TELLTALE)
    return kinds | {
        "settings that are none": ConfigError(TELLTALE, TELLTALE, f"recipe.{TELLTALE}", f"nodes.{TELLTALE}.key"),
        "a rule that is none": named,
        "a file": FileNotFoundError(2, TELLTALE, f"{jane}/veilora/state/{TELLTALE}.png"),
        "a file of another place": PermissionError(13, TELLTALE, f"/srv/{TELLTALE}"),
        "an error without a number": OSError(TELLTALE),
        "a kind of its own": type(TELLTALE, (Exception,), {})(TELLTALE),
    }


@pytest.mark.parametrize("kind", raised(Path("/")))
def test_no_kind_of_error_carries_a_value_out(jane, deployed, sent, monkeypatch, caplog, kind):
    monkeypatch.setattr(local, "roll", lambda client: (_ for _ in ()).throw(raised(jane)[kind]))
    with pytest.raises(RunFailed, match="^client 0: [a-z]") as caught:
        inprocess.run(server_app, client_app.app, CLIENTS, words_of())
    assert TELLTALE in caplog.text
    mail = {name: blob for name, blob in sent.items() if name.endswith(" up")}
    assert mail and search(mail | {"reason": str(caught.value).encode()}, {"telltale": Exactly((TELLTALE.encode(),))}) == set()


def asked(words: str, **node: str) -> tuple[str, bytes]:
    """What a node that is given ``words`` says, and all that it sends."""
    grid = inprocess.InProcessGrid(client_app.app, 1, {"overrides": words}, {0: node})
    (reply,) = grid.send_and_receive([Message(to_content({"run": "a-run"}), dst_node_id=1000, message_type="query")])
    return facts_of(reply)["error"], b"".join(part.deflate() for part in get_all_nested_objects(reply).values())


@pytest.mark.parametrize(("typed", "rule"), OVERRIDES, ids=[typed[:40] for typed, _ in OVERRIDES])
def test_a_node_answers_hostile_overrides_with_the_rule_and_nothing_of_its_own(typed, rule, jane, deployed, monkeypatch):
    for name in ("HOME", "X", "AWS_SECRET_ACCESS_KEY", "USER"):
        monkeypatch.setenv(name, f"{jane}/{TELLTALE}")
    (jane / "veilora" / "node.yaml").write_text(f"name: {TELLTALE}\n")
    line, mail = asked(typed.replace("file:///root/veilora", f"file://{jane}/veilora"))
    assert line == f"overrides: {rule}" and TELLTALE.encode() not in mail and b"users" not in mail


def test_a_nodes_own_settings_are_told_by_their_names(jane, deployed):
    own = {"key-path": f"{jane}/{TELLTALE}/key", "device": TELLTALE}
    line, mail = asked("", **own)
    assert line == "its config: device; its log says why" and TELLTALE.encode() not in mail
    line, mail = asked("", **own | {"device": "cpu"})
    assert line == "its key: key; its log says why" and TELLTALE.encode() not in mail
    line, mail = asked("", rank=TELLTALE)
    assert line == "its config: rank; its log says why" and TELLTALE.encode() not in mail


def zipped(blob: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", blob)
    return buffer.getvalue()


def png(image: torch.Tensor, zoom: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.kron(image.permute(1, 2, 0).numpy(), np.ones((zoom, zoom, 1), np.uint8))).save(buffer, "png")
    return buffer.getvalue()


PLANTS = {
    "the key": ("key", lambda key, order, x: key),
    "in hexadecimal": ("key", lambda key, order, x: key.hex().encode()),
    "in capitals": ("key", lambda key, order, x: b"f" + key.hex().upper().encode()),
    "in base64": ("key", lambda key, order, x: base64.b64encode(key)),
    "in base64 after another byte": ("key", lambda key, order, x: base64.urlsafe_b64encode(b"x" + key + b"y")),
    "as numbers": ("key", lambda key, order, x: json.dumps(list(key)).encode()),
    "zipped": ("key", lambda key, order, x: zipped(key)),
    "the permutation": ("permutation", lambda key, order, x: order.numpy().tobytes()[3:]),
    "a part of its inverse": ("permutation", lambda key, order, x: order.argsort()[13:29].numpy().tobytes()),
    "of 4 bytes": ("permutation of 4 bytes", lambda key, order, x: order.int().numpy().tobytes()),
    "of 2 bytes": ("permutation of 2 bytes", lambda key, order, x: order.short().numpy().tobytes()),
    "of 1 byte": ("permutation of 1 byte", lambda key, order, x: order.byte().numpy().tobytes()),
    "as JSON": ("permutation", lambda key, order, x: json.dumps(order.tolist()).encode()),
    "64 bytes of a picture": ("pictures", lambda key, order, x: x.flatten()[1001:1065].numpy().tobytes()),
    "with the channels last": ("pictures", lambda key, order, x: x.permute(1, 2, 0).flatten()[7:71].numpy().tobytes()),
    "mirrored": ("pictures", lambda key, order, x: x.flip(-1).numpy().tobytes()),
    "shifted by four": ("pictures", lambda key, order, x: torch.nn.functional.pad(x, (4, 0))[..., :32].numpy().tobytes()),
    "a picture in base64": ("pictures", lambda key, order, x: base64.b64encode(x.numpy().tobytes())),
    "a PNG": ("pictures", lambda key, order, x: png(x, 1)),
    "an enlarged PNG in a page": ("pictures", lambda key, order, x: b"data:image/png;base64," + base64.b64encode(png(x, 3))),
    "as floats": ("pictures as the model reads them", lambda key, order, x: (x.float() / 127.5 - 1).numpy().tobytes()),
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    home = tmp_path_factory.mktemp("planted")
    keys.create(home / "key")
    words = settings(home, home)
    client = local.open_client(load(words), 0, CLIENTS)
    return (home / "key").read_bytes(), client, secrets_of(words)


@pytest.mark.parametrize("how", PLANTS)
def test_what_is_planted_is_found(planted, how):
    secret, client, needles = planted
    what, plant = PLANTS[how]
    order = client.key.permutation("image pixel_shuffle", 192)
    noise = os.urandom(5003)
    blob = plant(secret, order, client.holdings.test.source.images[11])
    hay = {"a": noise, "b": blob if how == "zipped" else noise + b"\n" + blob + b"\n" + noise}
    assert ("b", what) in search(hay, needles) and not any(where == "a" for where, _ in search(hay, needles))


def test_the_absorbed_embedding_is_found_and_encrypted_pictures_are_not_pictures(planted):
    _, client, needles = planted
    absorbed = client.cipher.absorb(client.bench.start[PATCH_EMBED]).numpy().tobytes()
    assert search({"a": b"x" + absorbed}, needles) == {("a", "absorbed patch embedding")}
    hidden = client.cipher.encrypt(client.holdings.train.source.images)
    assert search({"a": hidden.numpy().tobytes(), "b": png(hidden[0], 1)}, needles) == set()
