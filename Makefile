# Each target sets up .venv by itself: once, and again only when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Workers for tests: one for each core, four at the most. SEED= repeats a run that failed: its chance is all decided by it.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(if $(SEED),--hypothesis-seed $(SEED))

# Else each of the hundreds of processes that the tests start compiles all modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-linux test test-all test-npt test-xen linux-image soak soak-linux simulate chaos fuzz lint bench bench-quick mutants guests clean

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pageferry needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

demo: $(READY)
	$(BIN)/pageferry demo

# On Debian, from nothing: a stock kernel and busybox from its packages, at work in a guest that moves.
demo-linux: $(READY)
	$(BIN)/python -m pageferry.guests.linux.debian build/linux --only cloud
	$(BIN)/pageferry demo --linux build/linux/cloud

# What every change must pass: minutes. `test-all` is this and then all that is marked as exhaustive.
test: $(READY)
	$(PYTEST) -m 'not exhaustive'

test-all: test
	$(PYTEST) -m exhaustive

test-npt: $(READY) $(if $(PAGEFERRY_LINUX_IMAGE),,build/linux/cloud)
	$(BIN)/python tests/vm/npt.py

# Real Xen with nested paging, of Debian's packages, in an emulated machine: its log-dirty, and domains that are saved.
test-xen: $(READY) build/linux/cloud
	PYTHONPATH=tests/helpers $(BIN)/python tests/vm/xen.py

# COUNT=20: fewer round trips than 200. SEED=1: the trips of that seed.
soak: $(READY)
	PYTHONPATH=tests:tests/helpers $(BIN)/python -m simulation.soak $(if $(SEED),--seed $(SEED)) $(if $(COUNT),--count $(COUNT))

build/linux/cloud:
	$(MAKE) linux-image ONLY=cloud

# Kernels and initramfs of Debian's packages, to boot as guests: into build/linux. ONLY=cloud: that one.
linux-image: $(READY)
	$(BIN)/python -m pageferry.guests.linux.debian build/linux $(if $(ONLY),--only $(ONLY))

# A Debian guest does real work, which checks itself, while it is moved 50 times. COUNT= and SEED= as for soak.
soak-linux: $(READY) build/linux/cloud
	PYTHONPATH=tests:tests/helpers $(BIN)/python -m simulation.linux_soak $(if $(SEED),--seed $(SEED)) $(if $(COUNT),--count $(COUNT))

# Whole migrations on simulated hosts. COUNT=200: fewer than 10,000. SEED=1 COUNT=1: that run again.
simulate: $(READY)
	PYTHONPATH=tests:tests/helpers $(BIN)/python -m simulation.migrations $(if $(SEED),--seed $(SEED)) $(if $(COUNT),--count $(COUNT))

# 500 migrations, saves and restores by real processes that are killed, stopped, cut off or left without disk. COUNT=
# and SEED= as for soak; RUN= is only that one of them.
chaos: $(READY)
	PYTHONPATH=tests:tests/helpers $(BIN)/python -m simulation.chaos $(if $(SEED),--seed $(SEED)) \
	  $(if $(COUNT),--count $(COUNT)) $(if $(RUN),--run $(RUN))

# Recorded conversations, files, states and commands, changed by chance, against whatever reads them. SECONDS=3600: an
# hour of it. SEED=, TARGET= and CASE= repeat a failure, which says them.
fuzz: $(READY)
	PYTHONPATH=tests:tests/helpers $(BIN)/python -m fuzz.fuzz $(if $(SECONDS),--seconds $(SECONDS)) \
	  $(if $(SEED),--seed $(SEED)) $(if $(TARGET),--target $(TARGET)) $(if $(CASE),--case $(CASE))

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Exit code 5: this host lacks what a script needs, and it has said what.
# The ratios to QEMU that the README shows, on this host: three minutes. Needs /dev/kvm and QEMU.
bench-quick: $(READY)
	$(BIN)/python benchmarks/vs_qemu.py --quick --set x-verify=audit

bench: $(READY)
	@for script in $(filter-out %/compare_results.py,$(wildcard benchmarks/[a-z]*.py)); do \
	  echo "== $$script"; $(BIN)/python $$script || [ $$? -eq 5 ] || exit 1; done

mutants: $(READY)
	PYTHONPATH=tests:tests/helpers $(BIN)/python -m mutation.mutants

guests: $(READY)
	$(BIN)/python -m pageferry.guests.build

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
