# The recipes live in .dev; this names them.
.DEFAULT_GOAL := help
.PHONY: help demo test setup setup-run build up fmt lint sqlx openapi fuzz-api bench chaos upgrade-test cluster-test

export CARGO_TARGET_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/dbackup/target
# Folder of the instance that `make up` runs.
ifeq ($(shell id -u),0)
DATA ?= /var/lib/dbackup
else
DATA ?= $(HOME)/.local/share/dbackup
endif

help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## back up a sample database by the contract's Bash script, and leave the service running (ONCE=1: stop after it)
	@ONCE=$(ONCE) .dev/demo

test: ## every test, against servers that it starts itself (ARGS=restore: those with that word in their names)
	@.dev/test $(ARGS)

setup: ## install what is missing: servers, clients, tools
	@.dev/setup
setup-run:
	@.dev/setup run

build: setup-run ## build every program
	cargo build --workspace --locked

up: setup-run ## run API and workers with their data in DATA (default /var/lib/dbackup, or ~/.local/share/dbackup)
	cargo run --package cli --bin dbackup --locked -- --data "$(DATA)" up

fmt: ## format the code
	cargo fmt --all

lint: ## format, clippy with warnings denied, and whether .sqlx fits the queries
	@.dev/lint

sqlx: setup ## write .sqlx anew from the queries and the migrations
	@.dev/sqlx prepare

openapi: ## write docs/openapi.json anew from the handlers
	@cargo run --quiet --package cli --bin dbackup --locked -- openapi > docs/openapi.json

fuzz-api: ## random requests against every operation of the API (schemathesis)
	@.dev/fuzz-api $(ARGS)

bench: ## what the queue, the API and a large dump cost, beside the least that would do; writes BENCHMARKS.md
	@.dev/bench $(ARGS)

chaos: ## kill workers at random (ARGS="--seed 7 --kills 20 --lease-ms 3000")
	@.dev/chaos $(ARGS)

upgrade-test: ## two versions side by side on one database, and the way back (FROM=commit)
	@.dev/upgrade-test $(FROM)

cluster-test: ## start the Compose cluster, disturb it in every way, check it, take it down (ARGS="--disturbances 20")
	@.dev/cluster-test $(ARGS)
