# Two commands for users: `make demo` and `make test`. Everything that they need is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test install install-dev system clean
