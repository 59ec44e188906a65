"""A run's record: whatever is changed in it, in one bit, is found; whoever shows two records is named."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from conftest import first
from cryptography.hazmat.primitives.asymmetric import ec
from test_simulation import by_loop, home, settings  # noqa: F401

from clients.client_app import app as client_app
from clients.kit.certificates import node_key
from fl.durable import IntegrityError
from fl.record import NAME, Head, Record, chain, digest, sign, signer, text, written
from simulations import inprocess, veilora
from simulations.followed import follow
from simulations.verify import verify
from strategies.server_app import app as server_app

SECURE = "blind=true seal.largest=200"


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    """Three nodes' keys: node-N, private, and node-N.pub."""
    folder = tmp_path_factory.mktemp("keys")
    for i in range(3):
        private, public = node_key()
        (folder / f"node-{i}").write_bytes(private), (folder / f"node-{i}.pub").write_bytes(public)
    return folder


def signed_run(home: Path, out: Path, keys: Path, *more: str) -> Path:
    """A run of three clients that sign, in one process."""
    own = {i: {"node-key-path": str(keys / f"node-{i}")} for i in range(3)}
    inprocess.run(server_app, client_app, 3, settings(home, out, "clients=3", *more), own)
    return max(out.glob("demo-*"), key=lambda p: p.name)


@pytest.fixture(scope="module", params=["clear", "secure"])
def run(request, home, keys, tmp_path_factory) -> Path:
    """The folder of a run that nodes signed."""
    return signed_run(home, tmp_path_factory.mktemp(request.param), keys, "rounds=3", SECURE if request.param == "secure" else "")


def test_the_record_of_an_honest_run_holds_and_is_signed_to_its_end(run, keys):
    found = verify(run, keys)
    assert (found.rounds, found.ended, found.signers, found.closed) == (3, True, (0, 1, 2), (0, 1, 2))
    assert [line["kind"] for line in chain((run / NAME).read_bytes())] == ["begin", "round", "round", "round", "end", "closed"]
    assert found.head == digest((run / NAME).read_bytes().splitlines()[-1])


def covered(run: Path) -> list[Path]:
    return sorted(p for p in run.iterdir() if p.name in ("rounds.jsonl", NAME, "summary.json", *json.loads((run / NAME).read_bytes().splitlines()[-2])["files"]))


@pytest.mark.parametrize("apart", first(1, [17, 1]))
def test_one_flipped_bit_anywhere_does_not_hold(run, keys, tmp_path, apart):
    """Every byte of the record itself, or one of ``apart``, and of each other file its ends and fifty bytes between."""
    copy, stream = shutil.copytree(run, tmp_path / run.name), random.Random(0)
    names = {p.name for p in covered(run)}
    assert {"config.yaml", "command.json", "environment.json", "curve.svg", "summary.json", "rounds.jsonl", NAME} < names
    for path in covered(copy):
        whole = path.read_bytes()
        places = range(stream.randrange(apart), len(whole), apart) if path.name == NAME else {0, len(whole) - 1, *(stream.randrange(len(whole)) for _ in range(50))}
        for at in places:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << stream.randrange(8)]) + whole[at + 1 :])
            with pytest.raises(IntegrityError):
                verify(copy, keys)
        path.write_bytes(whole)
    verify(copy, keys)


