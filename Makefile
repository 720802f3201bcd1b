.DEFAULT_GOAL := help
.PHONY: help setup demo test check conformance packages bench crash fuzz vm

help: ## list the targets
	@sed -n 's/^\([a-z]*\): .*## /  make \1\t/p' Makefile | expand -t 20

setup: ## prepare everything, run nothing (as root; needs git, make, python3 and apt)
	@scripts/setup

demo: ## watch a devbox survive the death of its server
	@scripts/setup && .venv/bin/python scripts/demo.py

test: ## run all tests, with real boxes
	@scripts/setup test && scripts/test

check: ## lint, types, import rule and fast tests
	@scripts/setup base && scripts/check

conformance: ## run the live tests of the official client 3.0.0 against a fresh server
	@scripts/setup && .venv/bin/python scripts/conformance.py

packages: ## install a hundred packages of Debian, each in a devbox of its own, and try them
	@scripts/setup && .venv/bin/python scripts/packages.py

bench: ## measure the figures of docs/performance.md and write them into it
	@scripts/setup && .venv/bin/python scripts/bench.py

crash: ## kill the server 200 times under load and compare every byte
	@scripts/setup && CRASH_KILLS=$${CRASH_KILLS:-200} .venv/bin/pytest -s tests/test_crash.py

fuzz: ## fuzz both sides of the agent's protocol for an hour, or FUZZ_SECONDS
	@scripts/setup test && scripts/fuzz $${FUZZ_SECONDS:-3600}

vm: ## try it in whole machines with Debian 13 and 12, in qemu, for half an hour
	@scripts/setup base && .venv/bin/python scripts/vm_trial.py
