# The commands people type. Each first makes the environment, if it is not there: scripts/setup_env.sh says how.
# PYTHON=..., TORCH=... and pip's own settings in the environment are honoured there.

.DELETE_ON_ERROR:
.PHONY: demo test gpu-test bench lint clean

ENVIRONMENT := build/environment
export PYTHON TORCH
python = "$$(cat $(ENVIRONMENT))"
# Options of pytest for $(1) workers, where pytest-xdist is installed.
workers = $$($(python) -c 'import importlib.util as u, torch; print(f"-n {$(1)} --dist $(2)" if u.find_spec("xdist") else "")')

demo: $(ENVIRONMENT)
	$(python) -m fused_parallel demo

test: $(ENVIRONMENT)
	$(python) -m pytest tests/cpu $(call workers,2,loadfile)

gpu-test: $(ENVIRONMENT)
	@$(python) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu-test: torch sees no CUDA device")'
	@failed=; $(python) -m pytest tests/gpu $(call workers,torch.cuda.device_count(),load) || failed=tests/gpu; \
		$(python) -m pytest tests/gpu tests/multigpu -m multigpu || failed="$$failed multigpu"; \
		test -z "$$failed" || { echo "make gpu-test: failed: $$failed" >&2; exit 1; }

bench: $(ENVIRONMENT)
	@failed=; for script in benchmarks/bench_*.py; do \
		echo "== $$script"; $(python) "$$script" || failed="$$failed $$script"; done; \
		test -z "$$failed" || { echo "make bench: failed:$$failed" >&2; exit 1; }

lint: $(ENVIRONMENT)
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -c 'import clang_format; clang_format.clang_format()' --dry-run -Werror $$(find csrc -type f)

clean:
	rm -rf build dist .pytest_cache .ruff_cache *.egg-info fused_parallel/_C.*.so
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# The file holds the path of the environment's interpreter.
$(ENVIRONMENT): scripts/setup_env.sh setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
	scripts/setup_env.sh $@
