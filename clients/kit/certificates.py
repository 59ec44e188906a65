"""The certificates and node keys of one federation, and what is wrong with a certificate, in words.

A certificate authority of the federation's own signs one server certificate. Nodes trust that authority alone; each is known
by an EC key of its own, in OpenSSH's format, as a SuperNode wants it.
"""

from __future__ import annotations

import ipaddress
import re
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, Sequence

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from clients.kit import KitError

SOON = timedelta(days=30)
SKEW = timedelta(hours=1)  # clocks differ: a certificate begins that long before it is made
DNS = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(\.(?!-)[a-z0-9-]{1,63}(?<!-))*", re.IGNORECASE)


class Pair(NamedTuple):
    """A private key and what is public of it: a certificate (PEM), or a public key (one OpenSSH line)."""

    private: bytes
    public: bytes


def authority(name: str, days: int = 3650, now: datetime | None = None) -> Pair:
    """A new certificate authority (EC P-384) that is valid for ``days``."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    draft = _draft(subject, subject, key, days, now)
    draft = draft.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    draft = draft.add_extension(_usage(certificates=True), critical=True)
    draft = draft.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    return _pair(key, draft.sign(key, hashes.SHA384()))


def server(signer: Pair, names: Sequence[str], days: int = 365, now: datetime | None = None) -> Pair:
    """A server certificate for ``names`` (DNS names and IP addresses), signed by the authority ``signer``. Raises KitError."""
    if not names:
        raise KitError("a server certificate must name its server, got no name; give its DNS name or address")
    key, root = ec.generate_private_key(ec.SECP384R1()), x509.load_pem_x509_certificate(signer.public)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    draft = _draft(subject, root.subject, key, days, now)
    draft = draft.add_extension(x509.SubjectAlternativeName([_name(n) for n in dict.fromkeys(names)]), critical=False)
    draft = draft.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    draft = draft.add_extension(_usage(certificates=False), critical=True)
    draft = draft.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    draft = draft.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), critical=False)
    return _pair(key, draft.sign(serialization.load_pem_private_key(signer.private, None), hashes.SHA384()))


def node_key() -> Pair:
    """A SuperNode's key (EC P-384), both halves in OpenSSH's format."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return Pair(private, public + b"\n")


def check(certificate: bytes, root: bytes | None = None, names: Sequence[str] = (), now: datetime | None = None) -> list[str]:
    """What is wrong with a PEM ``certificate``, one line each; nothing for a good one.

    Wrong is: no certificate at all, not yet valid, expired, expiring within 30 days, signed by another authority than
    ``root`` (PEM), or without one of the ``names`` that it must hold.
    """
    now = now or datetime.now(UTC)
    try:
        found = x509.load_pem_x509_certificate(certificate)
        signer = x509.load_pem_x509_certificate(root) if root is not None else None
    except ValueError:
        return ["is no certificate in PEM format; copy it again from the coordinator"]
    wrong = []
    begins, ends = found.not_valid_before_utc, found.not_valid_after_utc
    if now < begins:
        wrong.append(f"is not valid before {begins:%Y-%m-%d %H:%M} UTC, and here it is {now:%Y-%m-%d %H:%M}; set the clock")
    if now >= ends:
        wrong.append(f"expired on {ends:%Y-%m-%d}; renew it: veilora deploy renew FOLDER")
    elif ends - now < SOON:
        wrong.append(f"expires within 30 days, on {ends:%Y-%m-%d}; renew it: veilora deploy renew FOLDER")
    if signer is not None and not _signed(found, signer):
        wrong.append("is signed by another authority than ca.crt; take both from one deployment")
    wrong += [f"is not for {name}, only for {', '.join(held(found))}; renew it with that name" for name in names if not _holds(found, name)]
    return wrong


def held(certificate: x509.Certificate) -> list[str]:
    """The DNS names and addresses in a certificate."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in found]


def _holds(certificate: x509.Certificate, name: str) -> bool:
    return str(_name(name).value).lower() in (other.lower() for other in held(certificate))


def _signed(certificate: x509.Certificate, root: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        pass
    if not DNS.fullmatch(text):
        raise KitError(f"a server's name must be a DNS name or an IP address, got {text!r}")
    return x509.DNSName(text)


def _draft(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int, now: datetime | None) -> x509.CertificateBuilder:
    now = now or datetime.now(UTC)
    draft = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    draft = draft.serial_number(x509.random_serial_number()).not_valid_before(now - SKEW).not_valid_after(now + timedelta(days=days))
    return draft.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)


def _usage(certificates: bool) -> x509.KeyUsage:
    nothing = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only"), False)
    return x509.KeyUsage(digital_signature=not certificates, key_cert_sign=certificates, crl_sign=certificates, **nothing)


def _pair(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> Pair:
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Pair(private, certificate.public_bytes(serialization.Encoding.PEM))
