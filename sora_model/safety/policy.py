"""What may be asked for: rules in YAML, applied to every prompt before anything is computed.

    decision = policy.current().decide("a red ball bounces")
    decision.action, decision.category, decision.rule, decision.span        # "allow", None, None, None

`policy.yaml` beside this file is used unless the environment variable SORA_POLICY names another:

    unreadable: block                  # what becomes of text that no reader could read
    classes:
      - id: violence
        action: block                  # block, review or allow
        message: graphic violence is not made here
        terms: [gore, behead*]         # whole words in any writing; * stands for any ending
        persons: [Some Body]           # names, likewise
        patterns: {blood: 'pools? of blood'}      # regular expressions, by name; a blank is what parts words
        exceptions: [gore-tex]         # what is meant otherwise

"block" refuses the prompt, "review" lets it pass with a warning, "allow" only tells of it. Every decision that names a
rule is logged, under "sora_model.safety", with the prompt's SHA-256 in the place of the prompt.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .. import checks
from .normalise import Reading, readings, unreadable

ACTIONS = ("allow", "review", "block")  # in the order of severity
DEFAULT = Path(__file__).with_name("policy.yaml")
VARIABLE = "SORA_POLICY"

_FIELDS = ("id", "action", "message", "terms", "persons", "patterns", "exceptions")
_WORDS = r"(?<![^\W_])(?:{})(?![^\W_])"
_GAP = r"[\W_]+"  # between the words of a term
_log = logging.getLogger("sora_model.safety")

Head = Callable[[str], "Decision | None"]
"""A classifier of somebody's own, which knows what no list of words does. None is shipped: it needs weights."""

_heads: tuple[Head, ...] = ()


class PolicyError(ValueError):
    """A prompt that the policy refuses, as `decision` tells, or a policy that cannot be read (`decision` is None)."""

    def __init__(self, message: str, decision: Decision | None = None) -> None:
        super().__init__(message)
        self.decision = decision


@dataclass(frozen=True)
class Decision:
    """What the policy says of a prompt: `action`, and by which rule of which class, for which characters of the prompt
    (`span`), in which reading of it. An "allow" that no rule asked for names none."""

    action: str
    category: str | None = None
    rule: str | None = None
    span: tuple[int, int] | None = None
    reading: str | None = None
    message: str = ""


@dataclass(frozen=True)
class _Class:
    id: str
    action: str
    message: str
    rules: tuple[str, ...]
    bounded: re.Pattern[str] | None
    """What the rules match where words can be told apart, the group of rule i being the last, named `_i`."""
    loose: re.Pattern[str] | None
    single: re.Pattern[str] | None
    exceptions: re.Pattern[str] | None

    def hit(self, reading: Reading) -> tuple[str, tuple[int, int]] | None:
        pattern = self.single if reading.single else self.bounded if reading.bounded else self.loose
        if pattern is None or not pattern.search(reading.text):
            return None
        text = reading.text
        if self.exceptions:
            text = self.exceptions.sub(lambda match: "\0" * len(match[0]), text)
        for match in pattern.finditer(text):
            start, end = match.span()
            if end - start >= reading.least:
                return self.rules[int(match.lastgroup[1:])], reading.span(start, end)
        return None


