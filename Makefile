PYTHON ?= python
DEVICE ?= cuda

.PHONY: lowest newest check format lint types layers test long long-list slow distributed distributed-matrix distributed-elastic distributed-context crash crash-sharded crash-slice power-loss disk-errors races stop-resume resume-laws fuzz fuzz-slice golden quick-data docs site examples real-files bench-prepare dpo bench-generate bench-start gpu-check pictures clients models models-slice templates

check: lint types layers test  ## all that CI runs, in the current environment

format:
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

lint:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

types:
	$(PYTHON) -m mypy

layers:
	lint-imports

test:  ## all that CI runs
	$(PYTHON) -m pytest -n 2 tests

long:  ## those that `pytest -n 2` leaves out: tests/long.txt
	$(PYTHON) -m pytest -n 2 --long

long-list:  ## rewrite tests/long.txt by what each test takes
	$(PYTHON) -m pytest -n 2 tests --junitxml=times.xml
	$(PYTHON) -m tests.support.long_tests times.xml

slow:  ## minutes long: downloads the default model and trains it
	$(PYTHON) -m pytest -m slow

lowest:  ## the fast tests on the lowest direct versions, in an environment of its own; downloads
	$(PYTHON) .ci/environments.py lowest

newest:  ## the fast tests on the newest versions that pip finds, in an environment of its own; downloads gigabytes on Linux
	$(PYTHON) .ci/environments.py newest

distributed:  ## trainings of several processes: the same as of one, signals, kills, faults, resume on other numbers
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -m "slow or not slow" tests/cli/test_processes.py tests/cli/test_process_faults.py \
		tests/equivalence/test_processes.py tests/equivalence/test_sharded.py tests/unit/training/distributed/test_group.py \
		tests/unit/services/processes/test_launch.py

distributed-context:  ## trainings of processes that share rows (training.context_processes): the same as of one
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -m "slow or not slow" tests/equivalence/test_shared_rows.py \
		tests/equivalence/test_shared_row_runs.py tests/cli/test_shared_rows.py

distributed-matrix:  ## each mode on up to six processes: losses, rows, bytes, lack of memory, going on in another, each way to train, loading in parts
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -m "slow or not slow" tests/equivalence/test_modes.py \
		tests/equivalence/test_ways.py tests/equivalence/test_ways_to_go_on.py tests/equivalence/test_load_in_parts.py \
		tests/equivalence/test_sharded_updates.py

distributed-elastic:  ## jobs of torchrun that lose and gain machines, and the files of examples/cluster under stand-ins for Slurm and Kubernetes
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -m slow tests/cli/test_elastic.py tests/cli/test_cluster_examples.py

crash:  ## kill -9 a real training 200 times at random moments; every end must equal the undisturbed one
	$(PYTHON) -m pytest -q tests/crash -m crash
	OMP_NUM_THREADS=1 $(PYTHON) -m tests.crash.monkey --rounds 200

crash-sharded:  ## kill -9 processes that share the weights out 100 times while they save; every end must equal the undisturbed one
	OMP_NUM_THREADS=1 $(PYTHON) -m tests.crash.sharded --rounds 100

crash-slice:  ## the part of it that CI runs, under 3 minutes
	$(PYTHON) -m pytest -q tests/crash -m "crash and not slow"
	OMP_NUM_THREADS=1 $(PYTHON) -m tests.crash.monkey --rounds 12 --max-seconds 35

power-loss:  ## cut the power at 200 random operations of the disk; what was announced must be there, and the same command go on
	OMP_NUM_THREADS=1 $(PYTHON) -m tests.crash.power_loss --cuts 200

disk-errors:  ## fail every kind of operation on the disk, of every command, with every error that disks have
	OMP_NUM_THREADS=1 $(PYTHON) -m tests.crash.disk_errors

races:  ## five that do the same at one moment, of every command, 20 times
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -m slow tests/cli/test_races.py

stop-resume:  ## stop 40 trainings at random moments with every signal beside two busy programs, go on, compare with the undisturbed
	OMP_NUM_THREADS=1 $(PYTHON) -m tests.crash.stops --runs 40

