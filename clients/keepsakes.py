"""The files that a client leaves in a run's folder on its own machine, for its owner to look at.

None of it is needed for the run, so what cannot be written is said in the client's log, and its answer says no more than that.
"""

from __future__ import annotations

import json
import logging
import secrets
from pathlib import Path

from clients.local import Client
from fl import durable, keys
from fl.adapter import Adapter, save
from fl.config import build
from fl.datasets.images import resize, save_rows

log = logging.getLogger("veilora.client")


def keepsakes(client: Client, folder: Path) -> bool:
    """Write what only a client knows: ``preview.png``, eight images plain above encrypted, ``split.json``, ``classes.json``. Returns
    whether it could be written.

    The picture is encrypted with a key made for it and forgotten: a plain and an encrypted image together give the key. Where
    pictures lie encrypted on the disk, no plain one is put there. Who holds a part of the source alone knows no whole split.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        side, block = client.config.model["image"], client.config.model["patch"]
        if not client.holdings.encrypted:
            images = resize(client.plain.images[:8], side)
            throwaway = build(client.config.cipher, key=keys.SharedKey(secrets.token_bytes(32)), block=block)
            save_rows([images, throwaway.encrypt(images)], folder / "preview.png", zoom=max(1, 96 // side))
        if client.holdings.split:
            client.holdings.split.save(folder / "split.json")
        durable.write(folder / "classes.json", json.dumps(client.holdings.classes))
    except OSError as error:
        log.error("the run's keepsakes cannot be written: %s; set output-path to a folder that this user may write", error)
        return False
    return True


def final(client: Client, run: str, adapter: Adapter) -> bool:
    """Write the ``adapter`` that ``run`` ended with, once and for all, and return whether it is there.

    One that stands there is the owner's and stays, whatever the server says: it is never overwritten.
    """
    path = Path(client.config.output).expanduser() / client.drawer(run).folder.parent.name / "adapter.safetensors"  # which checks the name
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            save(adapter, path)
    except OSError as error:
        log.error("the run's adapter cannot be written: %s; set output-path to a folder that this user may write", error)
        return False
    return True
