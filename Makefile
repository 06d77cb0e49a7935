# One-word commands. Each sets up what it needs, and is quick if that exists.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCKS := requirements/cpu.lock requirements/dev.lock
READY := $(VENV)/ready
PREVIEW := $(CURDIR)/$(VENV)/vllm-preview
# The CPU build of PyTorch has its own package index, which is used for that package only.
TORCH_PIN := $(shell grep -h '^torch==' $(LOCKS))
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# pip would compile on one core. What it has installed is compiled on all of them; some files there are no Python.
PIP_OPTIONS := --quiet --disable-pip-version-check --no-deps --no-compile

# What a new vLLM or SDK may have moved.
INTERFACE := $(addprefix tests/integration/,test_engine_config.py test_flags.py test_vllm_interface.py test_parity.py) \
	tests/unit/queue/test_runpod_client.py

.PHONY: run up test unit integration browser image-test soak fuzz bench check format docs wheel lock upgrade interface \
	preview clean

run: $(READY)  ## Run the job of test_input.json with the tiny model
	@$(BIN)/python handler.py

up: $(READY)  ## Run the emulator: the platform on this machine, with autoscaled workers
	@$(BIN)/python -m emulator $(ARGS)

test: unit integration  ## Run all tests: the real engine, the real SDK, and a real browser where one is installed

unit: $(READY)  ## Run the tests without an engine
	@$(BIN)/python -m pytest --numprocesses auto tests/unit

integration: $(READY)  ## Run the tests on the real engine and the real SDK
	@$(BIN)/python -m pytest -m in_process --numprocesses 2 --dist loadfile tests/integration
	@$(BIN)/python -m pytest -m "not in_process" --numprocesses 2 --dist loadfile --durations 40 tests/integration

image-test: $(READY)  ## Build the images, on stand-ins for their base images, and run jobs in them (Debian, root)
	@{ command -v buildah && command -v debootstrap; } >/dev/null || \
		{ apt-get update -qq && apt-get install -y -qq buildah debootstrap; }
	@$(BIN)/python -m pytest tests/image --timeout 3600

soak: $(READY)  ## Run the long tests: hundreds of signals, comparison with the SDK's own loop (more than an hour)
	@$(BIN)/python -m pytest tests/soak

fuzz: $(READY)  ## Fuzz the job loop and the parsing of take responses (longer Hypothesis runs)
	@FUZZ_EXAMPLES=$${EXAMPLES:-20000} $(BIN)/python -m pytest tests/unit/queue/test_job_loop_machine.py tests/unit/queue/test_take_response.py --timeout 0

bench: $(READY)  ## Measure the worker and vLLM's own server; ARGS="--peer DIR" adds worker-vllm, ARGS=cold measures starts, ARGS=gpu a GPU
	@$(BIN)/python -m bench $(ARGS)

check: $(READY)  ## Check style, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/deptry .
	@$(BIN)/hadolint Dockerfile
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec docker-compose.yml
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(BIN)/zizmor --quiet --offline .github
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.renovate renovate.json

format: $(READY)  ## Apply the formatter and the safe fixes
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(READY)  ## Update what is generated from the settings: the READMEs' table and RunPod Hub's form
	@$(BIN)/python -m tools.settings_table README.md README_zh.md
	@$(BIN)/python -m tools.runpod_hub .runpod/hub.json

browser:  ## Install Chromium for the tests of the emulator's page, unless it is there (Debian, root)
	@test -n "$$CHROMIUM" || command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
		command -v google-chrome >/dev/null || { \
		echo "Installing Chromium for the tests of the emulator's page"; \
		sudo=$$(test "$$(id -u)" = 0 || echo sudo); \
		$$sudo apt-get update -qq && $$sudo apt-get install -y -qq chromium >/dev/null; } || \
		{ echo "Chromium cannot be installed: install it, or set CHROMIUM to its path"; exit 1; }

wheel: $(READY)  ## Build the wheel into dist/
	@$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

lock:  ## Update the lock files from pyproject.toml; ARGS=--upgrade takes the newest of every package
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet uv
	@UV=$(BIN)/uv UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" requirements/lock.sh $(ARGS)

upgrade: $(READY)  ## Move to VLLM=0.33.0 TORCH=2.14.0 RUNPOD=1.13.0: pins, locks, generated files; then test the interface
	@$(BIN)/python -m tools.upgrade $(if $(VLLM),--vllm $(VLLM)) $(if $(TORCH),--torch $(TORCH)) $(if $(RUNPOD),--runpod $(RUNPOD))
	@$(MAKE) --no-print-directory lock
	@$(MAKE) --no-print-directory docs
	@$(MAKE) --no-print-directory interface

interface: $(READY)  ## Run the tests that show what a new vLLM or SDK has moved
	@$(BIN)/python -m pytest $(INTERFACE)

preview: $(READY)  ## Run them on the Python sources of VLLM=0.33.0 (default: the newest), which may have no CPU build yet
	@$(BIN)/python -m tools.vllm_preview $(PREVIEW) $(VLLM)
	@PYTHONPATH=$(PREVIEW) VLLM_TARGET_DEVICE=cpu $(MAKE) --no-print-directory interface

$(READY): $(LOCKS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	@echo "Setting up $(VENV): about 200 packages, 2.5 GB, some minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install $(PIP_OPTIONS) --retries 1 --extra-index-url $(TORCH_INDEX) $(TORCH_PIN)
	@$(BIN)/pip install $(PIP_OPTIONS) $(addprefix --requirement ,$(LOCKS))
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || :
	@touch $@

clean:  ## Remove the .venv and the caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
