"""The readings of a prompt that rules are applied to, each character with its place in what was typed.

Text can be written so that a person or a model reads what a list of words does not: in letters of other alphabets,
with digits for letters, spaced out, backwards, encoded. `readings` gives the text as it is, and what those come to.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import functools
import html
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from urllib.parse import unquote

_LETTER = r"[^\W\d_]"
_LEET = str.maketrans("01345678@$!|9€¢£^", "oieasgtbasilgecla")
_ONE_AS_L = str.maketrans("1|", "ll")
_SIGNS_AS_NOTHING = _LEET | dict.fromkeys(map(ord, "@$!|€¢£^"), "-")
_DIGIT = r"[01345678@$9]"
_DRAWN = r"\(\)|<>|\[\]|[○◯●]|/\\"  # letters made of signs
_INVISIBLE = "\u115f\u1160\u3164\uffa0"  # drawn as nothing, though their category is that of letters
_TAGS = "[\U000e0000-\U000e007f]+"
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{12,}={0,2}")
# single letters with little between them
_SPACED = rf"(?<![^\W_])(?:{_LETTER}[\W_]{{1,3}}){{3,}}{_LETTER}(?![^\W_])"
_ESCAPE = r"(?:%[0-9A-Fa-f]{2})+|&(?:#\d{1,7};?|#[xX][0-9A-Fa-f]{1,6};?|[A-Za-z]{2,8};)|" + (
    r"\\u\{[0-9A-Fa-f]{1,6}\}|\\u[0-9A-Fa-f]{4}|\\x[0-9A-Fa-f]{2}|U\+[0-9A-Fa-f]{4,6}|\\[0-7]{2,3}"
)
_TAG = r"<!--.{0,200}?-->|</?\w[^<>]{0,200}>"
_HEX = re.compile(r"(?:(?:0[xX])?[0-9A-Fa-f]{2}[ :,;-]{0,2}){6,}")
_DECIMAL = re.compile(r"(?<!\d)(?:\d{2,3}[ ,;]{1,2}){5,}\d{2,3}(?!\d)")
_BINARY = re.compile(r"(?<!\d)(?:[01]{8}[ ,;]{0,2}){6,}")
_MORSE_TEXT = re.compile(r"[.-]{1,4}(?:[ /|]+[.-]{1,4}){3,}")
_MORSE = dict(
    zip(
        ".- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- ...- .-- -..- -.-- --.."
        .split(), "abcdefghijklmnopqrstuvwxyz", strict=True,
    )
)  # fmt: skip
_ODD_SHARE = 1 / 3  # of a text's words, beyond which it is unreadable


def _lookalikes() -> dict[str, str]:
    """Letters that look like another, folded, but those whose name says it (`_letter`)."""
    pairs = {
        "абвгенкмопрстухіјѕԁһԛԝӏьү": "abbrehkmonpctyxijsdhqwlby",
        "αβδεηικμνορσςτυχωγ": "abdenikuvopostuxwy",
        "ɑɩŋɔɟſ": "aincfs",
        "օսոհցզյ": "ounhgqj",  # Armenian
        "ⲁⲃⲥⲉⲏⲓⲕⲙⲛⲟⲣⲧⲩⲭⲱ": "abcehikmnoptyxw",  # Coptic
        "ꓮꓐꓚꓓꓰꓝꓖꓧꓲꓙꓗꓡꓟꓠꓳꓑꓣꓢꓔꓴꓦꓪꓫꓬꓜ": "abcdefghijklmnoprstuvwxyz",  # Lisu
        "ᎪᏴᏟᎠᎬᏀᎻᏆᎫᏦᏞᎷᏢᏒᏚᎢᏙᎳᎩᏃ": "abcdeghijklmprstvwyz",  # Cherokee
        "ⵏⵔⵝⵉ𐐪𐐬": "nooiao",
    }
    table = {other: own for others, owns in pairs.items() for other, own in zip(others, owns, strict=True)}
    for first in (0x1F1E6, 0x1F150, 0x1F170):  # regional indicators, negative circled and squared letters
        table |= {chr(first + i): chr(ord("a") + i) for i in range(26)}
    table |= {chr(0xE0000 + code): chr(code).lower() for code in range(0x20, 0x7F)}  # tags: invisible ASCII
    return table | {other.lower(): own for other, own in table.items()}


_LOOKALIKES = _lookalikes()
_NAMED = re.compile(
    r"(?:SQUARED )?LATIN (?:SMALL LETTER|LETTER SMALL CAPITAL)"
    r"(?: (?:TURNED|REVERSED|INVERTED|SIDEWAYS|DOTLESS|SCRIPT|OPEN|BLACKLETTER))*"
    r" ([A-Z])(?: WITH .+)?"
)
_FLIPPED = str.maketrans("nupdbqmw", "undpqbwm")  # what upside down is another letter


@functools.lru_cache(4096)
def _letter(c: str) -> str:
    """A small letter as the plain one that it looks like."""
    if c.isascii() or c in _LOOKALIKES:
        return _LOOKALIKES.get(c, c)
    named = _NAMED.fullmatch(unicodedata.name(c, ""))
    return named[1].lower() if named else c


@dataclass(frozen=True)
class Reading:
    """One reading of a prompt. `at[i]`: the place in the prompt that character i comes from; `bounded`: whether words
    can be told apart in it; `least`: the fewest letters of a match that means anything in it; `single`: whether letters
    that were doubled stand in it once."""

    name: str
    text: str
    at: tuple[int, ...]
    bounded: bool = True
    least: int = 1
    single: bool = False

    def span(self, start: int, end: int) -> tuple[int, int]:
        """(first, behind the last) character of the prompt, of a stretch of the reading."""
        places = self.at[start:end]
        return min(places), max(places) + 1


def readings(prompt: str) -> Iterator[Reading]:
    """The prompt as it is in lower case, then folded to plain letters, then decoded."""
    given = Reading("plain", prompt, tuple(range(len(prompt))))
    plain = "".join(c if len(c) == 1 else whole for whole in prompt for c in [whole.lower()])  # as many characters
    yield replace(given, text=plain.replace("_", " "))
    escaped = given
    for _ in range(3):  # what is escaped may hold escapes
        escaped = _replaced(escaped, _ESCAPE, _unescaped)
    yield from _of_letters(given, _LEET)
    if escaped.text != prompt:
        yield from _of_letters(escaped, _LEET)
    if re.search("[1|]", prompt):
        yield from _of_letters(escaped, _LEET | _ONE_AS_L)
    if re.search(r"\w[@$!|€¢£^]\w", prompt):
        yield from _of_letters(escaped, _SIGNS_AS_NOTHING)
    if re.search(_TAGS, prompt):  # they may stand for letters, above, or hide between them
        yield from _of_letters(_replaced(given, _TAGS, lambda match: ""), _LEET)
    if re.search(_TAG, escaped.text):
        yield from _of_letters(_replaced(escaped, _TAG, lambda match: ""), _LEET)
    if re.search("[a-z][A-Z]", prompt):
        yield _folded(_replaced(given, "[a-z][A-Z]", lambda match: " ".join(match[0])), _LEET)
    if any("TURNED" in unicodedata.name(c, "") for c in set(prompt) if not c.isascii()):
        flipped = replace(given, text=plain.translate(_FLIPPED)[::-1], at=given.at[::-1])
        yield replace(_folded(flipped, _LEET), name="upside down", least=4)
    yield from _encoded(prompt)


def _of_letters(given: Reading, leet: dict[int, str]) -> Iterator[Reading]:
    """What a text comes to, folded."""
    folded = _folded(given, leet)
    normal = _replaced(folded, r"(?<=[^\W_])(?:[^\w\s]|_){1,2}(?=[^\W_])", lambda match: "")
    normal = _replaced(normal, _SPACED, lambda match: re.sub(r"(?<=\w)[\W_](?=\w)", "", match[0]))
    yield normal
    for most in (1, 2):
        squeezed = _replaced(normal, rf"({_LETTER})\1{{2,}}", lambda match, most=most: match[1] * most)
        if squeezed.text != normal.text:
            yield squeezed
    if len(re.findall("aa|ii|uu", normal.text)) > 1:  # which few words have
        yield replace(_replaced(normal, rf"({_LETTER})\1+", lambda match: match[1]), single=True, least=4)
    for spaced in re.finditer(_SPACED, folded.text):
        letters = [(c, at) for c, at in zip(spaced[0], folded.at[slice(*spaced.span())], strict=True) if c.isalpha()]
        yield Reading("joined", *_flat(letters), bounded=False, least=4)
    for long in re.finditer(rf"{_LETTER}{{16,}}", normal.text):
        yield Reading("joined", long[0], normal.at[slice(*long.span())], bounded=False, least=5)
    yield Reading("reversed", normal.text[::-1], normal.at[::-1], least=4)
    yield replace(_replaced(normal, r"\w+", lambda match: match[0][::-1]), name="words reversed", least=4)
    yield replace(normal, name="rot13", text=codecs.encode(normal.text, "rot13"), least=4)
    words = re.findall(r"\w{3,}", normal.text)
    if 2 * sum(word.endswith("ay") for word in words) > len(words):
        yield replace(_replaced(normal, r"(\w+)(\w)ay\b", lambda match: match[2] + match[1]), name="pig latin", least=4)


def unreadable(prompt: str) -> tuple[int, int] | None:
    """The span of what no reader could read: masked letters, a dozen letters one by one, alphabets mixed inside a
    word, or, where they are more than a third of the words, words that cannot be said. None where there is
    no such thing."""
    text = unicodedata.normalize("NFKC", prompt)
    text = text if len(text) == len(prompt) else prompt
    if found := re.search(rf"{_LETTER}+[*#]+{_LETTER}+|(?<![^\W_])(?:{_LETTER}[\W_]{{1,3}}){{12}}", text):
        return found.span()
    words = list(re.finditer(r"[^\W_]+", text))
    odd = []
    for word in words:
        if _mixed(word[0]):
            return word.span()
        if _unsayable(word[0]):
            odd.append(word.span())
    return odd[0] if len(odd) > _ODD_SHARE * len(words) else None


def _folded(text: Reading, table: dict[int, str]) -> Reading:
    """Plain letters: compatibility forms, accents and lookalikes folded, what is invisible dropped, leet undone."""

    def letters() -> Iterator[tuple[str, int]]:
        for given, i in zip(text.text, text.at, strict=True):
            own = _LOOKALIKES.get(given, given)
            for part in unicodedata.normalize("NFD", unicodedata.normalize("NFKC", own)):
                if part == " " and not own.isspace():  # below an accent that stands by itself
                    continue
                if unicodedata.category(part) not in ("Mn", "Me", "Cf") and part not in _INVISIBLE:
                    yield from ((_letter(c), i) for c in part.lower())

    reading = Reading("normal", *_flat(letters()))
    drawn = rf"(?<=[a-z])(?:{_DRAWN})(?=[a-z])"
    reading = _replaced(reading, drawn, lambda match: "a" if match[0][0] == "/" else "o")
    leet = rf"(?<=[a-z]){_DIGIT}|{_DIGIT}(?=[a-z])|(?<=[a-z])[!|^€¢£](?=[a-z@$01345678])"
    for _ in range(3):  # from letters on, digit by digit
        reading = _replaced(reading, leet, lambda match: match[0].translate(table))
    return reading


def _encoded(prompt: str) -> Iterator[Reading]:
    for name, pattern, decode in (
        ("base64", _BASE64, _of_base64), ("hexadecimal", _HEX, _of_hex), ("morse", _MORSE_TEXT, _of_morse),
        ("binary", _BINARY, _of_binary), ("decimal", _DECIMAL, _of_decimal),
    ):  # fmt: skip
        for found in pattern.finditer(prompt):
            try:
                text = decode(found[0]).decode("utf-8").lower()
            except (binascii.Error, ValueError):
                continue
            if text:  # each letter of it stands for the whole of what was encoded
                yield Reading(name, text, (found.start(),) * (len(text) - 1) + (found.end() - 1,))


def _of_base64(code: str) -> bytes:
    code = code.rstrip("=").replace("-", "+").replace("_", "/")
    return base64.b64decode(code + "=" * (-len(code) % 4), validate=True)


def _of_hex(code: str) -> bytes:
    return bytes.fromhex(re.sub("0[xX]|[^0-9A-Fa-f]", "", code))


def _of_binary(code: str) -> bytes:
    return bytes(int(byte, 2) for byte in re.findall("[01]{8}", code))


def _of_decimal(code: str) -> bytes:
    return bytes(map(int, re.findall(r"\d+", code)))


def _of_morse(code: str) -> bytes:
    return " ".join("".join(_MORSE.get(c, "") for c in word.split()) for word in re.split("[/|]", code)).encode()


def _unescaped(match: re.Match) -> str:
    """What `_ESCAPE` found: percent signs of URLs, entities of HTML, escapes of programs."""
    code = match[0]
    if code[0] == "%":
        return unquote(code)
    if code[0] == "&":
        return html.unescape(code)
    number = int(code[1:], 8) if code[1].isdigit() else int(code[2:].strip("{}"), 16)
    return chr(number) if number < 0x110000 else code


def _flat(pairs: Iterable[tuple[str, int]]) -> tuple[str, tuple[int, ...]]:
    pairs = list(pairs)
    return "".join(c for c, _ in pairs), tuple(i for _, i in pairs)


def _replaced(reading: Reading, pattern: str, new: Callable[[re.Match], str]) -> Reading:
    """`re.sub` that keeps the places: of a shorter replacement, those of the match's first characters."""
    text, at, done = [], [], 0
    for match in re.finditer(pattern, reading.text):
        put = new(match)
        text += [reading.text[done : match.start()], put]
        at += [*reading.at[done : match.start()], *_spread(reading.at[match.start() : match.end()], len(put))]
        done = match.end()
    return replace(reading, text="".join([*text, reading.text[done:]]), at=(*at, *reading.at[done:]))


def _spread(places: tuple[int, ...], count: int) -> list[int]:
    return [places[i * (len(places) - 1) // max(1, count - 1)] for i in range(count)]


def _mixed(word: str) -> bool:
    scripts = {unicodedata.name(c, "").partition(" ")[0] for c in word if c.isalpha()}
    return len(word) > 2 and "LATIN" in scripts and bool(scripts & {"CYRILLIC", "GREEK"})


def _unsayable(word: str) -> bool:
    folded = "".join(c for c in unicodedata.normalize("NFD", word.lower()) if unicodedata.category(c) != "Mn")
    latin = re.fullmatch(r"[a-z0-9]{4,}", folded) and not folded.isdigit()
    digits = re.search(r"[a-z]\d+[a-z]+\d", folded)
    return bool(latin) and (len(word) > 30 or not re.search("[aeiouy]", folded) or bool(digits))
