"""Robust means under attack: of nine clients two send what they like; the others agree up to noise.

A rule is robust here when its aggregate stays within ``REACH`` honest spreads of the honest clients' mean, where a spread is
the mean distance of an honest update from that mean; an update is 2.4 spreads long. Krum, which takes one client's update,
is at one spread by its nature; the others are at half of one or less. The attacks go from crude to subtle, and the attackers
claim a thousand times the images, which the robust rules do not look at.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fl.adapter import mean, norm, sub
from fl.config import ConfigError, build
from fl.recipe import Recipe
from strategies import Strategy, Update
from strategies.trimmed_mean import trimmed

SHAPES = {"blocks.0.attn.qkv.q.lora_a.weight": (4, 30), "blocks.0.attn.qkv.q.lora_b.weight": (50, 4), "head.weight": (10, 50)}
HONEST, ATTACKERS, REACH = 7, 2, 1.0
RULES = {
    "median": {},
    "trimmed_mean": {"share": 0.25},
    "krum": {"attackers": ATTACKERS},
    "multi-krum": {"attackers": ATTACKERS, "keep": 4},
    "centred_clipping": {},
    "geometric_median": {},
}


def made(rule: str, **settings) -> Strategy:
    name = "krum" if rule == "multi-krum" else rule
    return build({"_target_": f"strategies.{name}.{name}"} | settings, recipe=Recipe(lr={}))


def noise(seed: int) -> dict[str, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=stream, dtype=torch.float64) for name, shape in SHAPES.items()}


ZERO = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}


def honest(size: float = 0.5) -> list[dict[str, Tensor]]:
    """A common direction and each client's own noise, half as long."""
    return [{name: t + size * noise(k + 1)[name] for name, t in noise(0).items()} for k in range(HONEST)]


def sign_flip(good: list[dict]) -> list[dict]:
    """The opposite of what the honest found, as training on flipped labels brings about."""
    return [{name: -t for name, t in mean(good, [1] * len(good)).items()}] * ATTACKERS


def scaled(good: list[dict]) -> list[dict]:
    """A reversed update a hundred times as long."""
    return [{name: -100 * t for name, t in g.items()} for g in good[:ATTACKERS]]


def gaussian(good: list[dict]) -> list[dict]:
    """Noise ten times as long as an update."""
    return [{name: 10 * t for name, t in noise(100 + k).items()} for k in range(ATTACKERS)]


def a_little_is_enough(good: list[dict]) -> list[dict]:
    """Baruch et al., arXiv 1902.06156: every coordinate 1.5 standard deviations off the mean, within what honest ones send."""
    stacked = {name: torch.stack([g[name] for g in good]) for name in SHAPES}
    return [{name: t.mean(dim=0) - 1.5 * t.std(dim=0) for name, t in stacked.items()}] * ATTACKERS


LOUD, EVERY = (scaled, gaussian), (sign_flip, scaled, gaussian, a_little_is_enough)


def error(strategy: Strategy, attack, rounds: int = 1) -> float:
    """How many honest spreads the step of the last round is away from the honest mean."""
    good = honest()
    centre = mean(good, [1] * len(good))
    spread = sum(norm(sub(g, centre)) for g in good) / len(good)
    sent = [*good, *attack(good)]
    state = strategy.init(ZERO)
    for round in range(1, rounds + 1):
        before = strategy.view(state)
        state = strategy.apply(state, round, iter([Update(k, u, 10 if k < HONEST else 10_000, {}) for k, u in enumerate(sent)]))
    return norm(sub(sub(strategy.view(state), before), centre)) / spread


@pytest.mark.parametrize("attack", EVERY, ids=lambda a: a.__name__)
@pytest.mark.parametrize("rule", RULES)
def test_a_robust_mean_stays_with_the_honest_clients(rule, attack):
    reach = REACH if rule == "krum" else 0.55 * REACH
    assert error(made(rule, **RULES[rule]), attack) <= reach <= REACH < error(made("fedavg"), attack)


@pytest.mark.parametrize("attack", EVERY, ids=lambda a: a.__name__)
def test_centred_clipping_stays_there_round_after_round(attack):
    assert error(made("centred_clipping"), attack, rounds=6) <= REACH


@pytest.mark.parametrize("attack", LOUD, ids=lambda a: a.__name__)
def test_bounded_norms_withstand_the_loud(attack):
    """Two of nine at the median length move the mean by 4/9 of it at most, which is here about one spread."""
    assert error(made("norm_bound"), attack) <= 1.1 * REACH < error(made("fedavg"), attack)


def test_the_plain_mean_of_equal_weights_is_lost_to_the_loud_too():
    good = honest()
    for attack in LOUD:
        sent = [*good, *attack(good)]
        away = norm(sub(mean(sent, [1] * len(sent)), mean(good, [1] * len(good))))
        assert away > 2 * REACH * norm(sub(good[0], mean(good, [1] * len(good))))


@pytest.mark.parametrize("rule", [*RULES, "norm_bound"])
def test_without_an_attack_it_is_near_the_mean(rule):
    assert error(made(rule, **RULES.get(rule, {})), lambda good: [noise(0)] * ATTACKERS) <= REACH


# By hand --------------------------------------------------------------------------------------------------------------


