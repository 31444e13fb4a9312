"""The key that proves which client a site is, and the operator's file of such keys."""

import itertools
import stat
import subprocess
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa, x25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from pilot_flwr.errors import ConfigError, UpdateError
from pilot_flwr.flower.client_key import (
    client_key,
    fingerprint,
    prove,
    public_key,
    read_client_keys,
    statement,
    verify,
)
from pilot_flwr.protocol import ClientKeyProof, Member, RunInfo

PKCS8 = PrivateFormat.PKCS8
MEMBER = Member("site-a", "vqa", 8, 0)
RUN = RunInfo("run-1", "/nowhere", "token")
SIGNED = statement(RUN, 2, "nonce", 11, MEMBER)
MADE = {
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "p521": lambda: ec.generate_private_key(ec.SECP521R1()),
}

# By `ssh-keygen -t KIND` and `ssh-keygen -lf`.
ED25519 = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIOTWhr+RpKP61K9tLZOe7+VZ9Z6hZHnNep/1KqKeOI2"
P384 = (
    "ecdsa-sha2-nistp384 AAAAE2VjZHNhLXNoYTItbmlzdHAzODQAAAAIbmlzdHAzODQAAABhBJFO9NFd"
    "TW0iDIwxrKFx876vXE5FnxseT9dOgAHc7+aBUi2Aqr8ORRAvV4f0i0pIb/OmJK5XsezAzDPK+PbQJrHN"
    "Z72oiJeE4q8H2m6KjNTSwd1/Nk6ZW/ptUCWSdfRerw=="
)
KNOWN = {
    "SHA256:+2xR8rZbVtzUec4UT+6Iy3BZZk1A73pd1blbL0IYaq0": ED25519,
    "SHA256:8OKL5xXDCgsT9EDZJIFcXe3e2VBpOIXhbkYCBvBZLAk": P384,
}


def write(path, key, form=PrivateFormat.OpenSSH, how=None):
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(Encoding.PEM, form, how or NoEncryption()))
    return path


@pytest.mark.parametrize(("expected", "line"), KNOWN.items())
def test_fingerprints_are_those_of_openssh(expected, line):
    assert fingerprint(line) == fingerprint(f"{line} user@host") == expected


@pytest.mark.parametrize("form", [PrivateFormat.OpenSSH, PKCS8])
@pytest.mark.parametrize("kind", MADE)
def test_a_proof_holds_for_its_own_query_alone(kind, form, tmp_path):
    key = client_key(write(tmp_path / "key", MADE[kind](), form), create=False)
    proof = prove(key, SIGNED)
    assert verify(proof, SIGNED) == fingerprint(public_key(key))
    others = [
        statement(replace(RUN, name="run-2"), 2, "nonce", 11, MEMBER),
        statement(RUN, 3, "nonce", 11, MEMBER),
        statement(RUN, 2, "other", 11, MEMBER),
        statement(RUN, 2, "nonce", 12, MEMBER),
        statement(RUN, 2, "nonce", 11, replace(MEMBER, client="site-b")),
        statement(RUN, 2, "nonce", 11, replace(MEMBER, task="ocr")),
    ]
    for signed in others:
        with pytest.raises(UpdateError, match="another query or forged"):
            verify(proof, signed)
    stranger = MADE[kind]()
    with pytest.raises(UpdateError, match="another query or forged"):
        verify(ClientKeyProof(public_key(stranger), proof.signature), SIGNED)


def test_statements_of_different_queries_differ():
    """No two combinations of fields are one statement, whatever the texts contain."""
    texts = ["a", 'a", "b', "a\\", "", "1"]
    signed = [
        statement(RunInfo(run, "", ""), number, nonce, node, Member(client, task, 1, 0))
        for run, nonce, client, task in itertools.product(texts, repeat=4)
        for number, node in ((1, 11), (11, 1))
    ]
    assert len(set(signed)) == len(signed)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "ssh-ed25519",
        "ssh-ed25519 AAAA",
        "ssh-ed25519 " + "A" * 2000,
        "ecdsa-sha2-nistp256 " + "AAAAC3NzaC1lZDI1NTE5AAAAIJ",
        "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAgQC",
        "no key at all",
        "ssh-ed25519\nssh-ed25519 AAAA",
    ],
)
def test_what_is_no_public_key_is_refused(line):
    with pytest.raises(UpdateError, match="its key"):
        verify(ClientKeyProof(line, b"x"), SIGNED)


