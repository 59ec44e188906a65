"""The bench measures what it says: ratios by hand, operations by the book, peers that do the same work."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from fl.ciphers.pixel_shuffle import pixel_shuffle
from fl.lean.blocks import blocks
from fl.learn import fit, fit_together
from fl.provenance import ROOT
from simulations.bench import aggregate, apps, cipher, data, gpu, report, rounds, step, together, whole
from simulations.bench.flower_vit.task import get_model, shuffle_blocks, transform
from simulations.bench.machine import flops
from simulations.bench.pairs import Spread, faster, race, rate


class Clock:
    """A clock that only moves when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, *seconds: float):
        """Work that lasts these times, one after another, and then for ever the last."""
        left = list(seconds)

        def work() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return work


def test_ratios_are_of_neighbours_and_the_warm_up_does_not_count():
    clock = Clock()
    seconds = race({"slow": clock.takes(99, 4, 40, 6), "fast": clock.takes(99, 2, 10, 2)}, 3, clock)
    assert seconds == {"slow": [4, 40, 6], "fast": [2, 10, 2]}
    assert faster(seconds, "fast", "slow") == Spread(3, 2, 4)
    assert rate(seconds, "fast", 10) == 5


def test_candidates_take_turns_forward_and_back():
    seen = []
    race({name: lambda name=name: seen.append(name) for name in "ABC"}, 3, clock=iter(range(100)).__next__)
    assert "".join(seen) == "ABC" + "ABC" + "CBA" + "ABC"


def test_what_is_too_short_for_the_clock_is_repeated():
    clock = Clock()
    assert race({"short": clock.takes(0.25)}, 2, clock, least=1) == {"short": [0.25, 0.25]}
    assert clock.now == 0.25 * (2 + 2 * 4)


@pytest.mark.parametrize(
    "case, forward, full, frozen, share, pooled",
    [
        (step.BASE, 35.13, 105.15, 71.68, 0.682, 0.634),
        (step.TINY, 2.507, 7.463, 5.372, 0.720, 0.669),
        (step.SMALL, 0.366, 1.096, 0.751, 0.685, 0.589),
        (step.SMALL | {"depth": 12}, 0.730, 2.189, 1.499, 0.685, 0.637),
    ],
)
def test_operations_are_those_done_by_hand(case, forward, full, frozen, share, pooled):
    found = flops(case["embed_dim"], case["depth"], case["image"], case["patch"])
    assert [f / 1e9 for f in found[:3]] == pytest.approx([forward, full, frozen], rel=2e-3)
    assert [found.frozen / found.full, found.pooled / found.full] == pytest.approx([share, pooled], abs=1.5e-3)


@pytest.mark.parametrize("side, block", [(32, 4), (48, 16)])
def test_all_ciphers_of_the_bench_are_one(side, block):
    x = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    ours = pixel_shuffle(cipher.KEY, block).encrypt(x)
    assert torch.equal(cipher.ours(block)(x), ours)
    assert torch.equal(cipher.per_block(x, block), ours)
    assert torch.equal(cipher.indexed(x, block), ours)


def test_peft_trains_the_parameters_of_the_comparison():
    trained = {n: tuple(p.shape) for n, p in get_model(**step.SMALL).named_parameters() if p.requires_grad}
    lora = {n for n in trained if "lora_" in n}
    assert len(lora) == 2 * 6 and all(".attn.qkv." in n for n in lora)
    assert {trained[n] for n in lora} == {(4, 192), (576, 4)}
    rest = sorted(trained[n] for n in trained if n not in lora)
    assert rest == sorted([(10, 192), (10,), (192, 3, 4, 4), (192,)])


def test_every_step_trains():
    small = step.SMALL | {"embed_dim": 24, "depth": 1}
    works = [step.full(small, 4, 1), step.with_peft(small, 4, 1), step.with_peft(small, 4, 1, autocast=True, fused=False)]
    for work in works + [step.ours(small, 4, *how, steps=1) for how in step.OURS]:
        work()


def test_what_is_timed_on_a_gpu_runs_on_any_device():
    small = gpu.Case("small", step.SMALL | {"embed_dim": 24, "depth": 1}, 4, share=1e-9, gain=1e9)
    seen = []
    section = gpu.compare(small, torch.device("cpu"), 1, steps=2, compiler=lambda model: seen.append(model) or model)
    assert [row.name for row in section.rows] == [gpu.PEER, "ours lean, bfloat16"] and len(seen) == 1
    assert [check.met for check in section.rows[1].checks] == [True, False] and not section.rows[0].checks
    assert all(row.figure > 0 for row in section.rows)


