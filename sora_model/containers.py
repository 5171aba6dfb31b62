"""Is a video file whole? What its container promises of a stream, beside the packets and pictures that came.

FFmpeg's demuxers pass over what they cannot read: of a file that is cut or damaged they give what is left, and no
error. So the structure is walked here, headers only, and the stream counted:

mp4   boxes must end in the file; the sample tables' counts; where an edit list hides samples, the time it promises
mkv   elements must tile the segment and be ones that Matroska has; the blocks of the stream's track
avi   each RIFF must end in the file; the entries of its index

A file that promises nothing (a recording of a stream: no count, no index, sizes unknown) is taken as it is.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from fractions import Fraction

from av.stream import Disposition

_MAX_ELEMENTS = 2_000_000
_BOXES = {b"ftyp", b"moov", b"mdat", b"moof", b"mfra", b"sidx", b"styp", b"free", b"skip", b"wide", b"uuid", b"meta"}

_EBML, _SEGMENT, _CLUSTER, _TRACKS = 0x1A45DFA3, 0x18538067, 0x1F43B675, 0x1654AE6B
_TRACK, _NUMBER, _KIND, _VIDEO = 0xAE, 0xD7, 0x83, 1
_SIMPLE_BLOCK, _GROUP, _BLOCK = 0xA3, 0xA0, 0xA1
_VOID, _CRC = 0xEC, 0xBF
# SeekHead, Info, Cues, Attachments, Chapters, Tags, and the signature slot that old files keep room for
_TOP = {_CLUSTER, _TRACKS, _VOID, _CRC, 0x114D9B74, 0x1549A966, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367,
        0x1B538667}  # fmt: skip
# Timestamp, Position, PrevSize; SilentTracks, EncryptedBlock
_NUMBERS, _IN_CLUSTER = {0xE7, 0xA7, 0xAB}, {_SIMPLE_BLOCK, _GROUP, _VOID, _CRC, 0x5854, 0xAF}


class DamagedError(ValueError):
    """The file is not whole; the message says where or by how much, to follow on "it is"."""


class Tally:
    """Counts the packets of one stream against what its file promises. `kind` is "mp4", "matroska" or "avi".

    frames   the pictures that the file counts, edit list and dropped frames considered; None where it does not
    """

    def __init__(self, handle: int, kind: str, container, stream) -> None:
        self._stream, self._codec = stream, stream.codec_context.name
        self._packets = self._due = self._shown = self._promised = 0
        self._first: int | None = None
        self._key: int | None = None
        self._shortest, self._longest = 1 << 62, 0
        self._seconds, self.frames = None, None
        end, entries = os.fstat(handle).st_size, stream.index_entries
        if kind == "matroska":
            videos = [s.index for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            self._promised = _blocks(handle, end, videos.index(stream.index), len(videos))
            return
        if kind == "avi":
            if _riffs_end(handle, end):
                self._promised = len(entries)  # what it dropped has no entry
                self.frames = len(entries) or stream.frames or None
            return
        fragments = [(a, b) for name, a, b in _boxes(handle, 0, end) if name == b"moof"]
        if any(entry.pos + entry.size > end for entry in entries):
            raise DamagedError(f"cut short, its index points beyond its {end} bytes")
        if fragments:
            self._promised = stream.frames + sum(_samples(handle, *box, stream.id) for box in fragments)
            return
        if not stream.frames:
            return
        self._promised = len(entries)
        self.frames = sum(not entry.is_discard for entry in entries)
        if self.frames != stream.frames:
            self._seconds = _edit(handle, end, stream)

    def add(self, packet) -> bool:
        """One packet of the stream, in the order of the file: whether it is to bring a picture.

        Raises DamagedError for one that is not whole.
        """
        if packet.size == 0:
            return False
        self._packets += 1
        if packet.is_corrupt:
            raise DamagedError(f"cut short or damaged in packet {self._packets - 1}")
        if packet.is_discard:
            return False
        if packet.duration:
            self._shown += packet.duration
            self._shortest = min(self._shortest, packet.duration)
            self._longest = max(self._longest, packet.duration)
        if packet.pts is not None:
            self._first = packet.pts if self._first is None else min(self._first, packet.pts)
        # Before the first key frame, in either order, there is nothing to decode from: players begin there too.
        if self._key is None and packet.is_keyframe:
            self._key = packet.pts or 0
        due = self._key is not None and (packet.pts is None or packet.pts >= self._key) and not self._repeats(packet)
        self._due += due
        return due

    def _repeats(self, packet) -> bool:
        """Whether the packet brings no picture by right: VP8's hidden reference, MPEG-4's frame that was not coded."""
        if self._codec == "vp8":
            return bytes(packet)[0] & 0x11 == 1
        return self._codec == "mpeg4" and packet.size <= 19

    def check(self, pictures: int, interlaced: bool) -> None:
        """At the end of the stream: DamagedError where fewer `pictures` came than there were to be."""
        due = (self._due + 1) // 2 if interlaced else self._due  # a packet may hold one field
        missing = max(self._promised - self._packets, due - pictures)
        if self._seconds is not None and self._shortest <= self._longest:
            delay, promised = (round(value / self._stream.time_base) for value in self._seconds)
            late = (self._first or 0) - delay  # the edit may begin within a picture, which is then not shown
            if late >= self._longest or self._shown + late < promised - self._shortest / 2:
                missing = max(missing, 1)
        if missing > 0:
            raise DamagedError(f"cut short or damaged, {missing} or more of its frames are missing")


def _riffs_end(handle: int, end: int) -> bool:
    """Whether an AVI says where it ends (one that was written as a stream does not): there or before `end`."""
    at = 0
    while at + 8 <= end:
        tag, size = struct.unpack("<4sI", os.pread(handle, 8, at))
        if tag != b"RIFF":
            break
        if size in (0, 2**32 - 1):
            return False
        if at + size > end:  # some writers count the eight bytes of the RIFF's own header
            raise DamagedError(f"cut short, {end} bytes of {at + size + 8}")
        at += 8 + size + size % 2
    return True


def _boxes(handle: int, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of the content of each MP4 box from `at` to `end`, not of what follows the last."""
    left = _MAX_ELEMENTS
    while at + 8 <= end and (left := left - 1):
        size, kind = struct.unpack(">I4s", os.pread(handle, 8, at))
        head = 8
        if size == 1:
            size, head = int.from_bytes(os.pread(handle, 8, at + 8), "big"), 16
        elif size == 0:
            size = end - at
        if (size < head or at + size > end) and kind not in _BOXES:
            return
        if size < head or at + size > end:
            raise DamagedError(f"cut short or damaged, its box {kind!r} at byte {at} ends at {at + size} of {end}")
        yield kind, at + head, at + size
        at += size