def test_what_is_cut_added_or_taken_away_does_not_hold(run, keys, tmp_path):
    copy = shutil.copytree(run, tmp_path / run.name)
    for path in covered(copy):
        whole = path.read_bytes()
        for other in (None, b"", whole[:-1], whole + b"\n", whole + whole, whole[: len(whole) // 2], b"\n".join(whole.split(b"\n")[:-2]) + b"\n"):
            path.write_bytes(other) if other is not None else path.unlink()
            with pytest.raises(IntegrityError):
                verify(copy, keys)
        path.write_bytes(whole)
    other = copy / ("sealed.safetensors" if (copy / "adapter.safetensors").exists() else "adapter.safetensors")
    if not other.exists():
        other.touch()
        with pytest.raises(IntegrityError, match=f"{other.name} is in the folder and not in the record"):
            verify(copy, keys)


def rewritten(run: Path, out: Path, change) -> Path:
    """A copy of the run whose chain a forger has made anew after ``change`` to its lines; he has no node's key."""
    copy = shutil.copytree(run, out / run.name)
    lines = [json.loads(line) for line in (copy / NAME).read_text().splitlines()]
    change(lines, copy)
    before = ""
    for n, line in enumerate(lines):
        line |= {"line": n, "before": before}
        before = digest(written(line))
    (copy / NAME).write_text("".join(written(line) + "\n" for line in lines))
    return copy


def better(lines, copy) -> None:
    """The last row tells of a better accuracy."""
    rows = [json.loads(row) for row in (copy / "rounds.jsonl").read_text().splitlines()]
    rows[2]["accuracy"] = 0.99
    (copy / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines[3]["row"] = digest(json.dumps(rows[2]))


def unsigned(lines, copy) -> None:
    for line in lines:
        line.pop("signed", None)
    del lines[-1]


def unknown(lines, copy) -> None:
    unsigned(lines, copy)
    lines[0]["signers"] = {}


def own_keys(lines, copy) -> None:
    """The forger's own keys in the nodes' place."""
    private = {str(i): ec.generate_private_key(ec.SECP384R1()) for i in range(3)}
    lines[0]["signers"] = {i: signer_line(key) for i, key in private.items()}
    before, transcript = "", lines[0].get("transcript", "")
    for n, line in enumerate(lines):
        line |= {"line": n, "before": before}
        if "signed" in line:
            head = Head(line["signed"]["line"], digest(written(lines[line["signed"]["line"]])))
            line["signed"]["by"] = {i: sign(key, text(lines[0]["run"], head, transcript)) for i, key in private.items()}
        transcript, before = line.get("sum", {}).get("transcript", transcript), digest(written(line))


def signer_line(key) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


@pytest.mark.parametrize("forge, says", [
    (better, "what client 0 signed is not this record"), (unsigned, "must be signed by all who trained in it and have a key, but is not by client 0"),
    (unknown, "the record has no key of client 0 than node-0.pub"), (own_keys, "the record has another key of client 0 than node-0.pub"),
])
def test_a_forger_who_makes_the_whole_chain_anew_lacks_the_nodes_keys(run, keys, tmp_path, forge, says):
    with pytest.raises(IntegrityError, match=says):
        verify(rewritten(run, tmp_path, forge), keys)


def test_the_forgers_tool_itself_is_right(run, keys, tmp_path):
    verify(rewritten(run, tmp_path, lambda lines, copy: None), keys)
    (tmp_path / "own").mkdir()
    assert verify(rewritten(run, tmp_path / "own", own_keys)).signers == (0, 1, 2)  # without keys from elsewhere he gets by


def test_the_command_names_the_first_thing_that_does_not_hold(run, keys, tmp_path, capsys):
    assert veilora.main(["verify", str(run), "--keys", str(keys)]) == 0
    assert "the record of 3 rounds holds to its end; signed by 3 clients, at its end by 0, 1, 2; its head is " in capsys.readouterr().out
    assert veilora.main(["verify", str(run), "--format", "json"]) == 0 and json.loads(capsys.readouterr().out)["closed"] == [0, 1, 2]
    copy = shutil.copytree(run, tmp_path / run.name)
    (copy / "curve.svg").write_text("<svg/>")
    assert veilora.main(["verify", str(copy)]) == 6
    assert capsys.readouterr().err == "error: curve.svg is not as it was written\n"


@pytest.mark.parametrize("line, says", [
    ({"kind": "round", "round": 3, "row": ""}, "round 2 comes next, got 3"), ({"kind": "resumed", "after": 4}, "goes on after one of its rounds, got 4"),
    ({"kind": "resumed", "after": True}, "got True"), ({"kind": "round", "round": 2, "row": "", "sum": {}}, "another run has none"),
    ({"kind": "round", "round": 2, "row": "", "signed": {"line": 2, "by": {}}}, "of a line before"), ({"kind": "closed", "signed": {"line": 0}}, "'by'"),
    ({"kind": "round", "round": 2, "row": "", "signed": {"line": 0, "by": {"01": ""}}}, "by client"), ({"kind": "end", "files": 3}, "cannot be"),
])
def test_what_could_not_have_happened_is_said(line, says):
    with pytest.raises(IntegrityError, match=f"line 2 of {NAME} cannot be.*{says}" if says != "cannot be" else says):
        follow([{"kind": "begin"}, {"kind": "round", "round": 1, "row": ""}, line])


def test_a_line_that_could_not_be_written_is_not_shown_and_comes_with_the_next(tmp_path, monkeypatch):
    record = Record(tmp_path / NAME)
    record.add("begin", run="r", clients=1, files={}, signers={})
    head = record.head
    with monkeypatch.context() as patch:
        patch.setattr("fl.durable.os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError):
            record.add("round", round=1, row="")
    assert record.head == head and len(chain((tmp_path / NAME).read_bytes())) == 1
    record.add("round", round=2, row="")
    assert record.head.line == 2 and [line["round"] for line in chain((tmp_path / NAME).read_bytes())[1:]] == [1, 2]


def test_signatures_are_those_of_p384_and_of_nothing_else():
    key, other = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    said = text("run", Head(3, "ab"), "cd")
    holds, signature = signer(signer_line(key)), sign(key, said)
    assert said == b"veilora record|run|3|ab|cd" and holds(signature, said)
    for wrong in (sign(other, said), signature.upper(), signature[:-2], signature + "00", "", "zz", sign(key, said + b"|")):
        assert not holds(wrong, said)
    for public in ("", "ssh-rsa AAAA", signer_line(ec.generate_private_key(ec.SECP256R1())), signer_line(key) + " someone"):
        with pytest.raises(ValueError, match="P-384 in OpenSSH's format"):
            signer(public)
