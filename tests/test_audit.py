"""Attacks: what hostile clients send, and what the rules make of it in real runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fl import keys
from fl.adapter import norm
from fl.randomness import generator
from simulations.audit import poison

OWN = {"head.weight": torch.tensor([3.0, 4.0])}
HONEST = [{"head.weight": torch.tensor(v)} for v in ([1.0, 0.0], [3.0, 0.0], [5.0, 0.0])]


def sent(name: str, seed: int = 0) -> torch.Tensor:
    return poison.ATTACKS[name](OWN, HONEST, generator(seed, "attack", 1, 9))["head.weight"]


def test_the_attacks_by_hand():
    assert sent("none").tolist() == [3, 4] and sent("sign_flip").tolist() == [-3, -4] and sent("scaling").tolist() == [300, 400]
    assert sent("little").tolist() == [3 - 1.5 * 2, 0]  # mean 3, sample sd 2; and where all agree there is nothing to hide in
    assert poison.little(OWN, HONEST[:1], generator(0))["head.weight"].tolist() == [1, 0]  # one alone has no spread
    assert torch.equal(sent("gaussian"), sent("gaussian")) and not torch.equal(sent("gaussian"), sent("gaussian", seed=1))
    many = {"head.weight": torch.zeros(10_000)}
    noise = poison.gaussian(many, [{"head.weight": torch.ones(10_000)}], generator(0, "attack", 1, 9))
    assert norm(noise) == pytest.approx(10 * 100, rel=0.05) and OWN["head.weight"].tolist() == [3, 4]


def test_the_table_says_how_many_runs_failed():
    lines = [
        {"cell": f"clients=10 seed={s} strategy={rule}", "attack": a, "attackers": 2, "clients": 10, "accuracy": 0.5 + 0.1 * s}
        for rule in ("fedavg", "median") for a in ("none", "scaling") for s in (0, 1, 2)
    ]  # fmt: skip
    lines[-1] = {k: v for k, v in lines[-1].items() if k != "accuracy"} | {"failed": "nan"}
    text = poison.table(lines)
    assert "2 attackers of 10 clients; all runs: `clients=10`" in text
    assert "| rule | none | scaling |" in text and "| fedavg | 60.0 ± 10.0 | 60.0 ± 10.0 |" in text
    assert "| median | 60.0 ± 10.0 | 55.0 ± 7.1; 1 of 3 failed |" in text


def test_the_attackers_see_the_honest_updates_of_their_own_round_alone(monkeypatch):
    """Also where client 0 is not in the cohort; and where nobody honest is, they send what they found."""
    given = [{"head.weight": torch.full((2,), float(k))} for k in range(3)]
    monkeypatch.setattr(poison.local, "train", lambda client, round, *more: (given[client.index], 1, {}))
    train, seen = poison.hostile("little", 1, 0), []
    monkeypatch.setitem(poison.ATTACKS, "little", lambda own, honest, stream: seen.append(list(honest)) or own)
    clients = [SimpleNamespace(index=k, of=3) for k in range(3)]
    for round, cohort in enumerate(([0, 1, 2], [1, 2], [2], [1, 2]), 1):
        for k in cohort:
            assert train(clients[k], round, None)[0] is given[k]
    assert seen == [given[:2], given[1:2], given[1:2]]


@pytest.mark.slow
def test_a_model_replacement_ruins_the_mean_and_not_the_median(tmp_path):
    keys.create(tmp_path / "key")
    words = ["clients=5", "rounds=3", "evaluate_every=3", "data.train=500", "data.test=500", f"key={tmp_path / 'key'}", f"output={tmp_path}"]
    assert poison.main(["--out", str(tmp_path), "--attackers", "1", "--attacks", "scaling,label_flip", "strategy=fedavg,median", *words]) == 0
    found = {(line["cell"].split("strategy=")[1], line["attack"]): line["accuracy"] for line in poison.read(tmp_path / "poison.jsonl")}
    assert found["fedavg", "scaling"] < 0.35 < 0.6 < found["median", "scaling"]
    assert found["fedavg", "label_flip"] > 0.5  # one of five is no great harm to anybody here
    before = (tmp_path / "poison.jsonl").read_text()
    poison.main(["--out", str(tmp_path), "--attackers", "1", "--attacks", "scaling", "strategy=fedavg", *words])
    assert (tmp_path / "poison.jsonl").read_text() == before
