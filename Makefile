# Two commands for users: `make demo` and `make test`. What they need is installed into .venv by the same commands.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.PHONY: help demo test types install system clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

demo: system $(VENV)/.installed-serve ## profile, solve, serve and verify on four nodes of this machine; ARGS="..." adds options
	$(BIN)/helixbench demo $(ARGS)

test: system $(VENV)/.installed-dev ## ruff, mypy and pytest
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory types
	$(BIN)/pytest

# mypy looks for packages in folders of their own name, so it is shown the layout that an installation has.
types: $(VENV)/.installed-dev ## mypy
	@rm -rf build/types && mkdir -p build/types/helixbench
	@ln -s $(CURDIR)/helixbench/*.py $(CURDIR)/helixbench/py.typed build/types/helixbench/
	@ln -s $(CURDIR)/profiler $(CURDIR)/solver $(CURDIR)/reference_server $(CURDIR)/reports build/types/helixbench/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

install: $(VENV)/.installed-serve ## make .venv with what profiling and serving need

system: ## install iperf3 and iproute2 where that is possible; say what is missing where it is not
	@missing=; PATH="$$PATH:/usr/sbin:/sbin"; \
	command -v iperf3 >/dev/null || missing="$$missing iperf3"; \
	{ command -v ip && command -v tc; } >/dev/null || missing="$$missing iproute2"; \
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  missing="$$missing $$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])' 2>/dev/null)"; \
	test -n "$$missing" || exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing:$$missing"; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  apt-get update -qq >/dev/null && apt-get install -y -qq --no-install-recommends $$missing >/dev/null && exit 0; \
	fi; \
	echo "not installed:$$missing. Install them as root. Without iproute2 (or root) nodes are plain processes" \
	  "with emulated CPU and unshaped links; without iperf3 links are measured by the server's own transport only."

clean: ## remove .venv, build outputs and caches; results stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python: | system
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "helixbench needs Python 3.11 or later, and $(PYTHON) is not: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed-serve: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet --editable '.[serve]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed-serve
