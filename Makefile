# Scaling, Measured. `make course` to use it, `make test` to see it proven, `make help` for the rest.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
SITE ?= _site

.PHONY: course site lab serve kernel test environment browser export lock clean help

course: environment  ## Everything: environment, site, kernel, then the site and JupyterLab on localhost
	@$(BIN)/nbs course

site: environment  ## Build the site into _site/ from stored outputs
	@$(BIN)/nbs build

lab: environment  ## JupyterLab on your own copies in work/
	@$(BIN)/nbs lab

serve: environment  ## Serve the site, building it again and reloading on every change
	@$(BIN)/nbs serve --watch

kernel: environment  ## Register the course's kernel with a Jupyter that already runs (for this user)
	@$(BIN)/nbs kernel

test: environment browser  ## All that CI runs: nbdev in step, every notebook, pytest, a real kernel, a real browser
	@$(BIN)/python scripts/test.py

environment:  ## Make .venv from requirements.lock (a CUDA torch that is here is kept)
	@if [ -z "$(PYTHON)" ]; then echo "No Python 3.11, 3.12 or 3.13 was found."; \
		echo "  Remedy: apt-get install python3 python3-venv (Debian 12, Ubuntu 24.04 or newer), or make PYTHON=/path/to/python3.12"; exit 1; fi
	@$(PYTHON) scripts/environment.py

browser:
	@$(BIN)/python scripts/browser.py

export: environment  ## After editing notebooks: library, worksheets and clean notebooks in step
	@$(BIN)/python scripts/export.py

lock: environment  ## Resolve settings.ini into requirements.lock anew
	@$(BIN)/python -m pip install -q uv && $(BIN)/python scripts/lock.py

clean:  ## Remove what was built (never work/)
	rm -rf .venv _site build dist *.egg-info .pytest_cache .hypothesis

help:  ## This list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 20
