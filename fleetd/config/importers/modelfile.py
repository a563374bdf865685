"""Convert an Ollama Modelfile to a model of a fleet.

Invariants:
- The grammar is that of Ollama's parser: commands in any case, values to the end of the line or in quotes over several lines,
  no escapes, invisible characters dropped.
- Relative paths start at the Modelfile's folder and become absolute. Nothing is built; fleetd builds the model before its first load.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleetd.config.importers.emit import to_yaml
from fleetd.config.importers.ollama_parameters import REMOVED, parameter
from fleetd.config.importers.report import Imported, Report
from fleetd.config.schema.base import MODEL_NAME
from fleetd.errors import ConfigError, Problem
from fleetd.units import expand_home

COMMANDS = (
    "from",
    "license",
    "template",
    "system",
    "adapter",
    "draft",
    "renderer",
    "parser",
    "parameter",
    "message",
    "requires",
)
ROLES = ("system", "user", "assistant")
_COMMAND = re.compile(r"[ \t]*([A-Za-z]+)(?:[ \t]|$)")
_NAME = re.compile(MODEL_NAME)
_VERSION = re.compile(r"v?\d+\.\d+\.\d+([-+].+)?")
_FILE_NAME = re.compile(r"(?:modelfile[-._]?)?(.*?)(?:[-._]?modelfile)?(?:\.txt)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ModelfileCommand:
    """One command. `argument` is the name of a PARAMETER or the role of a MESSAGE."""

    name: str
    value: str
    line: int
    argument: str = ""


def is_modelfile(text: str) -> bool:
    """Return whether the first line that is no comment begins with a command of a Modelfile."""
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            found = _COMMAND.match(line)
            return found is not None and found[1].lower() in COMMANDS
    return False


def parse_modelfile(text: str, shown: str) -> list[ModelfileCommand]:
    """Return the commands of a Modelfile. Raises ConfigError at the first mistake, as Ollama does."""
    found: list[ModelfileCommand] = []
    lines = enumerate(re.split("(?<=[\r\n])", text.removeprefix("\ufeff")), start=1)
    newlines = 1
    for _, raw in lines:
        line = newlines
        newlines += raw.endswith("\n")
        if not raw.strip() or raw.lstrip().startswith("#"):
            continue
        command = _COMMAND.match(raw.rstrip("\r\n"))
        name = command[1].lower() if command is not None else ""
        if command is None or name not in COMMANDS:
            problem = f"{raw.split()[0][:40]!r} is no command of a Modelfile: {', '.join(COMMANDS).upper()}"
            raise ConfigError([Problem(shown, line, 0, "", problem)])
        rest, argument = raw[command.end() :], ""
        if name in ("parameter", "message"):
            argument, _, rest = rest.lstrip(" \t").partition(" ") if "\t" not in rest else _first_word(rest)
            if name == "message" and argument.strip() not in ROLES:
                problem = f"the role of a MESSAGE is one of {', '.join(ROLES)}, not {argument.strip()[:40]!r}"
                raise ConfigError([Problem(shown, line, 0, "", problem)])
        parts = [rest]
        while not _complete(parts):
            following = next(lines, None)
            if following is None:
                raise ConfigError([Problem(shown, line, 0, "", f"the quote of {name.upper()} is not closed")])
            parts.append(following[1])
            newlines += following[1].endswith("\n")
        found.append(ModelfileCommand(name, _unquoted("".join(parts)), line, argument.strip()))
    if not any(command.name == "from" and command.value for command in found):
        raise ConfigError([Problem(shown, 0, 0, "", "has no FROM line")])
    return found


def _first_word(text: str) -> tuple[str, str, str]:
    words = text.lstrip(" \t").split(None, 1)
    return (words[0] if words else "", " ", words[1] if len(words) > 1 else "")


def _complete(parts: Sequence[str]) -> bool:
    """Return whether a value is complete: not quoted, or its quote is closed at the end of the last line."""
    first, last = parts[0].lstrip(), parts[-1].rstrip()
    quote = '"""' if first.startswith('"""') else '"' if first.startswith('"') else ""
    if not quote:
        return True
    if len(parts) == 1:
        return len(first.rstrip()) >= 2 * len(quote) and last.endswith(quote)
    return last.endswith(quote)


def _unquoted(text: str) -> str:
    text = "".join(char for char in text.strip() if char.isprintable() or char in "\n\r\t")
    for quote in ('"""', '"'):
        if text.startswith(quote):
            return text[len(quote) : -len(quote)]
    return text


