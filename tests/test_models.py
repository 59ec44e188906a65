"""Backbones and what adapts them: exactly what trains, exactly how it counts, and a way out when weights are missing."""

from __future__ import annotations

import pickle
from urllib.error import URLError

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from fl.adapter import average, count, digest, group, read, write
from fl.config import CONF
from fl.learn import normalise
from fl.models import WeightsError, demo, fold
from fl.models.full import full
from fl.models.linear import linear
from fl.models.lora import attach
from fl.models.lora_patch import lora_patch
from fl.models.lora_sb import lora_sb
from fl.models.melo import melo
from fl.models.ravan import ravan
from fl.models.vit import vit
from fl.randomness import generator
from fl.recipe import Recipe

FACTORS = {f"blocks.{i}.attn.qkv.{part}.lora_{x}.weight" for i in (0, 1) for part in "qv" for x in "ab"}
HEAD = {"head.weight", "head.bias"}
PATCH = {"patch_embed.proj.weight", "patch_embed.proj.bias"}
CORES = {f"blocks.{i}.attn.qkv.{part}.lora_r.weight" for i in (0, 1) for part in "qv"}
SCALES = {name.replace("weight", "scale") for name in CORES}
METHODS = {"lora_sb": lora_sb(2, 3.0), "ravan": ravan(2, 3), "lora_patch": lora_patch(2, 3.0), "melo": melo(2, 3.0), "linear": linear(), "full": full()}


@pytest.fixture
def pictures() -> torch.Tensor:
    images = torch.randint(0, 256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return normalise(images)


def fill(model: torch.nn.Module, *wanted: str) -> torch.nn.Module:
    """Random values for the parameters whose group is wanted, so that what starts at zero has an effect."""
    for name, parameter in model.named_parameters():
        if group(name) in wanted:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator(9, name))
    return model


def test_there_is_a_method_here_for_every_yaml():
    assert set(METHODS) == {p.stem for p in (CONF / "method").glob("*.yaml")}


@pytest.mark.parametrize(
    ("name", "trains"),
    [("lora_sb", FACTORS | CORES | PATCH | HEAD), ("ravan", CORES | SCALES | PATCH | HEAD), ("lora_patch", FACTORS | PATCH | HEAD), ("melo", FACTORS | HEAD), ("linear", HEAD), ("full", None)],
)
def test_what_trains_is_exactly_what_the_method_says(name, trains, tiny):
    model = tiny(METHODS[name])
    assert set(read(model)) == (trains or set(dict(tiny().named_parameters())))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_leaves_function_and_frozen_weights_as_they_were(name, tiny, pictures):
    plain, adapted = fill(tiny(), "head"), fill(tiny(METHODS[name]), "head")
    assert torch.equal(adapted(pictures), plain(pictures)) and plain(pictures).std() > 0.01
    public = plain.state_dict()
    assert set(public) == set(adapted.state_dict()) - FACTORS - CORES - SCALES
    assert digest({n: t for n, t in adapted.state_dict().items() if n in public}) == digest(public)


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8.0), (4, 1.0), (3, 2.0)])
def test_lora_adds_alpha_over_rank_times_ba_to_q_and_v_alone(rank, alpha, tiny, pictures):
    adapted = fill(tiny(melo(rank, alpha)), "head", "lora_b")
    merged = fill(tiny(), "head")
    for block, source in zip(merged.blocks, adapted.blocks):
        d = source.attn.qkv.weight.shape[1]
        for rows, path in ((slice(0, d), source.attn.qkv.q), (slice(2 * d, 3 * d), source.attn.qkv.v)):
            block.attn.qkv.weight.data[rows] += (alpha / rank) * path.lora_b.weight @ path.lora_a.weight
    torch.testing.assert_close(adapted(pictures), merged(pictures), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapted(pictures), fill(tiny(), "head")(pictures), atol=1e-3)


def test_loras_first_draw_is_a_function_of_seed_and_place(tiny):
    one, again, other = (read(tiny(melo(2), seed=s)) for s in (0, 0, 1))
    assert digest(one) == digest(again) != digest(other)
    draws = [t for n, t in one.items() if group(n) == "lora_a"]
    assert len({digest({"": t}) for t in draws}) == len(draws) == 4  # no two places share a draw
    bound = 16**-0.5
    assert max(float(t.abs().max()) for t in draws) <= bound < 1.3 * max(float(t.abs().max()) for t in draws)
    assert all(not t.any() for n, t in one.items() if group(n) in ("lora_b", "head"))


