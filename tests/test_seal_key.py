"""A key that ages: forward only, the same in every process, the old bytes gone; and the way from one node to another."""

from __future__ import annotations

import hmac
import multiprocessing
import os
from pathlib import Path

import pytest

from clients import wrapped
from fl import durable, keys, seal_key
from fl.keys import KeyFileError, SharedKey
from fl.seal_key import LEAP, ROTATED, SealKey
from simulations import veilora

SECRET = bytes(range(32))


def hkdf(secret: bytes, info: str, nbytes: int = 32) -> bytes:
    """RFC 5869 with the seal key's salt, up to 32 bytes, from HMAC alone."""
    return hmac.digest(hmac.digest(b"veilora seal", secret, "sha256"), info.encode() + b"\x01", "sha256")[:nbytes]


@pytest.fixture
def path(tmp_path) -> Path:
    """A seal key of epoch 0, known to the byte."""
    keys.place(tmp_path / "home" / "seal.key", SealKey(SECRET).content())
    return tmp_path / "home" / "seal.key"


def everything(folder: Path) -> bytes:
    """All bytes of all files below a folder: what a thief of the disk reads, but for blocks that are no file's."""
    return b"".join(p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file())


# The ratchet


def test_a_step_is_hkdf_of_the_key_before_and_pinned_for_ever():
    first = SealKey(SECRET)
    assert first.fingerprint == f"0-{hkdf(SECRET, 'fingerprint', 8).hex()}" == "0-8d628cd08665f025"
    second = first.next()
    assert second.content() == hkdf(SECRET, "next") + (1).to_bytes(8, "big") and second.epoch == 1
    assert second.fingerprint.startswith("1-") and second != first and SealKey(SECRET, 1) != first


def test_a_seal_key_shares_no_stream_with_an_image_key_of_the_same_bytes():
    assert SealKey(SECRET).stream("a", 32) != SharedKey(SECRET).stream("a", 32)
    assert SealKey(SECRET) != SharedKey(SECRET) and SealKey(SECRET).fingerprint[2:] != SharedKey(SECRET).fingerprint


def test_nothing_that_can_be_printed_shows_a_seal_key(path):
    key = seal_key.read(path)
    for shown in (repr(key), str([key]), f"{key}", key.fingerprint, key.next().fingerprint):
        assert SECRET[:6].hex() not in shown and str(list(SECRET[:6]))[1:-1] not in shown
    with pytest.raises(AttributeError, match="does not change"):
        key.epoch = 7


def test_the_file_steps_forward_never_back_and_the_old_bytes_go(path):
    before = seal_key.read(path)
    held = open(path, "rb")  # the old file's blocks, as a thief would look at them
    assert seal_key.advance(path, 2) == before.next().next() == seal_key.read(path)
    assert SECRET not in everything(path.parent) and before.next().content()[:32] not in everything(path.parent)
    assert held.read() == bytes(40), "overwritten, not only unlinked"
    held.close()
    assert seal_key.advance(path, 2).epoch == seal_key.advance(path, 1).epoch == seal_key.advance(path, 0).epoch == 2
    assert [p.name for p in path.parent.iterdir()] == ["seal.key"] and path.stat().st_mode & 0o777 == 0o600


def test_a_step_is_bounded(path):
    assert seal_key.advance(path, LEAP).epoch == LEAP
    with pytest.raises(KeyFileError, match=f"stands at epoch {LEAP}, too far behind to step; have it shared anew: veilora key share"):
        seal_key.advance(path, 2 * LEAP + 1)
    assert seal_key.read(path).epoch == LEAP


def step(path: Path) -> None:
    for epoch in range(1, 21):
        seal_key.advance(path, epoch)
        seal_key.read(path)


