"""The tree of paths: which operation a request means, what else works there, and what a mistyped path may mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from urllib.parse import unquote

from devboxd.errors import ApiError, not_found
from devboxd.http.answer import Answer, of_error
from devboxd.http.binding import Absent, Operation

_ALIKE = 0.81
"""From this likeness of two words on, one is taken for a misspelling of the other."""
_PART = 0.8
"""The likeness of a word with one that begins or ends with it, and of a path with the only one below it."""
_LEAST_PART = 3
_VALUE = 0.9
"""The likeness of any word with a name in braces: less than that of the word that stands there itself."""
_MOST_COMPARED = 200
_ASTERISK = "*"


class OtherMethodError(Exception):
    """A path that is there does not have this method; `answer` says which it has."""

    def __init__(self, method: str, path: str, working: Sequence[str]) -> None:
        allowed = {*working, "OPTIONS", *(["HEAD"] if "GET" in working else [])}
        header = (b"allow", ", ".join(sorted(allowed)).encode())
        if method == "OPTIONS":
            self.answer = Answer(200, b"", (header,))
            return
        verb = "works" if len(working) == 1 else "work"
        words = f"cannot {method[:16]} {_shown(path)}: only {', '.join(working)} {verb} there"
        refusal = of_error(ApiError(405, words))
        self.answer = Answer(405, refusal.body, (*refusal.headers, header))


class Paths:
    """All paths with their operations. HEAD works where GET does."""

    def __init__(self) -> None:
        self._root = _Node()

    def add(self, operation: Operation | Absent, method: str, path: str) -> None:
        """Add one row of the table. Raises TypeError for a second one of the same method and path."""
        self._root.add(operation, method, path)

    def find(self, method: str, raw: str) -> tuple[Operation | Absent, list[str]]:
        """The operation, and the segments that its path names; an encoded slash belongs to its segment.

        Raises OtherMethodError, and ApiError 404 that names the nearest path.
        """
        if method == "OPTIONS" and raw == _ASTERISK:
            raise OtherMethodError(method, raw, ("GET", "POST"))
        segments = [unquote(segment) for segment in raw.split("/")[1:]]
        if segments[:2] == ["v1", "v1"]:  # the base URL of a client ends in /v1 already
            del segments[0]
        for node, values in self._root.find(segments, 0, []):
            if (operation := node.operations.get("GET" if method == "HEAD" else method)) is not None:
                return operation, values
            if node.operations:
                raise OtherMethodError(method, unquote(raw), sorted(node.operations))
        near = self._nearest(segments)
        hint = f"{_shown(near)} is meant perhaps, and /docs lists them all" if near else "/docs lists them all"
        raise not_found(f"cannot find {_shown(unquote(raw))}: there is no such path; {hint}")

    def _nearest(self, segments: list[str]) -> str | None:
        """The path that is most like this one, as are those that only lack /v1 or have it in vain."""
        words = [word for word in segments if word]
        if sum(map(len, words)) > _MOST_COMPARED:
            return None
        forms = (words, words[1:] if words[:1] == ["v1"] else ["v1", *words])
        found = [near for form in forms if form for near in self._root.near(form, 0)]
        return max(found, key=lambda near: near[0])[1] if found else None


@dataclass(eq=False)
class _Node:
    """One segment of the paths. Static segments win over names, so that a word is never taken for an id."""

    static: dict[str, _Node] = field(default_factory=dict)
    named: _Node | None = None
    operations: dict[str, Operation | Absent] = field(default_factory=dict)

    def add(self, operation: Operation | Absent, method: str, path: str) -> None:
        node = self
        for segment in path.split("/")[1:]:
            if segment.startswith("{"):
                node.named = node.named or _Node()
                node = node.named
            else:
                node = node.static.setdefault(segment, _Node())
        if node.operations.setdefault(method, operation) is not operation:
            raise TypeError(f"two rows for {method} {path}")

    def find(self, segments: list[str], at: int, values: list[str]) -> Iterator[tuple[_Node, list[str]]]:
        if at == len(segments):
            yield self, values
            return
        if (node := self.static.get(segments[at])) is not None:
            yield from node.find(segments, at + 1, values)
        if self.named is not None and segments[at]:
            yield from self.named.find(segments, at + 1, [*values, segments[at]])

    def near(self, words: list[str], at: int) -> Iterator[tuple[float, str]]:
        """Likeness and text of each path whose every segment is like the word there."""
        if at == len(words):
            if self.operations:
                yield 1.0, ""
            elif len(self.static) == 1:  # no guess among several
                yield from ((_PART, f"/{name}") for name, node in self.static.items() if node.operations)
            return
        for name, node in self.static.items():
            if likeness := _likeness(name, words[at]):
                yield from _below(node, words, at, likeness, name)
        if self.named is not None:
            yield from _below(self.named, words, at, _VALUE, words[at])


def _below(node: _Node, words: list[str], at: int, likeness: float, name: str) -> Iterator[tuple[float, str]]:
    return ((likeness * rest, f"/{name}{path}") for rest, path in node.near(words, at + 1))


def _likeness(name: str, word: str) -> float:
    word = word.lower()
    matcher = SequenceMatcher(None, name, word)
    if matcher.real_quick_ratio() >= _ALIKE and (ratio := matcher.ratio()) >= _ALIKE:
        return ratio
    is_part = len(word) >= _LEAST_PART and (name.startswith(word) or name.endswith(word))
    return _PART if is_part else 0.0


def _shown(path: str) -> str:
    return repr(path if len(path) <= 100 else path[:100] + "...")