fuzz:  ## damage 20,000 files at random and run a command on each, an hour; none may end as a bug, hang or eat the memory
	$(PYTHON) -m tests.fuzz --kind own --intact
	$(PYTHON) -m tests.fuzz --kind foreign --intact
	$(PYTHON) -m tests.fuzz --kind own --count 10000 --max-seconds 2700
	$(PYTHON) -m tests.fuzz --kind foreign --count 10000 --max-seconds 2700
	$(PYTHON) -m tests.fuzz --kind paths --count 10000
	$(PYTHON) -m tests.fuzz.readers --count 20000 --max-seconds 1800

fuzz-slice:  ## a minute of it
	$(PYTHON) -m tests.fuzz --kind own --count 60 --max-seconds 28
	$(PYTHON) -m tests.fuzz --kind foreign --count 60 --max-seconds 28
	$(PYTHON) -m tests.fuzz --kind paths --count 60 --max-seconds 28

resume-laws:  ## stop after every step, resume, compare bit for bit: packing on and off, full weights and adapters
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -m "slow or not slow" tests/equivalence/test_resume.py

dpo:  ## TRL takes a step from the final folder of a run; needs `pip install trl`
	$(PYTHON) -m pytest -q -m slow tests/cli/test_dpo.py

clients:  ## other programs open what is written and answer alike; makes environments, and compiles llama.cpp in minutes
	work=$$(mktemp -d) && $(PYTHON) -m tests.clients.run --work $$work && $(PYTHON) -m tests.clients.servers --work $$work && rm -r $$work
	$(PYTHON) -m tests.clients.families

models:  ## every family through training, adapters, answers and resuming, an hour; writes docs/models.md
	OMP_NUM_THREADS=1 $(PYTHON) -m tests.models.matrix --jobs 2 --out models-out
	$(PYTHON) -m tests.models.page models-out/results > docs/models.md

models-slice:  ## those that CI runs
	OMP_NUM_THREADS=1 $(PYTHON) -m tests.models.matrix --jobs 2 --brief --out $$(mktemp -d) gpt_oss gemma2 smollm3 qwen3_moe \
		deepseek_v3 vlm_qwen3_5 nemotron_h lfm2

templates:  ## 28 conversations under every chat template of TRL (installed, else downloaded), and small ones with one habit each
	OMP_NUM_THREADS=1 $(PYTHON) -m tests.models.tmatrix --out models-out/templates

bench-generate:  ## decoding speed against transformers and the memory bound
	$(PYTHON) benchmarks/generate.py

golden:  ## rewrite the golden files; say in the commit why they moved
	WRITE_GOLDEN=1 $(PYTHON) -m pytest tests/golden tests/unit tests/contract/test_json_keys.py tests/cli/test_error_messages.py

quick-data:  ## rewrite the rows of the preset `quick`
	$(PYTHON) presets/quick/generate.py

examples:  ## run the scripts under examples/ on a tiny model
	$(PYTHON) -m pytest -q tests/cli/test_examples.py -m scripts

real-files:  ## what becomes of real files: make real-files MODEL=FOLDER DATA=FOLDER
	$(PYTHON) benchmarks/files.py --model $(MODEL) $(DATA)

bench-prepare:  ## memory and speed of preparing, as ratios: make bench-prepare MODEL=FOLDER ROWS=rows.jsonl
	$(PYTHON) benchmarks/prepare.py --model $(MODEL) --data $(ROWS)

docs:  ## rewrite the pages that are made from the program, and the man page
	$(PYTHON) docs/pages.py

SITE_PAGES = README.md SECURITY.md CONTRIBUTING.md CHANGELOG.md docs/*.md docs/site.css docs/images benchmarks/gpu/README.md tests/models/README.md

site:  ## a static site of the README and all pages in build/site; needs `pip install ".[docs]"`
	rm -rf build/pages build/site && mkdir -p build/pages
	cp -r --parents $(SITE_PAGES) build/pages
	cp docs/zensical.toml build
	$(PYTHON) -m zensical build --strict --clean --config-file build/zensical.toml

pictures:  ## redraw the pictures of the README from a real training; needs tmux and chromium
	$(PYTHON) docs/pictures.py

gpu-check:  ## on a GPU, two commands of six and four minutes: is it right, how fast, beside TRL; DEVICE=cpu tries the check itself
	$(PYTHON) -m benchmarks.gpu.check --device $(DEVICE) --part first; code=$$?; \
		$(PYTHON) -m benchmarks.gpu.check --device $(DEVICE) --part second && exit $$code

bench-start:  ## how long one waits at the prompt: first line, help, Tab
	$(PYTHON) benchmarks/start.py
