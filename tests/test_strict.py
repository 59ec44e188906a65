"""What a stranger says is a number, a count or a line of text, and nothing else comes of it: neither bad JSON nor markup."""

from __future__ import annotations

import json
import math
from html import unescape

import pytest
import torch
from test_simulation import by_flower, home, settings  # noqa: F401

from clients import local
from fl.adapter import digest
from fl.config import load
from fl.journal import Journal
from fl.keys import SharedKey
from fl.wire.flat import pack
from fl.wire.float32 import float32
from simulations.report.run import markdown, plain
from strategies import ClientInfo, Update
from strategies.clear import evaluation_of
from strategies.diagnostics import diagnose
from strategies.gate import Refused, admit, update_of
from strategies.rollcall import MUST_AGREE, Roll, remarks

ROLL = Roll(1, 3, {name: "same" for name in MUST_AGREE}, 50, 40, 8, 100, {}, "cpu")
GOOD = {"loss": 12.5, "correct": 30, "examples": 40}
LIKE = {"head.weight": torch.zeros(2)}
METRICS = {"loss": 0.5, "steps": 3, "seconds": 1.5, "own_loss": 2.0, "own_correct": 1, "own_examples": 40}


@pytest.mark.parametrize(
    "change, code",
    [
        ({"loss": 1.7e308}, "metrics"), ({"loss": -1e300}, "metrics"), ({"loss": math.inf}, "metrics"), ({"loss": math.nan}, "metrics"),
        ({"loss": "7"}, "schema"), ({"loss": True}, "schema"), ({"loss": None}, "schema"), ({"loss": 10**400}, "schema"), ({"loss": [1]}, "schema"),
        ({"correct": 1.9}, "schema"), ({"correct": "7"}, "schema"), ({"correct": True}, "schema"), ({"correct": -1}, "metrics"), ({"correct": 41}, "metrics"),
        ({"examples": 40.0}, "schema"), ({"examples": 41}, "metrics"), ({"examples": "40"}, "schema"),
    ],
    ids=str,
)  # fmt: skip
def test_an_evaluation_of_other_kinds_of_numbers_is_refused(change, code):
    assert evaluation_of(ROLL, GOOD) == (1, 12.5, 30, 40)
    with pytest.raises(Refused) as refused:
        evaluation_of(ROLL, GOOD | change)
    assert refused.value.code == code


@pytest.mark.parametrize(
    "change, code",
    [
        ({"loss": 1.7e308}, "metrics"), ({"loss": -1e300}, "metrics"), ({"loss": math.nan}, "metrics"), ({"loss": "7"}, "schema"), ({"loss": True}, "schema"),
        ({"steps": 1.5}, "schema"), ({"steps": "3"}, "schema"), ({"steps": True}, "schema"), ({"steps": 0}, "metrics"), ({"steps": 10**30}, "metrics"),
        ({"seconds": math.inf}, "metrics"), ({"seconds": 1e300}, "metrics"), ({"own_loss": 1.7e308}, "metrics"), ({"own_correct": 1.9}, "schema"),
        ({"own_correct": "1"}, "schema"), ({"own_correct": 41}, "metrics"), ({"own_examples": 39}, "metrics"), ({"own_loss": None}, "schema"),
    ],
    ids=str,
)  # fmt: skip
def test_an_update_with_other_kinds_of_numbers_is_refused(change, code):
    info, packed = ClientInfo(1, 50, 40), pack(LIKE, float32())

    def judged(metrics):
        return admit(update_of(1, {"examples": 50, "metrics": metrics}, packed, float32(), LIKE), LIKE, info)

    assert judged(METRICS).metrics == METRICS
    with pytest.raises(Refused) as refused:
        judged(METRICS | change)
    assert refused.value.code == code


@pytest.mark.parametrize("examples", [50.0, "50", True, None])
def test_a_count_of_images_is_a_whole_number(examples):
    with pytest.raises(Refused, match="examples must be a whole number"):
        update_of(1, {"examples": examples, "metrics": METRICS}, pack(LIKE, float32()), float32(), LIKE)


@pytest.mark.parametrize("loss", [1.7e308, -1e300, float("nan")])
def test_a_lying_clients_loss_is_left_out_and_every_line_is_json(home, tmp_path, monkeypatch, loss):
    real = local.score

    def score(client, received):
        found = real(client, received)
        return found._replace(loss=loss) if client.index == 1 else found

    monkeypatch.setattr(local, "score", score)
    by_flower(home, tmp_path, "rounds=1 quorum=0.6")
    (folder,) = tmp_path.glob("demo-*")

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    json.loads((folder / "summary.json").read_text(), parse_constant=refuse)
    assert [(r["client"], r["code"]) for r in rows[0]["refused"]] == [(1, "metrics")] and 0 < rows[0]["loss"] < 100


def test_a_journal_writes_no_infinity(home, tmp_path):
    journal = Journal(load(settings(home, tmp_path)), "strict")
    journal.begin(1)
    with pytest.raises(ValueError, match="JSON"):
        journal.round({"round": 1, "cohort": [0], "seconds": 1.0, "loss": math.inf})
    journal.close()
    assert not journal.rounds and not (journal.folder / "rounds.jsonl").exists()


def test_the_ratio_to_nothing_is_left_out_of_the_diagnostics():
    a, b = ({"head.weight": torch.tensor([x])} for x in (1.0, -1.0))
    assert diagnose([(LIKE, Update(0, a, 1, {})), (LIKE, Update(1, b, 1, {}))]) == {}


def test_class_names_are_told_under_the_key(home, tmp_path):
    client = local.open_client(load(settings(home, tmp_path, "clients=2")), 0, 2)
    names = client.holdings.classes
    told = local.roll(client)["digests"]["classes"]
    assert told == client.holdings.named(client.key) != client.holdings._replace(classes=names[::-1]).named(client.key)
    assert told != client.holdings.named(SharedKey(bytes(32)))
    assert told != digest({name: torch.tensor(i) for i, name in enumerate(names)}), "a dictionary finds what is not salted"


HOSTILE = [
    "<script>alert(1)</script>", "[click](javascript:alert(1))", "![x](https://a.b/c)", "| a | b |", "**bold** `code` ~~x~~", "# title",
    "https://evil.example/x", "www.evil.example", "a@b.example", "&lt;b&gt;", "\\| x",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_a_strangers_reason_is_shown_in_a_report_and_does_nothing(text):
    row = {"round": 1, "cohort": [0], "seconds": 1.0, "bytes": {}, "refused": [{"client": 1, "code": "client_error", "reason": text}]}
    line = markdown({"run": "run", "rounds": [row], "summary": None}).splitlines()[-1]
    assert line.count("|") == 5, "the cells are the table's own"
    cell = line.split("|")[4]
    assert not {"<", ">", "[", "]", "`", "*", "_", "~", "\\", "@"} & set(cell)
    assert "://" not in cell and "www." not in cell and "!" not in cell
    assert unescape(cell).strip() == f"round 1: {text}"
    assert plain("it failed: 3 of 4, client 1") == "it failed: 3 of 4, client 1"


def test_clients_of_few_images_are_named_in_clear_and_not_when_sealed():
    few = [ROLL, ROLL._replace(client=2, train=99), ROLL._replace(client=0, train=100)]
    said = [line for line in remarks(few) if line.startswith("privacy")]
    assert len(said) == 1 and "clients 1, 2 of fewer than 100 images each" in said[0]
    assert not [line for line in remarks([ROLL._replace(train=None)]) if line.startswith("privacy")]
