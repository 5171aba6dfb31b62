"""Captions: one small grammar that writes them, recognises them, and knows every word they can hold.

A template is a sentence with slots in braces; ``SLOTS`` gives what may stand in each. Which templates are
true of a clip is decided from its state. The fixed evaluation prompts are built here too, from other
templates of the same words.
"""

from __future__ import annotations

import re
from functools import cache

from .scenes import BACKGROUNDS, COLOURS, DIRECTIONS, HELD_OUT, SHAPES, WALLS, Dice, Scene, State, pairs

NOUNS: dict[str, tuple[str, ...]] = {
    "circle": ("ball", "circle", "disc"),
    "square": ("square", "block"),
    "triangle": ("triangle",),
    "ring": ("ring", "hoop"),
}
WAYS: dict[str, tuple[str, ...]] = {
    "right": ("right", "to the right", "towards the right"),
    "left": ("left", "to the left", "towards the left"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
}
SLOTS: dict[str, tuple[str, ...]] = {
    "go": ("moves", "glides", "slides", "rolls", "drifts", "travels"),
    "pass": ("passes", "goes", "moves", "slides", "rolls"),
    "behind": ("a wall", "the wall", *(f"a {c} wall" for c in WALLS), "a bar"),
    "out": ("comes out on the other side", "comes out again", "reappears", "reappears on the other side"),
    "way": tuple(w for ways in WAYS.values() for w in ways),
    "pace": ("slowly", "quickly"),
    "back": tuple(BACKGROUNDS),
}
THING = "{thing}"
STILL = (THING,)
MOVING = (THING, f"{THING} {{go}} {{way}}", f"{THING} {{go}} {{way}}")
PACED = (f"{THING} {{go}} {{pace}} {{way}}", f"{THING} {{go}} {{way}} {{pace}}")
BOUNCING = (
    f"{THING} bounces around",
    f"{THING} bounces off the edge",
    f"{THING} {{go}} {{way}} and bounces",
    f"{THING} {{go}} {{way}} and bounces off the edge",
)
BESIDE = (f"{THING} and {{behind}}",)
NEARING = (f"{THING} {{go}} {{way}} towards {{behind}}",)
HIDING = (
    f"{THING} {{pass}} behind {{behind}}",
    f"{THING} {{pass}} {{way}} behind {{behind}}",
    f"{THING} disappears behind {{behind}}",
    f"{THING} hides behind {{behind}}",
)
REAPPEARING = (
    f"{THING} {{pass}} behind {{behind}}",
    f"{THING} {{pass}} {{way}} behind {{behind}}",
    f"{THING} {{pass}} behind {{behind}} and {{out}}",
    f"{THING} {{pass}} {{way}} behind {{behind}} and {{out}}",
    f"{THING} disappears behind {{behind}} and {{out}}",
    f"{THING} is hidden by {{behind}} for a moment",
)
TAIL = " on a {back} background"
TEMPLATES = tuple(dict.fromkeys(STILL + MOVING + PACED + BOUNCING + BESIDE + NEARING + HIDING + REAPPEARING))
SLOW, QUICK = 0.48, 0.65
_SEEN_MOVING = 0.03


def write(dice: Dice, scene: Scene, state: State) -> str:
    """A caption that is true of the clip: what it shows, where it first moves, and what becomes of it.

    "slowly" and "quickly" mean below ``SLOW`` and above ``QUICK`` shorter sides per second, "bounces" that
    the object meets an edge within the clip, "comes out" that ``state.reappears``, a way that it is where the
    object first heads.
    """
    way = float(abs(state.position - state.position[:1]).max())
    speed = float((state.velocity[0] ** 2).sum() ** 0.5)
    if scene.wall is not None:
        if state.reappears:
            templates = REAPPEARING
        elif state.hides:
            templates = HIDING
        else:
            templates = NEARING if way >= _SEEN_MOVING else BESIDE
    elif way < _SEEN_MOVING:
        templates = STILL
    elif state.bounces[-1] > 0:
        templates = MOVING + BOUNCING
    else:
        templates = MOVING
    if scene.wall is None and way >= _SEEN_MOVING and not SLOW <= speed <= QUICK and dice.chance(0.3):
        templates = PACED
    choices = dict(SLOTS)
    choices["thing"] = _named(scene.colour, scene.shape)
    choices["way"] = WAYS[scene.direction]
    choices["pace"] = ("slowly",) if speed < SLOW else ("quickly",)
    choices["back"] = (scene.background,)
    if scene.wall is not None:
        choices["behind"] = tuple(
            b for b in SLOTS["behind"] if scene.wall.colour in b or not any(c in b for c in WALLS)
        )
    template = dice.pick(templates) + (TAIL if dice.chance(0.2) else "")
    return re.sub(r"\{(\w+)\}", lambda m: dice.pick(choices[m.group(1)]), template)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _named(colour: str, shape: str) -> tuple[str, ...]:
    return tuple(f"{article} {colour} {noun}" for noun in NOUNS[shape] for article in (_article(colour), "the"))


def _things(split: str) -> tuple[str, ...]:
    return tuple(thing for pair in pairs(split) for thing in _named(*pair))


@cache
def _recogniser(split: str) -> re.Pattern[str]:
    options = {**SLOTS, "thing": _things(split)}
    patterns = (
        re.sub(r"\{(\w+)\}", lambda m: "(?:" + "|".join(options[m.group(1)]) + ")", template)
        for template in (t + tail for t in TEMPLATES for tail in ("", TAIL))
    )
    return re.compile("|".join(patterns))


def can_write(text: str, split: str = "train") -> bool:
    """True when ``text`` is a caption that some clip of ``split`` could bear."""
    return _recogniser(split).fullmatch(text) is not None


def _words() -> tuple[str, ...]:
    text = [*TEMPLATES, TAIL, *_things("all"), *(o for options in SLOTS.values() for o in options)]
    return tuple(sorted({w for t in text for w in re.sub(r"\{\w+\}", " ", t).split()}))


VOCABULARY: tuple[str, ...] = _words()

# Wordings the grammar never writes: no article, or another order.
_NOVEL_BOUNCE = (
    "{thing} moves {way}",
    "to the {side} rolls {a_thing}",
    "the {noun} is {colour} and slides {way}",
    "on a black background {a_thing} glides {way}",
    "{thing} bounces",
    "the {noun} moves {way} and is {colour}",
)
_NOVEL_OCCLUDER = (
    "{thing} passes behind wall and reappears",
    "behind a wall goes {a_thing} and comes out",
    "the {noun} is {colour} and goes {way} behind a wall",
    "a wall hides {a_thing} for a moment and the {noun} reappears",
)


def eval_prompts() -> list[tuple[str, dict]]:
    """40 fixed prompts that no training clip bears, each with what its clip must show.

    16 name the held-out (colour, shape) pairs, four each, half of them in the grammar's own wording; 24 name
    other pairs in wordings the grammar never writes. ``expected``: scene, colour, shape, direction (None when
    not said), reappears (True, or None where there is no wall), held_out.
    """
    prompts: list[tuple[str, dict]] = []

    def add(template: str, colour: str, shape: str, noun: str, direction: str) -> None:
        wall = "wall" in template
        text = template.format(
            thing=f"{colour} {noun}",
            a_thing=f"{_article(colour)} {colour} {noun}",
            colour=colour,
            noun=noun,
            side=direction,
            way=WAYS[direction][-1],
        )
        says = any(s in template for s in ("{way}", "{side}"))
        expected = {
            "scene": "occluder" if wall else "bounce",
            "colour": colour,
            "shape": shape,
            "direction": direction if says else None,
            "reappears": True if wall else None,
            "held_out": (colour, shape) in HELD_OUT,
        }
        prompts.append((text, expected))

    sides = ("right", "left", "up", "down")
    for i, (colour, shape) in enumerate(HELD_OUT):
        nouns = NOUNS[shape]
        add("{a_thing} moves {way}", colour, shape, nouns[0], sides[i])
        add("{a_thing} passes behind a wall and reappears", colour, shape, nouns[-1], sides[i % 2])
        add(_NOVEL_BOUNCE[0], colour, shape, nouns[-1], sides[(i + 1) % 4])
        add(_NOVEL_OCCLUDER[i], colour, shape, nouns[0], sides[i % 2])
    for i in range(24):
        colour = list(COLOURS)[i % len(COLOURS)]
        shape = SHAPES[(i + i // 8) % len(SHAPES)]
        if (colour, shape) in HELD_OUT:
            shape = SHAPES[(SHAPES.index(shape) + 3) % len(SHAPES)]
        wall = i % 5 in (2, 4)
        template = _NOVEL_OCCLUDER[i % 4] if wall else _NOVEL_BOUNCE[i % 6]
        direction = list(DIRECTIONS)[(i + i // 4) % (2 if wall or "{side}" in template else 4)]
        add(template, colour, shape, NOUNS[shape][i % len(NOUNS[shape])], direction)
    return prompts
