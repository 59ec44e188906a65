"""One run's record as text: what came of it, its rounds, and which answers were refused and why."""

from __future__ import annotations

import json
import re
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

from fl.config import ConfigError


def read(folder: Path) -> dict[str, Any]:
    """What a run left in ``folder``: its rounds, and its summary, None while it has not ended. Raises ConfigError."""
    try:
        rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        ended = folder / "summary.json"
        return {"run": folder.name, "summary": json.loads(ended.read_text()) if ended.exists() else None, "rounds": rows}
    except (OSError, ValueError) as error:
        raise ConfigError(f"a run's folder must hold rounds.jsonl, one JSON line a round, but {folder} does not ({type(error).__name__})") from None


def markdown(record: dict[str, Any]) -> str:
    """The record in Markdown."""
    rows, summary = record["rounds"], record["summary"]
    refused = [(row["round"], one) for row in rows for one in row.get("refused", ())]
    parts = [f"# {record['run']}", outcome(rows, summary), "## Rounds", rounds(rows)]
    if refused:
        whose = Counter((one["client"], one["code"]) for _, one in refused)
        last = {(one["client"], one["code"]): f"round {round}: {one['reason']}" for round, one in refused}
        lines = [f"| {c} | {code} | {n} | {plain(last[c, code])} |" for (c, code), n in sorted(whose.items())]
        parts += ["## Answers that were refused", "\n".join(["| client | why | times | the last reason |", "|---|---|---|---|", *lines])]
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """A stranger's ``text`` as Markdown and HTML show it and nothing more: no tag, link, picture or cell begins in it."""
    return re.sub(r"[\\`*_\[\]|~#!@]|:(?=//)|(?<=www)\.", lambda found: f"&#{ord(found[0])};", escape(text, quote=False))


def outcome(rows: list[dict[str, Any]], summary: dict[str, Any] | None) -> str:
    """How the run ended, in a sentence."""
    if summary is None:
        return f"Not at its end: after round {rows[-1]['round'] if rows else 0}. If it was broken off, `veilora resume` goes on."
    sent = sum(summary["bytes_per_client_round"].values()) / 1e3
    accuracy = "not told" if summary["accuracy"] is None else f"{summary['accuracy']:.2%}"
    return (
        f"Accuracy {accuracy} on {summary['evaluated_on']} images of {summary['clients']} clients after {summary['rounds']} rounds; "
        f"{sent:,.1f} kB a client and round, {summary['ratio_to_full_fedavg']:.3%} of full-model FedAvg; key {summary['key_fingerprint']}."
    )


def rounds(rows: list[dict[str, Any]]) -> str:
    """The rounds as a table."""
    head = ["| round | accuracy | loss | train loss | clients | refused | seconds | kB of all messages |", "|---|---|---|---|---|---|---|---|"]
    shown = lambda row, name, form: format(row[name], form) if row.get(name) is not None else "–"
    for row in rows:
        sent = sum(sizes["total"] for sizes in row["bytes"].values()) / 1e3
        head.append(
            f"| {row['round']} | {shown(row, 'accuracy', '.2%')} | {shown(row, 'loss', '.4f')} | {shown(row, 'train_loss', '.4f')} | "
            f"{len(row['cohort'])} | {len(row.get('refused', ()))} | {row['seconds']:.1f} | {sent:,.1f} |"
        )
    return "\n".join(head)
