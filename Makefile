# A machine needs Python 3.11 or newer with pip, and make. Everything else comes from requirements-dev.lock.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
PHOENIX := .venv-phoenix/ready
DEPLOY := .venv-deploy/ready
RULES := deploy/observability/prometheus

.PHONY: help demo dev test test-phoenix check bench soak lock audit-deps verify-deploy simulate-scaling image test-containers sbom clean

help:
	@echo "make demo    one run from beginning to end, step by step"
	@echo "make dev     the whole stack until Ctrl-C, with auto-reload"
	@echo "make test    all tests, on real servers"
	@echo "make test-phoenix  one run's trace in a real Phoenix, which is installed the first time (650 MB)"
	@echo "make check   format, lint, types, import contracts, locks, alerts"
	@echo "make image   the image agent-service:dev, of this commit; IMAGE=… names it otherwise"
	@echo "make test-containers  image, compose file and promotion, on the Docker Engine of this machine"
	@echo "make verify-deploy  Dockerfile, manifests and workflows, asked about with the tools that know them"
	@echo "make bench   the measurements"
	@echo "make simulate-scaling  bursty traffic, replayed against the number of workers; draws docs/scaling.svg"
	@echo "make soak    thousands of runs while workers, Valkey and Postgres are killed; MINUTES=15;"
	@echo "             then everything that can be sent to the API; FUZZ_MINUTES=20"
	@echo "make lock    renew the lock files; with UPGRADE=1 to the newest versions"
	@echo "make audit-deps  known vulnerabilities of requirements.lock, where their database can be reached"
	@echo "make sbom    the bill of materials of requirements.lock: dist/sbom.json (CycloneDX)"
	@echo "make clean   remove what was made here, the development data too"

demo: $(READY)
	@$(BIN)/agent-service demo

dev: $(READY)
	@$(BIN)/agent-service dev

test: $(READY)
	$(BIN)/pytest --numprocesses=2 $(ARGS)

test-phoenix: $(READY) $(PHOENIX)
	$(BIN)/pytest tests/phoenix $(ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy .ci/lock.py .ci/audit_deps.py
	for program in deploy/smoke.py deploy/cloudrun/*.py; do $(BIN)/mypy $$program || exit 1; done
	$(BIN)/lint-imports --no-logo
	$(BIN)/python .ci/lock.py --check
	.ci/promtool check config --lint=all --lint-fatal $(RULES)/prometheus.yml
	.ci/promtool test rules $(RULES)/rules_test.yml $(RULES)/rules_days_test.yml

verify-deploy: $(READY) $(DEPLOY)
	$(BIN)/pytest --numprocesses=2 tests/deploy $(ARGS)

simulate-scaling: $(READY)
	$(BIN)/python -m tests.scaling --svg docs/scaling.svg $(ARGS)

image:
	docker build --build-arg GIT_REVISION=$(or $(REVISION),$$(git rev-parse HEAD)) --tag $(or $(IMAGE),agent-service:dev) .

test-containers: $(READY)
	$(BIN)/pytest tests/containers $(ARGS)

bench: $(READY)
	$(BIN)/python -m tests.bench $(ARGS)

soak: $(READY)
	$(BIN)/python -m tests.faults.soak $(if $(MINUTES),--minutes $(MINUTES)) $(ARGS)
	$(BIN)/python -m tests.fuzz $(if $(FUZZ_MINUTES),--minutes $(FUZZ_MINUTES)) $(if $(FUZZ_SEED),--seed $(FUZZ_SEED))

audit-deps: $(READY)
	@$(BIN)/python .ci/audit_deps.py $(ARGS)

sbom: $(DEPLOY)
	@mkdir -p dist
	.venv-deploy/bin/cyclonedx-py requirements requirements.lock --pyproject pyproject.toml --mc-type application \
		--output-reproducible --output-file dist/sbom.json

lock: $(READY)
	$(BIN)/python .ci/lock.py $(if $(UPGRADE),--upgrade)

clean:
	rm -rf .venv .venv-phoenix .venv-deploy .dev .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist
	find app worker migrations tests .ci -name __pycache__ -prune -exec rm -rf {} +

$(READY): requirements-dev.lock pyproject.toml .ci/venv
	@PYTHON=$(PYTHON) .ci/venv
	@touch $@

$(PHOENIX): requirements-phoenix.lock .ci/phoenix | $(READY)
	@PYTHON=$(PYTHON) .ci/phoenix
	@touch $@

$(DEPLOY): requirements-deploy.lock .ci/deploy | $(READY)
	@PYTHON=$(PYTHON) .ci/deploy
	@touch $@
