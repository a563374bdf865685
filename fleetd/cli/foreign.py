"""Verbs of other tools: aliases of our own, and the line to print for each that fleetctl does not have.

Invariants:
- A verb of fleetctl always wins; an alias comes next, then the table, then the nearest name.
- A verb that stops or starts something is never suggested for a mistyped one.
- Standard library only; plain data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# typed → verb of fleetctl
ALIASES: Mapping[str, str] = {
    "ls": "status",
    "list": "status",
    "describe": "status",
    "show": "status",
    "run": "chat",
}

_FILE = "edit fleet.yaml; fleetd applies it when it is saved"
# typed → the line to print. `NAME` is replaced by the first name that was typed after the verb.
FOREIGN: Mapping[str, str] = {
    # planned
    "top": "it does not exist yet; use: fleetctl status --watch (processes, memory), fleetctl ps (loaded models)",
    # PM2
    "monit": "use: fleetctl status --watch",
    "dash": "use: fleetctl status --watch",
    "dashboard": "use: fleetctl status --watch",
    "save": "not needed: fleet.yaml is the list of processes; fleetctl dump prints a bug report",
    "resurrect": "not needed: the daemon starts everything in fleet.yaml, and adopts what still runs",
    "startup": "use: fleetctl install-service",
    "unstartup": "remove the service that fleetctl install-service wrote: systemctl disable --now fleetd",
    "flush": "not needed: logs rotate by themselves (logs.rotate in fleet.yaml)",
    "reloadLogs": "not needed: logs rotate by themselves (logs.rotate in fleet.yaml)",
    "env": "use: fleetd render (the environment of every process, secrets redacted)",
    "scale": f"replicas are in fleet.yaml (replicas: 3): {_FILE}",
    "reset": "fleetctl start NAME resets the counters of a process that has failed",
    "delete": f"remove its entry: {_FILE}",
    "del": f"remove its entry: {_FILE}",
    "kill": "one process: fleetctl signal KILL NAME; the daemon and all processes: fleetctl shutdown",
    "update": "use: fleetctl daemon-reexec (processes keep running)",
    "sendSignal": "use: fleetctl signal SIG NAME",
    "jlist": "use: fleetctl pm2-jlist, or fleetctl status -o json",
    "prettylist": "use: fleetctl status -o yaml",
    "gracefulReload": "use: fleetctl restart NAME --rolling",
    "id": "use: fleetctl status NAME",
    "pid": "use: fleetctl status NAME",
    "link": "not needed: fleetd has no cloud service",
    "install": "use: fleetctl install-service",
    # systemctl, journalctl
    "list-units": "use: fleetctl status (--failed: only what has a problem)",
    "cat": "use: fleetd render (the file as fleetd reads it)",
    "edit": f"{_FILE}; check it with: fleetd check",
    "reset-failed": "use: fleetctl start NAME",
    "is-active": "use: fleetctl status NAME; its exit code is 0 for running, 3 for not running",
    "is-failed": "use: fleetctl status NAME; its exit code is 0 for running, 3 for not running",
    "is-enabled": "use: fleetctl status NAME; enabled: is a key of fleet.yaml",
    "enable": f"remove `enabled: false` from its entry: {_FILE}",
    "disable": f"write `enabled: false` into its entry: {_FILE}",
    "mask": "use: fleetctl stop NAME (it stays stopped, over restarts of the daemon too)",
    "unmask": "use: fleetctl start NAME",
    "try-restart": "use: fleetctl restart NAME",
    "daemon-reload": f"not needed: {_FILE}; at once: fleetctl reload",
    "list-dependencies": "use: fleetctl status NAME (the line After)",
    "journalctl": "use: fleetctl logs NAME -f",
    "log": "use: fleetctl logs NAME",
    "tail": "use: fleetctl logs NAME -f",
    # kubectl
    "get": "use: fleetctl status (-w: refresh every second)",
    "rollout": "restart replicas one by one: fleetctl restart NAME --rolling; undo: apply the earlier fleet.yaml",
    "wait": "use: fleetctl start NAME (it waits until ready), or fleetctl load MODEL",
    "cordon": "use: fleetctl drain NAME",
    "uncordon": "use: fleetctl undrain NAME",
    "exec": "fleetd runs no commands inside a process; fleetctl status NAME shows its PID and folder",
    "config": "use: fleetd render (the file as fleetd reads it), fleetd check",
    # Ollama, llama-swap, docker compose
    "pull": "use: fleetctl models sync (the models that fleet.yaml names)",
    "push": "fleetd publishes no models; use: ollama push",
    "rm": "remove its entry from fleet.yaml, then: fleetctl models prune",
    "cp": "add an alias to its entry in fleet.yaml (aliases: [NEW])",
    "create": "describe it in fleet.yaml (modelfile:), then: fleetctl models sync",
    "serve": "use: fleetd run",
    "ui": "fleetd has no web page; use: fleetctl status --watch",
    "running": "use: fleetctl ps",
    "upstream": "fleetctl status NAME shows the port of the engine; the gateway routes by the model's name",
    "up": "use: fleetd run (the daemon and the fleet), or fleetctl start all",
    "down": "use: fleetctl shutdown",
    "check": "use: fleetd check",
    "render": "use: fleetd render",
    "schema": "use: fleetd schema",
    "validate": "use: fleetd check",
}

_NEVER_GUESSED = frozenset({"stop", "start", "restart", "shutdown", "unload", "drain", "signal", "daemon-reexec"})

# title → verbs of `fleetctl --help`; a verb that is in none comes last
SECTIONS: Mapping[str, Sequence[str]] = {
    "Look": ("status", "ps", "logs", "events", "story", "explain"),
    "Processes": ("start", "stop", "restart", "drain", "undrain", "signal"),
    "Models": ("chat", "load", "unload", "pin", "unpin", "models"),
    "Configuration": ("init", "diff", "apply", "reload", "import", "migrate", "audit"),
    "Daemon": ("doctor", "install-service", "daemon-reexec", "shutdown", "dump", "version"),
}

EXAMPLES: Mapping[str, Sequence[str]] = {
    "status": ("fleetctl status", "fleetctl status qwen -o json", "fleetctl status --failed"),
    "ps": ("fleetctl ps",),
    "logs": ("fleetctl logs -f", "fleetctl logs bot -n 100", "fleetctl logs 'ai-*' --since 10m --grep error"),
    "events": ("fleetctl events -f", "fleetctl events qwen --since 1h"),
    "story": ("fleetctl story qwen", "fleetctl story qwen --all"),
    "explain": ("fleetctl explain qwen",),
    "start": ("fleetctl start bot", "fleetctl start 'ai-*' --no-wait"),
    "stop": ("fleetctl stop bot",),
    "restart": ("fleetctl restart bot", "fleetctl restart web --rolling"),
    "drain": ("fleetctl drain ollama",),
    "undrain": ("fleetctl undrain ollama",),
    "signal": ("fleetctl signal HUP bot",),
    "chat": (
        'fleetctl chat qwen "Why is the sky blue?"',
        "git diff | fleetctl chat qwen --system 'You review code.'",
    ),
    "load": ("fleetctl load qwen",),
    "unload": ("fleetctl unload qwen",),
    "pin": ("fleetctl pin qwen",),
    "unpin": ("fleetctl unpin qwen",),
    "models": ("fleetctl models list", "fleetctl models sync"),
    "diff": ("fleetctl diff", "fleetctl diff new.yaml"),
    "apply": ("fleetctl apply new.yaml --wait", "fleetctl apply --dry-run"),
    "reload": ("fleetctl reload",),
    "import": ("fleetctl import pm2 ecosystem.config.js", "ollama list | fleetctl import ollama -"),
    "audit": ("fleetctl audit ~/projects",),
    "install-service": ("sudo fleetctl install-service", "fleetctl install-service --user --print"),
    "daemon-reexec": ("fleetctl daemon-reexec",),
    "shutdown": ("fleetctl shutdown",),
    "dump": ("fleetctl dump > report.json",),
    "pm2-jlist": ("fleetctl pm2-jlist",),
    "version": ("fleetctl version",),
    "completion": ('eval "$(fleetctl completion bash)"',),
}


def line_for(typed: str, names: Sequence[str]) -> str | None:
    """Return the line to print for a verb of another tool; None for an unknown word."""
    line = FOREIGN.get(typed)
    name = next((word for word in names if not word.startswith("-")), None)
    return line.replace("NAME", name[:60]) if line is not None and name is not None else line


def nearest(typed: str, verbs: Sequence[str]) -> str | None:
    """Return the verb that was probably meant; never one that stops or starts something."""
    from difflib import get_close_matches

    close = get_close_matches(typed, [verb for verb in verbs if verb not in _NEVER_GUESSED], n=1)
    return close[0] if close else None
