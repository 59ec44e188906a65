"""The roll call before round 1: do all clients hold the same key, backbone, classes, split, code and config?

Frozen weights never travel, so a client that differs would spoil the model without a word. Its answers are facts, not
secrets: the key's fingerprint is one-way.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, Mapping, NamedTuple, Sequence

from pydantic import TypeAdapter, ValidationError

MUST_AGREE = {
    "code": "runs another version of the code",
    "config": "composed another config",
    "key": "holds another key",
    "seal": "holds another seal key",
    "classes": "has other classes",
    "backbone": "has another backbone",
    "split": "cut the data otherwise",
    "start": "starts from another adapter",
}


class RollCallError(RuntimeError):
    """Clients that cannot work together, or a client that cannot work; one line that names it."""


class Roll(NamedTuple):
    """One client's answer. ``digests`` has the names of ``MUST_AGREE``; ``full_bytes`` is a full model's float32 message.

    ``rank`` is that of its LoRA factors, None for a method without. ``train`` and ``evaluate`` are numbers of images, None
    where the server is not to know them; then ``faults`` says that there are such images, and not how many. ``signer`` is the
    node's public key, one OpenSSH line, "" for a node that signs nothing. ``policy`` is the digest of what the node's owner
    lets in, "" in a simulation. ``kept`` says whether what a client leaves for its owner could be written.
    """

    client: int
    of: int
    digests: Mapping[str, str]
    train: int | None
    evaluate: int | None
    trained: int
    full_bytes: int
    faults: Mapping[str, int | bool]
    machine: str
    rank: int | None = None
    signer: str = ""
    policy: str = ""
    kept: bool = True

    @property
    def epoch(self) -> int:
        """Of the seal key, as its fingerprint names it; 0 where the run needs none."""
        return int(self.digests["seal"].partition("-")[0] or 0)


def roll_in(facts: Mapping[str, Any]) -> Roll:
    """The roll in an answer's ``facts``, each of its type. Raises ValueError, in one line, for whatever is not."""
    try:
        roll = CHECKED.validate_python(dict(facts), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    numbers = {n: v for n, v in roll._asdict().items() if isinstance(v, int)} | dict(roll.faults)
    short = [name for name, value in numbers.items() if not 0 <= value < 2**53]
    missing = [name for name in MUST_AGREE if name not in roll.digests]
    if short or missing:
        raise ValueError(f"{', '.join(short or missing)} must be {'a number of things' if short else 'among the digests'}")
    if not re.fullmatch(r"|[0-9]{1,15}-[0-9a-f]{16}", roll.digests["seal"]):
        raise ValueError("digests.seal must be a seal key's epoch and fingerprint")
    if set(roll.policy) - set("0123456789abcdef") or len(roll.policy) > 64:
        raise ValueError("policy must be a digest")
    return roll._replace(machine=roll.machine[:200])


FEW = 100  # images, below which one clear update tells almost surely whether an image was among them (simulations/results/leakage)
CHECKED = TypeAdapter(Roll)


def agree(rolls: Sequence[Roll], own_code: str) -> None:
    """Raise RollCallError unless all clients are there once and agree with each other, and on the code with the server."""
    numbers = Counter(roll.client for roll in rolls)
    expected = rolls[0].of
    for roll in rolls:
        if roll.of != expected:
            raise RollCallError(f"client {roll.client} was told of {roll.of} clients, the others of {expected}; set num-partitions alike")
        if numbers[roll.client] > 1:
            raise RollCallError(f"two nodes are client {roll.client}; give each its own partition-id")
    missing = sorted(set(range(expected)) - set(numbers))
    if missing:
        raise RollCallError(f"{expected} clients must answer, but there is no client {', '.join(map(str, missing))}")
    for roll in rolls:
        if roll.digests["code"] != own_code:
            raise RollCallError(
                f"client {roll.client} runs another version of the code ({roll.digests['code']}) than the server ({own_code}); "
                "install the same commit on every machine, and start no engine inside another checkout"
            )
    for name, says in MUST_AGREE.items():
        votes = Counter(roll.digests[name] for roll in rolls)
        usual = votes.most_common(1)[0][0]
        for roll in rolls:
            if roll.digests[name] != usual:
                raise RollCallError(
                    f"client {roll.client} {says} ({roll.digests[name]}) than the other clients ({usual}); "
                    f"give it the same {FILES.get(name, name)} and start again"
                )


def seal_key(rolls: Sequence[Roll]) -> str:
    """The fingerprint of the key that a secure run's masks come from, which all have alike."""
    return rolls[0].digests["seal"]


FILES = {"key": "key file", "seal": "seal key (veilora key share)"}
LASTING = ("key", "seal", "backbone", "classes", "split", "start")  # what a run has from its first round to its last


def federation(rolls: Sequence[Roll]) -> dict[str, Any]:
    """What must be the same of the clients when a run is resumed."""
    clients = {str(roll.client): [roll.train, roll.evaluate, roll.rank] for roll in rolls}
    signers = {str(roll.client): roll.signer for roll in rolls if roll.signer}
    return {"clients": len(rolls), **{name: rolls[0].digests[name] for name in LASTING}, "images and ranks": clients, "signers": signers}


def same(kept: Mapping[str, Any], rolls: Sequence[Roll]) -> None:
    """Raise RollCallError, with what differs, unless these are the clients that the run began with."""
    now = federation(rolls)
    if kept.get("seal", "") != now["seal"]:
        says = f"this run began with the seal key {kept.get('seal', '')}, and the clients' is {now['seal']}"
        raise RollCallError(f"{says}: a run has ended since; start it anew")
    differ = [f"{name} was {kept.get(name)}, now {now[name]}"[:200] for name in now if name != "seal" and kept.get(name) != now[name]]
    if differ:
        raise RollCallError(f"a run is resumed by the federation that it began with, but {'; '.join(differ)}")


def remarks(rolls: Sequence[Roll]) -> list[str]:
    """What a person should know before round 1: on what the clients work, and which images were not as they should be."""
    machines = Counter(roll.machine for roll in rolls)
    lines = ["clients work with " + ", ".join(f"{machine} ({n})" for machine, n in sorted(machines.items()))]
    lines += [f"policy {policy} is in force at {n} of {len(rolls)} clients" for policy, n in sorted(policies(rolls).items())]
    lines += [f"client {roll.client} could not write its preview and class list; its log says why" for roll in rolls if not roll.kept]
    lines += [f"data: {'some' if count is True else count} images {name}" for name, count in faults(rolls).items()]
    few = [str(roll.client) for roll in rolls if roll.train is not None and roll.train < FEW]
    if few:
        whose = f"{len(few)} clients" if len(few) > 10 else f"client{'s' * (len(few) > 1)} {', '.join(few)}"
        lines.append(f"privacy: {whose} of fewer than {FEW} images each: in clear the server can tell which images they trained on; set blind=true")
    return lines


def policies(rolls: Sequence[Roll]) -> dict[str, int]:
    """How many clients stand under which policy; in a simulation none does."""
    return dict(Counter(roll.policy for roll in rolls if roll.policy))


def faults(rolls: Sequence[Roll]) -> dict[str, int | bool]:
    """Images that were not as they should be, by kind: once where all read one source, named where each has its own."""
    if all(roll.faults == rolls[0].faults for roll in rolls):
        return dict(rolls[0].faults)
    return {f"{name} (client {roll.client})": count for roll in rolls for name, count in roll.faults.items()}


def summary(rolls: Sequence[Roll]) -> dict[str, Any]:
    """What the run's summary keeps of the roll call."""
    return {
        "clients": len(rolls),
        "train_examples": sum(roll.train or 0 for roll in rolls) or None,
        "examples": sum(roll.evaluate or 0 for roll in rolls) or None,
        "trained_parameters": rolls[0].trained,
        "key_fingerprint": rolls[0].digests["key"],
        "backbone": rolls[0].digests["backbone"],
        "faults": faults(rolls),
        "policies": policies(rolls),
        "machines": sorted({roll.machine for roll in rolls}),
        "ranks": sorted({roll.rank for roll in rolls if roll.rank}),
    }
