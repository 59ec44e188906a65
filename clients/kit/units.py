"""The systemd units. `systemctl enable --now /etc/veilora/node-0/supernode.service` takes them where they lie.

They restart always: a SuperNode whose request is answered 401 ends with status 0, and one that a power cut took from the
SuperLink without a word is refused for up to a minute. The service's user can write in its own folder of /var/lib and nowhere
else, leaves no memory on a disk, and talks to nobody but whom it must.
"""

from __future__ import annotations

import ipaddress
from typing import Sequence

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
RemoveIPC=yes
KeyringMode=private
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
# Keys are in memory: no core dump of it, and none of it in a swap file.
LimitCORE=0
MemorySwapMax=0
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
ProtectClock=yes
""" + HARDENED + """\
# It talks to the proxy and to the operator, on this machine.
IPAddressDeny=any
IPAddressAllow=localhost

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
# At rest, a key that this machine's TPM or its own secret alone opens:
#   systemd-creds encrypt --name=image.key KEY @home@/image.key.cred
#   and here: LoadCredentialEncrypted=image.key:@home@/image.key.cred
#   and in node.toml: key-path = "/run/credentials/supernode.service/image.key"
""" + HARDENED + """\
@egress@

[Install]
WantedBy=multi-user.target
"""


def egress(hosts: Sequence[str]) -> str:
    """The lines that let a node talk to its coordinator and to itself alone; ``hosts`` are the coordinator's names and addresses.

    systemd's filter takes addresses. Where only names are known it stays off, and a comment says how to set it.
    """
    known = [host for host in hosts if _address(host)]
    if known:
        return f"# It talks to the coordinator and to itself.\nIPAddressDeny=any\nIPAddressAllow=localhost {' '.join(known)}"
    return (
        "# It needs to talk to the coordinator and to itself alone. The filter takes addresses and no names: put the coordinator's,\n"
        "# and your name server's, in the place of 192.0.2.1, and take the two # away.\n"
        "#IPAddressDeny=any\n#IPAddressAllow=localhost 192.0.2.1"
    )


def _address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
