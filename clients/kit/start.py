"""The texts that start an engine: one `start` file a machine, which systemd, a container and a person at a terminal all run.

`engine.env` is the engine's own; `node.toml` is what the ClientApp reads as its node config. No text holds a secret: keys are files.
"""

ENGINE = """\
# Read by ./start and by `veilora doctor`. No secret stands here: keys are files.
FLWR_HOME=@var@/flwr
FLWR_TELEMETRY_ENABLED=0
FLWR_DISABLE_UPDATE_CHECK=1
FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
PYTHONUNBUFFERED=1
"""

COORDINATOR_ENV = ENGINE + """\
VEILORA_ROLE=coordinator
VEILORA_NODES=@nodes@
# Where nodes come in (proxy.conf), and the SuperLink behind it, which listens on this machine's loopback alone.
VEILORA_PUBLIC=@public@
VEILORA_PORT=@superlink_port@
# Registrations and runs. Empty: in memory, and a restart forgets every node.
VEILORA_DATABASE=@database@
VEILORA_STATE=@var@
# Where runs leave their record.
VEILORA_OUTPUT=@var@/runs
"""

NODE_ENV = ENGINE + """\
VEILORA_ROLE=node
VEILORA_SUPERLINK=@public@
# The SuperNode's own port, on this machine's loopback alone.
VEILORA_PORT=@node_port@
"""

NODE_TOML = """\
# What is this machine's own: the ClientApp's node config. It comes before the run's config. Paths are absolute; no run may set one.
partition-id = @index@
num-partitions = @nodes@
key-path = "@key@"                  # may be a credential: /run/credentials/<unit>/image.key
seal-key-path = "@var@/seal.key"    # in a folder that the service may write, for it steps when a run ends
state-path = "@var@/state"
output-path = "@var@/runs"          # what a run leaves here for this machine's owner
node-key-path = "@home@/node.key"   # with it this node signs the record of a run
device = "@device@"
@data@
# partition-path = "/data/mine"      # in data-path's place: this client's pictures alone, as `veilora partition` wrote them
@weights@
# rank = 2                          # a machine too small for the run's rank
"""

COORDINATOR_START = """\
#!/bin/sh
# Starts the SuperLink. It listens on loopback alone: all but /v1/fleet lets anyone run code, and proxy.conf lets in that alone.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
set -a; . "$here/engine.env"; set +a
umask 077
mkdir -p "$FLWR_HOME"
cd "$FLWR_HOME"
exec flower-superlink --host 127.0.0.1 --port "$VEILORA_PORT" --enable-supernode-auth \\
    --ssl-ca-certfile "$here/ca.crt" --ssl-certfile "$here/server.pem" --ssl-keyfile "$here/server.key" \\
    ${VEILORA_DATABASE:+--database "$VEILORA_DATABASE"} --disable-runtime-dependency-installation
"""

NODE_START = """\
#!/bin/sh
# Starts this machine's SuperNode and the process that its ClientApps are forked from.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
set -a; . "$here/engine.env"; set +a
umask 077
mkdir -p "$FLWR_HOME"
cd "$FLWR_HOME"
exec python3 -P -m clients.node --policy "$here/policy.toml" --superlink "$VEILORA_SUPERLINK" --root-certificates "$here/ca.crt" \\
    --auth-supernode-private-key "$here/node.key" --host 127.0.0.1 --port "$VEILORA_PORT" \\
    --node-config "$here/node.toml"
"""

OPERATOR = """\
# The operator's `flwr` on the coordinator itself: FLWR_HOME is this file's folder.
[superlink]
default = "veilora"

[superlink.veilora]
address = "127.0.0.1:@superlink_port@"
root-certificates = "@home@/ca.crt"
"""
