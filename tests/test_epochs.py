"""Secure runs under a key that ages: a run ends its epoch, who was away catches up, and what was recorded stays shut."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import first
from test_simulation import by_flower, by_loop, equal, home, settings  # noqa: F401

from clients import blind as client_side
from clients import epochs, failure, local, standing
from clients.client_app import app as client_app
from fl import keys, seal_key
from fl.adapter import norm, sub
from fl.config import ConfigError, load
from fl.keys import SharedKey
from fl.seal_key import LEAP, ROTATED, SealKey
from fl.wire.flat import WireError
from fl.wire.masks import SealError, open_total
from simulations import inprocess, loop
from strategies import epochs as server_epochs
from strategies.epochs import behind, furthest
from strategies.rollcall import Roll, RollCallError, agree, roll_in
from strategies.server_app import app as server_app
from strategies.talk import RunFailed

BLIND = "blind=true seal.largest=200"
RUNS = pytest.mark.parametrize("run", [by_flower, pytest.param(by_loop, marks=pytest.mark.slow)], ids=["flower", "loop"])


def apart(out: Path, of: int = 3) -> str:
    """Each client with a copy of the seal key of its own, as on machines of their own; the settings that say so."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "seal.key").exists():
        seal_key.create(out / "seal.key")
    for i in range(of):
        shutil.copy(out / "seal.key", out / f"seal-{i}.key")
    return " ".join(f"+nodes.{i}.seal_key={out / f'seal-{i}.key'}" for i in range(of))


def stands(out: Path, of: int = 3) -> list[int]:
    """At which epoch each client's key stands."""
    return [seal_key.read(out / f"seal-{i}.key").epoch for i in range(of)]


@pytest.fixture
def opened(monkeypatch) -> list[tuple]:
    """Every sum of the runs to come with what opening it takes beside the key: all of it is known to the server."""
    seen: list[tuple] = []
    monkeypatch.setattr(standing, "open_total", lambda key, *rest: (seen.append(rest), open_total(key, *rest))[1])
    return seen


@RUNS
def test_a_run_ends_its_epoch_on_every_node(home, tmp_path, run):
    words = apart(tmp_path)
    run(home, tmp_path, BLIND, words)
    assert stands(tmp_path) == [1, 1, 1] and len({seal_key.read(tmp_path / f"seal-{i}.key").fingerprint for i in range(3)}) == 1
    run(home, tmp_path / "again", BLIND, words)
    assert stands(tmp_path) == [2, 2, 2]


def test_a_clear_run_needs_no_seal_key_and_steps_none(home, tmp_path):
    by_loop(home, tmp_path, "rounds=1", f"seal_key={tmp_path / 'none'}")
    assert seal_key.read(tmp_path / "seal.key").epoch == 0


def test_what_was_recorded_does_not_open_with_what_is_on_the_disk_afterwards(home, tmp_path, opened):
    before = seal_key.create(tmp_path / "seal.key")
    by_loop(home, tmp_path, BLIND)
    assert len({(bound, round) for bound, round, *_ in opened}) == 4, "two rounds, each trained and evaluated"
    for recorded in opened:
        open_total(before, *recorded)  # the record is whole: the old key would do
    now = seal_key.read(tmp_path / "seal.key")
    stolen = [now, SealKey(now.content()[:32], before.epoch), now.next(), SealKey((home / "key").read_bytes()), SharedKey((home / "key").read_bytes())]
    for recorded in opened:
        for key in stolen:
            with pytest.raises(SealError):
                open_total(key, *recorded)
    secret = before.content()[:32]
    for path in (p for place in (home, tmp_path) for p in place.rglob("*") if p.is_file()):
        assert secret not in path.read_bytes() and secret.hex().encode() not in path.read_bytes(), path


