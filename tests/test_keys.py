"""One secret, many streams: the same for ever, told apart by purpose, and never shown."""

from __future__ import annotations

import copy
import hashlib
import hmac
import os
import pickle
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fl import keys
from fl.keys import KeyFileError, SharedKey

SECRET = b"no message shows these 32 bytes!"


def hkdf(secret: bytes, info: str, nbytes: int) -> bytes:
    """RFC 5869, extract and expand, up to 32 bytes, from HMAC alone."""
    extracted = hmac.digest(b"veilora", secret, "sha256")
    return hmac.digest(extracted, info.encode() + b"\x01", "sha256")[:nbytes]


def counter_mode(key: bytes, nbytes: int) -> bytes:
    """AES-256 of the block numbers 0, 1, 2, ..., end to end."""
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    return b"".join(encryptor.update(i.to_bytes(16, "big")) for i in range(-(-nbytes // 16)))[:nbytes]


def shuffled(words: bytes, n: int) -> list[int]:
    """Fisher-Yates from the top, a draw below ``bound`` being the next 32-bit word that has no modulo bias."""
    order, at = list(range(n)), 0
    for last in range(n - 1, 0, -1):
        bound = last + 1
        while (word := int.from_bytes(words[at : at + 4], "big")) >= 2**32 // bound * bound:
            at += 4
        at += 4
        order[last], order[word % bound] = order[word % bound], order[last]
    return order


def test_what_a_key_gives_is_pinned_for_ever(key):
    assert key.fingerprint == "b6b84e55f15c5292"
    assert key.permutation("known answer", 12).tolist() == [1, 10, 9, 11, 7, 4, 3, 6, 5, 8, 2, 0]
    assert key.signs("known answer", 24).int().tolist() == [int(b) for b in "000000100000000001011000"]
    assert key.stream("known answer", 16).hex() == "d6e93e2f58152605306746cb674b1d01"


@pytest.mark.parametrize("n", [1, 2, 12, 768, 1500])
def test_the_streams_are_hkdf_then_aes_in_counter_mode_then_fisher_yates(n):
    key = SharedKey(SECRET)
    assert key.fingerprint == hkdf(SECRET, "fingerprint", 8).hex()
    assert key.stream("mask", n) == counter_mode(hkdf(SECRET, "stream mask", 32), n)
    assert key.permutation("image", n).tolist() == shuffled(counter_mode(hkdf(SECRET, "permutation image", 32), 8 * n + 64), n)
    assert key.signs("flip", n).shape == (n,)


def test_the_same_key_gives_the_same_bytes_in_another_process(key):
    code = (
        "import hashlib, torch; from fl.keys import SharedKey; from fl.ciphers.pixel_shuffle import pixel_shuffle\n"
        "key = SharedKey(bytes(range(32))); x = torch.arange(768).to(torch.uint8).view(1, 3, 16, 16)\n"
        "everything = [pixel_shuffle(key, 8).encrypt(x).numpy().tobytes(), key.permutation('p', 500).numpy().tobytes(),"
        " key.signs('p', 99).numpy().tobytes(), key.stream('p', 99), key.fingerprint.encode()]\n"
        "print(hashlib.sha256(b''.join(everything)).hexdigest())"
    )
    root = Path(__file__).resolve().parents[1]
    there = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(root)},
        capture_output=True, text=True, check=True,
    )
    here: list[str] = []
    exec(code.replace("print(", "here.append("), {"here": here})
    assert there.stdout.split() == here


def test_a_permutation_holds_every_index_once(key):
    for n in (0, 1, 2, 3, 192, 768):
        order = key.permutation("any", n)
        assert order.dtype == torch.int64 and order.shape == (n,)
        assert order.sort().values.tolist() == list(range(n))


def test_a_word_that_would_favour_some_orders_is_drawn_again(key, monkeypatch):
    monkeypatch.setattr(SharedKey, "_words", lambda self, purpose: iter([2**32 - 1, 4, 2**32 - 1]))
    assert key.permutation("any", 3).tolist() == [0, 2, 1]  # below 3 there are 2**32 - 1 fair words, below 2 all are


def test_permutations_are_uniform_over_purposes(key):
    draws = 1200
    counts: dict[tuple, int] = {}
    for i in range(draws):
        order = tuple(key.permutation(f"purpose {i}", 4).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    chi_square = sum((c - draws / 24) ** 2 / (draws / 24) for c in counts.values())
    assert chi_square < 49.7  # 23 degrees of freedom: exceeded once in a thousand keys, and this key is fixed


def test_signs_are_fair_and_independent_of_their_number(key):
    signs = key.signs("fair", 20_001)
    assert signs.dtype == torch.bool and signs.shape == (20_001,)
    assert abs(signs.float().mean() - 0.5) < 0.015
    assert torch.equal(key.signs("fair", 13), signs[:13])


def test_purposes_and_keys_and_kinds_have_streams_of_their_own(key):
    other = SharedKey(SECRET)
    assert key.stream("a", 16) != key.stream("b", 16) != other.stream("b", 16)
    assert not torch.equal(key.permutation("a", 50), key.permutation("b", 50))
    assert not torch.equal(key.permutation("a", 50), other.permutation("a", 50))
    assert not torch.equal(key.signs("a", 64), key.signs("b", 64))
    assert key == SharedKey(bytes(range(32))) != other and hash(key) == hash(SharedKey(bytes(range(32))))


def test_nothing_that_can_be_printed_shows_the_secret(tmp_path):
    key = SharedKey(SECRET)
    shown = [repr(key), str(key), f"{key}", f"{key!r:>80}", repr([key]), repr({"key": key}), key.fingerprint]
    path = tmp_path / "key"
    for content in (SECRET + b"\n", SECRET[:-1]):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(KeyFileError) as caught:
            keys.read(path)
        shown.append("".join(traceback.format_exception(caught.value)))
    with pytest.raises(ValueError, match="32 bytes, got 33") as too_long:
        SharedKey(SECRET + b"!")
    shown.append(str(too_long.value))
    for text in shown:
        for form in (SECRET[:8].decode(), SECRET[:8].hex(), str(list(SECRET[:8]))[1:-1], hashlib.sha256(SECRET).hexdigest()[:16]):
            assert form not in text


@pytest.mark.parametrize("carry", [pickle.dumps, copy.copy, copy.deepcopy], ids=lambda f: f.__name__)
def test_a_key_is_never_pickled_or_copied(carry):
    with pytest.raises(TypeError, match="never pickled") as caught:
        carry(SharedKey(SECRET))
    assert "no message" not in str(caught.value)


def test_a_key_does_not_change(key):
    for name in ("_secret", "fingerprint", "another"):
        with pytest.raises(AttributeError):
            setattr(key, name, b"x" * 32)
        with pytest.raises(AttributeError):
            delattr(key, name)
    assert not hasattr(key, "__dict__") and key.fingerprint == "b6b84e55f15c5292"


def test_a_new_key_file_is_private_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        key = keys.create(tmp_path / "new" / "key")
    finally:
        os.umask(before)
    status = (tmp_path / "new" / "key").stat()
    assert status.st_mode & 0o777 == 0o600 and status.st_size == 32
    assert keys.read(tmp_path / "new" / "key") == key != keys.create(tmp_path / "second")


def test_a_key_is_never_overwritten(tmp_path):
    key = keys.create(tmp_path / "key")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("key", "dangling"):
        with pytest.raises(KeyFileError, match="must not be overwritten"):
            keys.create(tmp_path / name)
    assert keys.read(tmp_path / "key") == key and not (tmp_path / "nowhere").exists()


def plain(path: Path, content: bytes = SECRET, mode: int = 0o600) -> None:
    path.write_bytes(content)
    path.chmod(mode)


def link(path: Path) -> None:
    plain(path.with_name("true"))
    path.symlink_to(path.with_name("true"))


@pytest.mark.timeout(20)  # a pipe must not be waited for
@pytest.mark.parametrize(
    ("make", "fix"),
    [
        pytest.param(lambda p: None, "missing; carry it from the client that has it, or make the first: python -m fl.keys", id="missing"),
        pytest.param(lambda p: plain(p, mode=0o640), r"mode 0640\); run: chmod 600", id="group"),
        pytest.param(lambda p: plain(p, mode=0o604), r"mode 0604\); run: chmod 600", id="others"),
        pytest.param(lambda p: plain(p, mode=0o620), r"mode 0620\); run: chmod 600", id="writable"),
        pytest.param(link, "must not be a link; name the file itself", id="link"),
        pytest.param(lambda p: plain(p, b""), "32 bytes, got 0; copy it again", id="empty"),
        pytest.param(lambda p: plain(p, SECRET[:31]), "32 bytes, got 31; copy it again", id="31 bytes"),
        pytest.param(lambda p: plain(p, SECRET + b"\n"), "32 bytes, got more; copy it again", id="33 bytes"),
        pytest.param(lambda p: p.mkdir(mode=0o700), "must be a plain file; make one with", id="folder"),
        pytest.param(lambda p: os.mkfifo(p, 0o600), "must be a plain file; make one with", id="fifo"),
    ],
)
def test_a_key_file_that_must_not_be_used_is_refused_with_the_fix(tmp_path, make, fix):
    make(tmp_path / "key")
    with pytest.raises(KeyFileError, match=fix) as caught:
        keys.read(tmp_path / "key")
    assert str(tmp_path / "key") in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_makes_a_key_once_and_shows_its_fingerprint_only(tmp_path, capsys):
    assert keys.main([str(tmp_path / "key")]) == 0
    said = capsys.readouterr().out
    assert keys.read(tmp_path / "key").fingerprint in said and (tmp_path / "key").read_bytes().hex()[:8] not in said
    assert keys.main([str(tmp_path / "key")]) == 2 and "must not be overwritten" in capsys.readouterr().err
    assert keys.main([]) == keys.main(["--help"]) == 2