def test_a_new_key_is_made_once_for_its_owner_alone(tmp_path):
    path = tmp_path / "state" / "site-a.key"
    first = client_key(path, create=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert public_key(client_key(path, create=True)) == public_key(first)
    assert {file.name for file in path.parent.iterdir()} == {"site-a.key", ".site-a.key.lock"}
    listed = subprocess.run(
        ["ssh-keygen", "-lf", path], capture_output=True, text=True, check=True
    ).stdout
    assert fingerprint(public_key(first)) in listed


def test_a_named_key_is_never_made(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        client_key(tmp_path / "key", create=False)
    assert list(tmp_path.iterdir()) == []


def encrypted(path, form):
    return write(path, MADE["p384"](), form, BestAvailableEncryption(b"secret"))


def ssh_keygen(path, *options):
    subprocess.run(["ssh-keygen", "-q", "-f", path, *options], check=True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: encrypted(p, PKCS8), "is encrypted"),
        (lambda p: write(p, rsa.generate_private_key(65537, 2048)), "must be one of ssh-ed25519"),
        (lambda p: write(p, x25519.X25519PrivateKey.generate(), PKCS8), "must be one of"),
        (lambda p: write(p, dsa.generate_private_key(2048), PKCS8), "must be one of"),
        (lambda p: write(p, ec.generate_private_key(ec.SECP256K1()), PKCS8), "must be one of"),
        (lambda p: ssh_keygen(p, "-t", "ecdsa", "-N", "secret"), "is encrypted"),
        (lambda p: p.touch(0o600), "OpenSSH's format or PEM"),
        (lambda p: (p.touch(0o600), p.write_bytes(b"\0\1\xff")), "OpenSSH's format or PEM"),
        (lambda p: write(p, MADE["p384"]()).chmod(0o640), r"mode 640 .*\(chmod 600\)"),
        (lambda p: p.mkdir(0o700), "cannot be read: Is a directory"),
    ],
)
def test_a_key_that_cannot_be_used_is_named(make, words, tmp_path):
    make(tmp_path / "my key")
    with pytest.raises(ConfigError, match=words) as caught:
        client_key(tmp_path / "my key", create=False)
    assert str(tmp_path / "my key") in str(caught.value)


def test_the_operators_file(tmp_path):
    key = public_key(MADE["p384"]())
    path = tmp_path / "client-keys"
    path.write_text(
        f"\ufeff# our sites\n\nsite-a {key} root@a\n  site-b   {fingerprint(key)} # x\n"
        f"site-c\t{key}\n"
    )
    assert read_client_keys(path) == dict.fromkeys(["site-a", "site-b", "site-c"], fingerprint(key))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "lists no client"),
        ("# only a comment", "lists no client"),
        ("site-a", "line 1 must be a client's id and its key"),
        ("site-a SHA256:short", "line 1 must be"),
        (f"\nsite-a MD5:{'a' * 43}", "line 2 must be"),
        (f"../site SHA256:{'a' * 43}", "line 1 .*`client` is '../site'"),
        (f"a SHA256:{'a' * 43}\nA SHA256:{'b' * 43}", "line 2 lists client 'A' again"),
        (b"\xff\xfe", "not text in UTF-8"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_wrong_line_of_the_operators_file_is_named(text, words, tmp_path):
    path = tmp_path / "client-keys"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=words) as caught:
        read_client_keys(path)
    assert "`strategy.client_keys`" in str(caught.value)
