"""Clients that train at once come out as each would alone: gradients, epochs, streams, and whole runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import first
from test_lean import RATES, awake
from test_pieces import backward_narrow
from test_personal import rows
from test_simulation import by_loop, equal, home, settings  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from clients import together
from fl.adapter import Adapter, group, norm, only, read, read_rows, sub, write, write_rows
from fl.config import ConfigError, load
from fl.course import Course, Prepare
from fl.datasets import Examples
from fl.lean import lean
from fl.lean.attention import ATTENTIONS
from fl.lean.stacked import stack
from fl.learn import Fitted, TrainingError, fit, fit_together
from fl.models import WeightsError
from fl.models.full import full
from fl.models.linear import linear
from fl.models.lora_patch import lora_patch
from fl.models.lora_sb import lora_sb
from fl.models.melo import melo
from fl.models.ravan import ravan
from fl.pieces import LARGEST
from fl.randomness import generator
from fl.recipe import Recipe
from simulations import loop

METHODS = {"lora_patch": lora_patch(2), "melo": melo(2), "linear": linear(), "lora_sb": lora_sb(3)}
STEP = Recipe(lr=dict.fromkeys(RATES, 0.5), optimizer="sgd", momentum=0, warmup=0, cosine=False, batch=40, clip=0.1)
EPOCHS = {
    "adamw": Recipe(lr=RATES, batch=8, epochs=2, weight_decay=0.1),
    "sgd": Recipe(lr=dict.fromkeys(RATES, 0.05), optimizer="sgd", batch=8, epochs=2, mu=0.1, clip=0.5),
}
Answers = list[tuple[Adapter, Fitted]]


def pictures(forty: Examples, seed: int) -> Examples:
    """Forty more like them, of another client."""
    change = torch.randint(0, 60, forty.images.shape, generator=generator(seed, "noise"), dtype=torch.uint8)
    return Examples(forty.images + change, forty.labels.roll(seed))


def courses(forty: Examples, clients: list[int]) -> list[Course]:
    return [Course(pictures(forty, i), generator(i, "stream"), noisy) for i in clients]


@Prepare
def noisy(images: torch.Tensor, chosen: torch.Tensor, stream: torch.Generator) -> torch.Tensor:
    """A draw from the stream for each batch, as an augmentation takes it."""
    images = images[chosen]
    return images ^ torch.randint(0, 4, images.shape, generator=stream, dtype=torch.uint8)


def starts(model, clients: list[int]) -> list[Adapter]:
    """Where each client starts: not all in one place."""
    return [{n: t + 0.05 * torch.randn(t.shape, generator=generator(i, n)) for n, t in read(model).items()} for i in clients]


def alone(model, forty, recipe: Recipe, clients: list[int], corrections=None, precision="float32") -> Answers:
    forward, answers, given, before = lean(model, precision, "plain"), [], starts(model, clients), read(model)
    for i, (start, course) in enumerate(zip(given, courses(forty, clients))):
        write(model, start)
        correction = corrections and corrections[i]
        fitted = fit(model, course.examples, recipe, course.stream, course.prepare, forward, correction)
        answers.append((sub(read(model), start), fitted))
    write(model, before)
    return answers


def at_once(model, forty, recipe: Recipe, clients: list[int], corrections=None, precision="float32", attention="plain", narrow=lambda f: f) -> Answers:
    several, given = stack(model, len(clients)), starts(model, clients)
    write_rows(several, given)
    tasks = [c._replace(correction=corrections and corrections[i]) for i, c in enumerate(courses(forty, clients))]
    fitted = fit_together(several, tasks, recipe, narrow(lean(several, precision, attention)))
    return [(sub(own, start), one) for own, start, one in zip(read_rows(several), given, fitted, strict=True)]


def apart(found: Answers, expected: Answers) -> float:
    """The largest difference between what clients moved, measured in how far they moved."""
    return max(norm(sub(a, b)) / norm(b) for (a, _), (b, _) in zip(found, expected, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_clipped_step_is_each_clients_own(tiny, forty, method, attention):
    model = tiny(METHODS[method])
    expected, found = alone(model, forty, STEP, [0, 1, 2]), at_once(model, forty, STEP, [0, 1, 2], attention=attention)
    assert apart(found, expected) <= 1e-5
    assert all(norm(moved) == pytest.approx(0.5 * 0.1, rel=1e-3) for moved, _ in found)  # the clip bounds each
    for (_, one), (_, other) in zip(found, expected):
        assert (one.steps, one.seen, one.gradient) == (1, 40, None) and one.loss == pytest.approx(other.loss, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", EPOCHS)
def test_after_epochs_too(tiny, forty, method, optimizer):
    model = tiny(METHODS[method])
    expected = alone(model, forty, EPOCHS[optimizer], [0, 1, 2])
    assert apart(at_once(model, forty, EPOCHS[optimizer], [0, 1, 2]), expected) <= 1e-4
    assert apart(alone(model, forty, EPOCHS[optimizer], [1, 2, 0]), expected) > 0.1  # clients do differ


def test_one_client_in_a_stack_is_the_client(tiny, forty):
    model = tiny(lora_patch(2))
    assert apart(at_once(model, forty, EPOCHS["adamw"], [3]), alone(model, forty, EPOCHS["adamw"], [3])) <= 1e-4


def test_permuted_clients_give_permuted_results(tiny, forty):
    model = tiny(lora_patch(2))
    found = at_once(model, forty, EPOCHS["sgd"], [0, 1, 2])
    assert apart(at_once(model, forty, EPOCHS["sgd"], [2, 0, 1]), [found[2], found[0], found[1]]) <= 1e-5


def test_what_a_client_learns_does_not_depend_on_whom_it_trains_beside(tiny, forty):
    model = tiny(lora_patch(2))
    one, other = (at_once(model, forty, STEP, [0, neighbour])[0] for neighbour in (1, 2))
    assert all(torch.equal(one[0][n], t) for n, t in other[0].items()) and one[1] == other[1]


def test_in_bfloat16_each_client_computes_as_alone_and_masters_stay_float32(tiny, forty):
    model = awake(tiny(lora_patch(2)))
    expected, found = (way(model, forty, STEP, [0, 1], precision="bfloat16") for way in (alone, at_once))
    assert apart(found, expected) < 0.05
    assert all(t.dtype == torch.float32 for moved, _ in found for t in moved.values())


def test_corrections_are_each_clients_own_and_so_are_the_gradients_without_them(tiny, forty):
    model = tiny(lora_patch(2))
    corrections = [{n: 0.01 * torch.randn(t.shape, generator=generator(i, n, "c")) for n, t in read(model).items()} for i in (0, 1)]
    expected, found = (way(model, forty, EPOCHS["sgd"], [0, 1], corrections) for way in (alone, at_once))
    assert apart(found, expected) <= 1e-4
    assert apart([(one.gradient, one) for _, one in found], [(one.gradient, one) for _, one in expected]) <= 1e-4


@pytest.mark.parametrize("groups", [("lora_b", "head"), ("lora_a",), ("patch_embed",)])
def test_groups_that_do_not_train_stay_and_the_others_are_as_alone(tiny, forty, groups):
    model = awake(tiny(lora_patch(2)))
    several = stack(model, 2)
    for one in (model, several):
        with only(one, groups):
            if one is model:
                fit(one, forty, STEP, generator(0), forward=lean(one, "float32", "plain"))
            else:
                fit_together(one, [Course(forty, generator(i)) for i in (0, 1)], STEP, lean(one, "float32", "plain"))
    expected, start = read(model), read(awake(tiny(lora_patch(2))))
    for own in read_rows(several):  # one batch of all images, in another order each
        assert norm(sub(own, expected)) <= 1e-4 * norm(sub(expected, start))
        assert all(torch.equal(own[n], start[n]) for n in start if group(n) not in groups)


def test_a_stack_shares_what_is_frozen_and_owns_what_trains(tiny):
    model = tiny(lora_patch(2))
    several = dict(stack(model, 3).named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert several[name].shape == (3, *parameter.shape) and all(torch.equal(row, parameter) for row in several[name])
            assert several[name].untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr()
        else:
            assert several[name] is parameter


def test_a_batch_that_memory_has_no_room_for_is_taken_in_pieces_of_each_client(tiny, forty):
    model = tiny(lora_patch(2))
    whole = at_once(model, forty, STEP, [0, 1])
    pieces = at_once(model, forty, STEP, [0, 1], narrow=lambda forward: backward_narrow(forward, 11, 1))
    assert apart(pieces, whole) <= 1e-5
    assert 10 in LARGEST["train"].values()


class Calls(TorchDispatchMode):
    """How often torch is called to compute something: on a GPU, launches."""

    number = 0

    def __torch_dispatch__(self, called, types, args=(), more=None):
        self.number += not called.is_view
        return called(*args, **(more or {}))


def test_a_step_of_eight_clients_takes_hardly_more_calls_than_one_client_s(tiny, forty):
    def calls(way, clients: int, epochs: int) -> int:
        with Calls() as counted:
            way(tiny(lora_patch(2)), forty, replace(EPOCHS["adamw"], epochs=epochs), list(range(clients)))
        return counted.number

    one, eight = (calls(way, n, 2) - calls(way, n, 1) for way, n in ((alone, 1), (at_once, 8)))
    assert one < eight < 1.3 * one  # the order of the images, and what is drawn for them, is each client's


@pytest.mark.parametrize("method, says", [(full(), "trains backbone"), (ravan(2, 3), "has LoRA of another kind")], ids=["full", "ravan"])
def test_a_method_that_cannot_be_stacked_is_refused_with_the_way_out(tiny, method, says):
    with pytest.raises(WeightsError, match=rf"method=lora_patch\|melo\|lora_sb\|linear, got one that {says}; set together=1"):
        stack(tiny(method), 2)


def test_clients_with_different_numbers_of_images_do_not_train_together(tiny, forty):
    model = stack(tiny(lora_patch(2)), 2)
    uneven = [Course(forty, generator(0)), Course(forty.at(torch.arange(39)), generator(1))]
    with pytest.raises(TrainingError, match=r"as many images each, got \[39, 40\]"):
        fit_together(model, uneven, STEP, lean(model, "float32", "plain"))


SGD = "precision=float32 recipe.optimizer=sgd recipe.momentum=0"
RUNS = [
    "", "strategy=scaffold", "blind=true seal.largest=200", "recipe.augment=true clients=5 data.train=203", "recipe.keep=[head] recipe.lr.head=1 recipe.lr.patch_embed=0.1", "strategy=rolora",
    "strategy=flora", "method=lora_sb", "strategy=flexlora clients=5 data.train=200 +nodes.3.rank=2 +nodes.4.rank=2", "method=linear", "method=melo start=public",
    "strategy=fedex_lora recipe.mu=0.1", "fraction=0.5 clients=6 data.train=240",
]  # fmt: skip


@pytest.mark.parametrize("more", first(5, RUNS))
def test_a_run_of_clients_at_once_is_the_run_one_by_one_to_rounding(home, tmp_path, monkeypatch, more):
    stacked, real = [], together.fit_together

    def counted(model, tasks, *others):
        stacked.append(len(tasks))
        return real(model, tasks, *others)

    monkeypatch.setattr(together, "fit_together", counted)
    (ours, found), (theirs, expected) = (by_loop(home, tmp_path / str(n), SGD, more, f"together={n}") for n in (3, 1))
    assert len(stacked) >= 2 and max(stacked) == 3
    _, start = by_loop(home, tmp_path / "start", SGD, more, "recipe.lr={lora_a:0,lora_b:0,lora_r:0,head:0,patch_embed:0,backbone:0}")
    assert norm(sub(found, expected)) < 1e-4 * norm(sub(expected, start))
    assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=0.02) and ours["bytes"] == theirs["bytes"]
    one, other = ([[(c["client"], c["steps"]) for c in row["clients"]] for row in rows(tmp_path / str(n))] for n in (3, 1))
    assert one == other
    assert all(c["seconds"] > 0 and ("own_loss" in c) for row in rows(tmp_path / "3") for c in row["clients"]) or "blind" in more


@pytest.mark.parametrize("more", ["partition=dirichlet clients=4", "recipe.deadline=100"])
def test_clients_that_differ_or_have_a_deadline_train_one_by_one_and_a_line_says_so(home, tmp_path, capsys, more):
    (_, found), (_, expected) = (by_loop(home, tmp_path / str(n), more, f"together={n}") for n in (3, 1))
    assert equal(found, expected)
    why = "recipe.deadline is of a client's own time" if "deadline" in more else "no neighbours have as many images each"
    assert f"clients train one by one all the same, for {why}" in capsys.readouterr().out


def test_a_cohort_is_cut_where_clients_differ_and_in_its_order(home, tmp_path):
    config = load(settings(home, tmp_path, "clients=7 data.train=205"))
    clients = [loop.local.open_client(config, i, 7) for i in range(7)]  # 30 images, from client 2 on 29
    assert list(together.companies(clients, range(7), 3)) == [[0, 1], [2, 3, 4], [5, 6]]
    assert list(together.companies(clients, [0, 2, 6], 8)) == [[0], [2, 6]]
    assert list(together.companies(clients, range(3), 1)) == [[0], [1], [2]]


def test_ones_own_way_to_train_is_taken_one_by_one(home, tmp_path):
    seen = []

    def train(client, *orders):
        seen.append(client.index)
        return loop.local.train(client, *orders)

    _, found = by_loop(home, tmp_path / "a", "together=3", train=train)
    assert seen == [0, 1, 2, 0, 1, 2] and equal(found, by_loop(home, tmp_path / "b")[1])


def test_what_cannot_be_is_one_line_before_anybody_trains(home, tmp_path):
    with pytest.raises(WeightsError, match="set together=1"):
        by_loop(home, tmp_path, "method=ravan together=2")
    with pytest.raises(ConfigError, match="together needs the lean step, got together=2 and step=plain"):
        load("together=2 step=plain")
    assert not list(tmp_path.glob("*/rounds.jsonl"))
