"""The attack on the key: it succeeds where the key leaks, and finds nothing in what is keyed in advance or sealed."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("scipy", reason="scipy, which the attack needs, is not installed: pip install '.[audit]'")

from fl.wire import masks  # noqa: E402
from simulations.audit import key_recovery, matching, structure  # noqa: E402

SMALL = {  # 0.1 M parameters at random: what leaks is the pictures' doing, not the pretraining's
    "model": "vit_tiny", "model.image": "32", "model.weights": "none", "+model.embed_dim": "64", "+model.depth": "1",
    "+model.num_heads": "2", "precision": "float32", "attention": "plain",
}  # fmt: skip
LIKES = structure.symmetries(4)


def symmetric(n: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, n))
    return x + x.T


@pytest.mark.parametrize("hollow", [False, True])
def test_a_planted_order_is_found(hollow):
    b, planted = symmetric(20, 0) * (1 - hollow * np.eye(20)), np.random.default_rng(1).permutation(20)
    best, *others = matching.match(b[np.ix_(planted, planted)], b, 8, np.random.default_rng(2))
    assert (best == planted).all() and len(others) == 7


def test_a_score_does_not_depend_on_how_the_values_are_numbered():
    a, b = symmetric(9, 0), symmetric(9, 1)
    p, q, r = (np.random.default_rng(s).permutation(9) for s in range(3))
    renamed = matching.score(a[np.ix_(q, q)], b, p[q]), matching.score(a, b[np.ix_(r, r)], r.argsort()[p])
    assert renamed == pytest.approx([matching.score(a, b, p)] * 2)


def test_an_exchange_gains_what_it_says():
    a, b, p = symmetric(7, 0), symmetric(7, 1), np.arange(7)
    gain = matching.exchanges(a, b)
    for r, s in np.ndindex(7, 7):
        q = p.copy()
        q[[r, s]] = q[[s, r]]
        assert gain[r, s] == pytest.approx(matching.score(a, b, q) - matching.score(a, b, p))


def test_the_symmetries_are_forty_eight_and_a_group():
    assert len({tuple(s) for s in LIKES}) == 48 and {tuple(a[b]) for a in LIKES for b in LIKES} == {tuple(s) for s in LIKES}
    order = np.random.default_rng(0).permutation(48)
    assert structure.shares(order, order, LIKES) == (1, 1) and structure.shares(LIKES[5][order], order, LIKES)[1] == 1


def test_chance_is_one_in_forty_eight_places():
    level = structure.chance(LIKES, draws=2000)
    assert level["exact"][0] == pytest.approx(1 / 48, abs=0.003) and level["sym"][0] == pytest.approx(0.075, abs=0.003)


@pytest.mark.slow
def test_one_round_in_clear_gives_the_key_away_and_no_other_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(masks.secrets, "token_bytes", bytes)  # so that the masks are the same each time
    subjects, plain, secret = key_recovery.seen(key_recovery.composed(SMALL, tmp_path / "key", 0))

    def sym(name: str, chains: int = 1, order: np.ndarray = secret) -> float:
        return structure.shares(structure.recover(subjects[name], plain, np.random.default_rng(0), chains), order, LIKES)[1]

    assert sym("clear", chains=3) >= key_recovery.SOLVED
    assert sym("opened sum", chains=12) >= key_recovery.SOLVED  # fewer columns: about every other chain ends there
    for name in ("keyed clear", "sealed float32", "sealed words", "sealed sum"):
        assert sym(name) <= 0.2, name  # chance is 0.075, and one order in a hundred has 0.125 or more
    assert sym("keyed clear", chains=4, order=np.arange(48)) >= 0.4  # what it finds there is plain order: nothing was moved
