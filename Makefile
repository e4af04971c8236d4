# make ship    set up .venv and run the default recipe to release/ (RECIPE=recipes/other.yaml for another)
# make test    set up .venv and run all tests
# make test-slow    the tests that take minutes: kills, damage, full disks, fuzzing, 64-bit ARM
# make bench   set up .venv and run the benchmarks to benchmark-results/ (half an hour)
# make check   format, lint, types, import rules
# make page    build the web page that goes into every release (part of setting up)
# make docs    build the site of docs/ into site/
# make clean   remove what was computed; make distclean removes .venv, too

RECIPE ?= recipes/smollm2-135m-to-99m.yaml
PYTHON ?= python3
# LOCK=constraints.lock: the same packages, and pip refuses files whose SHA-256 is not in it.
LOCK ?= constraints.txt
# Processes that make test runs its files in.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
ENVIRONMENT := $(VENV)/.complete
PAGE := web/dist/index.html

BENCHMARKS := step loss sampled_cache harness_overhead mlc_speed tinyswallow_shape

.PHONY: ship test test-slow bench check docs environment page clean distclean

ship: environment
	$(BIN)/martlet ship $(RECIPE)

# Files side by side, one thread each, in the order of collection: the long end-to-end test is among the first.
test: export OMP_NUM_THREADS = 1
test: environment
	$(BIN)/pytest -m "not slow" --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: environment
	$(BIN)/pytest -m slow

bench: environment
	set -e; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name; done

check: environment
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: environment
	$(BIN)/mkdocs build --strict

environment: $(ENVIRONMENT) $(PAGE)

page: $(PAGE)

# constraints.txt is the whole lock, so nothing is left for pip to resolve: --no-deps, then a check that the
# lock is complete. llama-cpp-python compiles llama.cpp, here without the parts that martlet never loads.
$(ENVIRONMENT): export LLAMA_CPP_LEAN = -DLLAVA_BUILD=OFF '-DCMAKE_PROJECT_llama.cpp_INCLUDE=$(CURDIR)/.ci/lean_llama_cpp.cmake'
$(ENVIRONMENT): pyproject.toml constraints.txt $(LOCK) .ci/lean_llama_cpp.cmake export/converter.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "martlet: needs Python 3.11 or later; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	CMAKE_ARGS="$$CMAKE_ARGS $$LLAMA_CPP_LEAN" $(BIN)/pip install --disable-pip-version-check --no-deps --requirement $(LOCK)
	$(BIN)/pip install --disable-pip-version-check --no-deps --no-build-isolation --config-settings editable_mode=compat --editable .
	$(BIN)/pip check --disable-pip-version-check
	$(BIN)/python -m export.converter
	touch $@

# A machine without Node.js still ships, without the page: no file is made then, so the next make tries again.
$(PAGE): web/package.json web/package-lock.json web/build.mjs $(wildcard web/src/*)
	@if command -v npm >/dev/null && node -e 'process.exit(parseInt(process.versions.node) < 18 ? 1 : 0)'; then \
	    cd web && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error && node build.mjs; \
	else \
	    echo "martlet: no Node.js 18 or later with npm: releases will have no web page (apt-get install nodejs npm)" >&2; \
	fi

clean:
	rm -rf site store release release-smoke logs benchmark-results .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

distclean: clean
	rm -rf $(VENV) *.egg-info web/node_modules web/dist
