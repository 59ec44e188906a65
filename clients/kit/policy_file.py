"""The text of a node's `policy.toml`: what it says is what holds without it, written out so that an owner can change it."""

from __future__ import annotations

import json

from clients.policy import ALLOWED, LINEAR
from fl.overrides import options

TEMPLATE = """\
# What the owner of this node lets a coordinator ask. Root owns this file, and the service can only read it.
# It is read for each message. What is not said here is strict; a name that is not known is an error, and nothing is let in.
# Try it: veilora policy check policy.toml blind=true experiment=...

[code]
mode = "installed"          # a run's code must be what is installed here | "signed": and that a release signed by one of
signers = []                # these Ed25519 public keys, in base64, as `veilora release sign` prints them
signature = ""              # the release's signature, an absolute path

[run]
secure_aggregation = {secure}   # true: no run in which the server can read an update
start = "keyed"             # "public" lets both, and its updates in clear give the server the key
cipher = "pixel_shuffle"
methods = {methods}
strategies = {strategies}
optimizers = ["adamw", "sgd"]
lr = {{max = 0.1}}            # the largest peak of any group
batch = {{min = 16}}          # images
epochs = {{max = 5}}          # of a round
deadline = {{min = 60}}       # seconds, where a run has a deadline
members = {{min = 3}}         # clients in a sum that this node opens
quorum = {{min = 0.5}}        # share of those asked, at least, of whom numbers are told; 1: who subtracts lists learns nothing
rounds = {{max = 500}}
approve = "any"             # or a list of runs' names, and of configs' digests as `veilora policy check` prints them

[overrides]                 # the settings that a run's words may name; this machine's own places never, whatever stands here
allow = [
{allow}
]

[tell]                      # decimals, at most, of the numbers that leave
loss = 2
accuracy = 3
"""


def text(secure: bool) -> str:
    """The strict policy; with ``secure`` false one that lets a server read each update, too."""
    names = [json.dumps(name) for name in ALLOWED]
    return TEMPLATE.format(
        secure=json.dumps(secure),
        methods=json.dumps(options("method")),
        strategies=json.dumps(LINEAR if secure else options("strategy")),
        allow="\n".join(f"    {', '.join(names[i : i + 6])}," for i in range(0, len(names), 6)),
    )
