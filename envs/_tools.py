"""Tools: typed async methods of an environment, with their JSON Schema read from the signature.

Invariant: a tool body only ever sees arguments that met its signature; a call that does not is answered
with what is wrong and counted invalid.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints, overload

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from palaestra.errors import TaskError
from palaestra.types import Form, ToolCall, ToolSpec

MethodT = TypeVar("MethodT", bound=Callable[..., Awaitable[str]])

_MARK = "__palaestra_tool__"


class ToolError(Exception):
    """Raise it in a tool to refuse a well-formed call; the agent reads the message and goes on."""


class InvalidCallError(Exception):
    """A call named no tool, or its arguments did not meet the schema."""


@overload
def tool(method: MethodT, /) -> MethodT: ...


@overload
def tool(*, form: Form | None = None, name: str = "") -> Callable[[MethodT], MethodT]: ...


def tool(
    method: MethodT | None = None, /, *, form: Form | None = None, name: str = ""
) -> MethodT | Callable[[MethodT], MethodT]:
    """Offer an async method to the agent as a tool.

    Its name, docstring, and annotated parameters become the schema; it returns the text that the agent reads.
    With `form` it is offered in that form only; `name` lets two forms use one name for different methods.
    """

    def mark(marked: MethodT) -> MethodT:
        is_async: bool = inspect.iscoroutinefunction(marked)
        if not is_async:
            raise TaskError(f"tool {marked.__qualname__} must be an async function")
        setattr(marked, _MARK, _Mark(form, name or marked.__name__))
        return marked

    return mark if method is None else mark(method)


@dataclass(frozen=True, slots=True)
class _Mark:
    form: Form | None
    name: str


@dataclass(frozen=True, slots=True)
class BoundTool:
    """A tool of one environment class: its spec, and the model that checks its arguments."""

    spec: ToolSpec
    method_name: str
    arguments: type[BaseModel]
    form: Form | None = None
    """The only form it is offered in; None for both."""

    def check(self, call: ToolCall) -> dict[str, Any]:
        """The call's arguments, typed; raises `InvalidCallError` naming the first problem."""
        if not isinstance(call.arguments, Mapping):
            raise InvalidCallError(f"arguments: must be an object, not {type(call.arguments).__name__}")
        _refuse_broken_text(call.arguments)
        try:
            checked = self.arguments.model_validate(dict(call.arguments))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "arguments"
            raise InvalidCallError(f"{where}: {first['msg']}") from error
        return {name: getattr(checked, name) for name in self.arguments.model_fields}


def collect_tools(cls: type) -> tuple[BoundTool, ...]:
    """The tools of an environment class, in the order of definition, base classes first."""
    tools: dict[tuple[str, Form | None], BoundTool] = {}
    for base in reversed(cls.__mro__):
        for method_name, value in vars(base).items():
            mark = getattr(value, _MARK, None)
            if mark is not None:
                tools[mark.name, mark.form] = _bind(mark, method_name, value)
    return tuple(tools.values())


def offered_tools(tools: Iterable[BoundTool], form: Form) -> Mapping[str, BoundTool]:
    """The tools offered in a form, by name; raises `TaskError` when two of them share one."""
    offered: dict[str, BoundTool] = {}
    for bound in tools:
        if bound.form in (None, form):
            if bound.spec.name in offered:
                raise TaskError(f"two tools of the {form} form are called {bound.spec.name!r}")
            offered[bound.spec.name] = bound
    return offered


def _bind(mark: _Mark, method_name: str, method: Callable[..., Any]) -> BoundTool:
    name = mark.name
    docstring = inspect.getdoc(method)
    if not docstring:
        raise TaskError(f"tool {name} has no docstring; the agent reads it")
    hints = get_type_hints(method, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in list(inspect.signature(method).parameters.values())[1:]:
        if parameter.name not in hints:
            raise TaskError(f"tool {name}: parameter {parameter.name} has no type")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (hints[parameter.name], default)
    model = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
    schema = model.model_json_schema()
    parameters = {
        "type": "object",
        "properties": {key: _without_title(value) for key, value in schema.get("properties", {}).items()},
        "required": schema.get("required", []),
    }
    if "$defs" in schema:
        parameters["$defs"] = schema["$defs"]
    return BoundTool(ToolSpec(name=name, description=docstring, parameters=parameters), method_name, model, mark.form)


def _refuse_broken_text(arguments: Mapping[str, Any]) -> None:
    """A lone surrogate is a Python string and no text: it would fail later, in a file or on the wire."""
    try:
        json.dumps(dict(arguments), ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise InvalidCallError(f"arguments: not Unicode text: {error.reason}") from error


def _without_title(field: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in field.items() if key != "title"}
