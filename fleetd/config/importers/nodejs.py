"""Evaluate a JavaScript configuration with Node. The file is the user's own program, and Node executes it.

Invariants:
- The program is given no secret: a variable that holds one has a mark as its value, which the result refers to as ${NAME}.
- JavaScript is never parsed by patterns: without Node the import is rejected with an alternative.
- Only environment variables that the file and its modules read are reported, not those that Node itself reads.
- The file's own output comes before a marker and is not taken for its value. The file has ten seconds and 16 MiB; the kernel
  kills it after that, also when the importer is gone.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fleetd.config.secrets import holds_secret
from fleetd.errors import ConfigError, Problem

TIMEOUT_S = 10.0
_LONGEST = 16 * 1024 * 1024
_MARKER = "\0fleetd\0"
REGEXP = "\0RegExp "
_SECRET = re.compile("\ue000([^\ue000\ue001]+)\ue001")
_SCRIPT = """
const path = process.argv[1];
const read = new Set();
const readers = () => {
  const {prepareStackTrace, stackTraceLimit} = Error;
  Object.assign(Error, {prepareStackTrace: (_, frames) => frames.map(frame => frame.getFileName()), stackTraceLimit: 3});
  const files = new Error().stack;
  Object.assign(Error, {prepareStackTrace, stackTraceLimit});
  return files;
};
const get = (env, key) => {
  if (typeof key === 'string' && !String(readers()[2]).startsWith('node:')) read.add(key);
  return env[key];
};
process.env = new Proxy(process.env, {get});
const load = path.endsWith('.mjs') ? import(require('url').pathToFileURL(path)) : Promise.resolve().then(() => require(path));
load.then(async found => {
  let value = found && found.default !== undefined ? found.default : found;
  if (typeof value === 'function') value = await value();
  const text = JSON.stringify({value, read: [...read]}, (key, item) =>
    item instanceof RegExp ? %s + item : typeof item === 'function' ? String(item) : item);
  process.stdout.write(%s + text, () => process.exit(0));
}).catch(error => { process.stderr.write(String(error && error.message || error)); process.exit(1); });
"""


def secret_mark(name: str) -> str:
    """Return the value that the program sees for a variable that holds a secret."""
    return f"\ue000{name}\ue001"


def named_secrets(text: str) -> str:
    """Return a text with references such as ${TOKEN} in place of the marks of secrets."""
    return _SECRET.sub(r"${\1}", text)


def _without_secrets(env: Mapping[str, str]) -> dict[str, str]:
    """Return an environment with marks in place of secrets."""
    return {key: secret_mark(key) if value and holds_secret(key, value) else value for key, value in env.items()}


def evaluate(path: Path, timeout_s: float = TIMEOUT_S, *, secrets: bool = False) -> tuple[Any, list[str]]:
    """Return the exports of a file, and the names of the variables that it read. Raises ConfigError.

    `secrets`: the program sees the values of secrets.
    """
    node = shutil.which("node")
    if node is None:
        hint = "install Node, or export the list with `pm2 jlist > apps.json` and import that"
        raise ConfigError([Problem(str(path), 0, 0, "", f"is JavaScript and needs Node, which is not on PATH: {hint}")])
    limited = ("/bin/sh", "-c", f'ulimit -t {math.ceil(timeout_s * 3)}; exec "$0" "$@"')  # seconds of CPU time
    words = (*limited, node, "-e", _SCRIPT % (json.dumps(REGEXP), json.dumps(_MARKER)), str(path.resolve()))
    env = dict(os.environ) if secrets else _without_secrets(os.environ)
    code, output, errors = asyncio.run(run(words, timeout_s, path.resolve().parent, env))
    if code is None:
        raise ConfigError([Problem(str(path), 0, 0, "", f"did not finish within {timeout_s:g} s")])
    _, marker, text = output.rpartition(_MARKER)
    if code != 0 or not marker:
        reason = errors.strip().splitlines()[-1][:300] if errors.strip() else f"Node ended with {code}"
        raise ConfigError([Problem(str(path), 0, 0, "", f"cannot be read by Node: {reason}")])
    found = json.loads(text)
    return found.get("value"), sorted(found["read"])


async def run(
    words: Sequence[str], timeout_s: float, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> tuple[int | None, str, str]:
    """Run a program; return its exit code (None: killed at the time limit), its output and its errors. Raises OSError."""
    process = await asyncio.create_subprocess_exec(
        *words, cwd=cwd, env=env, limit=_LONGEST, start_new_session=True,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(timeout_s):
            output, errors = await process.communicate()
    except TimeoutError:
        return None, "", ""
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    return process.returncode, output[-_LONGEST:].decode("utf-8", "replace"), errors[-65536:].decode("utf-8", "replace")