@RUNS
def test_who_was_away_as_a_run_ended_catches_up_at_the_next_roll_call(home, tmp_path, monkeypatch, capsys, run):
    words, real = apart(tmp_path), epochs.end

    def away(client, facts, packed=None):
        if client.index == 1:
            raise WireError("away")
        return real(client, facts, packed)

    if run is by_flower:  # the plain loop has nobody who is away
        with monkeypatch.context() as patch:
            patch.setattr(epochs, "end", away)
            run(home, tmp_path, BLIND, words)
        assert "client 1: its seal key has not stepped to epoch 1" in capsys.readouterr().out
    else:
        for i in (0, 2):
            seal_key.advance(tmp_path / f"seal-{i}.key", 1)
    assert stands(tmp_path) == [1, 0, 1]
    run(home, tmp_path / "next", BLIND, words)
    assert stands(tmp_path) == [2, 2, 2]


@RUNS
def test_who_is_too_far_behind_ends_the_roll_call_in_one_line(home, tmp_path, run):
    words = apart(tmp_path)
    for i in (0, 2):
        seal_key.advance(tmp_path / f"seal-{i}.key", LEAP)
        seal_key.advance(tmp_path / f"seal-{i}.key", LEAP + 1)
    with pytest.raises((keys.KeyFileError, RunFailed)) as refused:
        run(home, tmp_path, BLIND, words)
    assert "\n" not in str(refused.value) and stands(tmp_path) == [LEAP + 1, 0, LEAP + 1]


@RUNS
def test_a_run_is_not_resumed_once_another_has_ended(home, tmp_path, monkeypatch, run):
    monkeypatch.setattr("strategies.server_app.run_name", lambda config: "loop")
    broken_off(home, tmp_path, monkeypatch)
    kept = seal_key.read(tmp_path / "seal.key")
    by_loop(home, tmp_path / "other", BLIND, f"seal_key={tmp_path / 'seal.key'}")
    with pytest.raises(RollCallError, match=rf"^this run began with the seal key {kept.fingerprint}, and the clients' is 1-[0-9a-f]{{16}}: a run has ended since; start it anew$"):
        run(home, tmp_path, BLIND, "clients=3 rounds=4 resume=loop")


def test_inside_its_epoch_a_run_goes_on_bit_for_bit(home, tmp_path, monkeypatch):
    _, steady = by_loop(home, tmp_path / "steady", BLIND, "rounds=4")
    broken_off(home, tmp_path, monkeypatch)
    assert seal_key.read(tmp_path / "seal.key").epoch == 0
    assert equal(by_loop(home, tmp_path, BLIND, "rounds=4 resume=loop")[1], steady)
    assert seal_key.read(tmp_path / "seal.key").epoch == 1


def broken_off(home, out: Path, monkeypatch) -> None:
    """A run of four rounds that ended in the third, by the plain loop."""
    real, asked = client_side.ask, []

    def ends(client, facts, packed):
        if facts["round"] == 3:
            raise KeyboardInterrupt
        return real(client, facts, packed)

    with monkeypatch.context() as patch:
        patch.setattr(client_side, "ask", ends)
        with pytest.raises(KeyboardInterrupt):
            by_loop(home, out, BLIND, "rounds=4")


def test_a_run_that_another_one_ends_under_it_says_so(home, tmp_path, monkeypatch):
    real = client_side.stand

    def meanwhile(client, facts, packed):
        if facts["upto"] == 1:
            seal_key.advance(tmp_path / "seal.key", 1)
        return real(client, facts, packed)

    monkeypatch.setattr(client_side, "stand", meanwhile)
    with pytest.raises((SealError, RunFailed), match=r"another run has ended since"):
        by_loop(home, tmp_path, BLIND)


def test_masks_tags_and_locks_take_nothing_of_the_image_key(home, tmp_path, monkeypatch):
    def taken(self, purpose, nbytes):
        if purpose != "classes":  # a digest of the classes' names in the roll call
            raise AssertionError(f"the image key is for pictures alone, and was asked for {purpose}")
        return bytes(nbytes)

    monkeypatch.setattr(SharedKey, "stream", taken)
    by_loop(home, tmp_path, BLIND, "fraction=0.9 strategy=fedavgm")


