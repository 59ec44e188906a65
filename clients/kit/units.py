"""The systemd units. `systemctl enable --now /etc/veilora/node-0/supernode.service` takes them where they lie.

They restart always: a SuperNode whose request is answered 401 ends with status 0, and one that a power cut took from the
SuperLink without a word is refused for up to a minute.
"""

HARDENED = """\
NoNewPrivileges=yes
CapabilityBoundingSet=
UMask=0077
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths=@var@
PrivateTmp=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
LockPersonality=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
"""

SUPERLINK = """\
[Unit]
Description=VeiLoRA coordinator (Flower SuperLink, loopback only)
Documentation=file:@home@/README
Wants=network-online.target
After=network-online.target

[Service]
User=veilora
Environment=HOME=@var@ PATH=@venv@/bin:/usr/bin:/bin
ExecStart=@home@/start
Restart=always
RestartSec=10
TimeoutStopSec=30
LimitNOFILE=65536
PrivateDevices=yes
""" + HARDENED + """
[Install]
WantedBy=multi-user.target
"""

# Without PrivateDevices, ProtectClock and MemoryDenyWriteExecute: a GPU's driver needs its devices, and torch makes code.
SUPERNODE = """\
[Unit]
Description=VeiLoRA node @index@ (Flower SuperNode)
Documentation=file:@home@/README
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
User=veilora
Environment=HOME=@var@ PATH=@venv@/bin:/usr/bin:/bin
ExecStart=@home@/start
Restart=always
RestartSec=10
TimeoutStopSec=30
LimitNOFILE=65536
""" + HARDENED + """
[Install]
WantedBy=multi-user.target
"""
