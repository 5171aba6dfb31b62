"""Content credentials: what a file says of itself, who is believed, and what any change does to it."""

from __future__ import annotations

import hashlib
import stat
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from sora_model import Clip, Sora, media
from sora_model.extras import MissingExtra
from sora_model.reconstruct import load_vae, reconstruct
from sora_model.safety import certificates, credentials, watermark
from sora_model.safety import verdict as verdict_of
from sora_model.safety.certificates import CredentialsError, Identity
from sora_model.safety.credentials import ALTERED, NONE, TRUSTED, UNKNOWN, Input, Origin, mark, verify

pytest.importorskip("c2pa", reason="the extra [safety] is not installed")

GENERATED, COMPOSITE = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"


def frames(count: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (count, 32, 32, 3), dtype=np.uint8)


def write(path: Path, origin: Origin | None = Origin({"seed": 1}), seed: int = 0) -> Path:  # noqa: B008
    return media.write_video(path, frames(seed=seed), origin=origin)


def kinds(verdict) -> list[tuple[str, str]]:
    return [(a["action"], a.get("digitalSourceType", "").rpartition("/")[2]) for a in verdict.actions]


@pytest.fixture
def signed(tmp_path) -> Path:
    return write(tmp_path / "signed.mp4")


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """Another installation."""

    def be():
        monkeypatch.setenv(certificates.VARIABLE, str(tmp_path / "elsewhere"))

    return be


def test_an_intact_file_is_trusted_and_its_pixels_are_the_same(tmp_path, signed):
    verdict = verify(signed)
    assert (verdict.answer, verdict.reasons, kinds(verdict)) == (TRUSTED, (), [("c2pa.created", GENERATED)])
    assert verdict.actions[0]["parameters"] == {"seed": 1} and verdict.signer == "sora local"
    plain = media.write_video(tmp_path / "plain.mp4", mark(frames(seed=0), Origin({"seed": 1})))
    for ours, theirs in zip(media.read_video(signed), media.read_video(plain), strict=True):
        # x264 was seen to code the same frames in another way, once in a dozen runs
        assert np.abs(ours.astype(int) - theirs).mean() < 0.05 * theirs.std()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.mp4", "signed.mp4"]


def test_an_unsigned_file_has_none(tmp_path):
    assert verify(write(tmp_path / "plain.mp4", None)).answer == NONE


