# SPDX-License-Identifier: LGPL-2.1-or-later
#
# make setup    what is missing on this machine, and .venv with the commands in .venv/bin
# make demo     the main job on a real virtual machine, shown
# make check    the fast tests and the linters: seconds
# make test     all tests: minutes. Those of single stages are make stage, those on a real libvirtd and QEMU make live,
#               and of them those that mostly wait, for what hangs or fills up, make patient
# make distros  all but those, on Debian 12 and 13, or SUITES="...", in roots that debootstrap makes: see tests/distros
# make soak     faults for MINUTES=60, by a seed: SEED=1; writes the table of tests/faults/README.md
# make bench    beside nbdcopy, qemu-img, virtnbdbackup; JSON=1 prints JSON, TABLE=1 writes that of
#               tests/bench/README.md
# make deb      a Debian package, in build/deb
# make clean

PYTEST = .venv/bin/python -m pytest
SCRIPTS = $(shell grep -rlE '^\#!/bin/(ba)?sh' .ci bin examples tests/distros) build/completion/vnb.bash
PAGES = $(wildcard man/*.[1-9])

.PHONY: setup demo check test stage live patient distros soak bench deb clean

setup:
	@.ci/setup

demo: setup
	@.venv/bin/python tests/live/lab.py examples/demo

check: setup
	.venv/bin/ruff check --quiet --output-format concise .
	.venv/bin/mypy --no-error-summary
	packaging/completion/generate build/completion
	shellcheck -x $(SCRIPTS)
	codespell
	$(if $(PAGES),mandoc -T lint -W warning $(PAGES))
	$(PYTEST) -q tests --ignore tests/live -m "not stage and not live"

# Side by side: all wait a lot. What each of them says comes when it has ended.
test: check
	$(MAKE) --jobs 3 --output-sync=target stage live patient

stage: setup
	$(PYTEST) tests -m stage --durations 10

live: setup
	$(PYTEST) tests -m "live and not patient" --durations 10

patient: setup
	$(PYTEST) tests -m patient --durations 10

distros:
	@.ci/setup distros
	@tests/distros $(SUITES)

soak: setup
	VNB_SOAK=$(or $(MINUTES),60) VNB_SEED=$(or $(SEED),$(shell date +%j)) VNB_SOAK_RESULTS=tests/faults/results.json \
		$(PYTEST) tests/faults; status=$$?; PYTHONPATH=tests .venv/bin/python tests/faults/table.py && exit $$status

bench: setup
	@.venv/bin/python tests/bench/bench.py $(if $(JSON),--json) $(if $(TABLE),--table)

# Of what git knows: neither .venv nor anything else that is lying about gets into it.
deb:
	rm -rf build/deb
	mkdir -p build/deb/vnb
	git ls-files -z | tar -c --null -T - | tar -x -C build/deb/vnb
	cp -r build/deb/vnb/packaging/debian build/deb/vnb/debian
	cd build/deb/vnb && PATH=/usr/sbin:/usr/bin:/sbin:/bin dpkg-buildpackage -us -uc -b
	lintian --fail-on warning build/deb/*.deb

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