def _samples(handle: int, start: int, stop: int, track: int) -> int:
    """The samples of a track in a fragment of an MP4."""
    count = 0
    for name, a, b in _boxes(handle, start, stop):
        if name == b"traf":
            inner = list(_boxes(handle, a, b))
            (number,) = next(_fields(handle, at, ">4xI", ">4xI") for kind, at, _ in inner if kind == b"tfhd")
            runs = [_fields(handle, at, ">4xI", ">4xI")[0] for kind, at, _ in inner if kind == b"trun"]
            if not runs:
                raise DamagedError(f"damaged, a fragment of it at byte {start} has no samples")
            count += sum(runs) if number == track else 0
        elif name not in (b"mfhd", b"pssh"):
            raise DamagedError(f"damaged, its box {name!r} at byte {a} belongs in no fragment")
    return count


def _edit(handle: int, end: int, stream) -> tuple[Fraction, Fraction] | None:
    """(delay, length) in seconds that a track's edit list promises; None where it holds several edits.

    For a file that shows fewer samples than it has: DamagedError where nothing in it says so, or its numbers disagree.
    """
    movie = _boxes_by_name(handle, 0, end)[b"moov"]
    scale, track = 0, {}
    for name, start, stop in _boxes(handle, *movie):
        if name == b"mvhd":
            (scale,) = _fields(handle, start, ">12xI", ">20xI")
        elif name == b"trak":
            parts = _boxes_by_name(handle, start, stop)
            number, length = _fields(handle, parts[b"tkhd"][0], ">12xI4xI", ">20xI4xQ")
            if number == stream.id:
                track = parts
                break
    for inner in (b"mdia", b"minf", b"stbl", b"edts"):
        track |= _boxes_by_name(handle, *track.get(inner, (0, 0)))
    if not scale or not track.keys() >= {b"mdhd", b"stts", b"elst"}:
        raise DamagedError("damaged, its table of samples contradicts itself")
    rate, lasts = _fields(handle, track[b"mdhd"][0], ">12xII", ">20xIQ")
    times = _entries(handle, track[b"stts"], ">II")
    samples, total = sum(count for count, _ in times), sum(count * time for count, time in times)
    wide = os.pread(handle, 1, track[b"elst"][0]) == b"\x01"
    edits = _entries(handle, track[b"elst"], ">qqi" if wide else ">Iii")
    delay = sum(time for time, begin, _ in edits if begin < 0)
    shown = [time for time, begin, _ in edits if begin >= 0]
    # Muxers count the last frame, or the first one's delay, into one length and not into the other.
    agree = abs(delay + sum(shown) - length) <= len(edits) and samples * abs(lasts - total) <= 2 * total
    if not agree or stream.time_base != Fraction(1, rate):
        raise DamagedError("damaged, its edit list and its lengths contradict each other")
    return (Fraction(delay, scale), Fraction(shown[0], scale)) if len(shown) == 1 else None


