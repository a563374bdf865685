"""Stands for an LM Studio server, which `lms` starts in the background: starts it, watches it, stops it.

    python -I fleetd/engines/lmstudio/server_main.py --host 127.0.0.1 --port 1234 [--cors] -- lms

The rules of this file
- It is run by its path and imports nothing of fleetd.
- It lives as long as the server answers; when the server is gone it ends with code 1, so that a death is a death.
- SIGTERM stops the server; the daemon of LM Studio too, if this process had to start it. Others keep using one that was there.
- Exit codes: 0 asked to stop, 1 the server did not start or went away, 2 the command line is wrong. The last line says why.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from argparse import ArgumentParser, Namespace

COMMAND_TIMEOUT_S = 90.0
WATCH_PERIOD_S = 2.0
MISSES = 3
GREETING_LIMIT_BYTES = 64 * 1024


class Failed(Exception):
    """The server did not start, or went away; the text is one sentence."""


def say(text: str) -> None:
    print(text, flush=True)


def parse(argv: list[str]) -> tuple[Namespace, list[str]]:
    """Return the options and the words that start `lms`. Exits with 2 when the line is wrong."""
    parser = ArgumentParser(prog="lmstudio_child", allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--cors", action="store_true")
    own, _, lms = (argv, "", []) if "--" not in argv else (argv[: argv.index("--")], "--", argv[argv.index("--") + 1 :])
    if not lms:
        parser.error("say how to run lms, after --")
    return parser.parse_args(own), lms


async def run(words: list[str]) -> tuple[int, str]:
    """Run one command of `lms`; return its exit code and what it said."""
    try:
        process = await asyncio.create_subprocess_exec(
            *words, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
    except OSError as error:
        raise Failed(f"{words[0]} cannot be started: {error.strerror}") from error
    try:
        output, _ = await asyncio.wait_for(process.communicate(), COMMAND_TIMEOUT_S)
    except TimeoutError as error:
        process.kill()
        await process.wait()
        raise Failed(f"`{' '.join(words)}` was not done within {COMMAND_TIMEOUT_S:g} s") from error
    return process.returncode or 0, output.decode("utf-8", "replace").strip()


async def greets(host: str, port: int) -> bool:
    """True when an LM Studio server answers: an unknown route would answer 200 too, so the body counts."""
    try:
        async with asyncio.timeout(5.0):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(f"GET /lmstudio-greeting HTTP/1.0\r\nHost: {host}:{port}\r\n\r\n".encode())
                answer = await reader.read(GREETING_LIMIT_BYTES)
                while not reader.at_eof() and len(answer) < GREETING_LIMIT_BYTES:
                    answer += await reader.read(GREETING_LIMIT_BYTES)
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
    return b'"lmstudio":true' in answer.replace(b" ", b"")


async def daemon_runs(lms: list[str]) -> bool:
    """True when LM Studio's own daemon is up already; older versions have no such command, and none is needed."""
    code, said = await run([*lms, "daemon", "status", "--json"])
    try:
        status = json.loads(said)
    except ValueError:
        return code != 0
    return isinstance(status, dict) and str(status.get("status", "")).lower() in ("running", "up", "started")


async def serve(options: Namespace, lms: list[str], stop: asyncio.Event) -> None:
    """Start the server, wait until it greets, watch it until it is gone or `stop` is set, then stop it."""
    if await greets(options.host, options.port):
        raise Failed(f"address already in use: an LM Studio server answers on {options.host}:{options.port} already")
    was_up = await daemon_runs(lms)
    try:
        words = [*lms, "server", "start", "--port", str(options.port), "--bind", options.host]
        code, said = await run([*words, "--cors"] if options.cors else words)
        say(said)
        if code != 0:
            raise Failed(
                f"`{' '.join(words)}` ended with code {code}: {said.splitlines()[-1] if said else 'it said nothing'}"
            )
        await watch(options, stop)
    finally:
        for words in ([*lms, "server", "stop"], *([] if was_up else [[*lms, "daemon", "down"]])):
            code, said = await run(words)
            say(f"{' '.join(words[len(lms) :])}: {said or f'code {code}'}")


async def watch(options: Namespace, stop: asyncio.Event) -> None:
    """Return when `stop` is set. Raises Failed when the server has not greeted three times in a row."""
    misses = 0
    while not stop.is_set():
        misses = 0 if await greets(options.host, options.port) else misses + 1
        if misses >= MISSES:
            raise Failed(f"the LM Studio server on {options.host}:{options.port} no longer answers")
        try:
            await asyncio.wait_for(stop.wait(), WATCH_PERIOD_S)
        except TimeoutError:
            continue


async def main(argv: list[str]) -> int:
    options, lms = parse(argv)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        await serve(options, lms, stop)
    except Failed as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
