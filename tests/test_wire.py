"""An adapter arrives as it left, whatever does not fit is refused, and the ledger counts what really travels."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from fl.adapter import GROUPS, digest, flat, group, read
from fl.models.lora_patch import lora_patch
from fl.wire.flat import Packed, WireError, float32_bytes, group_bytes, pack, unpack
from fl.wire.float32 import float32
from fl.wire.ledger import ENVELOPE, HEADER, Entry, entry, summarise
from fl.wire.records import facts_of, packed_of, serialised_bytes, to_content

CODEC = float32()
ADAPTER = {
    "head.weight": torch.arange(6.0).view(2, 3).T,  # not contiguous
    "pos_embed": torch.tensor(-1e-42),  # 0-d, and subnormal
    "a.lora_b.weight": torch.zeros(0, 4),
    "z.lora_a.weight": torch.tensor([[torch.inf, torch.nan, -0.0, 1 / 3]]),
}


def bits(adapter: dict) -> dict:
    return {n: (tuple(t.shape), t.dtype, t.contiguous().numpy().tobytes()) for n, t in adapter.items()}


def test_packing_and_unpacking_gives_every_bit_back():
    packed = pack(ADAPTER, CODEC)
    assert bits(unpack(packed, CODEC)) == bits(ADAPTER)
    assert bits(unpack(pack({}, CODEC), CODEC)) == {}
    assert bits(unpack(pack(flat(ADAPTER), CODEC), CODEC)) == bits(ADAPTER)
    assert pack(flat(ADAPTER), CODEC).header == packed.header


def test_what_is_packed_is_a_copy_and_what_arrives_is_read_in_place():
    own = flat({"head.bias": torch.ones(2)})
    packed = pack(own, CODEC)
    own.buffer.zero_()
    arrived = unpack(packed, CODEC)
    assert arrived["head.bias"].tolist() == [1, 1]
    packed.payload[:] = 0
    assert arrived["head.bias"].tolist() == [0, 0]
    packed.payload.flags.writeable = False
    assert unpack(packed, CODEC)["head.bias"].tolist() == [0, 0]


def test_a_payload_by_hand():
    packed = pack({"head.bias": torch.tensor([1.0, -2.0])}, CODEC)
    assert packed.header == '[["head.bias",[2],8]]'
    assert packed.payload.tolist() == [0, 0, 128, 63, 0, 0, 0, 192] and packed.nbytes == 21 + 8


def test_the_groups_lie_together_in_their_order():
    names = [n for n, _, _ in json.loads(pack(ADAPTER, CODEC).header)]
    assert names == ["z.lora_a.weight", "a.lora_b.weight", "head.weight", "pos_embed"]
    assert [GROUPS.index(group(n)) for n in names] == sorted(GROUPS.index(group(n)) for n in names)
    assert pack(dict(reversed(ADAPTER.items())), CODEC).header == pack(ADAPTER, CODEC).header
    assert group_bytes(pack(ADAPTER, CODEC).header) == {"lora_a": 16, "lora_b": 0, "head": 24, "backbone": 4}


def test_what_sending_would_cost_is_what_it_costs(tiny):
    model = tiny(lora_patch(2))
    for tensors in (ADAPTER, read(model), dict(model.state_dict()), {}):
        assert float32_bytes(tensors) == pack(tensors, CODEC).nbytes
    packed = pack(read(model), CODEC)
    assert packed.nbytes == len(packed.header.encode()) + 4 * sum(t.numel() for t in read(model).values())


@pytest.mark.parametrize(
    "header",
    [
        '[["a",[2],8]]',  # more than there is
        "[]",  # less
        '[["a",[1],4],["a",[0],0]]',  # twice the same name
        '[["a",[2],12],["b",[-1],-8]]',
        '[["a",[-1],4]]',
        '[["a",[2],4]]',  # the shape wants 8
        '[["a",[0],4]]',  # the shape wants none
        '[["a",[1]]]',
        '[["a",1,4]]',
        '[["a",[1.5],4]]',
        '[["a",[Infinity],4]]',
        '[["a",["1"],4]]',
        '[["a",[1],4],["b",[99999999999999999999,0],0]]',
        '{"a":[1]}',
        "null",
        "not JSON",
        "",
        "[" * 50_000,
        '[["a",[' + "1," * 60_000 + '1],4]]',
        '[["a",[2147483647,2147483647,2147483647,0],0]]',
        '[["' + "a" * 2**20 + '",[1],4]]',
    ],
    ids=lambda h: h[:40],
)
def test_a_header_that_does_not_fit_its_payload_is_refused(header):
    with pytest.raises(WireError) as caught:
        unpack(Packed(header, np.zeros(4, np.uint8)), CODEC)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("payload", [np.zeros(1, np.float32), np.zeros((2, 2), np.uint8), np.zeros(4, np.int8)], ids=str)
def test_a_payload_that_is_no_row_of_bytes_is_refused(payload):
    with pytest.raises(WireError, match=r"a payload must be uint8 \(n,\)"):
        unpack(Packed('[["a",[1],4]]', payload), CODEC)


def test_the_float32_codec_takes_nothing_else():
    with pytest.raises(WireError, match="float32 tensors, got torch.float64"):
        pack({"a": torch.zeros(1, dtype=torch.float64)}, CODEC)


@pytest.fixture
def send(monkeypatch):
    """A message as its receiver sees it: every object serialised and inflated again, as Flower does on the road."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)

    def through(content: RecordDict) -> tuple[Message, dict[str, bytes]]:
        sent = Message(content, 7, "train", group_id="1")
        sent.metadata.__dict__["_message_id"] = sent.object_id
        objects = {name: part.deflate() for name, part in get_all_nested_objects(sent).items()}
        received = inflate_object_from_contents(sent.object_id, dict(objects))
        assert received is not sent
        assert serialised_bytes(sent) == sum(len(octets) for octets in objects.values())
        return received, objects

    return through