def test_every_altered_byte_of_the_picture_is_noticed(tmp_path, signed):
    data = bytearray(signed.read_bytes())
    start = data.index(b"mdat") + 8
    for at in (start, (start + len(data)) // 2, len(data) - 1):
        changed = data.copy()
        changed[at] ^= 1
        (tmp_path / "changed.mp4").write_bytes(changed)
        verdict = verify(tmp_path / "changed.mp4")
        assert verdict.answer == ALTERED and "assertion.bmffHash.mismatch" in verdict.reasons


def test_an_edited_record_is_noticed(tmp_path, signed):
    data = signed.read_bytes()
    assert data.count(GENERATED.encode()) == 1
    (tmp_path / "real.mp4").write_bytes(data.replace(GENERATED.encode(), b"digitalCapture" + b"_" * 9))
    verdict = verify(tmp_path / "real.mp4")
    assert verdict.answer == ALTERED and "assertion.hashedURI.mismatch" in verdict.reasons


def test_whoever_is_not_vouched_for_is_unknown(tmp_path, signed, stranger):
    ours = certificates.current().anchors
    stranger()
    assert verify(signed).answer == UNKNOWN and verify(signed).reasons == ("signingCredential.untrusted",)
    assert verify(signed, anchors=ours).answer == TRUSTED
    forged = write(tmp_path / "forged.mp4")
    assert verify(forged).answer == TRUSTED and verify(forged, anchors=ours).answer == UNKNOWN
    data = bytearray(forged.read_bytes())
    data[-1] ^= 1
    forged.write_bytes(data)
    assert verify(forged, anchors=ours).answer == ALTERED


def test_a_copied_record_is_not_that_of_another_file(tmp_path, signed):
    """Both files have one size up to the pictures: the record of the first is put over that of the second."""
    other = write(tmp_path / "other.mp4", seed=1)
    box = lambda data: slice(data.index(b"uuid") - 4, data.index(b"moov") - 4)  # noqa: E731
    first, second = signed.read_bytes(), other.read_bytes()
    spliced = bytearray(second)
    spliced[box(second)] = first[box(first)]
    other.write_bytes(spliced)
    assert verify(other).answer == ALTERED


def test_a_re_encoded_file_has_none(tmp_path, signed):
    again = media.write_video(tmp_path / "again.mp4", media.read_video(signed))
    assert verify(again).answer == NONE


def test_history_is_kept_and_a_tampered_parent_under_a_trusted_child_is_told(tmp_path, signed):
    made = dict(inputs=(Input.of(signed),))
    child = write(tmp_path / "child.mp4", Origin({"seed": 2}, **made))
    verdict = verify(child)
    assert verdict.answer == TRUSTED and kinds(verdict) == [("c2pa.opened", ""), ("c2pa.edited", COMPOSITE)]
    assert [(one.name, one.answer) for one in verdict.inputs] == [("signed.mp4", TRUSTED)]
    assert kinds(verdict.inputs[0]) == [("c2pa.created", GENERATED)] and not list(verdict.altered_inputs())

    data = bytearray(signed.read_bytes())
    data[-1] ^= 1
    signed.write_bytes(data)
    bad = write(tmp_path / "bad.mp4", Origin({"seed": 2}, inputs=(Input.of(signed),)))
    grandchild = write(tmp_path / "grandchild.mp4", Origin({"seed": 3}, inputs=(Input.of(bad),)))
    for file in (bad, grandchild):
        verdict = verify(file)
        assert verdict.answer == TRUSTED and [one.name for one in verdict.altered_inputs()] == ["signed.mp4"]


def test_a_history_that_leads_to_one_file_in_many_ways_is_told_to_a_bound(tmp_path, signed, monkeypatch):
    """Each clip was made from the last one and that again: a record is stored once, and told 2^n times."""
    path = signed
    for depth in range(4):
        path = write(tmp_path / f"{depth}.mp4", Origin({"seed": depth}, (Input.of(path), Input.of(path))))
    monkeypatch.setattr(verdict_of, "MOST", 31)
    assert verify(path).answer == TRUSTED
    monkeypatch.setattr(verdict_of, "MOST", 30)
    with pytest.raises(CredentialsError, match="what 3.mp4 was made from: its history has more than 30 parts"):
        verify(path)


def test_a_history_that_is_changed_inside_a_signed_file_is_noticed(tmp_path, signed, sora):
    """The record of what it was made from lies in the file itself, which its signer vouches for."""
    child = write(tmp_path / "child.mp4", Origin({"seed": 2}, (Input.of(signed),)))
    grandchild = write(tmp_path / "grandchild.mp4", Origin({"seed": 3}, (Input.of(child),)))
    for file in (child, grandchild):
        data = file.read_bytes()
        assert data.count(b"/" + GENERATED.encode()) == 1  # of the first of them, which was made of nothing
        forged = tmp_path / f"forged-{file.name}"
        forged.write_bytes(data.replace(b"/" + GENERATED.encode(), b"/digitalCapture" + b"_" * 9))
        verdict = verify(forged)
        assert verdict.answer == ALTERED and "ingredient.manifest.mismatch" in verdict.reasons
        assert "signed.mp4" in [one.name for one in verdict.altered_inputs()]
        code, out, err = sora("verify", forged)
        assert code == 4 and out.startswith(f"{forged.name}: altered") and not err


def test_nothing_is_trusted_that_c2pa_calls_invalid(tmp_path, signed):
    import c2pa

    child = write(tmp_path / "child.mp4", Origin({"seed": 2}, (Input.of(signed),)))
    data, changed = child.read_bytes(), tmp_path / "changed.mp4"
    start, end, seen = data.index(b"uuid"), data.index(b"moov"), set()
    for at in range(start + 20, end, 83):
        changed.write_bytes(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])
        try:
            answer = verify(changed).answer
        except CredentialsError:
            continue
        with credentials._context(c2pa, certificates.anchors()) as context, open(changed, "rb") as file:
            state = c2pa.Reader("video/mp4", file, context=context).get_validation_state()
        assert (answer == TRUSTED) == (state == "Trusted") and answer != NONE, (at, answer, state)
        seen.add(answer)
    assert seen == {TRUSTED, ALTERED}  # of padding a change says nothing


