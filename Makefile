# make setup       the environment, in .venv
# make demo        fine-tune two networks on drawn pictures, through the queue, and compare them
# make team-demo   a team at work in a temporary folder: clones, a git remote and a DVC remote
# make timm        timm's models, too (model_name timm:NAME)
# make export      models as ONNX files, too (src/export.py --onnx)
# make s3          DVC remotes on S3, and the server that their test talks to
# make ray         Ray, for sweeps on more than one machine
# make browser     what drives a browser in the tests of the report
# make report      a page of the experiments: results/report.html
# make test        lint, format, types and all tests, those of the optional packages among them
# make benchmark   how fast an experiment is, beside the usual loop: three quarters of an hour
PYTHON ?= python3
IN_VENV = PATH="$(CURDIR)/.venv/bin:$$PATH"

.PHONY: setup timm export s3 ray browser demo team-demo report test benchmark
setup: .venv/installed

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: Python 3.11 or newer is needed, found $$($(PYTHON) --version 2>&1): make setup PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@echo "installing requirements.txt into .venv (torch is large: some minutes)"
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@
	@echo "done. Now: . .venv/bin/activate && dvc exp run"

timm export s3 ray browser: %: .venv/installed-%

.venv/installed-%: requirements-%.txt .venv/installed
	.venv/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

demo: setup
	$(IN_VENV) python src/demo.py

team-demo: setup
	$(IN_VENV) python src/team_demo.py

report: setup
	$(IN_VENV) python src/report.py

test: setup timm export s3 browser
	@$(MAKE) ray || echo "warning: no Ray for this Python, so the tests of a cluster are skipped" >&2
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) mypy
	OMP_NUM_THREADS=1 $(IN_VENV) python -m pytest -m "" -n 4 --dist worksteal --durations=25

benchmark: setup
	$(IN_VENV) python benchmarks/speed.py
