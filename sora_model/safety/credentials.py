"""Content credentials (C2PA): a signed record in a file of what made it, from what; and what such a record is worth.

    verdict = verify("clip.mp4")
    verdict.answer          # "trusted", "signed by an unknown party", "altered" or "no credentials"

`media.write_video` signs what it is given an `Origin` for, last of all: any later change of the file breaks the record,
or loses it. Of the prompt the record holds the hash alone. On c2pa-python; nothing is asked of a network.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sora_kernels import __version__

from .. import extras
from . import certificates, store, watermark
from .certificates import CredentialsError, Identity
from .policy import hash_text
from .verdict import ALTERED, ANSWERS, NONE, TRUSTED, UNKNOWN, TooLongError, Verdict, judged

__all__ = [
    "ALTERED", "ANSWERS", "NONE", "TRUSTED", "UNKNOWN", "CredentialsError", "Input", "Origin", "Verdict",
    "checkpoint_hash", "hash_file", "mark", "media_type", "sealer", "signing", "verify", "youngest",
]  # fmt: skip

ALGORITHM = "org.sora-kernels.spread-spectrum.v1"  # unregistered
_SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_AGENT = {"name": "sora_model", "version": __version__}
_signing = contextvars.ContextVar("signing", default=True)


@dataclass(frozen=True)
class Input:
    """What something was made from. The credentials of a file are carried on where it is still what it was."""

    name: str
    sha256: str
    path: Path | None = None

    @classmethod
    def of(cls, given: str | os.PathLike[str] | np.ndarray, name: str = "frames") -> Input:
        """Of a file, or of frames in memory that go by `name`."""
        if isinstance(given, np.ndarray):
            return cls(name, hashlib.sha256(np.ascontiguousarray(given)).hexdigest())
        return cls(_text(Path(given).name), hash_file(Path(given)), Path(given))


@dataclass(frozen=True)
class Origin:
    """What made a clip: `settings` as they go into the record, and what it was made from, files and other clips.

    `source`: a digital source type of IPTC's vocabulary; by default media of a trained model, wholly or in part.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[Input | Origin, ...] = ()
    source: str | None = None

    @classmethod
    def of(cls, folder: Path | None, *, prompt: str | None = None, inputs: tuple = (), **settings: Any) -> Origin:
        """That of a checkpoint in `folder`, whose weights are hashed, and of a prompt, whose hash alone is kept."""
        if prompt is not None:
            settings["prompt_sha256"] = hash_text(prompt)
        if folder is not None:
            settings |= {"model": folder.resolve().name, "checkpoint_sha256": checkpoint_hash(folder)}
        return cls(settings, tuple(inputs))

    @property
    def identity(self) -> int:
        """32 bits that name it in the pixels: equal origins have one."""
        inputs = [one.identity if isinstance(one, Origin) else one.sha256 for one in self.inputs]
        told = json.dumps([dict(self.settings), inputs, self.source], sort_keys=True)
        return int.from_bytes(hashlib.sha256(told.encode()).digest()[:4], "big")


def mark(frames: Iterable[np.ndarray], origin: Origin | None) -> Iterable[np.ndarray]:
    """Frames of a model with the mark of their origin in the pixels; others, and what is unsigned, as they are."""
    return watermark.embed(frames, origin.identity) if _marks(origin) else frames


def _marks(origin: Origin | None) -> bool:
    return origin is not None and origin.source is None and _signing.get()


@contextlib.contextmanager
def signing(wanted: bool) -> Iterator[None]:
    """Files written inside carry credentials and mark, as by default, or neither, and each of those is warned of."""
    token = _signing.set(wanted)
    try:
        yield
    finally:
        _signing.reset(token)


def sealer(title: str, kind: str = "video/mp4") -> Callable[[Path, Origin], bytes] | None:
    """Signs a finished file of media type `kind` in place and returns its record; None, with a warning, where nothing
    can be signed.

    To be asked before the work: raises `CredentialsError` for a key or certificate that would not do, the mark's too.
    """
    if not _signing.get():
        warnings.warn(f"{title} is written without credentials, as asked: nothing shows what made it", stacklevel=3)
        return None
    watermark.secret()
    try:
        with extras.named("signing"):
            import c2pa
    except extras.MissingExtra as error:
        warnings.warn(f"{title} is UNSIGNED: {error}", stacklevel=3)
        return None
    identity = certificates.current().check()
    _try_out(c2pa, identity)
    return functools.partial(_seal, c2pa, identity, _text(title), kind)


@functools.lru_cache(8)
def _try_out(c2pa: Any, identity: Identity) -> None:
    """Signs a picture of one pixel: c2pa asks more of a certificate than its dates and its key."""
    image = io.BytesIO()
    Image.new("1", (1, 1)).save(image, "PNG")
    actions, _ = _history(c2pa, Origin())
    record = {"claim_generator_info": [_AGENT], "format": "image/png"}
    record |= {"assertions": [{"label": "c2pa.actions.v2", "data": {"actions": actions}}]}
    with _as_error(c2pa, f"cannot sign with the certificate of {identity.name}"):
        with _context(c2pa, identity.anchors) as context, c2pa.Builder(record, context=context) as builder:
            with _signer(c2pa, identity) as signer:
                builder.sign(signer, "image/png", image, io.BytesIO())


