"""The README that lies in each folder of a deployment: the exact commands, in order."""

SOFTWARE = """\
1. Software (Python 3.11 or newer, no Ray)
     useradd --system --home-dir @var@ veilora
     python3 -m venv @venv@ && git clone REPOSITORY @venv@/source && @venv@/bin/pip install "@venv@/source[node]"
     install -d -o veilora -m 0700 @var@
     chown -R veilora: @home@
   In containers: docker build -t veilora:@version@ -f @home@/Containerfile CHECKOUT
"""

COORDINATOR = """\
The coordinator of a VeiLoRA federation of @nodes@ nodes. Nodes come in at @public@, by TLS, each with a key of its own.
This folder belongs at @home@. The image key belongs on no coordinator, and ca.key neither.

""" + SOFTWARE + """
2. Look
     sudo -u veilora @venv@/bin/veilora doctor @home@
3. Start
     systemctl enable --now @home@/superlink.service
     ln -s @home@/proxy.conf /etc/nginx/conf.d/veilora.conf && nginx -t && systemctl reload nginx
   In containers: VEILORA_USER=$(id -u veilora):$(id -g veilora) docker compose up -d
   The SuperLink listens on loopback; never open its port @superlink_port@: through it anyone may run code here and on the nodes,
   and so may anyone with a login on this machine: give none to others.
4. Register the nodes, once
     export FLWR_HOME=@home@/operator PATH=@venv@/bin:$PATH
@register@
5. Run
     flwr run @venv@/source veilora --stream --run-config 'overrides="clients=@nodes@ output=@var@/runs quorum=0.6 retries=3 timeout=600 experiment=..."'
     flwr list veilora          # how it ended: `flwr run --stream` returns 0 for a failed run, too
     veilora report @var@/runs/RUN; and if it broke off: veilora resume --show @var@/runs/RUN
   In containers 4 and 5 run inside: docker compose exec superlink sh
     cp -r @home@/operator /tmp && export FLWR_HOME=/tmp/operator        # the checkout is /opt/veilora/source
6. Each year, on the machine that holds ca/ca.key
     veilora deploy renew FOLDER          # then copy coordinator/server.pem and server.key here and reload nginx
     systemctl restart superlink
"""

NODE = """\
Node @index@ of @nodes@ of a VeiLoRA federation. It calls the coordinator at @public@ and opens no port but on its loopback.
This folder belongs at @home@.

""" + SOFTWARE + """
2. The image key: one file for all nodes, made on one node (@venv@/bin/veilora keygen KEY), carried by hand, never to the coordinator
     install -o veilora -m 0600 KEY @key@
3. What is this machine's own: node.toml (data-path or partition-path, weights-path, device). Pictures that are nobody else's:
     @venv@/bin/veilora partition /data/mine --index @index@ --of @nodes@ --own --encrypt key=@key@ data=folder data.root=PICTURES experiment=...
     chown -R veilora: /data/mine       # a sub-folder for each class of all nodes, one without pictures, too; the experiment is the run's
4. Look
     sudo -u veilora @venv@/bin/veilora doctor @home@
5. Start
     systemctl enable --now @home@/supernode.service
   Two processes last: the SuperNode, and the one that has torch imported, from which a ClientApp is forked for each message.
   In containers: VEILORA_USER=$(id -u veilora):$(id -g veilora) docker compose up -d
"""
