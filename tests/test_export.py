"""An export computes what the run's model does, read by the libraries that it is for; it holds no key and no path."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

from fl import keys
from fl.adapter import read, ride, save
from fl.config import build, load
from fl.datasets import Examples
from fl.datasets.cifar import cifar10
from fl.datasets.demo import CLASSES, draw
from fl.datasets.images import resize
from fl.export import export, peft
from fl.export.merged import forward, merge
from fl.export.folder import ExportError
from fl.export.released import READING, reading
from fl.export.restored import Restored, backbone, restore
from fl.journal import Journal
from fl.models.lora import LoRAqv, LowRank
from fl.randomness import generator
from simulations import loop

VIT = "model=vit_tiny model.name=vit_tiny_patch16_224 model.image=32 model.patch=8 model.weights=none +model.embed_dim=32 +model.depth=2 +model.num_heads=2"
PLACE = "/some/where/else"  # a path of the machine that ran it
METHODS = ("lora_patch", "melo", "lora_sb", "ravan", "full", "linear")
WITH_LORA = METHODS[:4]


@pytest.fixture
def left(tmp_path, key):
    """A builder of run folders as a run leaves them, with random values wherever something trains."""

    def leave(method: str, *more: str, base: bool = False, name: str = "run") -> Path:
        config = load(f"{VIT} method={method} {'method.rank=4' if method in WITH_LORA else ''} key={PLACE}/key {' '.join(more)}")
        model = build(config.model, classes=10)
        build(config.method)(model, config.seed)
        adapter = read(model)
        for place, tensor in adapter.items():
            torch.nn.init.normal_(tensor, std=0.1, generator=generator(0, place))
        change = {f"blocks.1.attn.qkv.v.lora_{x}.weight": torch.full(s, 0.1) for x, s in (("a", (3, 32)), ("b", (32, 3)))} if base else {}
        run = tmp_path / name
        save({**adapter, **ride("base", change)}, run / "adapter.safetensors")
        (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config.model_dump())))
        (run / "summary.json").write_text(json.dumps({"run": name, "accuracy": 0.5, "clients": 2, "rounds": 3, "key_fingerprint": key.fingerprint}))
        (run / "classes.json").write_text(json.dumps(CLASSES))
        return run

    return leave


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return draw(CLASSES, 20, generator(1, "pictures")).images


def logits(restored: Restored, images: torch.Tensor) -> torch.Tensor:
    return forward(restored.model)(images)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert b.std() > 0.01 and float((a - b).abs().max()) < 1e-5 * float(b.abs().max())


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_restored_as_the_model_that_it_wrote(method, left, pictures):
    run = left(method)
    restored, fresh = restore(run), backbone(load(VIT), 10)
    assert all(torch.equal(t, restored.model.get_parameter(n)) for n, t in load_file(run / "adapter.safetensors").items())
    assert restored.reading.classes == CLASSES and not restored.model.training
    assert not torch.allclose(logits(restored, pictures), forward(fresh)(pictures), atol=1e-2)


@pytest.mark.parametrize(("method", "base"), [*((m, False) for m in METHODS), ("lora_patch", True)])
def test_timm_alone_reads_the_merged_model(method, base, left, tmp_path, pictures):
    run = left(method, base=base)
    record = export(run, tmp_path / "out", "timm", verify=True)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    close(forward(model)(pictures), logits(restore(run), pictures))
    assert record["difference"] < 1e-5 * record["largest"] and set(record["files"]) == {"README.md", "config.json", "model.safetensors", "veilora.json"}
    config = timm.data.resolve_model_data_config(model)
    assert tuple(config["input_size"]) == (3, 32, 32) and list(config["mean"]) == list(config["std"]) == [0.5] * 3 and config["crop_pct"] == 1.0
    assert tuple(json.loads((tmp_path / "out" / "config.json").read_text())["label_names"]) == CLASSES


def test_merging_adds_the_product_of_float64_and_a_changed_base(left):
    restored = restore(left("lora_patch", base=True))
    adapted, whole = restored.model.blocks[1].attn.qkv, merge(restored.model).blocks[1].attn.qkv
    pristine = backbone(restored.config, 10).blocks[1].attn.qkv.weight.detach()
    for at, path, change in ((0, adapted.q, 0.0), (2, adapted.v, 3 * 0.01)):
        rows = slice(32 * at, 32 * at + 32)
        expected = pristine[rows].double() + path.scale * (path.lora_b.weight.double() @ path.lora_a.weight.double() + change)
        torch.testing.assert_close(whole.weight[rows].double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(whole.weight[32:64], pristine[32:64]) and type(whole) is nn.Linear


@pytest.fixture
def small() -> nn.Module:
    """One layer of width 2: q of rank 1 and v of rank 2, scale 3, all numbers by hand."""
    q, v = LowRank(2, 1, 3.0), LowRank(2, 2, 6.0)
    for path, a, b in ((q, [[1, 2]], [[3], [4]]), (v, [[5, 6], [7, 8]], [[9, 10], [11, 12]])):
        path.lora_a.weight.data, path.lora_b.weight.data = torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32)
    qkv = nn.Linear(2, 6)
    model = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": LoRAqv(qkv, q, v)})})
    return model.requires_grad_(False)


def test_two_adapters_become_one_of_twice_the_rank(small):
    tensors, settings = peft.fused(small)
    assert tensors["base_model.model.attn.qkv.lora_A.weight"].tolist() == [[1, 2], [0, 0], [5, 6], [7, 8]]
    assert tensors["base_model.model.attn.qkv.lora_B.weight"].tolist() == [[3, 0, 0, 0], [4, 0, 0, 0], [0] * 4, [0] * 4, [0, 0, 9, 10], [0, 0, 11, 12]]
    assert settings["r"] == 4 and settings["lora_alpha"] / settings["r"] == 3 and len(tensors) == 2
    layer, x = small["attn"]["qkv"], torch.tensor([[1.0, -1.0], [0.5, 2.0]])
    a, b = (tensors[f"base_model.model.attn.qkv.lora_{n}.weight"] for n in "AB")
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias) + 3 * (x @ a.T) @ b.T)


@pytest.mark.parametrize("method", WITH_LORA)
def test_an_adapter_for_peft_goes_onto_the_fresh_backbone(method, left, tmp_path):
    record = export(left(method), tmp_path / "out", "peft", verify=True)
    assert record["difference"] < 1e-5 * record["largest"]
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == (["head"] if method == "melo" else ["patch_embed.proj", "head"])


@pytest.mark.slow
@pytest.mark.parametrize("method", WITH_LORA)
def test_peft_itself_reads_the_adapter(method, left, tmp_path, pictures):
    theirs = pytest.importorskip("peft", reason="peft, the oracle of this test, is not installed")
    run = left(method)
    export(run, tmp_path / "out", "peft")
    restored = restore(run)
    model = theirs.PeftModel.from_pretrained(backbone(restored.config, 10), str(tmp_path / "out")).eval()
    close(forward(model)(pictures), logits(restored, pictures))
    close(forward(model.merge_and_unload())(pictures), logits(restored, pictures))
    saved = theirs.get_peft_model_state_dict(theirs.PeftModel.from_pretrained(backbone(restored.config, 10), str(tmp_path / "out")))
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(saved) == set(ours) and all(torch.equal(saved[n], ours[n]) for n in ours)  # as peft would have saved it


@pytest.mark.slow
def test_onnxruntime_reads_any_number_of_pictures(left, tmp_path, pictures):
    for part in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(part, reason=f"{part} is not installed: pip install '.[onnx]'")
    import onnx
    import onnxruntime

    run = left("lora_patch")
    record = export(run, tmp_path / "out", "onnx", verify=True)
    assert record["difference"] < 1e-5 * record["largest"]
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    for n in (1, 7, 20):
        answer = session.run(["logits"], {"images": pictures[:n].numpy()})[0]
        close(torch.from_numpy(answer), logits(restore(run), pictures[:n]))
    told = {p.key: json.loads(p.value) for p in onnx.load(tmp_path / "out" / "model.onnx").metadata_props}
    assert told["classes"] == list(CLASSES) and told["start"] == "keyed" and len(told["fingerprint"]) == 16


def test_without_the_extra_onnx_names_it(left, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ExportError, match=r"onnx.*pip install 'veilora\[onnx\]'"):
        export(left("melo"), tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("method", "base"), [("full", False), ("linear", False), ("lora_patch", True)])
def test_what_no_adapter_can_hold_is_refused_for_peft(method, base, left, tmp_path):
    with pytest.raises(ExportError, match="merged model"):
        export(left(method, base=base), tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "start"), [("timm", "keyed"), ("peft", "keyed"), ("timm", "public"), ("peft", "public")])
def test_an_export_holds_the_fingerprint_but_no_key_and_no_path(kind, start, left, tmp_path, key):
    export(left("lora_patch", f"start={start}"), tmp_path / "out", kind)
    written = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    secret, order = bytes(range(32)), key.permutation("image pixel_shuffle", 192)
    needles = [secret, secret.hex().encode(), order.numpy().tobytes(), order.int().numpy().tobytes(), str(tmp_path).encode(), PLACE.encode()]
    assert not [name for name, content in written.items() for needle in needles if needle in content]
    assert key.fingerprint.encode() in written["README.md"]


@pytest.mark.parametrize(("change", "reads", "says"), [
    ("start=keyed", "plain", "reads plain pictures as the federation's reads encrypted ones"),
    ("start=public", "encrypted", "gives the key away, to whoever holds both"),
    ("start=public cipher=plain", "plain", "trained on plain pictures"),
])
def test_a_card_says_which_pictures_the_model_reads(change, reads, says, left, tmp_path):
    record = export(left("lora_patch", change), tmp_path / "out", "timm")
    text = (tmp_path / "out" / "README.md").read_text()
    assert record["reads"] == reads and says in text and ("then encrypted with the key" in text) == (reads == "encrypted")
    head = yaml.safe_load(text.split("---")[1])
    assert head["library_name"] == "timm" and head["license"] == "apache-2.0" and "50.00% on test images" in text


def test_a_folder_that_is_no_run_or_damaged_is_one_line(left, tmp_path):
    run = left("melo")
    whole = (run / "adapter.safetensors").read_bytes()
    for content in (whole[:-7], whole[:4], b""):
        (run / "adapter.safetensors").write_bytes(content)
        refused(run, tmp_path, "adapter.safetensors must be a run's adapter")
    (run / "adapter.safetensors").write_bytes(whole)
    for name, content, says in (
        ("summary.json", "{", "summary.json must be a JSON object"),
        ("classes.json", '["one"]', "must list the names of 10 classes"),
        ("config.yaml", "seed: [", "must be the config of a run"),
        ("config.yaml", "- 1", "must be the config of a run"),
        ("config.yaml", "seed: 0", "it does not say start"),
        ("config.yaml", (run / "config.yaml").read_text() + "later: 1\n", "later: Extra inputs are not permitted"),
    ):
        kept = (run / name).read_text()
        (run / name).write_text(content)
        refused(run, tmp_path, says)
        (run / name).write_text(kept)
    (run / "summary.json").unlink()
    refused(run, tmp_path, "without summary.json")
    (run / "sealed.safetensors").touch()
    refused(run, tmp_path, "is with its clients")


def test_a_setting_that_came_after_the_run_has_its_default(left):
    run = left("melo")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text("".join(line for line in text.splitlines(True) if not line.startswith(("personal:", "keep:"))))
    assert restore(run).config == load(f"{VIT} method=melo method.rank=4 key={PLACE}/key")


def test_a_folder_that_names_a_builder_of_others_is_refused(left, tmp_path):
    run = left("melo")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("fl.models.vit.vit", "os.system"))
    refused(run, tmp_path, "must be the config of a run (model must name a builder of conf/model in _target_, got 'os.system'")


@pytest.mark.parametrize("target", ["os.system", "fl.keys.read", "fl.models.melo.melo", None])
def test_an_export_that_names_a_cipher_of_others_is_refused(tmp_path, target):
    told = {"kind": "timm", "image": 32, "block": 8, "cipher": {"_target_": target}, "start": "keyed", "fingerprint": "", "classes": ["a"]}
    (tmp_path / READING).write_text(json.dumps(told))
    with pytest.raises(ExportError, match="must name a cipher of conf/cipher"):
        reading(tmp_path)
    (tmp_path / READING).write_text(json.dumps(told | {"cipher": {"_target_": "fl.ciphers.plain.plain"}}))
    assert reading(tmp_path).cipher == {"_target_": "fl.ciphers.plain.plain"}


def test_another_backbone_is_refused_by_shape_and_by_digest(left, tmp_path):
    run = left("lora_patch")
    text, summary = (run / "config.yaml").read_text(), json.loads((run / "summary.json").read_text())
    (run / "config.yaml").write_text(text.replace("embed_dim: 32", "embed_dim: 48"))
    refused(run, tmp_path, "does not fit its backbone")
    (run / "config.yaml").write_text(text)
    (run / "summary.json").write_text(json.dumps(summary | {"backbone": "0" * 16}))
    refused(run, tmp_path, "the backbone must be the one of the run (0000000000000000)")


def test_an_export_that_computes_something_else_is_not_written(left, tmp_path, monkeypatch):
    run = left("lora_patch")
    monkeypatch.setattr("fl.export.merged._layer", lambda adapted: nn.Linear(32, 96))
    with pytest.raises(ExportError, match="its logits differ by .*; nothing was written"):
        export(run, tmp_path / "out", "timm", verify=True)
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


def test_nothing_is_written_over(left, tmp_path):
    run = left("melo")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    refused(run, tmp_path, "needs a new folder")


def refused(run: Path, tmp_path: Path, says: str) -> None:
    with pytest.raises(ExportError) as caught:
        export(run, tmp_path / "out", "timm")
    assert says in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


@pytest.mark.slow
def test_a_real_vit_tiny_is_exported_exactly_on_real_pictures(shared, tmp_path):
    """ViT-Tiny trained for a round on CIFAR-10; timm, peft and onnxruntime answer to its test pictures as the run's model does."""
    weights = sorted((shared / "weights").glob("vit_tiny*.safetensors"))
    if not weights or not (shared / "data" / "unpack_cifar10.py").is_file():
        pytest.skip(f"no ViT-Tiny weights or no CIFAR-10 in {shared}")
    theirs = pytest.importorskip("peft", reason="peft, the oracle of this test, is not installed")
    subprocess.run([sys.executable, shared / "data" / "unpack_cifar10.py", tmp_path / "data"], check=True, capture_output=True)
    keys.create(tmp_path / "key")
    places = f"key={tmp_path}/key output={tmp_path} state={tmp_path}/state data.root={tmp_path}/data model.weights={weights[0]}"
    config = load(f"experiment=cifar10/small clients=2 rounds=1 evaluate_every=1 data.train=128 data.test=100 personal=false {places}")
    loop.run(config, Journal(config, "cifar"))
    restored, out = restore(tmp_path / "cifar"), {kind: tmp_path / kind for kind in ("timm", "peft")}
    test: Examples = cifar10(64, str(tmp_path / "data"), test=100).test
    images = resize(test.images, 64)
    expected = logits(restored, images)
    for kind, folder in out.items():
        record = export(tmp_path / "cifar", folder, kind, verify=True)
        assert record["difference"] < 1e-5 * record["largest"], record
    asked = {"num_classes": 10, "img_size": 64, "patch_size": 16}
    base = timm.create_model(config.model["name"], True, pretrained_cfg_overlay={"file": str(weights[0]), "custom_load": False}, **asked)
    close(forward(timm.create_model(f"local-dir:{out['timm']}", pretrained=True).eval())(images), expected)
    close(forward(theirs.PeftModel.from_pretrained(base, str(out["peft"])).eval())(images), expected)
    assert float((expected.argmax(-1) == test.labels).float().mean()) > 0.2  # it has learnt something to lose
    # In float64 arithmetic what is left is what the export itself rounds: 1e-5 of a logit, and not of the largest
    x = images.double() / 127.5 - 1
    with torch.no_grad():
        exact, merged = (model.eval().double()(x) for model in (restored.model, timm.create_model(f"local-dir:{out['timm']}", pretrained=True)))
    assert float((merged - exact).abs().max()) < 1e-5