def _seal(c2pa: Any, identity: Identity, title: str, kind: str, file: Path, origin: Origin) -> bytes:
    marked = _marks(origin) and kind == "video/mp4"
    actions, ingredients = _history(c2pa, origin)
    assertions: list[dict[str, Any]] = [{"label": "c2pa.actions.v2", "data": {"actions": actions}}]
    if marked:
        blocks = [{"scope": {}, "value": f"{origin.identity:08x}"}]
        assertions.append({"label": "c2pa.soft-binding", "data": {"alg": ALGORITHM, "blocks": blocks}})
    with _context(c2pa, identity.anchors) as context:
        record = {"claim_generator_info": [_AGENT], "title": title, "format": kind, "assertions": assertions}
        signed = file.with_name("signed")
        with _as_error(c2pa, f"cannot sign {title}"), c2pa.Builder(record, context=context) as builder:
            for entry, given in ingredients:
                with open(given.path, "rb") as source:
                    builder.add_ingredient(entry, entry["format"], source)
            with _signer(c2pa, identity) as signer, open(file, "rb") as source, open(signed, "w+b") as target:
                manifest = builder.sign(signer, kind, source, target)
        signed.replace(file)
    if marked:
        try:
            store.keep(origin.identity, title, manifest)
        except (CredentialsError, OSError) as error:
            warnings.warn(f"{title} cannot be found again by its mark: its record is not kept: {error}", stacklevel=4)
    return manifest


def _history(c2pa: Any, origin: Origin) -> tuple[list[dict[str, Any]], list[tuple[dict[str, Any], Input]]]:
    """The actions that led to a clip, first to last, and the files that they began with."""
    actions: list[dict[str, Any]] = []
    ingredients: list[tuple[dict[str, Any], Input]] = []

    def add(one: Origin) -> None:
        for given in one.inputs:
            if isinstance(given, Origin):
                add(given)
            elif (kind := _carries_on(c2pa, given)) is not None:
                first = not actions
                label = f"input-{len(ingredients)}"
                relation = "parentOf" if first else "componentOf"
                entry = {"title": given.name, "format": kind, "relationship": relation, "label": label}
                ingredients.append((entry, given))
                action = "c2pa.opened" if first else "c2pa.placed"
                actions.append({"action": action, "parameters": {"ingredientIds": [label]}})
        files = [{"name": i.name, "sha256": i.sha256} for i in one.inputs if isinstance(i, Input)]
        source = one.source or ("compositeWithTrainedAlgorithmicMedia" if one.inputs else "trainedAlgorithmicMedia")
        actions.append(
            {
                "action": "c2pa.edited" if actions else "c2pa.created", "digitalSourceType": _SOURCE + source,
                "softwareAgent": _AGENT, "parameters": dict(one.settings) | ({"inputs": files} if files else {}),
            }
        )  # fmt: skip

    add(origin)
    return actions, ingredients


def _carries_on(c2pa: Any, given: Input) -> str | None:
    """The media type of an input whose record can go into another; None, with a warning, where it cannot."""
    if given.path is None:
        return None
    why = "its format has no credentials"
    try:
        if hash_file(given.path) != given.sha256:
            why = "it is gone, or no longer what was read"
        elif (kind := media_type(given.path)) is not None:
            with open(given.path, "rb") as file, _context(c2pa, "") as context:
                with contextlib.suppress(c2pa.C2paError.ManifestNotFound), c2pa.Reader(kind, file, context=context):
                    pass
            return kind
    except OSError:
        why = "it is gone, or no longer what was read"
    except c2pa.C2paError as error:
        why = f"its own record is damaged ({error})"
    warnings.warn(f"of {given.name} only the hash is recorded: {why}", stacklevel=6)
    return None


