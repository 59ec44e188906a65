"""Strategies against numbers: the dense mean of products, a dense SVD, the papers' formulas by hand."""

from __future__ import annotations

from math import exp, log, sqrt

import pytest
import torch
from torch import Tensor

from fl.adapter import GROUPS, group, move, sub
from fl.config import ConfigError, build
from fl.recipe import Recipe
from strategies import ClientInfo, Strategy, Update, factors
from strategies.diagnostics import diagnose

RANK, WIDE, HIGH = 3, 17, 11  # A is (3, 17), B is (11, 3): not square, so that a transpose cannot hide
MODULES = [(f"blocks.{i}.attn.qkv.{part}.lora_a.weight", f"blocks.{i}.attn.qkv.{part}.lora_b.weight") for i in range(2) for part in "qv"]
COUNTS = (7, 1, 30, 12, 5)
RECIPE = Recipe(lr={})
EXACT = {"rtol": 1e-6, "atol": 1e-9}


def made(name: str, recipe: Recipe = RECIPE, **settings) -> Strategy:
    return build({"_target_": f"strategies.{name}.{name}"} | settings, recipe=recipe)


def drawn(seed: int, size: float = 1.0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Factors of four modules and a head."""
    stream = torch.Generator().manual_seed(seed)
    shapes = {name: shape for a, b in MODULES for name, shape in ((a, (RANK, WIDE)), (b, (HIGH, RANK)))} | {"head.weight": (5, HIGH)}
    return {name: size * torch.randn(shape, generator=stream, dtype=dtype) for name, shape in shapes.items()}


def answers(strategy: Strategy, state, round: int, counts=COUNTS, size: float = 0.5, ranks=None) -> tuple[list[Update], list[dict], list[float]]:
    """Random updates of what is asked in this round, the adapters that the clients then have, and their weights p."""
    updates, trained = [], []
    for client, examples in enumerate(counts):
        recipe, given = strategy.ask(state, round, ClientInfo(client, examples, rank=ranks and ranks[client]))
        whole = recipe.sent(drawn(100 * round + client + 1, size))
        part = {n: t[tuple(slice(d) for d in given[n].shape)] if n in given else t for n, t in whole.items()}
        updates.append(Update(client, part, examples, {"loss": 1.0, "steps": 3, "seconds": 0.1}))
        trained.append(move({**drawn(0), **given}, part))
    return updates, trained, [n / sum(counts) for n in counts]


def products(trained: list[dict], weights: list[float], a: str, b: str) -> Tensor:
    """sum_k p_k B_k A_k, dense."""
    return sum(p * t[b] @ t[a] for p, t in zip(weights, trained))


def best(product: Tensor, rank: int = RANK) -> Tensor:
    """The best approximation of this rank, by a dense SVD."""
    u, s, vt = torch.linalg.svd(product, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


def turned(update: dict, given: dict, seed: int) -> dict:
    """The same client with its factors in another frame: B Q and Q^T A, as an update."""
    after = dict(move(given, update))
    for i, (a, b) in enumerate(MODULES):
        q = torch.linalg.qr(torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(1000 * seed + i), dtype=torch.float64))[0]
        after[a], after[b] = q.T @ after[a], after[b] @ q
    return sub(after, given)


# Exactness ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ffa_lora", "rolora", "fedsvd"])
def test_a_mean_with_one_factor_in_common_is_the_mean_of_products(name):
    strategy = made(name)
    state = strategy.init(drawn(0))
    for round in (1, 2, 3):
        updates, trained, weights = answers(strategy, state, round)
        state = strategy.apply(state, round, iter(updates))
        after = strategy.view(state)
        for a, b in MODULES:
            torch.testing.assert_close(after[b] @ after[a], products(trained, weights, a, b), **EXACT)
        torch.testing.assert_close(after["head.weight"], sum(p * t["head.weight"] for p, t in zip(weights, trained)), **EXACT)


@pytest.mark.parametrize("local_head", [True, False])
def test_fedsa_averages_what_is_sent_and_leaves_the_rest(local_head):
    strategy = made("fedsa_lora", local_head=local_head)
    updates, _, weights = answers(strategy, drawn(0), 1)
    after = strategy.view(strategy.apply(drawn(0), 1, iter(updates)))
    still = {"lora_b"} | ({"head"} if local_head else set())
    for name, tensor in drawn(0).items():
        moved = 0 if group(name) in still else sum(p * u.adapter[name] for p, u in zip(weights, updates))
        torch.testing.assert_close(after[name], tensor + moved, **EXACT)


def test_fedavg_on_both_factors_is_not():
    strategy = made("fedavg")
    updates, trained, weights = answers(strategy, drawn(0), 1, size=1.0)
    after = strategy.apply(drawn(0), 1, updates)
    a, b = MODULES[0]
    assert float((after[b] @ after[a] - products(trained, weights, a, b)).norm() / products(trained, weights, a, b).norm()) > 0.1


@pytest.mark.parametrize("name", ["flexlora", "florist"])
def test_the_server_svd_equals_a_dense_one(name):
    strategy = made(name, **({"energy": 1.0} if name == "florist" else {}))
    updates, trained, weights = answers(strategy, strategy.init(drawn(0)), 1)
    after = strategy.view(strategy.apply(strategy.init(drawn(0)), 1, iter(updates)))
    for a, b in MODULES:
        torch.testing.assert_close(after[b] @ after[a], best(products(trained, weights, a, b)), **EXACT)
        torch.testing.assert_close(after[a] @ after[a].T, torch.eye(RANK, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("energy", [0.2, 0.5, 0.8, 0.95])
def test_florist_keeps_the_least_rank_that_holds_the_energy(energy):
    strategy = made("florist", energy=energy)
    updates, trained, weights = answers(strategy, drawn(0), 1)
    after = strategy.apply(drawn(0), 1, updates)
    for a, b in MODULES:
        product = products(trained, weights, a, b)
        s = torch.linalg.svdvals(product).square()
        needed = min(RANK, 1 + int((s.cumsum(0) < energy * s.sum()).sum()))
        assert int((after[b].norm(dim=0) > 0).sum()) == needed
        torch.testing.assert_close(after[b] @ after[a], best(product, needed), **EXACT)
        torch.testing.assert_close(after[a] @ after[a].T, torch.eye(RANK, dtype=torch.float64), **EXACT)  # so that it can learn


def test_a_product_of_lower_rank_leaves_axes_that_can_learn():
    start = {name: t * 0 if group(name) == "lora_b" else t for name, t in drawn(0).items()}
    nothing = {name: 0 * t for name, t in start.items()}
    for name in ("flexlora", "florist", "fedsvd"):
        strategy = made(name)
        part = {n: t for n, t in nothing.items() if name != "fedsvd" or group(n) != "lora_a"}
        after = strategy.view(strategy.apply(strategy.init(start), 1, [Update(0, part, 1, {})]))
        for a, b in MODULES:
            assert not after[b].any()
            torch.testing.assert_close(after[a] @ after[a].T, torch.eye(RANK, dtype=torch.float64), **EXACT)


def test_lora_fair_is_the_ridge_regression_of_its_formula():
    lam = 0.3
    strategy = made("lora_fair", lam=lam)
    updates, trained, weights = answers(strategy, drawn(0), 1)
    after = strategy.apply(drawn(0), 1, iter(updates))
    for a, b in MODULES:
        mean_a, mean_b = (sum(p * t[name] for p, t in zip(weights, trained)) for name in (a, b))
        product = products(trained, weights, a, b)
        delta = (product - mean_b @ mean_a) @ mean_a.T @ torch.linalg.inv(mean_a @ mean_a.T + lam * torch.eye(RANK, dtype=torch.float64))
        torch.testing.assert_close(after[a], mean_a, **EXACT)
        torch.testing.assert_close(after[b], mean_b + delta, **EXACT)
        assert (after[b] @ after[a] - product).norm() < (mean_b @ mean_a - product).norm()


@pytest.mark.parametrize("name", ["flexlora", "florist", "fedrot_lora"])
def test_the_frame_of_a_clients_factors_does_not_matter_to_what_works_on_products(name):
    strategy = made(name)
    updates, _, _ = answers(strategy, drawn(0), 1, size=0.1)
    moved = [u._replace(adapter=turned(u.adapter, drawn(0), u.client + 1)) for u in updates]
    one, other = (strategy.apply(drawn(0), 1, sent) for sent in (updates, moved))
    for a, b in MODULES:
        torch.testing.assert_close(one[b] @ one[a], other[b] @ other[a], **EXACT)


def test_the_frame_matters_to_fedavg_and_rotation_gives_the_one_update_back():
    same = drawn(1, 0.01)
    moved = [Update(k, turned(same, drawn(0), k + 1), 1, {}) for k in range(4)]
    target = move(drawn(0), same)
    for name, low, high in (("fedavg", 0.2, 2.0), ("fedrot_lora", 0.0, 1e-9)):
        after = made(name).apply(drawn(0), 1, moved)
        for a, b in MODULES:
            assert low <= float((after[b] @ after[a] - target[b] @ target[a]).norm() / (target[b] @ target[a]).norm()) <= high


# Clients of different ranks -------------------------------------------------------------------------------------------

RANKS = (1, 2, 4, 8, 2)  # of the clients of COUNTS


@pytest.fixture
def eight(monkeypatch):
    """Factors of rank 8, the largest."""
    monkeypatch.setitem(globals(), "RANK", 8)
    return drawn(0)


def padded(trained: dict, weights: list[float], name: str, of=None) -> Tensor:
    """The weighted sum of factors, filled up with zeros by hand; ``of`` puts something in the place of the factors."""
    total = torch.zeros_like(drawn(0)[name])
    for p, t in zip(weights, trained):
        tensor = t[name] if of is None else of(t[name])
        total[tuple(slice(n) for n in tensor.shape)] += p * tensor
    return total


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["flexlora", "florist"])
def test_a_client_receives_the_best_product_of_its_rank(name, rank, eight):
    strategy = made(name, **({"energy": 1.0} if name == "florist" else {}))
    assert strategy.ranks
    updates, trained, weights = answers(strategy, strategy.init(eight), 1, ranks=RANKS)
    state = strategy.apply(strategy.init(eight), 1, iter(updates))
    given = strategy.ask(state, 2, ClientInfo(0, 1, rank=rank))[1]
    for a, b in MODULES:
        assert given[a].shape == (rank, WIDE) and given[b].shape == (HIGH, rank)
        torch.testing.assert_close(given[b] @ given[a], best(products(trained, weights, a, b), rank), **EXACT)


def test_ranks_that_add_up_to_less_than_the_largest_leave_axes_that_can_learn(eight):
    strategy = made("flexlora")
    updates, trained, weights = answers(strategy, eight, 1, counts=(1, 3), ranks=(1, 2))
    after = strategy.apply(eight, 1, updates)
    for a, b in MODULES:
        torch.testing.assert_close(after[b] @ after[a], products(trained, weights, a, b), **EXACT)
        torch.testing.assert_close(after[a] @ after[a].T, torch.eye(8, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("orthonormal", [True, False])
def test_ffa_with_different_ranks_is_the_mean_of_products(orthonormal, eight):
    strategy = made("ffa_lora", orthonormal=orthonormal)
    state = strategy.init(eight)
    for round in (1, 2):
        updates, trained, weights = answers(strategy, state, round, ranks=RANKS)
        frozen, state = state, strategy.apply(state, round, iter(updates))
        for a, b in MODULES:
            torch.testing.assert_close(state[b] @ state[a], products(trained, weights, a, b), **EXACT)
            assert torch.equal(state[a], frozen[a]) and trained[1][a].shape == (2, WIDE)


def test_hetlora_weighs_padded_factors_by_the_size_of_their_product(eight):
    strategy = made("hetlora")
    updates, trained, weights = answers(strategy, eight, 1, ranks=RANKS)
    after = strategy.apply(eight, 1, iter(updates))
    for a, b in MODULES:
        sizes = [float((t[b] @ t[a]).norm()) for t in trained]
        for name in (a, b):
            torch.testing.assert_close(after[name], padded(trained, [s / sum(sizes) for s in sizes], name), **EXACT)
    torch.testing.assert_close(after["head.weight"], sum(p * t["head.weight"] for p, t in zip(weights, trained)), **EXACT)


def test_rbla_averages_each_row_over_those_that_have_it(eight):
    strategy = made("rbla")
    updates, trained, weights = answers(strategy, eight, 1, ranks=RANKS)
    after = strategy.apply(eight, 1, iter(updates))
    for name in (n for pair in MODULES for n in pair):
        torch.testing.assert_close(after[name], padded(trained, weights, name) / padded(trained, weights, name, torch.ones_like), **EXACT)


@pytest.mark.parametrize("name", ["hetlora", "rbla"])
def test_what_no_client_of_the_round_holds_stays(name, eight):
    strategy = made(name)
    after = strategy.apply(eight, 1, answers(strategy, eight, 1, counts=(2, 5), ranks=(1, 3))[0])
    for a, b in MODULES:
        assert torch.equal(after[a][3:], eight[a][3:]) and torch.equal(after[b][:, 3:], eight[b][:, 3:])
        assert not torch.isclose(after[a][:3], eight[a][:3]).any()


def test_padding_leaves_products_and_a_cut_takes_the_first_terms(eight):
    for rank in (3, 8, 9):
        other = factors.at_rank(eight, rank)
        for a, b in MODULES:
            torch.testing.assert_close(other[b] @ other[a], eight[b][:, :rank] @ eight[a][:rank], **EXACT)
            assert other[a].shape == (rank, WIDE)
    assert factors.at_rank(eight, 8) is eight is factors.at_rank(eight, None)
    assert factors.rank_of({"head.weight": eight["head.weight"]}) is None


def test_diagnostics_of_different_ranks_are_those_of_padded_factors(eight):
    updates, trained, weights = answers(made("rbla"), eight, 1, ranks=RANKS)
    found = diagnose([(factors.at_rank(eight, r), u) for r, u in zip(RANKS, updates)])
    whole = lost = beyond = 0.0
    for a, b in MODULES:
        product = products(trained, weights, a, b)
        lost += float((product - padded(trained, weights, b) @ padded(trained, weights, a)).norm() ** 2)
        whole, beyond = whole + float(product.norm() ** 2), beyond + float((product - best(product, 8)).norm() ** 2)
    assert (found["product_error"], found["best_error"]) == pytest.approx((sqrt(lost / whole), sqrt(beyond / whole)))


# What trains ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, still", [("ffa_lora", ["lora_a"] * 4), ("rolora", ["lora_a", "lora_b"] * 2)])
def test_a_frozen_factor_is_bit_identical_and_not_asked_for(name, still):
    strategy = made(name)
    state = strategy.init(drawn(0))
    for round, frozen in enumerate(still, start=1):  # RoLoRA begins with B: while B = 0, A has no gradient
        before = strategy.view(state)
        assert set(strategy.ask(state, round, ClientInfo(0, 1))[0].groups) == set(GROUPS) - {frozen}
        state = strategy.apply(state, round, iter(answers(strategy, state, round)[0]))
        after = strategy.view(state)
        assert {group(n) for n in after if torch.equal(after[n], before[n])} == {frozen}


def test_an_orthonormal_a_spans_the_same_rows_and_leaves_the_function():
    start = drawn(0)
    after = made("ffa_lora").init(start)
    for a, b in MODULES:
        torch.testing.assert_close(after[a] @ after[a].T, torch.eye(RANK, dtype=torch.float64), **EXACT)
        torch.testing.assert_close(start[a] @ after[a].T @ after[a], start[a], **EXACT)
        torch.testing.assert_close(after[b] @ after[a], start[b] @ start[a], **EXACT)
    plain = made("ffa_lora", orthonormal=False).init(start)
    assert all(torch.equal(plain[n], start[n]) for n in start)


def test_under_sgd_fedsvd_is_ffa_from_an_orthonormal_a():
    """Least squares |W x + B A x - y|^2 on two clients, three steps of plain SGD on B in each of six rounds."""
    stream = torch.Generator().manual_seed(3)
    data = [[torch.randn(d, 20, generator=stream, dtype=torch.float64) for d in (WIDE, HIGH)] for _ in range(2)]
    a, b = MODULES[0]
    start = {a: drawn(0)[a], b: 0 * drawn(0)[b]}

    def trained(given: dict, x: Tensor, y: Tensor) -> dict:
        moving = given[b].clone()
        for _ in range(3):
            moving -= 0.01 * (moving @ given[a] @ x - y) @ (given[a] @ x).T
        return {b: moving - given[b]}

    ends = {}
    for name in ("fedsvd", "ffa_lora"):
        strategy = made(name)
        state = strategy.init(start)
        for round in range(1, 7):
            given = strategy.ask(state, round, ClientInfo(0, 1))[1]
            state = strategy.apply(state, round, [Update(k, trained(given, x, y), 1 + k, {}) for k, (x, y) in enumerate(data)])
        ends[name] = strategy.view(state)[b] @ strategy.view(state)[a]
    assert float(ends["fedsvd"].norm()) > 0.1
    torch.testing.assert_close(ends["fedsvd"], ends["ffa_lora"], **EXACT)


def test_fedprox_asks_for_its_pull_and_else_for_the_same():
    recipe, given = made("fedprox", Recipe(lr={"head": 0.5}, epochs=3), mu=0.25).ask(drawn(0), 1, ClientInfo(0, 1))
    assert recipe == Recipe(lr={"head": 0.5}, epochs=3, mu=0.25) and list(given) == list(drawn(0))


# Server optimisers, by hand -------------------------------------------------------------------------------------------


def tiny(value: float, name: str = "head.weight") -> dict[str, Tensor]:
    return {name: torch.tensor([value], dtype=torch.float64)}


def run(strategy: Strategy, start: dict, steps: list[dict]) -> list[dict]:
    """The global adapter after each round of one client that sends these updates."""
    state, seen = strategy.init(start), []
    for round, step in enumerate(steps, start=1):
        state = strategy.apply(state, round, iter([Update(0, step, 1, {"steps": 1})]))
        seen.append(strategy.view(state))
    return seen


def test_server_momentum_by_hand():
    seen = run(made("fedavgm", beta=0.5, rate=2.0), tiny(1.0), [tiny(0.1), tiny(-0.3)])
    assert [float(s["head.weight"]) for s in seen] == pytest.approx([1 + 2 * 0.1, 1.2 + 2 * (0.05 - 0.3)])


@pytest.mark.parametrize(
    "name, second",
    [
        ("fedadam", lambda v, d: 0.75 * v + 0.25 * d * d),
        ("fedyogi", lambda v, d: v - 0.25 * d * d * (1 if v > d * d else -1)),
        ("fedadagrad", lambda v, d: v + d * d),
    ],
)
def test_adaptive_servers_by_the_papers_formulas(name, second):
    betas = {"beta1": 0.5} | ({} if name == "fedadagrad" else {"beta2": 0.75})
    deltas, m, v, w, expected = [0.2, -0.05, 0.4], 0.0, 0.1**2, 3.0, []
    for d in deltas:
        m, v = 0.5 * m + 0.5 * d, second(v, d)
        w += 0.02 * m / (sqrt(v) + 0.1)
        expected.append(w)
    seen = run(made(name, tau=0.1, rate=0.02, **betas), tiny(3.0), [tiny(d) for d in deltas])
    assert [float(s["head.weight"]) for s in seen] == pytest.approx(expected, rel=1e-12)


def test_fedadams_first_step_in_numbers():
    """D = 0.3, tau = 0.1: m = 0.1 * 0.3 = 0.03, v = 0.99 * 0.01 + 0.01 * 0.09 = 0.0108, step = 0.03 / (sqrt(0.0108) + 0.1)."""
    seen = run(made("fedadam", tau=0.1, rate=1.0), tiny(0.0), [tiny(0.3)])
    assert float(seen[0]["head.weight"]) == pytest.approx(0.03 / 0.20392304845413266)


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad"])
def test_each_group_has_its_own_server_rate_and_the_others_the_default(name):
    names = ("x.lora_a.weight", "x.lora_b.weight", "head.weight")
    start, step = {n: tiny(0.0)["head.weight"] for n in names}, {n: tiny(0.1)["head.weight"] for n in names}
    after = run(made(name, rate=1.0, rates={"lora_a": 2.0, "head": 0.5}), start, [step])[0]
    a, b, head = (float(after[n]) for n in names)
    assert (a / b, head / b) == pytest.approx((2.0, 0.5))


@pytest.mark.parametrize(
    "name, settings, says",
    [
        ("fedadam", {"rates": {"tail": 0.1}}, "'lora_a', 'lora_b', 'patch_embed', 'head' or 'backbone'"),
        ("fedadam", {"rates": {"head": -0.1}}, "rates.head: Input should be greater than 0"),
        ("fedyogi", {"beta2": 1.0}, "beta2: Input should be less than 1"),
        ("fedavgm", {"beta": -0.1}, "beta: Input should be greater than or equal to 0"),
        ("fedprox", {"mu": 0}, "mu: Input should be greater than 0"),
        ("florist", {"energy": 1.5}, "energy: Input should be less than or equal to 1"),
        ("lora_fair", {"lam": 0}, "lam: Input should be greater than 0"),
        ("ffa_lora", {"orthonormal": "often"}, "orthonormal: Input should be a valid boolean"),
        ("trimmed_mean", {"share": 0.5}, "share: Input should be less than or equal to 0.45"),
        ("krum", {"attackers": -1}, "attackers: Input should be greater than or equal to 0"),
        ("norm_bound", {"bound": "mean"}, "Input should be"),
    ],
)
def test_a_setting_out_of_range_is_one_line(name, settings, says):
    with pytest.raises(ConfigError) as caught:
        made(name, **settings)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_fednova_by_hand():
    """Two clients of weights 1/4 and 3/4, steps 2 and 6: tau_eff = 5, mean step 0.25 * 1 / 2 + 0.75 * 12 / 6 = 1.625."""
    updates = [Update(0, tiny(1.0), 10, {"steps": 2}), Update(1, tiny(12.0), 30, {"steps": 6})]
    assert float(made("fednova").apply(tiny(0.5), 1, iter(updates))["head.weight"]) == pytest.approx(0.5 + 5 * 1.625)


def test_fednova_counts_steps_of_momentum_by_their_weight():
    """rho = 0.5: one step enters once; of two, the first enters with 1 + 0.5 and the second with 1."""
    sgd = Recipe(lr={}, optimizer="sgd", momentum=0.5)
    updates = [Update(0, tiny(1.0), 1, {"steps": 1}), Update(1, tiny(5.0), 1, {"steps": 2})]
    expected = (1 + 2.5) / 2 * (1.0 / 1 + 5.0 / 2.5) / 2
    assert float(made("fednova", sgd).apply(tiny(0.0), 1, updates)["head.weight"]) == pytest.approx(expected)


def test_with_equal_steps_fednova_is_fedavg():
    updates, _, _ = answers(made("fedavg"), drawn(0), 1)
    torch.testing.assert_close(made("fednova").apply(drawn(0), 1, updates), made("fedavg").apply(drawn(0), 1, updates), **EXACT)


# Diagnostics ----------------------------------------------------------------------------------------------------------


def test_the_diagnostics_equal_dense_ones():
    updates, trained, weights = answers(made("fedavg"), drawn(0), 1)
    found = diagnose([(drawn(0), u) for u in updates])
    whole = lost = beyond = rank = 0.0
    for a, b in MODULES:
        product = products(trained, weights, a, b)
        mean_a, mean_b = (sum(p * t[name] for p, t in zip(weights, trained)) for name in (a, b))
        s = torch.linalg.svdvals(product)
        share = [float(x) for x in s / s.sum() if x > 1e-12 * s[0]]
        whole, lost = whole + float(product.norm() ** 2), lost + float((product - mean_b @ mean_a).norm() ** 2)
        beyond, rank = beyond + float((product - best(product)).norm() ** 2), rank + exp(-sum(x * log(x) for x in share)) / len(MODULES)
    middle = {n: sum(p * u.adapter[n] for p, u in zip(weights, updates)) for n in drawn(0)}
    spread = sum(p * float((u.adapter[n] - middle[n]).norm() ** 2) for p, u in zip(weights, updates) for n in middle)
    drift = sqrt(spread / sum(float(t.norm() ** 2) for t in middle.values()))
    expected = {"product_error": sqrt(lost / whole), "best_error": sqrt(beyond / whole), "effective_rank": rank, "drift": drift, "modules": 4}
    assert found == pytest.approx(expected, rel=1e-9)
    assert 0 < found["best_error"] < found["product_error"] < 1


def test_clients_that_agree_lose_nothing_and_a_frozen_factor_loses_nothing():
    one = diagnose([(drawn(0), Update(k, drawn(1), k + 1, {})) for k in range(3)])
    assert max(one["product_error"], one["best_error"], one["drift"]) < 1e-12 and 1 < one["effective_rank"] <= RANK
    strategy = made("ffa_lora")
    frozen = diagnose([(drawn(0), u) for u in answers(strategy, drawn(0), 1)[0]])
    assert max(frozen["product_error"], frozen["best_error"]) < 1e-12 < 0.1 < frozen["drift"]


def test_diagnostics_of_products_that_are_zero_are_zeros():
    start = {name: t * 0 if group(name) == "lora_b" else t for name, t in drawn(0).items()}
    found = diagnose([(start, Update(0, {n: 0 * t for n, t in start.items()}, 1, {}))])
    assert found == {"product_error": 0, "best_error": 0, "effective_rank": 0, "drift": 0, "modules": 4}


def test_where_there_are_no_products_drift_is_all_there_is_to_say():
    clients = [{"head.weight": torch.tensor([2.0])}, {"head.weight": torch.tensor([4.0])}]
    assert diagnose([({"head.weight": torch.zeros(1)}, Update(k, c, 1, {})) for k, c in enumerate(clients)]) == {"drift": pytest.approx(1 / 3)}


# Speed ----------------------------------------------------------------------------------------------------------------


def test_the_server_svd_never_factors_anything_wide(monkeypatch):
    """24 modules of 768 in the bench (`simulations.bench products`) are a question of these shapes."""
    factored: list[tuple[int, ...]] = []
    for module, name in ((torch, "geqrf"), (torch.linalg, "svd")):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda x, plain=plain, **more: factored.append(tuple(x.shape)) or plain(x, **more))
    clients, wide = [drawn(k) for k in range(2)], 2 * RANK
    for a, b in MODULES:
        factors.svd(*factors.stack(clients, [1, 3], a, b), rank=RANK)
    assert factored == [(HIGH, wide), (WIDE, wide), (wide, wide)] * len(MODULES)
