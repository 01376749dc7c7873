# The verbs of the project. `make help` lists them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY := .venv/bin/python
JOBS ?= 2
# Files of tests that `make quick` leaves out: they take more than ten seconds.
SLOW := training_cli hellaswag gpu_benchmark distributed weights book gpt2 \
  address mutants pretraining fast_generation exercises read_alike scaling moe multimodal

.DEFAULT_GOAL := help
.PHONY: help train test quick book export execute times exercises mutants gpu \
  address bench speedrun ablation scaling moe pictures results clean

help: ## list the targets
	@grep -E '^[a-z.]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

.venv: .venv/.ready ## make the environment from constraints.txt

.venv/.ready: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[book,test,fast]'
	@touch $@

train: .venv ## prepare text, pretrain a small LLaMA, show what it learned
	@PATH="$(CURDIR)/.venv/bin:$$PATH" bash scripts/make_train.sh

test: .venv ## every test, and every notebook run and compared with its committed outputs
	@$(PY) -m pytest --nbval --nbval-current-env --nbval-cell-timeout=300 -n $(JOBS) --dist loadscope --no-loadscope-reorder

quick: .venv ## what a contributor needs while working, in under two minutes
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) scripts/export.py --check
	@$(PY) -m pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder -m "not slow" tests \
	  $(SLOW:%=--ignore=tests/test_%.py)

book: .venv ## render the book to book/_build/html (warnings are errors)
	@.venv/bin/jupyter-book build . --toc book/_toc.yml --config _config.yml --path-output book -W --keep-going
	@echo open book/_build/html/index.html

export: .venv ## write llama_tut/*.py from the notebooks
	@$(PY) scripts/export.py

execute: .venv ## format and run every notebook in place (NB=notebooks/03_rmsnorm.ipynb: one)
	@$(PY) scripts/execute.py $(or $(NB),$(wildcard notebooks/*.ipynb book/*.ipynb))

times: .venv ## run every notebook on a quiet machine and record its seconds
	@$(PY) scripts/execute.py --times $(or $(NB),$(wildcard notebooks/*.ipynb))

mutants: .venv ## plant known faults in a copy, one by one; each must be caught
	@$(PY) scripts/mutants.py

exercises: .venv ## list the exercises; each checker must pass the solution and catch wrong answers
	@$(PY) scripts/exercises.py

address: .venv ## say where the book lives: Colab and Binder (URL=https://github.com/OWNER/NAME)
	@$(PY) scripts/address.py $(if $(filter undefined,$(origin URL)),,"$(URL)")

gpu: .venv ## everything that needs a GPU, in under nine minutes; writes runs/gpu
	@PYTHONPATH=. $(PY) benchmarks/gpu.py --out runs/gpu

bench: .venv ## speed and memory beside transformers and the harness's way; writes benchmarks/results
	@$(PY) benchmarks/bench_train.py
	@$(PY) benchmarks/bench_head_loss.py
	@$(PY) benchmarks/bench_hellaswag.py speed $(if $(LLAMA_TUT_DATA),--limit 512 --file $(LLAMA_TUT_DATA)/hellaswag_val.jsonl)
	@$(PY) benchmarks/bench_generate.py --compiled
	@$(PY) benchmarks/bench_loading.py
	@$(PY) benchmarks/bench_tokens.py

data/docs/dataset.json: | .venv
	@$(PY) scripts/prepare.py --corpus docs --vocab-size 2048 --out data/docs

speedrun: data/docs/dataset.json ## train until 1.72 bits a byte, beside the record before; takes turns (ten minutes)
	@$(PY) benchmarks/speedrun.py

ablation: data/docs/dataset.json ## chapter 22's runs: GPT-2 to LLaMA, optimizers (four hours; resumable)
	@$(PY) benchmarks/ablation.py

scaling: data/docs/dataset.json ## chapter 23's runs: sizes and budgets (two hours; resumable)
	@$(PY) benchmarks/scaling.py
	@$(PY) benchmarks/tenfold.py

moe: data/docs/dataset.json ## chapter 26's runs: dense and mixtures of experts (half an hour; resumable)
	@$(PY) benchmarks/moe.py

pictures: .venv ## chapter 27's runs: digits and words read by a text model (ten minutes; resumable)
	@$(PY) benchmarks/pictures.py

results: .venv ## what the committed runs say: ladder, frontier, optimizers, choice
	@$(PY) benchmarks/results.py

clean: ## remove what make made: the rendered book and caches (not data, runs or .venv)
	rm -rf book/_build .pytest_cache .ruff_cache
