"""A model of Ollama as code: `from`, `quantize` and `modelfile` of fleet.yaml as a create request and as a Modelfile.

Invariants:
- Pure: text and values in, text and values out. `sync.py` reads the files.
- The request to /api/create is what counts; the Modelfile is for people. It is equivalent, or refused with the reason: its
  grammar has no escapes and silently drops invisible characters, the request has neither problem.
- Problems are (path, message) pairs below `modelfile`, all of them at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleetd.models.ollama.store import ModelName
from fleetd.units import expand_home

ROLES = ("system", "user", "assistant")
QUANTIZATIONS = ("F32", "F16", "Q8_0", "Q4_K_M", "Q4_K_S")  # Ollama reads more kinds, but creates only these
_KEYS = (
    "template",
    "system",
    "license",
    "parameters",
    "messages",
    "adapter",
    "adapters",
    "projector",
    "renderer",
    "parser",
    "requires",
)
_WHOLE = frozenset(
    {
        "num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict", "num_keep", "seed", "num_predict",
        "top_k", "repeat_last_n",
    }
)  # fmt: skip
_REAL = frozenset(
    {"top_p", "min_p", "typical_p", "temperature", "repeat_penalty", "presence_penalty", "frequency_penalty"}
)
_FLAGS = frozenset({"use_mmap"})
PARAMETERS = frozenset({*_WHOLE, *_REAL, *_FLAGS, "stop"})
_SPLIT = re.compile(r".*-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)

ModelfileProblem = tuple[tuple[str | int, ...], str]


@dataclass(frozen=True, slots=True)
class ModelRecipe:
    """How to create a model of a store: from a file (`source`) or a model (`base`).

    `parameters` are in Ollama's own names and types, `stop` always a tuple. `quantize` is None or as Ollama spells it.
    """

    name: str  # the key in fleet.yaml
    served_as: str
    source: Path | None = None
    base: str | None = None
    quantize: str | None = None
    template: str | None = None
    system: str | None = None
    license: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[tuple[str, str], ...] = ()
    adapters: tuple[Path, ...] = ()
    projector: Path | None = None
    renderer: str | None = None
    parser: str | None = None
    requires: str | None = None

    def content_hash(self, fingerprints: Mapping[str, str]) -> str:
        """Return a hash that changes exactly when the created model would."""
        parts = {**self.request({}), "files": sorted(fingerprints.values()), "base": self.base}
        return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def request(self, digests: Mapping[Path, str], names: Mapping[Path, str] | None = None) -> dict[str, Any]:
        """Return the create request; `digests`: file → blob, `names`: file → request name."""
        names = names or {}
        body: dict[str, Any] = {"model": self.served_as}
        if self.base is not None:
            body["from"] = self.base
        files = {names.get(path, path.name): digest for path, digest in digests.items() if path not in self.adapters}
        adapters = {names.get(path, path.name): digest for path, digest in digests.items() if path in self.adapters}
        optional = {
            "files": files,
            "adapters": adapters,
            "quantize": self.quantize,
            "template": self.template,
            "system": self.system,
            "license": list(self.license),
            "parameters": {key: _plain(value) for key, value in sorted(self.parameters.items())},
            "messages": [{"role": role, "content": content} for role, content in self.messages],
            "renderer": self.renderer,
            "parser": self.parser,
            "requires": self.requires,
        }
        return body | {key: value for key, value in optional.items() if value}

    def render(self) -> str:
        """Return the equivalent Modelfile. Raises ValueError if it cannot be expressed."""
        lines = [f"FROM {_from_line(path)}" for path in (self.source, self.projector) if path is not None]
        if self.base is not None:
            lines.append(f"FROM {self.base}")
        if self.quantize:
            lines.insert(0, f"# ollama create --quantize {self.quantize} {self.served_as}")
        lines += [f"ADAPTER {_from_line(path)}" for path in self.adapters]
        texts = {
            "template": self.template,
            "system": self.system,
            "renderer": self.renderer,
            "parser": self.parser,
            "requires": self.requires,
        }
        for command, value in texts.items():
            if value:
                lines.append(f"{command.upper()} {_quoted(value, command)}")
        for key, value in sorted(self.parameters.items()):
            for item in value if isinstance(value, tuple) else (value,):
                lines.append(f"PARAMETER {key} {_quoted(_spelled(item), f'parameters.{key}')}")
        lines += [f"LICENSE {_quoted(text, 'license')}" for text in self.license]
        lines += [f"MESSAGE {role} {_quoted(content, 'messages')}" for role, content in self.messages]
        return "\n".join(lines) + "\n"


def recipe(
    name: str,
    served_as: str,
    *,
    source: str | None,
    quantize: str | None = None,
    modelfile: Mapping[str, Any] | None = None,
    config_dir: Path = Path(),
) -> ModelRecipe:
    """Return the recipe of an entry. Raises ValueError with every problem, by line.

    `source` is a file if it looks like a path (it starts with a slash, `./` or `~`, or ends in .gguf), else a model's name.
    Relative paths are relative to `config_dir`.
    """
    problems = [*modelfile_problems(modelfile or {}), *quantize_problems(quantize)]
    problems += [(("from",), text) for text in source_problems(source)]
    if problems:
        raise ValueError("\n".join(f"models.{name}.{'.'.join(map(str, path))}: {text}" for path, text in problems))
    known = dict(modelfile or {})
    files = source is not None and looks_like_path(source)
    licence = known.get("license") or ()
    adapters = [*([known["adapter"]] if known.get("adapter") else []), *(known.get("adapters") or ())]
    return ModelRecipe(
        name=name,
        served_as=served_as,
        source=absolute(source, config_dir) if source is not None and files else None,
        base=source if source is not None and not files else None,
        quantize=quantize.upper() if quantize else None,
        template=known.get("template"),
        system=known.get("system"),
        license=(licence,) if isinstance(licence, str) else tuple(licence),
        parameters={
            key: _stops(value) if key == "stop" else value for key, value in (known.get("parameters") or {}).items()
        },
        messages=tuple((message["role"], message["content"]) for message in known.get("messages") or ()),
        adapters=tuple(absolute(text, config_dir) for text in adapters),
        projector=absolute(known["projector"], config_dir) if known.get("projector") else None,
        renderer=known.get("renderer"),
        parser=known.get("parser"),
        requires=known.get("requires"),
    )


def looks_like_path(source: str) -> bool:
    """Return whether a text means a path, even of a missing file."""
    return source.startswith(("/", "./", "../", "~")) or source in (".", "..") or source.lower().endswith(".gguf")


def absolute(text: str, config_dir: Path) -> Path:
    """Return the path for a text; an unknown `~user` is a plain folder name."""
    return config_dir.absolute() / expand_home(text)


def invisible(text: str) -> str | None:
    """Describe the first invisible character and its position; None if there is none."""
    for place, char in enumerate(text, 1):
        if char != " " and not char.isprintable():
            return f"an invisible character at position {place} (U+{ord(char):04X} {unicodedata.name(char, 'control character')})"
    return None


def split_of(path: Path) -> int:
    """Return the number of shards of a model, by its file name; 1 for a whole file."""
    match = _SPLIT.fullmatch(path.name)
    return int(match.group(2)) if match else 1


# -- validation -----------------------------------------------------------------------------------------------------------


def source_problems(source: str | None) -> list[str]:
    """Return the problems of `from`, as far as its text shows."""
    if source is None:
        return []
    if not source.strip():
        return ["must name a file or a model"]
    if "\n" in source or "\0" in source:
        return ["a path must be one line"]
    if looks_like_path(source):
        shards = split_of(Path(source))
        if shards > 1:
            return [
                f"is one of {shards} shards, which Ollama cannot read: use engine llamacpp, or merge them into one file"
            ]
        return []
    try:
        ModelName.parse(source)
    except ValueError as error:
        return [f"{error}; a path starts with '/', './' or '~', or ends in .gguf"]
    return []


def quantize_problems(quantize: str | None) -> list[ModelfileProblem]:
    """Return the problems of `quantize`, in upper or lower case."""
    if quantize is None or quantize.upper() in QUANTIZATIONS:
        return []
    return [(("quantize",), f"{quantize!r} is not a quantization that Ollama creates: {', '.join(QUANTIZATIONS)}")]


def modelfile_problems(modelfile: Mapping[str, Any]) -> list[ModelfileProblem]:
    """Return all problems of a `modelfile` mapping."""
    found: list[ModelfileProblem] = []
    for key, value in modelfile.items():
        place: tuple[str | int, ...] = ("modelfile", key)
        if key not in _KEYS:
            found.append((place, f"is not known; a modelfile takes {', '.join(_KEYS)}"))
        elif value is None:
            continue
        elif key == "parameters":
            found += _parameter_problems(value)
        elif key == "messages":
            found += _message_problems(value)
        elif key in ("license", "adapters"):
            if not (isinstance(value, str) and key == "license") and not _texts(value):
                found.append((place, "must be a list of strings"))
        elif not isinstance(value, str):
            found.append((place, "must be a string"))
        elif key == "requires" and not re.fullmatch(r"v?\d+\.\d+\.\d+([-+].+)?", value):
            found.append((place, f"{value!r} is not a version such as 0.24.0"))
    return found


def _texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _parameter_problems(parameters: Any) -> list[ModelfileProblem]:
    if not isinstance(parameters, Mapping):
        return [(("modelfile", "parameters"), "must be a mapping of names to values")]
    found: list[ModelfileProblem] = []
    for key, value in parameters.items():
        problem = _type_problem(key, value)
        if problem:
            found.append((("modelfile", "parameters", key), problem))
    return found


def _type_problem(key: str, value: Any) -> str | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if key in _WHOLE:
        return None if number and isinstance(value, int) else "must be a whole number"
    if key in _REAL:
        return None if number and math.isfinite(value) else "must be a number"
    if key in _FLAGS:
        return None if isinstance(value, bool) else "must be true or false"
    if key == "stop":
        return None if isinstance(value, str) or _texts(value) else "must be a string or a list of strings"
    return f"is not a parameter of Ollama; it knows {', '.join(sorted(PARAMETERS))}"


def _message_problems(messages: Any) -> list[ModelfileProblem]:
    if not isinstance(messages, (list, tuple)):
        return [(("modelfile", "messages"), "must be a list of {role, content}")]
    found: list[ModelfileProblem] = []
    for index, message in enumerate(messages):
        place = ("modelfile", "messages", index)
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            found.append((place, "must be {role, content}"))
        elif message["role"] not in ROLES:
            found.append((place, f"role must be one of {', '.join(ROLES)}"))
        elif not isinstance(message["content"], str):
            found.append((place, "content must be a string"))
    return found


# -- the grammar of a Modelfile -----------------------------------------------------------------------------------------


def _from_line(path: Path) -> str:
    """Return a path unquoted. Raises ValueError if Ollama's parser would change it."""
    text = str(path)
    found = invisible(text)
    if found:
        raise ValueError(
            f"a Modelfile cannot name {text!r}: it has {found}, which Ollama's parser drops; rename the file"
        )
    if text != text.strip():
        raise ValueError(f"a Modelfile cannot name {text!r}: its parser cuts spaces at the ends; rename the file")
    return text


def _quoted(text: str, what: str) -> str:
    hidden = invisible(text.replace("\n", "").replace("\t", ""))
    if hidden:
        raise ValueError(
            f"{what}: a Modelfile cannot hold {hidden}; Ollama's parser drops it (fleetd's own request does not)"
        )
    if '"""' in text:
        raise ValueError(f'{what}: a Modelfile cannot hold """ within a value; there is no escape for it')
    if text and "\n" not in text and text == text.strip() and not text.startswith('"'):
        return text
    if text.endswith('"'):
        raise ValueError(f"{what}: a Modelfile cannot hold a quoted value that ends in a quotation mark")
    return f'"""{text}"""' if '"' in text or "\n" in text or not text else f'"{text}"'


def _spelled(value: Any) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else str(value)


def _stops(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
