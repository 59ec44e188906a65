"""The site decides: whatever a coordinator sends is refused by the name of a rule, and no module of a bundle is ever imported."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.task_identity import TaskIdentity
from hostile import OVERRIDES
from test_simulation import home, settings  # noqa: F401

from clients import bundle, flower, judgement, policy, site
from clients.kit import policy_file
from clients.policy import Policy, PolicyError
from fl import provenance
from fl.overrides import options
from fl.provenance import ROOT
from fl.wire.records import facts_of, to_content
from simulations import inprocess
from strategies import server_app
from strategies.talk import RunFailed

FILES = {name: (ROOT / name).read_bytes() for name in provenance.shipped()}
APP, CONFIG = "clients/client_app.py", "conf/config.yaml"
EVIL = b"\nopen('/tmp/veilora-marker', 'w').close()\n"


def zipped(files: dict[str, bytes] | list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A bundle as Flower writes one, of these files."""
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", method) as file:
        warnings.simplefilter("ignore")  # of two members with one name
        for name, content in [("pyproject.toml", b"[project]\n"), *dict(files).items(), (".info/CONTENT", b"")] if isinstance(files, dict) else files:
            file.writestr(name, content)
    return out.getvalue()


def lying(content: bytes, size: int) -> bytes:
    """A bundle whose directory says of one file that it unpacks to ``size`` bytes."""
    at = content.rindex(b"PK\x01\x02", 0, content.index(b"PK\x05\x06"))
    return content[: at + 24] + size.to_bytes(4, "little") + content[at + 28 :]


