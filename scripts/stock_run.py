"""llama.cpp's own tools, unmodified: builds them, and runs them with a device."""

import json
import os
import re
import shutil
import socket
import subprocess
import tarfile
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import llama_tests

ROOT = Path(__file__).resolve().parent.parent
STOCK = ROOT / ".stock"
TOOLS = ["llama-server", "llama-perplexity", "llama-bench", "llama-completion", "llama-cli"]
PLAIN = "none"  # -dev none: llama.cpp's own f16 cache
PROMPTS = [
    "The old lighthouse keeper climbed the stairs every evening, and on the last evening of the year he found",
    "A short history of bread begins with the grinding of grain between two stones. The first ovens",
    "When the train stopped between two stations, nobody in the carriage spoke. Then the conductor",
    "To build a small boat you need dry timber, a sharp plane and patience. First",
]


# Building


def build() -> int:
    pin = next(line.split()[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("llama-cpp-python=="))
    stamp, recipe = STOCK / "version", f"{pin} {' '.join(TOOLS + llama_tests.PROGRAMS)}"
    if stamp.exists() and stamp.read_text() == recipe:
        print(f"{STOCK / 'bin'}: tools of {pin} are there")
        return 0
    shutil.rmtree(STOCK, ignore_errors=True)
    STOCK.mkdir()
    python = ROOT / ".venv/bin/python"
    if not python.exists():
        subprocess.run([ROOT / "scripts/setup"], check=True)
    print(f"building llama.cpp's tools from the source distribution of {pin}; takes minutes")
    subprocess.run([python, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "-d", STOCK, pin],
                   check=True)
    with tarfile.open(next(STOCK.glob("*.tar.gz"))) as archive:
        archive.extractall(STOCK / "source", filter="data")
    source = next((STOCK / "source").glob("*/vendor/llama.cpp"))
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=ON", "-DLLAMA_BUILD_EXAMPLES=OFF",
               "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_BUILD_WEBUI=OFF"]
    subprocess.run(["cmake", "-G", "Ninja", "-S", source, "-B", STOCK / "build", *options], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", STOCK / "build", "--target", *TOOLS, *llama_tests.PROGRAMS], check=True)
    (STOCK / "bin").symlink_to("build/bin")
    stamp.write_text(recipe)
    return 0


# Running


class Stock:
    """The tools, the library and the model under test."""

    def __init__(self, args):
        self.bin, self.model, self.text, self.device = args.bin_dir, args.model, args.text, args.device
        self.threads, self.chunks, self.library = args.threads, args.chunks, args.backend
        self.env = {**os.environ, "GGML_BACKEND_PATH": str(args.backend)}
        self.env.pop("TURBOQUANT_KV", None)

    def command(self, tool, dev, *options):
        return [str(self.bin / tool), "-m", str(self.model), "-dev", dev, "-t", str(self.threads), *map(str, options)]

    def run(self, tool, dev, *options):
        """(stdout, stderr) of a tool; RuntimeError with the end of its log if it fails."""
        result = subprocess.run(self.command(tool, dev, *options), env=self.env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if result.returncode != 0:
            raise RuntimeError(f"{tool} -dev {dev} ended with {result.returncode}:\n" + (result.stderr or result.stdout)[-2000:])
        return result.stdout, result.stderr

    def perplexity(self, dev, text, n_ctx, chunks):
        """(perplexity, MiB of all KV buffers)."""
        out, err = self.run("llama-perplexity", dev, "-f", text, "-c", n_ctx, "--chunks", chunks, "-lv", 4)
        log = out + err
        return float(re.search(r"Final estimate: PPL = ([\d.]+)", log)[1]), sum(map(float, re.findall(r"KV buffer size = +([\d.]+) MiB", log)))

    @contextmanager
    def server(self, dev, *options):
        """A llama-server; gives a function request(path, body) -> answer."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        with tempfile.TemporaryFile("w+") as log:
            command = self.command("llama-server", dev, "--host", "127.0.0.1", "--port", port, *options)
            process = subprocess.Popen(command, env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

            def fail(why):
                log.seek(0)
                raise RuntimeError(f"llama-server -dev {dev}: {why}\n" + log.read()[-2000:])

            def request(path, body=None):
                data = None if body is None else json.dumps(body).encode()
                call = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
                try:
                    with urllib.request.urlopen(call, timeout=600) as answer:
                        return json.load(answer)
                except OSError as error:
                    if path != "/health":
                        fail(f"{path}: {error}")
                    return {}

            def read_log():
                log.seek(0)
                return log.read()

            request.log = read_log
            try:
                deadline = time.time() + 120
                while request("/health").get("status") != "ok":
                    if process.poll() is not None or time.time() > deadline:
                        fail("did not start")
                    time.sleep(0.1)
                yield request
            finally:
                process.terminate()
                process.wait(60)


def complete(request, prompt, n, **more):
    """Greedy completion of a text or of token ids, end-of-text tokens ignored."""
    body = {"prompt": prompt, "n_predict": n, "temperature": 0, "return_tokens": True, "ignore_eos": True, **more}
    return request("/completion", body)


def common(a, b):
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
