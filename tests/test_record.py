"""A run's record: whatever is changed in it, in one bit, is found; whoever shows two records is named."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from conftest import first
from cryptography.hazmat.primitives.asymmetric import ec
from test_simulation import by_loop, equal, home, settings  # noqa: F401

from clients import local, witness
from clients.client_app import app as client_app
from clients.kit.certificates import node_key
from fl.adapter import load as load_adapter
from fl.config import load
from fl.durable import IntegrityError
from fl.keys import KeyFileError
from fl.record import NAME, Head, Record, chain, digest, sign, signer, text, written
from fl.wire.flat import WireError
from simulations import inprocess, veilora
from simulations.followed import follow
from simulations.verify import told, verify
from strategies.server_app import app as server_app
from strategies.talk import QuorumLost

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


# Nodes that sign ------------------------------------------------------------------------------------------------------


@pytest.fixture
def node(home, keys, tmp_path):
    """Client 1 of 3 with its key, and the head of a record."""
    config = load(settings(home, tmp_path, "clients=3", f"+node_key={keys / 'node-1'}"))
    return local.open_client(config, 1, 3), lambda line, digest="ab" * 32: {"run": "run", "head": [line, digest]}


def test_a_node_signs_one_head_a_line_and_never_an_older_one(node, keys):
    client, facts = node
    holds = signer(witness.public(client.config))
    assert witness.public(client.config) == " ".join((keys / "node-1.pub").read_text().split()[:2])
    signed = witness.attest(client, facts(3), "cd")["signature"]
    assert holds(signed, b"veilora record|run|3|" + b"ab" * 32 + b"|cd") and not holds(signed, b"veilora record|run|3|" + b"ab" * 32 + b"|")
    assert holds(witness.attest(client, facts(3), "ef")["signature"], text("run", Head(3, "ab" * 32), "ef"))  # the round is tried again
    for line, other in ((3, "ac" * 32), (2, "ab" * 32), (0, "00" * 32)):
        with pytest.raises(witness.TwoRecords, match="^record: two records$"):
            witness.attest(client, facts(line, other))
    assert witness.attest(client, facts(7))
    with pytest.raises(witness.TwoRecords):
        witness.attest(client, facts(3))
    assert witness.attest(client, {"run": "another", "head": [0, "ab" * 32]}) and [r for _, r in client.drawer("run").listing()] == [7]


@pytest.mark.parametrize("head", [None, 3, [], [3], [3, "ab"], ["3", "ab" * 32], [-1, "ab" * 32], [True, "ab" * 32], [2**60, "ab" * 32], [3, "AB" * 32], [3, "ab" * 32, 1], {"line": 3}])
def test_what_is_no_head_is_signed_by_nobody(node, head):
    with pytest.raises(WireError, match="a record's head must be a line's number and digest"):
        witness.attest(node[0], {"run": "run", "head": head})


def test_a_node_without_a_key_signs_nothing_and_one_that_is_no_key_is_said(home, tmp_path, keys):
    config = load(settings(home, tmp_path, "clients=3"))
    assert witness.public(config) == "" and witness.attest(local.open_client(config, 0, 3), {"run": "run", "head": [0, "ab" * 32]}) == {}
    (tmp_path / "text").write_text("no key")
    for path in (tmp_path / "text", tmp_path / "missing", keys / "node-1.pub"):
        with pytest.raises(KeyFileError, match="see node-key-path"):
            witness.public(config.model_copy(update={"node_key": str(path)}))


@pytest.mark.parametrize("more", first(1, [SECURE, ""]))
def test_who_signs_gets_the_same_adapter_and_a_run_that_is_resumed_holds(home, keys, tmp_path, monkeypatch, more):
    words = f"rounds=4 checkpoint.every=2 checkpoint.last=1 quorum=1.0 {more}"
    _, steady = by_loop(home, tmp_path / "steady", words)
    monkeypatch.setattr("strategies.server_app.run_name", lambda config: "run")
    real = local.train

    def until(last, *words):
        def ends(client, round, *given):
            if round == last and client.index == 1:
                raise RuntimeError("the power is out")
            return real(client, round, *given)

        own = {i: {"node-key-path": str(keys / f"node-{i}")} for i in range(3)}
        with monkeypatch.context() as patch:
            patch.setattr(local, "train", ends)
            inprocess.run(server_app, client_app, 3, settings(home, tmp_path, "clients=3", *words), own)

    with pytest.raises(QuorumLost):
        until(4, words)  # the nodes have signed round 3, of which there is no checkpoint
    found = verify(tmp_path / "run", keys)
    assert (found.rounds, found.ended, found.closed) == (3, False, ())
    assert "holds so far, for it has not ended; signed by 3 clients; its head is" in told(found)
    with pytest.raises(QuorumLost):
        until(3, words, "resume=run")
    assert verify(tmp_path / "run", keys).rounds == 2  # round 3 is taken back, and its row with it
    until(None, words, "resume=run")
    assert equal(load_adapter(tmp_path / "run" / "adapter.safetensors"), steady)
    assert (found := verify(tmp_path / "run", keys)).ended and found.closed == (0, 1, 2) and found.rounds == 4
    assert [line["kind"] for line in chain((tmp_path / "run" / NAME).read_bytes())] == ["begin", "round", "round", "round", "resumed", "resumed", "round", "round", "end", "closed"]


@pytest.mark.parametrize("more", first(1, ["", SECURE]))
def test_an_answer_without_its_nodes_signature_is_left_out(home, keys, tmp_path, monkeypatch, capsys, more):
    real = witness.attest

    def silent(client, facts, transcript=""):
        said = real(client, facts, transcript)
        return {} if client.index == 2 and facts.get("round") == 2 else said

    monkeypatch.setattr(witness, "attest", silent)
    run = signed_run(home, tmp_path, keys, f"clients=3 rounds=2 quorum=0.6 {more}", "seal.members=2" if more else "")
    said = capsys.readouterr().out
    assert "round 2: left out (record): client 2: its answer must bring its key's signature of the record" in said
    assert "the record is not signed to its end by client 2" in said
    assert verify(run, keys).closed == (0, 1)


def test_a_server_that_keeps_two_records_gets_no_second_signature(home, keys, tmp_path, monkeypatch, capsys):
    """It goes back to an older record of the run, as from a copy of its folder, and shows the nodes another round 2."""
    monkeypatch.setattr("strategies.server_app.run_name", lambda config: "run")
    own, words = {i: {"node-key-path": str(keys / f"node-{i}")} for i in range(3)}, settings(home, tmp_path, "clients=3 rounds=3 checkpoint.last=9")
    with monkeypatch.context() as patch:
        patch.setattr("strategies.checkpoint.Checkpoints.end", lambda checkpoints: None)
        inprocess.run(server_app, client_app, 3, words, own)
    run = tmp_path / "run"
    (run / "summary.json").unlink()
    (run / NAME).write_bytes(b"".join((run / NAME).read_bytes().splitlines(keepends=True)[:2]))
    manifest = json.loads((run / "checkpoints" / "manifest.json").read_text())
    manifest["checkpoints"] = [kept for kept in manifest["checkpoints"] if kept["round"] == 1]
    (run / "checkpoints" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Exception, match="record: two records"):
        inprocess.run(server_app, client_app, 3, words + " resume=run", own)
