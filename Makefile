# make demo   set up, train on the built-in collection and validate while training goes on
# make test   set up and run the tests
# make ui     open the curves of `make demo`; PORT=5001 where port 5000 is taken
# make lint   style and types
# make docs   build the pages of docs/ into site/; broken links fail
# make bench  the benchmarks that take minutes, not hours

# Python 3.11 or newer: make demo PYTHON=python3.12
PYTHON ?= python3
PORT ?= 5000
# cpu or gpu: which build of FAISS is installed
FAISS ?= cpu
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt

export PATH := $(CURDIR)/$(BIN):$(PATH)

# An environment of another Python than the one that is asked for, or of one that is too old, is made
# anew. Without PYTHON= one that is there is used as it is.
define CHECK_PYTHON
there=`$(BIN)/python -c 'import sys; print(sys.version) if sys.version_info >= (3, 11) else 0' 2>&1`; \
asked=`$(PYTHON) -c 'import sys; print(sys.version) if sys.version_info >= (3, 11) else 0' 2>&1`; \
case "$$there" in 3.*) \
  if [ "$(origin PYTHON)" = file ] || [ "$$there" = "$$asked" ]; then echo ok; exit; fi;; esac; \
case "$$asked" in 3.*) ;; *) \
  for one in python3.13 python3.12 python3.11; do \
    $$one -c '' 2>/dev/null && break; one=python3.12; done; \
  echo "$(PYTHON) is `$(PYTHON) --version 2>&1 | head -n 1`, and Python 3.11 or newer is needed:" \
    "install one and name it, such as: make $(firstword $(GOALS)) PYTHON=$$one"; exit;; esac; \
if [ -e $(VENV) ]; then \
  echo "$(VENV) is of another Python: it is made anew" >&2; rm -rf $(VENV); fi; echo ok
endef
GOALS := $(filter demo test ui lint docs bench,$(or $(MAKECMDGOALS),demo))
ifneq ($(GOALS),)
  CHECKED := $(shell $(CHECK_PYTHON))
  ifneq ($(CHECKED),ok)
    $(error $(CHECKED))
  endif
endif

.PHONY: demo test ui lint docs bench browser clean

demo: $(VENV)/.installed
	mlflow run . --env-manager local -P dataset=demo
	@echo "the curves: make ui"

test: $(VENV)/.installed-dev browser
	python -m pytest --numprocesses 2 --dist loadfile

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

# the browser test drives Debian's Chromium; where it cannot be installed the test is skipped
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
	@echo "installing PyTorch, MLflow and the rest into $(VENV): a few minutes, without a word"
	$(INSTALL) --editable ".[$(FAISS)]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python $(SOURCES)
	@echo "installing PyTorch, MLflow and the rest into $(VENV): a few minutes, without a word"
	$(INSTALL) --editable ".[$(FAISS),dev,docs]"
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
