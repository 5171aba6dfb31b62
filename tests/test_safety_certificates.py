"""Certificates of an authority, in the place of those made here: what signs, and what is refused before the work."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import numpy as np
import pytest

from sora_model import media
from sora_model.safety import certificates, credentials
from sora_model.safety.certificates import CredentialsError, Identity
from sora_model.safety.credentials import TRUSTED, UNKNOWN, Input, Origin, verify

pytest.importorskip("c2pa", reason="the extra [safety] is not installed")

from cryptography import x509  # noqa: E402
from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402

FRAMES = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
KEYS = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("root", "between", "signer")}
MAIL, CLAIMS, DOCUMENTS = "1.3.6.1.5.5.7.3.4", "1.3.6.1.4.1.62558.2.1", "1.3.6.1.5.5.7.3.36"
SERVERS = "1.3.6.1.5.5.7.3.1"


def certificate(name: str, by: str, purpose: str | None = None, days: float = 30) -> str:
    def named(common: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common)])

    now, public = datetime.now(timezone.utc) - timedelta(minutes=5), KEYS[name].public_key()
    end, authority = now + timedelta(days=days), name != "signer"
    usage = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
                           "encipher_only", "decipher_only"), False)  # fmt: skip
    usage |= {"digital_signature": not authority, "key_cert_sign": authority, "crl_sign": authority}
    builder = (
        x509.CertificateBuilder(named(by), named(name), public, x509.random_serial_number(), now, end)
        .add_extension(x509.BasicConstraints(authority, None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(KEYS[by].public_key()), critical=False)
    )
    if purpose is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([x509.ObjectIdentifier(purpose)]), critical=False)
    return builder.sign(KEYS[by], hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


KEY = KEYS["signer"].private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
).decode()
ROOT, BETWEEN = certificate("root", "root"), certificate("between", "root")


def signer(purpose: str | None = MAIL) -> str:
    return certificate("signer", "between", purpose)


@pytest.mark.parametrize(
    "chain",
    [
        signer() + BETWEEN + ROOT, signer() + BETWEEN, (signer() + BETWEEN + ROOT).replace("\n", "\r\n"),
        signer(CLAIMS) + BETWEEN + ROOT, signer(DOCUMENTS) + BETWEEN + ROOT,
    ],
    ids=["all", "without the root", "of Windows", "to sign claims", "to sign documents"],
)  # fmt: skip
def test_the_chain_of_an_authority_signs(tmp_path, monkeypatch, sora, chain):
    monkeypatch.setenv(certificates.VARIABLE, str(tmp_path / "home"))
    certificates.init()
    (tmp_path / "home" / "identity.pem").write_bytes((chain + KEY).encode())
    path = media.write_video(tmp_path / "a.mp4", FRAMES, origin=Origin({"seed": 1}))
    assert verify(path, anchors=ROOT).answer == TRUSTED
    whole = len(certificates._pems(chain)) == 3
    assert verify(path).answer == (TRUSTED if whole else UNKNOWN)
    code, out, err = sora("certs", "root")
    assert (code, out) == ((0, ROOT) if whole else (1, "")) and ("holds no root certificate" in err) is not whole


@pytest.mark.parametrize(
    ("chain", "said"),
    [
        (signer(SERVERS) + BETWEEN + ROOT, "cannot sign with the certificate of CN=signer: .*is invalid"),
        (signer(None) + BETWEEN + ROOT, "cannot sign with the certificate of CN=signer: .*is invalid"),
        (signer() + certificate("between", "root", days=0.001) + ROOT, "of CN=between is valid from .*, not today"),
        (signer() + ROOT, "CN=signer was issued by CN=between, but after it comes that of CN=root; give the whole"),
        (ROOT + BETWEEN + signer(), "key is not that of the certificate"),
    ],
    ids=["of a server", "of no purpose", "expired above", "a gap", "turned round"],
)  # fmt: skip
def test_what_c2pa_would_refuse_is_said_before_the_work(tmp_path, chain, said):
    def work():
        raise AssertionError("frames were asked for")
        yield

    with pytest.raises(CredentialsError, match=said):
        certificates.use(Identity(chain, KEY))
        media.write_video(tmp_path / "a.mp4", work(), origin=Origin())
    certificates.use(None)
    assert not list(tmp_path.iterdir())


def test_nobody_is_trusted_by_what_is_no_certificate(tmp_path):
    path = media.write_video(tmp_path / "a.mp4", FRAMES, origin=Origin())
    for anchors in ("", "no certificate", KEY):
        with pytest.raises(CredentialsError, match="cannot trust what is no certificate"):
            verify(path, anchors=anchors)


def test_an_input_whose_record_is_damaged_is_recorded_by_its_hash(tmp_path):
    """Not at the cost of the work that was done with it."""
    given = media.write_video(tmp_path / "given.mp4", FRAMES, origin=Origin({"seed": 1}))
    data = bytearray(given.read_bytes())
    at = data.index(b"uuid") + 60
    data[at : at + 340] = bytes(range(85)) * 4
    given.write_bytes(data)
    assert len(list(media.read_video(given))) == 3
    with pytest.raises(CredentialsError, match="cannot read the credentials of given.mp4"):
        verify(given)
    with pytest.warns(UserWarning, match="of given.mp4 only the hash is recorded: its own record is damaged"):
        child = media.write_video(tmp_path / "child.mp4", FRAMES, origin=Origin(inputs=(Input.of(given),)))
    verdict = verify(child)
    assert verdict.answer == TRUSTED and not verdict.inputs
    assert verdict.actions[0]["parameters"]["inputs"] == [{"name": "given.mp4", "sha256": credentials.hash_file(given)}]