def test_whom_an_input_was_signed_by_is_asked_of_the_anchors_that_are_given(tmp_path, stranger):
    """Not of those that whoever used it had."""
    ours = certificates.current()
    stranger()
    theirs, given = certificates.current().anchors, write(tmp_path / "given.mp4")
    certificates.use(Identity(ours.chain + theirs, ours.key))
    try:
        child = write(tmp_path / "child.mp4", Origin({"seed": 2}, (Input.of(given),)))
        grandchild = write(tmp_path / "grandchild.mp4", Origin({"seed": 3}, (Input.of(child),)))
    finally:
        certificates.use(None)
    for file in (child, grandchild):
        for anchors, first in ((ours.anchors + theirs, TRUSTED), (ours.anchors, UNKNOWN)):
            verdict = verify(file, anchors=anchors)
            while verdict.inputs:
                assert verdict.answer == TRUSTED
                (verdict,) = verdict.inputs
            assert verdict.name == "given.mp4" and verdict.answer == first


@pytest.mark.parametrize(
    "label, data",
    [
        ("c2pa.soft-binding", {"alg": "a", "blocks": [{"scope": {}}]}),
        ("c2pa.soft-binding", {"alg": "a", "blocks": "no list"}),
        ("c2pa.soft-binding", {"alg": "a", "blocks": ["no mapping"]}),
        ("c2pa.soft-binding", "no mapping"),
        ("org.example.note", ["a", 1]),
    ],
)
def test_a_record_of_another_form_is_read_all_the_same(tmp_path, monkeypatch, sora, label, data):
    """Anyone can sign one."""
    import c2pa

    class Builder(c2pa.Builder):
        def __init__(self, record, **options):
            record["assertions"] = [record["assertions"][0], {"label": label, "data": data}]
            super().__init__(record, **options)

    made = c2pa.Context.from_dict
    unverified = {"verify_after_sign": False}
    with monkeypatch.context() as other:
        other.setattr(c2pa, "Builder", Builder)
        other.setattr(c2pa.Context, "from_dict", lambda given: made(given | {"verify": given["verify"] | unverified}))
        write(tmp_path / "odd.mp4", Origin({"seed": "1\nx.mp4: trusted\33[2J"}))
    verdict = verify(tmp_path / "odd.mp4")
    assert verdict.binding is None and verdict.answer in (TRUSTED, ALTERED)  # c2pa knows the form of some
    code, out, err = sora("verify", "odd.mp4")
    assert code == (0 if verdict.answer == TRUSTED else 4) and not err
    assert out.splitlines()[1:] == ["  c2pa.created trainedAlgorithmicMedia seed 1\\nx.mp4: trusted\\x1b[2J"]


def test_an_input_that_changed_since_it_was_read_is_recorded_by_its_hash_alone(tmp_path, signed):
    given, webm = Input.of(signed), tmp_path / "a.webm"
    webm.write_bytes(b"\x1aE\xdf\xa3 not ours to read")
    write(signed, seed=5)
    with pytest.warns(UserWarning, match="only the hash is recorded: (it is gone|its format)"):
        child = write(tmp_path / "child.mp4", Origin(inputs=(given, Input.of(webm))))
    verdict = verify(child)
    assert not verdict.inputs and kinds(verdict) == [("c2pa.created", COMPOSITE)]
    recorded = {one["name"]: one["sha256"] for one in verdict.actions[0]["parameters"]["inputs"]}
    assert recorded == {"signed.mp4": given.sha256, "a.webm": hashlib.sha256(webm.read_bytes()).hexdigest()}


