# make help lists the targets. Everything is installed into a virtual environment in this folder.

PYTHON ?= python3
EXTRAS ?=
PYTEST_ARGS ?=
# Test processes of `make test`; a compile keeps one core busy, so as many as there are cores.
JOBS ?= 2
DEMO_ARGS ?=
SEED ?= 0
# Pages of 2 MiB, where Linux's C library has them: XLA asks for the memory of each step anew, and with
# pages of 4 KiB a tenth of an update of the demo goes into them (docs/benches.md).
demo demo-full demo-long: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# The default python3 gets .venv; any other interpreter gets an environment of its own.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(VERSION))

.PHONY: help demo demo-full demo-long demo-wan test test-mesh test-kill test-slurm test-plan fixtures venv venv-test venv-wan clean distclean

help:
	@echo "make demo        the whole method on the bundled data: writes runs/demo, prints the table"
	@echo "make demo-full   the same, pre-training the base model too"
	@echo "make demo-long   the same at length: five to eight hours on one core; SEED=1: another seed"
	@echo "make demo-wan    a tiny Wan pipeline from diffusers through training and back; needs PyTorch"
	@echo "make test        all tests"
	@echo "make test-mesh   every mesh shape on eight virtual devices, four real processes: longer"
	@echo "make test-kill   twenty random kills of jobs of two processes, none lost"
	@echo "make test-slurm  a real Slurm of this machine runs launch/slurm.sbatch; Debian, as root"
	@echo "make test-plan   compiles for H100 and TPUs without one; own environment of several GB"
	@echo "make fixtures    regenerate the PyTorch fixtures of the tests (needs torch and diffusers)"
	@echo "make clean       remove build products and caches; distclean: the environments too"
	@echo ""
	@echo "PYTHON=python3.13   another interpreter, with its own environment (.venv-3.13)"
	@echo "EXTRAS=cuda         install this extra of setup.py too"
	@echo "DEMO_ARGS=...       more flags for launch/demo.py;  PYTEST_ARGS=... for pytest;  JOBS=2 test processes"

venv:
	@launch/venv.sh "$(PYTHON)" "$(VENV)" demo "$(EXTRAS)"

venv-test:
	@launch/venv.sh "$(PYTHON)" "$(VENV)" test "$(EXTRAS)"

venv-wan:
	@launch/venv.sh "$(PYTHON)" "$(VENV)" wan "$(EXTRAS)"

demo: venv
	@$(VENV)/bin/python launch/demo.py --workdir runs/demo $(DEMO_ARGS)

demo-full: venv
	@$(VENV)/bin/python launch/demo.py --workdir runs/demo-full --pretrain $(DEMO_ARGS)

demo-long: venv
	@$(VENV)/bin/python launch/demo.py --workdir runs/demo-long-$(SEED) --pretrain --long --seed $(SEED) $(DEMO_ARGS)

demo-wan: venv-wan
	@$(VENV)/bin/python launch/demo_wan.py --workdir runs/demo-wan $(DEMO_ARGS)

test: venv-test
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-mesh: venv-test
	$(VENV)/bin/python -m pytest -m mesh $(PYTEST_ARGS)

test-kill: venv-test
	APT_KILLS=10 $(VENV)/bin/python -m pytest tests/train/test_processes.py -m mesh -k killed $(PYTEST_ARGS)

test-slurm: venv-test
	$(VENV)/bin/python launch/test_slurm.py

test-plan:
	@launch/venv.sh "$(PYTHON)" "$(VENV)-plan" test plan,tokamax
	@$(VENV)-plan/bin/python -c 'import cudnn' 2>/dev/null || \
	  $(VENV)-plan/bin/python -m pip install -q --disable-pip-version-check --no-deps nvidia-cudnn-frontend
	$(VENV)-plan/bin/python -m pytest -m plan $(PYTEST_ARGS)

fixtures: venv-test
	@$(VENV)/bin/python tests/fixtures/make_fixtures.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find apt_jax configs launch tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-*