def test_facts_and_adapter_survive_flowers_road(send):
    facts = {"examples": 12, "metrics": {"loss": 1 / 3, "steps": 4}, "error": "é \n \"quoted\"", "list": [1, None, True]}
    received, _ = send(to_content(facts, pack(ADAPTER, CODEC)))
    assert facts_of(received) == facts and bits(unpack(packed_of(received), CODEC)) == bits(ADAPTER)


@pytest.mark.parametrize("values", [0, 1, 1000, 1_400_000, 2_700_000])  # the last two are more than one and two of Flower's chunks
@pytest.mark.parametrize("fill", [torch.zeros, torch.rand])
def test_every_byte_is_counted_of_short_and_long_of_equal_and_different_chunks(send, values, fill):
    send(to_content({"examples": 12}, pack({"a": fill(values)}, CODEC)))  # which compares
    send(to_content({"examples": 12}, pack(flat({"a": fill(values)}), CODEC)))


@pytest.mark.parametrize("shape", [5, None, "12", (2, 6), (12.0,), ({},)])
def test_a_message_with_a_strange_shape_is_weighed_all_the_same(send, shape):
    content = to_content({"examples": 12}, pack(ADAPTER, CODEC))
    content["adapter"]["flat"].shape = shape
    sent = Message(content, 7, "train", group_id="1")
    assert serialised_bytes(sent) == sum(len(part.deflate()) for part in get_all_nested_objects(sent).values())


def test_the_ledger_counts_every_byte_of_the_message(send):
    packed = pack(ADAPTER, CODEC)
    _, objects = send(to_content({"examples": 12}, packed))
    line = entry("train", "up", packed.header, sum(map(len, objects.values())))
    assert line.total == sum(map(len, objects.values())) == sum(line.sizes.values())
    assert {g: line.sizes[g] for g in ("lora_a", "lora_b", "head", "backbone")} == group_bytes(packed.header)
    assert line.sizes[HEADER] == packed.nbytes - packed.payload.nbytes and 0 < line.sizes[ENVELOPE] < 4096
    more = pack({"head.weight": torch.zeros(1000)}, CODEC), pack({"head.weight": torch.zeros(2000)}, CODEC)
    small, large = (sum(map(len, send(to_content({}, p))[1].values())) for p in more)
    assert large - small == 4000  # the payload travels once, as it is


def test_a_message_without_an_adapter_is_all_envelope(send):
    received, objects = send(to_content({"loss": 0.5}))
    assert entry("evaluate", "up", "", sum(map(len, objects.values()))).sizes == {ENVELOPE: sum(map(len, objects.values()))}
    with pytest.raises(WireError, match="one flat adapter"):
        packed_of(received)


def test_sums_by_kind_and_way_add_up():
    entries = [
        Entry("train", "up", {"head": 10, ENVELOPE: 3}),
        Entry("train", "up", {"head": 20, "lora_a": 5, ENVELOPE: 4}),
        Entry("train", "down", {"head": 7, ENVELOPE: 1}),
        Entry("evaluate", "up", {ENVELOPE: 9}),
    ]
    sums = summarise(entries)
    assert sums == {
        "evaluate up": {ENVELOPE: 9, "total": 9, "messages": 1},
        "train down": {"head": 7, ENVELOPE: 1, "total": 8, "messages": 1},
        "train up": {"head": 30, "lora_a": 5, ENVELOPE: 7, "total": 42, "messages": 2},
    }
    assert sum(s["total"] for s in sums.values()) == sum(e.total for e in entries) and summarise([]) == {}


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"facts": ConfigRecord({"json": "{"})}),
        RecordDict({"facts": ConfigRecord({"json": "[1]"})}),
        RecordDict({"facts": ConfigRecord({"json": 5})}),
        RecordDict({"facts": ArrayRecord()}),
    ],
    ids=["nothing", "half", "list", "number", "arrays"],
)
def test_a_message_without_facts_is_refused(content, send):
    with pytest.raises(WireError, match="facts"):
        facts_of(send(content)[0])


def archive() -> bytes:
    file = io.BytesIO()
    np.savez(file, np.zeros(4, np.uint8))
    return file.getvalue()


@pytest.mark.parametrize("data", [b"", b"\x93NUMPY", b"PK\x03\x04", b"junk", archive()], ids=["none", "head", "zip", "junk", "archive"])
def test_an_array_that_cannot_be_read_is_refused(data, send):
    content = to_content({}, pack(ADAPTER, CODEC))
    content["adapter"] = ArrayRecord({"flat": Array("uint8", (4,), "numpy.ndarray", data)})
    with pytest.raises(WireError, match="one flat adapter"):
        packed_of(send(content)[0])


def test_an_array_is_never_unpickled(send, tmp_path):
    trap = np.array([{"trap": 1}], dtype=object)
    file = tmp_path / "trap.npy"
    np.save(file, trap, allow_pickle=True)
    content = to_content({}, pack(ADAPTER, CODEC))
    content["adapter"] = ArrayRecord({"flat": Array("object", (1,), "numpy.ndarray", file.read_bytes())})
    with pytest.raises(WireError, match="one flat adapter"):
        packed_of(send(content)[0])


def test_the_digest_of_what_arrives_is_the_digest_of_what_left():
    assert digest(unpack(pack(ADAPTER, CODEC), CODEC)) == digest(ADAPTER)