def paths(model) -> list[torch.nn.Module]:
    return [path for block in model.blocks for path in (block.attn.qkv.q, block.attn.qkv.v)]


def test_a_core_of_lora_sb_stands_between_the_factors(tiny, pictures):
    """B R A with any R is LoRA with R A in the place of A; and with R = 1, as it starts, LoRA."""
    cored, lora = fill(tiny(lora_sb(3, 2.0)), "head", "lora_b"), fill(tiny(lora_patch(3, 2.0)), "head", "lora_b")
    torch.testing.assert_close(cored(pictures), lora(pictures), rtol=1e-5, atol=1e-6)
    fill(cored, "lora_r")
    for one, other in zip(paths(cored), paths(lora)):
        other.lora_a.weight.data = one.lora_r.weight.data @ one.lora_a.weight.data
    torch.testing.assert_close(cored(pictures), lora(pictures), rtol=1e-5, atol=1e-6)


def test_ravans_heads_are_orthonormal_frames_that_follow_from_seed_and_place(tiny):
    one, again, other = (paths(tiny(ravan(2, 3), seed=s)) for s in (0, 0, 1))
    for path, same in zip(one, again):
        torch.testing.assert_close(path.a @ path.a.T, torch.eye(6))
        torch.testing.assert_close(path.b.T @ path.b, torch.eye(6))
        assert torch.equal(path.a, same.a) and torch.equal(path.b, same.b)
    assert len({digest({"": t}) for path in one + other for t in (path.a, path.b)}) == 16
    with pytest.raises(WeightsError, match="heads . rank must be at most the model's width 16, got 20"):
        tiny(ravan(4, 5))


def test_ravan_is_its_formula_and_learns_from_zero(tiny, pictures):
    model = tiny(ravan(2, 3))
    fill(model, "head")(pictures).square().sum().backward()
    assert all(path.lora_r["weight"].grad.abs().max() > 0 for path in paths(model)[2:])
    fill(model, "lora_r")
    for path in paths(model):
        a, b = path.factors()
        a_i, b_i = path.a.split(3), path.b.split(3, dim=1)
        formula = sum(s * bi @ h @ ai for s, h, ai, bi in zip(path.lora_r["scale"], path.lora_r["weight"], a_i, b_i))
        torch.testing.assert_close(b @ a, formula)


def test_a_mean_of_folded_ravan_clients_is_the_mean_of_their_products(tiny, pictures):
    model, clients, weights = tiny(ravan(2, 3)), [], (1, 5, 3)
    dense = [torch.zeros(16, 16) for _ in paths(model)]
    for k, weight in enumerate(weights):
        for name, parameter in model.named_parameters():
            if group(name) in ("lora_r", "head"):
                torch.nn.init.normal_(parameter, std=0.5, generator=generator(k, name))
        for total, path in zip(dense, paths(model)):
            a, b = path.factors()
            total += weight / sum(weights) * (b @ a).detach()
        before = model(pictures)
        fold(model)
        torch.testing.assert_close(model(pictures), before, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(path.lora_r["scale"], torch.ones(2)) for path in paths(model))
        clients.append(read(model))
    write(model, average(zip(clients, weights)))
    for total, path in zip(dense, paths(model)):
        a, b = path.factors()
        assert float((b @ a - total).detach().norm() / total.norm()) < 1e-6


def test_lora_that_finds_no_place_is_refused():
    with pytest.raises(WeightsError, match="qkv"):
        attach(torch.nn.Sequential(torch.nn.Linear(2, 2)), 2, 2.0, 0)


def test_a_transformer_whose_attention_would_pass_lora_by_is_refused():
    with pytest.raises(WeightsError, match="vit_"):  # BEiT reads qkv.weight and never calls qkv: LoRA would have no effect
        melo(2)(vit("beit_base_patch16_224", 32, 16, 3, "none", embed_dim=24, depth=1, num_heads=2), 0)


