"""Checks of the daemon: whether it answers, what a dead one left running, and its service at boot.

Pure: every check reads facts alone.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from fleetd.setup.doctor.facts import Facts, ServiceFact
from fleetd.setup.doctor.findings import Finding, failed, passed, warned
from fleetd.units import counted, listed

LABEL = "org.fleetd.fleetd"


def daemon(facts: Facts) -> Iterator[Finding]:
    """Judge whether the daemon runs, answers, and is of this version."""
    found = facts.daemon
    if found.state == "silent":
        pid = f"pid {found.pid} " if found.pid else ""
        fix = (
            f"kill -CONT {found.pid}; if it stays silent: kill -9 {found.pid}, and start it again"
            if found.pid
            else "fleetd run"
        )
        yield failed("daemon", f"fleetd {pid}holds its lock and does not answer: {found.problem}", fix)
        return
    if found.state == "denied":
        text = found.problem or f"permission denied for {found.socket}"
        yield failed("daemon", text, "run fleetctl as the user that runs fleetd")
        return
    if found.state == "stopped":
        yield warned("daemon", "fleetd does not run", _run(facts))
        return
    if found.version and found.version != facts.version:
        text = f"fleetd {found.version} runs, and fleetctl is {facts.version}"
        yield warned("daemon.version", text, "fleetctl daemon-reexec")
    else:
        yield passed("daemon", f"fleetd {found.version} runs, pid {found.pid}")
    if found.config_error:
        text = f"the saved fleet.yaml is not in force: {found.config_error.splitlines()[0]}"
        yield failed("daemon.config", text, f"fleetd check {shlex.quote(found.config or 'fleet.yaml')}")
    if found.store_problem:
        yield failed(
            "daemon.state",
            f"the state cannot be saved: {found.store_problem}",
            "fleetctl doctor | grep -e disk -e rights",
        )
    if found.config and facts.config.path and found.config != facts.config.path:
        text = f"fleetd runs {found.config}, and this report is about {facts.config.path}"
        yield warned("daemon.file", text, f"fleetctl doctor --config {shlex.quote(found.config)}")


def _run(facts: Facts) -> str:
    """Return the command that starts the daemon as it is installed."""
    service = facts.service
    if service.kind is not None and service.manager == "systemd":
        return "systemctl --user start fleetd" if service.kind == "user" else "sudo systemctl start fleetd"
    if service.kind is not None and service.manager == "launchd":
        return _kickstart(service, facts.uid)
    return f"fleetd run --config {shlex.quote(facts.config.path)}" if facts.config.path else "fleetctl init"


def _domain(service: ServiceFact, uid: int) -> str:
    return f"gui/{uid}" if service.kind == "user" else "system"


def _kickstart(service: ServiceFact, uid: int) -> str:
    root = "" if service.kind == "user" else "sudo "
    return f"{root}launchctl kickstart {_domain(service, uid)}/{LABEL}"


def left(facts: Facts) -> Iterator[Finding]:
    """Judge processes that a dead daemon left running: they hold memory and ports, and a new daemon adopts them."""
    if facts.daemon.state in ("running", "silent", "denied"):
        return
    if facts.left:
        names = listed(f"{one.name} (pid {one.pid})" for one in facts.left)
        text = f"{counted(len(facts.left), 'process', 'es')} of a daemon that no longer runs: {names}"
        pids = " ".join(str(one.pid) for one in facts.left)
        yield warned("left", text, f"{_run(facts)}   # adopts them; or: kill {pids}")
    else:
        yield passed("left", "nothing of an earlier daemon still runs")


def service(facts: Facts) -> Iterator[Finding]:
    """Judge the service that starts fleetd at boot."""
    found = facts.service
    if found.manager == "none":
        yield passed("service", "no systemd or launchd on this machine")
        return
    if found.kind is None:
        own = " --user" if facts.uid else ""
        yield warned(
            "service", f"no {found.manager} service: fleetd does not start at boot", f"fleetctl install-service{own}"
        )
        return
    if not found.program_found:
        text = f"{found.path} starts {found.program}, which does not exist"
        yield failed("service.program", text, _install(found))
    if found.config and facts.config.path and found.config != facts.config.path:
        text = f"the service uses {found.config}, not {facts.config.path}"
        yield warned("service.config", text, f"{_install(found)} --config {shlex.quote(facts.config.path)}")
    if found.manager == "systemd":
        yield from _systemd(facts, found)
    else:
        yield from _launchd(facts, found)


def _install(found: ServiceFact) -> str:
    return "fleetctl install-service --user" if found.kind == "user" else "sudo fleetctl install-service"


def _systemd(facts: Facts, found: ServiceFact) -> Iterator[Finding]:
    ctl = "systemctl --user" if found.kind == "user" else "sudo systemctl"
    if found.state == "failed":
        journal = "journalctl --user -u fleetd -n 50" if found.kind == "user" else "sudo journalctl -u fleetd -n 50"
        yield failed("service", f"the {found.kind} unit has failed", f"{journal}; then: {ctl} restart fleetd")
    elif found.enabled is False:
        yield warned("service", f"the {found.kind} unit is installed and not enabled", f"{ctl} enable --now fleetd")
    elif found.active is False and facts.daemon.state == "running":
        yield warned(
            "service",
            "fleetd runs, but not as its service: the service cannot start",
            f"fleetctl shutdown; {ctl} start fleetd",
        )
    else:
        yield passed("service", f"{found.kind} unit {found.path}: {found.state or 'installed'}")
    if found.kind == "user" and found.linger is False:
        text = f"linger is off: fleetd stops when {found.user} logs out, and does not start at boot"
        yield warned("service.linger", text, f"sudo loginctl enable-linger {found.user}")


def _launchd(facts: Facts, found: ServiceFact) -> Iterator[Finding]:
    root = "" if found.kind == "user" else "sudo "
    domain = _domain(found, facts.uid)
    if found.active is None or (found.state or "") == "not loaded":
        text = f"{found.path} is not loaded"
        yield warned("service", text, f"{root}launchctl bootstrap {domain} {shlex.quote(found.path or '')}")
    elif found.enabled is False:
        yield warned("service", "launchd has the service disabled", f"{root}launchctl enable {domain}/{LABEL}")
    elif not found.active:
        yield warned("service", f"launchd does not run it: {found.state}", _kickstart(found, facts.uid))
    else:
        yield passed("service", f"{found.path}: {found.state}")
    if found.kind == "user":
        yield warned(
            "service.login",
            "a LaunchAgent runs only while its user is logged in",
            "sudo fleetctl install-service   # a LaunchDaemon, which starts at boot",
        )


def silent(facts: Facts) -> Iterator[Finding]:
    """Report looks that did not answer in time: something of the machine hangs."""
    for name in facts.silent:
        yield warned("looks", f"{name}: no answer in time", "dmesg | tail; mount")