# Revoked


@RUNS
def test_a_revoked_node_is_refused_by_name(home, tmp_path, run):
    words = apart(tmp_path)
    seal_key.rotate(tmp_path / "seal-0.key")
    shutil.copy(tmp_path / "seal-0.key", tmp_path / "seal-1.key")
    with pytest.raises((keys.KeyFileError, RunFailed)):
        run(home, tmp_path, BLIND, words)  # its chain is not brought to the new epoch
    assert stands(tmp_path) == [ROTATED, ROTATED, 0]
    forged = SealKey(seal_key.read(tmp_path / "seal-2.key").content()[:32], ROTATED)  # and it may say that it is there
    (tmp_path / "seal-2.key").write_bytes(forged.content())
    with pytest.raises(RollCallError, match=r"client 2 holds another seal key \(1000000000-.*give it the same seal key .veilora key share. and start again"):
        run(home, tmp_path, BLIND, words)


def test_a_revoked_node_opens_nothing_new_and_spoils_no_sum_unseen(home, tmp_path, opened):
    old = seal_key.create(tmp_path / "seal.key")
    new = seal_key.rotate(tmp_path / "seal.key")
    by_loop(home, tmp_path, BLIND)
    chain = [old]
    for _ in range(2 * LEAP):
        chain.append(chain[-1].next())
    for recorded in opened:
        open_total(new, *recorded)
        for key in (*chain, SealKey(old.content()[:32], new.epoch)):
            with pytest.raises(SealError):
                open_total(key, *recorded)


def test_a_sum_with_a_revoked_nodes_message_in_it_does_not_open(tmp_path):
    import numpy as np

    from fl.wire.masks import Terms, seal
    from fl.wire.sealed import add

    old = seal_key.create(tmp_path / "seal.key")
    new, terms, update = seal_key.rotate(tmp_path / "seal.key"), Terms(32, 3, 200, 1.0), np.full(10, 0.25, np.float32)

    def sum_of(*by: SealKey):
        return add([seal(key, "train", 1, i, update, 100, 1.0, terms) for i, key in enumerate(by)], 10, 32)

    assert np.allclose(open_total(new, "train", 1, sum_of(new, new, new), 10, terms).mean, 0.25, atol=1e-6)
    for revoked in (old, old.next(), SealKey(old.content()[:32], new.epoch)):
        with pytest.raises(SealError):
            open_total(new, "train", 1, sum_of(new, new, revoked), 10, terms)


# A server that lies, a client that lies


@pytest.mark.parametrize("epoch", [None, -1, 1.0, True, "1", 2**53, [1]])
def test_a_step_is_asked_for_by_a_number(home, tmp_path, epoch):
    client = local.open_client(load(settings(home, tmp_path, "clients=3", BLIND)), 0, 3)
    with pytest.raises(WireError, match="an epoch must be a number of runs"):
        epochs.step(client, {"epoch": epoch})
    assert seal_key.read(tmp_path / "seal.key").epoch == 0


def test_a_server_can_ask_for_no_step_back_and_for_no_endless_one(home, tmp_path):
    client = local.open_client(load(settings(home, tmp_path, "clients=3", BLIND)), 0, 3)
    assert epochs.catch_up(client, {"epoch": 5})["digests"]["seal"].startswith("5-")
    assert epochs.end(client, {"epoch": 0}) == ({}, None) and epochs.catch_up(client, {"epoch": 0})["digests"]["seal"].startswith("5-")
    with pytest.raises(keys.KeyFileError, match="too far behind to step"):
        epochs.step(client, {"epoch": 2**52})


def rolls(*seals: str) -> list[Roll]:
    same = {"code": "c", "config": "c", "key": "k", "classes": "c", "backbone": "b", "split": "s", "start": "s"}
    return [Roll(i, len(seals), same | {"seal": s}, 9, 9, 1, 1, {}, "") for i, s in enumerate(seals)]


