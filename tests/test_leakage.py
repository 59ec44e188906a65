"""What an honest server learns of one update: much in clear, nothing from the same message sealed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fl.provenance import environment
from simulations.audit import curious, leakage

SMALL = [  # 0.02 M parameters at random: what the head's bias tells is the labels' doing, not the pretraining's
    "model=vit_tiny", "model.image=16", "model.patch=8", "model.weights=none", "+model.embed_dim=16", "+model.depth=1", "+model.num_heads=2",
    "data=demo", "precision=float32", "attention=plain", "recipe.batch=16",
]  # fmt: skip


@pytest.mark.parametrize("positive, negative, area", [([3, 4], [1, 2], 1.0), ([1, 2], [3, 4], 0.0), ([1, 1], [1, 1], 0.5), ([1, 3], [2], 0.5)])
def test_the_area_is_the_share_of_pairs_in_order(positive, negative, area):
    assert curious.auc(np.array(positive), np.array(negative)) == area


def test_the_variation_of_two_histograms_is_what_must_move():
    assert curious.variation(np.array([0.5, 0.5, 0]), np.array([0, 0.5, 0.5])) == 0.5
    assert curious.histogram(torch.tensor([0, 2, 2, 2]), 3).tolist() == [0.25, 0, 0.75]


def test_the_classes_of_a_client_are_in_its_clear_update_and_not_in_its_sealed_one(tmp_path):
    config = leakage.composed(SMALL, tmp_path, 0, partition="dirichlet", clients=10, data__train=1000)
    found = leakage.by_class(config, 20)
    assert found["class"]["clear"] > 0.65 and found["class fitted"]["clear"] > 0.8
    for what in ("class", "class fitted"):
        assert abs(found[what]["sealed"] - 0.5) < 0.28, what  # some eighty scores, ten of each message
    assert found["histogram"]["clear"] < 0.7 * found["histogram"]["chance"]
    assert found["histogram"]["sealed"] > 0.7 * found["histogram"]["chance"]


def test_a_client_of_few_pictures_shows_which_they_were_and_sealed_it_does_not(tmp_path):
    config = leakage.composed(SMALL, tmp_path, 0, partition="iid", clients=5, data__train=100, recipe__epochs=20)
    found = leakage.by_picture(config)
    assert found["clear"] > 0.6 and abs(found["sealed"] - 0.5) < 0.12


def test_the_table_names_the_machine_the_seeds_and_the_commit():
    origin = {k: environment()[k] for k in ("machine", "commit")}
    line = {"command": "this", "found": {"class": {"clear": 0.9, "sealed": 0.5}}} | origin
    text = leakage.table([line | {"seed": 0}, line | {"seed": 1}])
    assert "seeds 0, 1" in text and str(origin["machine"]) in text and "| class | 0.900 (0.90 to 0.90) | 0.500 (0.50 to 0.50) | 0.5 |" in text
