# Two commands for users: `make demo` and `make test`. What they need is installed into .venv by the same commands.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint types install system browser clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

demo: system $(VENV)/.installed-serve ## profile, solve, serve and verify on this machine; ARGS="..." adds options
	$(BIN)/helixbench demo $(ARGS)

test: system browser $(VENV)/.installed-dev lint types ## ruff, mypy and pytest
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/.installed-dev ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy looks for packages in folders of their own name, so it is shown the layout that an installation has.
types: $(VENV)/.installed-dev ## mypy
	@rm -rf build/types && mkdir -p build/types/helixbench
	@ln -s $(CURDIR)/helixbench/*.py $(CURDIR)/helixbench/py.typed build/types/helixbench/
	@ln -s $(CURDIR)/profiler $(CURDIR)/solver $(CURDIR)/reference_server $(CURDIR)/reports build/types/helixbench/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

install: $(VENV)/.installed-serve ## make .venv with what profiling and serving need

# $(call apt,PACKAGES,CONSEQUENCE): install them as root on a Debian-like system; elsewhere print what is missing.
define apt
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing:$(1)"; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  apt-get update -qq >/dev/null && apt-get install -y -qq --no-install-recommends $(1) >/dev/null && exit 0; \
	fi; \
	echo "not installed:$(1). Install as root. $(2)"
endef

system: ## install iperf3 and iproute2 where that is possible; print what is missing where it is not
	@missing=; PATH="$$PATH:/usr/sbin:/sbin"; \
	command -v iperf3 >/dev/null || missing="$$missing iperf3"; \
	{ command -v ip && command -v tc; } >/dev/null || missing="$$missing iproute2"; \
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  missing="$$missing $$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])' 2>/dev/null)"; \
	test -n "$$missing" || exit 0; \
	$(call apt,$$missing,Without iproute2 or root$(comma) links are not shaped; without iperf3 they are measured by the \
	  server's own transport only.)

browser: ## install Chromium, for the tests of the HTML reports, where that is possible
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	$(call apt, chromium,Without it the tests of the HTML reports are skipped.)

comma := ,

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
