"""Imports of PM2 and entity files: the result, the report, and that the result loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetd.config.importers import nodejs
from fleetd.config.importers.emit import Variable, to_yaml
from fleetd.config.importers.entities import import_entities
from fleetd.config.importers.pm2.files import import_document, import_pm2, local_timezone
from fleetd.config.importers.pm2.running import running, still_running
from fleetd.config.importers.relaxed_json import parse_relaxed
from fleetd.config.importers.report import Imported
from fleetd.config.load import LoadedConfig, load
from fleetd.config.schema.model import HeldModel
from fleetd.config.yaml.interpolate import interpolate
from fleetd.config.yaml.parser import Source, compose
from fleetd.config.yaml.transform import plain
from fleetd.errors import ConfigError
from fleetd.models.ollama.modelfile import modelfile_problems
from tests.support.fleet_files import alive
from tests.support.waiting import until

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not on PATH")

CRASHES = {"stable_after": "1s", "crash_loop": {"count": 16, "window": "12m", "min_uptime": "1s"}}
ECOSYSTEM = """
module.exports = {
  apps: [
    {name: "ollama-1", script: "ollama", args: "serve", kill_timeout: 8000,
     env: {OLLAMA_HOST: "0.0.0.0:11434", OLLAMA_MODELS: "/Volumes/X/ollama", OLLAMA_NUM_PARALLEL: 4, OLLAMA_KEEP_ALIVE: "5m",
           OLLAMA_FLASH_ATTENTION: "1", CUDA_VISIBLE_DEVICES: "0"}},
    {name: "bot", script: "./dist/index.js", cwd: "/srv/bot", max_memory_restart: "1G", exp_backoff_restart_delay: 200,
     cron_restart: "0 4 * * *", time: true, out_file: "./out.log",
     env: {NODE_ENV: process.env.FLEETD_TEST_ENV || "development", PORT: 3000},
     env_production: {NODE_ENV: "production"}, wait_ready: true, listen_timeout: 1000, colour: "blue"},
  ],
  deploy: {production: {}},
};
"""


def loads(imported: Imported, folder: Path, env: dict[str, str] | None = None) -> LoadedConfig:
    path = folder / "fleet.yaml"
    path.write_text(imported.text, encoding="utf-8")
    return load(path, env or {})


def said(imported: Imported) -> dict[tuple[str, str], str]:
    return {(f"{one.subject}.{one.field}".strip("."), str(one.outcome)): one.detail for one in imported.report.entries}


def app(**fields: Any) -> dict[str, Any]:
    """Return the one entry that an app becomes, as plain data."""
    data = import_document({"apps": [{"name": "a", "script": "a.js", **fields}]}, timezone="Europe/Berlin").data
    return data["services"]["a"]


@needs_node
def test_an_ecosystem_file_becomes_a_fleet_that_loads(tmp_path: Path) -> None:
    path = tmp_path / "ecosystem.config.js"
    path.write_text(ECOSYSTEM)
    imported = import_pm2(path)
    config = loads(imported, tmp_path).config
    ollama, bot = config.instances["ollama-1"], config.services["bot"]
    assert ollama.port == 11434
    assert ollama.options == {"models_dir": "/Volumes/X/ollama", "num_parallel": 4, "flash_attention": True}
    assert (ollama.command, ollama.requires, ollama.stop.timeout) == (None, ("/Volumes/X",), 8)
    assert ollama.env == {"CUDA_VISIBLE_DEVICES": "0"}
    assert bot.command == ("node", "./dist/index.js")
    assert (bot.cwd, bot.port, bot.env) == ("/srv/bot", 3000, {"NODE_ENV": "development", "NODE_APP_INSTANCE": "0"})
    assert (bot.restart.backoff.initial, bot.restart.backoff.factor, bot.restart.backoff.max) == (0.2, 1.5, 15)
    assert (bot.limits.memory, bot.stop.signal, bot.logs.capture) == (2**30, "SIGINT", "pipe")
    assert bot.schedule is not None
    report = said(imported)
    assert "ttl" in report["ollama-1.env.OLLAMA_KEEP_ALIVE", "approximated"]
    assert report["bot.colour", "refused"] == "is not a field that PM2 knows either"
    assert "no process.send('ready')" in report["bot.wait_ready", "warning"]
    assert bot.probes.startup is None
    assert "profile production" in report["bot.env_production", "warning"]
    assert ("deploy", "refused") in report
    assert "current value" in report["process.env.FLEETD_TEST_ENV", "warning"]


@needs_node
def test_a_profile_is_laid_over_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "ecosystem.config.cjs"
    path.write_text(ECOSYSTEM)
    assert loads(import_pm2(path, profile="production"), tmp_path).config.services["bot"].env == {
        "NODE_ENV": "production",
        "NODE_APP_INSTANCE": "0",
    }


@needs_node
def test_modules_functions_and_noise_are_read(tmp_path: Path) -> None:
    path = tmp_path / "ecosystem.config.mjs"
    path.write_text(
        "console.log('hello {');\nexport default async () => ({apps: [{name: 'x', script: 'x.py', filter: /a/}]});\n"
    )
    assert import_pm2(path).data["services"]["x"]["command"] == ["python3", "x.py"]


@needs_node
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("throw new Error('no database')", "cannot be read by Node: no database"),
        ("module.exports = {", "cannot be read by Node: Unexpected"),
        ("process.exit(3)", "cannot be read by Node: Node ended with 3"),
        ("module.exports = {};", "has no apps: looked for {apps: [...]}, a list, or one app"),
        ("module.exports = 7;", "has no apps: looked for {apps: [...]}, a list, or one app"),
    ],
)
def test_bad_scripts_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "ecosystem.config.js"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        import_pm2(path)
    assert caught.value.problems[0].message.startswith(message)


@needs_node
def test_a_script_that_never_ends_is_stopped(tmp_path: Path) -> None:
    path = tmp_path / "ecosystem.config.js"
    path.write_text("for (;;) {}")
    start = time.monotonic()
    with pytest.raises(ConfigError, match="did not finish within"):
        nodejs.evaluate(path, timeout_s=0.5)
    assert time.monotonic() - start < 10


@needs_node
def test_a_script_that_never_ends_does_not_outlive_a_killed_import_for_long(tmp_path: Path) -> None:
    path = tmp_path / "ecosystem.config.js"
    path.write_text("require('fs').writeFileSync('pid', String(process.pid)); for (;;) {}")
    code = "import sys; from pathlib import Path; from fleetd.config.importers import nodejs; nodejs.evaluate(Path(sys.argv[1]), 0.6)"
    importer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "the script runs")
    importer.kill()
    importer.wait()
    until(lambda: not alive(int((tmp_path / "pid").read_text())), "the kernel has ended it")


def test_without_node_the_import_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ecosystem.config.js"
    path.write_text(ECOSYSTEM)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="pm2 jlist"):
        import_pm2(path)
    with pytest.raises(ConfigError, match="no such file"):
        import_pm2(tmp_path / "absent.config.js")


def test_json_as_javascript_reads_it_and_yaml(tmp_path: Path) -> None:
    (tmp_path / "ecosystem.json").write_text(
        "// apps\n{apps: [{name: 'it\\'s', script: \"x.sh\", /* two */ instances: 2, },],}\n"
    )
    (tmp_path / "ecosystem.yaml").write_text("apps:\n  - script: ./server\n    name: no\n    exec_mode: fork\n")
    assert import_pm2(tmp_path / "ecosystem.json").data["services"]["it-s"]["replicas"] == 2
    assert import_pm2(tmp_path / "ecosystem.yaml").data["services"]["no"]["command"] == ["./server"]
    (tmp_path / "bad.json").write_text("{apps: [}")
    with pytest.raises(ConfigError, match="is not JSON"):
        import_pm2(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match="no such file"):
        import_pm2(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("fields", "key", "value"),
    [
        ({"args": "--name 'a b' -v"}, "command", ["node", "a.js", "--name", "a b", "-v"]),
        ({"args": ["x", 1]}, "command", ["node", "a.js", "x", "1"]),
        ({"node_args": "--max-old-space-size=512"}, "command", ["node", "--max-old-space-size=512", "a.js"]),
        ({"script": "npm start"}, "command", ["bash", "-c", "npm start"]),
        ({"script": "a.js", "interpreter": "none"}, "command", ["a.js"]),
        ({"script": "a.ts"}, "command", ["bun", "a.ts"]),
        ({"script": "run", "interpreter": "/opt/py/bin/python"}, "command", ["/opt/py/bin/python", "run"]),
        ({"cmd": "b.rb", "script": None}, "command", ["ruby", "b.rb"]),
        ({"autorestart": False}, "restart", {"policy": "never"}),
        ({"stop_exit_codes": [0, "3", 700]}, "restart", {"policy": "on-failure", "success_codes": [0, 3], **CRASHES}),
        ({"restart_delay": 3000}, "restart",
         {"backoff": {"initial": "3s", "factor": 1, "max": "3s", "jitter": 0}, "stable_after": "1s",
          "crash_loop": {"count": 16, "window": "16s", "min_uptime": "1s"}}),
        ({"min_uptime": "10s"}, "restart",
         {"stable_after": "10s", "crash_loop": {"count": 16, "window": "14m", "min_uptime": "10s"}}),
        ({"max_restarts": 10}, "restart",
         {"stable_after": "1s", "crash_loop": {"count": 10, "window": "4m", "min_uptime": "1s"}}),
        ({}, "restart", CRASHES),
        ({"kill_timeout": "5s"}, "stop", {"signal": "SIGINT", "timeout": "5s"}),
        ({"killTimeout": 5000, "treekill": False}, "stop", {"signal": "SIGINT", "timeout": "5s", "kill": "leader"}),
        ({"maxMemoryRestart": "300M"}, "limits", {"memory": "300MiB"}),
        ({"max_memory_restart": 2**30}, "limits", {"memory": "1GiB"}),
        ({"cron": "0 0 4 * * *"}, "schedule", {"restart": "0 4 * * *", "timezone": "Europe/Berlin"}),
        ({"watch": True}, "watch", {"paths": ["."], "ignore": ["node_modules", ".*"]}),
        ({"watch": ["src"], "ignore_watch": "*.log", "watch_delay": 1000}, "watch",
         {"paths": ["src"], "ignore": ["*.log"], "debounce": "1s"}),
        ({"autostart": False}, "enabled", False),
        ({"uid": 501}, "user", "501"),
        ({"instances": 3, "exec_mode": "fork"}, "replicas", 3),
        ({"port": 8000}, "port", 8000),
        ({"env": {"A": True, "B": {"c": 1}, "D": None, "E": 1.0, "F": "$x"}}, "env",
         {"A": "true", "B": '{"c": 1}', "D": "null", "E": "1", "F": "$x", "NODE_APP_INSTANCE": "0"}),
        ({"args": "--cfg {\"x\":1} --re \\d+ --path C:\\a\\b --say \"two words\" --a='b c' ''"}, "command",
         ["node", "a.js", "--cfg", '{"x":1}', "--re", "\\d+", "--path", "C:\\a\\b", "--say", "two words", "--a='b c'"]),
        ({"args": ["{name}:{port}", "{{name}}", "{x}"]}, "command",
         ["node", "a.js", "{{name}}:{{port}}", "{{{{name}}}}", "{x}"]),
        ({"env": {"F": "{host}"}, "interpreter": "none"}, "env", {"F": "{{host}}"}),
        ({"autorestart": False, "cron_restart": "@daily"}, "schedule",
         {"start": "0 0 * * *", "restart": "0 0 * * *", "timezone": "Europe/Berlin"}),
        ({"interpreter": "/usr/bin/python3"}, "env", {"PYTHONUNBUFFERED": "1"}),
        ({"interpreter": "./venv/bin/python", "env": {"A": "b"}}, "env", {"A": "b", "PYTHONUNBUFFERED": "1"}),
        ({"script": "a.py"}, "env", {"PYTHONUNBUFFERED": "1"}),
        ({"instance_var": "WORKER", "script": "a.py"}, "env", {"PYTHONUNBUFFERED": "1", "WORKER": "0"}),
        ({"instances": 2, "exec_mode": "fork"}, "env", {"NODE_APP_INSTANCE": "{index}"}),
        ({"instances": 2}, "env", {"NODE_APP_INSTANCE": "0"}),
        ({"max_restarts": 1000000}, "restart",
         {"stable_after": "1s", "crash_loop": {"count": 100000, "window": "30d", "min_uptime": "1s"}}),
        ({"kill_timeout": 10**12, "instances": 5000, "exec_mode": "fork"}, "replicas", 256),
        ({"kill_timeout": 10**12}, "stop", {"signal": "SIGINT", "timeout": "1d"}),
        ({"watch": True, "watch_delay": 1}, "watch", {"paths": ["."], "ignore": ["node_modules", ".*"], "debounce": "10ms"}),
        ({"port": 70000, "interpreter": "none"}, "env", {"PORT": "70000"}),
    ],
)  # fmt: skip
def test_fields(fields: dict[str, Any], key: str, value: object, tmp_path: Path) -> None:
    assert app(**fields)[key] == value
    imported = import_document({"apps": [{"name": "a", "script": "a.js", **fields}]}, timezone="Europe/Berlin")
    assert loads(imported, tmp_path).config.services


def test_cluster_workers_that_share_a_port_are_not_converted_in_silence() -> None:
    imported = import_document(
        [{"name": "web", "script": "web.js", "instances": 4, "exec_mode": "cluster", "env": {"PORT": "80"}}]
    )
    assert "replicas" not in imported.data["services"]["web"]
    assert "share one port" in said(imported)["web.exec_mode", "warning"]


def test_ports_that_two_apps_want_are_told() -> None:
    apps = [
        {"name": "a", "script": "a.js", "port": 3000, "instances": 2, "exec_mode": "fork_mode"},
        {"name": "b", "script": "b.js", "port": 3001},
    ]
    imported = import_document(apps)
    assert said(imported)["b.port", "warning"].startswith("3001 is also the port of a: it stays the variable PORT")
    b = imported.data["services"]["b"]
    assert ("port" in b, b["env"]["PORT"]) == (False, "3001")


def test_a_home_of_nobody_is_a_folder_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apps = [{"name": "a", "script": "./a", "cwd": "~nouser/x", "env_file": "~nouser/e"}]
    entry = import_document(apps, folder=tmp_path).data["services"]["a"]
    assert (entry["cwd"], entry["env_file"]) == (str(tmp_path / "~nouser/x"), str(tmp_path / "~nouser/e"))
    monkeypatch.setenv("PM2_HOME", "~nouser/pm2")
    assert running() is None


def test_names_are_made_fit_and_unique() -> None:
    imported = import_document(
        [{"script": "srv/my app.js", "interpreter": "none"}, {"name": "x", "script": "x"}, {"name": "x", "script": "y"}]
    )
    assert list(imported.data["services"]) == ["my", "x", "x-2"]


def report_of(**app: Any) -> tuple[dict[str, Any], str]:
    """Return the one service that an app becomes, and what was reported, less what every app has reported."""
    imported = import_document({"apps": [{"name": "a", "cwd": "/srv", "kill_timeout": 2000, **app}]})
    lines = map(str, imported.report.entries)
    said = (line for line in lines if "kill_timeout" not in line and ".cwd" not in line)
    return next(iter(imported.data["services"].values())), "\n".join(said)


def test_words_of_a_command_are_those_that_javascript_writes() -> None:
    entry, _ = report_of(script="./a", args=["--x", 5, True, None, 1.5])
    assert entry["command"] == ["./a", "--x", "5", "true", "null", "1.5"]


@pytest.mark.parametrize("count", [4, "4"])
def test_instances_of_node_are_a_cluster_though_nobody_says_so(count: Any) -> None:
    entry, said = report_of(script="a.js", instances=count)
    assert "replicas" not in entry
    assert "warning      a.instances: 4 workers share one port under PM2" in said
    assert report_of(script="a.js", instances=count, exec_mode="fork")[0]["replicas"] == 4
    assert report_of(script="a.py", instances=count)[0]["replicas"] == 4
    counted, said = report_of(script="a.js", instances=count, env={"PORT": 3000}, increment_var="PORT")
    assert (counted["replicas"], counted["port"]) == (4, 3000)
    assert "warning" not in said
    assert "mapped       a.increment_var: every replica gets the next port, in PORT" in said


NOT_CARRIED = [
    ({"listen_timeout": 8000}, "refused      a.listen_timeout: only a start with wait_ready waits"),
    ({"max_restarts": 0}, "refused      a.max_restarts: 0 is no count of deaths"),
    ({"instances": -1, "exec_mode": "fork"}, "approximated a.instances: -1 means "),
    ({"name": "py bot"}, "approximated py-bot.name: 'py bot' becomes py-bot"),
    ({"increment_var": "ADMIN", "port": 80}, "refused      a.increment_var: only PORT is counted up"),
    ({"increment_var": "PORT"}, "refused      a.increment_var: there is no PORT to count up from"),
    (
        {"increment_var": "PORT", "port": 80},
        "refused      a.increment_var: there is one process: nothing is counted up",
    ),
    ({"exec_mode": "cluster"}, "approximated a.exec_mode: cluster with one worker: started as a plain process"),
    ({"exec_mode": "cluster", "instances": 1}, "approximated a.exec_mode: cluster with one worker: started as a plain"),
]


@pytest.mark.parametrize(
    ("app", "told"), NOT_CARRIED, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_what_is_not_carried_over_is_told(app: dict[str, Any], told: str) -> None:
    assert told in report_of(script="./a", **app)[1]


def test_the_limit_of_a_start_is_that_of_pm2(tmp_path: Path) -> None:
    (tmp_path / "a.js").write_text("server.listen(() => { if (process.send) process.send('ready'); });")
    app = {"script": "a.js", "wait_ready": True, "cwd": str(tmp_path)}
    entry, said = report_of(**app, listen_timeout=8000)
    assert entry["probes"]["startup"] == {"message": "ready", "deadline": "8s"}
    assert "mapped       a.listen_timeout: probes.startup.deadline: 8s" in said
    assert "silence is a failure" in said
    assert report_of(**app)[0]["probes"]["startup"]["deadline"] == "30s"


def test_a_profile_that_no_app_has_is_told() -> None:
    apps = [{"script": "./a", "env_production": {"A": "1"}}, {"script": "./b"}]
    assert "warning      env_staging: no app has it" in "\n".join(
        import_document(apps, profile="staging").report.lines()
    )
    assert "no app has it" not in "\n".join(import_document(apps, profile="production").report.lines())


@needs_node
def test_regular_expressions_are_patterns_or_told(tmp_path: Path) -> None:
    path = tmp_path / "ecosystem.config.js"
    ignored = r"[/\.log$/, 'tmp/*', /[\/\\]\.|x/, /node_modules/]"
    path.write_text(f"module.exports = {{apps: [{{name: 'a', script: './a', watch: true, ignore_watch: {ignored}}}]}}")
    imported = import_pm2(path)
    assert imported.data["services"]["a"]["watch"]["ignore"] == ["*.log", "tmp/*", "*node_modules*"]
    said = "\n".join(imported.report.lines())
    assert r"approximated a.ignore_watch: /\.log$/ is a regular expression: the pattern *.log" in said
    assert r"refused      a.ignore_watch: /[\/\\]\.|x/ is a regular expression: say it as a pattern" in said


@needs_node
def test_regular_expressions_are_their_text_where_nothing_is_matched(tmp_path: Path) -> None:
    path = tmp_path / "ecosystem.config.js"
    fields = "args: ['-x', /x/i], env: {RX: /a b/, watch: /w/, DEEP: {rx: [/d/]}}"
    path.write_text(f"module.exports = {{apps: [{{name: 'a', script: './a', {fields}}}]}}")
    service = loads(import_pm2(path), tmp_path).config.services["a"]
    assert service.command == ("./a", "-x", "/x/i")
    assert service.env == {"RX": "/a b/", "watch": "/w/", "DEEP": '{"rx": ["/d/"]}'}


@needs_node
@pytest.mark.parametrize(
    ("watch", "paths"), [("[/src/, 'lib']", ("lib",)), ("[/src/]", None), ("/src/", None), ("'src'", ("src",))]
)
def test_a_regular_expression_is_no_folder_to_watch(watch: str, paths: tuple[str, ...] | None, tmp_path: Path) -> None:
    path = tmp_path / "ecosystem.config.js"
    app = f"{{name: 'a', script: './a', watch: {watch}, ignore_watch: ['x'], watch_delay: 500}}"
    path.write_text(f"module.exports = {{apps: [{app}]}}")
    imported = import_pm2(path)
    found = loads(imported, tmp_path).config.services["a"].watch
    assert (found.paths if found is not None else None) == paths
    report = said(imported)
    told = report.get(("a.watch", "refused"))
    assert told == (None if "/" not in watch else "/src/ is a regular expression: name the folders in watch.paths")
    assert report.get(("a.ignore_watch", "refused")) == (None if paths else "nothing is watched")


@needs_node
@pytest.mark.parametrize("suffix", [".js", ".mjs"])
def test_what_node_itself_reads_is_no_variable_of_the_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"ecosystem.config{suffix}"
    begin = "export default" if suffix == ".mjs" else "module.exports ="
    prints = "console.log('reading', {a: 1}); console.error(new Error('x'));"
    path.write_text(
        f"{prints} const {{NO_COLOR}} = process.env;\n{begin} {{apps: [{{name: 'a', script: './a', env: {{X: process.env.HOME}}}}]}}"
    )
    assert nodejs.evaluate(path)[1] == ["HOME", "NO_COLOR"]


def test_a_script_that_speaks_to_pm2_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.js").write_text("process.send('ready')")
    (tmp_path / "ecosystem.json").write_text('{"apps": [{"script": "a.js"}]}')
    imported = import_pm2(tmp_path / "ecosystem.json")
    assert "process.send" in said(imported)["a.script", "warning"]
    assert imported.data["services"]["a"]["cwd"] == str(tmp_path)


@pytest.mark.parametrize("field", ["wait_ready", "shutdown_with_message"])
def test_a_script_that_has_its_channel_may_speak(field: str, tmp_path: Path) -> None:
    (tmp_path / "a.js").write_text("process.send('ready')")
    app = {"script": "a.js", field: True}
    assert ("a.script", "warning") not in said(import_document([app], folder=tmp_path))
    assert ("a.script", "warning") in said(import_document([{**app, field: False}], folder=tmp_path))


JLIST = [
    {"pid": 7, "name": "bot", "pm_id": 0, "monit": {"memory": 1, "cpu": 0}, "pm2_env": {
        "name": "bot", "status": "online", "pm_exec_path": "/srv/bot/dist/index.js", "pm_cwd": "/srv/bot", "exec_interpreter": "node",
        "exec_mode": "fork_mode", "node_args": [], "args": ["--verbose"], "autorestart": True, "namespace": "default",
        "pm_out_log_path": "/root/.pm2/logs/bot-out.log", "kill_timeout": 1600, "treekill": True, "watch": False,
        "env": {"PATH": "/bin", "SSH_TTY": "/dev/pts/0", "NODE_ENV": "production", "DISCORD_TOKEN": "very-secret", "unique_id": "x",
                "PM2_HOME": "/root/.pm2", "bot": "{}"}}},
    {"pid": 8, "name": "bot", "pm_id": 1, "pm2_env": {"name": "bot", "status": "stopped", "pm_exec_path": "/srv/bot/dist/index.js"}},
    {"pid": 9, "name": "pm2-logrotate", "pm2_env": {"name": "pm2-logrotate", "pmx_module": True, "pm_exec_path": "/x"}},
]  # fmt: skip


def test_jlist_and_dump_do_not_freeze_the_shell_and_its_secrets(tmp_path: Path) -> None:
    (tmp_path / "apps.json").write_text(json.dumps(JLIST))
    (tmp_path / "dump.pm2").write_text(json.dumps([one["pm2_env"] for one in JLIST]))
    for imported in (import_pm2(tmp_path / "apps.json"), import_pm2(tmp_path / "dump.pm2")):
        assert "very-secret" not in imported.text + "\n".join(imported.report.lines())
        config = loads(imported, tmp_path, {"DISCORD_TOKEN": "t$"}).config
        bot = config.services["bot"]
        assert list(config.services) == ["bot"]
        assert bot.command == ("node", "/srv/bot/dist/index.js", "--verbose")
        assert (bot.cwd, bot.replicas) == ("/srv/bot", 2)
        assert bot.env == {"NODE_ENV": "production", "DISCORD_TOKEN": "t$", "NODE_APP_INSTANCE": "{index}"}
        assert "5 variables" in said(imported)["bot.env", "approximated"]


def test_what_pm2_still_runs_is_found_by_name_and_by_script() -> None:
    message = "PM2 still runs bot (pid 7), which is {} here: pm2 delete bot && pm2 save"
    assert still_running(JLIST, {"services": {"bot": {"command": ["x"]}}}) == [message.format("bot")]
    other = {"services": {"ai": {"command": ["node", "./dist/index.js"], "cwd": "/srv/bot"}}}
    assert still_running(JLIST, other) == [message.format("ai")]
    assert still_running(JLIST, {"services": {"else": {"command": ["node", "x.js"], "cwd": "/srv/bot"}}}) == []
    assert still_running({"not": "a list"}, {}) == []


def test_the_machines_time_zone_is_a_name_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Dublin")
    assert local_timezone() == "Europe/Dublin"
    monkeypatch.delenv("TZ")
    zone = local_timezone()
    assert zone is None or zone in os.path.realpath("/etc/localtime")


ENTITIES = {
    "version": 3,
    "lmStudioServers": [{"ip": "10.0.0.100", "port": 1234, "name": "Mac Studio 1"}, {"name": "nowhere"}],
    "maxConcurrentWorkers": 6,
    "theme": "dark",
    "entities": [
        {"id": "ulysses", "displayName": "Ulysses", "enabled": True, "model": {"path": "/Volumes/X/u@f16/U_f16.gguf", "format": "gguf",
         "quantization": "q8_0"}, "prompt": {"template": "{{ .System }}\n{{ .Prompt }}\n", "system": "Costs $5 ${HOME}."},
         "parameters": {"temperature": 0.66, "num_ctx": 4096, "stop": ["[INST]"], "typical": 1}},
        {"id": "off", "enabled": False, "model": {"path": "/Volumes/X/o.gguf"}},
        {"id": "Eternal Return", "model": {"path": "/Volumes/X/E_q8_0.gguf", "quantization": "q8_0"}, "voice": {"speed": 1.0}},
        {"id": "ulysses"},
        {"id": "bare", "model": {"path": "/models/b_q4_0.gguf", "quantization": "q8_0"}},
        {"id": "finer", "model": {"path": "/models/f_f16.gguf", "quantization": "q6_K"}},
        "text",
    ],
}  # fmt: skip


def test_entities_become_models_that_load(tmp_path: Path) -> None:
    imported = import_entities(json.dumps(ENTITIES), shown="e.json")
    config = loads(imported, tmp_path).config
    assert list(config.models) == ["ulysses", "eternal-return", "bare", "finer"]
    ulysses = config.models["ulysses"]
    assert isinstance(ulysses, HeldModel)
    assert (ulysses.instance, ulysses.from_, ulysses.quantize) == (("ollama",), "/Volumes/X/u@f16/U_f16.gguf", "q8_0")
    assert ulysses.modelfile is not None
    assert ulysses.modelfile.system == "Costs $5 ${HOME}."
    assert ulysses.modelfile.template == "{{ .System }}\n{{ .Prompt }}\n"
    assert ulysses.modelfile.parameters == {"temperature": 0.66, "num_ctx": 4096, "stop": ["[INST]"]}
    assert config.instances["ollama"].requires == ("/Volumes/X",)
    assert config.instances["mac-studio-1"].external == "http://10.0.0.100:1234"
    report = said(imported)
    assert report["off.enabled", "refused"] == "is false: left out"
    assert report["voice.speed", "refused"] == "not understood; 1 of 7 entities have it"
    assert report["theme", "refused"] == "not understood"
    assert report["ulysses.parameters.typical", "refused"] == "is no parameter of a Modelfile"
    assert "another one" in report["bare.quantization", "refused"]
    assert report["finer.quantization", "refused"] == "q6_K: Ollama makes q8_0, q4_K_M, q4_K_S, f16, f32 only"
    assert report["entities[6]", "refused"] == "is not a mapping"
    assert report["lmStudioServers[1]", "refused"] == "has no ip"
    assert "# Ulysses" in imported.text


def test_entity_parameters_are_those_that_check_accepts(tmp_path: Path) -> None:
    old = {"mirostat": 2, "tfs_z": 1.0, "numa": True, "penalize_newline": True, "num_gqa": 8}
    stated = {
        "temperature": "0.5",
        "num_ctx": 4096.0,
        "use_mmap": "false",
        "stop": "x",
        "top_k": "many",
        "seed": None,
        **old,
    }
    imported = import_entities(json.dumps([{"id": "x", "path": "/m/x.gguf", "parameters": stated}]))
    found = imported.data["models"]["x"]["modelfile"]["parameters"]
    assert found == {"temperature": 0.5, "num_ctx": 4096, "use_mmap": False, "stop": ["x"]}
    assert isinstance(found["num_ctx"], int)
    assert modelfile_problems({"parameters": found}) == []
    report = said(imported)
    assert "no longer has this parameter" in report["x.parameters.tfs_z", "refused"]
    assert report["x.parameters.top_k", "refused"] == "'many' is not a whole number"
    loads(imported, tmp_path)


@pytest.mark.parametrize(
    ("header", "path", "stated", "option", "quantize"),
    [
        ("F16", "/m/x.gguf", "q8_0", "", "q8_0"),
        ("Q8_0", "/m/x_f16.gguf", "q8_0", "", None),
        ("Q4_0", "/m/x_f16.gguf", "q8_0", "", None),
        ("BF16", "/m/x.gguf", None, "Q4_K_M", "q4_K_M"),
        ("F32", "/m/x.gguf", "q8_0", "q4_K_S", "q4_K_S"),
        ("Q4_0", "/m/x.gguf", None, "q8_0", None),
        (None, "/m/x_f16.gguf", "q8_0", "", "q8_0"),
        (None, "/m/x.gguf", None, "q8_0", None),
    ],
)
def test_quantisation_is_judged_by_the_header(
    header: str | None, path: str, stated: str | None, option: str, quantize: str | None
) -> None:
    text = json.dumps([{"id": "x", "path": path, "quantization": stated}])
    imported = import_entities(text, quantize=option, quantization_of=lambda _: header)
    assert imported.data["models"]["x"].get("quantize") == quantize


def test_quantize_option_takes_what_ollama_creates() -> None:
    with pytest.raises(ConfigError, match="'q5_1' is none that Ollama creates"):
        import_entities('[{"id": "x"}]', quantize="q5_1")


def test_entities_with_other_field_names_and_given_instances() -> None:
    text = json.dumps([{"slug": "x", "weights": {"file": "/m/x.gguf"}}])
    imported = import_entities(text, instance=["ollama-1", "ollama-2"], fields={"from": ["weights.file"]})
    assert imported.data == {"version": 1, "models": {"x": {"instance": ["ollama-1", "ollama-2"], "from": "/m/x.gguf"}}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "e.json:1:2: is not JSON"),
        ("{}", "has no list of entities"),
        ("[" * 100_000, "is not JSON"),
        ("7", "has no list of entities"),
    ],
)
def test_entity_files_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        import_entities(text, shown="e.json")


@pytest.mark.parametrize("text", ["{a: }", "{'a' 1}", "[1 2]", "{a: b c}", "`x`", "", "{" * 5000])
def test_relaxed_json_that_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_relaxed(text)


def test_relaxed_json() -> None:
    text = """{ a: 'it"s', "b": [1, .5, 0x1F, -2e3, +4,], c: true, $d: null, // x
      'e\\'f': "\\u00e9", }"""
    assert parse_relaxed(text) == {"a": 'it"s', "b": [1, 0.5, 31, -2000, 4], "c": True, "$d": None, "e'f": "é"}


AWKWARD = ("no", "012", "1e3", "a: b", "- x", "#", " x", "a\nb", "a\n\n", "|", "~", "{a}", "22:22")
KEYS = st.text(min_size=1, max_size=10).filter(lambda key: key != "<<")
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False, width=32)
    | st.text(max_size=30)
    | st.sampled_from(AWKWARD)
)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
SECTIONS = st.sampled_from(["services", "models", "name", "x y"])


