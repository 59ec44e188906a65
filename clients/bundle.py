"""The bundle of a run beside the installed code: compared in memory, never unpacked and never imported."""

from __future__ import annotations

import hashlib
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Mapping

from clients import release
from clients.policy import Code, PolicyError

LARGEST = 2**25     # bytes of all members, as the bundle says; the code has two million
UNREAD = "pyproject.toml"   # travels, but nothing on a node reads it; nor what is in .info/
KNOWN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the others unpack without bound


def compare(bundle: bytes, installed: Mapping[str, str]) -> None:
    """Raise PolicyError unless ``bundle`` holds exactly the ``installed`` files, given as path → SHA-256 of its content."""
    try:
        with zipfile.ZipFile(BytesIO(bundle)) as members:
            entries = [info for info in members.infolist() if info.filename != UNREAD and not info.filename.startswith(".info/")]
            names = [info.filename for info in entries]
            if sum(info.file_size for info in entries) > LARGEST or any(info.compress_type not in KNOWN for info in entries):
                raise PolicyError("code.bundle", f"a bundle must unpack to at most {LARGEST} bytes, stored or deflated")
            if strange := sorted(set(names) - set(installed)):
                raise PolicyError("code.files", f"a bundle must hold the installed files and no other, got {strange[0]!r:.200}")
            if len(set(names)) != len(names) or len(names) != len(installed):
                raise PolicyError("code.files", f"a bundle must hold each of the {len(installed)} installed files once, got {len(names)}")
            for info in entries:
                if hashlib.sha256(members.read(info)).hexdigest() != installed[info.filename]:
                    raise PolicyError("code.installed", f"{info.filename} of the bundle is another than the installed one; install the run's version")
    except PolicyError:
        raise
    except Exception as error:  # whatever zipfile and zlib raise for what a stranger sent
        raise PolicyError("code.bundle", f"a bundle must be a zip file that can be read, got none ({type(error).__name__})") from None


def signed(code: Code, sha256: str) -> None:
    """Raise PolicyError where the policy asks for a signed release and the installed code, ``sha256``, is none."""
    if code.mode != "signed":
        return
    try:
        release.verify(Path(code.signature), code.signers, sha256)
    except release.ReleaseError as error:
        raise PolicyError("code.signers", str(error)) from None
