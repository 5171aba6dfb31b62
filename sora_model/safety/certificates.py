"""Who signs: a private key and its certificates in one file, made at first use, readable by its owner alone.

    identity = certificates.current()          # ~/.config/sora/identity.pem, or of the folder SORA_CREDENTIALS
    certificates.use(Identity(chain, sign=call_the_vault))      # a key that stays where it is

`identity.pem` holds an ES256 key (PKCS 8), the certificate it belongs to, and those above that. What is made here is a
chain of this installation alone, root and signer: it shows that a file came from here and was not altered since, to
whoever has its root. The root's own key is not kept. Certificates of an authority take its place in the same file.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from .. import extras
from ..files import naming

if TYPE_CHECKING:
    from cryptography import x509

VARIABLE = "SORA_CREDENTIALS"
DAYS = 5 * 365
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\n?", re.DOTALL)
_KEY = re.compile(r"-----BEGIN (?:EC )?PRIVATE KEY-----.+?-----END (?:EC )?PRIVATE KEY-----\n?", re.DOTALL)


class CredentialsError(ValueError):
    """Certificates, a key or a file's credentials that cannot be used; the message says which, why and what to do."""


@dataclass(frozen=True)
class Identity:
    """A certificate and those above it, PEM, the signer's first, and its key: PEM, or a function from bytes to their
    ES256 signature, r and s in 64 bytes."""

    chain: str
    key: str | None = None
    sign: Callable[[bytes], bytes] | None = None

    def __post_init__(self) -> None:
        for name, value in (("chain", self.chain), ("key", self.key)):
            if not isinstance(value, str) and (name == "chain" or value is not None):
                raise TypeError(f"{name} must be PEM, a str; got {type(value).__name__}")

    @property
    def sent(self) -> str:
        """The certificates that go into a file: all but those that vouch for themselves."""
        pems = _pems(self.chain)
        return "".join(pem for pem in pems if not _vouches_for_itself(_certificate(pem))) or "".join(pems)

    @property
    def anchors(self) -> str:
        """Those that vouch for themselves: what the others are trusted by."""
        return "".join(pem for pem in _pems(self.chain) if _vouches_for_itself(_certificate(pem)))

    def check(self) -> Identity:
        """Itself. Raises `CredentialsError` for what cannot sign: an expired certificate, a broken chain, a key that is
        not its own."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec, utils

        chain = [_certificate(pem) for pem in _pems(self.chain) or [""]]
        certificate, now = chain[0], datetime.now(timezone.utc)
        for one in chain:
            if not one.not_valid_before_utc <= now <= one.not_valid_after_utc:
                which = "the signer's certificate" if one is certificate else f"the certificate of {_name(one)}"
                raise CredentialsError(
                    f"{which} is valid from {one.not_valid_before_utc:%Y-%m-%d} to {one.not_valid_after_utc:%Y-%m-%d}, "
                    "not today; `sora certs init --force` makes another"
                )
        public = certificate.public_key()
        if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name != "secp256r1":
            raise CredentialsError("the signer's certificate must hold a P-256 key, for ES256 signatures")
        probe = b"sora"
        try:
            if self.sign is not None:
                raw = self.sign(probe)
                signature = utils.encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
            else:
                key = serialization.load_pem_private_key((self.key or "").encode(), None)
                signature = key.sign(probe, ec.ECDSA(hashes.SHA256()))
            public.verify(signature, probe, ec.ECDSA(hashes.SHA256()))
        except (InvalidSignature, ValueError, TypeError) as error:
            why = "is not that of the certificate" if isinstance(error, InvalidSignature) else f"is unusable: {error}"
            raise CredentialsError(f"the signer's key {why}; give the two that belong together") from error
        under = [one for one in chain if not _vouches_for_itself(one)]
        roots = [one for one in chain if _vouches_for_itself(one)]
        for number, one in enumerate(under, 1):
            above = under[number : number + 1] or roots
            if above and one.issuer not in [other.subject for other in above]:
                raise CredentialsError(
                    f"the certificate of {_name(one)} was issued by {one.issuer.rfc4514_string()}, but after it comes "
                    f"that of {_name(above[0])}; give the whole chain, the signer's first"
                )
        return self

    @property
    def name(self) -> str:
        return _certificate(_CERTIFICATE.findall(self.chain)[0]).subject.rfc4514_string()


def folder() -> Path:
    """Where identity.pem lies: SORA_CREDENTIALS, else sora/ in XDG_CONFIG_HOME, else ~/.config/sora."""
    if own := os.environ.get(VARIABLE):
        return Path(own)
    base = Path(os.environ.get("XDG_CONFIG_HOME") or "")
    return (base if base.is_absolute() else Path.home() / ".config") / "sora"


def current() -> Identity:
    """What `use` was given, else that of `folder()`, made where there is none. Raises `CredentialsError`."""
    if _own is not None:
        return _own
    path = folder() / "identity.pem"
    if not path.exists():
        init()
    return load(path)


def use(identity: Identity | None) -> None:
    """Sign with this from now on; with None, with that of `folder()` again."""
    global _own
    if not isinstance(identity, Identity | None):
        raise TypeError(f"identity must be an Identity or None; got {type(identity).__name__}")
    _own = None if identity is None else identity.check()


_own: Identity | None = None


def read_secret(path: str | os.PathLike[str], what: str) -> bytes:
    """A key's file, which its owner alone may read: `CredentialsError` where others can, or nobody."""
    try:
        with open(path, "rb") as file:
            mode, data = stat.S_IMODE(os.fstat(file.fileno()).st_mode), file.read()
    except OSError as error:
        raise CredentialsError(f"cannot read {what} in {os.fspath(path)!r}: {error.strerror or error}") from error
    if mode & 0o077:
        raise CredentialsError(f"others can read {what} in {os.fspath(path)!r} (mode {mode:o}); chmod 600 it")
    return data