def turned(content: bytes, name: str) -> bytes:
    """A bundle with one bit changed in the packed content of the file ``name``."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        at = file.getinfo(name).header_offset + 30 + len(name) + 100  # 30 bytes of a header, the name, no extra field
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


HONEST = zipped(FILES)
BUNDLES = {
    "a line more in the app": (zipped(FILES | {APP: FILES[APP] + EVIL}), "code.installed"),
    "a byte less in a YAML": (zipped(FILES | {CONFIG: FILES[CONFIG][:-1]}), "code.installed"),
    "a builder in a YAML": (zipped(FILES | {"conf/cipher/plain.yaml": b"_target_: subprocess.getoutput\n"}), "code.installed"),
    "two files exchanged": (zipped(FILES | {APP: FILES["clients/gate.py"], "clients/gate.py": FILES[APP]}), "code.installed"),
    "every module raises": (zipped({n: b"raise SystemExit\n" if n.endswith(".py") else c for n, c in FILES.items()}), "code.installed"),
    "an empty file": (zipped(FILES | {"fl/keys.py": b""}), "code.installed"),
    "a module more": (zipped(FILES | {"clients/more.py": EVIL}), "code.files"),
    "a module that Python imports unasked": (zipped(FILES | {"sitecustomize.py": EVIL}), "code.files"),
    "a path file": (zipped(FILES | {"veilora.pth": b"import os\n"}), "code.files"),
    "compiled code": (zipped(FILES | {"clients/__pycache__/gate.cpython-312.pyc": b""}), "code.files"),
    "a config group more": (zipped(FILES | {"conf/hydra/launcher/x.yaml": b""}), "code.files"),
    "a way out of the folder": (zipped(FILES | {"../../clients/gate.py": EVIL}), "code.files"),
    "an absolute path": (zipped(FILES | {"/etc/veilora/policy.toml": b""}), "code.files"),
    "a policy of its own": (zipped(FILES | {"policy.toml": b""}), "code.files"),
    "another case": (zipped(FILES | {"Clients/gate.py": EVIL}), "code.files"),
    "a folder": (zipped(FILES | {"clients/": b""}), "code.files"),
    "one file missing": (zipped({n: c for n, c in FILES.items() if n != APP}), "code.files"),
    "one file twice": (zipped([*FILES.items(), (APP, EVIL)]), "code.files"),
    "the false one first": (zipped([(APP, EVIL), *FILES.items()]), "code.files"),
    "no code at all": (zipped({}), "code.files"),
    "nothing": (b"", "code.bundle"),
    "no zip": (b"import os\n" * 100, "code.bundle"),
    "cut off": (HONEST[: len(HONEST) // 2], "code.bundle"),
    "a byte turned": (turned(HONEST, APP), "code.bundle"),
    "packed without bound": (zipped(FILES, zipfile.ZIP_BZIP2), "code.bundle"),
    "a bomb": (zipped(FILES | {APP: bytes(2**25 + 1)}), "code.bundle"),
    "a size that is a lie": (lying(zipped([*FILES.items()]), 2**31), "code.bundle"),
    "with a password": (zipped(FILES).replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"), "code.bundle"),
}  # fmt: skip
BLIND = "blind=true"
WORDS = {
    "blind=false": "run.secure_aggregation",
    "": "run.secure_aggregation",
    f"{BLIND} start=public": "run.start",
    f"{BLIND} cipher=plain start=public": "run.start",
    f"{BLIND} cipher=plain": "run.cipher",
    f"{BLIND} strategy=krum": "run.strategies",
    f"{BLIND} recipe.batch=2": "run.batch",
    f"{BLIND} recipe.epochs=6": "run.epochs",
    f"{BLIND} recipe.deadline=1e-9 recipe.optimizer=sgd": "run.deadline",
    f"{BLIND} recipe.lr.head=1e6": "run.lr",
    f"{BLIND} seal.members=2": "run.members",
    f"{BLIND} rounds=100000": "run.rounds",
    f"{BLIND} quorum=0.01": "run.quorum",
    f"{BLIND} tell.loss=6": "tell.loss",
    f"{BLIND} tell.accuracy=6": "tell.accuracy",
    f"{BLIND} key=/tmp/known": "overrides.places",
    f"{BLIND} ++key=/tmp/known": "overrides.places",
    f"{BLIND} ~key": "overrides.places",
    f"{BLIND} seal_key=/tmp/known": "overrides.places",
    f"{BLIND} node_key=/tmp/known": "overrides.places",
    f"{BLIND} state=/tmp/state": "overrides.places",
    f"{BLIND} output=/tmp/out": "overrides.places",
    f"{BLIND} own=/tmp/pictures": "overrides.places",
    f"{BLIND} +nodes.1.key=/tmp/known": "overrides.places",
    f"{BLIND} '+nodes={{1:{{key:/tmp/known}}}}'": "overrides.places",
    f"{BLIND} data=folder data.root=/etc": "overrides.places",
    f"{BLIND} 'data={{root:/etc}}'": "overrides.option",
    f"{BLIND} model.weights=/tmp/pickle": "overrides.places",
    f"{BLIND} model=vit_tiny model.weights=hub": "overrides.places",
    f"{BLIND} model=vit_tiny model.name=hf-hub:mallory/vit": "overrides.places",
    f"{BLIND} model=vit_tiny model.name=local-dir:/tmp": "overrides.places",
    f"{BLIND} data=cifar10 data.download=true": "overrides.allow",
    f"{BLIND} device=cpu": "overrides.allow",
    f"{BLIND} keep=1000": "overrides.allow",
    f"{BLIND} +anything=1": "overrides.allow",
    f"{BLIND} method._target_=subprocess.getoutput +method.cmd=id": "overrides.builder",
    f"{BLIND} hydra.searchpath=[file:///etc]": "overrides.hydra",
    f"{BLIND} name='${{oc.env:HOME}}'": "overrides.interpolation",
    f"{BLIND} rounds=many": "overrides.config",
    f"{BLIND} 'unbalanced": "overrides.shell",
}
POLICIES = {
    "no TOML": "[run\n", "an unknown table": "[runs]\n", "an unknown field": "[run]\nsecure = false\n", "a field too many": "approve = 'any'\n",
    "a number for a truth": "[run]\nsecure_aggregation = 0\n", "a text for a truth": "[run]\nsecure_aggregation = 'no'\n",
    "all": "[run]\nmethods = 'any'\n", "a method that is none": "[run]\nmethods = ['lora_pach']\n", "a cipher that is none": "[run]\ncipher = 'none'\n",
    "a bound without a number": "[run]\nbatch = {min = 'few'}\n", "a bound that bounds nothing": "[run]\nrounds = {max = inf}\n",
    "a bound of the other side": "[run]\nepochs = {min = 1}\n", "another mode": "[code]\nmode = 'any'\n", "a start that is none": "[run]\nstart = 'plain'\n",
    "decimals without end": "[tell]\nloss = 60\n", "any for a name": "[run]\napprove = 'all'\n",
}  # fmt: skip


def test_there_are_enough_of_them():
    assert len(BUNDLES) + len(WORDS) + len(POLICIES) + len(OVERRIDES) >= 100


def test_the_bundle_that_flower_builds_of_this_checkout_is_the_installed_code():
    bundle.compare(build_fab_from_disk(ROOT), provenance.shipped())
    bundle.compare(HONEST, provenance.shipped())


@pytest.mark.parametrize("name", BUNDLES)
def test_a_hostile_bundle_is_refused_by_name(name):
    content, rule = BUNDLES[name]
    with pytest.raises(PolicyError) as error:
        bundle.compare(content, provenance.shipped())
    assert error.value.rule == rule


@pytest.mark.parametrize("words", WORDS)
def test_hostile_words_are_refused_by_name(words):
    with pytest.raises(PolicyError) as error:
        judgement.judge(Policy(), words)
    assert error.value.rule == WORDS[words]


@pytest.mark.parametrize("words, rule", OVERRIDES)
def test_words_that_are_no_data_are_refused_by_the_grammars_rule(words, rule):
    with pytest.raises(PolicyError) as error:
        judgement.judge(Policy(), f"{BLIND} {words}")
    assert error.value.rule == f"overrides.{rule}"


@pytest.mark.parametrize("words", [
    BLIND, f"{BLIND} experiment=cifar10/small rounds=10", f"{BLIND} strategy=fedadam recipe.lr.head=1e-3 data.train=400 +codec@codecs.head=int8",
    f"{BLIND} model=vit_tiny model.weights=none +model.depth=2 quorum=0.6 retries=3 timeout=600 clients=3", f"{BLIND} seal.members=5 tell.loss=1",
])  # fmt: skip
def test_an_honest_secure_run_is_let_in(words):
    assert judgement.judge(Policy(), words).blind


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_that_cannot_be_read_lets_nothing_in(name, tmp_path):
    (tmp_path / "policy.toml").write_text(POLICIES[name])
    with pytest.raises(PolicyError) as error:
        policy.read(tmp_path / "policy.toml")
    assert error.value.rule == "file"


def test_a_missing_file_is_the_strict_policy_and_the_kits_file_says_the_same(tmp_path):
    assert policy.read(tmp_path / "none.toml") == policy.read(None) == policy.parse("") == policy.parse(policy_file.text(secure=True))
    clear = policy.parse(policy_file.text(secure=False))
    assert not clear.run.secure_aggregation and clear.digest() != Policy().digest() == policy.parse("\n[tell]\nloss=2\n").digest()
    assert judgement.judge(clear, "strategy=krum").strategy["_target_"] == "strategies.krum.krum"
    with pytest.raises(PolicyError, match=r"^file: .*lets nothing in"):
        policy.read(tmp_path)


def test_the_strict_policy_names_just_the_strategies_that_need_no_more_than_a_sum():
    from fl.config import CONF, build, load

    parts = {name: yaml.safe_load((CONF / "strategy" / f"{name}.yaml").read_text()) for name in options("strategy")}
    linear = {name for name, part in parts.items() if build(part | ({"seed": 0} if "seed" in part else {}), recipe=load().recipe).linear}
    assert set(policy.LINEAR) == linear


def test_every_setting_that_may_be_set_exists_and_no_place_is_among_them():
    from fl.config import Config
    from fl.sections import Node

    heads = {name.partition(".")[0] for name in policy.ALLOWED} - {"experiment"}
    assert heads <= set(Config.model_fields)
    places = {"data_root": "data.root", "weights": "model.weights"}
    assert {places.get(name, name) for name in set(Node.model_fields) - {"device", "rank"}} | {"nodes"} == set(policy.PLACES)
    allowed = Policy.model_validate({"overrides": {"allow": ["*"]}})
    for words, rule in WORDS.items():
        if rule == "overrides.places":
            with pytest.raises(PolicyError, match="^overrides.places"):
                judgement.judge(allowed, words)


def test_an_owner_approves_runs_by_name_or_by_digest():
    config = judgement.judge(Policy(), f"{BLIND} name=trial")
    for approve, fine in ((["trial"], True), ([judgement.config_sha256(config)], True), (["other"], False), ([], False)):
        one = Policy.model_validate({"run": {"approve": approve}})
        if fine:
            judgement.judge(one, f"{BLIND} name=trial")
        else:
            with pytest.raises(PolicyError, match=r"^run\.approve"):
                judgement.judge(one, f"{BLIND} name=trial")
    with pytest.raises(PolicyError, match=r"^run\.approve"):
        judgement.judge(Policy.model_validate({"run": {"approve": [judgement.config_sha256(config)]}}), f"{BLIND} name=trial seed=1")


def test_a_run_that_is_named_by_an_approved_digest_is_not_approved():
    digest = judgement.config_sha256(judgement.judge(Policy(), f"{BLIND} name=trial"))
    with pytest.raises(PolicyError, match=r"^run\.approve"):
        judgement.judge(Policy.model_validate({"run": {"approve": [digest]}}), f"{BLIND} name={digest} seed=1")


def test_an_approval_by_digest_does_not_let_a_run_tell_of_fewer_clients():
    digest = judgement.config_sha256(judgement.judge(Policy(), f"{BLIND} name=trial"))
    with pytest.raises(PolicyError, match=r"^run\.quorum"):
        judgement.judge(Policy.model_validate({"run": {"approve": [digest], "quorum": {"min": 1.0}}}), f"{BLIND} name=trial quorum=0.6")


def placeless(home: Path, more: str) -> str:
    """A tiny run's words, as a coordinator may send them: without a place."""
    return " ".join(word for word in settings(home, home, more).split() if word.split("=")[0] not in policy.PLACES or word == "model.weights=none")


