"""Captions: a grammar that writes them from a clip's claims, and reads them back into the same program.

Each scene has ``RULES``: (account, number of things, templates). A template is a sentence with slots in braces: ``{a}``
``{b}`` ``{c}`` the things, ``{a_way}`` where one first heads, ``{camera}`` and ``{pace}``, and the free words of
``SLOTS``. A rule may be used where its account is among the clip's claims. What a caption says is a ``Program``;
``parse(write(...))`` gives it back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache

from .base import Claims, Dice, Scene, State, pairs
from .palette import BACKGROUNDS, COLOURS

NOUNS: dict[str, tuple[str, ...]] = {
    "circle": ("ball", "circle", "disc"),
    "square": ("square", "block"),
    "triangle": ("triangle",),
    "ring": ("ring", "hoop"),
    "box": ("box", "crate"),
    "line": ("line", "stroke"),
}
WAYS: dict[str, tuple[str, ...]] = {
    "right": ("right", "to the right", "towards the right"),
    "left": ("left", "to the left", "towards the left"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
    "clockwise": ("clockwise",),
    "counterclockwise": ("counterclockwise",),
}
PACES: dict[str, tuple[str, ...]] = {"slow": ("slowly",), "fast": ("quickly", "fast")}
SLOTS: dict[str, tuple[str, ...]] = {
    "go": ("moves", "glides", "slides", "drifts", "travels"),
    "and": ("and", "while"),
    "behind": ("a wall", "the wall", "a pillar", "the pillars"),
    "pass": ("passes", "goes", "slips"),
    "return": ("comes out again", "reappears", "comes out on the other side"),
    "hit": ("hits", "bumps into", "collides with"),
    "edge": ("bounces off the edge", "bounces off a side"),
    "look": ("turns away", "looks away", "pans away"),
    "back": ("comes back", "turns back", "returns"),
}
STYLE_WORDS: dict[str, tuple[str, ...]] = {
    "flat": ("", "in flat colours"),
    "outline": ("in outline", "as an outline", "in outline style"),
    "neon": ("in neon", "in neon light", "in neon style"),
    "sketch": ("as a sketch", "in sketch style", "as a pencil sketch"),
}
BACK = "on a {} background"
_LETTERS = "abc"


@dataclass(frozen=True)
class Program:
    """What a caption says. things: (colour, shape) of each, in the order they are named · ways: where each first heads,
    None when not said · account: what happens, in order · camera, pace, background: None when not said · style:
    ``flat`` when not said."""

    scene: str
    things: tuple[tuple[str, str], ...]
    ways: tuple[str | None, ...]
    account: tuple[str, ...] = ()
    camera: str | None = None
    pace: str | None = None
    style: str = "flat"
    background: str | None = None


@cache
def _grammar() -> tuple[tuple[str, tuple[str, ...], int, str], ...]:
    """(scene, account, number of things, template) of every template."""
    from .scenes import REGISTRY

    return tuple(
        (name, account, count, template)
        for name, scene in REGISTRY.items()
        for account, count, templates in scene.RULES
        for template in templates
    )


def slots(template: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", template)


def write(dice: Dice, scene: Scene, state: State) -> tuple[str, Program]:
    """A caption that is true of the clip, in one of its wordings, and what it says."""
    claims = scene.claims(state)
    count = len(state.things)
    rules = [
        (account, template)
        for name, account, number, template in _grammar()
        if name == scene.name and number == count and account in claims.accounts and _sayable(template, claims)
    ]
    account = dice.pick(sorted({account for account, _ in rules}))
    template = dice.pick([t for a, t in rules if a == account])
    things = tuple((t.colour, t.shape) for t in state.things)
    program = Program(scene.name, things, (None,) * count, account, style=scene.setting.style)
    return _fill(dice, template, program, claims, scene.setting.background)


def _sayable(template: str, claims: Claims) -> bool:
    for slot in slots(template):
        if slot.endswith("_way") and claims.ways[_LETTERS.index(slot[0])] is None:
            return False
        if slot in ("camera", "pace") and getattr(claims, slot) is None:
            return False
    return True


def _fill(dice: Dice, template: str, program: Program, claims: Claims, background: str) -> tuple[str, Program]:
    ways = list(program.ways)
    said: dict[str, str] = {}

    def word(match: re.Match) -> str:
        slot = match[1]
        if slot in _LETTERS:
            colour, shape = program.things[_LETTERS.index(slot)]
            article = "the" if dice.chance(0.15) else "an" if colour[0] in "aeiou" else "a"
            return f"{article} {colour} {dice.pick(NOUNS[shape])}"
        if slot.endswith("_way"):
            thing = _LETTERS.index(slot[0])
            ways[thing] = claims.ways[thing]
            return dice.pick(WAYS[ways[thing]])
        if slot in ("camera", "pace"):
            said[slot] = getattr(claims, slot)
            return dice.pick((WAYS if slot == "camera" else PACES)[said[slot]])
        return dice.pick(SLOTS[slot])

    text = re.sub(r"\{(\w+)\}", word, template)
    if dice.chance(0.25):
        said["background"] = background
        text += " " + BACK.format(background)
    text = f"{text} {dice.pick(STYLE_WORDS[program.style])}".strip()
    return text, replace(program, ways=tuple(ways), **said)


def _any(words) -> str:
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], str, tuple[str, ...], int], ...]:
    nouns = _any(n for names in NOUNS.values() for n in names)

    def pattern(match: re.Match) -> str:
        slot = match[1]
        if slot in _LETTERS:
            return f"(?:an?|the) (?P<{slot}_colour>{_any(COLOURS)}) (?P<{slot}_noun>{nouns})"
        if slot.endswith("_way") or slot == "camera":
            return f"(?P<{slot}>{_any(w for ways in WAYS.values() for w in ways)})"
        if slot == "pace":
            return f"(?P<pace>{_any(w for words in PACES.values() for w in words)})"
        return _any(SLOTS[slot])

    styles = _any(w for words in STYLE_WORDS.values() for w in words if w)
    tail = f"(?: on an? (?P<background>{_any(BACKGROUNDS)}) background)?(?: (?P<style>{styles}))?"
    return tuple(
        (re.compile(re.sub(r"\{(\w+)\}", pattern, _plain(template)) + tail), scene, account, count)
        for scene, account, count, template in _grammar()
    )


def _plain(text: str) -> str:
    """Lower case, no punctuation but the slots' braces, single spaces."""
    return " ".join(re.sub(r"[^\w{} ]+", " ", text.lower()).split())


