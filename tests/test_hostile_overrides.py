"""Overrides are data: none of an attacker's runs a program, reads a file or the environment, or is even shown to Hydra."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from hostile import OVERRIDES
from omegaconf import OmegaConf

from fl import builders, config, overrides
from fl.adapter import GROUPS
from fl.builders import PARTS, build
from fl.config import CONF, Config, ConfigError, load
from fl.overrides import OverrideError, words
from simulations import inprocess, loop


@pytest.mark.parametrize(("typed", "rule"), OVERRIDES, ids=[typed[:40] for typed, _ in OVERRIDES])
def test_a_hostile_override_is_refused_by_its_rule_before_hydra_composes(typed, rule, monkeypatch):
    monkeypatch.setattr(config, "compose", lambda *_, **__: pytest.fail("Hydra composed it"))
    with pytest.raises(OverrideError) as caught:
        load(typed)
    assert caught.value.rule == rule and "\n" not in str(caught.value)


def test_every_rule_refuses_something_of_the_attackers():
    assert {rule for _, rule in OVERRIDES} == OverrideError.RULES and len(OVERRIDES) >= 90


def test_one_hostile_word_among_good_ones_is_enough():
    with pytest.raises(OverrideError, match="by its group"):
        load("experiment=demo/keyed seed=3 recipe.epochs=2 method._target_=os.system rounds=2")


@pytest.mark.parametrize(
    ("typed", "name", "value"),
    [
        ("seed=3", "seed", 3), ("recipe.lr.lora_a=1e-2", "recipe.lr.lora_a", 0.01), ("feedback=false", "feedback", False),
        ("resume=null", "resume", None), ("recipe.keep=[head,lora_b]", "recipe.keep", ["head", "lora_b"]), ("name=", "name", ""),
        ("'recipe.lr={head: 1e-3, lora_a: 2}'", "recipe.lr", {"head": 0.001, "lora_a": 2}), ("~codecs", "codecs", None),
        ("+nodes.1.rank=2", "nodes.1.rank", 2), ("experiment=demo/keyed", "experiment", "demo/keyed"), ("experiment=null", "experiment", None),
        ("+codec@codecs.patch_embed=low_rank", "codecs.patch_embed", "low_rank"), ("device=cuda:1", "device", "cuda:1"),
        ("key=/a", "key", "/a"), ("key=~", "key", "~"), ("key='/home/jane doe/key'", "key", "/home/jane doe/key"),
        ("\"key='/a,b'\"", "key", "/a,b"), ("key=/a,b=c", "key", "/a,b=c"), ("key='/a/(1) [2] {3}'", "key", "/a/(1) [2] {3}"),
        ("\"key=/home/o'brien/key\"", "key", "/home/o'brien/key"), ("key=/home/jörg/鍵", "key", "/home/jörg/鍵"),
        ("+nodes.1.own='~/x'", "nodes.1.own", "~/x"), ("output=/glob", "output", "/glob"),
    ],
)  # fmt: skip
def test_what_is_data_is_read_as_it_was_typed(typed, name, value):
    (word,) = words(typed)
    assert (word.name, word.value) == (name, value)


def test_a_place_that_was_typed_is_the_configs():
    assert load("\"key=/home/o'brien/(1), [2]/key\"").key == "/home/o'brien/(1), [2]/key"


# Builders ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def planted(tmp_path, monkeypatch) -> Path:
    """A module that leaves a mark when it is imported, and a folder for the mark."""
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\ndef f(**_): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "target",
    ["planted.f", "subprocess.getoutput", "os.system", "builtins.eval", "fl.keys.read", "fl.datasets.demo.demo.__init__", "fl.datasets.demo.torch.load", "fl.durable.write", "", ".", None, 3, ["os.system"], {"_target_": "os.system"}],
    ids=str,
)
def test_no_builder_is_called_or_imported_that_conf_does_not_name(target, planted):
    with pytest.raises(ConfigError, match="a builder must be one that a file in conf/ names"):
        build({"_target_": target, "cmd": f"touch {planted / 'mark'}"})
    assert not (planted / "mark").exists() and "planted" not in sys.modules


def test_a_part_holds_a_builder_of_its_own_group_alone():
    values = load().model_dump()
    for part in PARTS:
        others = {target for other in PARTS if other != part for target in builders.builders(other)}
        for target in [*sorted(others)[:3], "os.system", None]:
            with pytest.raises(ValueError, match=f"{part} must name a builder of conf/{part}"):
                Config.model_validate(values | {part: {"_target_": target}})
    for group in GROUPS:
        with pytest.raises(ValueError, match=rf"codecs\.{group} must name a builder of conf/codec"):
            Config.model_validate(values | {"codecs": {group: {"_target_": "fl.ciphers.plain.plain"}}})


def test_the_table_is_what_conf_names_and_all_of_it_is_ours():
    named = {values["_target_"] for path in CONF.glob("*/*.yaml") if "_target_" in (values := yaml.safe_load(path.read_text()))}
    table = {part: builders.builders(part) for part in PARTS}
    assert set().union(*table.values()) == named and all(table.values())
    assert sum(map(len, table.values())) == len(named)  # no builder is of two groups
    assert all(target.startswith("strategies." if part == "strategy" else "fl.") for part in PARTS for target in table[part])
    assert "_target_" not in "".join(path.read_text() for path in (CONF / "experiment").rglob("*.yaml"))


def test_a_setting_that_a_builder_does_not_take_is_refused_before_it_runs(tmp_path):
    part = load(f"method=melo +method.cmd='touch {tmp_path}/mark'").method
    with pytest.raises(ConfigError, match="cmd: Unexpected keyword argument") as caught:
        build(part)
    assert not (tmp_path / "mark").exists() and caught.value.settings == ("method.cmd",)


@pytest.mark.parametrize("part", ["method", "partition", "data", "codec"])
def test_a_run_whose_words_are_a_program_ends_before_it_begins(tmp_path, capsys, part):
    attack = [f"{part}._target_=subprocess.getoutput", f"+{part}.cmd=touch {tmp_path}/mark", f"key={tmp_path}/key", f"output={tmp_path}/runs"]
    assert loop.main(attack) == 2 and "a builder must be chosen by its group" in capsys.readouterr().err
    assert inprocess.run_apps(2, shlex.join(attack)) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["local-dir:/etc/veilora", "hf-hub:mallory/vit", "hf_hub:mallory/vit", "../vit", "vit.a/b", "/vit", ""])
def test_a_model_is_one_of_timms_own_and_no_folder_or_repository(name, monkeypatch):
    monkeypatch.setattr("timm.create_model", lambda *_, **__: pytest.fail("timm was asked"))
    with pytest.raises(ConfigError, match="name: String should match") as caught:
        build(load(f"model=vit_tiny model.weights=none 'model.name=\"{name}\"'").model, classes=3)
    assert caught.value.settings == ("model.name",)


# Interpolations ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def conf(tmp_path, monkeypatch) -> Path:
    """A copy of conf/, in its place."""
    copy = tmp_path / "conf"
    shutil.copytree(CONF, copy)
    for module in (config, overrides, builders):
        monkeypatch.setattr(module, "CONF", copy)
    load.cache_clear(), overrides.options.cache_clear()
    yield copy
    load.cache_clear(), overrides.options.cache_clear()


@pytest.mark.parametrize("text", ["${oc.env:SECRET}", "${oc.decode:3}", "${boom:}", "a ${.key}", "${name}", "${....name}", "[1, '${boom:}']", "$x", "x\ncodecs: {head: {keep: ['${oc.env:SECRET}']}}"])
def test_no_resolver_runs_even_where_a_yaml_asks_for_it(conf, text, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cret")
    OmegaConf.register_new_resolver("boom", lambda *_: pytest.fail("a resolver ran"), replace=True)
    file = conf / "experiment" / "evil.yaml"
    file.write_text(f"# @package _global_\nrecipe:\n  keep: {text}\n")
    try:
        with pytest.raises(ConfigError, match="^keep must be a value") as caught:
            load("experiment=evil")
    finally:
        OmegaConf.clear_resolver("boom")
    assert "s3cret" not in str(caught.value)


def test_a_setting_beside_or_above_is_taken_as_it_is():
    lr = load("recipe.lr.lora_a=0.5 recipe.lr.head=0.25").recipe.lr
    assert (lr["lora_a"], lr["lora_b"], lr["head"]) == (0.5, 0.5, 0.25)
    assert load("strategy=flora seed=7").strategy["seed"] == 7 and load("strategy=flora seed=7 strategy.seed=3").strategy["seed"] == 3
    assert "$" not in load("strategy=flora").model_dump_json()
