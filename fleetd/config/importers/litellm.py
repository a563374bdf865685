"""Convert the model list of LiteLLM's config.yaml to servers that fleetd routes to, and their models.

Invariants:
- LiteLLM starts no server, so each becomes an external one. A provider whose dialect fleetd does not know is refused.
- Keys are written as variables: `os.environ/NAME` as ${NAME}; a key in the file stays one, with a warning.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fleetd.config.importers.emit import Variable, to_yaml
from fleetd.config.importers.report import Imported, Report
from fleetd.config.names import free_name
from fleetd.config.schema.base import MODEL_NAME
from fleetd.config.yaml.parser import Source, compose
from fleetd.config.yaml.transform import plain
from fleetd.errors import ConfigError, Problem

_OLLAMA = frozenset({"ollama", "ollama_chat"})
_OPENAI = frozenset({"openai", "hosted_vllm", "vllm", "lm_studio", "llamafile", "text-completion-openai", "openai_like", "custom_openai",
                     "litellm_proxy", "xinference", "openrouter", "groq", "deepseek", "together_ai", "mistral"})  # fmt: skip
_ADDRESSES = {
    "openai": ("https://api.openai.com", "OPENAI_API_KEY"), "openrouter": ("https://openrouter.ai/api", "OPENROUTER_API_KEY"),
    "groq": ("https://api.groq.com/openai", "GROQ_API_KEY"), "deepseek": ("https://api.deepseek.com", "DEEPSEEK_API_KEY"),
    "together_ai": ("https://api.together.xyz", "TOGETHERAI_API_KEY"), "mistral": ("https://api.mistral.ai", "MISTRAL_API_KEY"),
    "ollama": ("http://127.0.0.1:11434", ""), "ollama_chat": ("http://127.0.0.1:11434", ""),
}  # fmt: skip
_NAME = re.compile(MODEL_NAME)
_PARAMETERS = frozenset({"model", "api_base", "base_url", "api_key", "custom_llm_provider", "weight"})


def import_litellm(text: str, *, shown: str = "config.yaml") -> Imported:
    """Return servers and models for `model_list`. Raises ConfigError."""
    document = plain(compose(Source(shown, Path(shown), text=text)))
    listed = document.get("model_list") if isinstance(document, dict) else None
    if not isinstance(listed, list) or not listed:
        raise ConfigError([Problem(shown, 0, 0, "", "has no model_list: is it LiteLLM's config.yaml?")])
    reader = _LiteLlmReader(Report())
    for number, item in enumerate(listed):
        reader.read(item, number)
    settings = document.get("router_settings")
    for section in ("router_settings", "litellm_settings"):
        stated = document.get(section)
        if isinstance(stated, dict):
            reader.fallbacks(stated.get("fallbacks"), section)
    models = reader.models()
    if not models:
        raise ConfigError([Problem(shown, 0, 0, "model_list", "has no model that fleetd can route to")])
    for key in document:
        if key not in ("model_list", "router_settings", "litellm_settings"):
            reader.report.refused("", key, "concerns LiteLLM itself")
    if isinstance(settings, dict) and settings.get("routing_strategy"):
        reader.report.approximated("", "router_settings.routing_strategy", "routes are by weight, all equal")
    data = {"version": 1, "instances": reader.instances, "models": models}
    return Imported(to_yaml(data, {"": [f"{len(models)} models from LiteLLM's {shown}"]}), data, reader.report)


class _LiteLlmReader:
    def __init__(self, report: Report) -> None:
        self.report = report
        self.instances: dict[str, Any] = {}
        self.deployments: dict[str, list[dict[str, Any]]] = {}
        self.backups: dict[str, list[str]] = {}
        self._servers: dict[tuple[str, str, str], str] = {}

    def read(self, item: Any, number: int) -> None:
        where = f"model_list[{number}]"
        parameters = item.get("litellm_params") if isinstance(item, dict) else None
        if not isinstance(parameters, dict) or not isinstance(parameters.get("model"), str):
            self.report.refused("", where, "has no litellm_params.model")
            return
        provider, slash, model = parameters["model"].partition("/")
        stated = str(parameters.get("custom_llm_provider") or "")
        if not slash or stated:
            provider, model = stated or "openai", parameters["model"].removeprefix(f"{stated}/")
        name = _fitting(str(item.get("model_name") or parameters["model"]))
        if provider not in _OLLAMA | _OPENAI:
            self.report.refused(name, where, f"fleetd does not speak the dialect of {provider}")
            return
        if "*" in name or "*" in model:
            self.report.refused(name, where, "names all models of a server: list the models")
            return
        server = self._server(provider, parameters, where)
        if server is None:
            return
        for key in parameters:
            if key not in _PARAMETERS:
                self.report.refused(name, f"litellm_params.{key}", "requests are passed on as they are")
        self.deployments.setdefault(name, []).append({"instance": server, "served_as": model})
        self.report.mapped(name, where, f"{model} on instances.{server}")

    def _server(self, provider: str, parameters: dict[str, Any], where: str) -> str | None:
        base = str(parameters.get("api_base") or parameters.get("base_url") or "")
        default, variable = _ADDRESSES.get(provider, ("", ""))
        address = _environment(base) if base else default
        if not address:
            self.report.refused("", where, f"has no api_base, which {provider} needs")
            return None
        if not isinstance(address, Variable):
            address = re.sub(r"/v1/?$", "", address).rstrip("/")
        engine = "ollama" if provider in _OLLAMA else "external"
        key = _environment(str(parameters.get("api_key") or "")) or (
            Variable(f"${{{variable}}}") if variable and not base else ""
        )
        known = (engine, address, key)
        if known in self._servers:
            return self._servers[known]
        host = re.sub(r"^https?://|[/:].*$", "", address)
        wanted = re.sub(r"[^A-Za-z0-9._]+", "-", provider if not base else f"{provider}-{host}").strip("-._")[:50]
        name = free_name(wanted, self.instances)
        entry: dict[str, Any] = {"engine": engine, "external": address}
        if key and engine == "external" and key not in ("none", "dummy", "sk-no-key-required", "EMPTY"):
            entry["options"] = {"api_key": key}
            if not isinstance(key, Variable):
                self.report.warn("", f"{where}.api_key", "is written in the file: use a variable, ${NAME}")
        self.instances[name] = entry
        self._servers[known] = name
        return name

    def fallbacks(self, stated: Any, section: str) -> None:
        for item in stated if isinstance(stated, list) else ():
            for name, others in item.items() if isinstance(item, dict) else ():
                self.backups.setdefault(_fitting(str(name)), []).extend(
                    _fitting(str(other)) for other in (others if isinstance(others, list) else [others])
                )
                self.report.mapped(str(name), f"{section}.fallbacks", "fallback")

    def models(self) -> dict[str, Any]:
        """Return the models: one per name, with a route where LiteLLM balances over several."""
        models: dict[str, Any] = {}
        for name, found in self.deployments.items():
            if len(found) == 1:
                models[name] = found[0]
                continue
            parts = []
            for number, deployment in enumerate(found, start=1):
                part, suffix = f"{name}-{number}", 1
                while part in self.deployments or part in models:
                    part, suffix = f"{name}-{number}-{suffix}", suffix + 1
                models[part] = deployment
                parts.append(part)
            models[name] = {"route": [{"to": part} for part in parts]}
        for name, others in self.backups.items():
            known = [other for other in dict.fromkeys(others) if other in self.deployments and other != name]
            if name in models and known:
                models[name]["fallback"] = known
        return models


def _environment(text: str) -> str:
    """Return `os.environ/NAME` as a variable of fleet.yaml."""
    found = re.fullmatch(r"os\.environ/([A-Za-z_][A-Za-z0-9_]*)", text)
    return Variable(f"${{{found[1]}}}") if found is not None else text


def _fitting(name: str) -> str:
    return (
        name if _NAME.fullmatch(name) else re.sub(r"[^A-Za-z0-9._:/@+*-]+", "-", name).strip("-._:/@+")[:200] or "model"
    )