def _boxes_by_name(handle: int, start: int, stop: int) -> dict[bytes, tuple[int, int]]:
    return {name: (a, b) for name, a, b in _boxes(handle, start, stop)}


def _entries(handle: int, box: tuple[int, int], form: str) -> list[tuple[int, ...]]:
    """The rows of a table: version and flags, their number, then they."""
    start, stop = box
    (count,) = struct.unpack(">I", os.pread(handle, 4, start + 4))
    row = struct.Struct(form)
    if start + 8 + count * row.size > stop:
        raise DamagedError(f"damaged, a table of {count} rows in {stop - start} bytes")
    return list(row.iter_unpack(os.pread(handle, count * row.size, start + 8)))


def _fields(handle: int, at: int, narrow: str, wide: str) -> tuple[int, ...]:
    """Numbers of a full box, whose version says how wide they are."""
    form = wide if os.pread(handle, 1, at) == b"\x01" else narrow
    return struct.unpack(form, os.pread(handle, struct.calcsize(form), at))


def _blocks(handle: int, end: int, video: int, videos: int) -> int:
    """The blocks of a Matroska file's `video`-th of `videos` video tracks; each element is passed over by its size."""
    at, stop, top, count, left = 0, end, False, 0, _MAX_ELEMENTS
    tracks: dict[int, int] = {}
    track = 0
    while at < stop:
        if not (left := left - 1):
            raise DamagedError(f"made of more than {_MAX_ELEMENTS} elements")
        name, start, size = _element(handle, at, end)
        until = end if size < 0 else start + size
        if until > stop:
            raise DamagedError(f"cut short or damaged, what begins at byte {at} ends at {until} of {stop}")
        if not top:
            if name == _SEGMENT:
                top, stop, until = True, until, start
            elif name not in (_EBML, _VOID, _CRC):
                raise DamagedError(f"damaged at byte {at}")
        elif name == _CLUSTER:
            until = start  # its children come next: they are not of the names above it
        elif name == _TRACKS:
            tracks = _kinds(handle, start, until)
            of_video = [number for number, kind in tracks.items() if kind == _VIDEO]
            if len(of_video) != videos:
                raise DamagedError("damaged, its table of tracks contradicts itself")
            track = of_video[video]
        elif name in (_SIMPLE_BLOCK, _GROUP):
            block = start if name == _SIMPLE_BLOCK else _find(handle, start, until, _BLOCK)[0]
            head = os.pread(handle, 8, block)
            number = _value(head[: _length(head)])
            if number not in tracks:
                raise DamagedError(f"damaged at byte {at}, a block of a track {number} that it has not")
            count += number == track
        elif name in _NUMBERS and 0 <= size <= 8:
            pass
        elif name not in _TOP | _IN_CLUSTER or size < 0:
            raise DamagedError(f"damaged at byte {at}")
        at = until
    return count


def _kinds(handle: int, at: int, end: int) -> dict[int, int]:
    """number -> kind of the tracks between two bytes."""
    found, left = {}, _MAX_ELEMENTS
    while at < end and (left := left - 1):
        name, start, size = _element(handle, at, end)
        if name == _TRACK:
            number, kind = (
                int.from_bytes(os.pread(handle, width, where), "big")
                for where, width in (_find(handle, start, start + size, field) for field in (_NUMBER, _KIND))
            )
            found[number] = kind
        at = start + size
    return found


def _find(handle: int, at: int, end: int, wanted: int) -> tuple[int, int]:
    """(start, size) of the content of the first element of a name."""
    begin, left = at, _MAX_ELEMENTS
    while at < end and (left := left - 1):
        name, start, size = _element(handle, at, end)
        if name == wanted:
            return start, size
        at = start + size
    raise DamagedError(f"damaged at byte {begin}")


def _element(handle: int, at: int, end: int) -> tuple[int, int, int]:
    """(name, start of content, its size or -1 for unknown) of the Matroska element at a byte."""
    head = os.pread(handle, 12, at)
    name = _length(head)
    size = _length(head[name:])
    if not 1 <= name <= 4 or not size or at + name + size > end:
        raise DamagedError(f"cut short or damaged at byte {at}")
    value = _value(head[name : name + size])
    return int.from_bytes(head[:name], "big"), at + name + size, -1 if value == (1 << 7 * size) - 1 else value


def _length(head: bytes) -> int:
    """Bytes of the number of variable length that `head` begins with, 0 where there is none."""
    length = 9 - head[0].bit_length() if head else 9
    return length if length <= min(8, len(head)) else 0


def _value(number: bytes) -> int:
    return int.from_bytes(number, "big") & ((1 << 7 * len(number)) - 1)
