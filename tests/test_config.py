"""One config for laptop, server and node: it composes, it is checked, and what is wrong is one line with a way out."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from fl.adapter import GROUPS
from fl.config import CONF, Config, ConfigError, Node, build, load, node
from fl.recipe import Recipe

OPTIONS = sorted(
    f"{path.relative_to(CONF).parts[0]}={path.relative_to(CONF / path.relative_to(CONF).parts[0]).with_suffix('')}"
    for path in CONF.glob("*/**/*.yaml")
)
PARTS = ("model", "data", "partition", "cipher", "method", "strategy", "codec")


@pytest.mark.parametrize("option", OPTIONS)
def test_every_yaml_composes(option):
    config = load(option)
    for part in PARTS:
        values = dict(getattr(config, part))
        builder = get_object(values.pop("_target_"))
        inspect.signature(builder).bind_partial(**values)  # raises TypeError for a value that the builder does not take
    group, _, name = option.partition("=")
    if group in PARTS:
        alone = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))
        assert getattr(config, group)["_target_"] == alone.get(group, alone)["_target_"]  # one of the whole config names its group


def test_every_group_is_walked():
    assert {o.partition("=")[0] for o in OPTIONS} == {*PARTS, "experiment"}


def test_the_defaults_are_safe():
    config = load()
    assert config.start == "keyed" and "pixel_shuffle" in config.cipher["_target_"] and config.recipe.batch >= 2
    assert config.recipe.lr["patch_embed"] < config.recipe.lr["lora_a"] == config.recipe.lr["head"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("seeed=1", "unknown setting 'seeed'; did you mean 'seed'?"),
        ("recipe.optimiser=sgd", "unknown setting 'recipe.optimiser'; did you mean 'recipe.optimizer'?"),
        ("data.trian=3", "unknown setting 'data.trian'; did you mean 'data.train'?"),
        ("stratgy=fedavg", "unknown setting 'stratgy'; did you mean 'strategy'?"),
        ("model=vit_tinny", "model=vit_tinny does not exist; did you mean 'vit_tiny'?"),
        ("model=[vit_tiny,vit_tinny]", "model=vit_tinny does not exist; did you mean 'vit_tiny'?"),
        ("experiment=demo/keyd", "experiment=demo/keyd does not exist; did you mean 'demo/keyed'?"),
        ("+surprise=1", "surprise: Extra inputs are not permitted"),
        ("~seed", "seed: Field required"),
        ("seed=x", "seed: Input should be a valid integer"),
        ("seed=-1", "seed: Input should be greater than or equal to 0, got -1"),
        ("rounds=0", "rounds: Input should be greater than or equal to 1, got 0"),
        ("fraction=1.5", "fraction: Input should be less than or equal to 1, got 1.5"),
        ("validation=1", "validation: Input should be less than 1, got 1"),
        ("start=kee", "start: Input should be 'keyed' or 'public', got 'kee'"),
        ("device=gpu", "device: String should match pattern"),
        ("name=../up", "name: String should match pattern"),
        ("recipe.batch=1", "recipe.batch: Input should be greater than or equal to 2, got 1"),
        ("recipe.lr.head=-1", "recipe.lr.head: Input should be greater than or equal to 0, got -1"),
        ("+nodes.1.keyy=/x", "nodes.1.keyy: Extra inputs are not permitted"),
        ("model.image=33", "model.image must be a multiple of model.patch, got image=33, patch=8"),
        ("evaluate_on=validation", "evaluate_on=validation needs images to hold out; set validation=0.1"),
        ("'", "overrides must read like a shell command line"),
        ("model.image=abc", "model.image"),
        ("model.patch=0", "model.patch"),
        ("~model.image", "model.image"),
        ("cipher=null", "must be a string or a list"),
        ("~cipher._target_", "cipher"),
        ("nodes={1:{key:/x}}", "+nodes"),
        ("data=folder data.root=relative", "data.root must be absolute"),
        ("model.weights=3", "model.weights"),
        ("key=relative", "key: must be absolute or start with ~"),
        ("state=relative", "state: must be absolute or start with ~"),
        ("+nodes.1.rank=5", "method.rank is the run's largest rank, got 4 and a client's rank=5; raise method.rank"),
        ("+nodes.1.rank=0", "nodes.1.rank: Input should be greater than 0"),
        ("method=full +nodes.1.rank=2", "a rank of one's own needs a method with ranks, got rank=2; choose method=lora_patch"),
    ],
)
def test_a_config_that_cannot_run_is_one_line_that_names_what_to_change(overrides, says):
    with pytest.raises(ConfigError) as caught:
        load(overrides)
    line = str(caught.value)
    assert says in line and "\n" not in line and len(line) < 200


@pytest.mark.parametrize(
    ("part", "given", "says"),
    [
        ({"_target_": "fl.datasets.partition.nowhere"}, {}, "a builder must be one that a file in conf/ names in _target_, got 'fl.datasets.partition.nowhere'"),
        ({"_target_": "fl.datasets.demo.demo", "train": -5}, {"image": 32}, "demo: train: Input should be greater than 0, got -5"),
        ({"_target_": "fl.datasets.demo.demo", "tarin": 5}, {"image": 32}, "demo: tarin: Unexpected keyword argument"),
        ({"_target_": "fl.models.melo.melo", "rank": 0}, {}, "melo: rank: Input should be greater than 0, got 0"),
        ({"_target_": "fl.models.melo.melo", "alpha": "big"}, {}, "melo: alpha: Input should be a valid number"),
    ],
)
def test_a_part_that_cannot_be_built_names_its_builder_and_argument(part, given, says):
    with pytest.raises(ConfigError) as caught:
        build(part, **given)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_place_below_home_needs_no_quotes():
    config = load("key=~/veilora/other-key own=~ data=folder data.root=~/a.b/c +nodes.1.own='~/x'")
    assert (config.key, config.own, config.data["root"], config.nodes[1].own) == ("~/veilora/other-key", "~", "~/a.b/c", "~/x")


PLACES = {"own": "/d", "node_key": "/n", "engine": "inprocess", "diagnostics": 3, "key": "/k", "seal_key": "/k", "output": "/o", "state": "/s", "device": "cpu", "keep": 1.0, "wait": 5.0, "timeout": 5.0, "nodes": {0: {"key": "/k"}}, "rank": 2,
          "quorum": 0.5, "retries": 2, "gate": {"norm": 9.0}, "checkpoint": {"every": 3}, "resume": "a-run"}
SEEN = {
    "name": "other", "seed": 1, "rounds": 9, "clients": 3, "fraction": 0.5, "evaluate_every": 2, "validation": 0.2,
    "evaluate_on": "validation", "start": "public", "image_keys": "own", "precision": "bfloat16", "threads": 2, "together": 2, "step": "plain", "attention": "plain", "personal": False,
    "model": {"patch": 16}, "data": {"train": 77}, "partition": {"_target_": "fl.datasets.partition.shards"}, "cipher": {"_target_": "fl.ciphers.plain.plain"},
    "method": {"rank": 2}, "codec": {"_target_": "fl.wire.half.half"}, "codecs": {"head": {"_target_": "fl.wire.half.half"}}, "feedback": False, "blind": True, "seal": {"bits": 12}, "tell": {"loss": 1}, "strategy": {"_target_": "strategies.fedadam.fedadam"}, "recipe": {"mu": 0.5},
}  # fmt: skip


def changed(name: str, value: object) -> Config:
    values = load("validation=0.1").model_dump()
    if isinstance(value, dict) and name != "nodes":
        value = values[name] | value
    return Config.model_validate(values | {name: value})


def test_the_digest_ignores_places_and_sees_everything_else():
    assert set(PLACES) | set(SEEN) == set(Config.model_fields) and not set(PLACES) & set(SEEN)
    digest = load("validation=0.1").digest()
    assert len(digest) == 16 and changed("seed", 0).digest() == digest
    assert {name for name, value in PLACES.items() if changed(name, value).digest() != digest} == set()
    assert {name for name, value in SEEN.items() if changed(name, value).digest() == digest} == set()
    assert changed("data", {"root": "/d"}).digest() == digest == changed("model", {"weights": "/w"}).digest()


def test_a_node_sees_its_own_places_and_the_runs_everything_else():
    run = load("data=folder model=vit_tiny")
    own = Node(key="/k", data_root="/d", weights="/w", device="cpu", state="/s")
    here = run.at_node(own)
    assert (here.key, here.data["root"], here.model["weights"], here.device, here.state) == ("/k", "/d", "/w", "cpu", "/s")
    assert here.digest() == run.digest() and run.data["root"] != "/d" and here.recipe == run.recipe
    assert run.at_node(Node()) == run and hash(run.at_node(Node())) == hash(run) != hash(here)


def test_a_node_that_has_a_data_folder_can_join_a_run_that_needs_none():
    here = load("data=demo data.train=20 data.test=10").at_node(Node(data_root="/d"))
    assert len(build(here.data, image=32).train.labels) == 20


def test_a_nodes_settings_are_checked_like_the_runs():
    with pytest.raises(ValueError, match="colour"):
        Node(colour="red")
    with pytest.raises(ConfigError, match="^device: String should match"):
        load().at_node(Node(device="gpu"))
    with pytest.raises(ConfigError, match="^method.rank is the run's largest rank, got 4 and a client's rank=5"):
        load().at_node(node({"rank": "5"}))  # as text, as Flower's node config has it
    with pytest.raises(ConfigError, match="^rank: Input should be a valid integer"):
        node({"rank": "big"})


def test_a_recipe_survives_the_wire():
    recipe = Recipe(lr={"lora_a": 0.01, "head": 1 / 3}, optimizer="sgd", mu=0.1, augment=True, span=(0.25, 0.5), groups=("lora_b", "head"), keep=("head",), control=True)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_json(recipe.to_json()).groups == ("lora_b", "head") and Recipe(lr={}).groups == ()
    assert replace(recipe, span=(0.5, 0.75)) != recipe


def test_an_update_holds_what_trains_and_does_not_stay_at_home():
    names = {"x.lora_a.weight": 1, "x.lora_b.weight": 2, "head.weight": 3}
    for groups, keep, sent in (((), (), "abh"), (("lora_b", "head"), (), "bh"), ((), ("head",), "ab"), (("lora_b", "head"), ("head",), "b"), ((), GROUPS, "")):
        held = Recipe(lr={}, groups=groups, keep=keep).sent(names)
        assert [n.split(".")[-2][-1].replace("d", "h") for n in held] == list(sent)


def test_a_group_that_does_not_exist_is_named_with_those_that_do():
    with pytest.raises(ValueError, match="groups(.|\n)*'lora_a', 'lora_b', 'lora_r', 'patch_embed', 'head' or 'backbone'(.|\n)*'tail'"):
        Recipe(lr={}, groups=("tail",))


@pytest.mark.parametrize(
    ("old", "new"),
    [('"mu"', '"nu"'), ('"mu": 0.0, ', ""), ("{", "["), ("}", ""), ('"batch": 32', '"batch": 1'), ('{"head": 0.5}', '{"head": Infinity}')],
)
def test_a_recipe_of_another_make_is_refused(old, new):
    text = Recipe(lr={"head": 0.5}).to_json()
    assert old in text and Recipe.from_json(text)
    with pytest.raises(ValueError):
        Recipe.from_json(text.replace(old, new))