def read_modelfile(text: str, *, shown: str, instance: Sequence[str] = (), name: str = "") -> Imported:
    """Return the model of a Modelfile. `name` is its name; default: that of the file or its folder. Raises ConfigError."""
    commands = parse_modelfile(text, shown)
    report = Report()
    folder = Path(shown).absolute().parent if shown != "-" else Path.cwd()
    key = name or _name_of(shown)
    if not _NAME.fullmatch(key):
        raise ConfigError([Problem(shown, 0, 0, "", f"{key!r} cannot be the name of a model: give one with --name")])
    reader = _ModelfileReader(key, folder, report)
    for command in commands:
        getattr(reader, f"_{command.name}", reader.text)(command)
    model = reader.model(list(instance) or ["ollama"])
    data: dict[str, Any] = {"version": 1}
    if not instance:
        data["instances"] = {"ollama": {"engine": "ollama"}}
    data["models"] = {key: model}
    if not name:
        report.warn(key, "", "a Modelfile has no name: this one comes from the file's; another is --name NAME")
    return Imported(to_yaml(data, {"": [f"the model of {shown}"]}), data, report)


def _name_of(shown: str) -> str:
    if shown == "-":
        return "model"
    path = Path(shown).absolute()
    found = _FILE_NAME.fullmatch(path.name)
    name = (found[1] if found is not None else "") or path.parent.name
    return re.sub(r"[^A-Za-z0-9._:+-]+", "-", name).strip("-._:").lower() or "model"


class _ModelfileReader:
    def __init__(self, key: str, folder: Path, report: Report) -> None:
        self.key, self.folder, self.report = key, folder, report
        self.sources: list[str] = []
        self.texts: dict[str, str] = {}
        self.adapters: list[str] = []
        self.licenses: list[str] = []
        self.messages: list[dict[str, str]] = []
        self.parameters: dict[str, Any] = {}

    def text(self, command: ModelfileCommand) -> None:
        """Read a command whose last value counts."""
        if command.value:
            self.texts[command.name] = command.value
        else:
            self.texts.pop(command.name, None)

    def _from(self, command: ModelfileCommand) -> None:
        if not command.value:
            return
        path = self._path(command.value)
        is_file = (
            command.value.lower().endswith(".gguf")
            or command.value.startswith(("/", "./", "../", "~"))
            or path.exists()
        )
        self.sources.append(str(path) if is_file else command.value)

    def _path(self, text: str) -> Path:
        return self.folder / expand_home(text)

    def _adapter(self, command: ModelfileCommand) -> None:
        self.adapters.append(str(self._path(command.value)))

    def _license(self, command: ModelfileCommand) -> None:
        if command.value:
            self.licenses.append(command.value)

    def _message(self, command: ModelfileCommand) -> None:
        if command.value:
            self.messages.append({"role": command.argument, "content": command.value})
        else:
            self.report.refused(self.key, f"MESSAGE {command.argument}", f"line {command.line}: is empty")

    def _draft(self, command: ModelfileCommand) -> None:
        self.report.refused(self.key, "DRAFT", f"line {command.line}: fleetd builds no draft models")

    def _requires(self, command: ModelfileCommand) -> None:
        if _VERSION.fullmatch(command.value):
            self.texts["requires"] = command.value
        else:
            detail = f"line {command.line}: {command.value!r} is not a version such as 0.14.0"
            self.report.refused(self.key, "REQUIRES", detail)

    def _parameter(self, command: ModelfileCommand) -> None:
        try:
            value = parameter(command.argument, command.value)
        except ValueError as error:
            outcome = self.report.approximated if command.argument in REMOVED else self.report.refused
            outcome(self.key, f"PARAMETER {command.argument}", f"line {command.line}: {error}")
            return
        if command.argument == "stop":
            value = list(dict.fromkeys([*self.parameters.get("stop", []), *value]))
        self.parameters[command.argument] = value

    def _said(self) -> Iterator[tuple[str, Any]]:
        yield from self.texts.items()
        yield "parameters", self.parameters
        yield "messages", self.messages
        yield "adapters", self.adapters
        yield "license", self.licenses[0] if len(self.licenses) == 1 else self.licenses
        if len(self.sources) > 1:
            yield "projector", self.sources[1]

    def model(self, instance: list[str]) -> dict[str, Any]:
        """Return the entry of the model."""
        model: dict[str, Any] = {"instance": instance[0] if len(instance) == 1 else instance}
        source = self.sources[0]
        if source.removesuffix(":latest") == self.key.removesuffix(":latest"):
            model["served_as"] = f"{self.key}-own"
            self.report.approximated(self.key, "FROM", f"is the model's own name: it is built as {self.key}-own")
        model["from"] = source
        for extra in self.sources[2:]:
            self.report.refused(self.key, "FROM", f"{extra}: a model has one file, and one projector")
        if len(self.adapters) > 1:
            self.report.approximated(
                self.key, "ADAPTER", f"all {len(self.adapters)} apply; `ollama create` uses the last one"
            )
        modelfile = {key: value for key, value in self._said() if value}
        if modelfile:
            model["modelfile"] = modelfile
        self.report.mapped(self.key, "", f"models.{self.key}, from {source}")
        return model


__all__ = ["COMMANDS", "ModelfileCommand", "is_modelfile", "parse_modelfile", "read_modelfile"]