def verify(path: str | os.PathLike[str], *, anchors: str | None = None, manifest: bytes | None = None) -> Verdict:
    """What a file's credentials are worth. `anchors`, PEM: whom to trust, by default this installation's own root,
    nobody where there is none; `manifest`: a record that is kept elsewhere, instead of the file's own.

    "trusted": signed by whom an anchor vouches for, and not a byte altered since. "signed by an unknown party": not
    altered, but anyone can sign. "altered": the record is not that of this file. Raises `CredentialsError` for a file
    that cannot be read, or whose format has no credentials.
    """
    with extras.named("verifying credentials"):
        import c2pa
    path = Path(path)
    try:
        kind = media_type(path)
    except OSError as error:
        raise CredentialsError(f"cannot read {os.fspath(path)!r}: {error.strerror or error}") from error
    if kind is None and manifest is None:
        raise CredentialsError(f"{os.fspath(path)!r} holds no credentials: it is no MP4, MOV, AVI, PNG, JPEG or WebP")
    with _as_error(c2pa, certificates.NO_ANCHOR):
        context = _context(c2pa, certificates.anchors() if anchors is None else certificates.named(anchors))
    with context, open(path, "rb") as file:
        with _as_error(c2pa, f"cannot read the credentials of {path.name}"):
            try:
                reader = c2pa.Reader(kind or "video/mp4", file, manifest, context=context)
            except c2pa.C2paError.ManifestNotFound:
                return Verdict(path.name, NONE)
            with reader:
                record = json.loads(reader.json())
    try:
        return judged(path.name, record, record["active_manifest"], record["validation_results"])
    except (TooLongError, RecursionError) as error:
        why = "its history is deeper than can be told" if isinstance(error, RecursionError) else error
        raise CredentialsError(f"cannot tell what {path.name} was made from: {why}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise CredentialsError(f"cannot read the credentials of {path.name}: they are not of C2PA's form") from error


def youngest(path: str | os.PathLike[str], identities: Collection[int]) -> tuple[int, store.Record, Verdict] | None:
    """Of the marks in one clip, that of what was made from all the others, its record in `store` and what that is
    worth; None where there is no such."""

    def before(verdict: Verdict) -> Iterator[str | None]:
        for one in verdict.inputs:
            yield one.binding
            yield from before(one)

    wanted = {f"{identity:08x}" for identity in identities}
    for identity in identities:
        record = store.find(identity)[0]
        verdict = verify(path, manifest=record.manifest)
        if wanted <= {f"{identity:08x}", *before(verdict)}:
            return identity, record, verdict
    return None


def media_type(path: Path) -> str | None:
    """By its first bytes; None for what holds no credentials."""
    if not path.is_file():
        raise FileNotFoundError(2, "there is no such file" if not path.exists() else "it is not a regular file")
    with open(path, "rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp":
        return "video/quicktime" if head[8:12] == b"qt  " else "video/mp4"
    if head[:4] == b"RIFF":
        return {b"AVI ": "video/x-msvideo", b"WEBP": "image/webp"}.get(head[8:12])
    return "image/jpeg" if head[:3] == b"\xff\xd8\xff" else "image/png" if head[:4] == b"\x89PNG" else None


def checkpoint_hash(folder: Path) -> str:
    """SHA-256 of what `sha256sum */*.safetensors` prints in a checkpoint's folder."""
    files = sorted(folder.glob("*/*.safetensors"))
    lines = (f"{_hashed(file, *_stamp(file))}  {file.relative_to(folder)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _text(name: str) -> str:
    """A file's name for a record, in which bytes that are no text are question marks."""
    return name.encode("utf-8", "replace").decode()


def _stamp(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size


@functools.lru_cache(256)
def _hashed(file: Path, *stamp: int) -> str:
    return hash_file(file)


def hash_file(file: str | os.PathLike[str]) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as source:
        while block := source.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# Of what a certificate may be for: to sign claims of C2PA, documents, mail.
_PURPOSES = "1.3.6.1.4.1.62558.2.1\n1.3.6.1.5.5.7.3.36\n1.3.6.1.5.5.7.3.4\n"


def _context(c2pa: Any, anchors: str) -> Any:
    """Without anchors, nobody is trusted."""
    return c2pa.Context.from_dict(
        {
            "verify": {
                "verify_trust": True, "verify_after_sign": True, "remote_manifest_fetch": False, "ocsp_fetch": False,
            },
            "trust": {"trust_config": _PURPOSES} | ({"user_anchors": anchors} if anchors else {}),
            "builder": {
                "thumbnail": {"enabled": False},
                "created_assertion_labels": ["c2pa.actions", "c2pa.actions.v2", "c2pa.soft-binding"],
            },
        }
    )  # fmt: skip


@contextlib.contextmanager
def _signer(c2pa: Any, identity: Identity) -> Iterator[Any]:
    """What signs by an identity. What its function raises, c2pa would swallow: it goes on here."""
    failed: list[BaseException] = []

    def sign(data: bytes) -> bytes:
        try:
            return identity.sign(data)
        except BaseException as error:
            failed.append(error)
            raise

    if identity.sign is not None:
        signer = c2pa.Signer.from_callback(sign, c2pa.C2paSigningAlg.ES256, identity.sent, None)
    else:
        info = c2pa.C2paSignerInfo(b"es256", identity.sent.encode(), (identity.key or "").encode(), None)
        signer = c2pa.Signer.from_info(info)
    with signer:
        try:
            yield signer
        except c2pa.C2paError:
            if failed:
                raise failed[0] from None
            raise


@contextlib.contextmanager
def _as_error(c2pa: Any, what: str) -> Iterator[None]:
    try:
        yield
    except c2pa.C2paError as error:
        raise CredentialsError(f"{what}: {error or 'the file is damaged'}") from error
