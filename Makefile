# Two commands do everything on a fresh machine: `make generate` and `make test`.
PYTHON ?= python3
CONFIG ?= mnist
FAMILY ?= r2
DATA ?= data/mnist
CHECKPOINT ?= reference/weights/mnist.safetensors
TARGETS ?= sm120,sm89,sm86,sm80
BIN := .venv/bin
# Families that diffuse pixels: weights, bundle and configuration bear the family's name, R2's "mnist".
PIXELS := siid s2id hdit sid2
MODEL := $(if $(filter r2,$(FAMILY)),mnist,$(FAMILY))
SHIPPED := $(patsubst reference/weights/%.safetensors,%,$(wildcard reference/weights/*.safetensors))
TORCH := torch==2.13.0
# What each lock is made of; tests/test_locks.py reads these lines.
EXTRAS_draw := export
EXTRAS_full := cpu,openvino,export,tensorrt-rtx,train,serve,ray,clients,notebook,bench,test,lint
EXTRAS_runtime := cpu,openvino,test
# What no extra holds, since its numpy is older than the runtime's.
PACKAGES_triton := nvidia-pytriton
# No lock of its own: of what is in none, NVIDIA's libraries, each package names the versions it needs.
GPU_EXTRAS := gpu,tensorrt-rtx,train,test
CODE := runtime serving reference export calibration tests benchmarks docs

.DEFAULT_GOAL := help
.PHONY: help generate export plans calibrate train distill evaluate bench families gpu dist test fuzz crash soak lint browser triton lock clean

help: ## list the commands (what `make` alone does)
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

# $(call install,ENVIRONMENT,LOCK,REQUIREMENTS): everything in its exact version, pip and what builds
# packages too. Sources are compiled when they are first imported: the first
# picture need not wait for it. The stamp lists what was installed.
define install
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --upgrade --constraint $(2) pip setuptools wheel
	$(1)/bin/python -m pip install --no-compile --constraint $(2) --build-constraint $(2) $(3)
	@$(1)/bin/python -m pip freeze --all --exclude-editable > $(1)/.freeze
	@mv $(1)/.freeze $@
endef

# One environment in two stages: what exports and draws, and on top of it what checks and measures.
.venv/.draw: pyproject.toml locks/draw.txt
	@echo "== .venv: PyTorch, ONNX and ONNX Runtime, 1 GB (more where pip finds PyTorch for CUDA)"
	$(call install,.venv,locks/draw.txt,$(TORCH) -e '.[$(EXTRAS_draw)]')

.venv/.full: .venv/.draw locks/full.txt
	@echo "== .venv: TensorRT for RTX, OpenVINO, tests and linters on top, 0.7 GB"
	$(call install,.venv,locks/full.txt,$(TORCH) -e '.[$(EXTRAS_full)]')

.venv-runtime/.runtime: pyproject.toml locks/runtime.txt
	@echo "== .venv-runtime: ONNX Runtime, OpenVINO and tests, no PyTorch, 0.4 GB"
	$(call install,.venv-runtime,locks/runtime.txt,-e '.[$(EXTRAS_runtime)]')

# onnxruntime-gpu and onnxruntime overwrite each other, so a GPU has an environment of its own.
.venv-gpu/.gpu: pyproject.toml locks/full.txt
	@echo "== .venv-gpu: PyTorch and ONNX Runtime for CUDA, TensorRT for RTX, several GB"
	$(call install,.venv-gpu,locks/full.txt,$(TORCH) onnxscript -e '.[$(GPU_EXTRAS)]')

.venv-triton/.triton: locks/triton.txt
	@echo "== .venv-triton: Triton's server and its client, 0.3 GB"
	$(call install,.venv-triton,locks/triton.txt,$(PACKAGES_triton))

build/mnist/manifest.json: .venv/.draw $(CHECKPOINT) $(shell find export reference -name '*.py')
	@echo "== build/mnist: the shipped model as ONNX graphs, each checked against PyTorch: a minute or two of two idle cores"
	$(BIN)/python -m export --checkpoint $(CHECKPOINT) --out build/mnist

$(PIXELS:%=build/%/manifest.json): build/%/manifest.json: reference/weights/%.safetensors .venv/.draw \
		$(shell find export reference -name '*.py')
	@echo "== build/$*: its graphs, each checked against PyTorch: a minute or two of two idle cores"
	$(BIN)/python -m export --checkpoint $< --out build/$*

reference/weights/%.safetensors:
	@echo "$@: not shipped; expected FAMILY to be one of $(SHIPPED:mnist=r2). Train it with:" \
		"make train CONFIG=$*, then copy runs/$*/checkpoint.safetensors there" >&2; exit 2

build/%/manifest.json:
	@echo "FAMILY=$*: no such family; expected one of r2 $(PIXELS)" >&2; exit 2

# A stamp, since the command adds to a manifest that the plans add to as well.
build/mnist/.half: build/mnist/r2id.onnx $(wildcard calibration/*.py)
	$(BIN)/python -m calibration.half build/mnist
	@touch $@

# The exporter writes it just before the manifest, and nothing else does.
build/mnist/r2id.onnx: build/mnist/manifest.json
	@:

build/tiny/manifest.json: .venv/.draw tests/tiny.py $(shell find export reference -name '*.py')
	$(BIN)/python -m tests.tiny build/tiny

generate: build/$(MODEL)/manifest.json ## first picture: environment, export, a sheet of digits of FAMILY
	@echo "== digits.png: 80 digits by $(FAMILY)"
	$(BIN)/python -m runtime.generate --engine build/$(MODEL) --label 0-9 --count 8 \
		$(if $(filter r2,$(FAMILY)),--image 64x64) --out digits.png

export: plans ## the shipped checkpoint as ONNX graphs in fp32, fp16 and bf16, and as plans, in build/mnist

plans: .venv/.full build/mnist/.half ## TensorRT plans beside the graphs, for TARGETS
	$(BIN)/python -m export.to_plan build/mnist --target $(TARGETS)

calibrate: .venv/.full build/mnist/.half ## 8-bit graphs in build/mnist, and what each precision costs and gains
	$(BIN)/python -m calibration build/mnist \
		$(if $(wildcard $(DATA)/train-images*),--data $(DATA))
	$(BIN)/python -m calibration.report build/mnist \
		$(addprefix --classifier ,$(wildcard build/evaluation/classifier.safetensors))

train: .venv/.full ## a checkpoint of CONFIG from DATA, continued where it was stopped
	$(BIN)/python -m reference.train --config $(CONFIG) --data $(DATA) --out runs/$(CONFIG)

distill: .venv/.full ## CHECKPOINT with its guidance folded in: one branch a step instead of two
	$(BIN)/python -m reference.distill --checkpoint $(CHECKPOINT) --data $(DATA) --out runs/distilled

evaluate: .venv/.full build/mnist/manifest.json ## what a checkpoint is worth: errors, digits read right, pictures
	$(BIN)/python -m reference.evaluate --checkpoint $(CHECKPOINT) --data $(DATA) --bundle build/mnist \
		--provider openvino

bench: .venv/.full ## a step of ours beside PyTorch and plain exports: table, JSON, pictures in build/bench
	$(BIN)/python -m benchmarks.compare

families: .venv/.full $(SHIPPED:%=build/%/manifest.json) ## all shipped models side by side, at ten sizes, in build/families
	$(BIN)/python -m benchmarks.families --data $(DATA)

# Where pip cannot make the environment, with the packages at hand; what is missing is said by name.
gpu: ## all that a GPU can settle, in 8 minutes: tests, then steps beside PyTorch, in build/gpu
	@if nvidia-smi -L 2> /dev/null; then PIP_RETRIES=1 $(MAKE) .venv-gpu/.gpu || \
		echo "== no .venv-gpu: with the packages at hand"; fi
	@python=$(PYTHON); test ! -x $(BIN)/python || python=$(BIN)/python; \
	test ! -e .venv-gpu/.gpu || python=.venv-gpu/bin/python; \
	test -e build/tiny/manifest.json || ! nvidia-smi -L > /dev/null 2>&1 || \
		$$python -m tests.tiny build/tiny || echo "== no build/tiny: its tests are skipped"; \
	$$python -m benchmarks.gpu

dist: build/mnist/manifest.json ## the runtime alone with the shipped bundle inside, as a wheel in dist/
	$(BIN)/python -m export.wheel build/mnist --out dist

# Tests that `make test` runs in a small form, in full; each says how much it did.
FULL := $(BIN)/python -m pytest -s -p no:cacheprovider

fuzz: .venv/.full build/tiny/manifest.json ## 10,000 damaged inputs for everything that reads a file or a request
	FUZZ_INPUTS=10000 $(FULL) tests/fuzz

crash: .venv/.full build/tiny/manifest.json ## every writer killed at 50 random moments
	CRASH_KILLS=50 $(FULL) tests/crash

soak: .venv/.full build/tiny/manifest.json ## 10 minutes of each engine and of the server, memory watched
	SOAK_SECONDS=600 $(FULL) tests/soak

lint: .venv/.full ## style and types alone: what reviewers need not look at
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

test: lint build/tiny/manifest.json build/mnist/manifest.json .venv-runtime/.runtime ## everything that must hold, torch-free too
	.venv-runtime/bin/python -c 'import importlib.util as u; assert not u.find_spec("torch")'
	.venv-runtime/bin/python -m pytest tests/runtime
	$(BIN)/python -m pytest

# Playwright drives the system's own Chromium; where there is none its tests are skipped by name.
browser: ## what the tests in a browser need: Chromium (Debian's, as root) and ONNX Runtime for browsers
	@echo "== Chromium, 0.4 GB, and onnxruntime-web, 0.1 GB"
	command -v chromium chromium-browser google-chrome > /dev/null || \
		{ apt-get update -q && apt-get install -qy --no-install-recommends chromium; }
	cd examples/browser && npm ci --no-audit --no-fund

triton: .venv-triton/.triton ## what the tests of Triton need: its server, for Linux with glibc 2.35 or newer

# In a copy: environments without locks, their locks, then every test in what the locks install.
lock: ## the newest versions of all packages into locks/, if every test passes with them
	@copy=$$(mktemp -d) && trap 'rm -rf "$$copy"' EXIT && \
	git ls-files -z | tar -cf - --null -T - | tar -xf - -C "$$copy" && cd "$$copy" && \
	for lock in locks/*.txt; do : > $$lock || exit; done && \
	$(MAKE) .venv/.full .venv-runtime/.runtime .venv-triton/.triton && \
	for stamp in .venv/.draw .venv/.full .venv-runtime/.runtime .venv-triton/.triton; do \
		{ echo "# What make installs, from $$($(PYTHON) -V); made by make lock."; \
		sed 's/+.*//' $$stamp; } > locks/$${stamp##*.}.txt || exit; \
	done && \
	$(MAKE) test && cp locks/*.txt $(CURDIR)/locks/

clean: ## remove what make has made, training runs aside
	rm -rf build dist .venv .venv-runtime .venv-gpu .venv-triton *.egg-info .mypy_cache .ruff_cache .pytest_cache
