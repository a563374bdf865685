"""Start, watch and stop an LM Studio server, which `lms` runs in the background, as one foreground process.

    python -I fleetd/engines/lmstudio/server_main.py --host 127.0.0.1 --port 1234 [--cors] -- lms

Invariants:
- It runs by its path and imports nothing of fleetd.
- It runs as long as the server answers and exits with code 1 when the server is gone.
- SIGTERM stops the server, and the daemon of LM Studio if this process started it; others may use one that ran before.
- Exit codes: 0 stopped on request, 1 the server did not start or is gone, 2 wrong command line. The last line says why.
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


class ServerGoneError(Exception):
    """The server did not start, or is gone; the text is one sentence."""


def log(text: str) -> None:
    print(text, flush=True)


def parse(argv: list[str]) -> tuple[Namespace, list[str]]:
    """Return the options and the command of `lms`; exit with 2 if they are invalid."""
    parser = ArgumentParser(prog="server_main", allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--cors", action="store_true")
    own, _, lms = (argv, "", []) if "--" not in argv else (argv[: argv.index("--")], "--", argv[argv.index("--") + 1 :])
    if not lms:
        parser.error("the command of lms is missing (add it after --)")
    return parser.parse_args(own), lms


async def run(words: list[str]) -> tuple[int, str]:
    """Run one command of `lms`; return its exit code and output."""
    try:
        process = await asyncio.create_subprocess_exec(
            *words, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
    except OSError as error:
        raise ServerGoneError(f"{words[0]} cannot be started: {error.strerror}") from error
    try:
        output, _ = await asyncio.wait_for(process.communicate(), COMMAND_TIMEOUT_S)
    except TimeoutError as error:
        process.kill()
        await process.wait()
        raise ServerGoneError(f"`{' '.join(words)}` did not finish within {COMMAND_TIMEOUT_S:g} s") from error
    return process.returncode or 0, output.decode("utf-8", "replace").strip()


async def greets(host: str, port: int) -> bool:
    """Return whether LM Studio answers; only the body shows it, not the status."""
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
    """Return whether LM Studio's daemon runs; older versions neither have nor need it."""
    code, output = await run([*lms, "daemon", "status", "--json"])
    try:
        status = json.loads(output)
    except ValueError:
        return code != 0
    return isinstance(status, dict) and str(status.get("status", "")).lower() in ("running", "up", "started")


async def serve(options: Namespace, lms: list[str], stop: asyncio.Event) -> None:
    """Start the server, watch it until it is gone or `stop` is set, then stop it."""
    if await greets(options.host, options.port):
        raise ServerGoneError(
            f"address already in use: an LM Studio server answers on {options.host}:{options.port} already"
        )
    was_up = await daemon_runs(lms)
    try:
        words = [*lms, "server", "start", "--port", str(options.port), "--bind", options.host]
        code, output = await run([*words, "--cors"] if options.cors else words)
        log(output)
        if code != 0:
            raise ServerGoneError(
                f"`{' '.join(words)}` exited with code {code}: {output.splitlines()[-1] if output else 'no output'}"
            )
        await watch(options, stop)
    finally:
        for words in ([*lms, "server", "stop"], *([] if was_up else [[*lms, "daemon", "down"]])):
            code, output = await run(words)
            log(f"{' '.join(words[len(lms) :])}: {output or f'code {code}'}")


async def watch(options: Namespace, stop: asyncio.Event) -> None:
    """Return when `stop` is set. Raises ServerGoneError after three failed greetings."""
    misses = 0
    while not stop.is_set():
        misses = 0 if await greets(options.host, options.port) else misses + 1
        if misses >= MISSES:
            raise ServerGoneError(f"the LM Studio server on {options.host}:{options.port} no longer answers")
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
    except ServerGoneError as error:
        log(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