def test_every_verb_says_what_it_made_from_what(tmp_path, tiny_checkpoint, signed):
    from PIL import Image

    sora = Sora.from_pretrained(tiny_checkpoint, device="cpu")
    options = dict(size=(32, 32), steps=1, seed=3)
    Image.fromarray(frames()[0]).save(tmp_path / "image.png")
    with pytest.warns(UserWarning, match="trained on"):
        clip = sora.generate("a red ring", seconds=0.4, **options)
        moved = sora.animate(tmp_path / "image.png", "a red ring", seconds=0.4, **options)
        both = sora.connect(clip, signed, "a red ring", seconds=0.5, **options)
        sora.generate_to(tmp_path / "to.mp4", "a red ring", seconds=0.4, **options)
    saved = [verify(one.save(tmp_path / f"{name}.mp4")) for name, one in zip("abc", (clip, moved, both), strict=True)]
    assert {one.answer for one in saved} == {TRUSTED}
    assert verify(tmp_path / "to.mp4").actions == saved[0].actions

    (made,) = saved[0].actions
    listed = "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(tiny_checkpoint)}\n"
        for path in sorted(tiny_checkpoint.glob("*/*.safetensors"))
    )
    assert made["parameters"] == {
        "prompt_sha256": hashlib.sha256(b"a red ring").hexdigest(), "seed": 3, "steps": 1, "guidance": clip.guidance,
        "size": "32x32", "frames": len(clip.frames), "fps": clip.fps,
        "model": "checkpoint", "checkpoint_sha256": hashlib.sha256(listed.encode()).hexdigest(),
    }  # fmt: skip
    assert b"red ring" not in (tmp_path / "a.mp4").read_bytes()
    assert kinds(saved[1]) == [("c2pa.opened", ""), ("c2pa.edited", COMPOSITE)]
    assert [(one.name, one.answer) for one in saved[1].inputs] == [("image.png", NONE)]
    assert kinds(saved[2]) == [("c2pa.created", GENERATED), ("c2pa.placed", ""), ("c2pa.edited", COMPOSITE)]
    assert [(one.name, one.answer) for one in saved[2].inputs] == [("signed.mp4", TRUSTED)]

    vae = load_vae(tiny_checkpoint, device="cpu")
    again = verify(reconstruct(vae, signed, tmp_path / "d.mp4").path)
    assert again.answer == TRUSTED and kinds(again)[-1] == ("c2pa.edited", COMPOSITE)
    assert [one.name for one in again.inputs] == ["signed.mp4"]
    alone = verify(Clip(frames(), 8, "a ring", 1, 2, 3.0).save(tmp_path / "e.mp4"))
    assert alone.answer == TRUSTED and alone.actions[0]["parameters"]["steps"] == 2


def test_what_is_asked_for_otherwise_is_told_otherwise(tmp_path, tiny_checkpoint):
    """Else a stripped clip would be named by the record of another."""
    from safetensors.torch import save_file

    sora = Sora.from_pretrained(tiny_checkpoint, device="cpu")
    width, name, lora = sora.dit.config.dim, "blocks.0.self_attn.q", tmp_path / "style.safetensors"
    halves = {"lora_A": torch.ones(1, width), "lora_B": torch.ones(width, 1)}
    save_file({f"{name}.{half}.weight": value for half, value in halves.items()}, lora)
    clip, given = frames(5), dict(prompt="a ring", seed=3, steps=1, size=(16, 16))
    kept = {}

    def add(called, made):
        kept[called] = made.origin

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        add("plain", sora.generate(seconds=0.5, **given))
        add("again", sora.generate(seconds=0.5, **given))
        add("longer", sora.generate(seconds=1, **given))
        add("larger", sora.generate(seconds=0.5, **given | {"size": (32, 16)}))
        add("faster", sora.generate(seconds=0.25, fps=16, **given))
        add("negative", sora.generate(seconds=0.5, negative="a dull picture", **given))
        add("shift", sora.generate(seconds=0.5, shift=2, **given))
        add("attention", sora.generate(seconds=0.5, attention="causal=frame", **given))
        for strength in (0.3, 0.4):
            add(f"edit {strength}", sora.edit(clip, strength=strength, **given))
        for box in ((0, 0, 16, 16), (16, 0, 32, 16)):
            add(f"inpaint {box}", sora.inpaint(clip, box=box, **given | {"size": (32, 32)}))
        for options in ({"seconds": 0.25}, {"seconds": 0.5}, {"seconds": 0.5, "backward": True}):
            add(f"extend {options}", sora.extend(clip, **options, **given))
        add("loop", sora.loop(clip, seconds=0.5, **given))
        sora.load_lora(lora)
        add("lora", sora.generate(seconds=0.5, **given))
        sora.weigh_loras(0.5)
        add("half the lora", sora.generate(seconds=0.5, **given))
        sora.unload_loras()
        assert sora.generate(seconds=0.5, **given).origin == kept.pop("again") == kept["plain"]
    assert len({origin.identity for origin in kept.values()}) == len(kept)
    told = f"style.safetensors {hashlib.sha256(lora.read_bytes()).hexdigest()}"
    assert [kept[k].settings["loras"] for k in ("lora", "half the lora")] == [[f"{told} 1"], [f"{told} 0.5"]]
    made = verify(write(tmp_path / "a.mp4", kept["lora"])).actions[0]["parameters"]
    assert made["loras"] == [f"{told} 1"] and b"dull" not in write(tmp_path / "b.mp4", kept["negative"]).read_bytes()


