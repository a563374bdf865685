"""The schema of one model: held by a server, with an engine of its own, or a name that routes to others.

Invariants:
- The form follows from exactly one of the keys `instance`, `engine` and `route`.
- `ModelKeys` are the keys that `defaults.model` may contain.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from fleetd.config.schema.base import (
    MODEL_NAME,
    PROCESS_NAME,
    Block,
    Bool,
    ModelName,
    PathText,
    Seconds,
    SecondsOrZero,
    Word,
)
from fleetd.config.schema.process import EngineKeys
from fleetd.config.schema.types import Choice, DurationType, MemoryType, Strings, Text, Whole

FORMS = ("instance", "engine", "route")
_Names = Annotated[tuple[str, ...], Strings(Text(pattern=MODEL_NAME, what="the name of a model"))]


class ModelQueueKeys(Block):
    max: Annotated[int, Whole(0, 1_000_000)] = 64
    timeout: Annotated[float, DurationType("1ms", "1d")] | None = None  # None: the gateway's


class RequestKeys(Block):
    """Changes to a body: `set` always, `default` where missing, `strip` removed."""

    set: dict[str, Any] = Field(default_factory=dict)
    default: dict[str, Any] = Field(default_factory=dict)
    strip: Annotated[tuple[str, ...], Strings()] = ()


class ModelKeys(Block):
    """The keys of every model that can be in memory, and of `defaults.model`."""

    memory: Annotated[Literal["auto"] | int | dict[str, int], MemoryType()] = "auto"
    preload: Bool = False
    pin: Bool = False
    priority: Annotated[int, Whole(-1000, 1000)] = 0
    ttl: SecondsOrZero = 600.0
    min_resident: SecondsOrZero = 30.0
    concurrency: Annotated[int, Whole(1, 10_000)] | None = None
    queue: ModelQueueKeys = ModelQueueKeys()
    load_timeout: Annotated[float, DurationType("100ms", "7d")] = 300.0
    request: RequestKeys | None = None
    fallback: _Names = ()


class ModelfileKeys(Block):
    template: Annotated[str, Text(1_000_000)] | None = None
    system: Annotated[str, Text(1_000_000)] | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    adapter: PathText | None = None
    license: Annotated[str, Text(1_000_000)] | None = None


class HeldModel(ModelKeys):
    """A model that one or several servers can hold."""

    instance: Annotated[
        tuple[str, ...], Strings(Text(pattern=PROCESS_NAME, what="the name of an instance"), at_least=1)
    ]
    served_as: Annotated[str, Text(512, pattern=r"\S(.*\S)?", what="a name")] | None = None
    aliases: _Names = ()
    from_: Annotated[str, Text(4096, what="a path or a name")] | None = Field(None, alias="from")
    quantize: Word | None = None
    modelfile: ModelfileKeys | None = None
    embedding: Bool = False
    options: dict[str, Any] = Field(default_factory=dict)


class EngineModel(EngineKeys, ModelKeys):
    """A model with a process of its own."""

    served_as: Annotated[str, Text(512, pattern=r"\S(.*\S)?", what="a name")] | None = None
    aliases: _Names = ()
    start: Annotated[Literal["always", "on-demand"], Choice("always", "on-demand")] = "on-demand"


class RouteKeys(Block):
    to: ModelName
    weight: Annotated[int, Whole(0, 1_000_000)] = 1
    shadow: Bool = False


class RouteModel(Block):
    """A name that routes to other models by weight."""

    route: tuple[RouteKeys, ...]
    aliases: _Names = ()
    fallback: _Names = ()

    @field_validator("route")
    @classmethod
    def _goes_somewhere(cls, route: tuple[RouteKeys, ...]) -> tuple[RouteKeys, ...]:
        if not 1 <= len(route) <= 100:
            raise ValueError("must have 1 to 100 entries, such as [{to: coder, weight: 90}]")
        return route


def _form(value: Any) -> str | None:
    if isinstance(value, dict):
        return next((form for form in FORMS if form in value), None)
    forms = ((HeldModel, "instance"), (EngineModel, "engine"), (RouteModel, "route"))
    return next((form for model, form in forms if isinstance(value, model)), None)


AnyModel = HeldModel | EngineModel | RouteModel
ModelEntry = Annotated[
    Annotated[HeldModel, Tag("instance")] | Annotated[EngineModel, Tag("engine")] | Annotated[RouteModel, Tag("route")],
    Discriminator(
        _form,
        custom_error_type="model_form",
        custom_error_message="needs one of: instance (held by a server), engine (a process of its own) or route",
    ),
]
__all__ = ["AnyModel", "EngineModel", "HeldModel", "ModelEntry", "ModelKeys", "RouteModel", "Seconds"]