def test_without_a_gpu_its_section_is_skipped_loudly(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(gpu.run(report.Options())) == [] and "SKIPPED" in capsys.readouterr().out


def test_clients_at_once_and_one_by_one_do_the_same_work(monkeypatch):
    small, found = step.SMALL | {"embed_dim": 24, "depth": 1}, {}
    monkeypatch.setattr(together, "fit", lambda *how, **more: found.setdefault("alone", []).append(fit(*how, **more)))
    monkeypatch.setattr(together, "fit_together", lambda *how: found.setdefault("at once", []).extend(fit_together(*how)))
    for work in together.works(small, 3, 4, "float32", torch.device("cpu"), steps=2):
        work()
    assert [(f.steps, f.seen) for f in found["alone"]] == [(f.steps, f.seen) for f in found["at once"]] == [(2, 8)] * 3
    assert [f.loss for f in found["alone"]] == pytest.approx([f.loss for f in found["at once"]], rel=1e-5)


def test_a_target_of_a_machine_that_is_not_here_is_open():
    check = report.Check(None, ">=", 3, "x one by one on a GPU")
    assert str(check) == ">= 3x one by one on a GPU: open" and check.met is None
    assert json.loads(json.dumps(report.plain(report.Section("a", "b", "c", [report.Row("d", 1, "e", checks=(check,))]))))["rows"][0]["checks"][0]["met"] is None


def test_both_data_paths_give_what_the_model_reads():
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for side, block in ((32, 4), (224, 16)):
        ours = data.ours(x, side, block, "float32")(torch.arange(2))
        peer = torch.stack([picture for picture, _ in (data.Pictures(x, side)[i] for i in range(2))])
        assert ours.shape == blocks(peer, block).flatten(3).shape and ours.dtype == peer.dtype
        assert all(-1 <= float(t.min()) and float(t.max()) <= 1 for t in (ours, peer))


def test_the_peer_encrypts_in_its_transform():
    from PIL import Image

    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, (32, 32, 3), np.uint8))
    found = []
    for block in (0, 4):
        torch.manual_seed(0)
        found.append(transform(32, block)(picture))
    plain, shuffled = ((127.5 * (t + 1)).round().to(torch.uint8).numpy() for t in found)
    order = np.random.RandomState(0).permutation(48)
    assert np.array_equal(shuffle_blocks(plain, order, 4), shuffled)


def test_every_way_to_aggregate_gives_the_same_mean(monkeypatch):
    shapes = aggregate.shapes()
    assert len(shapes) == 52 and sum(int(np.prod(s)) for s in shapes.values()) == 745_738
    monkeypatch.setattr(aggregate, "update", lambda: {name: torch.full(shape, 2.0) for name, shape in shapes.items()})
    found = aggregate.candidate(aggregate.OURS, 3)()
    assert all(torch.allclose(found[n], torch.full(s, 2.0)) for n, s in shapes.items())
    for name in (aggregate.FLOWER, aggregate.FLOWER_FLAT):
        found = aggregate.candidate(name, 3)()
        assert all(np.allclose(array.numpy(), 2.0) for array in found.values())


def test_rounds_of_both_kinds_run_in_process():
    assert all(0 < seconds < 60 for work in (rounds.echoes, rounds.full_rounds) for seconds in work(3, 1))


def test_a_bundle_is_a_flower_project_that_builds():
    from flwr.cli.build import build_fab_from_disk

    for package in ("echo", "flower_vit"):
        with apps.bundle(package, {"clients": 2, "report": "/tmp/report.json"}) as app:
            assert build_fab_from_disk(app)


def test_a_row_says_met_or_missed_and_the_json_says_it_too(tmp_path):
    checks = (report.Check(2.5, ">=", 2, "x peer"), report.Check(4, "<=", 3, " % overhead"))
    section = report.Section("demo", "a title", "peer", [report.Row("ours", 1234.5, "img/s", Spread(2.5, 2, 3), "2,000 img/s", checks)])
    line = report.markdown(section).splitlines()[-1]
    assert line == "| ours | 1,234 img/s | 2.50x (2.00-3.00) | 2,000 img/s | >= 2x peer: 2.5, met; <= 3 % overhead: 4, **missed** |"
    report.save([section], "demo", report.Options(), 1.0, tmp_path)
    record = json.loads((tmp_path / "demo.json").read_text())
    assert [c["met"] for c in record["sections"][0]["rows"][0]["checks"]] == [True, False]
    assert record["environment"]["machine"] and len(record["load"]) == 2
    assert (tmp_path / "README-table.md").read_text() == report.markdown(section)


def test_a_whole_runs_ratio_is_of_neighbours_in_time():
    """A machine that is half as fast in the second pair and the third makes no ratio other."""
    seconds = {whole.PEER: (90, 30), whole.RAY: (60, 12), whole.HERE: (30, 10.2)}
    runs = {name: [whole.Run(w * slow, r * slow, 10 * slow) for slow in (1, 2, 2)] for name, (w, r) in seconds.items()}
    _, _, ray, ray_all, here, _ = whole.rows(runs, 200)
    assert (ray.ratio, ray_all.ratio) == (Spread(2.5, 2.5, 2.5), Spread(1.5, 1.5, 1.5)) and ray.figure == 24
    assert here.ratio.low == here.ratio.high == pytest.approx(30 / 10.2) and [check.met for check in here.checks] == [True, True]
    assert [check.met for check in ray.checks] == [True, False] and "20.0% overhead; 83 img/s" in ray.limit


def test_overhead_is_what_rounds_take_beyond_training(capsys):
    assert whole.Run(50, 22, 20).overhead == pytest.approx(0.1)
    assert whole.run(report.Options()) == [] and "SKIPPED" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_measures_the_cheap_sections(tmp_path):
    command = [sys.executable, "-m", "simulations.bench", "cipher", "data", "--quick", "--pairs", "1", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for name in ("cipher", "data"):
        sections = json.loads((tmp_path / f"{name}.json").read_text())["sections"]
        assert len(sections) == 2 and all(row["figure"] > 0 for section in sections for row in section["rows"])
