"""What a node's owner has in hand: `veilora policy`, `veilora release`, and the doctor's look at who owns what."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
from pathlib import Path

import pytest
from test_command import command  # noqa: F401
from test_strategies import roll

from clients import bundle, release
from clients.kit import ownership, policy_file
from clients.kit.ownership import User
from clients.policy import Code, Policy, PolicyError
from fl import provenance
from fl.provenance import ROOT
from strategies.rollcall import remarks, roll_in, summary


@pytest.fixture
def signer(tmp_path) -> Path:
    path = tmp_path / "signer.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", path], check=True, capture_output=True)
    return path


def test_the_codes_digest_is_that_of_what_sha256sum_writes():
    lines = "".join(f"{hashlib.sha256((ROOT / name).read_bytes()).hexdigest()}  {name}\n" for name in provenance.shipped())
    assert provenance.code_sha256() == hashlib.sha256(lines.encode()).hexdigest() and provenance.code_digest() == provenance.code_sha256()[:16]


def test_a_policy_is_checked_against_the_words_of_a_run(tmp_path, command):
    (tmp_path / "policy.toml").write_text(policy_file.text(secure=True))
    status, said = command("policy", "check", tmp_path / "policy.toml", "--format", "json", "blind=true", "name=trial")
    told = json.loads(said)
    assert status == 0 and told["ok"] and told["policy_sha256"] == Policy().digest() and len(told["config_sha256"]) == 64
    assert command("policy", "check", tmp_path / "policy.toml", "blind=true")[0] == 0
    assert command("policy", "check", tmp_path / "policy.toml", "blind=false")[0] == 6
    status, said = command("policy", "check", tmp_path / "none.toml", "blind=true")
    assert status == 2 and said.startswith("error: file: ") and "must exist" in said
    (tmp_path / "policy.toml").write_text("[run]\nsecure = 1\n")
    assert command("policy", "check", tmp_path / "policy.toml", "blind=true")[1].startswith("error: file: run.secure")


def test_a_release_is_signed_and_verified(tmp_path, signer, command):
    status, said = command("release", "sign", tmp_path / "release.sig", "--key", signer, "--format", "json")
    told = json.loads(said)
    assert status == 0 and told["code"] == provenance.code_sha256()
    assert command("release", "verify", tmp_path / "release.sig", "--signer", told["signer"])[0] == 0
    other = release.sign(_another(tmp_path), tmp_path / "other.sig", told["code"])
    assert command("release", "verify", tmp_path / "release.sig", "--signer", other)[0] == 6
    assert release.verify(tmp_path / "release.sig", [other, told["signer"]], told["code"]) == told["signer"]


def _another(tmp_path: Path) -> Path:
    path = tmp_path / "another.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", path], check=True, capture_output=True)
    return path


def test_signed_mode_lets_in_no_release_that_an_own_signer_has_not_signed(tmp_path, signer):
    code = provenance.code_sha256()
    own = release.sign(signer, tmp_path / "release.sig", code)
    bundle.signed(Code(mode="signed", signers=[own], signature=str(tmp_path / "release.sig")), code)
    bundle.signed(Code(), code)
    stranger = release.sign(_another(tmp_path), tmp_path / "stranger.sig", code)
    (tmp_path / "none.sig").write_text("no base64!\n")
    (tmp_path / "short.sig").write_text("AAAA\n")
    refused = [
        Code(mode="signed"),
        Code(mode="signed", signers=[own]),
        Code(mode="signed", signers=[], signature=str(tmp_path / "release.sig")),
        Code(mode="signed", signers=[own], signature=str(tmp_path / "stranger.sig")),
        Code(mode="signed", signers=[stranger], signature=str(tmp_path / "release.sig")),
        Code(mode="signed", signers=[own], signature=str(tmp_path / "missing.sig")),
        Code(mode="signed", signers=[own], signature=str(tmp_path / "none.sig")),
        Code(mode="signed", signers=[own], signature=str(tmp_path / "short.sig")),
        Code(mode="signed", signers=["no key"], signature=str(tmp_path / "release.sig")),
    ]
    for policy in refused:
        with pytest.raises(PolicyError, match=r"^code\.signers: "):
            bundle.signed(policy, code)
    with pytest.raises(PolicyError, match=r"^code\.signers: "):
        bundle.signed(Code(mode="signed", signers=[own], signature=str(tmp_path / "release.sig")), "0" * 64)


def test_a_signers_key_must_be_ed25519_and_in_the_clear(tmp_path):
    with pytest.raises(release.ReleaseError, match="Ed25519"):
        (tmp_path / "x").write_text("none")
        release.sign(tmp_path / "x", tmp_path / "sig", "0" * 64)
    subprocess.run(["openssl", "genpkey", "-algorithm", "x25519", "-out", tmp_path / "x"], check=True, capture_output=True)
    with pytest.raises(release.ReleaseError, match="must be an Ed25519 key"):
        release.sign(tmp_path / "x", tmp_path / "sig", "0" * 64)
    assert not (tmp_path / "sig").exists()


def test_the_roll_takes_a_digest_for_a_policy_and_no_other_text():
    facts = roll(0, 1)._asdict() | {"policy": "0123456789abcdef"}
    rolls = [roll_in(facts), roll_in(facts | {"client": 1})]
    assert summary(rolls)["policies"] == {"0123456789abcdef": 2} and "policy 0123456789abcdef is in force at 2 of 2 clients" in remarks(rolls)
    for text in ("**bold**", "0" * 65, "ABC", "a\n"):
        with pytest.raises(ValueError, match="policy must be a digest"):
            roll_in(facts | {"policy": text})
    assert summary([roll_in(roll(0, 1)._asdict())])["policies"] == {}


NOBODY = User("nobody", 65534, frozenset({65534}))


@pytest.fixture
def machine(tmp_path) -> Path:
    """What a node stands on, owned by whoever runs the tests."""
    for place in (tmp_path, *tmp_path.parents):
        if place.stat().st_mode & stat.S_IWOTH and not place.stat().st_mode & stat.S_ISVTX:
            pytest.skip(f"ANYBODY MAY WRITE: {place}")
    (tmp_path / "node-0").mkdir(mode=0o755)
    (tmp_path / "node-0" / "policy.toml").touch(mode=0o644)
    return tmp_path / "node-0"


def test_what_a_service_could_write_is_found(machine):
    policy = machine / "policy.toml"
    assert ownership.writable(policy, NOBODY) is None
    policy.chmod(0o666)
    assert ownership.writable(policy, NOBODY) == policy
    policy.chmod(0o664)
    assert ownership.writable(policy, NOBODY) is None
    assert ownership.writable(policy, NOBODY._replace(groups=frozenset({policy.stat().st_gid}))) == policy
    policy.chmod(0o444)
    assert ownership.writable(policy, NOBODY._replace(uid=os.geteuid())) == policy, "an owner can make it writable"
    machine.chmod(0o777)
    assert ownership.writable(policy, NOBODY) == machine, "who may write the folder may put another file there"
    machine.chmod(0o1777)
    assert ownership.writable(policy, NOBODY) is None, "but not where each may take away his own alone"
    policy.unlink()
    assert ownership.writable(policy, NOBODY) == machine, "and where there is no file he may make one"


def test_the_doctor_says_who_owns_what_and_finds_a_policy_that_the_service_could_write(machine):
    (fine,) = ownership.ownership(machine, str(machine / "key"), machine / "policy.toml", NOBODY)
    assert fine.ok is (ownership.writable(ROOT, NOBODY) is None) and "policy.toml" in fine.says and "0644" in fine.says
    (machine / "policy.toml").chmod(0o666)
    (found,) = ownership.ownership(machine, str(machine / "key"), machine / "policy.toml", NOBODY)
    assert not found.ok and "nobody could write" in found.says and f"policy.toml ({machine / 'policy.toml'})" in found.says and "chmod go-w" in found.do
    (root,) = ownership.ownership(machine, "", machine / "policy.toml", User("root", 0, frozenset()))
    assert root.ok and "run me as the service's user" in root.says
