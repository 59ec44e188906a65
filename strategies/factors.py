"""The algebra of LoRA's factors on the server, module by module, that several strategies share.

A module adds s B A to a frozen weight, with A (r, d_in), B (d_out, r). A client's rank may be less than r, its scale is
s = alpha / r all the same: s stands before every product below, cancels, and is left out.

    stack    sum_k p_k B_k A_k = L R        L = [B_1 ... B_K]   R = [p_1 A_1; ...; p_K A_K]   (p_k on one side alone)
    svd      L = Q_l T_l,  R^T = Q_r T_r,  T_l T_r^T = u S v^T   =>   L R = (Q_l u) S (Q_r v)^T
    split    B = U_r S_r,  A = V_r^T: the best rank-r approximation, A with orthonormal rows
    at_rank  cut: [B_1 B_2] [A_1; A_2] -> B_1 A_1, of `split` the best of its rank    widen: [B 0] [A; 0] = B A

Only thin matrices are factored and the d_out x d_in product is never formed: K r columns instead of d. In float64 within.
"""

from __future__ import annotations

from typing import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fl.adapter import GROUPS, Adapter, Group, group, mean, move
from fl.config import ConfigError
from fl.recipe import Recipe
from strategies import State, Strategy, Update

AXIS = {"lora_a": 0, "lora_b": 1}  # along which a factor counts the rank


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """The names of A and B of every module, in the order of ``names``. Raises ConfigError for none, and for B R A."""
    names = list(names)
    found = [(name, name.replace("lora_a", "lora_b")) for name in names if group(name) == "lora_a"]
    if not found or any(group(name) == "lora_r" for name in names):
        raise ConfigError("this strategy needs LoRA factors B A that train; choose method=lora_patch, method=melo or strategy=fedavg")
    return found


def required(adapter: Adapter) -> Adapter:
    """``adapter`` itself, as a strategy's ``init``: what has no factors is refused before anybody trains."""
    pairs(adapter)
    return adapter


def together_only(recipe: Recipe, init: Callable[[Adapter], State] = required) -> Callable[[Adapter], State]:
    """``init`` of who makes products of the factors that clients send: a ``recipe`` that keeps a half at home is refused, too."""

    def checked(adapter: Adapter) -> State:
        first = init(adapter)
        if still := [g for g in recipe.keep if g in (*AXIS, "lora_r")]:
            raise ConfigError(
                f"this strategy makes products of the clients' factors, so recipe.keep must leave them out, got {', '.join(still)}; "
                "use strategy=fedsa_lora or strategy=fedavg"
            )
        return first

    return checked


def folded(adapter: Adapter) -> Adapter:
    """``adapter`` with every R multiplied into its A: of B R A (`fl.models.lora_sb`) factors B A; itself where there is no R."""
    cores = {n: n.replace("lora_r", "lora_a") for n in adapter if group(n) == "lora_r"}
    kept = {n: t for n, t in adapter.items() if n not in cores}
    return kept | {a: adapter[r] @ adapter[a] for r, a in cores.items() if a in kept} if cores else adapter


def all_but(*still: Group) -> tuple[Group, ...]:
    """A recipe's ``groups`` when some are to stay as they are."""
    return tuple(g for g in GROUPS if g not in still)


def rank_of(adapter: Adapter) -> int | None:
    """The rank of the factors in ``adapter``, which may hold one half of them; None where there are none."""
    return next((t.shape[AXIS[group(n)]] for n, t in adapter.items() if group(n) in AXIS), None)


def at_rank(adapter: Adapter, rank: int | None) -> Adapter:
    """``adapter`` with factors of this ``rank``: rows of A and columns of B past it are cut, missing ones are zero.

    It is itself where nothing changes, and for None.
    """
    if rank is None or rank_of(adapter) in (rank, None):
        return adapter
    missing = {"lora_a": lambda t: (0, 0, 0, rank - len(t)), "lora_b": lambda t: (0, rank - t.shape[1])}
    return {n: pad(t, missing[group(n)](t)) if group(n) in missing else t for n, t in adapter.items()}


def widened(state: Adapter, updates: Iterable[Update]) -> Iterator[Update]:
    """Each update as one of the rank of ``state``, which its client received cut: ``state`` plus it is [B_k 0] [A_k; 0]."""
    for u in updates:
        sent, rank = rank_of(u.adapter), rank_of(state)
        if sent != rank:
            unseen = {n: at_rank(at_rank({n: state[n]}, sent), rank)[n] - state[n] for n in u.adapter}
            u = u._replace(adapter=move(at_rank(u.adapter, rank), unseen))
        yield u


def mixed(strategy: Strategy, wide: bool = True) -> Strategy:
    """``strategy``, whose state is an adapter, for clients of different ranks: each gets the first rows of A and columns of B.

    Updates come to it `widened`, unless it is to see them as they are.
    """

    def ask(state, round, client):
        recipe, given = strategy.ask(state, round, client)
        return recipe, at_rank(given, client.rank)

    def apply(state, round, updates):
        return strategy.apply(state, round, widened(state, updates))

    return strategy._replace(ask=ask, apply=apply if wide else strategy.apply, ranks=True)


def together(state: Adapter, updates: Iterable[Update]) -> tuple[dict[str, Tensor], list[Adapter], list[int]]:
    """For who needs all factors at once: the mean of everything, each client's adapter, and the examples that weigh it."""
    updates = list(updates)
    weights = [u.examples for u in updates]
    return dict(move(state, mean([u.adapter for u in updates], weights))), [move(state, u.adapter) for u in updates], weights


def stack(trained: Sequence[Adapter], weights: Sequence[float], a: str, b: str) -> tuple[Tensor, Tensor]:
    """L (d_out, K r) and R (K r, d_in) whose product is the weighted mean of the clients' products, of whatever ranks."""
    share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    rows = share.repeat_interleave(torch.tensor([len(t[a]) for t in trained]))[:, None]
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