# --- who signs ---


def test_the_key_is_made_once_and_its_owner_alone_reads_it(tmp_path, stranger):
    stranger()
    first = certificates.current()
    path = tmp_path / "elsewhere" / "identity.pem"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and certificates.current() == first
    assert sorted(p.name for p in path.parent.iterdir()) == [".gitignore", "identity.pem"]
    assert (path.parent / ".gitignore").read_text() == "*\n"
    path.chmod(0o640)
    with pytest.raises(CredentialsError, match="mode 640.; chmod 600"):
        write(tmp_path / "a.mp4")
    assert not (tmp_path / "a.mp4").exists()


def test_a_new_key_leaves_what_the_old_one_signed_trusted(tmp_path, stranger):
    stranger()
    old = write(tmp_path / "old.mp4")
    with pytest.raises(CredentialsError, match="already; --force makes another"):
        certificates.init()
    certificates.init(force=True, organisation="New")
    new = write(tmp_path / "new.mp4")
    assert verify(old).answer == verify(new).answer == TRUSTED and verify(new).signer == "New"
    path = tmp_path / "elsewhere" / "identity.pem"
    path.write_text("cut short")
    with pytest.raises(CredentialsError, match="must hold a private key"):
        write(tmp_path / "more.mp4")
    certificates.init(force=True)
    assert verify(write(tmp_path / "more.mp4")).answer == TRUSTED and verify(old).answer == TRUSTED
    assert path.with_name("identity.pem.old").read_text() == "cut short"


