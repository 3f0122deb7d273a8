"""The keys of the audit (Ed25519, in PEM): the private one signs checkpoints, the public one verifies them."""

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)


def new_private_key_pem() -> str:
    """A fresh private key (PKCS #8, without a password)."""
    key = Ed25519PrivateKey.generate()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def public_key_pem(private_pem: str) -> str:
    """The public half. Raises `ValueError` like `load_private_key`."""
    public = load_private_key(private_pem).public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def load_private_key(pem: str) -> Ed25519PrivateKey:
    r"""Raises `ValueError`, which never quotes the text, where it is not an Ed25519 private key in PEM.

    The two characters `\n` count as a line's end: many places that keep environment variables allow one line only.
    """
    try:
        key = load_pem_private_key(_lines(pem), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("is not an Ed25519 private key in PEM without a password")  # noqa: TRY004 - a wrong value, whatever its type
    return key


def load_public_key(pem: str) -> Ed25519PublicKey:
    """Raises `ValueError` where the text is not an Ed25519 public key in PEM."""
    try:
        key = load_pem_public_key(_lines(pem))
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("is not an Ed25519 public key in PEM")  # noqa: TRY004
    return key


def _lines(pem: str) -> bytes:
    return pem.replace("\\n", "\n").strip().encode()
