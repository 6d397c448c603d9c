PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
export JOBS ONLY
.PHONY: help test test-pure test-bed coverage lint bed demo demo-proxy bench bench-switch clean

help:        ## list these targets
	@sed -nE 's/^([a-z-]+): .*## (.*)/  make \1\t\2/p' Makefile | expand -t 20

test:        ## run the tests (ONLY=fleet: a part); what needs a service that is not there is skipped
	$(PYTHON) test_c2.py

test-pure:   ## run those that start no program
	$(MAKE) test ONLY="yaml mustache configuration state planner derived"

test-bed: bed  ## run the tests beside real services, a bed for each of JOBS (Debian, root)
	C2_WITHIN='.ci/bed.sh run' $(MAKE) test PYTHON="$${PYTHON:-$$(.ci/bed.sh pythons | tail -1)}"

coverage: export COVERAGE_RCFILE = .ci/coveragerc
coverage: export PYTHONPATH = .
coverage: bed  ## print the lines of c2.py that no test runs, beside real services
	rm -rf .ci/cache/coverage && mkdir -p .ci/cache/coverage
	-C2_WITHIN='.ci/bed.sh run' .ci/bed.sh tools coverage run -m test_c2
	.ci/bed.sh tools coverage combine -q
	.ci/bed.sh tools coverage report -m

bed:         ## install these services, and the linters
	.ci/bed.sh install

lint:        ## check style, types and the Python 3.6 floor (needs make bed)
	.ci/bed.sh tools ruff check
	.ci/bed.sh tools ruff format --check
	.ci/bed.sh tools mypy c2.py
	.ci/bed.sh tools vermin -t=3.6- --violations --no-tips c2.py test_c2.py

demo:        ## deploy, break and roll back without a proxy
	examples/demo.sh

demo-proxy:  ## switch an endpoint between two releases under load
	examples/demo-proxy.sh

bench:       ## measure c2 against the bare tools, as ratios
	$(PYTHON) .ci/bench.py

bench-switch: ## what switches under load lose, beside the same by hand (Docker; 25 minutes)
	$(PYTHON) examples/zero-downtime/bench-switch.py $(ARGS)

clean:       ## remove what was made here
	rm -rf .ci/cache __pycache__ examples/__pycache__ .ci/__pycache__
