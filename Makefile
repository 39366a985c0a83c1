PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)
INSTALL := $(if $(UV),$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python,$(BIN)/python -m pip install --quiet)
PYTEST := $(BIN)/python -m pytest -q -n auto --dist worksteal

.PHONY: demo test accuracy parity lint bench notebooks clean

demo: $(VENV)/demo.stamp  ## Train one model per loss on real data; table here, pictures in out/
	$(BIN)/python -m jaxloss compare

test: $(VENV)/test.stamp  ## Every test that needs no peer
	$(PYTEST) --showlocals --durations 15 --ignore tests/parity tests

accuracy: $(VENV)/test.stamp  ## The laws of rounding and derivatives, compiled as users compile
	FULL_OPTIMIZATION=1 $(PYTEST) tests/test_laws.py --laws accuracy,gradient_accuracy,double,numerical,garbage,finite

parity: $(VENV)/peers.stamp  ## Compare with the published peers
	$(PYTEST) tests/parity

lint: $(VENV)/dev.stamp  ## Style, types and the floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(VENV)/peers.stamp  ## Time and memory against the peers, in one process
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .cache out

$(VENV)/base.stamp:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	touch $@

$(VENV)/demo.stamp: $(VENV)/base.stamp pyproject.toml
	$(INSTALL) -c constraints.txt -e ".[demo]"
	touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(INSTALL) -c constraints.txt --group test
	touch $@

# pip, not uv: a site's own index settings for torch's CPU build are pip's.
$(VENV)/peers.stamp: $(VENV)/test.stamp
	$(BIN)/python -m pip install --quiet -c constraints.txt --group peers
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps rlax  # distrax wants a nightly build
	touch $@

$(VENV)/dev.stamp: $(VENV)/test.stamp
	$(INSTALL) -c constraints.txt --group dev
	touch $@