def test_who_is_behind_is_told_from_the_fingerprints():
    a, b = "3-" + "a" * 16, "12-" + "b" * 16
    assert behind(rolls(b, a, b)) == [1] and furthest(rolls(b, a, b)) == 12
    assert behind(rolls("", "", "")) == [] and rolls("")[0].epoch == 0
    agree(rolls(a, a), "c")
    with pytest.raises(RollCallError, match="client 2 holds another seal key"):
        agree(rolls(a, a, "3-" + "c" * 16), "c")


def test_one_client_alone_leads_the_others_no_further_than_a_runs_end_does():
    """A revoked node, or one that lies, names an epoch far ahead: the others must not step there, for no step is taken back."""
    a, b = "3-" + "a" * 16, "103-" + "b" * 16
    assert furthest(rolls(a, b, a)) == 4 and furthest(rolls(a, "4-" + "d" * 16, a)) == 4 and furthest(rolls(b)) == 103
    with pytest.raises(RollCallError, match="client 1 holds another seal key"):
        agree(rolls("4-" + "d" * 16, b, "4-" + "d" * 16), "c")


@pytest.mark.parametrize("seal", ["x", "1", "-1-" + "a" * 16, "1-" + "A" * 16, "9" * 16 + "-" + "a" * 16, "1-" + "a" * 16 + "\n", "٣-" + "a" * 16])
def test_a_roll_with_no_fingerprint_of_a_seal_key_is_refused(seal):
    facts = rolls(seal)[0]._asdict()
    with pytest.raises(ValueError, match="digests.seal must be a seal key's epoch and fingerprint"):
        roll_in(facts)


# An image key of each client's own


@pytest.mark.parametrize("words", first(1, [BLIND, ""]))
def test_with_image_keys_of_their_own_the_adapter_is_that_of_a_shared_one(home, tmp_path, words):
    for i in range(3):
        keys.create(tmp_path / f"key-{i}")
    own = "image_keys=own " + " ".join(f"+nodes.{i}.key={tmp_path / f'key-{i}'}" for i in range(3))
    with pytest.raises(RollCallError, match="client 1 holds another key|client 0 holds another key|client 2 holds another key"):
        by_loop(home, tmp_path / "no", own.replace("image_keys=own", ""))
    still = "recipe.lr={lora_a:0,lora_b:0,head:0,patch_embed:0}"
    (_, separate), (_, shared), (_, plain), (_, start) = (
        by_loop(home, tmp_path / name, words, "precision=float32", more)
        for name, more in (("own", own), ("shared", ""), ("plain", "cipher=plain start=public"), ("start", still))
    )
    moved = norm(sub(plain, start))
    assert moved > 0 and norm(sub(separate, shared)) < 1e-3 * moved and norm(sub(separate, plain)) < 1e-3 * moved


def test_image_keys_of_their_own_need_a_keyed_start():
    with pytest.raises(ConfigError, match="need start=keyed, got start=public; set start=keyed or image_keys=shared"):
        load("image_keys=own start=public")


# What a coordinator hears of it


def test_in_a_deployment_a_failure_of_the_seal_key_is_told_by_a_rule_or_a_setting_alone(tmp_path):
    seal_key.create(tmp_path / "jane" / "seal.key")
    errors = []
    for work in (lambda: seal_key.advance(tmp_path / "jane" / "seal.key", 2 * LEAP), lambda: seal_key.read(tmp_path / "none")):
        with pytest.raises(keys.KeyFileError) as caught:
            work()
        errors.append(caught.value)
    assert [failure.closed(error, None) for error in (*errors, standing.Stepped("seal key 0-ab"))] == [
        "its key: the seal key is too far behind", "its key: seal_key; its log says why", "the seal: another run has ended since this one began",
    ]  # fmt: skip
