"""All checks in the order of the report."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fleetd.setup.doctor import daemon, engines, storage, system
from fleetd.setup.doctor.facts import Facts
from fleetd.setup.doctor.findings import Check, Finding, Severity

CHECKS: tuple[Check, ...] = (
    storage.config,
    daemon.daemon,
    daemon.left,
    storage.folders,
    storage.space,
    storage.required_paths,
    engines.programs,
    engines.versions,
    engines.library,
    engines.ports,
    engines.ollama,
    system.gpus,
    system.memory,
    system.open_files,
    system.processes,
    system.clock,
    daemon.service,
    daemon.silent,
)


def examine(facts: Facts) -> tuple[Finding, ...]:
    """Return the findings of every check."""
    return tuple(finding for check in CHECKS for finding in check(facts))


def document(findings: tuple[Finding, ...]) -> dict[str, Any]:
    """Return the findings as JSON."""
    counts = Counter(finding.verdict for finding in findings)
    return {
        "schema": "fleetctl/v1",
        "ok": not counts[Severity.FAIL],
        "counts": {verdict.value.lower(): counts[verdict] for verdict in Severity},
        "findings": [
            {"check": one.check, "verdict": one.verdict.value, "text": one.text, "fix": one.fix} for one in findings
        ],
    }