def _which(table: dict[str, tuple[str, ...]], word: str | None) -> str | None:
    return next((name for name, words in table.items() if word in words), None)


def parse(text: str) -> Program | None:
    """What a caption of this grammar says; None for any other text. Case and punctuation do not matter."""
    text = _plain(text)
    for pattern, scene, account, count in _patterns():
        if (match := pattern.fullmatch(text)) is None:
            continue
        found = match.groupdict()
        letters = _LETTERS[:count]
        return Program(
            scene,
            tuple((found[f"{x}_colour"], _which(NOUNS, found[f"{x}_noun"])) for x in letters),
            tuple(_which(WAYS, found.get(f"{x}_way")) for x in letters),
            account,
            camera=_which(WAYS, found.get("camera")),
            pace=_which(PACES, found.get("pace")),
            style=_which(STYLE_WORDS, found["style"] or "") or "flat",
            background=found["background"],
        )
    return None


def can_write(text: str, split: str = "train") -> bool:
    """True when ``text`` is a caption that some clip of ``split`` could bear."""
    program = parse(text)
    return program is not None and set(program.things) <= set(pairs(split))


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can hold, sorted."""
    texts = [t for *_, t in _grammar()] + [BACK.format("x"), "a", "an", "the", *COLOURS, *BACKGROUNDS]
    for table in (NOUNS, WAYS, PACES, SLOTS, STYLE_WORDS):
        texts += [word for words in table.values() for word in words]
    words = {w for t in texts for w in _plain(re.sub(r"\{\w+\}", " ", t)).split()}
    return tuple(sorted(words - {"x"}))
