"""The guard between Flower and the installed app on a node: no run's code is imported, and the owner's policy is judged first.

    SuperNode ── bundle, words, message ──► this process: is the bundle the installed code?  may the words and the config be?
                                            no:  the answer is `policy: <rule>`      yes: the installed clients.client_app

Flower itself would unpack the bundle and import it: `clients.flower` puts this guard in the place of its installer and loader.

What this does not do: the app runs in a process of the same user as the guard and reads the keys itself. Who upgrades the
installed package is trusted. So is native code in that process: a flaw in torch, in a decoder of pictures or in an HTTP library
that a message reaches could read the image key and the seal key, send them, and train without any policy. Only a broker of the
keys under another user id, which encrypts, seals and opens over a pipe, would keep them from it; there is none.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Callable

from flwr.app import Context, Message

from clients import bundle, client_app, judgement, policy
from clients.policy import PolicyError
from fl import provenance
from fl.config import ConfigError
from fl.wire.records import to_content

log = logging.getLogger("veilora.site")

App = Callable[..., Message]


def guarded(code: bytes, where: Path | None, app: App = client_app.app) -> App:
    """``app`` behind the policy in the file ``where``, for a run whose bundle is ``code``.

    It answers every message: a refusal is a record of facts like any answer, with the rule's name and this client's number.
    """

    def answer(message: Message, context: Context) -> Message:
        try:
            owner = policy.read(where)
            bundle.compare(code, provenance.shipped())
            bundle.signed(owner.code, provenance.code_sha256())
            judgement.judge(owner, str(context.run_config.get("overrides", "")))
            policy.in_force.set(owner.digest()[:16])
            return app(message=message, context=context)
        except PolicyError as error:
            log.error("refused: %s", error)
            return refusal(error.rule, message, context)
        except Exception:  # a message of a kind that the app has no handler for, and whatever nobody foresaw: closed all the same
            log.exception("refused, since it failed inside")
            return refusal("message", message, context)

    return answer


def refusal(rule: str, message: Message, context: Context) -> Message:
    """The answer that says which ``rule`` refused, and nothing of this machine."""
    try:
        client = client_app.place(context)[0]
    except ConfigError:
        client = None
    return Message(to_content({"error": f"policy: {rule}", "client": client}), reply_to=message)
