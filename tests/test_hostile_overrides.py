"""Overrides are data: none of an attacker's runs a program, reads a file or the environment, or is even shown to Hydra."""

from __future__ import annotations

import pytest
from hostile import OVERRIDES
from fl import config, overrides
from fl.overrides import OverrideError


@pytest.mark.parametrize(("typed", "rule"), OVERRIDES, ids=[typed[:40] for typed, _ in OVERRIDES])
def test_a_hostile_override_is_refused_by_its_rule_before_hydra_composes(typed, rule, monkeypatch):
    monkeypatch.setattr(config, "compose", lambda *_, **__: pytest.fail("Hydra composed it"))
    with pytest.raises(OverrideError) as caught:
        config.load(typed)
    assert caught.value.rule == rule and rule in OverrideError.RULES and "\n" not in str(caught.value)
