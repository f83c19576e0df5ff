# make setup       the environment, in .venv
# make demo        fine-tune two networks on drawn pictures, through the queue, and compare them
# make timm        timm's models, too (model_name timm:NAME)
# make ray         Ray, for sweeps on more than one machine
# make test        lint, format and all tests, timm's and Ray's among them
# make benchmark   how fast an experiment is, beside the usual loop: three quarters of an hour
PYTHON ?= python3
IN_VENV = PATH="$(CURDIR)/.venv/bin:$$PATH"

.PHONY: setup timm ray demo test benchmark
setup: .venv/installed

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: Python 3.11 or newer is needed, found $$($(PYTHON) --version 2>&1): make setup PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@echo "installing requirements.txt into .venv (torch is large: some minutes)"
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@
	@echo "done. Now: . .venv/bin/activate && dvc exp run"

timm: .venv/installed-timm

.venv/installed-timm: requirements-timm.txt .venv/installed
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-timm.txt
	@touch $@

ray: .venv/installed-ray

.venv/installed-ray: requirements-ray.txt .venv/installed
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-ray.txt
	@touch $@

demo: setup
	$(IN_VENV) python src/demo.py

test: setup timm ray
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	OMP_NUM_THREADS=1 $(IN_VENV) python -m pytest -m "" -n 3 --dist worksteal

benchmark: setup
	$(IN_VENV) python benchmarks/speed.py