def test_many_processes_may_step_one_file_at_once(path):
    expected = SealKey(SECRET)
    for _ in range(20):
        expected = expected.next()
    workers = [multiprocessing.get_context("fork").Process(target=step, args=(path,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert seal_key.read(path) == expected and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("at", ["link", "write", "rename", "overwrite"])
def test_a_step_that_is_broken_off_anywhere_leaves_a_key_and_nothing_of_the_old_one(path, monkeypatch, at):
    class Off(BaseException):
        """A power cut."""

    def cut(*_, **__):
        raise Off

    def renamed(old, new):
        real(old, new)
        raise Off

    real = os.replace
    where = {"link": (os, "link", cut), "write": (os, "replace", cut), "rename": (os, "replace", renamed), "overwrite": (durable, "destroy", cut)}
    with monkeypatch.context() as patch:
        patch.setattr(*where[at])
        with pytest.raises(Off):
            seal_key.advance(path, 1)
    assert seal_key.read(path).epoch == (0 if at in ("link", "write") else 1)
    monkeypatch.setattr(durable, "_alive", lambda process: False)
    assert seal_key.advance(path, 1) == SealKey(SECRET).next()
    assert SECRET not in everything(path.parent) and [p.name for p in path.parent.iterdir()] == ["seal.key"]


@pytest.mark.parametrize("where", [(os, "link"), (durable, "write")], ids=["link", "write"])
def test_a_folder_that_cannot_be_written_is_named(path, monkeypatch, where):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(*where, refuse)
        with pytest.raises(KeyFileError, match="must be in a folder that its owner may write, but cannot be replaced .Permission denied.$"):
            seal_key.advance(path, 1)
    assert seal_key.read(path) == SealKey(SECRET) and seal_key.advance(path, 1).epoch == 1


def test_one_kind_of_key_is_not_taken_for_the_other(path, tmp_path):
    keys.create(tmp_path / "key")
    with pytest.raises(KeyFileError, match="seal key .* must hold 40 bytes, got 32"):
        seal_key.read(tmp_path / "key")
    with pytest.raises(KeyFileError, match="key file .* must hold 32 bytes, got more"):
        keys.read(path)
    with pytest.raises(KeyFileError, match="seal key .* is missing; .* make the first: veilora keygen --seal"):
        seal_key.read(tmp_path / "none")


def test_a_credential_of_systemd_is_read_and_nothing_looser(tmp_path, monkeypatch):
    keys.create(tmp_path / "image.key")
    (tmp_path / "image.key").chmod(0o440)  # what an access list for the service's user looks like
    with pytest.raises(KeyFileError, match="can be read by others"):
        keys.read(tmp_path / "image.key")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    keys.read(tmp_path / "image.key")
    (tmp_path / "image.key").chmod(0o444)
    with pytest.raises(KeyFileError, match="can be read by others"):
        keys.read(tmp_path / "image.key")


# From one node to another


@pytest.fixture
def nodes(tmp_path) -> dict[str, Path]:
    """The pairs of three nodes."""
    for name in "abc":
        wrapped.pair(tmp_path / name)
    return {name: tmp_path / name for name in "abc"}


def public(pair: Path) -> Path:
    return wrapped.public_of(pair)


def test_a_pair_is_private_and_openssl_reads_it(nodes):
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    private = load_pem_private_key(nodes["a"].read_bytes(), None)
    assert nodes["a"].stat().st_mode & 0o777 == 0o600 and b"PRIVATE" not in public(nodes["a"]).read_bytes()
    assert private.public_key() == wrapped.public_in(public(nodes["a"]))
    with pytest.raises(KeyFileError, match="must not be overwritten"):
        wrapped.pair(nodes["a"])


@pytest.mark.parametrize("kind", [keys, seal_key], ids=["image key", "seal key"])
def test_a_shared_key_arrives_whole_and_its_pair_has_served(nodes, tmp_path, kind):
    key = kind.create(tmp_path / "key")
    assert wrapped.share(tmp_path / "key", public(nodes["b"]), nodes["a"], tmp_path / "file") == key.fingerprint
    content = (tmp_path / "key").read_bytes()
    assert content[:8] not in (tmp_path / "file").read_bytes()
    assert wrapped.take(tmp_path / "file", public(nodes["a"]), nodes["b"], tmp_path / "there" / "key") == (key.fingerprint, True)
    assert kind.read(tmp_path / "there" / "key") == key and (tmp_path / "there" / "key").stat().st_mode & 0o777 == 0o600
    assert not nodes["b"].exists(), "a disk stolen from now on does not open the file that was carried"


def test_two_files_for_one_node_have_nothing_alike(nodes, path, tmp_path):
    for name in ("one", "two"):
        wrapped.share(path, public(nodes["b"]), nodes["a"], tmp_path / name)
    one, two = ((tmp_path / name).read_bytes()[len(wrapped.MAGIC) :] for name in ("one", "two"))
    assert not any(one[i : i + 8] == two[i : i + 8] for i in range(len(one) - 8))


def test_a_wrapped_key_with_any_bit_flipped_is_refused(nodes, path, tmp_path):
    own, sender = wrapped.private_in(nodes["b"]), wrapped.public_in(public(nodes["a"]))
    whole = wrapped.wrap(path.read_bytes(), own.public_key(), wrapped.private_in(nodes["a"]))
    assert wrapped.unwrap(whole, own, sender) == path.read_bytes()
    for at in range(len(whole)):
        # X25519 leaves the top bit of a point out, as RFC 7748 says: that the key is of the point as written refuses it, too
        for bit in (1, 128):
            with pytest.raises(KeyFileError, match="must be as its sender wrote it"):
                wrapped.unwrap(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :], own, sender)
    for cut in range(len(whole)):
        with pytest.raises(KeyFileError, match="must be as its sender wrote it"):
            wrapped.unwrap(whole[:cut], own, sender)


def test_who_carries_the_file_can_neither_read_it_nor_put_a_key_of_his_own_in_its_place(nodes, path, tmp_path):
    wrapped.share(path, public(nodes["b"]), nodes["a"], tmp_path / "file")
    carrier = nodes["c"]
    with pytest.raises(KeyFileError, match="is for another node"):
        wrapped.take(tmp_path / "file", public(nodes["a"]), carrier, tmp_path / "stolen")
    seal_key.create(tmp_path / "his")
    wrapped.share(tmp_path / "his", public(nodes["b"]), carrier, tmp_path / "forged")
    with pytest.raises(KeyFileError, match="from another sender"):
        wrapped.take(tmp_path / "forged", public(nodes["a"]), nodes["b"], tmp_path / "mine")
    known = wrapped.public_in(public(nodes["b"]))  # and with all that is public: a sender whose half is A's, made without it
    low = b"\x01" + bytes(31)
    for head in (public(nodes["a"]).read_bytes()[:32], bytes(32), low, known.public_bytes_raw()):
        (tmp_path / "made").write_bytes(wrapped.MAGIC + head + bytes(12 + 56))
        with pytest.raises(KeyFileError, match="must be as its sender wrote it"):
            wrapped.take(tmp_path / "made", public(nodes["a"]), nodes["b"], tmp_path / "mine")
    assert not (tmp_path / "stolen").exists() and not (tmp_path / "mine").exists() and nodes["b"].exists()


def test_an_old_file_that_is_carried_anew_brings_no_old_key_back(nodes, path, tmp_path):
    there = tmp_path / "b.seal"
    wrapped.share(path, public(nodes["b"]), nodes["a"], tmp_path / "old")
    wrapped.take(tmp_path / "old", public(nodes["a"]), nodes["b"], there, keep=True)
    assert wrapped.take(tmp_path / "old", public(nodes["a"]), nodes["b"], there, keep=True)[1] is False, "the same is no harm"
    seal_key.advance(there, 1)
    with pytest.raises(KeyFileError, match="goes forward only: .* stands at epoch 1, and what was shared is of epoch 0"):
        wrapped.take(tmp_path / "old", public(nodes["a"]), nodes["b"], there, keep=True)
    assert seal_key.read(there).epoch == 1 and nodes["b"].exists()


def test_a_rotation_is_a_fresh_secret_for_those_who_stay(nodes, path, tmp_path):
    seal_key.advance(path, 3)
    old = seal_key.read(path)
    files = wrapped.rotate(path, [public(nodes[n]) for n in "abc"], [public(nodes["c"])], nodes["a"], tmp_path / "out")
    assert sorted(Path(f).name for f in files) == ["a.wrapped", "b.wrapped"]
    new = seal_key.read(path)
    assert new.epoch == ROTATED and old.content()[:32] not in everything(path.parent)
    assert new.content()[:32] not in {step.content()[:32] for step in steps(old, 50)}, "nothing that follows from the old one"
    seal_key.take(tmp_path / "theirs", old.next())  # B has ended another run in the meantime, and is not ahead for that
    assert wrapped.take(tmp_path / "out/b.wrapped", public(nodes["a"]), nodes["b"], tmp_path / "theirs") == (new.fingerprint, True)
    with pytest.raises(KeyFileError, match="is for another node"):
        wrapped.take(tmp_path / "out/b.wrapped", public(nodes["a"]), nodes["c"], tmp_path / "revoked")
    assert wrapped.rotate(path, [public(nodes["a"])], [], nodes["a"], tmp_path / "again") and seal_key.read(path).epoch == 2 * ROTATED


def test_a_server_that_lets_a_node_step_and_step_does_not_keep_a_fresh_secret_from_it(nodes, path, tmp_path):
    theirs = tmp_path / "theirs"
    seal_key.take(theirs, seal_key.read(path))
    for epoch in range(LEAP, 12 * LEAP, LEAP):
        seal_key.advance(theirs, epoch)
    wrapped.rotate(path, [public(nodes["b"])], [], nodes["a"], tmp_path / "out")
    assert wrapped.take(tmp_path / "out/b.wrapped", public(nodes["a"]), nodes["b"], theirs)[1] is True
    assert ROTATED >= 10**6 * LEAP, "a million words to a node, each of which writes to its disk"


def steps(key: SealKey, number: int):
    for _ in range(number):
        yield (key := key.next())


def test_a_rotation_that_cannot_be_wrapped_changes_nothing(nodes, path, tmp_path):
    (tmp_path / "twin").mkdir()
    wrapped.pair(tmp_path / "twin" / "a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.wrapped").touch()
    a, b = public(nodes["a"]), public(nodes["b"])
    for to, revoke, says in (
        ([a, b], [], "must not be overwritten"), ([a], [a], "must be for one node at least"), ([a, tmp_path / "none"], [], "cannot be read"),
        ([a, public(tmp_path / "twin" / "a")], [], "must have different file names"), ([path], [], "must be an X25519 key in PEM"),
    ):  # fmt: skip
        with pytest.raises(KeyFileError, match=says):
            wrapped.rotate(path, to, revoke, nodes["a"], tmp_path / "out")
    assert seal_key.read(path) == SealKey(SECRET)


def test_the_commands_say_what_to_do_next(tmp_path, capsys):
    def said(*words) -> str:
        assert veilora.main([str(word) for word in words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    def refused(*words) -> str:
        assert veilora.main([str(word) for word in words]) == 2
        return capsys.readouterr().err

    at = tmp_path
    first = said("keygen", "--seal", at / "a.seal")
    assert "fingerprint 0-" in first and "never to the server" in first
    for name in "ab":
        assert "Give this file to whoever shares a key" in said("key", "pair", at / name)
    assert f"veilora key take {at / 'file'}" in said("key", "share", at / "a.seal", "--to", at / "b.pub", "--pair", at / "a", "--out", at / "file")
    assert "from another sender" in refused("key", "take", at / "file", "--from", at / "b.pub", "--to", at / "b.seal", "--pair", at / "b")
    said("key", "take", at / "file", "--from", at / "a.pub", "--to", at / "b.seal", "--pair", at / "b")
    assert seal_key.read(at / "b.seal") == seal_key.read(at / "a.seal")
    assert "make one with: veilora key pair" in refused("key", "share", at / "a.seal", "--to", at / "a.pub", "--pair", at / "b.seal", "--out", at / "no")
    assert f"key {ROTATED}-" in said("key", "rotate", at / "a.seal", "--to", at / "a.pub", "--pair", at / "a", "--out", at / "out")
