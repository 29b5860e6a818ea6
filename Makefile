# make train        ResNet-20 on handwritten digits, into runs/digits_resnet20
# make test         lint and tests, under eight minutes on two cores
# make test-fast    lint and the quick tests, of each package some: after each edit, under 90 seconds
#                   on two cores once their programs are compiled and kept
# make slow-tests   measures which tests test-fast leaves out, into tests/slow_tests.txt
# make test-long    the tests that take longer
# make lint         ruff and mypy only
# make format       what ruff can mend
# make results      regenerates results/digits_resnet20.json, five seeds
# make cifar10-quick  regenerates results/cifar10_resnet20_quick.json, 40 minutes on two cores;
#                   CIFAR-10 must be prepared, ARGS=--config.data.data_dir=DIR says where
# make published    regenerates results/published_cifar_resnet*.json; CIFAR-10 must be prepared,
#                   ARGS=--data_dir=DIR says where
# make tpu-ahead-of-time  regenerates results/tpu_ahead_of_time.json; with PYTHON=python3.12
#                   ACCEL=tpu, no TPU needed
# make bench        speed beside PyTorch (where it is installed) and Flax's example, compared with
#                   results/train_step.json; ARGS=--plan=gpu on a GPU
# make constraints  takes the newest versions into constraints.txt
#
# PYTHON=python3.12 chooses the interpreter, VENV=dir where it is set up, ACCEL=cuda, cuda13 or
# tpu the build of JAX, ARGS='--config.KEY=VALUE' is added to train.py's flags.

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

# Most of what these tests take is compiling; test-long has the compiler do all that it can.
PYTEST = XLA_FLAGS="--xla_backend_optimization_level=0 $$XLA_FLAGS" \
  $(BIN)/python -m pytest -n 2 -m "not long"

test: lint
	$(PYTEST) $(ARGS)

test-fast: lint
	$(PYTEST) --quick $(ARGS)

slow-tests: $(TEST)
	$(PYTEST) --write-slow-tests $(ARGS)

test-long: $(TEST)
	$(BIN)/python -m pytest -n 2 -m long $(ARGS)

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
