"""The command `veilora` from a client's pictures to a prediction: each step takes what the one before it left."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from test_simulation import by_loop, home, settings  # noqa: F401

from clients import local
from fl.adapter import load as load_adapter
from fl.datasets.images import save_rows
from simulations import resume, veilora


@pytest.fixture
def command(capsys):
    """Run it; the exit status, and what it answered."""

    def run(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        status = veilora.main([str(word) for word in words])
        said = capsys.readouterr()
        return status, said.out if status == 0 else said.err

    return run


def test_from_pictures_to_a_prediction(home, tmp_path, command):
    words = shlex.split(settings(home, tmp_path / "runs", "clients=2 rounds=1"))
    for i in (0, 1):
        status, said = command("partition", tmp_path / f"p{i}", "--index", i, "--of", 2, "--encrypt", "--format", "json", *words)
        assert status == 0 and json.loads(said)["encrypted"]["block"] == 8
    status, said = command("partition", tmp_path / "p0", "--index", 0, "--of", 2, *words)
    assert status == 2 and said.startswith("error: a partition must not be written over another thing")
    assert command("partition", tmp_path / "p9", "--index", 0, "--of", 2, "rouns=3") == (2, "error: unknown setting 'rouns'; did you mean 'rounds'?\n")
    _, adapter = by_loop(home, tmp_path / "runs", "clients=2 rounds=1", *(f"+nodes.{i}.own={tmp_path / f'p{i}'}" for i in (0, 1)))
    run = tmp_path / "runs" / "loop"
    status, said = command("report", run)
    assert status == 0 and "| 1 | " in said and said.startswith("# loop\n\nAccuracy ")
    assert json.loads(command("report", run, "--format", "json")[1])["summary"]["rounds"] == 1
    status, said = command("export", run, tmp_path / "timm", "--verify")
    assert status == 0 and "reads plain pictures; read back, its logits differ by" in said
    assert command("export", run, tmp_path / "timm")[0] == 2 and command("export", run, tmp_path / "x", "--kind", "caffe")[0] == 2
    save_rows([torch.zeros(1, 3, 32, 32, dtype=torch.uint8)], (tmp_path / "pictures").mkdir() or tmp_path / "pictures" / "a.png", zoom=1)
    status, said = command("predict", tmp_path / "timm", tmp_path / "pictures", "--format", "json")
    plain = json.loads(said)["rows"][0]
    assert status == 0 and 0 < plain["probability"] <= 1
    assert command("encrypt", run, tmp_path / "pictures", tmp_path / "hidden", "--key", home / "key")[0] == 0
    status, said = command("predict", run, tmp_path / "hidden", "--key", home / "key", "--encrypted", "--format", "json")
    assert json.loads(said)["rows"][0]["class"] == plain["class"]
    status, said = command("predict", run, tmp_path / "hidden", "--encrypted")
    assert status == 2 and said.startswith("error: encrypted pictures are read with the key alone")


def test_a_run_that_broke_off_is_gone_on_with_by_what_drove_it(home, tmp_path, monkeypatch, command):
    from simulations import loop

    words = shlex.split(settings(home, tmp_path, "clients=3 rounds=3"))
    real = local.score

    def breaks(client, received):
        if len(list(tmp_path.glob("*/checkpoints/round-00001.safetensors"))):
            raise OSError("the machine went down")
        return real(client, received)

    monkeypatch.setattr(local, "score", breaks)
    assert loop.main(words) == 4
    (run,) = tmp_path.glob("demo-*")
    monkeypatch.undo()
    assert command("report", run)[1].split("\n\n")[1].startswith("Not at its end: after round 1.")
    assert json.loads((run / "command.json").read_text())["driver"] == "loop"
    assert "resume=" + run.name in command("resume", run, "--show")[1] and "flwr run . SUPERLINK" in resume.shown(run)
    assert command("resume", run)[0] == 0
    by_loop(home, tmp_path / "steady", "rounds=3")
    ours, steady = load_adapter(run / "adapter.safetensors"), load_adapter(tmp_path / "steady" / "loop" / "adapter.safetensors")
    assert all(torch.equal(ours[n], steady[n]) for n in steady)
    assert "nothing to resume" in command("resume", run)[1]
    (run / "command.json").write_text((run / "command.json").read_text().replace('"loop"', '"deployment"'))
    status, said = command("resume", run)
    assert status == 2 and "is resumed over its SuperLink, with: flwr run . SUPERLINK" in said
    status, said = command("resume", tmp_path)
    assert status == 2 and "a run's folder must hold command.json" in said
