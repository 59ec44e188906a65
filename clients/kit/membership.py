"""Ask a SuperLink whether it knows a node's key, as the SuperNode itself will ask when it starts.

Flower refuses a key that is not registered when the node activates: HTTP 412, code 2004. This is the kit's edge to Flower.
"""

from __future__ import annotations

from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from clients.kit import KitError

SECONDS = 10.0  # Flower's least; after them the SuperLink takes the node for gone, should this process die in between


def node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A node's private key. Raises KitError."""
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError) as error:
        raise KitError(f"a node's key must be an OpenSSH private key, and {path.name} is not ({error})") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise KitError(f"a node's key must be an EC key, and {path.name} is another; take the one that `veilora deploy init` made")
    return key


def join(superlink: str, root: Path, key: ec.EllipticCurvePrivateKey) -> int:
    """Activate the node of ``key`` for a moment. Returns its id.

    Raises KitError, one line, when the SuperLink refuses: the key is not registered, or a SuperNode holds it now; or when
    the clocks are too far apart.
    """
    edge = [RuntimeVersionHttpInterceptor(component_name="SuperNode"), NodeAuthHttpInterceptor(key, key.public_key())]
    request = ActivateNodeRequest(public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=SECONDS)
    try:
        with FleetHttpClient.from_server_address(superlink, False, root.read_bytes(), interceptors=edge) as client:
            node = client.ActivateNode(request).node_id
            client.DeactivateNode(DeactivateNodeRequest(node_id=node))
            return node
    except httpx.HTTPStatusError as error:
        raise KitError(_refusal(error.response.status_code)) from None
    except (httpx.HTTPError, OSError, ValueError, SystemExit) as error:  # flwr ends the process where versions do not go together
        raise KitError(f"the SuperLink must answer, and did not ({error})") from None


def _refusal(status: int) -> str:
    if status == 412:
        return "this node's key is not registered there, or a SuperNode with it runs already"
    if status == 401:
        return "the SuperLink does not take this node's signature; its clock is more than 5 s ahead or 5 min behind"
    return f"the SuperLink answered {status}; {'is that the port of its proxy?' if status in (404, 405) else 'see its log'}"
