# make train        trains ResNet-20 on handwritten digits, in runs/digits_resnet20
# make test         lint and tests, about twelve minutes on two cores
# make test-fast    lint and the quick tests of every package, for after each edit: under 90 seconds
#                   on two cores once programs are in the compilation cache
# make slow-tests   measures which tests test-fast leaves out, and writes tests/slow_tests.txt
# make test-long    the tests that take longer
# make lint         ruff and mypy only
# make format       fixes what ruff can fix
# make results      writes results/digits_resnet20.json, five seeds
# make cifar10-quick  writes results/cifar10_resnet20_quick.json, 40 minutes on two cores;
#                   needs CIFAR-10, prepared by `resnet-flax data prepare tfds:cifar10`;
#                   ARGS=--config.data.data_dir=DIR gives its directory
# make published    writes results/published_cifar_resnet20.json and ...56.json; needs CIFAR-10,
#                   ARGS=--data_dir=DIR gives its directory
# make tpu-ahead-of-time  writes results/tpu_ahead_of_time.json; with PYTHON=python3.12
#                   ACCEL=tpu, no TPU needed
# make bench        measures speed beside PyTorch (where it is installed) and Flax's example, and
#                   compares with results/train_step.json; ARGS=--plan=gpu on a GPU
# make constraints  writes the newest versions of the dependencies into constraints.txt
# make clean        deletes .venv and runs: the environment and everything that was trained
#
# PYTHON=python3.12 chooses the interpreter, VENV=DIR the directory of the environment, and
# ACCEL=cuda (CUDA 12), cuda13 or tpu the build of JAX. ARGS='--config.KEY=VALUE ...' is appended
# to the command that a target runs.

PYTHON ?= python3
VENV ?= .venv
ACCEL ?= cpu
ARGS ?=
BIN := $(VENV)/bin
RUN := $(VENV)/installed-$(ACCEL)
TEST := $(VENV)/installed-$(ACCEL)-test

.PHONY: train test test-fast slow-tests test-long lint format results cifar10-quick published \
  tpu-ahead-of-time bench constraints clean

train: $(RUN)
	$(BIN)/python train.py $(ARGS)

# Most of the time of these tests is compiling, so the compiler does not optimize; it does in
# test-long.
PYTEST = XLA_FLAGS="--xla_backend_optimization_level=0 $$XLA_FLAGS" \
  $(BIN)/python -m pytest -n 2 -m "not long"

test: lint
	$(PYTEST) $(ARGS)

test-fast: lint
	$(PYTEST) --quick $(ARGS)

slow-tests: $(TEST)
	$(PYTEST) --write-slow-tests $(ARGS)

# Every transformation of every kind of network compiles for nine minutes with the compiler's
# optimizations, and for three without.
BATTERY := tests/models/test_transformations.py

test-long: $(TEST)
	$(BIN)/python -m pytest -n 2 -m long --ignore=$(BATTERY) $(ARGS)
	XLA_FLAGS="--xla_backend_optimization_level=0 $$XLA_FLAGS" \
	  $(BIN)/python -m pytest -n 2 -m long $(BATTERY) $(ARGS)

lint: $(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(TEST)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

results: $(RUN)
	$(BIN)/python -m resnet_flax sweep --config=configs/digits_resnet20.py --seeds=0,1,2,3,4 \
	  --workdir=runs/sweep/digits_resnet20 --out=results/digits_resnet20.json $(ARGS)

cifar10-quick: $(RUN)
	$(BIN)/python -m resnet_flax sweep --config=configs/cifar10.py:resnet20_quick --seeds=0,1 \
	  --workdir=runs/sweep/cifar10_resnet20_quick --out=results/cifar10_resnet20_quick.json $(ARGS)

published: $(RUN)
	for depth in 20 56; do \
	  $(BIN)/python -m resnet_flax eval cifar_resnet$$depth.akamaster_cifar10 \
	    --data=tfds:cifar10 --out=results/published_cifar_resnet$$depth.json $(ARGS) || exit; \
	done

tpu-ahead-of-time: $(RUN)
	for slice in "2x4 --fsdp=1" "2x4 --fsdp=8" "16x16 --fsdp=1" "16x16 --fsdp=8"; do \
	  $(BIN)/python benchmarks/tpu_ahead_of_time.py --topology=v5e:$$slice || exit; \
	done

bench: $(RUN)
	$(BIN)/python benchmarks/speed_session.py --against=results/train_step.json $(ARGS)

constraints:
	$(PYTHON) -m venv $(VENV)-uv
	$(VENV)-uv/bin/python -m pip install --quiet uv
	$(VENV)-uv/bin/uv pip compile --quiet --universal --no-annotate --no-header \
	  --python-version 3.11 --extra test --extra cpu --upgrade pyproject.toml -o constraints.txt
	rm -rf $(VENV)-uv

clean:
	rm -rf $(VENV) runs

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; give a newer one: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(RUN): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  --editable '.[$(ACCEL)]'
	@touch $@

$(TEST): $(RUN)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  --editable '.[test,$(ACCEL)]'
	@touch $@
