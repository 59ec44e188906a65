"""What a client leaves in a run's folder on its own machine, for its owner to look at."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

from clients.local import Client
from fl import durable, keys
from fl.config import build
from fl.datasets.images import resize, save_rows


def keepsakes(client: Client, folder: Path) -> None:
    """Write what only a client knows: ``preview.png``, eight images plain above encrypted, ``split.json``, ``classes.json``.

    The picture is encrypted with a key made for it and forgotten: a plain and an encrypted image together give the key. Where
    pictures lie encrypted on the disk, no plain one is put there. Who holds a part of the source alone knows no whole split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    side, block = client.config.model["image"], client.config.model["patch"]
    if not client.holdings.encrypted:
        images = resize(client.plain.images[:8], side)
        throwaway = build(client.config.cipher, key=keys.SharedKey(secrets.token_bytes(32)), block=block)
        save_rows([images, throwaway.encrypt(images)], folder / "preview.png", zoom=max(1, 96 // side))
    if client.holdings.split:
        client.holdings.split.save(folder / "split.json")
    durable.write(folder / "classes.json", json.dumps(client.holdings.classes))
