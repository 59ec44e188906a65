"""A coordinator in an attacker's hands, over TLS: its own server program, changed bundles, hostile words and messages.

Coordinator, proxy and nodes are users of their own where root may make them. The nodes stand under the strict policy.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_edge import RUN
from test_site import MESSAGES, WORDS

from fl.provenance import ROOT, SHIPPED
from fl.wire.records import FACTS
from simulations import users
from simulations.edge import edge

pytestmark = pytest.mark.slow
SECURE = f"blind=true {RUN}".replace("codec=float32 ", "")
ATTACK = """
import json, os, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    while len(nodes := sorted(grid.get_node_ids())) < 3:
        time.sleep(0.1)
    said = {}
    for name, (kind, records) in json.load(open(os.environ["VEILORA_ATTACK"])).items():
        content = {record: ConfigRecord(values) for record, values in records.items()}
        told = [Message(RecordDict(content), dst_node_id=node, message_type=kind) for node in nodes]
        replies = list(grid.send_and_receive(told, timeout=120))
        said[name] = [{"flower": r.error.reason} if r.has_error() else json.loads(r.content["facts"]["json"]) for r in replies]
    os.makedirs(os.environ["VEILORA_OUTPUT"], exist_ok=True)
    with open(os.environ["VEILORA_OUTPUT"] + "/said.json", "w") as file:
        json.dump(said, file)
"""
QUERY = {"query": ("query", {FACTS: {"json": json.dumps({"run": "a"})}})}
TOLD = [
    "blind=false", "blind=true start=public", "blind=true cipher=plain", "blind=true recipe.batch=2", "blind=true seal.members=2",
    "blind=true tell.loss=6", "blind=true key=/tmp/known", "blind=true +nodes.1.key=/tmp/known", "blind=true model=vit_tiny model.name=hf-hub:mallory/vit",
    "blind=true method._target_=subprocess.getoutput +method.cmd=id", "blind=true hydra.searchpath=[file:///etc]", "blind=true name='${oc.env:HOME}'",
]  # fmt: skip


def checkout(folder: Path, **changed: str | None) -> Path:
    """A copy of what is shipped, whose server program is the attacker's; ``changed`` files have another text, or none."""
    for name in (p.relative_to(ROOT) for pattern in SHIPPED for p in ROOT.glob(pattern)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    project = (ROOT / "pyproject.toml").read_text().replace("strategies.server_app:app", "attack:app")
    (folder / "pyproject.toml").write_text(project)
    (folder / "README.md").touch()
    for name, text in changed.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).unlink() if text is None else (folder / name).write_text(text)
    return folder


def test_thirty_attacks_over_tls_are_refused_by_name_and_an_honest_run_goes_through(tmp_path):
    apart = not users.lacking()
    site_folder, marks = tmp_path / "site", tmp_path / "site" / "marks"
    with edge(site_folder, 3, up=False, apart=apart, secure=True) as site:
        marks.mkdir()
        marks.chmod(0o1777)
        for place in (site_folder / "attack", site_folder / "attack" / "attack.py", site_folder / "attack" / "cases.json"):
            place.mkdir() if not place.suffix else place.write_text(ATTACK if place.suffix == ".py" else "{}")
        with (site.files / "coordinator" / "engine.env").open("a") as engine:
            engine.write(f"PYTHONPATH={site_folder / 'attack'}\nVEILORA_ATTACK={site_folder / 'attack' / 'cases.json'}\n")
        site.operator.env["PYTHONPATH"] = str(site_folder / "attack")
        site.start_superlink()
        site.start_proxy()
        site.register()
        for index in range(3):
            site.start(index)
        site.await_nodes()

        def attack(app: Path, words: str, cases: dict) -> dict:
            """What each node answers to each of ``cases``."""
            (site_folder / "attack" / "cases.json").write_text(json.dumps(cases))
            (site.runs / "said.json").unlink(missing_ok=True)
            done = site.operator.follow(app, ["--run-config", f"overrides={json.dumps(words)}"], show=False)
            assert done, site.last_words("superlink")
            return json.loads((site.runs / "said.json").read_text())

        def refused(rule: str) -> list[dict]:
            return [{"error": f"policy: {rule}", "client": i} for i in range(3)]

        def by_client(answers: list[dict]) -> list[dict]:
            return sorted(answers, key=lambda facts: facts.get("client", -1))

        honest = checkout(tmp_path / "honest")
        for words in TOLD:
            assert by_client(attack(honest, words, QUERY)["query"]) == refused(WORDS[words]), words

        mark = f"open({str(marks / 'mark')!r}, 'w').close()\n"
        app = (ROOT / "clients/client_app.py").read_text()
        bundles = {
            "raises": ({"clients/client_app.py": f"app = None\n{mark}raise SystemExit(3)\n"}, "code.installed"),
            "says": ({"clients/client_app.py": f"{app}\n{mark}"}, "code.installed"),
            "more": ({"clients/more.py": mark}, "code.files"),
            "less": ({"clients/gate.py": None}, "code.files"),
            "config": ({"conf/cipher/pixel_shuffle.yaml": "_target_: fl.ciphers.plain.plain\n"}, "code.installed"),
            "policy": ({"clients/policy.py": "", "clients/site.py": mark}, "code.installed"),
        }
        for name, (changed, rule) in bundles.items():
            assert by_client(attack(checkout(tmp_path / name, **changed), "blind=true", QUERY)["query"]) == refused(rule), name

        cases = {name: (kind, {record: dict(values) for record, values in content.items()}) for name, (kind, content) in MESSAGES.items()}
        for name, answers in attack(honest, SECURE, cases).items():
            assert len(answers) == 3 and all(set(facts) == {"error", "client"} for facts in answers), (name, answers)
            assert str(tmp_path) not in json.dumps(answers), name

        assert len(TOLD) + len(bundles) + len(cases) >= 30 and not list(marks.iterdir())
        assert not list(site_folder.glob("var/node-*/flwr/apps")), "no bundle was unpacked"
        ended = site.run(SECURE.split(), show=False)
        assert ended.completed, site.last_words("superlink")
        assert len(json.loads((ended.output / "summary.json").read_text())["policies"]) == 1
