# All targets work on a fresh machine that has only Python >= 3.11 with its venv module.
# Stamp files in .venv record what is installed: the second run of a target installs nothing.

PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	command -v $$name >/dev/null && $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
VENV := .venv
PY := $(VENV)/bin/python
PYTEST_ARGS ?=
# System tests wait more than they compute: three workers keep two cores busy.
JOBS ?= $(shell echo $$(( ($$(getconf _NPROCESSORS_ONLN) * 3 + 1) / 2 )))

.DEFAULT_GOAL := help
.PHONY: help demo run test quick test-systemd test-containers test-engines test-vllm chaos restarts supervisors lint format clean mutants

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(PY):
	@test -n "$(PYTHON)" || { echo "fleetd needs Python 3.11 or newer; set PYTHON=/path/to/it"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "the venv module is missing: on Debian and Ubuntu, apt install python3-venv"; exit 1; }

# The wheel of llama.cpp needs GNU OpenMP. Every C compiler brings it; minimal images do not have it.
define with_openmp
	@$(PY) -c 'import xllamacpp' 2>/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& echo "installing GNU OpenMP for llama.cpp: apt-get install libgomp1" && apt-get update -qq \
		&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends libgomp1 >/dev/null; } \
		|| { echo "llama.cpp needs GNU OpenMP: run apt install libgomp1 or dnf install libgomp, then make again"; exit 1; }
endef

$(VENV)/.installed-demo: pyproject.toml | $(PY)
	@echo "installing fleetd and llama.cpp into $(VENV) (a minute or two)"
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[demo]'
	$(with_openmp)
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(PY)
	@echo "installing fleetd and its tests into $(VENV) (a minute or two)"
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	$(with_openmp)
	@touch $@ $(VENV)/.installed-demo

demo: $(VENV)/.installed-demo  ## run six workers against six models, with memory for three
	@$(PY) -m bench.demo

run: $(VENV)/.installed-demo  ## run fleetd with the fleet.yaml of this repository
	@$(PY) -m bench.demo --write-models .run/models
	@exec $(VENV)/bin/fleetd run --config fleet.yaml

test: $(VENV)/.installed-test  ## run all tests (JOBS=4 PYTEST_ARGS=-x)
	$(PY) -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

# No daemon, no fleetctl as a program, no engine: what to run after every edit.
QUICK := tests/unit/core tests/unit/config tests/unit/resolver tests/unit/gateway tests/unit/control tests/unit/daemon tests/guards
quick: $(VENV)/.installed-test  ## run unit tests and guards that start no daemon (under a minute)
	$(PY) -m pytest -q -n $(JOBS) --dist worksteal $(QUICK) $(PYTEST_ARGS)

test-systemd: $(VENV)/.installed-test  ## run fleetd under systemd in a container (needs root, podman)
	$(PY) -m pytest -m real tests/real/test_systemd.py $(PYTEST_ARGS)

test-containers: $(VENV)/.installed-test  ## run engines in real containers (needs root, podman)
	$(PY) -m pytest -m real tests/real/test_containers.py $(PYTEST_ARGS)

test-engines: $(VENV)/.installed-test  ## test with the real Ollama, vLLM and llama.cpp, if installed
	$(PY) -m pytest -m real tests/real/test_ollama.py tests/real/test_engines_together.py $(PYTEST_ARGS)

FLEETD_VLLM ?= $(HOME)/.cache/fleetd-vllm
test-vllm: $(VENV)/.installed-test  ## test with a real vLLM on the CPU (installs 6 GB once)
	bash tests/real/install_vllm.sh $(FLEETD_VLLM)
	FLEETD_VLLM=$(FLEETD_VLLM) $(PY) -m pytest -m real tests/real/test_vllm.py $(PYTEST_ARGS)

CHAOS_FOR ?= 5m
CHAOS_SEED ?=
chaos: $(VENV)/.installed-test  ## random faults for CHAOS_FOR=5m; CHAOS_SEED repeats a run
	$(PY) -m bench.chaos --for $(CHAOS_FOR) $(if $(CHAOS_SEED),--seed $(CHAOS_SEED))

mutants: $(VENV)/.installed-test  ## plant bugs in the core; the simulation must find each
	$(PY) -m tests.simulation.mutants

restarts: $(VENV)/.installed-test  ## measure memory and descriptors over 10,000 restarts
	$(PY) -m bench.restarts_10k

supervisors: $(VENV)/.installed-test  ## compare with supervisord and PM2, if installed
	$(PY) -m bench.supervisors

lint: $(VENV)/.installed-test  ## run ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed-test  ## format the code with ruff
	$(VENV)/bin/ruff format .

clean:  ## remove everything that the targets created
	rm -rf $(VENV) .demo .run .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