class Policy:
    """Rules, read by `load`."""

    def __init__(self, content: Any) -> None:
        if not isinstance(content, Mapping) or (unknown := set(content) - {"unreadable", "classes"}):
            what = f"unknown {sorted(map(str, unknown))[0]!r}" if isinstance(content, Mapping) else "no mapping"
            raise ValueError(f"a policy holds the keys 'unreadable' and 'classes'; got {what}")
        self.unreadable = _action("unreadable", content.get("unreadable", "block"))
        self.classes = tuple(map(_class, checks.several("classes", content.get("classes") or [])))
        if twice := [one.id for one in self.classes if sum(other.id == one.id for other in self.classes) > 1]:
            raise ValueError(f"two classes have the id {twice[0]!r}; give each one of its own")

    @classmethod
    def load(cls, path: str | os.PathLike[str] = DEFAULT) -> Policy:
        """Reads a policy file. Raises `PolicyError` that names the file, the entry, what was expected and what came."""
        try:
            return cls(yaml.safe_load(Path(path).read_text("utf-8")))
        except (OSError, RecursionError, ValueError, re.error, yaml.YAMLError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise PolicyError(f"cannot use the policy {os.fspath(path)!r}: {reason}") from error

    def decide(self, prompt: str) -> Decision:
        """The severest decision of any class on any reading of the prompt; of equals, the first in the file."""
        best = Decision("allow")
        if (span := unreadable(prompt)) and self.unreadable != "allow":
            message = "it cannot be read, so it cannot be judged; write plain words"
            best = Decision(self.unreadable, "unreadable", "unreadable", span, "plain", message)
        for reading in readings(prompt):
            for one in self.classes:
                severer = ACTIONS.index(one.action) > ACTIONS.index(best.action) or best.category in (
                    None, "unreadable",
                )  # fmt: skip
                if severer and (found := one.hit(reading)):
                    if ACTIONS.index(one.action) >= ACTIONS.index(best.action):
                        best = Decision(one.action, one.id, *found, reading.name, one.message)
        return best


def current() -> Policy:
    """The policy of the file that SORA_POLICY names, or the shipped one."""
    return _loaded(os.environ.get(VARIABLE) or os.fspath(DEFAULT))


def use(*heads: Head) -> None:
    """Beside the rules, these judge prompts from now on, in every thread; with none, none."""
    global _heads
    for head in heads:
        if not callable(head):
            raise TypeError(f"a head of the policy must be a function of a prompt; got {type(head).__name__}")
    _heads = heads


def decide(prompt: str) -> Decision:
    """The severest decision of the current rules and heads; of equals, the rules'."""
    best = current().decide(prompt)
    for head in _heads:
        found = head(prompt)
        if found is None:
            continue
        if not isinstance(found, Decision) or found.action not in ACTIONS:
            raise TypeError(f"a head of the policy must give None or a Decision; got {found!r:.80}")
        if ACTIONS.index(found.action) > ACTIONS.index(best.action):
            best = dataclasses.replace(
                found, category=found.category or "unnamed", rule=found.rule or "unnamed",
                span=found.span or (0, len(prompt)),
            )  # fmt: skip
    return best


def check(prompt: str, name: str = "prompt") -> Decision:
    """Raises `PolicyError` for a prompt that the current policy blocks, warns of one to review, and logs the rule
    (`name` is the argument)."""
    decision = decide(prompt)
    if decision.category is None:
        return decision
    record = {
        "prompt_sha256": hash_text(prompt),
        "action": decision.action, "class": decision.category, "rule": decision.rule, "span": decision.span,
    }  # fmt: skip
    _log.info(json.dumps(record))
    start, end = decision.span
    what = f"{prompt[start:end]!r} (characters {start} to {end}) falls under {decision.category}, rule {decision.rule}"
    if decision.action == "block":
        raise PolicyError(f"{name} is refused: {what}: {decision.message}", decision)
    if decision.action == "review":
        warnings.warn(f"a person should look at what {name} makes: {what}: {decision.message}", stacklevel=3)
    return decision


def hash_text(text: str) -> str:
    """SHA-256, in hexadecimal: what stands for a prompt where it is not to be kept."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


_loaded = functools.lru_cache(Policy.load)


def _class(content: Any) -> _Class:
    if not isinstance(content, Mapping) or not isinstance(content.get("id"), str):
        raise ValueError(f"each of classes is a mapping with a text 'id'; got {content!r:.80}")
    name = content["id"]
    if unknown := [key for key in content if key not in _FIELDS]:
        raise ValueError(f"class {name!r} has the unknown key {unknown[0]!r}; known are {', '.join(_FIELDS)}")
    action = _action(f"the action of class {name!r}", content.get("action"))
    rules = {
        f"{kind}/{term}": _phrase(term)
        for kind in ("terms", "persons")
        for term in _texts(f"{kind} of class {name!r}", content.get(kind))
    }
    patterns = content.get("patterns") or {}
    if not isinstance(patterns, Mapping):
        raise ValueError(f"patterns of class {name!r} must be regular expressions by name; got {patterns!r:.80}")
    for rule, pattern in patterns.items():
        try:
            re.compile(pattern)
        except (TypeError, re.error) as error:
            raise ValueError(f"pattern {rule!r} of class {name!r} is no regular expression: {error}") from None
        if re.search(r"(?<!\\)(?:\\\\)*\\[1-9]", pattern):  # patterns are joined into one
            raise ValueError(
                f"pattern {rule!r} of class {name!r} refers to a group by its number; name it: (?P<x>...) and (?P=x)"
            )
        rules[f"patterns/{rule}"] = pattern.replace(" ?", r"\W?").replace(" ", r"\W+")
    excepted = _texts(f"exceptions of class {name!r}", content.get("exceptions"))
    return _Class(
        name, action, str(content.get("message", "")), tuple(rules),
        _any(rules.values(), _WORDS),
        _any((pattern.replace(_GAP, "").replace(r"\w*", "") for pattern in rules.values()), "{}"),
        _any((re.sub(r"(?<!\\)([a-z])\1", r"\1", pattern) for pattern in rules.values()), _WORDS),
        _any((_phrase(term).replace(_GAP, r"[\W_]*") for term in excepted), _WORDS),
    )  # fmt: skip


def _any(patterns: Iterable[str], around: str) -> re.Pattern[str] | None:
    joined = "|".join(f"(?P<_{i}>{pattern})" for i, pattern in enumerate(patterns))
    return re.compile(around.format(joined), re.IGNORECASE) if joined else None


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = checks.several(name, value or [])
    for text in texts:
        if not isinstance(text, str) or not re.search(r"\w", text):
            raise ValueError(f"{name} must be words; got {text!r} (quote what YAML reads otherwise, such as 'no')")
    return texts


def _phrase(term: str) -> str:
    """A term's words with anything between them that is no word."""
    words = re.findall(r"[\w']+\*?", term.lower())
    return _GAP.join(re.escape(word.rstrip("*")) + (r"\w*" if word.endswith("*") else "") for word in words)


def _action(name: str, value: Any) -> str:
    if value not in ACTIONS:
        raise ValueError(f"{name} must be one of {', '.join(ACTIONS)}; got {value!r}")
    return value
