"""The algebra of LoRA's factors on the server, module by module, that several strategies share.

A module adds s B A to a frozen weight, with A (r, d_in), B (d_out, r). Ranks are equal on all clients, and so is the scale
s = alpha / r: it stands before every product below, cancels, and is left out.

    stack    sum_k p_k B_k A_k = L R        L = [B_1 ... B_K]   R = [p_1 A_1; ...; p_K A_K]   (p_k on one side alone)
    svd      L = Q_l T_l,  R^T = Q_r T_r,  T_l T_r^T = u S v^T   =>   L R = (Q_l u) S (Q_r v)^T
    split    B = U_r S_r,  A = V_r^T: the best rank-r approximation, A with orthonormal rows

Only thin matrices are factored and the d_out x d_in product is never formed: K r columns instead of d. In float64 within.
"""

from __future__ import annotations

from typing import Iterable, Sequence

import torch
from torch import Tensor

from fl.adapter import GROUPS, Adapter, Group, group
from fl.config import ConfigError


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """The names of A and B of every module, in the order of ``names``. Raises ConfigError when there is none."""
    found = [(name, name.replace("lora_a", "lora_b")) for name in names if group(name) == "lora_a"]
    if not found:
        raise ConfigError("this strategy needs LoRA factors that train; choose method=lora_patch, method=melo or strategy=fedavg")
    return found


def required(adapter: Adapter) -> Adapter:
    """``adapter`` itself, as a strategy's ``init``: what has no factors is refused before anybody trains."""
    pairs(adapter)
    return adapter


def all_but(still: Group) -> tuple[Group, ...]:
    """A recipe's ``groups`` when one is to stay as it is."""
    return tuple(g for g in GROUPS if g != still)


def stack(trained: Sequence[Adapter], weights: Sequence[float], a: str, b: str) -> tuple[Tensor, Tensor]:
    """L (d_out, K r) and R (K r, d_in) whose product is the weighted mean of the clients' products."""
    share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    rows = share.repeat_interleave(len(trained[0][a]))[:, None]
    return torch.cat([t[b] for t in trained], dim=1).double(), rows * torch.cat([t[a] for t in trained]).double()


def core(left: Tensor, right: Tensor) -> Tensor:
    """T_l T_r^T of ``left @ right``: the small matrix in the middle, which has its norm and its singular values."""
    return _triangle(torch.geqrf(left).a) @ _triangle(torch.geqrf(right.T).a).T


def svd(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``left @ right`` the first ``rank`` columns of U, all of S, largest first, and the first ``rank`` rows of V^T.

    Q_l and Q_r stay products of reflectors, applied to the few columns that are wanted: half the work of forming them.
    """
    q_l, q_r = torch.geqrf(left), torch.geqrf(right.T)
    u, s, vt = torch.linalg.svd(_triangle(q_l.a) @ _triangle(q_r.a).T, full_matrices=False)
    return _rotated(*q_l, u[:, :rank]), s, _rotated(*q_r, vt[:rank].T).T


def _triangle(packed: Tensor) -> Tensor:
    """T of Q T, as LAPACK's geqrf packs it: Q's reflectors lie below it."""
    return packed[: min(packed.shape)].triu()


def _rotated(packed: Tensor, taus: Tensor, columns: Tensor) -> Tensor:
    """Q @ ``columns``."""
    padded = columns.new_zeros(len(packed), columns.shape[1])
    padded[: len(columns)] = columns
    return torch.ormqr(packed[:, : len(taus)], taus, padded)


def split(u: Tensor, s: Tensor, vt: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B of the product's best approximation of the rank to which `svd` was cut.

    Where the product has a lower rank, B's last columns are zero and A's last rows stay orthonormal, so that they can learn.
    """
    return vt.to(dtype), (u * s[: len(vt)]).to(dtype)


def orthonormal(adapter: Adapter) -> Adapter:
    """Every A^T = Q T replaced by Q^T, and its B by B T^T: the products stay, and where B = 0 it stays zero."""
    after = dict(adapter)
    for a, b in pairs(adapter):
        q, t = torch.linalg.qr(adapter[a].double().T)
        after[a], after[b] = q.T.to(adapter[a].dtype).contiguous(), (adapter[b].double() @ t.T).to(adapter[b].dtype)
    return after
