# make demo   set up, train on the built-in collection and validate while training goes on
# make test   set up and run the tests
# make ui     open the curves of `make demo`
# make lint   style and types
# make bench  the benchmarks that take minutes, not hours

PYTHON ?= python3
# cpu or gpu: which build of FAISS is installed
FAISS ?= cpu
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt

export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test ui lint bench browser clean

demo: $(VENV)/.installed
	mlflow run . --env-manager local -P dataset=demo
	@echo "the curves: make ui"

test: $(VENV)/.installed-dev browser
	python -m pytest --numprocesses 2 --dist loadfile

ui: $(VENV)/.installed
	mlflow server --backend-store-uri sqlite:///mlflow.db --port 5000

lint: $(VENV)/.installed-dev
	ruff check .
	ruff format --check .
	mypy

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
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	$(INSTALL) --editable ".[$(FAISS)]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python $(SOURCES)
	$(INSTALL) --editable ".[$(FAISS),dev]"
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
