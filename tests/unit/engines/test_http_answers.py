"""Servers whose answers differ from what an engine expects: another shape, another version, a refusal.

Every answer that an engine reads is changed at a random place, or replaced; the result must have the right type, or be an
EngineError that names the URL. The client is a fake without sockets, so that thousands of answers can be tried.
"""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetd.core.data.specs import ExitKind
from fleetd.engines import registry
from fleetd.engines.base import Endpoint, ProbeOutcome, Resident, ServedModel
from fleetd.engines.http import ANSWER_LIMIT_BYTES
from fleetd.engines.listed_models import LISTED_MODELS
from fleetd.engines.lmstudio.model_server import LmStudioServer
from fleetd.engines.vllm import sleep
from fleetd.errors import EngineError
from fleetd.models.ollama.api import OllamaApi
from tests.fakes.launch import fake

BASE = "http://127.0.0.1:1"
MODEL = ServedModel("name", "m")
LIST = {"object": "list", "data": [{"id": "m", "object": "model"}]}
CHOICES = {"choices": [{"index": 0, "text": "a", "message": {"content": "a"}}]}
EMBEDDINGS = {"data": [{"embedding": [0.5]}]}
PS = {"models": [{"name": "m", "model": "m:latest", "size": 5, "size_vram": 3, "context_length": 9}]}
V1 = {"models": [{"key": "m", "type": "llm", "size_bytes": 7, "loaded_instances": [{"id": "m"}]}]}
# engine → path → a good answer
GOOD: Mapping[str, Mapping[str, Any]] = {
    "external": {"/v1/models": LIST},
    "llamacpp": {
        "/health": {"status": "ok"}, "/v1/models": LIST, "/slots": [{"id": 0}], "/completion": {"content": "a"},
        "/embeddings": [{"embedding": [[0.5]]}],
    },
    "lmstudio": {
        "/api/v1/models": V1, "/api/v0/models": {"data": [{"id": "m", "state": "loaded", "type": "llm"}]},
        "/api/v1/models/load": {"status": "loaded", "instance_id": "m"}, "/api/v1/models/unload": {"instance_id": "m"},
        "/v1/chat/completions": CHOICES, "/v1/embeddings": EMBEDDINGS,
    },
    "ollama": {
        "/api/ps": PS, "/api/version": {"version": "0.33.0"}, "/api/generate": {"done": True}, "/api/embed": {"embeddings": [[1]]},
    },
    "process": {"/v1/models": LIST, "/v1/chat/completions": CHOICES, "/v1/completions": CHOICES, "/api/chat": {"message": {"a": 1}}},
    "vllm": {
        "/is_sleeping": {"is_sleeping": False}, "/v1/models": LIST, "/v1/completions": CHOICES, "/v1/embeddings": EMBEDDINGS,
    },
}  # fmt: skip
# answers that are not JSON, or JSON of another kind
WHOLE: tuple[bytes, ...] = (
    b"", b" ", b"null", b"[]", b"{}", b"5", b'"ok"', b"true", b"<!doctype html><title>It works</title>", b"{\"models\": [",
    b"\xff\xfe\x00", b"[" * 100_000, b'{"data": ' + b"9" * 5000 + b"}", b'{"models": [{"name": "\\ud800"}]}', b"NaN",
    b'{"error": {"message": "\\ud800"}}', b'{"error": [1]}', b'{"error": "no"}', b"x" * (ANSWER_LIMIT_BYTES + 1),
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


class Answer:
    """A fake of aiohttp's response."""

    def __init__(self, status: int, body: bytes, error: Exception | None) -> None:
        self.status, self._body, self._error = status, body, error
        self.content = self

    async def iter_any(self) -> AsyncIterator[bytes]:
        yield self._body[: len(self._body) // 2]
        if self._error is not None:
            raise self._error
        yield self._body[len(self._body) // 2 :]

    async def read(self, count: int) -> bytes:
        return self._body[:count]

    @property
    def url(self) -> str:
        return BASE

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None


class Client:
    """A fake of aiohttp's session: `bodies` by path, any other path is 404."""

    def __init__(self, bodies: Mapping[str, bytes], status: int = 200, error: Exception | None = None) -> None:
        self.bodies, self.status, self.error = bodies, status, error

    def request(self, _method: str, url: str, **_: Any) -> Answer:
        body = self.bodies.get(urlsplit(url).path)
        return Answer(404, b"not found", None) if body is None else Answer(self.status, body, self.error)


def actions(name: str) -> dict[str, Callable[[Any, Endpoint], Awaitable[Any]]]:
    """Return every coroutine of an engine, with arguments."""
    engine = registry.load(name)
    server = engine.server or LISTED_MODELS
    found: dict[str, Callable[[Any, Endpoint], Awaitable[Any]]] = {
        "loaded": server.loaded,
        "alive": lambda http, end: engine.alive(http, end, MODEL, 0.2),
        "alive of no model": lambda http, end: engine.alive(http, end, None, 0.2),
        "load": lambda http, end: server.load(http, end, MODEL, 0.05),
        "unload": lambda http, end: server.unload(http, end, MODEL, 0.05),
    }
    if name == "vllm":
        found["is_sleeping"] = sleep.is_sleeping
        found["canary"] = lambda http, end: sleep.canary(http, end, "m", 0.05)
    return found


def bodies_of(name: str) -> dict[str, bytes]:
    return {path: json.dumps(answer).encode() for path, answer in GOOD[name].items()}


def check(name: str, http: Client) -> list[str]:
    """Call everything and return the messages of the failures. Fails for any exception but EngineError."""
    failures = []

    async def ask(what: str, action: Callable[[Any, Endpoint], Awaitable[Any]]) -> None:
        try:
            result = await action(http, Endpoint(BASE))
        except EngineError as error:
            sentence = error.sentence
        else:
            assert _well_formed(what, result), (name, what, result)
            if not isinstance(result, ProbeOutcome) or result.ok:
                return
            sentence = result.detail
        sentence.encode()
        assert "\n" not in sentence, sentence
        assert len(sentence) < 1500
        failures.append(f"{what}: {sentence}")

    async def call_all() -> None:
        for what, action in actions(name).items():
            await ask(what, action)

    asyncio.run(call_all())
    return failures


def _well_formed(what: str, result: Any) -> bool:
    if what.startswith("alive"):
        return isinstance(result, ProbeOutcome) and (result.ok or bool(result.detail))
    if what == "loaded":
        return all(
            isinstance(one, Resident)
            and bool(one.served_as)
            and isinstance(one.served_as, str)
            and all(isinstance(size, int) and size >= 0 for size in one.device_bytes.values())
            for one in result
        )
    if what == "load":
        return all(isinstance(size, int) and size >= 0 for size in result.values())
    return result is None or isinstance(result, (bool, str))


@pytest.fixture(params=registry.names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_engine_with_good_answers_reports_no_failure(name: str) -> None:
    """Show that the failures below come from the changed answers."""
    stuck = {"ollama": {"unload"}, "lmstudio": {"unload"}}  # the fake keeps listing the model
    failed = {one.split(":")[0] for one in check(name, Client(bodies_of(name)))}
    assert failed == stuck.get(name, set())


@pytest.mark.parametrize("body", WHOLE, ids=lambda body: repr(body[:12]))
def test_answer_of_another_kind_is_an_error_with_the_url(name: str, body: bytes) -> None:
    for path in GOOD[name]:
        check(name, Client({**bodies_of(name), path: body}))
    everywhere = check(name, Client(dict.fromkeys(GOOD[name], body)))
    assert {"alive", "loaded"} & {one.split(":")[0] for one in everywhere} or body in (b"[]", b"{}")
    for one in everywhere:
        assert BASE in one or one.startswith(("alive", "unload")), one


@settings(max_examples=150, deadline=None)
@given(which=st.sampled_from(registry.names()), data=st.data())
def test_answer_with_changed_value_is_a_result_or_an_error(which: str, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(GOOD[which])))
    answer = copy.deepcopy(GOOD[which][path])
    root: dict[str, Any] = {"": answer}
    parent: Any = root
    key: Any = ""
    while isinstance(parent[key], (dict, list)) and parent[key] and data.draw(st.sampled_from((True, True, False))):
        parent, below = (
            parent[key],
            list(parent[key]) if isinstance(parent[key], dict) else list(range(len(parent[key]))),
        )
        key = data.draw(st.sampled_from(below))
    if data.draw(st.booleans()):
        del parent[key]
    else:
        parent[key] = data.draw(VALUES)
    body = json.dumps(root.get("")).encode()
    check(which, Client({**bodies_of(which), path: body}))


@pytest.mark.parametrize(
    ("which", "path", "answer", "what", "expected"),
    [
        ("ollama", "/api/ps", {"models": [{"name": 3}]}, "loaded", "a text under 'model'"),
        ("ollama", "/api/ps", {"models": [{"name": "m", "size": "5"}]}, "loaded", "a whole number from 0 under 'size'"),
        ("ollama", "/api/ps", {"models": {"m": 1}}, "loaded", "a list of objects under 'models'"),
        ("ollama", "/api/ps", {}, "loaded", "a list of objects under 'models'"),
        ("ollama", "/api/version", {"version": 5}, "alive of no model", "a text under 'version'"),
        (
            "lmstudio",
            "/api/v1/models",
            {"models": [{"key": "m", "loaded_instances": {}}]},
            "loaded",
            "'loaded_instances'",
        ),
        ("lmstudio", "/api/v1/models", {"models": [{"key": None}]}, "loaded", "a text under 'key'"),
        ("external", "/v1/models", {"data": [{"id": 7}]}, "loaded", "a text under 'id'"),
        ("external", "/v1/models", ["m"], "alive", "a JSON object"),
        ("llamacpp", "/v1/models", {"data": [{}]}, "loaded", "a text under 'id'"),
        ("process", "/v1/models", {"data": [{"id": ""}]}, "loaded", "a text under 'id'"),
        ("vllm", "/v1/models", {"data": "m"}, "loaded", "a list of objects under 'data'"),
        ("vllm", "/is_sleeping", {"is_sleeping": "no"}, "is_sleeping", "whether it sleeps"),
    ],
)
def test_answer_of_wrong_shape_error_names_the_expected_one(
    which: str, path: str, answer: Any, what: str, expected: str
) -> None:
    bodies = {**bodies_of(which), path: json.dumps(answer).encode()}
    if what == "alive of no model":
        bodies["/api/ps"] = b'{"models": []}'
    found = [one for one in check(which, Client(bodies)) if one.startswith(f"{what}: ")]
    assert len(found) == 1
    assert expected in found[0]
    assert BASE + path in found[0]


@pytest.mark.parametrize(
    "error",
    [
        aiohttp.ClientPayloadError("Response payload is not completed"),
        aiohttp.ServerDisconnectedError(),
        ConnectionResetError(104, "Connection reset by peer"),
        TimeoutError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_answer_that_breaks_off_is_an_error(name: str, error: Exception) -> None:
    failures = check(name, Client(bodies_of(name), error=error))
    assert any(one.startswith("alive: ") for one in failures)
    assert all(BASE in one for one in failures), failures


@pytest.mark.parametrize("status", [401, 403])
def test_alive_refused_names_the_key(name: str, status: int) -> None:
    engine = registry.load(name)
    http: Any = Client(dict.fromkeys(GOOD[name], b'{"error": {"message": "no such key"}}'), status)
    outcome = asyncio.run(engine.alive(http, Endpoint(BASE, "sk-1"), MODEL, 1.0))
    assert not outcome.ok
    assert outcome.key == "options.api_key"
    assert outcome.final
    for word in (BASE, str(status), "no such key"):
        assert word in outcome.detail
    assert "sk-1" not in outcome.detail


@pytest.mark.parametrize("call", ["version", "tags", "show", "delete", "has_blob", "create"])
def test_ollama_api_any_answer_is_a_result_or_an_error(call: str) -> None:
    bodies = [
        *WHOLE[:-1],
        *(json.dumps(one).encode() for one in ({"models": [{}]}, {"version": 5}, {"status": 5}, {"models": 7})),
    ]
    for status in (200, 400, 401, 404, 500):
        for body in bodies:
            http: Any = Client(dict.fromkeys(("/api/version", "/api/tags", "/api/show", "/api/delete", "/api/create",
                                              "/api/blobs/d"), body), status)  # fmt: skip
            api = OllamaApi(http, BASE)
            asked: dict[str, Callable[[], Awaitable[Any]]] = {
                "version": api.version,
                "tags": api.tags,
                "show": lambda api=api: api.show("m"),  # type: ignore[misc]
                "delete": lambda api=api: api.delete("m"),  # type: ignore[misc]
                "has_blob": lambda api=api: api.has_blob("d"),  # type: ignore[misc]
                "create": lambda api=api: api.create({"model": "m"}, lambda *_: None, 1.0),  # type: ignore[misc]
            }

            async def ask(action: Callable[[], Awaitable[Any]] = asked[call]) -> None:
                message = BASE
                try:
                    await action()
                except EngineError as error:
                    message = str(error)
                assert BASE in message

            asyncio.run(ask())


# -- versions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "fine"),
    [("0.5.4", False), ("0.1.48", False), ("v0.5.4-rc1", False), ("0.5.5", True), ("0.24.0", True), ("1.0.0", True),
     ("0.0.0", True), ("main-build", True)],
)  # fmt: skip
def test_ollama_too_old_error_names_both_versions(version: str, fine: bool) -> None:
    engine = registry.load("ollama")

    async def look(url: str) -> ProbeOutcome:
        async with aiohttp.ClientSession() as http:
            return await engine.alive(http, Endpoint(url), None, 10.0)

    with fake("--api", "ollama", "--version", version) as server:
        outcome = asyncio.run(look(server.base_url))
    assert outcome.ok is fine
    if not fine:
        assert (outcome.key, outcome.final) == ("command", True)
        assert f"Ollama {version}; fleetd needs 0.5.5 or newer" in outcome.detail


@pytest.mark.parametrize(
    ("which", "line", "reason"),
    [
        (
            "vllm",
            "vllm: error: unrecognized arguments: --disable-access-log-for-endpoints /health,/metrics",
            "command: this vLLM 0.15.1 is too old: it does not know --disable-access-log-for-endpoints",
        ),
        ("vllm", "vllm: error: unrecognized arguments: --max-num-queued-reqs 5", "options.max_num_queued_reqs: this vLLM"),
        ("vllm", "api_server.py: error: unrecognized arguments: --no-enforce-eager", "options.enforce_eager: this vLLM"),
        ("vllm", "vllm: error: unrecognized arguments: --kv-cache-memory-bytes=5", "options.kv_cache_memory: this vLLM"),
        ("vllm", "vllm: error: unrecognized arguments: --made-up", "options.extra_args or args: "),
        ("llamacpp", "error: invalid argument: --no-webui", "command: this llama-server is too old"),
        ("llamacpp", "error: invalid argument: --load-mode", "options.load_mode: this llama-server"),
        ("llamacpp", "error: invalid argument: --made-up", "error: invalid argument: --made-up"),
    ],
)  # fmt: skip
def test_classify_exit_unknown_argument_names_the_key(which: str, line: str, reason: str) -> None:
    tail = ["INFO vLLM API server version 0.15.1", line, "bye"]
    verdict = registry.load(which).classify_exit(2, None, tail)
    assert verdict.kind is ExitKind.BAD_CONFIG
    assert verdict.reason.startswith(reason)


def test_lmstudio_without_load_route_is_reported_as_too_old() -> None:
    unexpected = b'{"error": "Unexpected endpoint or method. (POST /api/v1/models/load). Returning 200 anyway"}'
    http: Any = Client(
        {"/api/v0/models": b'{"data": [{"id": "m", "state": "not-loaded"}]}', "/api/v1/models/load": unexpected}
    )
    with pytest.raises(EngineError, match=r"older than 0\.4") as caught:
        asyncio.run(LmStudioServer().load(http, Endpoint(BASE), MODEL, 1.0))
    assert (caught.value.key, caught.value.recoverable) == ("command", False)