def ask(app, kind: str = "query", content: RecordDict | None = None, words: str = BLIND, **node_config) -> dict:
    """What ``app`` answers to one message."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    message = Message(to_content({"run": "a"}) if content is None else content, dst_node_id=7, message_type=kind)
    message.metadata.__dict__["_message_id"] = "m"
    place = {"partition-id": 1, "num-partitions": 3}
    context = Context(run_id=1, node_id=7, node_config=place | node_config, state=RecordDict(), run_config={"overrides": words})
    return facts_of(app(message=message, context=context))


def test_a_refusal_is_an_answer_with_the_rules_name_and_nothing_else(tmp_path, caplog):
    def never(**_):
        raise AssertionError("the app was called")

    (tmp_path / "policy.toml").write_text("[run]\nsecure = 'SECRET'\n")
    cases = [
        (site.guarded(BUNDLES["a line more in the app"][0], None, never), BLIND, "code.installed"),
        (site.guarded(HONEST, None, never), "blind=false", "run.secure_aggregation"),
        (site.guarded(HONEST, None, never), f"{BLIND} key=/home/SECRET", "overrides.places"),
        (site.guarded(HONEST, tmp_path / "policy.toml", never), BLIND, "file"),
    ]
    for kind in ("query", "train", "evaluate"):
        for app, words, rule in cases:
            assert ask(app, kind, words=words) == {"error": f"policy: {rule}", "client": 1}
    assert "SECRET" in caplog.text, "the log has the rest"
    assert ask(cases[1][0], words="", **{"partition-id": "x"}) == {"error": "policy: run.secure_aggregation", "client": None}


MESSAGES = {
    "a kind that nobody handles": ("train.special", to_content({})),
    "another one": ("query.shell", to_content({"run": "a"})),
    "no facts": ("query", RecordDict()),
    "no JSON": ("query", RecordDict({"facts": ConfigRecord({"json": "{"})})),
    "a list for facts": ("query", RecordDict({"facts": ConfigRecord({"json": "[]"})})),
    "a record more": ("query", RecordDict({"facts": ConfigRecord({"json": "{}"}), "code": ConfigRecord({"x": "import os"})})),
    "facts without end": ("query", RecordDict({"facts": ConfigRecord({"json": '{"a":' + "[" * 60000 + '"'})})),
    "a run that is a path": ("train", to_content({"run": "../../etc", "round": 1, "config": "0"})),
    "a round that is none": ("train", to_content({"run": "a", "round": True, "config": "0"})),
    "another config": ("train", to_content({"run": "a", "round": 1, "config": "0" * 16})),
    "an order without a recipe": ("train", to_content({"run": "a", "round": 1})),
    "a score of nothing": ("evaluate", to_content({"run": "a", "round": 1})),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_hostile_message_is_answered_in_one_line_and_without_this_machines_places(name, home, tmp_path):
    kind, content = MESSAGES[name]
    (tmp_path / "policy.toml").write_text(policy_file.text(secure=False))
    words = placeless(home, "clients=3")
    own = {"key-path": str(home / "key"), "state-path": str(tmp_path / "state")}
    said = ask(site.guarded(HONEST, tmp_path / "policy.toml"), kind, content, words, **own)
    assert said["error"] and str(tmp_path) not in json.dumps(said) and str(home) not in json.dumps(said)


def test_the_policys_digest_is_in_the_roll_and_in_no_simulations(home, tmp_path):
    (tmp_path / "policy.toml").write_text(policy_file.text(secure=False))
    words = placeless(home, "clients=3")
    own = {"key-path": str(home / "key"), "state-path": str(tmp_path / "state"), "output-path": str(tmp_path)}
    script = site.guarded(HONEST, tmp_path / "policy.toml")
    try:
        assert ask(script, words=words, **own)["policy"] == policy.read(tmp_path / "policy.toml").digest()[:16]
    finally:
        policy.in_force.set("")
    assert ask(site.client_app.app, words=words, **own)["policy"] == ""


TAKEN = """
import json, os, sys
from pathlib import Path
from types import SimpleNamespace
from clients import node
from flwr.app import Context, Message, RecordDict
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from fl.wire.records import facts_of, to_content

