PYTHON ?= python3.11
BIN := .venv/bin
# accelerate would set two threads for two cores, and say so at length; Medley uses one for each process.
LAUNCH := OMP_NUM_THREADS=1 $(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml

.PHONY: quickstart quickstart-short rehearse test processes faults faults-whole audit docs families clean

quickstart: .venv/installed  ## train the quickstart from scans to a published adapter
	$(BIN)/python plans/digits.py data/digits
	$(LAUNCH) train.py plans/quickstart.yaml

# The same path in a tenth of the steps: for a first look and for continuous integration.
quickstart-short: .venv/installed
	$(BIN)/python plans/digits.py data/digits
	$(LAUNCH) train.py plans/quickstart.yaml --out runs/quickstart-short --set evaluate.accuracy.samples=50 \
		--set stages.foundation.steps=100 --set stages.foundation.lr.warmup=10 --set stages.expose.steps=20 --set stages.expose.lr.warmup=2 \
		--set stages.refine.steps=20 --set stages.refine.lr.warmup=2

# Every plan in miniature and every notebook on a shortened plan, one after the other; those that fail are named at the end.
rehearse: .venv/installed-dev  ## rehearse every plan in plans/ and every notebook
	$(BIN)/python plans/digits.py data/digits
	$(BIN)/python -m pytest tests/test_notebook.py -m slow --quiet
	@failed=""; for plan in plans/*.yaml; do \
		echo "$$plan"; $(BIN)/python train.py $$plan --rehearse || failed="$$failed $$plan"; \
	done; if [ -n "$$failed" ]; then echo "these plans fail:$$failed"; exit 1; fi

test: .venv/installed-dev  ## lint, types, tests
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

processes: .venv/installed-dev  ## real launchers: faults on one process of two, two launchers as of two machines, other ways to shard; ten minutes
	$(BIN)/python -m pytest tests/test_processes.py tests/test_fsdp.py -m slow --quiet

faults: .venv/installed-dev  ## broken data, plans nobody would write, files that lie, runs that are killed: what was done, how often, and how often it was survived
	cd tests && ../$(BIN)/python -m faults

faults-whole: .venv/installed-dev  ## all of it, in one to three hours, and the table of docs/reliability.md
	cd tests && ../$(BIN)/python -m faults --whole && ../$(BIN)/python -m faults --write

audit: .venv/installed  ## known holes of what Medley stands on; says so where the database cannot be asked
	$(BIN)/python tests/audit.py

docs: .venv/installed-dev  ## write docs/plan.md, docs/plan.schema.json and docs/dependencies.md anew
	$(BIN)/python -m stages.plan_docs
	$(BIN)/python tests/dependencies.py

# The table says FAILED where a test fails, so it is written all the same; make ends with an error then.
FAMILY_TESTS := tests/test_flux.py $(sort $(wildcard tests/test_family_*.py)) tests/test_pyramid.py tests/test_regions.py tests/test_region_pipeline.py tests/test_comfyui.py tests/test_peft_layout.py
families: .venv/installed-dev  ## test every family, and write the table of docs/families.md from what the tests say
	-$(BIN)/python -m pytest $(FAMILY_TESTS) --quiet --junitxml=runs/families.xml
	$(BIN)/python tests/families_table.py runs/families.xml

# torch goes first and alone: its pin takes the CPU build where that is what the machine has, and nothing after it may choose another.
.venv/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || python3 -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv runs data cache
