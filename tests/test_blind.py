"""A whole run with a server that can read nothing: it learns the same, survives what goes wrong, and leaves only noise behind."""

from __future__ import annotations

import json
import shutil
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import first
from test_simulation import by_flower, by_loop, equal, home, settings  # noqa: F401

from clients import blind as client_side
from clients import local, units
from clients.state import Drawer
from fl.adapter import norm, ride, sub
from fl.config import ConfigError, load
from fl.keys import SharedKey
from fl.tree import named, nested
from fl.wire.flat import pack, unpack
from fl.wire.locked import lock, unlock
from fl.wire.masks import SealError, Terms, encoded
from fl.wire.octets import octets
from simulations import grid, loop
from simulations.report import ledger
from simulations.report import run as report_of
from simulations.report.numbers import Row
from strategies import blind as server_side
from strategies.gate import Refused
from strategies.plan import teller
from strategies.talk import Answer, QuorumLost

BLIND = "blind=true seal.largest=200"
PAIR = "seal.members=2"  # of three clients, some rounds have two
KEY = SharedKey(bytes(range(32)))
RUN = bytes(range(1, 33))  # T_0 of some run
LINEAR = ["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "ffa_lora", "rolora", "fedsvd", "fedsa_lora", "local_only"]


def rows(out, run: str = "loop") -> list[dict]:
    return [json.loads(line) for line in (out / run / "rounds.jsonl").read_text().splitlines()]


def far(a: dict, b: dict, start: dict) -> float:
    """How far apart two adapters are, measured in how far the second went."""
    return norm(sub(a, b)) / max(norm(sub(b, start)), 1e-12)


@pytest.mark.parametrize("more", first(3, ["strategy=fedavg", "strategy=scaffold recipe.optimizer=sgd", "strategy=fedadam", *(f"strategy={name}" for name in LINEAR if name not in ("fedavg", "fedadam")), "method=ravan", "method=melo start=public"]))
def test_a_blind_round_is_the_clear_one_to_a_millionth(home, tmp_path, more):
    (_, hidden), (_, clear), (_, start) = (
        by_loop(home, tmp_path / where, "rounds=1", more, extra)
        for where, extra in (("a", BLIND), ("b", "codec=float32"), ("c", "recipe.lr={lora_a:0,lora_b:0,lora_r:0,head:0,patch_embed:0,backbone:0}"))
    )
    if "local_only" not in more:  # all of it stays at home
        assert 0 < norm(sub(clear, start))
    assert far(hidden, clear, start) < 1e-6 or norm(sub(hidden, clear)) < 1e-6


@pytest.mark.parametrize("more", first(1, ["strategy=fedavgm", "strategy=rolora rounds=4", "strategy=scaffold recipe.optimizer=sgd rounds=3", "strategy=fedsa_lora", "method=melo"]))
def test_over_some_rounds_it_learns_the_same(home, tmp_path, more):
    (ours, hidden), (theirs, clear) = (by_loop(home, tmp_path / where, "precision=float32 tell.loss=6", more, extra) for where, extra in (("a", BLIND), ("b", "")))
    assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=0.02) and ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
    for hid, cle in zip(rows(tmp_path / "a"), rows(tmp_path / "b")):
        assert hid["train_loss"] == pytest.approx(cle["train_loss"], rel=2e-3)
    assert norm(sub(hidden, clear)) < 1e-2 * norm(clear)