node.prepare(None)
from flwr.supernode.runtime import run_clientapp as flower

def pull(client):
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    message = Message(to_content({"run": "a"}), dst_node_id=7, message_type="query")
    message.metadata.__dict__["_message_id"] = "m"
    place = {"partition-id": 1, "num-partitions": 3, "key-path": "/none/key"}
    context = Context(run_id=1, node_id=7, node_config=place, state=RecordDict(), run_config={"overrides": "blind=true"})
    run = Run.create_empty(run_id=1)
    run.fab_id, run.fab_version = fab, "0.1.0"
    return message, context, run, Fab("0" * 64, content, {})

def push(client, message, context):
    here = [name for name, module in sys.modules.items() if str(getattr(module, "__file__", "")).startswith(os.getcwd())]
    print(json.dumps([path.name, facts_of(message)["error"], here]), flush=True)

flower.RuntimeHttpClient = SimpleNamespace(from_server_address=lambda **_: SimpleNamespace(close=lambda: None))
flower.make_task_heartbeat_fn_http = lambda _: None
flower.HeartbeatSender = lambda _: SimpleNamespace(start=lambda: None, stop=lambda: None, is_running=False)
flower.pull_task_input, flower.push_task_output, flower.push_message = pull, lambda **_: None, push
for path in sorted(Path("bundles").iterdir()):
    content, fab = path.read_bytes(), "../../mallory" if path.name == "out" else "veilora/veilora"
    child = node.fork(target=node.client_app, args=("127.0.0.1:1", os.getpid(), "token"))
    child.start()
    child.join()
