"""A row of the route table, and how its handler gets its arguments: by name and annotation, worked out once."""

from __future__ import annotations

import inspect
import math
import re
import types
import typing
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from devboxd.errors import ApiError, bad_request
from devboxd.http.body import Body

_NAMES = re.compile(r"{(\w+)}")
_FIELD = re.compile(r"`([^`]*)`")
_WHERE = " - at `"
_MAX_FIELDS = 100
BODY_LIMIT = 16 << 20


@dataclass(frozen=True)
class Route:
    """One operation. The path is in Starlette's form; names in braces are one segment each.

    `scope` is what a restricted key needs, such as "devboxes:read"; "" is public and needs no key. `once`: a POST
    with an effect, done once per x-request-id. `streamed`: the handler reads `call.request.stream()` by itself and
    `body_limit` (bytes) does not bind; `form` describes the parts of its multipart body. `waits`: the answer is held
    until something is so, and 408 says "ask again".
    """

    method: str
    path: str
    handler: Callable[..., Awaitable[Any]]
    scope: str
    once: bool = False
    streamed: bool = False
    waits: bool = False
    body_limit: int = BODY_LIMIT
    form: type[msgspec.Struct] | None = None


@dataclass(frozen=True)
class Absent:
    """An operation of the contract that this version lacks: its name in the clients, why, and what to do instead."""

    method: str
    path: str
    name: str
    why: str
    instead: str

    def refusal(self) -> ApiError:
        """501, which clients are told not to repeat."""
        words = f"cannot do {self.name}: {self.why} in this version; instead, {self.instead}"
        return ApiError(501, words, retry=False)


def path_names(path: str) -> tuple[str, ...]:
    """The names in braces of a path, in order."""
    return tuple(_NAMES.findall(path))


class Binding:
    """The parameters of one handler, sorted by where they come from. A handler that does not fit is a TypeError."""

    def __init__(
        self, handler: Callable[..., Any], path: str, call_type: type, services: Mapping[type, object]
    ) -> None:
        self.handler = handler
        self.path_names = path_names(path)
        self.takes_call = False
        self.body: BodyDecoder | None = None
        self.query: dict[str, Parameter] = {}
        self.bracketed: list[str] = []
        self.fixed: dict[str, object] = {}
        hints = typing.get_type_hints(handler, include_extras=True)
        self.returns: Any = hints.get("return")
        for name, parameter in inspect.signature(handler).parameters.items():
            if name not in hints:
                raise TypeError(f"{handler.__qualname__}: the parameter {name} has no annotation")
            self._sort(name, hints[name], parameter.default, call_type, services)
        if missing := set(self.path_names) - set(inspect.signature(handler).parameters):
            raise TypeError(f"{handler.__qualname__}: no parameter takes {', '.join(missing)} of {path}")

    def _sort(self, name: str, kind: Any, default: Any, call_type: type, services: Mapping[type, object]) -> None:
        if isinstance(kind, type) and kind in services:
            self.fixed[name] = services[kind]
        elif kind is call_type:
            self.takes_call = True
            if name != "call":
                raise TypeError(f"{self.handler.__qualname__}: the parameter of type Call is named call")
        elif name == "body":
            self.body = BodyDecoder(kind)
        elif kind is Bracketed:
            self.bracketed.append(name)
        elif name not in self.path_names:
            self.query[name] = Parameter(name, kind, default)

    def arguments(self, call: object, values: Sequence[str], query: bytes, body: Body) -> dict[str, Any]:
        """All arguments for one request. Raises ApiError 400 that names what does not fit."""
        arguments: dict[str, Any] = dict(self.fixed)
        arguments.update(zip(self.path_names, values, strict=True))
        if self.takes_call:
            arguments["call"] = call
        if self.body is not None:
            arguments["body"] = self.body.decode(body)
        if self.query or self.bracketed:
            pairs = _parse_query(query) if query else []
            given = dict(pairs)
            arguments.update((name, _bracketed(name, pairs)) for name in self.bracketed)
            for name, parameter in self.query.items():
                if name in given:
                    arguments[name] = parameter.convert(given[name])
                elif parameter.required:
                    raise bad_request(f"cannot do this request: the query parameter {name!r} is missing; add it")
        return arguments


def _parse_query(query: bytes) -> list[tuple[str, str]]:
    try:
        return list(parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=_MAX_FIELDS))
    except ValueError as error:
        raise bad_request(f"cannot read the query: it has more than {_MAX_FIELDS} parameters; send fewer") from error


class Bracketed(dict[str, list[str]]):
    """A filter of the query: `name[key]=value`, and `name[key][in]=one,another`; a key to the values that match."""


def _bracketed(name: str, pairs: list[tuple[str, str]]) -> Bracketed:
    found = Bracketed()
    for given, value in pairs:
        if given.startswith(f"{name}[") and given.endswith("]"):
            key = given[len(name) + 1 : -1]
            values = value.split(",") if key.endswith("][in") else [value]
            found.setdefault(key.removesuffix("][in"), []).extend(values)
    return found


@dataclass(frozen=True)
class Operation:
    """A route with its handler's arguments worked out."""

    route: Route
    binding: Binding

    @cached_property
    def group(self) -> str:
        """The folder of the handler, or the file's name within `resources`."""
        parts = self.route.handler.__module__.split(".")
        if len(parts) > 2 and parts[1] == "resources":
            return parts[2]
        return "server" if parts[1:2] == ["http"] else parts[1] if len(parts) > 1 else parts[0]

    @cached_property
    def name(self) -> str:
        """What it is called in descriptions and counts, such as devboxes.create_devbox."""
        return f"{self.group}.{self.route.handler.__name__}"


