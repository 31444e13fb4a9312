"""Prove a client's identity with a key pair whose private key never leaves the site.

Flower gives a ServerApp neither the key of a node nor any sign that two node ids are one site. So
every roster query has a nonce, and the reply carries the client's public key and a signature over
`statement`, which contains the nonce, the run, the exchange, the client and the queried node:
replayed or forwarded signatures are invalid. The server binds a client id to the fingerprint of its
key at first use, or takes both from the operator's file (`read_client_keys`).

Keys are ECDSA or Ed25519, as OpenSSH and Flower's SuperNode authentication use them. Fingerprints
are those of ``ssh-keygen -lf``. Importing this module does not import `cryptography`.
"""

import base64
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from pilot_flwr.config.rules import check_name
from pilot_flwr.errors import ConfigError, UpdateError
from pilot_flwr.protocol import ClientKeyProof, Member, RunInfo
from pilot_flwr.run.atomic import flush, hold

LONGEST_KEY = 1000
"""Characters of a public key in OpenSSH's format; the largest curve needs fewer than 300."""

KINDS = (
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
)
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")


def statement(run: RunInfo, server_round: int, nonce: str, node_id: int, member: Member) -> bytes:
    """Return the bytes that a client signs to prove its identity in reply to one query."""
    parts = ["pilot-flwr client key 1", run.name, server_round, nonce, node_id]
    return json.dumps([*parts, member.client, member.task]).encode()


def fingerprint(public_key: str) -> str:
    """Return ``SHA256:...`` of a public key in OpenSSH's format, ``KIND BASE64``.

    Raises
    ------
    UpdateError
        It is not a key of one of `KINDS`.
    """
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import ssh_key_fingerprint

    digest = ssh_key_fingerprint(_load_public(public_key), SHA256())
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def prove(private_key: Any, signed: bytes) -> ClientKeyProof:
    """Sign a `statement`; return the signature with the public key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    how = () if isinstance(private_key, Ed25519PrivateKey) else (_ecdsa(),)
    return ClientKeyProof(public_key(private_key), private_key.sign(signed, *how))


def verify(proof: ClientKeyProof, signed: bytes) -> str:
    """Return the fingerprint of the key that made a proof; raise `UpdateError` if it is wrong."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    key = _load_public(proof.public_key)
    how = () if isinstance(key, Ed25519PublicKey) else (_ecdsa(),)
    try:
        key.verify(proof.signature, signed, *how)
    except InvalidSignature:
        raise UpdateError("its proof of the client's key is for another query or forged") from None
    return fingerprint(proof.public_key)


def public_key(private_key: Any) -> str:
    """Return the public part of a key in OpenSSH's format."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    encoded: bytes = private_key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return encoded.decode()


def client_key(path: Path, *, create: bool) -> Any:
    """Return the private key in a file; with `create`, write a new one if the file is missing.

    Raises
    ------
    ConfigError
        The file cannot be read, others may read it, or it is not an unencrypted key of `KINDS`.
    """
    if create and not path.exists():
        _write_new(path)
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{_named(path)} cannot be read: {error.strerror}.") from None
    if mode & 0o077:
        raise ConfigError(
            f"{_named(path)} has mode {mode:o} but must be readable by its owner only (chmod 600)."
        )
    return _load_private(content, path)


def read_client_keys(path: Path) -> dict[str, str]:
    """Read the operator's file of client keys; return each client's fingerprint.

    A line is ``CLIENT KEY``: the client's id, then the fingerprint or the public key in OpenSSH's
    format; a comment may follow. Blank lines and lines that begin with ``#`` are ignored.

    Raises
    ------
    ConfigError
        The file cannot be read, lists no client, has an invalid line, or lists a client twice.
    """
    name = f"The file of client keys {str(path)!r} (`strategy.client_keys`)"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise ConfigError(f"{name} is not text in UTF-8.") from None
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        client, key = (*line.split(None, 1), "", "")[:2]
        if not client or client.startswith("#"):
            continue
        try:
            check_name("client", client)
            first = key.split(" ", 1)[0]
            found = first if _FINGERPRINT.fullmatch(first) else fingerprint(key)
        except (ConfigError, UpdateError) as error:
            raise ConfigError(
                f"{name}: line {number} must be a client's id and its key, such as "
                f"`hospital-a SHA256:...` or `hospital-a ssh-ed25519 AAAA...`: {error}"
            ) from None
        if client.casefold() in map(str.casefold, keys):
            raise ConfigError(f"{name}: line {number} lists client {client!r} again.")
        keys[client] = found
    if not keys:
        raise ConfigError(f"{name} lists no client.")
    return keys


def _load_public(line: str) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    kind = line.split(" ", 1)[0]
    if len(line) > LONGEST_KEY or kind not in KINDS:
        raise UpdateError(f"its key must be one of {', '.join(KINDS)}, in OpenSSH's format")
    try:
        return load_ssh_public_key(line.encode())
    except (ValueError, NotImplementedError, UnsupportedAlgorithm):
        raise UpdateError(f"its key is not a key of {kind}") from None


def _load_private(content: bytes, path: Path) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        load_pem_private_key,
        load_ssh_private_key,
    )

    load = load_ssh_private_key if b"BEGIN OPENSSH" in content else load_pem_private_key
    try:
        key: Any = load(content, password=None)
    except TypeError:
        raise ConfigError(f"{_named(path)} is encrypted but must have no passphrase.") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(
            f"{_named(path)} must be a private key in OpenSSH's format or PEM."
        ) from None
    curve = getattr(getattr(key, "curve", None), "name", "")
    if not isinstance(key, Ed25519PrivateKey) and curve not in _CURVES:
        raise ConfigError(
            f"{_named(path)} must be one of {', '.join(KINDS)} (`ssh-keygen -t ecdsa`, or ed25519)."
        )
    return key


def _named(path: Path) -> str:
    return f"The client's key {str(path)!r} (`identity-key`)"


def _write_new(path: Path) -> None:
    """Generate and write a key atomically; another process may do the same concurrently."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    content = Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()
    )
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with hold(path.with_name(f".{path.name}.lock"), f"The key {path}", patience=10.0):
            if path.exists():
                return
            temporary.unlink(missing_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            flush(temporary)
            os.replace(temporary, path)
            flush(path.parent)
    except OSError as error:
        raise ConfigError(f"{_named(path)} cannot be written: {error.strerror}.") from None


def _ecdsa() -> Any:
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
    from cryptography.hazmat.primitives.hashes import SHA512

    return ECDSA(SHA512())