def test_it_lies_where_settings_lie(monkeypatch, tmp_path):
    monkeypatch.delenv(certificates.VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, expected in (("/x", Path("/x/sora")), ("x", tmp_path / ".config/sora"), ("", tmp_path / ".config/sora")):
        monkeypatch.setenv("XDG_CONFIG_HOME", given)
        assert certificates.folder() == expected


def test_whom_to_trust_is_read_as_bundles_are_written(tmp_path, signed, stranger):
    ours = certificates.current().anchors
    stranger()
    more = tmp_path / "elsewhere" / "anchors.pem"
    more.parent.mkdir()
    assert verify(signed).answer == UNKNOWN and list(more.parent.iterdir()) == []  # to look at a file takes no key
    more.write_text(f"# Émetteur : Société\r\n{ours}")
    assert verify(signed).answer == TRUSTED and verify(signed, anchors=f"Société {ours}").answer == TRUSTED
    cut = ours[:200].encode()
    for held, said in ((b"\xff", "it is no PEM"), (b"# none", "no certificate"), (cut, "no certificate")):
        more.write_bytes(held)
        with pytest.raises(CredentialsError, match=f"anchors.pem'.*{said}"):
            verify(signed)
    more.unlink()
    more.mkdir()
    with pytest.raises(CredentialsError, match="cannot read .*anchors.pem': Is a directory"):
        verify(signed)


def test_what_cannot_sign_is_said_before_the_work(tmp_path, monkeypatch, stranger):
    def work():
        raise AssertionError("frames were asked for")
        yield

    def refused(said):
        with pytest.raises(CredentialsError, match=said):
            media.write_video(tmp_path / "a.mp4", work(), origin=Origin())
        assert not (tmp_path / "a.mp4").exists()

    stranger()
    path = certificates.init()
    good, other = certificates.load(path), Identity("", certificates.current().key)
    path.write_text(path.read_text().replace("PRIVATE", "PUBLIC"))
    refused("must hold a private key and its certificate")
    path.write_text(certificates._chain("Another").partition("-----BEGIN CERT")[0] + good.chain)
    refused("key is not that of the certificate")
    path.write_text((other.key or "") + "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    refused("is no X.509 in PEM")
    monkeypatch.setattr(certificates, "DAYS", -1)
    path.write_text(certificates._chain("Late"))
    refused("certificate is valid from .*, not today; `sora certs init --force`")


def test_a_key_may_stay_where_it_is(tmp_path):
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    text = certificates._chain("Vault")
    key = serialization.load_pem_private_key(text.encode(), None)
    asked = []

    def sign(data: bytes) -> bytes:
        asked.append(data)
        r, s = utils.decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")

    identity = Identity("".join(certificates._CERTIFICATE.findall(text)), sign=sign)
    certificates.use(identity)
    try:
        path = write(tmp_path / "a.mp4")
    finally:
        certificates.use(None)
    assert len(asked) >= 2 and verify(path, anchors=identity.anchors).answer == TRUSTED
    assert verify(path).answer == UNKNOWN and verify(path).signer == "Vault"
    with pytest.raises(CredentialsError, match="key is not that of the certificate"):
        certificates.use(Identity(identity.chain, sign=lambda data: bytes(31) + b"\1" + bytes(31) + b"\1"))


def test_a_key_that_fails_after_the_work_says_why_and_leaves_nothing(tmp_path):
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    own, up = certificates.current(), [True]
    key = serialization.load_pem_private_key(own.key.encode(), None)

    def sign(data: bytes) -> bytes:
        if not up[0]:
            raise ConnectionError("the vault does not answer")
        numbers = utils.decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
        return b"".join(number.to_bytes(32, "big") for number in numbers)

    def work():
        up[0] = False
        yield from frames()

    certificates.use(Identity(own.chain, sign=sign))
    try:
        with pytest.raises(ConnectionError, match="the vault does not answer"):
            media.write_video(tmp_path / "a.mp4", work(), origin=Origin())
    finally:
        certificates.use(None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", [
    lambda: certificates.use("chain.pem"), lambda: Identity(b"chain"), lambda: Identity("chain", b"key"),
])  # fmt: skip
def test_what_is_no_identity_is_named(call):
    with pytest.raises(TypeError, match="must be an Identity or None; got str|must be PEM, a str; got bytes"):
        call()


@pytest.mark.parametrize("make", [certificates.init, lambda: certificates.init(force=True), watermark.secret])
def test_a_disk_without_space_leaves_no_half_of_a_key(tmp_path, monkeypatch, stranger, make):
    stranger()
    forced = make not in (certificates.init, watermark.secret)
    before = certificates.init().read_text() if forced else None

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(certificates.os, "fsync", full)
    with pytest.raises(OSError, match="cannot write '.*': No space left on device"):
        make()
    monkeypatch.undo()
    stranger()
    left = sorted(path.name for path in (tmp_path / "elsewhere").iterdir())
    assert left == [".gitignore", "identity.pem"][: 1 + forced]
    assert not forced or certificates.current().key in before


# --- without ---


def test_a_file_without_credentials_is_written_loudly(tmp_path, monkeypatch):
    with credentials.signing(False), pytest.warns(UserWarning, match="a.mp4 is written without credentials, as asked"):
        write(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.warns(UserWarning, match=r"b.mp4 is UNSIGNED: signing needs c2pa, .* extra \[safety\]"):
        write(tmp_path / "b.mp4")
    with pytest.raises(MissingExtra, match=r"verifying credentials needs c2pa, .* extra \[safety\]"):
        verify(tmp_path / "b.mp4")
    monkeypatch.undo()
    assert {verify(tmp_path / name).answer for name in ("a.mp4", "b.mp4")} == {NONE}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.mp4", None, "there is no such file"),
        ("a.webm", b"\x1aE\xdf\xa3webm", "holds no credentials: it is no MP4, MOV"),
        ("empty.mp4", b"", "it is no MP4"),
        ("text.mp4", b"not a video at all", "it is no MP4"),
        ("cut.mp4", b"\0\0\0\x18ftypisom\0\0", "cannot read the credentials of cut.mp4"),
    ],
)
def test_what_cannot_hold_credentials_is_one_error(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CredentialsError, match=said):
        verify(tmp_path / name)


