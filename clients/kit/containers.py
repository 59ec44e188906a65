"""The container files. The folder is mounted where it would stand without containers, so `start` and proxy.conf are the same.

No key is in an image: folder and key file are mounted, read-only, for the user of the service. A tag may come to mean another
image, so both images can be named by their digest: VEILORA_NGINX in compose.yaml, PYTHON in the Containerfile.
"""

CONTAINERFILE = """\
# Build in a checkout of VeiLoRA, once for each machine:  docker build -t veilora:@version@ -f @home@/Containerfile CHECKOUT
# For an image that is the same each time, name Python's by its digest and the packages by their hashes:
#   --build-arg PYTHON=docker.io/library/python@sha256:...     as `docker buildx imagetools inspect` tells it of the tag below
#   --build-arg LOCK=requirements.txt                          in the checkout: uv pip compile --generate-hashes --extra node pyproject.toml
# torch comes as pip resolves it; for a CPU alone pass --build-arg INDEX=https://download.pytorch.org/whl/cpu
ARG PYTHON=docker.io/library/python:3.12-slim
FROM ${PYTHON}
ARG INDEX=
ARG LOCK=
COPY . /opt/veilora/source
RUN if [ -n "$LOCK" ]; then \\
        pip install --no-cache-dir ${INDEX:+--extra-index-url "$INDEX"} --require-hashes -r "/opt/veilora/source/$LOCK" \\
        && pip install --no-cache-dir --no-deps /opt/veilora/source; \\
    else pip install --no-cache-dir ${INDEX:+--extra-index-url "$INDEX"} "/opt/veilora/source[node]"; fi
"""

CONFINED = """\
    restart: unless-stopped
    read_only: true
    tmpfs: ["/tmp"]
    cap_drop: ["ALL"]
    security_opt: ["no-new-privileges:true"]
    ulimits: {core: 0}
    mem_limit: "${VEILORA_MEMORY:-16g}"       # the two alike: nothing in memory goes to a swap file
    memswap_limit: "${VEILORA_MEMORY:-16g}"
"""

SERVICE = """\
    image: veilora:@version@
    user: "${VEILORA_USER:-1000:1000}"      # the service's user and group, which may read @secret@
    command: ["@home@/start"]
    init: true
""" + CONFINED

COORDINATOR = """\
# docker compose up -d, in this folder. The proxy shares the SuperLink's loopback; only the proxy's port is published.
services:
  superlink:
""" + SERVICE.replace("@secret@", "server.key") + """\
    ports: ["@port@:@port@"]
    environment: {HOME: "@var@"}
    volumes:
      - ".:@home@:ro"
      - "@var@:@var@"
  proxy:
    image: "${VEILORA_NGINX:-docker.io/library/nginx:1.28}"       # or by its digest: docker.io/library/nginx@sha256:...
    user: "${VEILORA_USER:-1000:1000}"
    command: ["nginx", "-e", "stderr", "-p", "/tmp", "-c", "@home@/nginx.conf"]
    network_mode: "service:superlink"
""" + CONFINED + """\
    volumes:
      - ".:@home@:ro"
"""

# A compose file cannot say whom a container may talk to: that is the machine's packet filter's to say.
NODE = """\
# docker compose up -d, in this folder.@gpu_note@
# It needs to reach @public@ and nothing else. Compose cannot forbid the rest; let the machine's packet filter do so, as with
#   nft insert rule ip filter DOCKER-USER oifname != "docker0" ip daddr != COORDINATOR ct state new drop
services:
  supernode:
""" + SERVICE.replace("@secret@", "node.key and the image key") + """\
    environment: {HOME: "@var@"}
@gpus@    volumes:
      - ".:@home@:ro"
      - "@key@:@key@:ro"
@mounts@      - "@var@:@var@"
"""
