"""The small arithmetic of adapters, by hand; and that an adapter says what does not fit it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fl.adapter import GROUPS, add, count, cut, digest, flat, group, groups, load, mean, move, norm, norms, read, save, sub, write
from fl.models.lora_patch import lora_patch

A = {"head.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
B = {"head.weight": torch.tensor([[5.0, 6.0], [7.0, 8.0]])}


def test_what_is_read_is_what_trains_and_can_be_written_into_another_model(tiny):
    model, other = tiny(lora_patch(2), seed=0), tiny(lora_patch(2), seed=1)
    adapter = read(model)
    assert set(adapter) == {n for n, p in model.named_parameters() if p.requires_grad} and digest(adapter) != digest(read(other))
    write(other, adapter)
    assert digest(read(other)) == digest(adapter) and count(adapter) == sum(t.numel() for t in adapter.values())


def test_an_adapter_that_was_read_is_a_copy():
    model = nn.Linear(2, 2)
    adapter = read(model)
    before = adapter["weight"].clone()
    with torch.no_grad():
        model.weight.add_(1)
    assert torch.equal(adapter["weight"], before) and not adapter["weight"].requires_grad
    write(model, adapter)
    adapter["weight"].zero_()
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stranger": torch.zeros(2)}, "'stranger' is unexpected"),
        ({"bias": None}, "'bias' is missing"),
        ({"weight": torch.zeros(2, 3)}, r"weight must be \(2, 2\) torch.float32, got \(2, 3\) torch.float32"),
        ({"weight": torch.zeros(4)}, r"weight must be \(2, 2\) torch.float32, got \(4,\)"),
        ({"bias": torch.zeros(2, dtype=torch.float64)}, r"bias must be \(2,\) torch.float32, got \(2,\) torch.float64"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_and_nothing_is_written(change, says):
    model = nn.Linear(2, 2)
    before = digest(read(model))
    wrong = {n: t for n, t in ({n: t + 1 for n, t in read(model).items()} | change).items() if t is not None}
    for refuses in (lambda: write(model, wrong), lambda: add(wrong, read(model)), lambda: sub(wrong, read(model)),
                    lambda: mean([read(model), wrong], [1, 1])):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            refuses()
    assert digest(read(model)) == before


def test_sum_difference_and_mean_by_hand():
    assert add(A, B)["head.weight"].tolist() == [[6, 8], [10, 12]]
    assert sub(B, A)["head.weight"].tolist() == [[4, 4], [4, 4]]
    assert mean([A, B], [1, 1])["head.weight"].tolist() == [[3, 4], [5, 6]]
    assert mean([A, B], [3, 1])["head.weight"].tolist() == [[2, 3], [4, 5]]
    assert mean([A, B], [0, 7])["head.weight"].tolist() == B["head.weight"].tolist()
    assert mean([A], [5])["head.weight"].tolist() == A["head.weight"].tolist()
    assert norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])}) == 5.0


def test_a_step_moves_what_it_holds_and_leaves_the_rest_as_it_is():
    whole = {"first.weight": torch.ones(1), **A}
    after = move(whole, B)
    assert set(after) == set(whole) and torch.equal(after["head.weight"], A["head.weight"] + B["head.weight"])
    assert torch.equal(after["first.weight"], whole["first.weight"]) and torch.equal(whole["head.weight"], A["head.weight"])
    for wrong, says in (({"tail.weight": torch.ones(1)}, "'tail.weight' is unexpected"), ({"first.weight": torch.ones(2)}, "first.weight must be")):
        with pytest.raises(ValueError, match=says):
            move(whole, wrong)


def test_arithmetic_leaves_its_inputs_alone():
    a, b = {n: t.clone() for n, t in A.items()}, {n: t.clone() for n, t in B.items()}
    for result in (add(a, b), sub(a, b), mean([a, b], [2, 1]), mean([a], [1])):
        result["head.weight"].zero_()
    assert torch.equal(a["head.weight"], A["head.weight"]) and torch.equal(b["head.weight"], B["head.weight"])


@pytest.mark.parametrize("weights", [[], [1], [0, 0], [2, -1], [math.nan, 1], [math.inf, 1]])
def test_a_mean_that_has_no_meaning_is_refused(weights):
    with pytest.raises(ValueError, match="weight"):
        mean([A, B], weights)
    with pytest.raises(ValueError, match="got 0 and 0"):
        mean([], [])


@pytest.mark.parametrize(
    ("name", "belongs"),
    [
        ("blocks.0.attn.qkv.q.lora_a.weight", "lora_a"),
        ("blocks.11.attn.qkv.v.lora_b.weight", "lora_b"),
        ("patch_embed.proj.weight", "patch_embed"),
        ("patch_embed.proj.bias", "patch_embed"),
        ("head.weight", "head"),
        ("head.bias", "head"),
        ("pos_embed", "backbone"),
        ("cls_token", "backbone"),
        ("blocks.0.attn.qkv.weight", "backbone"),
        ("overhead.weight", "backbone"),
    ],
)
def test_every_tensor_belongs_to_one_group(name, belongs):
    assert group(name) == belongs and belongs in GROUPS


def test_groups_are_listed_in_their_order_and_measured_apart():
    adapter = {"head.bias": torch.tensor([3.0, 4.0]), "a.lora_b.weight": torch.tensor([1.0]), "a.lora_a.weight": torch.tensor([2.0])}
    assert groups(adapter) == ["lora_a", "lora_b", "head"]
    assert norms(adapter) == {"lora_a": 2.0, "lora_b": 1.0, "head": 5.0}


def test_a_digest_sees_name_shape_type_and_value_and_not_the_order():
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    others = [
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].view(1, 2), "b": base["b"]},
        {"a": base["a"].view(torch.int32), "b": base["b"]},
        {"a": torch.nextafter(base["a"], torch.tensor(9.0)), "b": base["b"]},
        {"a": base["a"]},
        {"a": base["a"], "b": base["b"], "c": torch.zeros(0)},
    ]
    seen = {digest(base), *map(digest, others)}
    assert len(seen) == 1 + len(others) and all(len(d) == 16 for d in seen)
    assert digest({"b": base["b"], "a": torch.tensor([1.0, 9.0, 2.0])[::2]}) == digest(base)


def test_an_adapter_survives_the_disk_whole_or_not_at_all(tmp_path, monkeypatch):
    adapter = A | {"scalar": torch.tensor(1.5), "bias": torch.arange(6.0).view(2, 3).T}
    path = tmp_path / "new" / "adapter.safetensors"
    save(adapter, path)
    assert digest(load(path)) == digest(adapter) and [p.name for p in path.parent.iterdir()] == [path.name]

    def full(handle):
        raise OSError("no space left")

    monkeypatch.setattr("fl.durable.os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        save(B, path)
    assert digest(load(path)) == digest(adapter)


def test_an_adapter_is_cut_to_a_layout_that_it_has_and_to_no_other():
    whole = flat({"lora_a": torch.arange(12.0).view(4, 3), "head.bias": torch.ones(2)})
    low = flat({"lora_a": whole["lora_a"][:2]})
    found = cut(whole, low.layout)
    assert found.layout == low.layout and torch.equal(found["lora_a"], low["lora_a"])
    assert torch.equal(cut(whole, whole.layout).buffer, whole.buffer)
    assert cut(low, whole.layout) is None and cut(whole, (("lora_a", (4,)),)) is None


def test_a_buffer_of_clients_has_a_row_and_a_first_dimension_for_each():
    rows = [{"head.weight": torch.arange(6.0).view(2, 3) + 10 * i, "a.lora_a.weight": torch.full((1, 2), float(i))} for i in range(3)]
    whole = flat({n: torch.stack([row[n] for row in rows]) for n in rows[0]}, lead=1)
    assert whole.buffer.shape == (3, 8) and whole.layout == flat(rows[0]).layout
    assert whole["head.weight"].shape == (3, 2, 3) and all(torch.equal(whole[n][i], row[n]) for i, row in enumerate(rows) for n in row)
    assert all(torch.equal(own, flat(row).buffer) for own, row in zip(whole.buffer, rows))