@pytest.mark.parametrize("more", first(2, ["", f"strategy=fedadam fraction=0.6 rounds=4 evaluate_every=2 {PAIR}", "seal.bits=12", "seal.bits=16 strategy=rolora"]))
def test_flower_equals_the_plain_loop_blindly_too(home, tmp_path, more):
    (ours, adapter), (theirs, same) = by_loop(home, tmp_path, BLIND, more), by_flower(home, tmp_path, BLIND, more)
    assert equal(adapter, same) and ours["accuracy"] == theirs["accuracy"] and ours["loss"] == theirs["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("bits, least", [(16, 0.05), (12, 0.35)])
def test_narrow_words_lose_little(home, tmp_path, caplog, bits, least):
    (_, narrow), (_, wide), (_, start) = (
        by_loop(home, tmp_path / where, "rounds=2", BLIND, extra)
        for where, extra in (("a", f"seal.bits={bits}"), ("b", ""), ("c", "recipe.lr={lora_a:0,lora_b:0,lora_r:0,head:0,patch_embed:0,backbone:0}"))
    )
    assert 0 < far(narrow, wide, start) < least
    assert all("clipped" not in row for row in rows(tmp_path / "a")) and not any("clipped" in line.message for line in caplog.records)


# What goes wrong ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("lose", ["all", "one", "damage"])
@pytest.mark.parametrize("more", ["rounds=4", f"rounds=4 fraction=0.6 strategy=fedavgm evaluate_every=4 {PAIR}"])
def test_who_was_away_or_lost_its_state_is_sent_all_of_it(home, tmp_path, monkeypatch, more, lose):
    _, steady = by_loop(home, tmp_path / "a", BLIND, more)
    real = client_side.train

    def careless(client, facts, packed, **work):
        if facts["round"] == 3:
            files = sorted(client.drawer(str(facts["run"])).folder.parent.rglob("standing-*"))
            for file in files if lose == "all" else files[:1]:
                file.write_bytes(b"damaged") if lose == "damage" else file.unlink(missing_ok=True)
        return real(client, facts, packed, **work)

    monkeypatch.setattr(client_side, "train", careless)
    for run, out in ((by_loop, tmp_path / "b"), (by_flower, tmp_path / "c")):
        assert equal(run(home, out, BLIND, more)[1], steady)


class Spoilt(NamedTuple):
    name: str
    answers: object
    says: str


def flipped(answer):
    came = unpack(answer.packed, octets())
    payload = came["sealed.payload"].clone()
    payload[9] ^= 4
    return answer._replace(packed=pack({**came, "sealed.payload": payload}, octets()))


def cut(answer):
    came = unpack(answer.packed, octets())
    return answer._replace(packed=pack({**came, "sealed.payload": came["sealed.payload"][:-3].clone()}, octets()))


SPOILT = [
    Spoilt("truncated", lambda a: [a[0], cut(a[1]), a[2]], "left out (seal): client 1: it must have a nonce of 16 bytes"),
    Spoilt("empty", lambda a: [a[0]._replace(packed=None), *a[1:]], "left out (seal): client 0: it must have a nonce"),
    Spoilt("doubled", lambda a: [a[0], *a], "left out (seal): client 0: it has sent one already"),
    Spoilt("flipped", lambda a: [a[0], flipped(a[1]), a[2]], "the sum of round 2 does not carry the tag of its list"),
    Spoilt("relabelled", lambda a: [a[0], a[1]._replace(client=2), a[2]._replace(client=1)], "transcript: no message of client 1, 2"),
    Spoilt("nobody", lambda a: [], "round 2 needs updates of 2 of 3 clients, got 0; the model stays as it is, and the round is tried again"),
]


def spoiling(monkeypatch, how, scores: bool = False) -> None:
    """The answers of round 2's training, or of its evaluation, come as ``how`` makes them."""
    real = server_side.gather
    seen = []

    def gather(answers, size, bits):
        answers = list(answers)
        seen.append((size == 1) == scores)
        return real(how(answers) if seen[-1] and sum(seen) == 2 else answers, size, bits)

    monkeypatch.setattr(server_side, "gather", gather)


@pytest.mark.parametrize("spoilt", first(4, SPOILT), ids=lambda s: getattr(s, "name", None))
def test_what_was_tampered_with_is_named_and_left_out_and_nothing_is_lost(home, tmp_path, monkeypatch, capsys, spoilt):
    steady = by_loop(home, tmp_path / "steady", BLIND, "rounds=3")[1]
    capsys.readouterr()
    spoiling(monkeypatch, spoilt.answers)
    summary, adapter = by_loop(home, tmp_path, BLIND, PAIR, "rounds=3 quorum=0.6 retries=1")
    said = capsys.readouterr().out
    assert spoilt.says in said and "round 2: " in said + "round 2: "
    second, kept = rows(tmp_path)[1], spoilt.name in ("truncated", "empty", "doubled")
    count = {"nobody": 0, "flipped": 2, "relabelled": 2}.get(spoilt.name, 1)  # that a sum does not open two clients must say
    assert len(second.get("refused", [])) == count and summary["rounds"] == 3
    assert ("tried again" in said) == (not kept)
    assert equal(adapter, steady) == (not kept or spoilt.name == "doubled")  # a round that is tried again is as if it had never failed


def test_below_the_quorum_again_and_again_the_run_ends_and_says_how_to_go_on(home, tmp_path, monkeypatch):
    spoiling(monkeypatch, lambda a: [a[0], flipped(a[1]), a[2]])
    with pytest.raises(QuorumLost, match="quorum lost: round 2 needs updates of 3 of 3 clients, got 0; .*does not carry the tag.*resume=loop"):
        by_loop(home, tmp_path, BLIND, "rounds=3")


def test_an_evaluation_that_was_tampered_with_is_named_and_is_no_score(home, tmp_path, monkeypatch, capsys):
    spoiling(monkeypatch, lambda a: [a[0], cut(a[1]), a[2]], scores=True)
    by_loop(home, tmp_path, BLIND, PAIR, "rounds=3 quorum=0.6")
    assert "round 2: left out (seal): client 1: it must have a nonce" in capsys.readouterr().out
    assert [[(r["client"], r["code"]) for r in row.get("refused", [])] for row in rows(tmp_path)] == [[], [(1, "seal")], []]
    assert ["accuracy" in row for row in rows(tmp_path)] == [True, False, True]  # of two clients it is not told
    monkeypatch.undo()
    for where, how in (("flipped", lambda a: [a[0], flipped(a[1]), a[2]]), ("one", lambda a: a[:1])):
        spoiling(monkeypatch, how, scores=True)
        with pytest.raises(QuorumLost, match="round 2 needs evaluations of 2 of 3 clients, got"):
            by_loop(home, tmp_path / where, BLIND, PAIR, "rounds=3 quorum=0.6")
        monkeypatch.undo()


def test_the_accuracy_of_a_crowd_of_small_clients_is_exact():
    terms, stream = Terms(32, 3000, client_side.SHARD, Terms(32, 3000).limit / client_side.SHARD), np.random.default_rng(0)
    counts = [(int(stream.integers(0, n + 1)), int(n)) for n in stream.integers(1, 5, 3000)]
    x = sum(int(encoded(np.float32([right / n]), n, terms)[0][0]) for right, n in counts)
    assert x == sum(right for right, _ in counts)


def test_a_group_that_does_not_move_goes_through_narrow_words(home, tmp_path):
    assert by_loop(home, tmp_path, BLIND, "seal.bits=12 recipe.lr.patch_embed=0")[0]["rounds"] == 2


@pytest.mark.parametrize("some", first(2, [(5, [0]), (3, [0]), (5, [1, 2]), (5, [0, 2])]))
def test_whoever_fails_after_sealing_costs_nothing(home, tmp_path, monkeypatch, some):
    """The sum of the rest opens to the mean of the rest; its numbers are told of three clients, by the one whose turn it is."""
    of, gone = some
    spoiling(monkeypatch, lambda answers: [a for a in answers if a.client not in gone])
    by_loop(home, tmp_path, BLIND, PAIR, f"clients={of} rounds=3 quorum=0.3")
    assert "refused" not in rows(tmp_path)[1] and np.isfinite(rows(tmp_path)[2]["loss"])
    assert ("train_loss" in rows(tmp_path)[1]) == (of - len(gone) > 2 and 1 not in gone)  # in round 2 it is client 1's turn to tell


def test_half_of_a_rounds_clients_are_too_few_whatever_the_quorum(home, tmp_path, monkeypatch):
    """Or a server could show two halves two histories (`clients.echo`)."""
    spoiling(monkeypatch, lambda answers: [a for a in answers if a.client < 2])
    with pytest.raises(QuorumLost, match="round 2 needs updates of 3 of 4 clients, got 2"):
        by_loop(home, tmp_path, BLIND, PAIR, "clients=4 rounds=3 quorum=0.3")


@pytest.mark.parametrize("lost", [lambda a: a[1:], lambda a: [flipped(a[0]), *a[1:]]], ids=["a message", "a round"])
def test_scaffolds_variates_still_add_up_when_a_share_was_lost(home, tmp_path, monkeypatch, lost):
    """c is the mean of all c_k after every round, whatever became of one message, or of a round's."""
    spoiling(monkeypatch, lost)
    by_loop(home, tmp_path, BLIND, "strategy=scaffold recipe.optimizer=sgd rounds=4 quorum=0.6 retries=1", PAIR)
    drawers = [Drawer(str(tmp_path / "state"), "loop", k) for k in range(3)]
    own = [drawer.recall("control", 4)[1] for drawer in drawers]
    state = drawers[1].recall("standing", 4)[1]
    mean = {name: sum(c[name] for c in own) / 3 for name in own[0]}
    assert norm(sub({name: state[f"state/control.{name}"] for name in mean}, mean)) < 1e-3 * norm(mean)  # 0.5 where a share is lost


# What the server has --------------------------------------------------------------------------------------------------


def test_the_server_process_holds_uniform_bytes_only(home, tmp_path, monkeypatch):
    """Everything that came to it or that it keeps: messages, sums, locked states, files, lines."""
    held: list[np.ndarray] = []
    real_drive, real_train, updates = loop.drive, local.train, []

    def drive(talk, answers):
        def seen(question):
            for answer in answers(question):
                assert set(answer.facts) <= {"train_loss", "accuracy", "loss", "kept"}
                assert not answer.facts or question.kind == "report"
                held.extend(t.numpy() for n, t in (unpack(answer.packed, octets()) if answer.packed else {}).items() if n.startswith("sealed."))
                yield answer

        return real_drive(talk, seen)

    def train(client, *orders):
        updates.append(real_train(client, *orders))
        return updates[-1]

    monkeypatch.setattr(loop, "drive", drive)
    by_loop(home, tmp_path, BLIND, "fraction=0.9 rounds=3 tell.loss=6 model.embed_dim=64 model.num_heads=2", train=train)
    kept = (tmp_path / "loop" / "sealed.safetensors").read_bytes()
    together = np.concatenate([h.reshape(-1) for h in held if h.size > 1000])
    for octet in (*(h.reshape(-1) for h in held if h.size > 20_000), together):
        counts = np.bincount(octet, minlength=256)
        chi2 = float(((counts - octet.size / 256) ** 2 / (octet.size / 256)).sum())
        assert 130 < chi2 < 400  # 255 degrees of freedom, sd 22.6
    everything = together.tobytes() + kept
    for adapter, examples, metrics in updates:
        for tensor in adapter.values():
            raw = tensor.contiguous().numpy().tobytes()
            assert raw[:16] not in everything or not any(raw[:16])
    rest = [p for p in (tmp_path / "loop").iterdir() if p.name in ("rounds.jsonl", "summary.json", "environment.json")]
    text = "".join(p.read_text() for p in rest)
    assert len(rest) == 3 and all(f"{metrics['loss']!r}" not in text for _, _, metrics in updates)
    assert '"examples": null' in text and '"norms"' not in text


def test_a_run_that_is_repeated_never_repeats_a_mask(home, tmp_path, monkeypatch):
    nonces, real = [], client_side.seal

    def noting(*given):
        nonces.append((sealed := real(*given)).nonce)
        return sealed

    monkeypatch.setattr(client_side, "seal", noting)
    (_, one), (_, two) = by_loop(home, tmp_path / "a", BLIND), by_loop(home, tmp_path / "b", BLIND)
    assert equal(one, two) and len(nonces) == len(set(nonces)) == 2 * 2 * 6


def test_the_sealed_files_and_the_key_give_the_whole_run(home, tmp_path):
    """Useless without the key, complete with it: a client that never took part stands where all do."""
    from safetensors.torch import load_file

    words = (BLIND, PAIR, "rounds=4 strategy=fedavgm fraction=0.6")
    settings(home, tmp_path)
    shutil.copy(tmp_path / "seal.key", tmp_path / "before")
    _, adapter = by_loop(home, tmp_path, *words)
    config = load(settings(home, tmp_path, "clients=3", *words, f"seal_key={tmp_path / 'before'}"))  # the key that the run began with
    client = local.open_client(config, 1, 3)
    packed = pack(load_file(tmp_path / "loop" / "sealed.safetensors"), octets())
    shutil.rmtree(tmp_path / "state")
    standing = client_side.stand(client, {"run": "loop", "since": 4, "upto": 4}, packed)
    assert equal(client_side.strategy_of(config).view(standing.state), adapter)


# The small parts ------------------------------------------------------------------------------------------------------


def test_a_state_in_which_two_names_are_one_tensor_is_kept_and_locked(tmp_path):
    """As the README's lookahead has it every few rounds."""
    one = torch.ones(3)
    state = named((one, one))
    Drawer(str(tmp_path), "run", 0).keep("standing", 1, state)
    for back in (Drawer(str(tmp_path), "run", 0).recall("standing", 1)[1], unlock(KEY, RUN, 1, lock(KEY, RUN, 1, state))):
        assert equal(back, state)


def test_a_locked_state_opens_with_its_key_run_and_round_alone():
    tensors = {"0/a": torch.randn(3, 4), "told": torch.zeros(2, dtype=torch.float64)}
    locked = lock(KEY, RUN, 3, tensors)
    opened = unlock(KEY, RUN, 3, locked)
    assert equal(opened, tensors) and not torch.equal(locked, lock(KEY, RUN, 3, tensors))
    flipped_ = locked.clone()
    flipped_[40] ^= 1
    for key, run, round, octet in ((SharedKey(bytes(32)), RUN, 3, locked), (KEY, bytes(32), 3, locked), (KEY, RUN, 4, locked), (KEY, RUN, 3, flipped_), (KEY, RUN, 3, locked[:20])):
        with pytest.raises(SealError, match=f"the state of round {round} must be as a client locked it"):
            unlock(key, run, round, octet)


def test_a_state_becomes_named_tensors_and_comes_back():
    class Pair(NamedTuple):
        one: dict
        two: tuple

    state = Pair({"a.b": torch.ones(2), "c": torch.zeros(1)}, (torch.arange(3), {}))
    flat = named(state)
    assert list(flat) == ["0/a.b", "0/c", "1/0"]
    back = nested(state, flat)
    assert isinstance(back, Pair) and equal(named(back), flat)
    with pytest.raises(TypeError, match="tensors, mappings and tuples, got int"):
        named((1,))
    with pytest.raises(KeyError):
        nested(state, {})


@pytest.mark.parametrize(
    "more, says",
    [
        ("strategy=krum", "a blind server can add and nothing else, but krum needs more; use strategy=.*fedavg.*, or blind=false"),
        ("strategy=ffa_lora +nodes.1.rank=1", "adds updates of one shape, but clients have different ranks"),
        ("fraction=0.6", "a blind round needs seal.members=3 to 214748 clients at seal.bits=32 and seal.largest=10000, got 2; change clients, fraction or these"),
        ("seal.largest=1000000000", "a blind round needs seal.members=3 to 2 clients at seal.bits=32 and seal.largest=1000000000, got 3"),
        ("seal.members=1", "seal.members"),
        ("+nodes.0.rank=1 +nodes.1.rank=1 +nodes.2.rank=1", "fedavg gives all clients one rank, but client 0 has rank 1"),
        ("seal.bits=8", "seal.bits"),
    ],
)
def test_what_cannot_be_blind_is_one_line_before_the_run(home, tmp_path, more, says):
    with pytest.raises(ConfigError, match=says):
        by_loop(home, tmp_path, "blind=true", more)
    assert not (tmp_path / "loop").exists()


@pytest.mark.parametrize("facts", [{"loss": 1.0}, {"accuracy": 1.0}, {"accuracy": 1.5, "loss": 1.0}, {"accuracy": 0.5, "loss": float("nan")}, {"accuracy": 0.5, "loss": 10**400}, {"accuracy": [], "loss": 1}])
def test_a_report_without_its_figures_names_the_client(facts):
    with pytest.raises(Refused, match=r"client 2: a report"):
        server_side.figures(Answer(2, facts), "accuracy", "loss")
    assert server_side.figures(Answer(2, {}), "accuracy", "loss") == {}


@pytest.mark.parametrize("spoil", first(1, [lambda facts: ({"train_loss": 1.0}, None), lambda facts: ({"train_loss": 10**400}, None), lambda facts: ({"refused": "no"}, None)]))
def test_one_client_that_reports_nonsense_does_not_stop_the_others(home, tmp_path, monkeypatch, capsys, spoil):
    _, steady = by_loop(home, tmp_path / "steady", BLIND, "fraction=0.9 rounds=3")
    real = client_side.report

    def report(client, facts, packed):
        whose = teller(client.config, facts["round"], range(3))  # who is asked first
        return spoil(facts) if client.index == whose and not facts.get("last") else real(client, facts, packed)

    monkeypatch.setattr(client_side, "report", report)
    assert equal(by_loop(home, tmp_path, BLIND, "fraction=0.9 rounds=3")[1], steady)
    assert [{one["client"] for one in row["refused"]} for row in rows(tmp_path)] == [{2}, {1}, {0}]


def test_a_blind_run_is_a_cell_of_a_grid_like_any_other(home, tmp_path):
    words = settings(home, tmp_path, "clients=3", BLIND).split()
    line = grid.run_cell(dict(word.split("=", 1) for word in words), str(tmp_path))
    assert line["client_accuracies"] == [] and line["examples"] is None
    assert line["accuracy"] == line["curve"][-1][1] and line["rounds"][-1]["mb"] > line["rounds"][0]["mb"] > 0
    assert set(ledger.by_group(Row("", {}, {}, [line]))) == {"sealed", ledger.REST}


def test_riders_of_a_linear_strategy_go_through_the_same_words():
    like = {"head.weight": torch.randn(2, 3), **ride("control", {"head.weight": torch.randn(2, 3)})}
    unit = {"head": 0.5, "control": 0.125}
    back = units.shaped(units.flat(like, unit), like, unit)
    assert all(torch.allclose(back[n], like[n]) for n in like)


def test_a_run_of_two_clients_is_told_no_number_and_ends_well(home, tmp_path, capsys):
    summary, _ = by_loop(home, tmp_path, BLIND, PAIR, "clients=2")
    assert summary["accuracy"] is summary["loss"] is summary["best_accuracy"] is None
    assert all({"train_loss", "accuracy", "loss"}.isdisjoint(row) for row in rows(tmp_path))
    said = capsys.readouterr().out
    assert "train loss not told" in said and "accuracy not told on test images of 2 clients" in said
    assert not (tmp_path / "loop" / "curve.svg").exists()
    text = report_of.markdown(report_of.read(tmp_path / "loop"))
    assert "Accuracy not told on test images of 2 clients" in text and "| 1 | – | – | – | 2 |" in text
    with pytest.raises(ConfigError, match="blind clients tell none of fewer than 3; raise clients, or set blind=false"):
        grid.check([dict(word.split("=", 1) for word in settings(home, tmp_path, "clients=2", BLIND, PAIR).split())])
