# Two commands do everything on a fresh machine: `make generate` and `make test`.
PYTHON ?= python3
CONFIG ?= mnist
DATA ?= data/mnist
CHECKPOINT ?= reference/weights/mnist.safetensors
TARGETS ?= sm120,sm89,sm86,sm80
BIN := .venv/bin
TORCH := torch==2.13.0
CODE := runtime reference export calibration tests benchmarks docs

.DEFAULT_GOAL := help
.PHONY: help generate export plans calibrate train evaluate bench test lint clean

help: ## list the commands (what `make` alone does)
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[cpu,openvino,export,tensorrt-rtx,train,bench,test]'
	@touch $@

.venv-runtime/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-runtime
	.venv-runtime/bin/python -m pip install --quiet -e '.[cpu,openvino]' 'pytest>=9' 'hypothesis>=6.140' 'onnx>=1.22'
	@touch $@

build/mnist/manifest.json: .venv/.ready $(CHECKPOINT) $(shell find export reference -name '*.py')
	$(BIN)/python -m export --checkpoint $(CHECKPOINT) --out build/mnist

# A stamp, since the command adds to a manifest that the plans add to as well.
build/mnist/.half: build/mnist/r2id.onnx $(wildcard calibration/*.py)
	$(BIN)/python -m calibration.half build/mnist
	@touch $@

# The exporter writes it just before the manifest, and nothing else does.
build/mnist/r2id.onnx: build/mnist/manifest.json
	@:

build/tiny/manifest.json: .venv/.ready tests/tiny.py $(shell find export reference -name '*.py')
	$(BIN)/python -m tests.tiny build/tiny

generate: build/mnist/manifest.json ## first picture: environment, export, a sheet of digits
	$(BIN)/python -m runtime.generate --engine build/mnist/r2id.onnx --label 0-9 --count 8 \
		--image 64x64 --out digits.png

export: plans ## the shipped checkpoint as ONNX graphs in fp32, fp16 and bf16, and as plans, in build/mnist

plans: build/mnist/.half ## TensorRT plans beside the graphs, for TARGETS
	$(BIN)/python -m export.to_plan build/mnist --target $(TARGETS)

calibrate: build/mnist/.half ## 8-bit graphs in build/mnist, and what each precision costs and gains
	$(BIN)/python -m calibration build/mnist \
		$(if $(wildcard $(DATA)/train-images*),--data $(DATA))
	$(BIN)/python -m calibration.report build/mnist \
		$(addprefix --classifier ,$(wildcard build/evaluation/classifier.safetensors))

train: .venv/.ready ## a checkpoint of CONFIG from DATA, continued where it was stopped
	$(BIN)/python -m reference.train --config $(CONFIG) --data $(DATA) --out runs/$(CONFIG)

evaluate: build/mnist/manifest.json ## what a checkpoint is worth: errors, digits read right, pictures
	$(BIN)/python -m reference.evaluate --checkpoint $(CHECKPOINT) --data $(DATA) --bundle build/mnist

bench: .venv/.ready ## a step of ours beside PyTorch and plain exports: table, JSON, pictures in build/bench
	$(BIN)/python -m benchmarks.compare

lint: .venv/.ready ## style and types alone: what reviewers need not look at
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

test: lint build/tiny/manifest.json build/mnist/manifest.json .venv-runtime/.ready ## everything that must hold, torch-free too
	.venv-runtime/bin/python -c 'import importlib.util as u; assert not u.find_spec("torch")'
	.venv-runtime/bin/python -m pytest tests/runtime
	$(BIN)/python -m pytest

clean: ## remove what make has made, training runs aside
	rm -rf build .venv .venv-runtime *.egg-info .mypy_cache .ruff_cache .pytest_cache
