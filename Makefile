# Everything runs in .venv, which the first target builds from package registries alone. A second
# run finds the stamps newer than what they depend on and starts at once; an interrupted set-up has
# no stamp and starts over.

PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
TORCH_CPU ?= torch==2.13.0
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
OLDEST_TRITON := build/triton-3.6
NATIVE := $(wildcard csrc/*.cpp csrc/*.h)
SANITIZED := build/sanitize
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
CHECKED := $(CXX) -O1 -g1 -std=c++17 -pthread -Wall -Wextra -Werror
STRESS := csrc/thread_pool.cpp tests/csrc/thread_pool_stress.cpp
SANITIZED_OBJECTS := $(patsubst csrc/%.cpp,$(SANITIZED)/%.o,$(wildcard csrc/*.cpp))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DELETE_ON_ERROR:
.PHONY: demo test test-all test-long test-matrix test-integrations check sanitize format aot-table \
	test-oldest-triton gpu clean

demo: $(VENV)/.installed
	$(BIN)/python -m ovfast demo --out demo-out

# torch's own threads would fight with the processes of the interpreter's tests over the cores.
test test-all test-long test-integrations: export OMP_NUM_THREADS := 1

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

# Last, so that pytest's closing line is the last line printed.
test-all: $(VENV)/.installed
	@$(BIN)/python -m pytest -m "not matrix and not long" $(PYTEST_ARGS)

# What takes longest and seldom breaks: before a release, and after a change to what it builds.
test-long: $(VENV)/.installed
	$(BIN)/python -m pytest -m long $(PYTEST_ARGS)

# Every specialisation for every target, with both Tritons.
test-matrix: $(OLDEST_TRITON)/.installed
	$(BIN)/python -m pytest -q tests/kernels/test_aot.py
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m pytest -q tests/kernels/test_aot.py

# The kernels under the oldest Triton that torch brings along, beside the environment's own.
test-oldest-triton: $(OLDEST_TRITON)/.installed
	@PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m pytest -q tests/kernels/test_aot.py -k "sm_90 and bf16"


# Everything that only a CUDA device can tell; rows go to benchmarks/results/. Builds nothing: where
# there is no .venv, as on a machine without a network, the Python at hand has torch and triton.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(GPU_ARGS)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)

# The thread pool under ThreadSanitizer, then the pool and the extension's tests under
# AddressSanitizer and UBSan. libstdc++ is loaded first too, or AddressSanitizer does not find how
# to throw. Leaks are not looked for: Python's own drown ours.
sanitize: $(VENV)/.installed
	$(MAKE) --no-print-directory -j2 $(SANITIZED)/_C.so \
		$(SANITIZED)/stress_tsan $(SANITIZED)/stress_asan
	TSAN_OPTIONS=halt_on_error=1 $(SANITIZED)/stress_tsan
	ASAN_OPTIONS=detect_leaks=0 $(SANITIZED)/stress_asan
	rm -rf $(SANITIZED)/tree
	mkdir -p $(SANITIZED)/tree
	cp -a csrc kernels ovfast tests pyproject.toml $(SANITIZED)/tree
	rm -f $(SANITIZED)/tree/ovfast/_C.*
	cp $(SANITIZED)/_C.so $(SANITIZED)/tree/ovfast
	cd $(SANITIZED)/tree && \
		LD_PRELOAD=$$($(CXX) -print-file-name=libasan.so):$$($(CXX) -print-file-name=libstdc++.so.6) \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096 \
		UBSAN_OPTIONS=print_stacktrace=1 \
		$(abspath $(BIN))/python -m pytest -q -m "not slow" tests/csrc $(PYTEST_ARGS)

$(SANITIZED)/stress_tsan: $(STRESS) csrc/thread_pool.h
	@mkdir -p $(@D)
	$(CHECKED) -fsanitize=thread -Icsrc $(STRESS) -o $@

$(SANITIZED)/stress_asan: $(STRESS) csrc/thread_pool.h
	@mkdir -p $(@D)
	$(CHECKED) $(SANITIZERS) -Icsrc $(STRESS) -o $@

$(SANITIZED)/_C.so: $(SANITIZED_OBJECTS)
	$(CHECKED) $(SANITIZERS) -shared $^ -o $@

$(SANITIZED)/%.o: csrc/%.cpp | $(VENV)/.installed
	@mkdir -p $(@D)
	$(CHECKED) $(SANITIZERS) -fPIC -fvisibility=hidden -ffp-contract=off -MMD -MP \
		$$($(BIN)/python -m pybind11 --includes) -c $< -o $@

-include $(SANITIZED_OBJECTS:.o=.d)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix-only --exit-zero .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

# Rewrites the committed resources of the Triton kernels, for the installed Triton and the oldest.
aot-table: $(OLDEST_TRITON)/.installed
	$(BIN)/python -m tests.kernels.update_aot_table
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m tests.kernels.update_aot_table

$(OLDEST_TRITON)/.installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(OLDEST_TRITON) "triton==3.6.*"
	@touch $@

	@touch $@

clean:
	rm -rf build dist demo-out *.egg-info ovfast/_C.*.so .pytest_cache .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "ovfast needs Python 3.11 or later; name it: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

install_cpu_torch = $(1) -m pip install "$(TORCH_CPU)+cpu" 2>/dev/null \
	|| $(1) -m pip install --retries 1 --timeout 30 "$(TORCH_CPU)+cpu" \
		--extra-index-url https://download.pytorch.org/whl/cpu

# torch comes first: without a GPU the CPU build, or the plain dependency pulls gigabytes of CUDA.
# "+cpu" is offered by PyTorch's own index and by many mirrors, not by PyPI.
$(VENV)/.torch: $(VENV)/.created
	@if [ -e /dev/nvidia0 ] || command -v nvidia-smi >/dev/null 2>&1 || [ "$$(uname -s)" != Linux ]; then \
		echo "installing torch"; $(BIN)/python -m pip install "torch>=2.11"; \
	else \
		echo "installing $(TORCH_CPU), CPU build"; \
		$(call install_cpu_torch,$(BIN)/python) \
		|| { echo "no CPU build of $(TORCH_CPU) found; see README, Install" >&2; exit 1; }; \
	fi
	@touch $@

# csrc/ is named too: a removed source changes the directory's time.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py csrc $(NATIVE)
	$(BIN)/python -m pip install --editable ".[dev]"
	@touch $@

include tests/integrations/integrations.mk
include benchmarks/bench.mk
