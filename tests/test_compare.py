"""A grid's cells, the choice of rates, and a report's numbers, all small enough to check by hand."""

from __future__ import annotations

import csv
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fl.config import ConfigError
from fl.learn import TrainingError
from simulations import compare, grid
from simulations.audit import poison
from simulations.report import plots
from simulations.report.numbers import averaged, command, report
from simulations.report.page import write
from simulations.report.tables import as_csv, markdown
from simulations.report.trials import trials
from simulations.tuning import Tuning

RESULTS = Path(__file__).resolve().parents[1] / "simulations" / "results"


def line(cell: str, accuracies: list[float], mb: float = 1.0, error: float | None = None, **more) -> dict:
    """A finished cell whose rounds have these accuracies and cost ``mb`` each."""
    rounds = [
        {"round": i, "accuracy": a, "accuracy_p10": a / 2, "mb": i * mb, "seconds": i, "norms": {}}
        for i, a in enumerate(accuracies, 1)
    ]
    for row in rounds if error is not None else ():
        row["diagnostics"] = {"product_error": error / row["round"], "best_error": 0.0, "effective_rank": 2.0, "drift": 1.0}
    known = {
        "accuracy": accuracies[-1], "seconds": 10.0, "ratio_to_full_fedavg": 0.25, "trained_parameters": 7,
        "bytes_per_client_round": {"down": mb * 4e5, "up": mb * 6e5}, "curve": [[r["round"], r["accuracy"]] for r in rounds],
        "rounds": rounds, "places": ["data.root"], "machine": "m", "gpu": None, "code": "c0de", "commit": "abc",
    }  # fmt: skip
    return {"cell": cell, **known, **more}


GRID = [
    line("rounds=2 partition=iid strategy=fedavg seed=0", [0.50, 0.70], error=0.4),
    line("rounds=2 partition=iid strategy=fedavg seed=1", [0.60, 0.80], error=0.6),
    line("rounds=2 partition=iid strategy=ffa_lora seed=0", [0.72, 0.90], mb=0.5),
    line("rounds=2 partition=iid strategy=ffa_lora seed=1", [0.60, 0.80], mb=0.5),
    line("rounds=2 partition=dirichlet strategy=fedavg seed=0", [0.30, 0.40]),
]


def test_a_grid_is_the_product_of_its_axes_and_places_are_no_part_of_a_cell():
    found = grid.cells(["data.root=/data", "strategy=a,b", "seed=0,1"])
    assert [(c["strategy"], c["seed"]) for c in found] == [("a", "0"), ("a", "1"), ("b", "0"), ("b", "1")]
    assert grid.identity(found[0]) == "seed=0 strategy=a"


def test_a_finished_cell_is_recognised_however_it_was_typed():
    wanted = grid.cells(["strategy=fedavg,median", "rounds=2", "partition=iid", "seed=0,0"])
    assert [c["strategy"] for c in grid.missing(wanted, GRID)] == ["median"]


def test_blanks_that_mean_nothing_are_no_part_of_a_cell_and_others_are_refused():
    (one,) = grid.cells(["recipe.keep=[head, lora_b]", "recipe.lr={lora_a: 1, head: 2}", 'data.root="/my data"', "state=/s"])
    assert grid.identity(one) == "recipe.keep=[head,lora_b] recipe.lr={lora_a:1,head:2}"
    assert not grid.missing([one], [{"cell": "recipe.lr={lora_a:1,head:2} state=/other recipe.keep=[head,lora_b]"}])
    with pytest.raises(ConfigError, match="must have no blanks, got name='a b'"):
        grid.cells(["name='a b'"])


