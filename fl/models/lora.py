"""LoRA on the query and value parts of timm's fused ``qkv`` (Hu et al., arXiv 2106.09685; MeLo, arXiv 2311.08236).

    q = W_q x + s * B_q A_q x        k = W_k x        v = W_v x + s * B_v A_v x        s = alpha / rank

A is (rank, d), from the Kaiming-uniform draw of a linear layer; B is (d, rank) and starts at zero, so that the function
is unchanged at first. The frozen ``qkv.weight`` keeps its name; the factors are ``qkv.{q,v}.lora_{a,b}.weight``. A client's
own rank may be less than the method's; its s is that of the method all the same.
"""

from __future__ import annotations

from typing import Callable, Iterable, Mapping

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import linear

from fl.adapter import Adapter, group
from fl.base import modules, names
from fl.models import WeightsError
from fl.randomness import generator


class LowRank(nn.Module):
    """x (..., d) -> s * B A x (..., d)."""

    def __init__(self, d: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.lora_a = nn.Linear(d, rank, bias=False)
        self.lora_b = nn.Linear(rank, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.lora_b(self.lora_a(x))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (rank, d) and B (d, rank): the path is ``scale`` * B A."""
        return self.lora_a.weight, self.lora_b.weight


class LoRAqv(nn.Module):
    """timm's ``qkv`` linear layer, x (..., d) -> (..., 3 d), with low-rank paths beside q and v.

    A path is a module with a ``scale`` and ``factors()``: A (r, d) and B (d, r), of which it is scale * B A.
    """

    def __init__(self, qkv: nn.Linear, q: nn.Module, v: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = qkv.weight, qkv.bias
        self.q, self.v = q, v
        self.pristine: dict[str, Tensor] = {}  # rows of the weight as they came, of the parts that `rebase` has changed

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = linear(x, self.weight, self.bias).chunk(3, dim=-1)
        return torch.cat([q + self.q(x), k, v + self.v(x)], dim=-1)


def attach(model: nn.Module, rank: int, alpha: float, seed: int) -> None:
    """Put LoRA into every block of a timm ViT; each A is drawn from (seed, its own name). Raises WeightsError if none fits."""
    beside(model, lambda d, *place: first_draw(LowRank(d, rank, alpha), generator(seed, "lora", *place)))


def beside(model: nn.Module, path: Callable[[int, str, str], nn.Module]) -> None:
    """Put ``path(d, layer, "q" or "v")`` beside q and v in every block of a timm ViT. Raises WeightsError if there is none."""
    layers = [(n, m) for n, m in model.named_modules() if n.endswith("attn.qkv") and isinstance(m, nn.Linear)]
    if not layers:
        raise WeightsError("LoRA needs a model whose blocks have a fused attn.qkv; choose one of timm's vit_* models")
    for name, layer in layers:
        adapted = LoRAqv(layer, *(path(layer.in_features, name, part) for part in "qv"))
        model.get_submodule(name.rpartition(".")[0]).qkv = adapted.to(layer.weight.device)


@torch.no_grad()
def first_draw(path: nn.Module, stream: Generator) -> nn.Module:
    """``path`` with A from ``stream``, Kaiming-uniform with a = sqrt(5), and B = 0."""
    bound = path.lora_a.in_features**-0.5
    path.lora_a.weight.uniform_(-bound, bound, generator=stream)
    path.lora_b.weight.zero_()
    return path


def rebase(model: nn.Module, change: Adapter) -> None:
    """Let the frozen weights below LoRA be the pristine ones and s times ``change`` (`fl.base`), whatever they were before.

    W_q <- W_q + s B A, or W_q + s D where the change is dense; without a change, the pristine ones again. Nothing adds up in
    place, so the clients that share a model can take turns. Raises WeightsError for a change of what has no LoRA.
    """
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, LoRAqv)]
    paths = {f"{n}.{part}": (layer, at, part) for n, layer in layers for at, part in ((0, "q"), (2, "v"))}
    strangers = sorted(set(modules(change)) - set(paths))
    if strangers:
        raise WeightsError(f"a change of the base must be of modules with LoRA, got {strangers[0][:60]}; run one config on both sides")
    for module, (layer, at, part) in paths.items():
        a, b, dense = names(module)
        d, scale = layer.weight.shape[1], getattr(layer, part).scale
        rows = layer.weight.detach()[at * d : (at + 1) * d]
        if part in layer.pristine:
            rows.copy_(layer.pristine.pop(part))
        if a in change or dense in change:
            layer.pristine[part] = rows.clone()
        if a in change:
            rows.addmm_(change[b].to(rows), change[a].to(rows), alpha=scale)
        elif dense in change:
            rows.add_(change[dense].to(rows), alpha=scale)


def take_rank(model: nn.Module, adapter: Mapping[str, Tensor]) -> None:
    """Give LoRA in every place of ``model`` the rank that its factors have in ``adapter``, which is then to be written.

    A path whose rank changes gets new parameters without values; its scale stays, so that products mean the same to all.
    """
    for name, path in model.named_modules():
        factors = [f"{name}.lora_{x}.weight" for x in "ab"]
        if not isinstance(path, LowRank) or not set(factors) <= set(adapter):
            continue
        for layer, factor in zip((path.lora_a, path.lora_b), factors):
            old, shape = layer.weight, adapter[factor].shape
            if old.shape != shape:
                layer.weight = nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad)
                layer.out_features, layer.in_features = shape


def train_only(model: nn.Module, groups: Iterable[str]) -> None:
    """Let exactly the parameters of these groups (`fl.adapter.group`) train."""
    wanted = set(groups)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(group(name) in wanted)
