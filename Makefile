# One-word commands. Each sets up what it needs, and is quick if that exists.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCKS := requirements/cpu.lock requirements/dev.lock
READY := $(VENV)/ready
# The CPU build of PyTorch has its own package index, which is used for that package only.
TORCH := $(shell grep -h '^torch==' $(LOCKS))
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: run up test browser unit image-test soak fuzz bench check format lock docs clean

run: $(READY)  ## Run the job of test_input.json with the tiny model
	@$(BIN)/python handler.py

up: $(READY)  ## Run the emulator: the platform on this machine, with autoscaled workers
	@$(BIN)/python -m emulator $(ARGS)

test: $(READY) browser  ## Run all tests: the real engine, the real SDK, a real browser
	@$(BIN)/python -m pytest --numprocesses auto tests/unit
	@$(BIN)/python -m pytest --durations 40 tests/integration

unit: $(READY)  ## Run the tests without an engine
	@$(BIN)/python -m pytest --numprocesses auto tests/unit

image-test: $(READY)  ## Build the images, on stand-ins for their base images, and run jobs in them (Debian, root)
	@{ command -v buildah && command -v debootstrap; } >/dev/null || \
		{ apt-get update -qq && apt-get install -y -qq buildah debootstrap; }
	@$(BIN)/python -m pytest tests/image --timeout 3600

soak: $(READY)  ## Run the long tests: hundreds of signals, comparison with the SDK's own loop (more than an hour)
	@$(BIN)/python -m pytest tests/soak

fuzz: $(READY)  ## Fuzz the job loop and the parsing of take responses (longer Hypothesis runs)
	@FUZZ_EXAMPLES=$${EXAMPLES:-20000} $(BIN)/python -m pytest tests/unit/queue/test_job_loop_machine.py tests/unit/queue/test_take_response.py --timeout 0

bench: $(READY)  ## Measure the worker and vLLM's own server; ARGS="--peer DIR" adds worker-vllm, ARGS=cold measures starts
	@$(BIN)/python -m bench $(ARGS)

check: $(READY)  ## Check style, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/deptry .
	@$(BIN)/hadolint Dockerfile
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec docker-compose.yml
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml

format: $(READY)  ## Apply the formatter and the safe fixes
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(READY)  ## Generate the READMEs' settings tables and .runpod/hub.json from the settings' declarations
	@$(BIN)/python -m engine.config.settings README.md README_zh.md
	@$(BIN)/python -m tools.runpod_hub .runpod/hub.json

browser:  ## Install Chromium for the tests of the emulator's page, if there is none
	@test -n "$$CHROMIUM" || command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
		command -v google-chrome >/dev/null || { \
		echo "Installing Chromium for the tests of the emulator's page"; \
		sudo=$$(test "$$(id -u)" = 0 || echo sudo); \
		$$sudo apt-get update -qq && $$sudo apt-get install -y -qq chromium >/dev/null; } || \
		{ echo "Chromium cannot be installed: install it, or set CHROMIUM to its path"; exit 1; }

lock:  ## Regenerate the lock files from pyproject.toml
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet uv
	@UV=$(BIN)/uv UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" requirements/lock.sh

$(READY): $(LOCKS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	@echo "Setting up $(VENV): about 200 packages, 2.5 GB, some minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) $(TORCH)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(addprefix --requirement ,$(LOCKS))
	@touch $@

clean:  ## Remove the .venv and the caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
