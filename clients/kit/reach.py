"""What a node sees of the coordinator over the network: its certificate, its clock, and which of its doors are open."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from email.utils import parsedate_to_datetime
from typing import NamedTuple

from clients.kit import KitError, certificates

PATIENCE = 10.0  # seconds
AHEAD, BEHIND = 5, 300  # seconds that Flower lets a node's clock be ahead of, or behind the SuperLink's
DOORS = ("/openapi.json", "/docs", "/health", "/v1/control/list-runs", "/v1/runtime/acquire-task")


class Seen(NamedTuple):
    """``wrong``: what is wrong with the certificate; ``ahead``: seconds that this clock is ahead, None where nothing can be
    said; ``open``: paths that a proxy must refuse and this one does not."""

    wrong: list[str]
    ahead: float | None
    open: list[str]


def address(text: str) -> tuple[str, int]:
    """Host and port of ``host:port``, the host without brackets. Raises KitError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise KitError(f"an address must be host:port, got {text!r}")
    return host.strip("[]"), int(port)


def look(host: str, port: int, root: bytes) -> Seen:
    """Look at the server at ``host``:``port`` from here, with ``root`` (PEM) as the only authority. Raises KitError."""
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE  # to see a bad certificate, too; nothing is said through it
    try:
        with socket.create_connection((host, port), PATIENCE) as plain, blind.wrap_socket(plain, server_hostname=host) as line:
            shown = ssl.DER_cert_to_PEM_cert(line.getpeercert(binary_form=True)).encode()
    except ssl.SSLError as error:
        raise KitError(f"{host}:{port} must speak TLS, and does not ({error.reason})") from None
    except OSError as error:
        raise KitError(f"{host}:{port} cannot be reached ({error.strerror or error}); see address, firewall and whether the proxy runs") from None
    if wrong := certificates.check(shown, root, [host]):
        fatal = [line for line in wrong if not line.startswith("expires within")]
        return Seen(wrong, *(ask(host, port, root) if not fatal else (None, [])))
    return Seen([], *ask(host, port, root))


def ask(host: str, port: int, root: bytes) -> tuple[float | None, list[str]]:
    """How far this clock is ahead, and the doors that are open, over TLS verified as the SuperNode does. Raises KitError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=root.decode("ascii"))
    line, ahead, opened = http.client.HTTPSConnection(host, port, timeout=PATIENCE, context=context), None, []
    try:
        for path in DOORS:
            line.request("GET", path)  # where a door is open but wants a POST the answer is 405, and nothing happens
            answer = line.getresponse()
            answer.read()
            if (date := answer.getheader("Date")) and ahead is None:
                ahead = time.time() - parsedate_to_datetime(date).timestamp() - 0.5  # the header has whole seconds
            if answer.status not in (403, 404):
                opened.append(path)
    except ssl.SSLCertVerificationError as error:
        raise KitError(f"the certificate of {host}:{port} is refused: {error.verify_message}") from None
    except (OSError, http.client.HTTPException) as error:
        raise KitError(f"{host}:{port} must answer HTTP, and did not ({error})") from None
    finally:
        line.close()
    return ahead, opened