def write_secret(path: Path, data: bytes, *, replace: bool = False) -> None:
    """A file that its owner alone may read, whole or not at all, in a folder that is made where it is missing. What
    another process has put there meanwhile stays, unless it is to be replaced."""
    with naming(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        (path.parent / ".gitignore").write_text("*\n")  # a folder of settings may be a repository
        handle, part = tempfile.mkstemp(dir=path.parent)  # with mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                os.replace(part, path)
            else:
                with contextlib.suppress(FileExistsError):
                    os.link(part, path)
        finally:
            Path(part).unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> Identity:
    text = read_secret(path, "the signer's key").decode("utf-8", "replace").replace("\r\n", "\n")
    key, certificates = _KEY.search(text), _CERTIFICATE.findall(text)
    if key is None or not certificates:
        raise CredentialsError(f"{os.fspath(path)!r} must hold a private key and its certificate, both as PEM")
    return Identity("".join(certificates), key[0])


def anchors() -> str:
    """Of whom a file is trusted that says no more: this identity's own root, and what is in anchors.pem beside it.
    Nobody where there are neither: no key is made to look at a file."""
    own = _own or (load(path) if os.path.lexists(path := folder() / "identity.pem") else None)
    more = folder() / "anchors.pem"
    return (own.anchors if own else "") + (read_anchors(more) if os.path.lexists(more) else "")


NO_ANCHOR = "cannot trust what is no certificate; give PEM, as `sora certs root` prints it"


def read_anchors(path: str | os.PathLike[str]) -> str:
    """The certificates in a PEM file, without what is said between them. Raises `CredentialsError` that names it."""
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no PEM"
        raise CredentialsError(f"cannot read {os.fspath(path)!r}: {reason}") from error
    try:
        return named(text)
    except CredentialsError as error:
        raise CredentialsError(f"{os.fspath(path)!r}: {error}") from error


def named(anchors: str) -> str:
    """The certificates in a text. Raises `CredentialsError` where there are none, or one is cut short."""
    found = "".join(_pems(anchors)) if isinstance(anchors, str) else ""
    if not found or anchors.count("-----BEGIN CERTIFICATE-----") != found.count("-----BEGIN CERTIFICATE-----"):
        raise CredentialsError(NO_ANCHOR)
    return found


def init(*, force: bool = False, organisation: str = "sora local") -> Path:
    """Makes a chain of two certificates and writes identity.pem, mode 0600; returns its path.

    Where there is one, `force` replaces it and keeps its root in anchors.pem, so that what it signed is still trusted;
    one that cannot be read is kept as identity.pem.old.
    """
    path = folder() / "identity.pem"
    if path.exists() and not force:
        raise CredentialsError(f"there is an identity in {os.fspath(path)!r} already; --force makes another")
    made = _chain(organisation).encode()
    if path.exists():
        try:
            roots = load(path).anchors
        except CredentialsError:
            with naming(path):
                path.replace(path.with_name("identity.pem.old"))
        else:
            more = path.parent / "anchors.pem"
            held = read_anchors(more) if os.path.lexists(more) else ""
            write_secret(more, (held + roots).encode(), replace=True)
    write_secret(path, made, replace=force)
    return path


def _chain(organisation: str) -> str:
    """PEM of a new key, its certificate and the root's."""
    with extras.named("a signing key"):
        from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now = datetime.now(timezone.utc) - timedelta(minutes=5)

    def named(name: str) -> x509.Name:
        kinds = (NameOID.COMMON_NAME, name), (NameOID.ORGANIZATION_NAME, organisation)
        return x509.Name([x509.NameAttribute(kind, value) for kind, value in kinds])

    def builder(name: str, key: ec.EllipticCurvePrivateKey, authority: bool) -> x509.CertificateBuilder:
        signs = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
             "decipher_only"), False,
        )  # fmt: skip
        usage = x509.KeyUsage(digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, **signs)
        end = now + timedelta(days=DAYS + authority)
        return (
            x509.CertificateBuilder(top, named(name), key.public_key(), x509.random_serial_number(), now, end)
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )

    top, (over, under) = named("root"), (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = builder("root", over, True).sign(over, hashes.SHA256())
    leaf = (
        builder("signer", under, False)
        # the one extended usage that validators take without being told of it
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(over.public_key()), critical=False)
        .sign(over, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    key = under.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return b"".join([key, leaf.public_bytes(pem), root.public_bytes(pem)]).decode()


def _pems(chain: str) -> list[str]:
    return [pem.replace("\r", "").rstrip() + "\n" for pem in _CERTIFICATE.findall(chain)]


def _name(certificate: x509.Certificate) -> str:
    return certificate.subject.rfc4514_string()


def _certificate(pem: str) -> x509.Certificate:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(pem.encode())
    except ValueError as error:
        raise CredentialsError(f"a certificate of the signer is no X.509 in PEM: {error}") from error


def _vouches_for_itself(certificate: x509.Certificate) -> bool:
    return certificate.issuer == certificate.subject
