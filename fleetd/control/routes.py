"""The routes of /v1: read a request strictly, ask the port, answer.

The rules of this file
- Handlers decide nothing about the fleet; they check input and translate.
- Input is closed: an unknown key or query parameter is an error that names it.
- Every wait has an end: the port gets the caller's timeout, and GRACE_S later the server stops waiting by itself.
"""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from aiohttp import web

from fleetd.control import selection, sse, wire
from fleetd.control.answers import answer
from fleetd.control.port import ActOptions, ApplyOptions, Caller, ControlPort
from fleetd.errors import ApiError

PORT: web.AppKey[ControlPort] = web.AppKey("port", ControlPort)
CALLER: web.RequestKey[Caller] = web.RequestKey("caller", Caller)
BODY_TIMEOUT_S = 10.0
GRACE_S = 5.0
TIMEOUT_S = 300.0
TIMEOUT_MAX_S = 86_400.0
LINES_MAX = 100_000
JSON_LINES_MAX = 10_000


def _invalid(message: str) -> ApiError:
    return ApiError(400, "invalid_request", message)


Kinds = Mapping[str, type | tuple[type, ...]]


async def read_body(request: web.Request, allowed: Kinds) -> dict[str, Any]:
    """Return the JSON object of the request; an empty body is {}. Raises ApiError 400."""
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            raw = await request.read()
    except TimeoutError:
        raise ApiError(408, "body_timeout", f"The body did not arrive within {BODY_TIMEOUT_S:g} s.") from None
    if not raw.strip():
        return {}
    try:
        body = orjson.loads(raw)
    except ValueError as error:
        raise _invalid(f"The body is not JSON: {error}.") from None
    if not isinstance(body, dict):
        raise _invalid("The body must be a JSON object.")
    for key, value in body.items():
        if key not in allowed:
            raise _invalid(f"Unknown key {key[:60]!r}; known: {', '.join(allowed)}.")
        kinds = allowed[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise _invalid(f"The value of {key!r} has the wrong type.")
    return body


def read_query(request: web.Request, allowed: Sequence[str]) -> dict[str, str]:
    """Return the query's parameters, each given once. Raises ApiError 400."""
    for key in request.query:
        if key not in allowed:
            raise _invalid(f"Unknown parameter {key[:60]!r}; known: {', '.join(allowed) or 'none'}.")
    return dict(request.query)


def _number(text: str | None, name: str, lowest: float, highest: float) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        raise _invalid(f"{name} must be a number.") from None
    if not lowest <= value <= highest:
        raise _invalid(f"{name} must be between {lowest:g} and {highest:g}.")
    return value


def _flag(text: str | None, default: bool) -> bool:
    if text is None:
        return default
    if text.lower() in ("1", "true", "yes", ""):
        return True
    if text.lower() in ("0", "false", "no"):
        return False
    raise _invalid("follow must be 1 or 0.")


def _timeout(body: Mapping[str, Any]) -> float:
    value = float(body.get("timeout_s", TIMEOUT_S))
    if not 0 <= value <= TIMEOUT_MAX_S:
        raise _invalid(f"timeout_s must be between 0 and {TIMEOUT_MAX_S:g}.")
    return value


def signal_name(text: str) -> str:
    """Return `hup`, `SIGHUP` or `1` as SIGHUP. Raises ApiError 400."""
    word = text.strip().upper()
    try:
        if word.isascii() and word.isdigit():
            return signal.Signals(int(word)).name
        return signal.Signals[word if word.startswith("SIG") else f"SIG{word}"].name
    except (KeyError, ValueError):
        raise ApiError(400, "invalid_request", f"There is no signal {text[:40]!r}.") from None


# -- reading ---------------------------------------------------------------------------------------------------------


async def get_status(request: web.Request) -> web.Response:
    read_query(request, ())
    return answer(await request.app[PORT].status())


async def get_processes(request: web.Request) -> web.Response:
    read_query(request, ())
    return answer({"processes": (await request.app[PORT].status())["processes"]})


async def get_process(request: web.Request) -> web.Response:
    return answer(request.app[PORT].process(request.match_info["name"]))


async def get_models(request: web.Request) -> web.Response:
    read_query(request, ())
    return answer({"models": (await request.app[PORT].status())["models"]})


async def get_model(request: web.Request) -> web.Response:
    return answer(request.app[PORT].model(request.match_info["name"]))


async def get_devices(request: web.Request) -> web.Response:
    return answer({"devices": list(request.app[PORT].devices())})


async def get_names(request: web.Request) -> web.Response:
    names = request.app[PORT].names()
    return answer(
        {"processes": dict(names.processes), "models": {name: list(aliases) for name, aliases in names.models.items()}}
    )


async def get_story(request: web.Request) -> web.Response:
    name = request.match_info["name"]
    return answer({"name": name, "events": list(request.app[PORT].story(name))})


async def get_explain(request: web.Request) -> web.Response:
    return answer(request.app[PORT].explain(request.match_info["name"]))


async def get_config(request: web.Request) -> web.Response:
    return answer(request.app[PORT].config())


async def get_dump(request: web.Request) -> web.Response:
    return answer(await request.app[PORT].dump())


def _wants_stream(request: web.Request, follow: bool) -> bool:
    return follow or "text/event-stream" in request.headers.get("Accept", "")


async def get_events(request: web.Request) -> web.StreamResponse:
    """SSE; with follow=0 and no wish for SSE, one JSON document."""
    query = read_query(request, ("since_s", "after", "follow"))
    follow = _flag(query.get("follow"), default=True)
    since_s = _number(query.get("since_s"), "since_s", 0, 10 * 365 * 86_400)
    after = _number(query.get("after") or request.headers.get("Last-Event-ID"), "after", 0, 2**53)
    source = request.app[PORT].events(since_s, None if after is None else int(after), follow)
    if _wants_stream(request, follow):
        return await sse.stream(request, source, "event")
    return answer({"events": [item async for item in source]})


async def get_logs(request: web.Request) -> web.StreamResponse:
    """SSE on request or with follow=1; else one JSON document."""
    query = read_query(request, ("lines", "since_s", "grep", "follow"))
    follow = _flag(query.get("follow"), default=False)
    streaming = _wants_stream(request, follow)
    lines = _number(query.get("lines"), "lines", 0, LINES_MAX if streaming else JSON_LINES_MAX)
    since_s = _number(query.get("since_s"), "since_s", 0, 10 * 365 * 86_400)
    grep = query.get("grep")
    if grep is not None:
        if len(grep) > 1000:
            raise _invalid("grep is too long.")
        try:
            re.compile(grep)
        except (re.error, RecursionError, OverflowError) as error:
            raise _invalid(f"grep is not a regular expression: {error}.") from None
    port = request.app[PORT]
    names = selection.processes(request.match_info["names"].split(","), port.names())
    source = port.logs(names, 50 if lines is None else int(lines), since_s, grep, follow)
    if streaming:
        return await sse.stream(request, source, "line")
    return answer({"lines": [item async for item in source]})


# -- changing --------------------------------------------------------------------------------------------------------

_ACTION: Kinds = {"wait": bool, "timeout_s": (int, float), "force": bool, "signal": str, "names": list}


async def _act(request: web.Request, verb: str, patterns: Sequence[str], body: Mapping[str, Any]) -> web.Response:
    port = request.app[PORT]
    choose = selection.processes if verb in wire.PROCESS_VERBS else selection.models
    names = choose(patterns, port.names())
    if (verb == "signal") != ("signal" in body):
        raise _invalid("The verb signal, and only it, takes a signal.")
    options = ActOptions(
        wait=body.get("wait", True),
        timeout_s=_timeout(body),
        force=body.get("force", False),
        signal=signal_name(body["signal"]) if "signal" in body else None,
    )
    try:
        async with asyncio.timeout(options.timeout_s + GRACE_S):
            results = list(await port.act(verb, names, options)) if names else []
    except TimeoutError:
        reason = f"not done after {options.timeout_s:g} s; it goes on"
        results = [wire.ActionResult(name=n, result=wire.ResultCode.TIMEOUT, state=None, reason=reason) for n in names]
    return answer({"verb": verb, "results": results}, _status_of(results))


def _status_of(results: Sequence[wire.ActionResult]) -> int:
    found = {outcome["result"] for outcome in results}
    if wire.ResultCode.FAILED in found:
        return 409
    if wire.ResultCode.TIMEOUT in found:
        return 504
    return 202 if wire.ResultCode.ACCEPTED in found else 200


async def post_action(request: web.Request) -> web.Response:
    """POST /v1/{processes,models}/NAME/VERB; NAME may be a glob, `all`, or the base of replicas."""
    body = await read_body(request, {key: kinds for key, kinds in _ACTION.items() if key != "names"})
    return await _act(request, request.match_info["verb"], [request.match_info["name"]], body)


async def post_actions(request: web.Request) -> web.Response:
    """POST /v1/{processes,models}/VERB with `names` in the body: several at once, all known or none touched."""
    body = await read_body(request, _ACTION)
    names = body.get("names", [])
    if not all(isinstance(name, str) for name in names) or len(names) > 10_000:
        raise _invalid("names must be a list of names.")
    return await _act(request, request.match_info["verb"], names, body)


async def post_plan(request: web.Request) -> web.Response:
    body = await read_body(request, {"path": str, "text": str})
    if len(body) > 1:
        raise _invalid("Give either path or text.")
    return answer({"plan": await request.app[PORT].plan(_path(body), body.get("text"))})


def _path(body: Mapping[str, Any]) -> str | None:
    path = body.get("path")
    if path is not None and (not path.startswith("/") or "\0" in path):
        raise _invalid("path must be absolute.")
    return path


async def post_apply(request: web.Request) -> web.Response:
    kinds: Kinds = {"path": str, "dry_run": bool, "wait": bool, "timeout_s": (int, float), "expect_hash": str}
    body = await read_body(request, kinds)
    options = ApplyOptions(
        dry_run=body.get("dry_run", False),
        wait=body.get("wait", True),
        timeout_s=_timeout(body),
        expect_hash=body.get("expect_hash"),
        caller=request.get(CALLER, Caller()),
    )
    try:
        async with asyncio.timeout(options.timeout_s + GRACE_S):
            applied = await request.app[PORT].apply(_path(body), options)
    except TimeoutError:
        raise ApiError(504, "wait_timeout", f"Not done after {options.timeout_s:g} s; it goes on.") from None
    return answer(applied, _status_of(applied["results"]))


async def post_reload(request: web.Request) -> web.Response:
    await read_body(request, {})
    return answer(await request.app[PORT].reload())


async def post_reexec(request: web.Request) -> web.Response:
    await read_body(request, {})
    await request.app[PORT].reexec()
    return answer({"accepted": True}, 202)


async def post_shutdown(request: web.Request) -> web.Response:
    body = await read_body(request, {"force": bool})
    await request.app[PORT].shutdown(body.get("force", False))
    return answer({"accepted": True}, 202)


def table() -> list[web.RouteDef]:
    """Return all routes of /v1."""
    process_verbs, model_verbs = "|".join(wire.PROCESS_VERBS), "|".join(wire.MODEL_VERBS)
    return [
        web.get("/v1/status", get_status),
        web.get("/v1/processes", get_processes),
        web.get("/v1/processes/{name}", get_process),
        web.get("/v1/models", get_models),
        web.get("/v1/models/{name:.+}", get_model),  # a model's name may hold slashes
        web.get("/v1/devices", get_devices),
        web.get("/v1/names", get_names),
        web.get("/v1/events", get_events),
        web.get("/v1/logs/{names:.+}", get_logs),
        web.get("/v1/story/{name:.+}", get_story),
        web.get("/v1/explain/{name:.+}", get_explain),
        web.get("/v1/config", get_config),
        web.get("/v1/dump", get_dump),
        web.post(f"/v1/processes/{{verb:{process_verbs}}}", post_actions),
        web.post(f"/v1/processes/{{name}}/{{verb:{process_verbs}}}", post_action),
        web.post(f"/v1/models/{{verb:{model_verbs}}}", post_actions),
        web.post(f"/v1/models/{{name:.+}}/{{verb:{model_verbs}}}", post_action),
        web.post("/v1/plan", post_plan),
        web.post("/v1/apply", post_apply),
        web.post("/v1/reload", post_reload),
        web.post("/v1/reexec", post_reexec),
        web.post("/v1/shutdown", post_shutdown),
    ]
