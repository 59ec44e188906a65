"""How a subcommand answers: to a person, or to a program."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Any

import typer

PASSED = {"context_settings": {"allow_extra_args": True, "ignore_unknown_options": True}}  # what is left over is for the config
FORWARDED = PASSED | {"add_help_option": False}  # all of it is another command's, --help, too


class Format(StrEnum):
    """How a command answers."""

    text = "text"
    json = "json"


As = Annotated[Format, typer.Option("--format", help="text, or json for a program")]


def answer(format: Format, facts: dict[str, Any], text: str) -> None:
    """Print what a command found."""
    print(json.dumps(facts, indent=2) if format is Format.json else text)