@pytest.mark.slow
def test_lora_equals_peft_of_twice_the_rank_on_the_fused_layer(tiny, pictures):
    peft = pytest.importorskip("peft", reason="peft, the oracle of this test, is not installed")
    own = fill(tiny(melo(2, 3.0)), "head", "lora_b")
    config = peft.LoraConfig(r=4, lora_alpha=6.0, target_modules=["qkv"], lora_dropout=0.0, bias="none")
    theirs = peft.inject_adapter_in_model(config, fill(tiny(), "head"))
    for block, source in zip(theirs.blocks, own.blocks):
        q, v, d = source.attn.qkv.q, source.attn.qkv.v, 16
        block.attn.qkv.lora_A["default"].weight.data = torch.cat([q.lora_a.weight.data, v.lora_a.weight.data])
        b = torch.zeros(3 * d, 4)
        b[:d, :2], b[2 * d :, 2:] = q.lora_b.weight.data, v.lora_b.weight.data
        block.attn.qkv.lora_B["default"].weight.data = b
    torch.testing.assert_close(own(pictures), theirs(pictures), rtol=1e-5, atol=1e-6)
    own(pictures).square().sum().backward()
    theirs(pictures).square().sum().backward()
    for block, source in zip(theirs.blocks, own.blocks):
        q, v = source.attn.qkv.q, source.attn.qkv.v
        a, b = block.attn.qkv.lora_A["default"].weight.grad, block.attn.qkv.lora_B["default"].weight.grad
        torch.testing.assert_close(torch.cat([q.lora_a.weight.grad, v.lora_a.weight.grad]), a, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(q.lora_b.weight.grad, b[:16, :2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(v.lora_b.weight.grad, b[32:, 2:], rtol=1e-4, atol=1e-5)
        assert a.abs().max() > 1e-3 and b.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("method", "classes", "parameters"),
    [(melo(4), 10, 155_146), (lora_patch(4), 10, 745_738), (lora_sb(16), 10, 1_194_250), (ravan(4, 39), 10, 744_394), (full(), 1000, 86_567_656), (linear(), 10, 7_690)],
)
def test_the_parameters_of_vit_base_count_as_in_the_paper(method, classes, parameters, monkeypatch):
    monkeypatch.setattr("fl.models.lora.LoRAqv.to", lambda self, device: self)  # the factors stay where they can be drawn
    with torch.device("meta"):
        model = vit("vit_base_patch16_224.augreg_in1k", 224, 16, classes, "none")
    method(model, 0)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters


def test_building_a_model_leaves_the_global_generator_alone_and_starts_the_head_at_zero(tiny):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, again = tiny(classes=7), tiny(classes=7)
    assert torch.equal(torch.get_rng_state(), before)
    assert digest(one.state_dict()) == digest(again.state_dict())
    assert one.head.weight.shape == (7, 16) and not one.head.weight.any() and not one.head.bias.any()
    assert one.blocks[0].attn.qkv.weight.std() > 0.01


@pytest.fixture
def trained(tiny, tmp_path):
    """A model unlike the fresh one, and its weights as a safetensors and as a torch file."""
    model = fill(tiny(), "backbone", "patch_embed", "head")
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    return model


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_weights_come_from_a_safetensors_or_a_torch_file(kind, trained, tiny, tmp_path):
    read_back = tiny(weights=str(tmp_path / f"weights.{kind}"))
    body = {n: t for n, t in trained.state_dict().items() if n not in HEAD}
    assert digest({n: t for n, t in read_back.state_dict().items() if n not in HEAD}) == digest(body)
    assert not read_back.head.weight.any()  # the head is always fresh


@pytest.mark.parametrize(("image", "patch"), [(32, 8), (16, 4), (32, 16)])
def test_other_sizes_resample_the_position_and_patch_embeddings_alone(image, patch, trained, tiny, tmp_path):
    there = tiny(image=image, patch=patch, weights=str(tmp_path / "weights.safetensors"))
    side = image // patch
    torch.testing.assert_close(there.pos_embed, resample_abs_pos_embed(trained.pos_embed, [side, side]))
    assert there.pos_embed.shape == (1, 1 + side * side, 16) and there.patch_embed.proj.weight.shape == (16, 3, patch, patch)
    if patch == 8:
        assert torch.equal(there.patch_embed.proj.weight, trained.patch_embed.proj.weight)
    else:
        fresh = tiny(image=image, patch=patch).patch_embed.proj.weight
        assert there.patch_embed.proj.weight.std() > 2 * fresh.std() > 0  # the file's, spread by 0.2, and not the draw
    assert torch.equal(there.blocks[1].mlp.fc1.weight, trained.blocks[1].mlp.fc1.weight)
    assert there(torch.zeros(1, 3, image, image)).shape == (1, 3)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_a_weights_file_runs_no_code(kind, tiny, tmp_path):
    file, sprung = tmp_path / "weights.pth", tmp_path / "sprung"
    if kind == "torch":
        torch.save({"state_dict": Trap(sprung)}, file)
    else:
        file.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(WeightsError):
        tiny(weights=str(file))
    assert not sprung.exists()


def one_line(caught, *says: str) -> None:
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in says), str(caught.value)


def test_missing_weights_are_one_line_that_names_the_setting(tiny, tmp_path):
    with pytest.raises(WeightsError) as caught:
        tiny(weights=str(tmp_path / "nowhere.safetensors"))
    one_line(caught, "nowhere.safetensors is missing", "set model.weights to a local file")


def test_a_hub_without_a_network_is_one_line_that_names_the_local_file(tiny, monkeypatch):
    def offline(*_, **__):
        raise URLError("Name or service not known\nand more")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(WeightsError) as caught:
        tiny(weights="hub")
    one_line(caught, "could not be downloaded", "set model.weights to a local safetensors or torch file")


def test_weights_of_another_shape_say_which_tensor_does_not_fit(trained, tiny, tmp_path):
    with pytest.raises(WeightsError) as caught:
        tiny(weights=str(tmp_path / "weights.safetensors"), embed_dim=32)
    one_line(caught, "weights.safetensors", "size mismatch")


def test_what_is_no_plain_vision_transformer_is_refused():
    with pytest.raises(WeightsError, match="resnet18"):
        vit("resnet18", 32, 8, 3, "none")
    with pytest.raises(WeightsError, match="no_such_model"):
        vit("no_such_model", 32, 8, 3, "none")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(demo, "PICTURES", 40)
    monkeypatch.setattr(demo, "RECIPE", Recipe(lr={"backbone": 1e-3, "patch_embed": 1e-3, "head": 1e-3}, batch=20))


@pytest.mark.parametrize("image", [32, 16])
def test_the_demo_backbone_is_made_once_and_kept(image, quick, tmp_path, monkeypatch):
    first = demo.demo_vit(image, 8, 3, str(tmp_path / "cache"))
    (file,) = (tmp_path / "cache").iterdir()
    stamp = file.stat().st_mtime_ns, file.read_bytes()
    monkeypatch.setattr(demo, "pretrain", lambda *_: pytest.fail("it was there already"))
    again = demo.demo_vit(image, 8, 5, str(tmp_path / "cache"))
    assert (file.stat().st_mtime_ns, file.read_bytes()) == stamp
    body = [n for n in first.state_dict() if n not in HEAD]
    assert digest({n: first.state_dict()[n] for n in body}) == digest({n: again.state_dict()[n] for n in body})
    assert count(dict(first.named_parameters())) > 100_000 and again.head.weight.shape[0] == 5


def test_the_demo_backbone_is_the_same_wherever_it_is_made(quick, tmp_path):
    for place in ("a", "b"):
        demo.pretrain(tmp_path / place / "weights.safetensors", 32, 8)
    one, other = ((tmp_path / place / "weights.safetensors").read_bytes() for place in ("a", "b"))
    assert one == other


def test_the_demo_backbone_without_weights_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert demo.demo_vit(16, 8, 3, "none").head.weight.shape[0] == 3
    with pytest.raises(WeightsError, match="must be one, or none, got hub"):
        demo.demo_vit(16, 8, 3, "hub")
    assert not list(tmp_path.iterdir())


class Bomb:
    """What runs a command when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.file}",)


def test_a_weights_file_that_is_a_program_is_not_run(tmp_path):
    torch.save({"head.weight": Bomb(tmp_path / "ran")}, tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match="could not be built with weights=.*weights_only=True blocked"):
        vit("vit_tiny_patch16_224", 16, 8, 3, str(tmp_path / "weights.pt"), embed_dim=16, depth=1, num_heads=2)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "weights.pt", weights_only=False)  # as it would have been
    assert (tmp_path / "ran").exists()
