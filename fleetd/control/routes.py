"""The routes of the control API: read a request, ask the port, answer.

Invariants:
- Handlers decide nothing about the fleet; they check input and translate.
- Every wait ends: the port gets the caller's timeout, and GRACE_S later the server stops waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web

from fleetd.control import selection, sse, wire
from fleetd.control.answers import answer
from fleetd.control.inputs import (
    Kinds,
    check_pattern,
    invalid,
    names_of,
    parse_flag,
    parse_number,
    path_of,
    read_body,
    read_query,
    signal_name,
    timeout_of,
)
from fleetd.control.port import ActOptions, ApplyOptions, Caller, ControlPort, LibraryPort
from fleetd.errors import ApiError

PORT: web.AppKey[ControlPort] = web.AppKey("port", ControlPort)
LIBRARY: web.AppKey[LibraryPort] = web.AppKey("library", LibraryPort)
CALLER: web.RequestKey[Caller] = web.RequestKey("caller", Caller)
GRACE_S = 5.0
LINES_MAX = 100_000
JSON_LINES_MAX = 10_000
_TEN_YEARS_S = 10 * 365 * 86_400

# -- reading ---------------------------------------------------------------------------------------------------------


async def get_status(request: web.Request) -> web.Response:
    read_query(request)
    return answer(await request.app[PORT].status())


async def get_processes(request: web.Request) -> web.Response:
    read_query(request)
    return answer({"processes": (await request.app[PORT].status())["processes"]})


async def get_process(request: web.Request) -> web.Response:
    return answer(request.app[PORT].process(request.match_info["name"]))


async def get_models(request: web.Request) -> web.Response:
    read_query(request)
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
    """Stream events as SSE; with follow=0 and no Accept for SSE, answer JSON."""
    query = read_query(request, ("since_s", "after", "follow"))
    follow = parse_flag(query.get("follow"), "follow", default=True)
    since_s = parse_number(query.get("since_s"), "since_s", 0, _TEN_YEARS_S)
    after = parse_number(query.get("after") or request.headers.get("Last-Event-ID"), "after", 0, 2**53)
    source = request.app[PORT].events(since_s, None if after is None else int(after), follow)
    if _wants_stream(request, follow):
        return await sse.stream(request, source, "event")
    return answer({"events": [item async for item in source]})


async def get_logs(request: web.Request) -> web.StreamResponse:
    """Stream log lines as SSE with follow=1 or an Accept for SSE; else answer JSON."""
    query = read_query(request, ("lines", "since_s", "grep", "follow"))
    follow = parse_flag(query.get("follow"), "follow", default=False)
    streaming = _wants_stream(request, follow)
    lines = parse_number(query.get("lines"), "lines", 0, LINES_MAX if streaming else JSON_LINES_MAX)
    since_s = parse_number(query.get("since_s"), "since_s", 0, _TEN_YEARS_S)
    grep = check_pattern(query.get("grep"))
    port = request.app[PORT]
    names = selection.processes(request.match_info["names"].split(","), port.names(), "logs")
    source = port.logs(names, 50 if lines is None else int(lines), since_s, grep, follow)
    if streaming:
        return await sse.stream(request, source, "line")
    return answer({"lines": [item async for item in source]})


# -- changing --------------------------------------------------------------------------------------------------------

_ACTION: Kinds = {"wait": bool, "timeout_s": (int, float), "force": bool, "signal": str, "rolling": bool}


async def _act(request: web.Request, verb: str, patterns: Sequence[str], body: Mapping[str, Any]) -> web.Response:
    port = request.app[PORT]
    choose = selection.processes if verb in wire.PROCESS_VERBS else selection.models
    known = port.names()
    names = choose(patterns, known, verb)
    if "rolling" in body and verb != "restart":
        raise invalid("The key 'rolling' belongs to the verb restart.")
    if (verb == "signal") != ("signal" in body):
        raise invalid("The key 'signal' belongs to the verb signal, which requires it.")
    options = ActOptions(
        wait=body.get("wait", True),
        timeout_s=timeout_of(body),
        force=body.get("force", False),
        signal=signal_name(body["signal"]) if "signal" in body else None,
        rolling=body.get("rolling", False),
        broad=frozenset(name for name in names if name not in patterns and known.processes.get(name) not in patterns),
    )
    try:
        async with asyncio.timeout(options.timeout_s + GRACE_S):
            results = list(await port.act(verb, names, options)) if names else []
    except TimeoutError:
        reason = f"not done after {options.timeout_s:g} s; it goes on"
        results = [wire.ActionResult(name=n, result=wire.ResultCode.TIMEOUT, state=None, reason=reason) for n in names]
    return answer({"verb": verb, "results": results}, _http_status(results))


def _http_status(results: Sequence[wire.ActionResult]) -> int:
    found = {result["result"] for result in results}
    if wire.ResultCode.FAILED in found:
        return 409
    if wire.ResultCode.TIMEOUT in found:
        return 504
    return 202 if wire.ResultCode.ACCEPTED in found else 200


async def post_action(request: web.Request) -> web.Response:
    """Act on NAME of the path: a name, a glob, `all`, or the base name of replicas."""
    body = await read_body(request, _ACTION)
    return await _act(request, request.match_info["verb"], [request.match_info["name"]], body)


async def post_actions(request: web.Request) -> web.Response:
    """Act on `names` of the body: several at once; if one is unknown, on none."""
    body = await read_body(request, {**_ACTION, "names": list})
    return await _act(request, request.match_info["verb"], names_of(body), body)


async def post_plan(request: web.Request) -> web.Response:
    body = await read_body(request, {"path": str, "text": str})
    if len(body) > 1:
        raise invalid("Give either path or text.")
    return answer({"plan": await request.app[PORT].plan(path_of(body), body.get("text"))})


async def post_apply(request: web.Request) -> web.Response:
    kinds: Kinds = {"path": str, "dry_run": bool, "wait": bool, "timeout_s": (int, float), "expect_hash": str}
    body = await read_body(request, kinds)
    options = ApplyOptions(
        dry_run=body.get("dry_run", False),
        wait=body.get("wait", True),
        timeout_s=timeout_of(body),
        expect_hash=body.get("expect_hash"),
        caller=request.get(CALLER, Caller()),
    )
    try:
        async with asyncio.timeout(options.timeout_s + GRACE_S):
            applied = await request.app[PORT].apply(path_of(body), options)
    except TimeoutError:
        raise ApiError(504, "wait_timeout", f"Not done after {options.timeout_s:g} s; it goes on.") from None
    return answer(applied, _http_status(applied["results"]))


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


# -- model stores and volumes ------------------------------------------------------------------------------------------


async def get_library(request: web.Request) -> web.Response:
    read_query(request)
    return answer(await request.app[LIBRARY].diff())


async def get_library_model(request: web.Request) -> web.Response:
    read_query(request)
    return answer(await request.app[LIBRARY].show(request.match_info["name"]))


async def post_sync(request: web.Request) -> web.Response:
    body = await read_body(request, {"names": list})
    return answer({"sync": request.app[LIBRARY].sync(names_of(body))}, 202)


async def get_sync(request: web.Request) -> web.StreamResponse:
    """Stream the steps of a sync as SSE, past ones first."""
    number = int(request.match_info["number"])
    return await sse.stream(request, request.app[LIBRARY].progress(number), "step")


async def post_prune(request: web.Request) -> web.Response:
    body = await read_body(request, {"dry_run": bool})
    return answer(await request.app[LIBRARY].prune(body.get("dry_run", False)))


async def get_volumes(request: web.Request) -> web.Response:
    read_query(request)
    return answer(request.app[LIBRARY].volumes())


async def post_accept(request: web.Request) -> web.Response:
    path = path_of(await read_body(request, {"path": str}))
    if path is None:
        raise invalid("path must be absolute.")
    return answer(request.app[LIBRARY].accept_volume(path))


def fleet_routes() -> list[web.RouteDef]:
    """Return the routes that ask the ControlPort."""
    process_verbs, model_verbs = "|".join(wire.PROCESS_VERBS), "|".join(wire.MODEL_VERBS)
    return [
        web.get("/v1/status", get_status),
        web.get("/v1/processes", get_processes),
        web.get("/v1/processes/{name}", get_process),
        web.get("/v1/models", get_models),
        web.get("/v1/models/{name:.+}", get_model),  # a model's name may contain slashes
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


def library_routes() -> list[web.RouteDef]:
    """Return the routes that ask the LibraryPort."""
    return [
        web.get("/v1/library", get_library),
        web.post("/v1/library/sync", post_sync),
        web.post("/v1/library/prune", post_prune),
        web.get(r"/v1/syncs/{number:\d{1,9}}", get_sync),
        web.get("/v1/library/{name:.+}", get_library_model),
        web.get("/v1/volumes", get_volumes),
        web.post("/v1/volumes/accept", post_accept),
    ]
