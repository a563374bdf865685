"""The engine `external`, and the models that an external server lists."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fleetd.engines.base import Api, Endpoint, LaunchContext, ServedModel
from fleetd.engines.external import engine as external
from fleetd.engines.external.options import ExternalOptions
from fleetd.engines.listed_models import LISTED_MODELS
from fleetd.errors import EngineError
from tests.support.engines import fake

EXTERNAL = external.ENGINE


def context(**changes: Any) -> LaunchContext:
    values = {"name": "away", "host": "127.0.0.1", "port": 1234, **changes}
    return LaunchContext(**values)


def test_alive_reads_the_list_and_requests_no_token(tmp_path: Path) -> None:
    async def go() -> None:
        async with fake(tmp_path, "openai", "--model", "gpt") as server:
            http = server.http
            endpoint = server.endpoint
            assert (await EXTERNAL.alive(http, endpoint, None, 5)).ok
            assert (await EXTERNAL.alive(http, endpoint, ServedModel("m", "gpt"), 5)).ok
            assert not (await EXTERNAL.alive(http, endpoint, ServedModel("m", "other"), 5)).ok
            assert [resident.served_as for resident in await LISTED_MODELS.loaded(http, endpoint)] == ["gpt"]
            assert await LISTED_MODELS.load(http, endpoint, ServedModel("m", "gpt"), 5) == {}
            with pytest.raises(EngineError, match="has no model other; it lists gpt"):
                await LISTED_MODELS.load(http, endpoint, ServedModel("m", "other"), 5)
            await LISTED_MODELS.unload(http, endpoint, ServedModel("m", "gpt"), 5)
            stats = await server.get("/fake/stats")
            assert stats["finished"] == 0  # no token was requested

    asyncio.run(go())


def test_alive_error_with_status_200_fails(tmp_path: Path) -> None:
    async def go() -> None:
        async with fake(tmp_path, "lmstudio") as server:
            outcome = await EXTERNAL.alive(server.http, Endpoint(server.endpoint.base_url + "/api"), None, 5)
            assert not outcome.ok
            assert "did not answer" in outcome.detail

    asyncio.run(go())


def test_launch_of_external_is_an_error() -> None:
    assert not EXTERNAL.capabilities.owns_process
    plain = context(options=ExternalOptions())
    assert EXTERNAL.validate(plain) == []
    with pytest.raises(EngineError, match="starts no process"):
        EXTERNAL.launch(plain)
    assert [problem.path for problem in EXTERNAL.validate(context(options=ExternalOptions(), command=("x",)))] == [
        ("command",)
    ]
    assert [problem.path for problem in EXTERNAL.validate(context(options=ExternalOptions(api=Api.NONE)))] == [("api",)]
    footprint = EXTERNAL.estimate(plain, None)
    assert footprint is not None
    assert footprint.bytes == {}
