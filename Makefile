# make demo     set up, train on the built-in collection and validate during training
# make test     set up and run the tests
# make ui       show the curves of `make demo`; PORT=5001 if port 5000 is taken
# make lint     style and types
# make docs     build the pages of docs/ into site/; broken links fail
# make bench    the benchmarks that take minutes, not hours
# make release  build the source archive and the wheel into dist/, and check them

# Python 3.11 or newer: make demo PYTHON=python3.12
PYTHON ?= python3
PORT ?= 5000
# the build of FAISS: cpu or gpu
FAISS ?= cpu
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt

export PATH := $(CURDIR)/$(BIN):$(PATH)

# An existing environment is used, unless its Python is too old or PYTHON= asks for another one; then
# it is replaced.
define CHECK_PYTHON
there=`$(BIN)/python -c 'import sys; print(sys.version) if sys.version_info >= (3, 11) else 0' 2>&1`; \
asked=`$(PYTHON) -c 'import sys; print(sys.version) if sys.version_info >= (3, 11) else 0' 2>&1`; \
case "$$there" in 3.*) \
  if [ "$(origin PYTHON)" = file ] || [ "$$there" = "$$asked" ]; then echo ok; exit; fi;; esac; \
case "$$asked" in 3.*) ;; *) \
  for python in python3.13 python3.12 python3.11; do \
    $$python -c '' 2>/dev/null && break; python=python3.12; done; \
  echo "$(PYTHON) is `$(PYTHON) --version 2>&1 | head -n 1`, and Python 3.11 or newer is needed:" \
    "install one and name it, such as: make $(firstword $(GOALS)) PYTHON=$$python"; exit;; esac; \
if [ -e $(VENV) ]; then \
  echo "$(VENV) has another Python: it is replaced" >&2; rm -rf $(VENV); fi; echo ok
endef
GOALS := $(filter demo test ui lint docs bench release,$(or $(MAKECMDGOALS),demo))
ifneq ($(GOALS),)
  CHECKED := $(shell $(CHECK_PYTHON))
  ifneq ($(CHECKED),ok)
    $(error $(CHECKED))
  endif
endif

.PHONY: demo test ui lint docs bench release browser clean

demo: $(VENV)/.installed
	mlflow run . --env-manager local -P dataset=demo
	@echo "the curves: make ui"

test: $(VENV)/.installed-dev browser
	python -m pytest --numprocesses 3 --dist loadfile

ui: $(VENV)/.installed
	@mlflow-dr ui --port $(PORT)

lint: $(VENV)/.installed-dev
	ruff check .
	ruff format --check .
	mypy

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict

bench: $(VENV)/.installed-dev
	python -m benchmarks.validation
	python -m benchmarks.publishing
	python -m benchmarks.gradient_cache
	python -m benchmarks.training

release: $(VENV)/.installed-dev
	@version=`python -c 'from mlflow_dr.version import VERSION; print(VERSION)'`; \
	grep -q "^## $$version\b" CHANGELOG.md || \
	{ echo "CHANGELOG.md has no heading '## $$version': describe the release there" >&2; exit 1; }
	rm -rf build dist
	python -m build
	python -m twine check --strict dist/*

# the browser test uses Debian's Chromium; without it the test is skipped
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing Chromium for the browser test"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null \
	    || echo "no Chromium could be installed: the browser test will be skipped"; \
	else echo "no Chromium: the browser test will be skipped (apt-get install chromium)"; fi

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	@echo "installing PyTorch, MLflow and the rest into $(VENV): this takes a few minutes"
	$(INSTALL) --editable ".[$(FAISS)]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python $(SOURCES)
	@echo "installing PyTorch, MLflow and the rest into $(VENV): this takes a few minutes"
	$(INSTALL) --editable ".[$(FAISS),dev,docs]"
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
