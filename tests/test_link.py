"""Both ends of a compressed wire hold the same adapter to the bit, nothing that a codec loses is lost for good, and Flower is the loop."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import first
from test_simulation import by_loop, equal, home, result, settings  # noqa: F401

from clients.carried import Behind
from clients.client_app import app as client_app
from clients.link import arrived, leaving
from clients.state import Drawer
from fl.adapter import GROUPS, add, digest, flat, norm, sub
from fl.config import ConfigError, load
from fl.wire.coding import WHOLE, coding
from fl.wire.flat import WireError, pack, unpack
from simulations import inprocess
from strategies.catchup import Catchup
from strategies.downlink import Downlink
from strategies.factors import at_rank
from strategies.fedavg import fedavg
from strategies.server_app import app as server_app

LOSSY = ["codec=int8", "codec=int4", "codec=bfloat16", "codec=int8 +codec@codecs.patch_embed=low_rank"]
SHAPES = {"a.lora_a.weight": (4, 30), "a.lora_b.weight": (30, 4), "patch_embed.proj.weight": (30, 3, 4, 4), "head.bias": (10,)}


def drawn(seed: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return flat({name: size * torch.randn(shape, generator=stream) for name, shape in SHAPES.items()})


START = drawn(99)


def server(wire) -> Downlink:
    return Downlink(wire, Catchup(fedavg(load().recipe)), 0, START)


def receive(downlink: Downlink, wire, drawer: Drawer, adapter, kinds: list | None = None):
    """One message to a client, and what the client makes of it, being sent the whole where it is behind."""
    for packed, facts in downlink.messages(None, 0, drawer.client, adapter):
        if kinds is not None:
            kinds.append(packed.nbytes)
        try:
            return arrived(drawer, wire, packed, facts.get("link"), START)
        except Behind:
            continue
    raise AssertionError("the whole was not enough")


@pytest.mark.parametrize("codec", LOSSY)
def test_both_ends_hold_the_same_to_the_bit_and_come_nearer_to_what_was_meant(tmp_path, codec):
    wire = coding(load(codec))
    downlink, drawers = server(wire), [Drawer(str(tmp_path), "run", k) for k in range(3)]
    meant = START
    for turn in range(6):
        if turn:
            meant = add(meant, drawn(turn, 0.01))
        for drawer in drawers[: 2 if turn == 3 else 3]:  # one misses a message
            has = receive(downlink, wire, drawer, meant)
            assert digest(has) == downlink._had[drawer.client, has.layout].digest
        if turn == 0:
            assert digest(has) == digest(START)  # nothing is lost of no difference
    off = [norm(sub(receive(downlink, wire, drawers[0], meant), meant)) for _ in range(8)]
    assert off[-1] < 0.2 * off[0] < 0.01 * norm(meant)  # what was lost is in the next difference


def test_a_client_that_lost_its_state_is_sent_the_whole(tmp_path):
    wire = coding(load("codec=int4"))
    downlink, drawer = server(wire), Drawer(str(tmp_path), "run", 0)
    sizes: list[int] = []
    receive(downlink, wire, drawer, drawn(0), sizes)
    receive(downlink, wire, drawer, drawn(1), sizes)
    for path in drawer.folder.iterdir():
        path.unlink()
    assert digest(receive(downlink, wire, drawer, drawn(2), sizes)) == digest(drawn(2))
    for path in drawer.folder.iterdir():
        path.write_bytes(b"broken")
    assert digest(receive(downlink, wire, drawer, drawn(3), sizes)) == digest(drawn(3))
    part, again, *rest = sizes
    assert again == part and rest == [part, rest[1], part, rest[1]] and part < rest[1] / 3


def test_clients_that_have_the_same_share_one_message(tmp_path):
    wire = coding(load("codec=int8"))
    downlink = server(wire)
    for adapter in (drawn(0), drawn(1)):
        packed = [next(downlink.messages(None, 0, k, given))[0] for k, given in enumerate((adapter, adapter, flat(adapter)))]
        assert packed[0] is packed[1] is packed[2]


def test_what_a_client_has_is_remembered_by_layout(tmp_path):
    """A client that trains a part, or a lower rank, and evaluates the whole is sent differences of both."""
    wire = coding(load("codec=int8"))
    downlink, drawer = server(wire), Drawer(str(tmp_path), "run", 0)
    sizes: dict[int, list[int]] = {}
    for turn in range(3):
        meant = add(START, drawn(turn, 0.01))
        low = at_rank(meant, 2)
        for kind, given in enumerate((meant, {n: meant[n] for n in list(meant)[:2]}, low)):
            has = receive(downlink, wire, drawer, given, sizes.setdefault(kind, []))
            assert norm(sub(has, flat(given))) < 0.05 * norm(given)
    assert all(len(set(found)) == 1 for found in sizes.values())  # never behind, never whole
    assert sizes[1][0] < sizes[2][0] < sizes[0][0] < 0.3 * pack(START, WHOLE).nbytes


def test_a_layout_that_the_start_has_not_is_sent_whole_at_first(tmp_path):
    wire = coding(load("codec=int8"))
    downlink, drawer = server(wire), Drawer(str(tmp_path), "run", 0)
    sizes: list[int] = []
    for seed in (0, 1):
        wide = at_rank(drawn(seed), 8)
        has = receive(downlink, wire, drawer, wide, sizes)
    assert norm(sub(has, flat(wide))) < 0.05 * norm(wide) and sizes[1] < 0.3 * sizes[0]


def test_clients_that_take_turns_share_what_is_encoded(monkeypatch):
    encoded = []
    monkeypatch.setattr("strategies.downlink.pack", lambda *given: encoded.append(1) or pack(*given))
    downlink, state = server(coding(load("codec=int8"))), {}
    for turn in range(4):
        for k in (0, 1, 2, 3):  # after the first round 0 and 1 have something else than 2 and 3
            if turn or k < 2:
                next(downlink.messages(state, 0, (0, 2, 1, 3)[k] if turn else k, drawn(turn)))
        state = {}
    assert len(encoded) == 1 + 3 * 2


def test_a_crowd_does_not_fill_the_servers_memory(tmp_path, monkeypatch):
    """Who is forgotten is sent the difference from the start, and has what the server gave it all the same."""
    monkeypatch.setattr("strategies.downlink.KEPT", 3)
    wire = coding(load("codec=int8"))
    downlink, drawers = server(wire), [Drawer(str(tmp_path), "run", k) for k in range(6)]
    for turn in range(1, 9):
        for k in range(turn % 3, 6, 1 + turn % 2):  # they take part at different times
            had = receive(downlink, wire, drawers[k], drawn(turn))
            assert float(max((had[n] - drawn(turn)[n]).abs().max() for n in had)) < 0.1
        assert len({known.digest for known in downlink._had.values()}) <= 3


def test_float32_travels_whole_and_touches_no_disk(tmp_path):
    wire = coding(load("codec=float32"))
    downlink, drawer = server(wire), Drawer(str(tmp_path), "run", 0)
    for turn in range(3):
        assert digest(receive(downlink, wire, drawer, drawn(turn))) == digest(drawn(turn))
        assert digest(unpack(leaving(drawer, wire, 0, turn, drawn(turn)), wire.differences)) == digest(drawn(turn))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("codec", LOSSY)
def test_with_feedback_the_sum_of_what_was_sent_is_the_sum_of_what_was_meant(tmp_path, codec):
    """sum_t sent_t = sum_t u_t - e_T, whatever the codec: the error stays that of one message."""
    errors = {}
    for feedback in ("true", "false"):
        wire, drawer = coding(load(f"{codec} feedback={feedback}")), Drawer(str(tmp_path), f"run-{feedback}", 0)
        off = None
        for round in range(1, 21):
            sent = unpack(leaving(drawer, wire, 0, round, drawn(7)), wire.differences)
            off = sub(drawn(7), sent) if off is None else add(off, sub(drawn(7), sent))
        errors[feedback] = norm(off)
        assert (tmp_path / f"run-{feedback}").exists() == (feedback == "true")
    assert errors["true"] < 0.7 * errors["false"]
    _, lost = Drawer(str(tmp_path), "run-true", 0).recall("lost", 99)
    assert norm(lost) == pytest.approx(errors["true"], rel=1e-3)


def test_a_round_again_sends_the_same(tmp_path):
    wire, drawer = coding(load("codec=int4")), Drawer(str(tmp_path), "run", 0)
    first = [leaving(drawer, wire, 0, round, drawn(round)).payload.tobytes() for round in (1, 2, 3)]
    assert leaving(drawer, wire, 0, 3, drawn(3)).payload.tobytes() == first[2]
    other = Drawer(str(tmp_path), "run", 1)
    assert leaving(other, wire, 0, 1, drawn(1)).payload.tobytes() != first[0]  # its chance is its own


def test_a_difference_on_nothing_is_behind_and_a_codec_that_is_none_a_config_error(tmp_path):
    wire = coding(load("codec=int8"))
    downlink = server(wire)
    next(downlink.messages(None, 0, 0, drawn(0)))
    packed, facts = next(downlink.messages(None, 0, 0, drawn(1)))
    with pytest.raises(Behind, match="client 0 does not have what the difference"):
        arrived(Drawer(str(tmp_path), "run", 0), wire, packed, facts["link"], START)
    with pytest.raises(WireError):
        arrived(Drawer(str(tmp_path), "run", 0), wire, packed, "", START)
    with pytest.raises(ConfigError, match="codec"):
        coding(load("codec.kind=2"))


@pytest.mark.parametrize(
    "more",
    first(2, ["codec=int8", "codec=int4 +codec@codecs.patch_embed=low_rank", *(f"codec=int8 strategy={name}" for name in ("scaffold", "flora", "ffa_lora", "fedsa_lora", "hetlora +nodes.1.rank=2"))]),
)
def test_compressed_flower_is_the_compressed_loop(home, tmp_path, more):  # noqa: F811
    words = ["fraction=0.6", "rounds=3", *more.split()]
    summary, adapter = by_loop(home, tmp_path / "loop", *words)
    inprocess.run(server_app, client_app, 3, settings(home, tmp_path / "grid", *words))
    found, other = result(tmp_path / "grid")
    assert equal(adapter, other)
    assert found["accuracy"] == summary["accuracy"]


def test_int8_costs_a_quarter_both_ways_from_the_first_round_on(home, tmp_path):  # noqa: F811
    sizes, rows = {}, {}
    for codec in ("float32", "int8"):
        summary, _ = by_loop(home, tmp_path / codec, f"codec={codec}")
        sizes[codec] = summary["bytes_per_client_round"]
        lines = (tmp_path / codec / "loop" / "rounds.jsonl").read_text().splitlines()
        rows[codec] = [payload(json.loads(line)["bytes"]["train down"]) for line in lines]
    assert rows["int8"][0] == rows["int8"][1] < 0.26 * rows["float32"][0]
    assert sizes["int8"]["up"] < 0.3 * sizes["float32"]["up"] and sizes["int8"]["down"] < 0.3 * sizes["float32"]["down"]


def test_int8_saves_both_ways_where_half_of_the_factors_stays_at_home(home, tmp_path):  # noqa: F811
    sizes = {}
    for codec in ("float32", "int8"):
        summary, _ = by_loop(home, tmp_path / codec, f"codec={codec} strategy=fedsa_lora")
        sizes[codec] = {name: payload(found) for name, found in summary["bytes"].items()}
    for name in ("train up", "train down", "evaluate down"):
        assert sizes["int8"][name] < 0.27 * sizes["float32"][name]


def payload(sizes: dict[str, int]) -> int:
    """The bytes of the tensors."""
    return sum(size for name, size in sizes.items() if name in GROUPS)