def test_no_cut_of_a_signed_file_is_trusted(tmp_path, signed):
    data = signed.read_bytes()
    for size in range(13, len(data), len(data) // 12):
        (tmp_path / "cut.mp4").write_bytes(data[:size])
        try:
            assert verify(tmp_path / "cut.mp4").answer in (ALTERED, NONE)
        except CredentialsError:
            pass


# --- the commands ---


def test_verify_gives_four_answers_and_codes(sora, tmp_path, signed, stranger):
    code, out, err = sora("verify", signed)
    assert code == 0 and out.startswith("signed.mp4: trusted, by sora local\n") and not err
    assert "c2pa.created trainedAlgorithmicMedia seed 1" in out
    facts = Origin({"seed": 1, "model": "m", "guidance": 2.0, "steps": 3, "checkpoint_sha256": "0"})
    out = sora("verify", write(tmp_path / "facts.mp4", facts))[1]  # c2pa gives them in another order each time
    assert out.endswith(" checkpoint_sha256 0, guidance 2.0, model m, seed 1, steps 3\n")
    root = sora("certs", "root")[1]
    assert root == certificates.current().anchors
    (tmp_path / "root.pem").write_text(root)
    data = bytearray(signed.read_bytes())
    data[-1] ^= 1
    (tmp_path / "bad.mp4").write_bytes(data)
    code, out, _ = sora("verify", "bad.mp4")
    assert code == 4 and out.startswith("bad.mp4: altered, by sora local (assertion.bmffHash.mismatch)")
    write(tmp_path / "plain.mp4", None)
    assert sora("verify", "plain.mp4")[:2] == (5, "plain.mp4: no credentials\n")
    write(tmp_path / "child.mp4", Origin(inputs=(Input.of(tmp_path / "bad.mp4"),)))
    code, out, err = sora("verify", "child.mp4")
    assert code == 4 and out.startswith("child.mp4: trusted") and "\n  bad.mp4: altered" in out
    assert "note: bad.mp4 had been altered after it was signed" in err
    stranger()
    code, out, _ = sora("certs", "init", "--organisation", "Else")
    assert code == 0 and "signs as O=Else,CN=signer" in out
    code, out, _ = sora("verify", signed)
    assert code == 3 and out.startswith("signed.mp4: signed by an unknown party, by sora local (signingCredential.unt")
    assert sora("verify", signed, "--anchor", "root.pem")[0] == 0
    (tmp_path / "text.pem").write_text("no certificate")
    for arguments, said in (
        (("verify", "nothing.mp4"), "there is no such file"), (("certs", "init"), "there is an identity"),
        (("verify", signed, "--anchor", "nothing.pem"), "cannot read 'nothing.pem'"),
        (("verify", signed, "--anchor", signed), "it is no PEM"),
        (("verify", signed, "--anchor", "text.pem"), "cannot trust what is no certificate; give PEM"),
    ):  # fmt: skip
        code, out, err = sora(*arguments)
        assert code == 1 and not out and said in err and len(err.splitlines()) == 1


def test_the_commands_sign_unless_told_not_to(sora, tmp_path, tiny_checkpoint):
    options = ("--weights", tiny_checkpoint, "--steps", 1, "--seconds", 0.1, "--device", "cpu")
    code, _, err = sora("generate", "a ring", *options, "--out", "a.mp4")
    assert code == 0 and "credentials" not in err and verify(tmp_path / "a.mp4").answer == TRUSTED
    code, _, err = sora("generate", "a ring", *options, "--out", "b.mp4", "--no-credentials")
    assert code == 0 and verify(tmp_path / "b.mp4").answer == NONE
    assert "note: b.mp4 is written without credentials, as asked" in err
    world = ("world", "render", "--n", 1, "--seed", 3, "--size", "32x32", "--seconds", 0.3, "--scene", "bounce")
    assert sora(*world, "--out", "world")[0] == 0
    (made,) = verify(tmp_path / "world" / "bounce-3.mp4").actions
    assert made["digitalSourceType"].endswith("/algorithmicMedia") and made["parameters"]["seed"] == 3
