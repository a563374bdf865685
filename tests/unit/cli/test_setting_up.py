"""Verbs that need no daemon: service files, completion, and the page of documentation."""

from __future__ import annotations

import configparser
import os
import plistlib
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from fleetd.cli.service_files import ServiceSettings, examples, launchd, systemd
from tests.support.cli import FLEETCTL, REPOSITORY, environment, fleetctl, raw_server

ODD = ServiceSettings(
    fleetd=("/opt/my tools/fleetd",),
    fleetctl=("/usr/bin/python3", "-m", "fleetd.cli.fleetctl"),
    config="/etc/fleet & co/50%.yaml",
    path="/usr/bin:/bin",
    user=None,
    home=Path("/home/me"),
)


def test_unit_quotes_special_words() -> None:
    file = systemd(ODD)
    assert file.destination == Path("/home/me/.config/systemd/user/fleetd.service")
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.read_string(file.text)
    assert unit["Service"]["ExecStart"] == '"/opt/my tools/fleetd" run --config "/etc/fleet & co/50%%.yaml"'
    assert unit["Service"]["ExecReload"] == "/usr/bin/python3 -m fleetd.cli.fleetctl reload"
    assert unit["Service"]["KillMode"] == "process", "engines survive a crash of the daemon"
    assert unit["Service"]["Type"] == "notify"
    assert "User" not in unit["Service"]
    assert unit["Install"]["WantedBy"] == "default.target"


def test_system_unit_has_a_user() -> None:
    file = systemd(ServiceSettings(**{name: getattr(ODD, name) for name in ODD.__slots__} | {"user": "fleet"}))
    assert file.destination == Path("/etc/systemd/system/fleetd.service")
    assert "User=fleet\n" in file.text
    assert "WantedBy=multi-user.target" in file.text


def test_system_unit_is_hardened_as_far_as_engines_allow() -> None:
    def unit(user: str | None) -> configparser.SectionProxy:
        parsed = configparser.ConfigParser(interpolation=None, strict=False)
        parsed.optionxform = str  # type: ignore[assignment,method-assign]
        parsed.read_string(
            systemd(ServiceSettings(**{name: getattr(ODD, name) for name in ODD.__slots__} | {"user": user})).text
        )
        return parsed["Service"]

    assert unit("fleet")["NoNewPrivileges"] == "yes"
    assert unit("fleet")["CapabilityBoundingSet"] == ""
    assert "CapabilityBoundingSet" not in unit("root"), "root starts processes of other users"
    assert "NoNewPrivileges" not in unit(None), "a session's systemd has no right to most of it"
    breaks_cuda = {"PrivateDevices", "DeviceAllow", "DevicePolicy", "ProtectClock", "MemoryDenyWriteExecute"}
    loses_on_restart = {"PrivateTmp", "RemoveIPC", "ProtectControlGroups"}
    for user in (None, "root", "fleet"):
        assert not set(unit(user)) & (breaks_cuda | loses_on_restart)


@pytest.mark.parametrize("name", sorted(examples()))
def test_service_examples_match_the_templates(name: str) -> None:
    said = "run: python -m fleetd.cli.service_files ."
    assert (REPOSITORY / name).read_text("utf-8") == examples()[name], said


def test_unit_names_the_daemons_socket(tmp_path: Path) -> None:
    config = tmp_path / "fleet.yaml"

    def reload_line(text: str) -> str:
        config.write_text(text)
        ran = fleetctl("install-service", "--user", "--print", "--platform", "systemd", "--config", str(config))
        assert ran.code == 0, ran.err
        return next(line for line in ran.out.splitlines() if line.startswith("ExecReload="))

    assert reload_line("version: 1\n").endswith("fleetctl reload")
    moved = reload_line("version: 1\npaths: {run: ./run, state: ./s, logs: ./l}\n")
    assert moved.endswith(f"fleetctl --socket {tmp_path}/run/fleetd.sock reload")
    assert reload_line("version: [\n").endswith("fleetctl reload"), (
        "an invalid file is reported and does not stop the installation"
    )


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "fleetd.service"
    real = ServiceSettings(("/bin/true",), ("/bin/true",), "/etc/passwd", "/bin", None, tmp_path)
    unit.write_text(systemd(real).text)
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, check=False)
    assert b"fleetd.service:" not in done.stderr, done.stderr


@pytest.mark.parametrize("user", [None, "fleet"])
def test_property_list_is_valid(user: str | None) -> None:
    file = launchd(ServiceSettings(**{name: getattr(ODD, name) for name in ODD.__slots__} | {"user": user}))
    parsed = plistlib.loads(file.text.encode())
    assert parsed["ProgramArguments"] == ["/opt/my tools/fleetd", "run", "--config", "/etc/fleet & co/50%.yaml"]
    assert parsed["AbandonProcessGroup"] is True
    assert parsed["KeepAlive"] == {"SuccessfulExit": False}
    assert parsed.get("UserName") == user
    assert ("LaunchDaemons" in str(file.destination)) == (user is not None)
    assert parsed["Label"] == file.destination.stem
    assert parsed["RunAtLoad"] is True
    assert parsed["ThrottleInterval"] <= 10
    assert parsed["ExitTimeOut"] == 600, "stopping engines takes longer than launchd's own patience"
    assert parsed["ProcessType"] == "Interactive"
    assert parsed["SoftResourceLimits"]["NumberOfFiles"] == parsed["HardResourceLimits"]["NumberOfFiles"] >= 65536
    assert parsed["Umask"] == 0o077
    assert {"HOME", "PATH"} <= set(parsed["EnvironmentVariables"]), "launchd reads no shell profile"
    assert parsed["StandardOutPath"] == parsed["StandardErrorPath"]
    assert "LaunchOnlyOnce" not in parsed


