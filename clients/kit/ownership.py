"""The owners of what a node stands on: the service must be able to write neither the code that it runs nor the policy over it."""

from __future__ import annotations

import grp
import os
import pwd
import stat
import sys
from pathlib import Path
from typing import Iterator, Mapping, NamedTuple

from clients.kit import Finding
from fl.provenance import ROOT

SERVICE = "veilora"     # the user whom the unit names


class User(NamedTuple):
    """A user of this machine."""

    name: str
    uid: int
    groups: frozenset[int]


def service() -> User:
    """The user that the node runs as: who asks, and where that is root the unit's user, if there is one."""
    try:
        entry = pwd.getpwnam(SERVICE) if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    except KeyError:
        return User(str(os.geteuid()), os.geteuid(), frozenset(os.getgroups()))
    return User(entry.pw_name, entry.pw_uid, frozenset(os.getgrouplist(entry.pw_name, entry.pw_gid)))


def ownership(folder: Path, key: str, policy: Path, user: User | None = None) -> Iterator[Finding]:
    """Findings on the environment, the code, the node's ``folder``, the ``policy`` and the image ``key``."""
    user = user or service()
    if user.uid == 0:
        yield Finding("owners", True, f"this is root, and there is no user {SERVICE}: run me as the service's user to see what it could write")
        return
    places = {"environment": Path(sys.prefix), "code": ROOT / "clients", "folder": folder, "policy.toml": policy, "image key": Path(key).expanduser()}
    found = {name: writable(place, user) for name, place in places.items()}
    says = ", ".join(f"{name} {owner(place)}" for name, place in places.items())
    mine = [f"{name} ({where})" for name, where in found.items() if where and name != "image key"]
    do = "chown them to root, and take away group's and others' right to write: chmod go-w"
    yield Finding("owners", not mine, f"{says}; {user.name} could write {', '.join(mine) or 'none of what it runs by'}", do if mine else "")


def writable(place: Path, user: User) -> Path | None:
    """The path that lets ``user`` change ``place``: itself, or the nearest folder on the way that he could put another in; None if nothing does.

    A folder with the sticky bit lets nobody replace what is another's.
    """
    below = None
    for step in (p for p in (place.resolve(), *place.resolve().parents) if p.exists() or p.parent == p):
        state = step.stat()
        kept = state.st_mode & stat.S_ISVTX and below is not None and user.uid not in (below.st_uid, state.st_uid)
        if _may_write(state, user) and not kept:
            return step
        below = state
    return None


def owner(place: Path) -> str:
    """Owner, group and mode, as `ls` has them."""
    try:
        state = place.stat()
    except OSError as error:
        return f"({error.strerror})"
    return f"{_name(pwd.getpwuid, state.st_uid)}:{_name(grp.getgrgid, state.st_gid)} {stat.S_IMODE(state.st_mode):04o}"


def _may_write(state: os.stat_result, user: User) -> bool:
    if state.st_uid == user.uid:
        return True  # what he owns he can make writable
    return bool(state.st_mode & (stat.S_IWGRP if state.st_gid in user.groups else stat.S_IWOTH))


def _name(look: Mapping | object, number: int) -> str:
    try:
        return look(number)[0]
    except KeyError:
        return str(number)
