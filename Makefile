# Two commands do everything, on a fresh Debian 12 too: `make demo` and `make test`. See README.md.
# make build LLAMA_PREFIX=/path uses an installed llama.cpp instead of compiling one into .venv.
LLAMA_PREFIX ?=
PREFIX ?= /usr/local
# CUDA kernels (for sm_90 and, by PTX, all since Ampere): AUTO builds them where nvcc and a GPU are found (they take most of an hour on two
# cores, for nothing where there is no GPU), ON builds them for another machine, OFF leaves them out.
CUDA ?= AUTO
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
LLAMA := $(if $(LLAMA_PREFIX),$(abspath $(LLAMA_PREFIX)),$(CURDIR)/.venv/llama)
CCACHE := $(shell command -v ccache 2>/dev/null)

.PHONY: all setup build demo test test-clang test-tsan test-gpu install clean
all: build

setup:
	@LLAMA_PREFIX='$(LLAMA_PREFIX)' scripts/setup

# -U: another LLAMA_PREFIX than the last time must be seen.
build: setup
	@cmake --preset release --log-level=NOTICE -U 'llama_*' -U 'ggml_*' -U 'GGML_*' -DCMAKE_PREFIX_PATH='$(LLAMA)' -DTQ_CUDA=$(CUDA) \
	  $(if $(CCACHE),-DCMAKE_CXX_COMPILER_LAUNCHER=$(CCACHE))
	@cmake --build build --parallel $(JOBS)

demo: build
	@scripts/demo

test: build
	@python3 scripts/test --build build

# On a machine with a GPU: kernels, device, stock tools, speeds. GPU_TOOLS: folder of llama.cpp's tools with libggml-cuda.so; GPU_MODEL: of the table.
test-gpu: build
	@scripts/test-gpu --build build $(if $(GPU_TOOLS),--tools '$(GPU_TOOLS)') $(if $(GPU_MODEL),--model '$(GPU_MODEL)')

# The same by another compiler, and under the thread sanitizer; each says so where it cannot run.
test-clang test-tsan: test-%: setup
	@scripts/test-preset $* -DCMAKE_PREFIX_PATH='$(LLAMA)' || [ $$? = 77 ]

install: build
	@cmake --install build --prefix '$(PREFIX)'

clean:
	rm -rf build
