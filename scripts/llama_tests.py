"""llama.cpp's own tests over a device of ours, for scripts/stock-tools: they come with its source and are built beside its tools.

Each check yields (passed, text). `stock` is scripts/stock-tools' Stock: bin (folder of the programs), model, env, device."""

import os
import re
import signal
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ["test-llama-archs", "test-save-load-state", "test-state-restore-fragmented", "test-thread-safety"]
# Architectures whose cache cannot be compressed: refused by name when the context is made. docs/models.md says why.
REFUSED = {"t5", "grok", "qwen4exp", "deepseek4"}


def source_of(bin_dir: Path) -> Path:
    """llama.cpp's source, as the build folder remembers it."""
    cache = (bin_dir.resolve().parent / "CMakeCache.txt").read_text()
    return Path(re.search(r"(?m)^CMAKE_HOME_DIRECTORY:INTERNAL=(.+)$", cache)[1])


def architectures(source: Path) -> list:
    table = re.search(r"LLM_ARCH_NAMES = \{(.*?)\};", (source / "src/llama-arch.cpp").read_text(), re.S)[1]
    return re.findall(r'"([^"]+)"', table)


class Runner:
    """Runs the programs with the library loaded before main."""

    def __init__(self, stock, folder):
        self.stock = stock
        self.preload = Path(folder) / "load_backend.so"
        subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", ROOT / "tests/stock/load_backend.c", "-o", self.preload,
                        f"-L{stock.bin}", "-lggml", f"-Wl,-rpath,{Path(stock.bin).resolve()}"], check=True)

    def run(self, program, *options, timeout=120):
        """(exit code, negative for a signal, None for too long; output without colours)."""
        env = {**self.stock.env, "LD_PRELOAD": str(self.preload), "OMP_WAIT_POLICY": "passive"}
        command = [str(self.stock.bin / program), *map(str, options)]
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", timeout=timeout, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            return None, ""
        return done.returncode, re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)


def cause_in(log: str) -> str:
    """The first line of a log that says what went wrong."""
    lines = [line for line in log.splitlines() if re.search(r"turboquant: |cannot run the operation|FAIL|error:|NMSE", line)]
    lines = [line for line in lines if "KV cache formats" not in line and "KV cache of" not in line]
    return lines[0].strip()[:200] if lines else log[-200:].strip()


def check_archs(stock, devices=("raw", "turbo8", "turbo4", "tcq3")):
    """test-llama-archs makes a tiny model of every architecture and compares a device with the CPU: `raw` and turbo8 must give the CPU's logits within
    the test's own bound. The others cannot, so of them it is asked that every architecture decodes: no abort, no failing request."""
    with tempfile.TemporaryDirectory() as folder:
        runner, names = Runner(stock, folder), architectures(source_of(stock.bin))
        for device in devices:
            exact, passed, refused, failed = device in ("raw", "turbo8"), 0, [], []
            for name in names:
                code, log = runner.run("test-llama-archs", "-a", f"^{re.escape(name)}$", "-b", device, "-s", 1)
                if code == 0 and not re.search(r"(OK|FAIL).* \([0-9]", log):
                    continue  # the test skips it
                ended = code is not None and code >= 0
                # A row of the test's table: difference to the CPU's logits, and whether the saved model gives the same ones, bit for bit.
                rows = re.findall(r"\((\d\.\d+e[-+]\d+)\)\|\s*(\w+)", log)
                decoded = bool(rows) and all(roundtrip != "FAIL" for _, roundtrip in rows) and "runtime error" not in log
                if code == 0 or (ended and not exact and decoded):
                    passed += 1
                elif ended and name in REFUSED and "turboquant: " in log:
                    refused.append(name)
                else:
                    how = "too long" if code is None else signal.Signals(-code).name if code < 0 else f"exit {code}"
                    failed.append(f"{name} ({how}): {cause_in(log)}")
            yield not failed and passed > 80, f"test-llama-archs -b {device}: {passed} architectures pass, refused by name: {refused or 'none'}" + "".join(
                f"\n         {line}" for line in failed)


def check_state_tests(stock):
    """States saved, restored and saved again; three sequences in one cache, the middle one restored into the gaps. test-save-load-state's last test turns
    flash attention off, which is refused when the context is made: it must be the only one that fails."""
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(stock, folder)
        for device in dict.fromkeys(("raw", stock.device)):
            code, log = runner.run("test-state-restore-fragmented", "-m", stock.model, "-dev", device, timeout=300)
            yield code == 0, f"test-state-restore-fragmented -dev {device}" + ("" if code == 0 else f": {code}, {cause_in(log)}")
            code, log = runner.run("test-save-load-state", "-m", stock.model, "-dev", device, "-p", "The quick brown fox", "-n", 16, "-c", 256, timeout=300)
            failed = [line.strip() for line in log.splitlines() if re.search(r"\bFAIL", line)]
            passed = code == 0 or (code > 0 and not failed and "-fa on" in log)
            yield passed, f"test-save-load-state -dev {device}" + (
                "" if code == 0 else ": all but the test without flash attention" if passed else f": {code}, {failed[:3] or cause_in(log)}")


def check_threads(stock):
    """Models and contexts on many threads at once."""
    with tempfile.TemporaryDirectory() as folder:
        code, log = Runner(stock, folder).run("test-thread-safety", "-m", stock.model, "-dev", stock.device, "-ngl", 99, "-p", "The meaning of life is",
                                              "-n", 64, "-c", 256, "-ub", 32, "-np", 4, "-t", 1, timeout=500)
        yield code == 0, f"test-thread-safety -dev {stock.device}" + ("" if code == 0 else f": {code}, {cause_in(log)}")
