# make demo    install everything, start the engine, watch many clients stream from it
# make test    install what is missing, check, test
# make kernels the Triton kernels against float64 under their interpreter, where there is no GPU: ten minutes
# make chaos   kill actors, send rubbish, come and go by the thousand: five minutes
# make soak    REQUESTS=1000000 short requests, and what they leave in memory
# make clean   remove what these made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# A torch that is there already and new enough is kept beside a GPU; without one, the versions are those that the checks were seen to pass with.
HAS_TORCH := $(shell $(PYTHON) -c "import torch; v = torch.__version__.split('.'); print(int((int(v[0]), int(v[1])) >= (2, 11)))" 2>/dev/null)
HAS_GPU := $(shell test -e /dev/nvidiactl && echo 1)
VENV_FLAGS := $(if $(filter 1,$(HAS_TORCH)),--system-site-packages)
CONSTRAINTS := $(if $(HAS_GPU),,-c constraints-cpu.txt)

REQUESTS ?= 1000000

.PHONY: demo test kernels chaos soak check install clean

demo: install
	$(BIN)/penstock demo

# Both cores at once, about as long each. Either failing fails the whole.
test: check
	$(BIN)/python -m pytest tests/engine tests/models tests/clients tests/test_package.py & first=$$!; \
	$(BIN)/python -m pytest tests/actors; second=$$?; wait $$first && exit $$second

kernels: install
	$(BIN)/python -m pytest -m apart tests/engine & first=$$!; \
	$(BIN)/python -m pytest -m apart tests/models; second=$$?; wait $$first && exit $$second

chaos: install
	$(BIN)/python -m pytest -s tests/chaos

soak: install
	$(BIN)/penstock bench soak --requests $(REQUESTS) --json

check: install
	@mkdir -p .typing && ln -sfn .. .typing/penstock
	$(BIN)/ruff check .
	$(BIN)/mypy -p penstock.actors -p penstock.engine -p penstock.clients

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .typing build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