@given(st.dictionaries(SECTIONS, st.dictionaries(st.sampled_from("ab"), JSON, max_size=2), min_size=1, max_size=3))
def test_what_is_written_is_read_back(data: dict[str, Any]) -> None:
    assert undollared(plain(compose(Source("t", Path("t"), text=to_yaml(data))))) == data


def undollared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: undollared(item) for key, item in value.items()}
    if isinstance(value, list):
        return [undollared(item) for item in value]
    return interpolate(value, {}) if isinstance(value, str) else value


def test_a_variable_is_written_as_one() -> None:
    assert to_yaml({"a": Variable("${B}"), "c": "${D}"}) == 'a: "${B}"\n\nc: "$${D}"\n'


FIELDS = st.sampled_from(
    ["name", "script", "env", "instances", "watch", "cron_restart", "port", "args", "out_file", "exec_mode", "max_restarts",
     "kill_timeout", "stop_exit_codes", "cwd", "node_args", "min_uptime", "ignore_watch"]
)  # fmt: skip


@given(st.lists(st.dictionaries(FIELDS, JSON, max_size=6), max_size=3))
def test_any_apps_are_imported_or_refused(apps: list[dict[str, Any]]) -> None:
    text = "version: 1\n"
    try:
        text = import_document({"apps": apps}).text
    except ConfigError as error:
        assert error.problems  # noqa: PT017 - either outcome is right, an empty refusal is not
    assert compose(Source("t", Path("t"), text=text))


