"""llama.cpp's own tests over a device of ours, for scripts/stock-tools: they come with its source and are built beside its tools.

Each check yields (passed, text). `stock` is scripts/stock-tools' Stock: bin (folder of the programs), model, env, device."""

import os
import re
import subprocess
import tempfile
from pathlib import Path

import llama_archs

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "docs/models.md"
PROGRAMS = ["test-llama-archs", "test-save-load-state", "test-state-restore-fragmented", "test-thread-safety"]


class Runner:
    """Runs the programs with the library loaded before main."""

    def __init__(self, stock, folder):
        self.stock = stock
        self.preload = Path(folder) / "load_backend.so"
        subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", ROOT / "tests/stock/load_backend.c", "-o", self.preload,
                        f"-L{stock.bin}", "-lggml", "-ldl", f"-Wl,-rpath,{Path(stock.bin).resolve()}"], check=True)

    def run(self, program, *options, timeout=120):
        """(exit code, negative for a signal, None for too long; output without colours)."""
        env = {**self.stock.env, "LD_PRELOAD": str(self.preload), "OMP_WAIT_POLICY": "passive"}
        command = [str(Path(self.stock.bin).resolve() / program), *(str(o.resolve() if isinstance(o, Path) else o) for o in options)]
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", timeout=timeout, stdin=subprocess.DEVNULL,
                                  cwd=self.preload.parent)  # they leave files
        except subprocess.TimeoutExpired:
            return None, ""
        return done.returncode, re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)


def check_archs(stock, devices=("raw", "turbo8", "turbo4", "tcq3")):
    """test-llama-archs: with `raw` and turbo8 every architecture must give the CPU's logits within the test's own bound. Other formats cannot, so of them it
    is asked that every architecture decodes: no abort, no failing request. docs/models.md must say what is found."""
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(stock, folder)
        yield from llama_archs.check(runner, llama_archs.source_of(stock.bin), devices)
        made, written = llama_archs.verdicts(llama_archs.table(runner.outcomes, "")), llama_archs.verdicts(MODELS.read_text())
        differ = sorted(name for name in made.keys() | written.keys() if made.get(name) != written.get(name))
        yield not differ, "docs/models.md says of every architecture what was found" + (f", but of {differ}; run scripts/stock-tools models" if differ else "")


def write_models(stock):
    """Makes the table of docs/models.md anew."""
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(stock, folder)
        for passed, text in llama_archs.check(runner, llama_archs.source_of(stock.bin), llama_archs.EXACT):
            print("PASS" if passed else "FAIL", text, flush=True)
        version = re.search(r"version: (\S+).*commit (\w+)", runner.run("llama-bench", "--version")[1])
        pin = next(line.split()[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("llama-cpp-python=="))
        llama_archs.write(MODELS, llama_archs.table(runner.outcomes, f"llama.cpp {version[1]} (source of {pin.replace('==', ' ')})"))


def check_state_tests(stock):
    """States saved, restored and saved again; three sequences in one cache, the middle one restored into the gaps. test-save-load-state's last test turns
    flash attention off, which is refused when the context is made: it must be the only one that fails."""
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(stock, folder)
        for device in dict.fromkeys(("raw", stock.device)):
            code, log = runner.run("test-state-restore-fragmented", "-m", stock.model, "-dev", device, timeout=300)
            yield code == 0, f"test-state-restore-fragmented -dev {device}" + ("" if code == 0 else f": {code}, {llama_archs.cause_in(log)}")
            code, log = runner.run("test-save-load-state", "-m", stock.model, "-dev", device, "-p", "The quick brown fox", "-n", 16, "-c", 256, timeout=300)
            failed = [line.strip() for line in log.splitlines() if re.search(r"\bFAIL", line)]
            passed = code == 0 or (code > 0 and not failed and "-fa on" in log)
            yield passed, f"test-save-load-state -dev {device}" + (
                "" if code == 0 else ": all but the test without flash attention" if passed else f": {code}, {failed[:3] or llama_archs.cause_in(log)}")


def check_threads(stock):
    """Models and contexts on many threads at once."""
    with tempfile.TemporaryDirectory() as folder:
        code, log = Runner(stock, folder).run("test-thread-safety", "-m", stock.model, "-dev", stock.device, "-ngl", 99, "-p", "The meaning of life is",
                                              "-n", 64, "-c", 256, "-ub", 32, "-np", 4, "-t", 1, timeout=500)
        yield code == 0, f"test-thread-safety -dev {stock.device}" + ("" if code == 0 else f": {code}, {llama_archs.cause_in(log)}")
