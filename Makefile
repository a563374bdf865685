# Everything here works on a fresh machine with Python >= 3.11 (and its venv module), nothing else installed.
# The second run of a target installs nothing: stamps in .venv say what is there.

PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	command -v $$name >/dev/null && $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
VENV := .venv
PY := $(VENV)/bin/python
PYTEST_ARGS ?=
JOBS ?= auto

.DEFAULT_GOAL := help
.PHONY: help demo run test test-systemd test-containers test-engines test-vllm chaos restarts supervisors lint format clean mutants

help:  ## what can be made
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(PY):
	@test -n "$(PYTHON)" || { echo "fleetd needs Python 3.11 or newer; set PYTHON=/path/to/it"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "the venv module is missing: on Debian and Ubuntu, apt install python3-venv"; exit 1; }

# The wheel of llama.cpp wants GNU OpenMP, which comes with every C compiler and is absent from the barest of machines.
define with_openmp
	@$(PY) -c 'import xllamacpp' 2>/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& echo "llama.cpp needs GNU OpenMP, which is absent here: apt-get install libgomp1" && apt-get update -qq \
		&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends libgomp1 >/dev/null; } \
		|| { echo "llama.cpp needs GNU OpenMP: apt install libgomp1, or dnf install libgomp, and make this again"; exit 1; }
endef

$(VENV)/.installed-demo: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[demo]'
	$(with_openmp)
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	$(with_openmp)
	@touch $@ $(VENV)/.installed-demo

demo: $(VENV)/.installed-demo  ## six workers over six models, with room for three: loads, evictions, answers, a table
	@$(PY) -m bench.demo

run: $(VENV)/.installed-demo  ## start fleetd on the repository's own fleet.yaml, and stay
	@$(PY) -m bench.demo --write-models .run/models
	@exec $(VENV)/bin/fleetd run --config fleet.yaml

test: $(VENV)/.installed-test  ## all tests
	$(PY) -m pytest -n $(JOBS) $(PYTEST_ARGS)

test-systemd: $(VENV)/.installed-test  ## fleetd under a real systemd in a container: root, podman, runc, debootstrap
	$(PY) -m pytest -m real tests/real/test_systemd.py $(PYTEST_ARGS)

test-containers: $(VENV)/.installed-test  ## engines in real containers: root, podman, runc, debootstrap
	$(PY) -m pytest -m real tests/real/test_containers.py $(PYTEST_ARGS)

test-engines: $(VENV)/.installed-test  ## fleetd over the real Ollama, and vLLM, Ollama and llama.cpp in one fleet, where they are
	$(PY) -m pytest -m real tests/real/test_ollama.py tests/real/test_engines_together.py $(PYTEST_ARGS)

FLEETD_VLLM ?= $(HOME)/.cache/fleetd-vllm
test-vllm: $(VENV)/.installed-test  ## fleetd over a real vLLM on the CPU; installs it into FLEETD_VLLM once (6 GB)
	bash tests/real/install_vllm.sh $(FLEETD_VLLM)
	FLEETD_VLLM=$(FLEETD_VLLM) $(PY) -m pytest -m real tests/real/test_vllm.py $(PYTEST_ARGS)

CHAOS_FOR ?= 5m
CHAOS_SEED ?=
chaos: $(VENV)/.installed-test  ## random kills, stops, edits and slow disks for CHAOS_FOR (5m); CHAOS_SEED repeats a run
	$(PY) -m bench.chaos --for $(CHAOS_FOR) $(if $(CHAOS_SEED),--seed $(CHAOS_SEED))

mutants: $(VENV)/.installed-test  ## plant bugs in the core and show that the simulation finds each
	$(PY) -m tests.simulation.mutants

restarts: $(VENV)/.installed-test  ## ten thousand restarts: the daemon's memory and descriptors stay flat
	$(PY) -m bench.restarts_10k

supervisors: $(VENV)/.installed-test  ## fleetd beside supervisord and PM2, where they are on PATH: who loses what
	$(PY) -m bench.supervisors

lint: $(VENV)/.installed-test  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed-test  ## let ruff format the code
	$(VENV)/bin/ruff format .

clean:  ## remove what the targets above made
	rm -rf $(VENV) .demo .run .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
