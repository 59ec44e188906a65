"""Processes of this machine under users of their own, as the roles of a deployment are on machines of their own.

A user is a number that need not stand in /etc/passwd. Where the way to Python or to this checkout leads through a folder that
is closed to others, the process gets a view of its own: there an empty folder stands, and in it, read-only, what is needed.
Nothing on the machine is changed, and no permission of a file that is shown is either.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Iterator, Sequence

from fl.provenance import ROOT

FIRST = 61000  # the coordinator's number; then the proxy's, then the nodes'
TOOLS = ("unshare", "setpriv", "mount")


def lacking() -> str:
    """The first thing that is missing to run processes under other users; empty where nothing is."""
    if os.geteuid():
        return "only root may start processes of other users"
    if absent := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"{', '.join(absent)} of util-linux must be on PATH"
    if subprocess.run(["unshare", "--mount", "--propagation", "private", "true"], capture_output=True).returncode:
        return "this container gives no mount namespace"
    return ""


def command(words: Sequence[str], user: int, groups: Sequence[int], scratch: Path, folder: Path) -> list[str]:
    """``words`` as ``user`` runs them, with no privilege, in a group of his own and in ``groups``, seeing ``folder`` and Python.

    ``scratch`` is an empty folder in ``folder``, on which the view is put together.
    """
    more = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
    bare = ["setpriv", f"--reuid={user}", f"--regid={user}", more, "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--", *words]
    view = [*mounts([folder, *needed()], folder, scratch), 'cd "$PWD"', 'exec "$@"']
    return bare if len(view) == 2 else ["unshare", "--mount", "--propagation", "private", "sh", "-euc", "\n".join(view), "sh", *bare]


def environment(user: int, home: Path) -> dict[str, str]:
    """The environment of a service's process: nothing of that of whoever starts it."""
    path = os.pathsep.join((str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin"))
    return {"PATH": path, "HOME": str(home), "USER": str(user), "LOGNAME": str(user), "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1"}


def owned(path: Path, user: int, group: int | None = None, mode: int | None = None) -> None:
    """Give ``path`` to ``user`` and ``group``, the user's own unless told, with ``mode`` if given."""
    os.chown(path, user, user if group is None else group)
    if mode is not None:
        path.chmod(mode)


def needed() -> list[Path]:
    """Where Python, its packages and this checkout lie."""
    given = [Path(place) for place in (sys.base_prefix, sys.prefix, ROOT, *sys.path) if place and Path(place).is_dir()]
    return list(dict.fromkeys(form for place in given for form in (place.absolute(), place.resolve())))


def mounts(places: Sequence[Path], writable: Path, scratch: Path) -> Iterator[str]:
    """Shell lines that, in a mount namespace, open the way to ``places`` and to nothing else behind the same closed folder."""
    behind: dict[Path, list[Path]] = {}
    for place in places:
        if (gate := closed(place)) is not None:
            behind.setdefault(gate, []).extend(sorted(place.iterdir()) if gate == place else [place])
    for gate, found in behind.items():
        yield f"mount -t tmpfs -o mode=0755,size=4m tmpfs {shlex.quote(str(scratch))}"
        for place in (p for p in dict.fromkeys(found) if not any(q in p.parents for q in found)):
            there = shlex.quote(str(scratch / place.relative_to(gate)))
            yield f"mkdir -p {there}" if place.is_dir() else f"mkdir -p $(dirname {there}); : > {there}"
            yield f"mount --rbind {shlex.quote(str(place))} {there}"
            if place != writable:
                yield f"mount -o remount,bind,ro {there}"
        yield f"mount --move {shlex.quote(str(scratch))} {shlex.quote(str(gate))}"


def closed(place: Path) -> Path | None:
    """The first folder on the way to ``place``, itself included, that others may not pass; None for an open way."""
    return next((folder for folder in (*reversed(place.parents), place) if not folder.stat().st_mode & 0o001), None)
