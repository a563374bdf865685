"""`fleetctl chat MODEL [TEXT]`: talk to a model through the gateway.

Invariants:
- Standard output has the answer only; prompts, progress and statistics go to standard error.
- Ctrl-C stops the answer, or the wait for the load, and not the chat. A question without an answer is not kept.
- Text of a model cannot control the terminal; into a pipe it is unchanged.
"""

from __future__ import annotations

import stat
import sys
from collections.abc import Mapping
from contextlib import suppress
from os import fstat
from typing import Any

import click

from fleetd.cli.client import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_UNKNOWN, CliError, RequestRefused
from fleetd.cli.context import Session, completion_of, forms, near_name, say
from fleetd.cli.render import DIM, clean

LOAD_S = 3600.0  # the limit of the load itself comes first
STDIN_MAX_BYTES = 16 * 1024 * 1024
_FENCE = '"""'
_HELP = """\
/clear   forget the conversation
/bye     leave, as Ctrl-D does
\"\"\"      begin and end a text of several lines
Ctrl-C   stop the answer"""
_LOADED = ("LOADED", "ROUTE")


@click.command(name="chat")
@click.argument("model", shell_complete=completion_of("models"))
@click.argument("words", nargs=-1, metavar="[TEXT]...")
@click.option("--system", help="Instructions for the model.")
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer, in tokens.")
@forms("text")
def chat(session: Session, model: str, words: tuple[str, ...], system: str | None, max_tokens: int | None) -> int:
    """Talk to a model.

    Without TEXT it keeps a conversation; with TEXT, or text on standard input, it answers once. Both together are one
    question. The model is loaded first if it is not in memory.
    """
    question = _question(" ".join(words))
    talk = _Conversation(session, model, system, max_tokens)
    talk.prepare()
    if question is not None:
        return talk.answer(question)
    return _converse(talk)


def _question(text: str) -> str | None:
    """Return TEXT and standard input as one question; None for a conversation."""
    piped = ""
    if not sys.stdin.isatty():
        mode = fstat(sys.stdin.fileno()).st_mode
        if not text or stat.S_ISREG(mode) or stat.S_ISFIFO(mode):
            raw = sys.stdin.buffer.read(STDIN_MAX_BYTES + 1)
            if len(raw) > STDIN_MAX_BYTES:
                raise CliError("standard input is too large for a question", EXIT_FAILED)
            piped = raw.decode("utf-8", "replace").strip()
        if not text and not piped:
            raise click.UsageError("nothing to ask: standard input is empty and there is no TEXT")
    parts = [part for part in (text, piped) if part]
    return "\n\n".join(parts) if parts else None