def points(*values: tuple[float, ...]) -> list[Update]:
    return [Update(k, {"head.weight": torch.tensor(v, dtype=torch.float64)}, 1 + k, {}) for k, v in enumerate(values)]


def after(strategy: Strategy, *values: tuple[float, ...]) -> list[float]:
    start = {"head.weight": torch.zeros(len(values[0]), dtype=torch.float64)}
    return strategy.view(strategy.apply(strategy.init(start), 1, iter(points(*values))))["head.weight"].tolist()


def test_the_median_by_hand():
    assert after(made("median"), (1, 9), (2, 7), (50, 8)) == [2, 8]
    assert after(made("median"), (1, 0), (2, 0), (4, 0), (50, 0)) == [3, 0]


def test_the_trimmed_mean_by_hand():
    assert after(made("trimmed_mean", share=0.2), (1,), (2,), (3,), (7,), (100,)) == [4]
    assert after(made("trimmed_mean", share=0.4), (1,), (2,), (3,), (7,), (100,)) == [3]
    assert after(made("trimmed_mean", share=0.4), (-9,), (1,), (2,), (50,)) == [1.5]  # two at either end would leave none
    assert all(0 < 2 * trimmed(n, share / 100) < n for n in range(3, 40) for share in range(1, 46))
    assert after(made("trimmed_mean", share=0.01), (-50,), (1,), (2,), (100,)) == [1.5]


def test_krum_by_hand():
    """f = 1, n = 5: two nearest neighbours; scores of 0, 1, 3, 7, 100 are 10, 5, 13, 52, .."""
    clients = ((0,), (1,), (3,), (7,), (100,))
    assert after(made("krum"), *clients) == [1]
    assert after(made("krum", keep=2), *clients) == [0.5]


def test_the_geometric_median_by_hand():
    """Of three points on a line the middle one; of a triangle with all angles below 120 degrees the Fermat point."""
    assert after(made("geometric_median", steps=200), (0, 0), (1, 0), (90, 0)) == pytest.approx([1, 0], abs=1e-3)
    fermat = (0.5, 0.5 / 3**0.5)
    assert after(made("geometric_median", steps=200), (0, 0), (1, 0), (0.5, 3**0.5 / 2)) == pytest.approx(fermat)


def test_bounded_norms_by_hand():
    assert after(made("norm_bound", bound=1.0), (3, 4), (0, 0.5)) == pytest.approx([0.3, 0.65])
    assert after(made("norm_bound"), (3, 4), (0, 0.5), (0, 1)) == pytest.approx([0.2, 2.3 / 3])


def test_centred_clipping_by_hand():
    """Radius 1: from 0 the clients pull by 0.5, 1 and 1, to 2.5/3; from there by -1/3, 1, 1, to 2.5/3 + 5/9."""
    assert after(made("centred_clipping", radius=1.0, steps=1), (0.5,), (3,), (100,)) == pytest.approx([2.5 / 3])
    assert after(made("centred_clipping", radius=1.0, steps=2), (0.5,), (3,), (100,)) == pytest.approx([2.5 / 3 + 5 / 9])


def test_centred_clipping_starts_from_the_last_centre():
    strategy, start = made("centred_clipping", radius=1.0, steps=1), {"head.weight": torch.zeros(1, dtype=torch.float64)}
    state = strategy.apply(strategy.init(start), 1, points((5,), (5,)))
    state = strategy.apply(state, 2, points((5,), (5,)))
    assert strategy.view(state)["head.weight"].tolist() == [1 + 2]


# Too few ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule, settings, clients, says",
    [
        ("krum", {"attackers": 2}, 6, "krum with attackers=2 and keep=1 needs at least 7 clients in a round, got 6; raise"),
        ("krum", {"attackers": 1, "keep": 4}, 6, "krum with attackers=1 and keep=4 needs at least 7 clients in a round, got 6; raise"),
        ("trimmed_mean", {"share": 0.4}, 2, "trimmed_mean needs 3 clients in a round, got 2; raise"),
        ("trimmed_mean", {"share": 0.4}, 3, ""),
        ("trimmed_mean", {"share": 0.45}, 8, ""),
        ("krum", {"attackers": 2}, 7, ""),
    ],
)
def test_too_few_clients_for_a_rule_is_one_line_that_names_it(rule, settings, clients, says):
    strategy, sent = made(rule, **settings), points(*[(float(k),) for k in range(clients)])
    start = {"head.weight": torch.zeros(1, dtype=torch.float64)}
    if not says:
        strategy.apply(strategy.init(start), 1, iter(sent))
        return
    with pytest.raises(ConfigError) as caught:
        strategy.apply(strategy.init(start), 1, iter(sent))
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "krum", "geometric_median", "centred_clipping", "norm_bound"])
def test_clients_that_sent_different_tensors_are_an_error(rule):
    sent = [Update(k, {"head.weight" if k else "other.weight": torch.ones(1)}, 1, {}) for k in range(5)]
    strategy = made(rule)
    with pytest.raises(ValueError, match="must hold the same tensors"):
        strategy.apply(strategy.init({"head.weight": torch.zeros(1), "other.weight": torch.zeros(1)}), 1, sent)
