# What a person types. Everything happens in a virtual environment, .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv

python := $(VENV)/bin/python
built := $(VENV)/.built

.PHONY: demo test wheel bench lint docs sanitize mutants gpu gpu-module

demo: $(built)  ## train on real data with torch's loss and with ours, then the tutorial's listings
	$(python) examples/train_digits.py --output demo-output
	$(python) examples/tutorial.py

# Two at a time, for most have one thread; those that wait leave their core to the others.
test: $(built)  ## all tests but those marked large, or what TESTS says
	OMP_WAIT_POLICY=passive $(python) -m pytest -n 2 --dist worksteal $(TESTS)

wheel: $(VENV)/.torch  ## a wheel for TORCH, in dist/
	PYTHON=$(python) bash .ci/build-wheel dist

bench: $(built)  ## measure on the CPU ours beside eager, torch.compile and the memory, and plot it
	$(python) benchmarks/run.py --device cpu --preset goals
	$(python) benchmarks/run.py --device cpu
	$(python) benchmarks/run.py --device cpu --preset workloads
	$(python) benchmarks/run.py --device cpu --preset training
	$(python) benchmarks/run.py --device cpu --preset peers
	$(python) benchmarks/run.py --device cpu --preset extras
	$(python) benchmarks/run.py --device cpu --preset heads
	$(python) benchmarks/run.py --device cpu --preset focal
	$(python) benchmarks/run.py --device cpu --preset head
	$(python) benchmarks/run.py --device cpu --preset pairwise
	$(python) benchmarks/pairwise_processes.py
	$(python) benchmarks/parts.py
	$(python) benchmarks/run.py --device cpu --alone --mode fwd+bwd --dtype float32 bfloat16 --seconds 5 \
	  --sizes $(patsubst %,2^%,20 21 22 23 24 25 26 27 28 29 30) --output benchmarks/results/cpu-cost.csv
	$(python) benchmarks/accuracy.py --device cpu
	$(python) benchmarks/accuracy.py --device cpu --loss focal
	$(python) benchmarks/plot.py $(foreach name,ladder workloads training extras heads focal head pairwise pairwise-processes cost accuracy accuracy-focal,benchmarks/results/cpu-$(name).csv)
	$(python) benchmarks/documented.py --write

lint: $(built)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	find csrc tests \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) \
	  -exec $(VENV)/bin/clang-format --dry-run --Werror {} +

docs: $(built)  ## the pages and the API reference as a site, build/docs/index.html; warnings are errors
	$(VENV)/bin/sphinx-build -W --keep-going -q -c docs -d build/doctrees . build/docs

sanitize: $(built)  ## tests of the C++, also of the CUDA kernels compiled for the host, under sanitizers
	PYTHON=$(python) bash .ci/sanitize

mutants: $(built)  ## faults that the tests must find: in Python, or FAULTS, names of tests/mutants/faults.py or all
	$(python) tests/mutants/run.py $(FAULTS)

gpu:  ## on a machine with a GPU, with the python3 at hand: in 12 minutes what tells the most; or the PARTS of .ci/gpu
	bash .ci/gpu $(PARTS)

gpu-module:  ## where there is no GPU: the compiled module that `make gpu` loads there, into .gpu
	bash .ci/gpu-module

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(python) -m pip install --upgrade pip "setuptools>=77" ninja "pybind11>=2.13" "$(TORCH)"
	touch $@

$(built): $(VENV)/.torch setup.py pyproject.toml $(wildcard csrc/* csrc/*/*)
	$(python) -m pip install --no-build-isolation --editable ".[test,examples,benchmarks,lint,docs]"
	touch $@