@pytest.mark.parametrize(
    ("fields", "message", "warned"),
    [
        ({"shutdown_with_message": True}, "shutdown", False),
        ({"shutdownWithMessage": "true"}, "shutdown", False),
        ({"shutdown_with_message": False}, None, False),
        ({}, None, False),
        ({"shutdown_with_message": True, "interpreter": "/usr/bin/python3"}, "shutdown", True),
        ({"shutdown_with_message": True, "interpreter": "/opt/node/bin/node", "kill_timeout": 3000}, "shutdown", False),
    ],
)
def test_a_stop_by_message_stays_one(fields: dict[str, Any], message: str | None, warned: bool, tmp_path: Path) -> None:
    imported = import_document({"apps": [{"name": "a", "script": "a.js", **fields}]}, timezone="Europe/Berlin")
    stop = loads(imported, tmp_path).config.services["a"].stop
    assert stop.message == message
    assert stop.signal == "SIGINT"
    assert stop.timeout == (3.0 if "kill_timeout" in fields else 10.0)
    report = said(imported)
    assert ("a.shutdown_with_message", "refused") not in report
    assert (("a.shutdown_with_message", "mapped") in report) is (message is not None)
    assert (("a.shutdown_with_message", "warning") in report) is warned


def test_ollama_is_not_stopped_by_a_message(tmp_path: Path) -> None:
    app = {"name": "o", "script": "ollama", "args": "serve", "interpreter": "none", "shutdown_with_message": True}
    imported = import_document({"apps": [app]}, timezone="Europe/Berlin")
    assert loads(imported, tmp_path).config.instances["o"].stop.message is None
    assert said(imported)["o.shutdown_with_message", "refused"] == "Ollama ends at a signal"


def test_a_dump_keeps_the_stop_by_message(tmp_path: Path) -> None:
    dumped = [
        {
            "name": "a",
            "pm_exec_path": "/srv/a.js",
            "exec_interpreter": "node",
            "pm_cwd": "/srv",
            "shutdown_with_message": True,
        }
    ]
    imported = import_document(dumped, timezone="Europe/Berlin")
    assert loads(imported, tmp_path).config.services["a"].stop.message == "shutdown"