@pytest.mark.parametrize("words", ["recipe.keep=[head", "strategy=fedavg,fedavgg", "rounds=0,1", "seed=0,x"])
def test_what_cannot_be_read_ends_a_comparison_before_it_has_begun(words, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "run_side_by_side", lambda *_: pytest.fail("it began"))
    for more in ([words], ["--tune", words, "clients=2"]):
        assert compare.main(["--out", str(tmp_path / "out"), *more]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and len(said.splitlines()) == 1
    assert poison.main(["--out", str(tmp_path / "out"), words]) == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("store", sorted(RESULTS.glob("*/cells.jsonl")), ids=lambda p: p.parent.name)
def test_committed_cells_are_recognised_and_reported(store, tmp_path):
    lines = grid.read(store)
    assert not grid.missing([dict(w.split("=", 1) for w in line["cell"].split()) for line in lines], lines)
    assert write(tmp_path, lines, []).stat().st_size > 2000


def test_a_line_that_was_cut_off_is_no_cell_and_the_next_has_its_own(tmp_path):
    store = tmp_path / "cells.jsonl"
    store.write_text('{"cell": "a=1"}\n{"cell": "a=2", "accu')
    grid.keep(store, {"cell": "a=3"})
    assert [kept["cell"] for kept in grid.read(store)] == ["a=1", "a=3"]


def test_rounds_keep_the_bytes_of_one_client_and_medians_of_norms():
    clients = [{"norms": {"lora_a": n}} for n in (1.0, 2.0, 9.0)]
    sizes = {"train up": {"total": 3e6}, "train down": {"total": 6e6}, "evaluate down": {"total": 9e9}}
    row = {"cohort": [0, 1, 2], "bytes": sizes, "clients": clients, "seconds": 2.0, "train_seconds": 1.0}
    scored = {"accuracy": 0.5, "personal": {"accuracy": 0.6, "accuracy_p10": 0.4}}
    first, second = grid.rounds([row | {"round": 1}, row | {"round": 2} | scored])
    assert (first["mb"], second["mb"], first["norms"]) == (3.0, 6.0, {"lora_a": 2.0})
    assert "accuracy" not in first and (second["accuracy"], second["personal_p10"]) == (0.5, 0.4)


def test_one_rate_is_chosen_for_all_partitions_by_the_mean():
    wanted = grid.cells(["strategy=a,b", "partition=iid,dirichlet", "seed=0,1"])
    tuning = Tuning(["lr=1,2"], ["seed=100"], ["partition"])
    runs = tuning.runs(wanted)
    assert len(runs) == 2 * 2 * 2 and {run["seed"] for run in runs} == {"100"}
    scores = {("a", "iid", "1"): 0.9, ("a", "dirichlet", "1"): 0.1, ("a", "iid", "2"): 0.6, ("a", "dirichlet", "2"): 0.6}
    lines = [{"cell": grid.identity(r), "accuracy": scores.get((r["strategy"], r["partition"], r["lr"]), 0.0)} for r in runs]
    assert tuning.choose(wanted, lines) == {"strategy=a": {"lr": "2"}}, "b failed with every rate"
    assert tuning.choose(wanted, lines[1:]) == {}, "a candidate that is not judged everywhere is not compared"
    alone = Tuning(["lr=1,2"], ["seed=100"], [])
    assert alone.choose(wanted, lines) == {"partition=iid strategy=a": {"lr": "1"}, "partition=dirichlet strategy=a": {"lr": "2"}}


def test_a_tuning_must_not_see_the_grid(capsys, tmp_path):
    shared = ["--out", str(tmp_path), "--tune", "recipe.lr.lora_a=1,2"]
    assert compare.main([*shared, "seed=0,100"]) == 2 and "a seed that the grid has not, got seed=100" in capsys.readouterr().err
    assert compare.main([*shared, "recipe.lr.lora_a=1"]) == 2 and "must not set the same" in capsys.readouterr().err


def test_a_diverged_trial_counts_as_zero_and_the_grid_runs_with_what_is_left(monkeypatch, capsys, tmp_path):
    ran = []

    def pretend(todo, jobs, folder):
        for cell in todo:
            ran.append(grid.identity(cell))
            diverges = cell["recipe.lr.lora_a"] == "0.03"
            yield cell, TrainingError("the training loss must stay finite") if diverges else line(grid.identity(cell), [0.5])

    monkeypatch.setattr(compare, "run_side_by_side", pretend)
    typed = ["--out", str(tmp_path), "--tune", "recipe.lr.lora_a=3e-2,1e-2", "strategy=fedavg", "seed=0,1"]
    assert compare.main(typed) == 0
    assert ran[-1] == "recipe.lr.lora_a=0.01 seed=1 strategy=fedavg" and len(ran) == 4
    kept = grid.read(tmp_path / "tuning.jsonl")
    assert (kept[0]["accuracy"], kept[0]["failed"]) == (0.0, "the training loss must stay finite")
    assert grid.read(tmp_path / "cells.jsonl")[0]["tuned"] == {"recipe.lr.lora_a": "0.01"}
    assert compare.main(typed) == 0 and len(ran) == 4, "what is finished is not run again"
    tried = trials(kept, grid.read(tmp_path / "cells.jsonl"))
    assert tried.chosen == {"fedavg": {"lora_a=0.01"}} and tried.families["fedavg"]["lora_a=0.03"].diverged == 1
    assert tried.on == "evaluate_on=validation seed=100 validation=0.5"
    assert "0.00 (1 of 1 diverged)" in (tmp_path / "report.md").read_text()


def test_trials_on_other_settings_than_the_grid_s_find_the_strategy_they_are_of():
    def tried(strategy, rate, cell):
        return line(f"{cell} strategy={strategy} lr={rate}", [0.5 + rate / 10], tuned={"lr": str(rate)})

    lines = [tried(s, r, "rounds=6 evaluate_every=2 seed=0") for s, r in (("fedavg", 1), ("median", 2))]
    found = trials([tried(s, r, "rounds=6 evaluate_every=6 seed=100") for s in ("fedavg", "median") for r in (1, 2)], lines)
    assert found.chosen == {"fedavg": {"lr=1"}, "median": {"lr=2"}} and found.on == "evaluate_every=6 seed=100"


def test_numbers_of_a_report_by_hand():
    found = report(GRID)
    dirichlet, iid = found.sections
    assert (found.common, found.axes) == (["rounds=2"], ["strategy"]) and iid.name == "partition=iid"
    assert [row.name for row in iid.rows] == ["ffa_lora", "fedavg"], "the best first"
    best, plain = (row.numbers for row in iid.rows)
    assert iid.target == pytest.approx(0.95 * 85)
    assert (best["accuracy"], best["sd"], best["seeds"]) == (pytest.approx(85), pytest.approx(50**0.5), 2)
    assert best["reached"] == 1 and best["rounds_to_target"] is None, "one of two seeds is not enough"
    assert plain["product_error"] == pytest.approx((0.4 / 2 + 0.6 / 2) / 2) and best["product_error"] is None
    assert (plain["accuracy_p10"], plain["mb_per_round"], plain["of_full_fedavg"]) == (pytest.approx(37.5), 1.0, 25.0)
    assert dirichlet.rows[0].numbers["sd"] is None
    assert averaged(iid.rows[0], "accuracy") == [(1, 0.5, pytest.approx(0.66)), (2, 1.0, pytest.approx(0.85))]


def test_rounds_and_mb_to_a_given_target_are_means_over_the_seeds():
    best, plain = (row.numbers for row in report(GRID, target=0.7).sections[1].rows)
    assert (best["rounds_to_target"], best["mb_to_target"]) == (1.5, 0.75)
    assert (plain["rounds_to_target"], plain["mb_to_target"]) == (2, 2)


def test_a_line_without_rounds_has_its_curve():
    old = line("seed=0", [0.2, 0.4], mb=3.0)
    del old["rounds"]
    numbers = report([old], target=0.4).sections[0].rows[0].numbers
    assert (numbers["rounds_to_target"], numbers["mb_to_target"], numbers["drift"]) == (2, 6, None)


def test_a_rate_that_follows_from_the_strategy_is_not_in_its_name_and_is_in_its_command():
    lines = [line(f"strategy={s} recipe.lr.lora_a={r} seed=0", [0.5]) for s, r in (("fedavg", "0.01"), ("median", "0.03"))]
    found = report(lines)
    assert {row.name for row in found.sections[0].rows} == {"fedavg", "median"}
    assert command(found.sections[0].rows[0]) == "recipe.lr.lora_a=0.01 strategy=fedavg seed=0"


def test_csv_and_markdown_have_the_same_numbers():
    found = report(GRID)
    text = markdown("grid", found, None, GRID)
    for row in csv.DictReader(io.StringIO(as_csv(found))):
        sd = f" ± {float(row['sd']):.2f}" if row["sd"] else ""
        assert f"| {row['name']} | {float(row['accuracy']):.2f}{sd} | {row['seeds']} | {float(row['accuracy_p10']):.2f} |" in text
    assert "not reached (1 of 2)" in text and "$P partition=iid strategy=ffa_lora seed=0,1" in text
    assert 'P="python -m simulations.compare --out OUT data.root=DIR rounds=2"' in text


class Tags(HTMLParser):
    """Checks that tags close in order and keeps what they refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.refers = [], []

    def handle_starttag(self, tag, attributes):
        self.refers += [value for name, value in attributes if name in ("src", "href")]
        self.refers += [tag] if tag in ("script", "link") else []
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_asks_for_nothing_outside(tmp_path):
    write(tmp_path, [*GRID, line("rounds=2 partition=iid strategy=a<b seed=0", [0.1, 0.2])], [])
    text = (tmp_path / "report.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert not tags.open and not tags.refers and "url(" not in text and "a&lt;b" in text
    figures = re.findall(r"<div class=panels>(.*?)</div>", text, re.S)
    drawings = [len(ElementTree.fromstring(f"<div>{figure}</div>")) for figure in figures]
    assert drawings == [1, 2, 2, 1], "dots, and a panel a partition; product error where there is one"
    assert not any(word in figure for figure in figures for word in ('"nan', '"inf', "nan,", "inf,"))


def test_a_grid_without_diagnostics_or_with_infinite_ones_is_reported(tmp_path):
    lines = [line("strategy=a seed=0", [0.5, 0.6], error=float("inf"))]
    write(tmp_path, [json.loads(json.dumps(one)) for one in lines], [])
    assert "inf" not in (tmp_path / "report.csv").read_text()


def test_names_at_the_ends_of_lines_do_not_overlap():
    moved = plots.spaced({"a": 10.0, "b": 11.0, "c": 12.0, "d": 90.0}, 14, 0, 100)
    places = sorted(moved.values())
    assert list(moved) == ["a", "b", "c", "d"] and all(b - a > 13.9 for a, b in zip(places, places[1:])) and moved["d"] == 90


def test_ticks_are_round_numbers():
    assert plots.Scale(0, 10, 0, 1).ticks() == [0, 2, 4, 6, 8, 10]
    assert plots.Scale(0.9, 1100, 0, 1, log=True).ticks() == [1, 10, 100, 1000]


def test_plain_fedavg_keeps_its_colour_however_it_ranks():
    colours = plots.palette([f"s{i}" for i in range(20)] + ["fedavg"])
    assert len(colours) == 8 and colours["fedavg"] == plots.REFERENCE
