"""The README that lies in each folder of a deployment: the exact commands, in order."""

SOFTWARE = """\
1. Software (Python 3.11 or newer, no Ray), as root. What runs here belongs to root; the service's user can change none of it.
     useradd --system --home-dir @var@ --shell /usr/sbin/nologin veilora
     python3 -m venv @venv@ && git clone REPOSITORY @venv@/source && @venv@/bin/pip install "@venv@/source[node]"
   The same each time, by hashes of what you have looked at once (uv pip compile --generate-hashes --extra node pyproject.toml):
     @venv@/bin/pip install --require-hashes -r requirements.txt && @venv@/bin/pip install --no-deps @venv@/source
   In containers: docker build -t veilora:@version@ -f @home@/Containerfile CHECKOUT
"""

OWNED = """\
     chown -R root:root @home@ && chmod -R go-w @home@
     chown root:veilora @home@/@secret@ && chmod 0640 @home@/@secret@
     install -d -o veilora -g veilora -m 0700 @var@
"""

COORDINATOR = """\
The coordinator of a VeiLoRA federation of @nodes@ nodes. Nodes come in at @public@, by TLS, each with a key of its own.
This folder belongs at @home@. The image key and the seal key belong on no coordinator, and neither do ca.key and the nodes' private keys.

""" + SOFTWARE + """
2. This folder belongs to root, too; the service may read its key, and writes in @var@ alone
""" + OWNED.replace("@secret@", "server.key") + """\
     chmod 0700 @home@/operator
3. Look
     sudo -u veilora @venv@/bin/veilora doctor @home@
4. Start
     systemctl enable --now @home@/superlink.service
     ln -s @home@/proxy.conf /etc/nginx/conf.d/veilora.conf && nginx -t && systemctl reload nginx
   In containers: VEILORA_USER=$(id -u veilora):$(id -g veilora) docker compose up -d
   The SuperLink listens on loopback; never open its port @superlink_port@: through it anyone may start runs here, and so may anyone
   with a login on this machine: give none to others.
5. Register the nodes, once, as root
     export FLWR_HOME=@home@/operator PATH=@venv@/bin:$PATH
@register@
6. Run. No place is in a run's words: the record goes to VEILORA_OUTPUT of engine.env, and each node has its own in node.toml
     flwr run @venv@/source veilora --stream --run-config 'overrides="@run@ experiment=..."'
     flwr list veilora          # how it ended: `flwr run --stream` returns 0 for a failed run, too
     veilora report @var@/runs/RUN; and if it broke off: veilora resume --show @var@/runs/RUN
   @told@
   In containers 5 and 6 run inside: docker compose exec superlink sh
     cp -r @home@/operator /tmp && export FLWR_HOME=/tmp/operator        # the checkout is /opt/veilora/source
7. Each year, on the machine that holds ca/ca.key
     veilora deploy renew FOLDER          # then copy coordinator/server.pem and server.key here, own them as in 2, reload nginx
     systemctl restart superlink
"""

SECURE = "Aggregation is secure: this machine adds what it cannot read, and a client writes the adapter, in its own output-path."
CLEAR = "Aggregation is in the clear: this machine sees every update, and much of the pictures is to be learnt from one. See `secure`."

NODE = """\
Node @index@ of @nodes@ of a VeiLoRA federation. It calls the coordinator at @public@ and opens no port but on its loopback.
This folder belongs at @home@.

""" + SOFTWARE + """
2. This machine's own key: @key_note@
   The folder belongs to root; the service may read its key, and writes in @var@ alone
""" + OWNED.replace("@secret@", "node.key") + """\
3. What this machine lets a run do: policy.toml. Read it, and make it stricter where you want. It is yours, not the coordinator's
4. The image key: one file for all nodes, made on one node (@venv@/bin/veilora keygen KEY), carried by hand, never to the coordinator
     install -o veilora -g veilora -m 0400 KEY @key@
   The unit's comments say how systemd keeps it encrypted at rest
   For secure aggregation the seal key, too, which the service may write, since it steps when a run ends. On one node it is made:
     sudo -H -u veilora @venv@/bin/veilora keygen --seal @var@/seal.key
   and shared with each other node, which makes a pair and is sent a file that whoever carries it cannot open or change:
     sudo -H -u veilora @venv@/bin/veilora key pair                   here, and there: veilora key share SEAL --to HERE.pub --out FILE
     sudo -H -u veilora @venv@/bin/veilora key take FILE --from THERE.pub --to @var@/seal.key
5. What is this machine's own: node.toml (data-path or partition-path, weights-path, device). Pictures that are nobody else's:
     @venv@/bin/veilora partition /data/mine --index @index@ --of @nodes@ --own --encrypt key=@key@ data=folder data.root=PICTURES experiment=...
     chown -R root:veilora /data/mine && chmod -R u=rwX,g=rX,o= /data/mine     # a sub-folder for each class of all nodes, one without
                                                                            # pictures, too; the experiment is the run's
6. Look
     sudo -u veilora @venv@/bin/veilora doctor @home@
7. Start
     systemctl enable --now @home@/supernode.service
   Two processes last: the SuperNode, and the one that has torch imported, from which a ClientApp is forked for each message.
   What a run leaves here for you, a preview and in a secure run the adapter, is in @var@/runs.
   In containers: VEILORA_USER=$(id -u veilora):$(id -g veilora) docker compose up -d
"""

BROUGHT = "it is made here and leaves this machine no more. `veilora node init @home@` has made it; copy this folder's files beside it"
MADE = "node.key was made where the deployment was, for a trial. For real use make it here: veilora node init, deploy init --pub"
