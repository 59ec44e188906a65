"""The container files. The folder is mounted where it would stand without containers, so `start` and proxy.conf are the same.

No key is in an image: folder and key file are mounted, read-only, for the user who owns them.
"""

CONTAINERFILE = """\
# Build in a checkout of VeiLoRA, once for each machine:  docker build -t veilora:@version@ -f @home@/Containerfile CHECKOUT
# torch comes as pip resolves it; for a CPU alone pass --build-arg INDEX=https://download.pytorch.org/whl/cpu
FROM docker.io/library/python:3.12-slim
ARG INDEX=
COPY . /opt/veilora/source
RUN pip install --no-cache-dir ${INDEX:+--extra-index-url "$INDEX"} "/opt/veilora/source[node]"
"""

SERVICE = """\
    image: veilora:@version@
    user: "${VEILORA_USER:-1000:1000}"      # who owns this folder: @owner@
    command: ["@home@/start"]
    restart: unless-stopped
    init: true
    read_only: true
    tmpfs: ["/tmp"]
    cap_drop: ["ALL"]
    security_opt: ["no-new-privileges:true"]
"""

COORDINATOR = """\
# docker compose up -d, in this folder. The proxy shares the SuperLink's loopback; only the proxy's port is published.
services:
  superlink:
""" + SERVICE.replace("@owner@", "ca.crt, server.key, ...") + """\
    ports: ["@port@:@port@"]
    environment: {HOME: "@var@"}
    volumes:
      - ".:@home@:ro"
      - "@var@:@var@"
  proxy:
    image: docker.io/library/nginx:1.28
    user: "${VEILORA_USER:-1000:1000}"
    command: ["nginx", "-e", "stderr", "-p", "/tmp", "-c", "@home@/nginx.conf"]
    network_mode: "service:superlink"
    restart: unless-stopped
    read_only: true
    tmpfs: ["/tmp"]
    cap_drop: ["ALL"]
    security_opt: ["no-new-privileges:true"]
    volumes:
      - ".:@home@:ro"
"""

NODE = """\
# docker compose up -d, in this folder.@gpu_note@
services:
  supernode:
""" + SERVICE.replace("@owner@", "node.key; the image key, too") + """\
    environment: {HOME: "@var@"}
@gpus@    volumes:
      - ".:@home@:ro"
      - "@key@:@key@:ro"
@mounts@      - "@var@:@var@"
"""