class Parameter:
    """One parameter of the query."""

    def __init__(self, name: str, kind: Any, default: Any) -> None:
        self.name = name
        self.kind = kind
        self.default = default
        self.required = default is inspect.Parameter.empty
        plain = typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind
        self._parts = typing.get_args(plain) if _is_union(plain) else (plain,)
        self._text = str in self._parts
        if not set(self._parts) <= {str, int, float, bool, type(None)} and not self._is_literal():
            raise TypeError(f"a query parameter cannot have the type {kind!r}: {name}")

    def _is_literal(self) -> bool:
        return any(typing.get_origin(part) is typing.Literal for part in self._parts)

    def convert(self, text: str) -> Any:
        """The value of this text. Raises ApiError 400."""
        if not self._text and text.strip().lower() in ("", "null"):
            raise self._refusal(text, "it is empty")
        if bool in self._parts and text.lower() not in ("true", "false"):
            raise self._refusal(text, "expected true or false")
        try:
            value = msgspec.convert(text, self.kind, strict=self._text)
        except msgspec.ValidationError as error:
            raise self._refusal(text, _lower(str(error)) + _choices(self.kind, "")) from None
        if isinstance(value, float) and not math.isfinite(value):
            raise self._refusal(text, "expected a finite number")
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            raise self._refusal(text, "expected a number of 64 bits")
        return value

    def _refusal(self, text: str, reason: str) -> ApiError:
        shown = text if len(text) <= 64 else text[:64] + "..."
        return bad_request(f"cannot use {shown!r} as the query parameter {self.name!r}: {reason}; correct it")


class BodyDecoder:
    """Reads a JSON body into its Struct; integers may be of any size.

    null stands for absent where a field has a default that is not null.
    """

    def __init__(self, kind: Any) -> None:
        parts = typing.get_args(kind) if _is_union(kind) else (kind,)
        self.kind = kind
        self.optional = type(None) in parts
        self._decode = msgspec.json.Decoder(kind).decode

    def decode(self, body: Body) -> Any:
        """The Struct; of an empty body None where that is allowed, else what `{}` gives. Raises ApiError 400."""
        if not body:
            if self.optional:
                return None
            body = b"{}"
        try:
            return self._decode_kindly(body)
        except msgspec.ValidationError as error:
            raise _body_error(error, self.kind) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise bad_request(f"cannot read the body: {error}; send one JSON object in UTF-8") from None
        except RecursionError:
            raise bad_request("cannot read the body: it is nested too deeply; send a flatter JSON object") from None

    def _decode_kindly(self, body: Body) -> Any:
        try:
            return self._decode(body)
        except msgspec.ValidationError:
            # The slow way is taken only by bodies that would be refused.
            return msgspec.convert(_tidied(self.kind, msgspec.json.decode(body)), self.kind)


def _tidied(kind: Any, value: Any) -> Any:
    """Leave out nulls where a field has a default and does not take them; make whole floats integers for int fields."""
    parts = (kind, *typing.get_args(kind))
    if isinstance(value, float) and value.is_integer() and int in parts and float not in parts:
        return int(value)
    struct = next((part for part in parts if _is_struct(part)), None)
    if struct is None or not isinstance(value, dict):
        return value
    fields = {field.encode_name: field for field in msgspec.structs.fields(struct)}
    return {
        name: _tidied(fields[name].type, item) if name in fields else item
        for name, item in value.items()
        if item is not None or name not in fields or fields[name].required or _accepts_none(fields[name].type)
    }


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _accepts_none(kind: Any) -> bool:
    return kind is typing.Any or type(None) in typing.get_args(kind)


def _body_error(error: msgspec.ValidationError, kind: Any) -> ApiError:
    reason, _, where = str(error).partition(_WHERE)
    path = where.rstrip("`").removeprefix("$").removeprefix(".")
    if found := re.match(r"Object missing required field `([^`]*)`", reason):
        name = f"{path}.{found[1]}" if path else found[1]
        return bad_request(f"cannot do this request: the field {name!r} is missing; add it")
    if found := re.match(r"Object contains unknown field `([^`]*)`", reason):
        name = f"{path}.{found[1]}" if path else found[1]
        return bad_request(f"cannot use the field {name!r}: it is not known here; leave it out")
    if not path:
        return bad_request(f"cannot read the body: {_lower(reason)}; send one JSON object")
    choices = _choices(kind, path) if reason.startswith("Invalid enum value") else ""
    return bad_request(f"cannot use the field {path!r}: {_lower(reason)}{choices}; correct it")


def _choices(kind: Any, path: str) -> str:
    """The values that the type has at this path of names, `[...]` and `[0]`, in words; empty where it has none."""
    names = re.findall(r"[^.\[\]]+|\[[^\]]*\]", path)
    for name in names:
        if name.startswith("["):
            kinds = [part for whole in _alternatives(kind) for part in typing.get_args(whole)[-1:]]
        else:
            structs = filter(_is_struct, _alternatives(kind))
            kinds = [f.type for one in structs for f in msgspec.structs.fields(one) if f.encode_name == name]
        if not kinds:
            return ""
        kind = kinds[0]
    values = [
        str(value)
        for part in _alternatives(kind)
        if typing.get_origin(part) is typing.Literal
        for value in typing.get_args(part)
    ]
    return f", expected one of {', '.join(values)}" if values else ""


def _alternatives(kind: Any) -> list[Any]:
    """The type without annotations, or the types of a union."""
    if typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    return list(typing.get_args(kind)) if _is_union(kind) else [kind]


def _lower(reason: str) -> str:
    return _FIELD.sub(r"\1", reason[:1].lower() + reason[1:])