def test_installing_writes_the_file_and_says_what_to_run(tmp_path: Path) -> None:
    config = tmp_path / "fleet.yaml"
    config.write_text("version: 1\n")
    arguments = ("install-service", "--user", "--platform", "systemd", "--config", str(config))
    ran = fleetctl(*arguments, HOME=str(tmp_path))
    assert ran.code == 0
    written = Path(ran.out.strip())
    assert written == tmp_path / ".config/systemd/user/fleetd.service"
    assert f"--config {config}" in written.read_text()
    assert "systemctl --user enable --now fleetd" in ran.err
    assert [entry.name for entry in written.parent.iterdir()] == ["fleetd.service"]
    again = fleetctl(*arguments, HOME=str(tmp_path))
    assert again.code == 0


def test_installing_without_a_configuration_or_a_user(tmp_path: Path) -> None:
    ran = fleetctl("install-service", "--user", "--config", str(tmp_path / "no.yaml"), HOME=str(tmp_path))
    assert (ran.code, "no such file" in ran.err) == (2, True)
    printed = fleetctl(
        "install-service", "--user", "--print", "--config", str(tmp_path / "no.yaml"), HOME=str(tmp_path)
    )
    assert printed.code == 0
    assert printed.err == f"warning: missing file {tmp_path / 'no.yaml'}: the service would not start\n"
    assert fleetctl("install-service", "--run-as", "nobody-like-this", "--print").code == 2


def test_installing_into_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / ".config").write_text("a file where a folder should be")
    (tmp_path / "fleet.yaml").write_text("version: 1\n")
    arguments = ("--user", "--platform", "systemd", "--config", str(tmp_path / "fleet.yaml"))
    assert fleetctl("install-service", *arguments, HOME=str(tmp_path)).code == 1


# -- completion ---------------------------------------------------------------------------------------------------------


def completed(words: list[str], typed: str, **env: str) -> list[str]:
    """Ask as bash does: the words before the cursor, and the one that is being typed."""
    asked = {
        "_FLEETCTL_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join([*words, typed]),
        "COMP_CWORD": str(len(words)),
    }
    done = subprocess.run(FLEETCTL, capture_output=True, env=environment(**asked, **env), timeout=30, check=False)
    assert b"Traceback" not in done.stderr
    return [line.split(",", 1)[1] for line in done.stdout.decode().splitlines()]


@pytest.mark.parametrize(
    ("words", "typed", "expected"),
    [
        (["fleetctl"], "sta", ["status", "start"]),
        (["fleetctl", "start"], "ol", ["ollama-1", "ollama-2", "ollama"]),
        (["fleetctl", "start", "ollama-1"], "ol", ["ollama-2", "ollama"]),
        (["fleetctl", "stop"], "al", ["all"]),
        (["fleetctl", "load"], "", ["ulysses", "org/coder:7b", "gpt-3.5-turbo"]),
        (["fleetctl", "story"], "u", ["ulysses"]),
        (["fleetctl", "completion"], "", ["bash", "zsh", "fish"]),
    ],
)
def test_names_come_from_the_daemon(fleet: Path, words: list[str], typed: str, expected: list[str]) -> None:
    assert completed(words, typed, FLEETD_SOCKET=str(fleet)) == expected


def test_completion_is_silent_without_a_daemon(short: Path) -> None:
    assert completed(["fleetctl", "start"], "", FLEETD_SOCKET=str(short / "none")) == ["all"]


def test_completion_does_not_wait_for_a_daemon_that_hangs(short: Path) -> None:
    def hang(connection: object) -> None:
        connection.settimeout(5)  # type: ignore[attr-defined]
        while connection.recv(65536):  # type: ignore[attr-defined]
            pass

    def took(socket: Path) -> float:
        started = time.monotonic()
        assert completed(["fleetctl", "start"], "", FLEETD_SOCKET=str(socket)) == ["all"]
        return time.monotonic() - started

    bare = took(short / "none")
    with raw_server(short / "s", hang) as path:
        assert took(path) < bare + 1.0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_accept_their_completion_script(shell: str, tmp_path: Path) -> None:
    script = tmp_path / "completion"
    script.write_text(fleetctl("completion", shell).out)
    program = shutil.which(shell)
    if program is None:
        assert "_FLEETCTL_COMPLETE" in script.read_text()  # no such shell here: its text at least is there
        return
    assert subprocess.run([program, "-n", str(script)], capture_output=True, check=False).returncode == 0


# -- documentation ------------------------------------------------------------------------------------------------------


def page(**env: str) -> str:
    """Return the page as its command writes it: in a process of its own, since click remembers what it was asked first."""
    done = subprocess.run(
        [FLEETCTL[0], "-m", "fleetd.cli.docgen"], capture_output=True, env=environment(**env), check=True
    )
    return done.stdout.decode()


def test_cli_page_is_current() -> None:
    assert (REPOSITORY / "docs/reference/cli.md").read_text("utf-8") == page(), (
        "run: python -m fleetd.cli.docgen > docs/reference/cli.md"
    )


def test_cli_page_does_not_depend_on_the_terminal() -> None:
    assert page(COLUMNS="30") == page()
    assert os.environ.get("HOME", "/nonexistent") not in page()