class _Conversation:
    """The messages so far, and one model."""

    def __init__(self, session: Session, model: str, system: str | None, max_tokens: int | None) -> None:
        self.session, self.model, self._max_tokens = session, model, max_tokens
        self.screen = session.screen
        self._first = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self._first)
        self._gateway = ""

    def prepare(self) -> None:
        """Find the gateway and the model. Raises CliError."""
        whole = self.session.client.get("/v1/status")
        self._gateway = str((whole.get("daemon") or {}).get("gateway") or "")
        if not self._gateway:
            raise CliError("the gateway of this fleet does not listen", EXIT_FAILED, "fleetctl status shows why")
        self._row(whole)

    def _row(self, whole: Mapping[str, Any]) -> Mapping[str, Any]:
        rows = whole["models"]
        for row in rows:
            if row["name"] == self.model or self.model in (row.get("aliases") or ()):
                return row  # type: ignore[no-any-return]
        names = [name for row in rows for name in (row["name"], *(row.get("aliases") or ()))]
        known = f"known: {', '.join(sorted(names)[:12])}" if names else "fleet.yaml has no models"
        raise CliError(f"There is no model named {self.model!r}.", EXIT_UNKNOWN, near_name(self.model, names) or known)

    def clear(self) -> None:
        """Forget everything but the system text."""
        self.messages = list(self._first)

    def answer(self, question: str) -> int:
        """Ask, print the answer, and keep both. Raises CliError."""
        self.messages.append({"role": "user", "content": question})
        try:
            text, code = self._generate()
        except BaseException:
            self.messages.pop()
            raise
        if text:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()
        return code

    def _generate(self) -> tuple[str, int]:
        from fleetd.cli.completions import Stats, stream
        from fleetd.cli.progress import of_models, progress

        self._load()
        body: dict[str, Any] = {"model": self.model, "messages": self.messages}
        if self._max_tokens is not None:
            body["max_tokens"] = self._max_tokens
        stats, said, code = Stats(), "", EXIT_OK
        chunks = stream(self._gateway, body, stats)
        printer = _Printer(self.session)
        try:
            with progress(f"waiting for {self.model}", of_models(self.session.client, [self.model])):
                first = next(chunks, None)
            while first is not None:
                kind, text = first
                said += text if kind == "content" else ""
                printer.put(kind, text)
                first = next(chunks, None)
        except KeyboardInterrupt:
            code = EXIT_INTERRUPTED
        finally:
            chunks.close()  # type: ignore[attr-defined]
            printer.end()
        if sys.stderr.isatty():
            stopped = "stopped; " if code else ""
            say(self.screen.paint(f"({stopped}{stats.text})", DIM))
        return said, code

    def _load(self) -> None:
        """Load the model with its own limit: a request in the queue would give up earlier. Raises CliError."""
        from fleetd.cli.progress import of_models, progress

        client = self.session.client
        row = self._row(client.get("/v1/status"))
        if row.get("state") in _LOADED:
            return
        with progress(f"loading {row['name']}", of_models(client, [row["name"]])):
            try:
                body = {"names": [row["name"]], "wait": True, "timeout_s": LOAD_S}
                results = client.post("/v1/models/load", body, wait_s=LOAD_S)["results"]
            except RequestRefused as error:
                raise CliError(str(error), error.exit_code, error.hint) from None
        for result in results:
            if result.get("result") != "ok":
                reason = result.get("reason") or "not loaded"
                raise CliError(f"{result.get('name')}: {reason}", EXIT_FAILED, result.get("hint"))


class _Printer:
    """Writes an answer as it comes; thoughts are dim on a terminal and left out of a pipe."""

    def __init__(self, session: Session) -> None:
        self._screen = session.screen
        self._terminal = self._screen.columns is not None
        self._kind, self._last = "", "\n"

    def put(self, kind: str, text: str) -> None:
        if kind == "reasoning" and not self._terminal:
            return
        if self._kind and kind != self._kind:
            self._write("\n\n")
        self._kind = kind
        if self._terminal:
            text = "\n".join(clean(line.replace("\r", "")) for line in text.replace("\t", "    ").split("\n"))
        self._write(self._screen.paint(text, DIM) if kind == "reasoning" else text)
        self._last = text[-1:] or self._last

    def end(self) -> None:
        if self._last != "\n":
            with suppress(BrokenPipeError):
                self._write("\n")

    def _write(self, text: str) -> None:
        self._screen.out.write(text)
        self._screen.out.flush()


def _converse(talk: _Conversation) -> int:
    """Read questions until Ctrl-D or /bye."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() a history and editing
    say(talk.screen.paint(f"{talk.model}: /help for help, Ctrl-D to leave", DIM))
    while True:
        try:
            question = _read()
        except KeyboardInterrupt:
            say("\nCtrl-D or /bye to leave")
            continue
        if question is None or question in ("/bye", "/exit", "/quit"):
            return EXIT_OK
        if question in ("/help", "/?"):
            say(_HELP)
        elif question == "/clear":
            talk.clear()
            say("the conversation is forgotten")
        elif question:
            try:
                talk.answer(question)
            except KeyboardInterrupt:
                say("stopped")
            except CliError as error:
                say(f"fleetctl: {clean(error)}")
                if error.hint:
                    say(f"  hint: {clean(error.hint)}")


def _read() -> str | None:
    """Return the next question, which may have several lines; None at the end of the input."""
    lines: list[str] = []
    fenced = False
    while True:
        prompt = "... " if fenced else ">>> "
        if not sys.stdout.isatty():
            sys.stderr.write(prompt)
            sys.stderr.flush()
            prompt = ""
        try:
            line = input(prompt)
        except EOFError:
            say("")
            return None
        if not fenced and not line.strip().startswith(_FENCE):
            return line.strip()
        text = line.strip() if not fenced else line
        if not fenced:
            fenced, text = True, text[len(_FENCE) :]
        if text.rstrip().endswith(_FENCE):
            lines.append(text.rstrip()[: -len(_FENCE)])
            return "\n".join(lines).strip()
        lines.append(text)


VERBS = (chat,)