"""


@pytest.mark.slow
def test_flowers_own_client_process_imports_nothing_of_a_bundle(tmp_path):
    """Flower's real run_clientapp, as the node's child calls it: the bundle touches no disk, and a refusal is an ordinary answer."""
    marked = f"open({str(tmp_path / 'marker')!r}, 'w').close()\nraise SystemExit(3)\n".encode()
    raising = zipped({name: marked if name.endswith(".py") else content for name, content in FILES.items()})
    bundles = {
        "honest": HONEST, "raises": raising, "more": zipped(FILES | {"sitecustomize.py": marked, "clients/marked.py": marked}),
        "out": zipped(FILES | {"../../marked.py": marked}), "none": b"no zip",
    }  # fmt: skip
    (tmp_path / "bundles").mkdir()
    for name, content in bundles.items():
        (tmp_path / "bundles" / name).write_bytes(content)
    env = os.environ | {"FLWR_HOME": str(tmp_path / "flwr"), "FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run([sys.executable, "-P", "-c", TAKEN], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    said = {line[0]: line[1:] for line in map(json.loads, (line for line in done.stdout.splitlines() if line.startswith("[")))}
    assert said.keys() == bundles.keys(), done.stdout + done.stderr
    rules = {"raises": "code.installed", "more": "code.files", "out": "code.files", "none": "code.bundle"}
    assert {name: said[name] for name in rules} == {name: [f"policy: {rule}", []] for name, rule in rules.items()}
    assert "policy" not in said["honest"][0] and "key" in said["honest"][0], "the installed app was called, and has no key file here"
    assert not (tmp_path / "marker").exists() and {p.name for p in tmp_path.iterdir()} <= {"bundles", "flwr"} and not (tmp_path / "flwr" / "apps").exists()


def test_a_flower_of_another_shape_starts_no_node():
    with pytest.raises(flower.FlowerError, match="must have run_clientapp with"):
        flower.take_over(SimpleNamespace(__name__="flwr.x", run_clientapp=lambda: None), site.guarded)
    with pytest.raises(flower.FlowerError, match="must have _pull_and_store_message"):
        flower.unopened(SimpleNamespace(__name__="flwr.y"))


def test_the_supernode_takes_the_words_of_a_run_and_opens_no_bundle():
    from flwr.supernode import start_client_internal as real

    loop = SimpleNamespace(**vars(real))
    flower.unopened(loop)
    run = SimpleNamespace(override_config={"overrides": "a=1", "other": "x"})
    assert loop.get_fused_config_from_fab(b"no zip", run) == {"overrides": "a=1"}
    assert loop.get_fused_config_from_fab(b"", SimpleNamespace(override_config={})) == {"overrides": ""}


def test_a_run_that_one_site_refuses_ends_at_the_roll_call_by_that_one_line(home, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # where the server leaves the record, since no words may say where
    (tmp_path / "open.toml").write_text(policy_file.text(secure=False))
    (tmp_path / "small.toml").write_text(policy_file.text(secure=False).replace("max = 500", "max = 1"))
    words = placeless(home, "clients=3 rounds=2")
    own = {"key-path": str(home / "key"), "state-path": str(tmp_path / "state"), "output-path": str(tmp_path)}

    def app(message, context):
        index = context.node_config["partition-id"]
        return site.guarded(HONEST, tmp_path / ("small.toml" if index == 2 else "open.toml"))(message=message, context=context)

    try:
        with pytest.raises(RunFailed, match="^client 2: policy: run.rounds$"):
            inprocess.run(server_app.app, app, 3, words, {i: own for i in range(3)})
    finally:
        policy.in_force.set("")


def test_a_site_that_closes_its_door_in_the_middle_leaves_the_others_their_run(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # where the server leaves the record, since no words may say where
    (tmp_path / "policy.toml").write_text(policy_file.text(secure=False))
    words = placeless(home, "clients=3 rounds=2 quorum=0.6 evaluate_every=2 diagnostics=0")
    own = {"key-path": str(home / "key"), "state-path": str(tmp_path / "state"), "output-path": str(tmp_path / "runs")}
    trained = []

    def app(message, context):
        index = context.node_config["partition-id"]
        trained.append(index) if message.metadata.message_type == "train" else None
        return site.guarded(HONEST, tmp_path / "none.toml" if index == 2 and trained.count(2) > 1 else tmp_path / "policy.toml")(message=message, context=context)

    try:
        inprocess.run(server_app.app, app, 3, words, {i: own for i in range(3)})
    finally:
        policy.in_force.set("")
    said = capsys.readouterr().out
    assert "client 2" in said and "policy: run.secure_aggregation" in said and trained.count(0) == trained.count(1) == 2
