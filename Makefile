# Every target sets up what it needs: a fresh clone and Python 3.11-3.13 are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

.PHONY: venv demo test test-all test-cluster soak kernels lint bench bench-million bench-scale bench-faults bench-latency bench-few-shot bench-spaces bench-policies bench-finalists bench-recipes bench-kernels secrets wheel-check

venv: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# The main job: FBNet-tiny on digits, on this machine, to a measured Pareto front and a report.
demo: venv
	mkdir -p $(DEMO)
	$(BIN)/archfront run examples/digits.yaml --db $(DEMO)/archfront.db
	$(BIN)/archfront front last --db $(DEMO)/archfront.db --plot $(DEMO)/front.png
	$(BIN)/archfront report last --db $(DEMO)/archfront.db --to $(DEMO)/report.html

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: venv
	$(BIN)/pytest -q -m "not slow" --numprocesses 2 --dist worksteal

# What measures time or takes the whole machine comes alone, the rest three at a time: kills wait more than they work.
test-all: venv
	$(BIN)/pytest -q -m "slow and not alone and not soak and not kernels" --durations=15 --numprocesses 3 --dist worksteal
	$(BIN)/pytest -q -m "slow and alone and not soak and not kernels" --durations=15

# The kill-anything suite: a cluster on network namespaces of this machine (Linux, root, iproute2). Part of test-all.
test-cluster: venv
	$(BIN)/pytest -q -m "slow and not soak and not kernels" --durations=20 tests/cluster

# Every setting of every kernel, compiled for three GPUs without one: up to an hour.
kernels: venv
	$(BIN)/pytest -v -m kernels tests/kernels --durations=15 --numprocesses 2 --dist worksteal

soak: venv
	$(BIN)/pytest -q -m soak -s tests

bench: venv
	$(BIN)/python benchmarks/throughput.py

bench-million: venv
	$(BIN)/python benchmarks/million.py

bench-scale: venv
	$(BIN)/python benchmarks/scale.py

# A search on each space, and einspace against chance.
bench-spaces: venv
	$(BIN)/python benchmarks/space_searches.py

# Needs a machine with nothing else to do.
bench-latency: venv
	$(BIN)/python benchmarks/prediction_speed.py
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/fused_latency.py

# Recipes of compression against uniform and random policies and a search, on four models: hours.
bench-recipes: venv
	for model in resnet20 resnet56 vit decoder; do $(BIN)/python benchmarks/recipes.py $$model; done
	$(BIN)/python benchmarks/five_bits.py
	$(BIN)/python benchmarks/recipes_report.py

bench-policies: venv
	$(BIN)/python benchmarks/policy_speed.py

# Finalists as files on this processor: needs ARCHFRONT_DATA, and an hour of a machine with nothing else to do.
bench-finalists: venv
	$(BIN)/python benchmarks/finalists.py

# Every Triton operator against its floor and the best baseline: needs a GPU.
bench-kernels: venv
	PYTHONPATH=src $(BIN)/python benchmarks/kernels/run.py --correctness --tune --configs kernels/configs

# Needs the public tables: ARCHFRONT_DATA.
bench-few-shot: venv
	$(BIN)/python benchmarks/few_shot.py

# The kill-anything suite again, with its figures kept.
bench-faults: venv
	ARCHFRONT_FAULTS=benchmarks/faults.json $(BIN)/pytest -q -m "slow and not soak and not kernels" tests/cluster/test_kill_anything.py
	$(BIN)/python benchmarks/faults.py

# What docker-compose.yml wants to find in ./secrets.
secrets:
	mkdir -p -m 700 secrets
	umask 077; for name in db-password ray-token; do \
	    [ -s secrets/$$name ] || openssl rand -hex 32 | tr -d '\n' > secrets/$$name; done

# The wheel, in a venv and a folder of its own: what a user gets who never sees the checkout.
wheel-check: venv
	$(BIN)/python -m build --wheel --outdir build/wheel . > build-wheel.log 2>&1 || (cat build-wheel.log; false)
	rm -f build-wheel.log
	PYTHON=$(PYTHON) bash tests/packaging/check_wheel.sh build/wheel
