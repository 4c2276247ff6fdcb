#!/usr/bin/env python3
"""Runs the commands of README.md as they stand, and checks their effect: that the cache is compressed, by what they print about it.

    scripts/check_readme.py [--build build] [--python .venv/bin/python]     what takes seconds (a test of the project)
    scripts/check_readme.py --tools .stock/bin                              the others: llama.cpp's own tools, and what takes minutes
                                                                            (scripts/stock-tools check does this)

They run in a folder that looks like a clone: model.gguf is models/demo.gguf, text.txt is made of the project's own documents. A command that no rule
here knows fails, so a new one needs a check of its effect. Exit status 1 if one fails, 77 if nothing could run."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INLINE = re.compile(r"`((?:make [a-z]+|scripts/[\w.-]+|TURBOQUANT_KV=[^\s`]+)[^`]*)`")
TIMEOUT = 1800


@dataclass
class Command:
    line: int  # in README.md
    text: str
    language: str  # sh or python
    exports: list = field(default_factory=list)  # lines of the same block that set what it needs


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def all(self):
        return self.out + self.err


def commands_of(markdown: str) -> list:
    """Every command of the fenced blocks and of the indented ones, whole Python blocks, and commands between backticks in the text."""
    commands, exports, python, fence = [], [], None, None
    for number, line in enumerate(markdown.splitlines(), 1):
        if line.startswith("```"):
            if fence == "python":
                commands.append(Command(python[0], "\n".join(python[1]), "python"))
            fence = None if fence is not None else line[3:].strip()
            exports, python = [], (number, [])
        elif fence == "python":
            python[1].append(line)
        elif fence is not None or (line.startswith("    ") and re.match(r" {4}(export|turboquant|llama-\w+|make|scripts/)", line)):
            text = re.sub(r"(^|\s)#.*", "", line).strip()
            if text.startswith("export "):
                exports.append(text)
            elif text:
                commands.append(Command(number, text, "sh", list(exports)))
        else:
            commands += [Command(number, text, "sh") for text in INLINE.findall(line)]
    return commands


class Workspace:
    """A folder that looks like a clone of the project that was built."""

    def __init__(self, folder: Path, args):
        self.folder, self.args = folder, args
        for entry in ROOT.iterdir():
            if entry.name not in (".git", "build", "README.md"):
                (folder / entry.name).symlink_to(entry)
        (folder / "build").symlink_to(args.build.resolve())
        for name in ("model.gguf", "qwen2.5-coder-1.5b.gguf"):
            (folder / name).symlink_to(ROOT / "models/demo.gguf")
        text = "\n\n".join(re.sub(r"[|`*#]+", " ", p.read_text()) for p in sorted((ROOT / "docs").glob("*.md")))
        for name in ("text.txt", "eval.txt"):
            (folder / name).write_text(text[:15000])  # two chunks of 2048 tokens
        layers = [{"layer": i, "k": "tcq4", "v": "tcq2"} for i in range(6)]
        (folder / "plan.json").write_text(json.dumps({"turboquant_plan": 1, "model": {"hash": "0", "name": "demo"}, "layers": layers}))
        path = [str(args.build.resolve() / "bin")] + ([str(args.tools.resolve())] if args.tools else [])
        self.env = {**os.environ, "PATH": os.pathsep.join(path + [os.environ["PATH"]]), "OMP_WAIT_POLICY": "passive"}
        for name in ("GGML_BACKEND_PATH", "TURBOQUANT_KV"):
            self.env.pop(name, None)

    def run(self, text, exports=(), env=()):
        script = "\n".join([*exports, text])
        done = subprocess.run(["bash", "-c", script], cwd=self.folder, env={**self.env, **dict(env)}, capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, timeout=TIMEOUT, errors="replace")
        return Result(done.returncode, done.stdout, done.stderr)

    def run_python(self, code, env=()):
        done = subprocess.run([self.args.python, "-c", code], cwd=self.folder, env={**self.env, **dict(env)}, capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, timeout=TIMEOUT, errors="replace")
        return Result(done.returncode, done.stdout, done.stderr)

    @contextmanager
    def serve(self, command):
        """A server as typed; yields a function that gives its log so far."""
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(["bash", "-c", "\n".join([*command.exports, "exec " + command.text])], cwd=self.folder, env=self.env,
                                       stdout=log, stderr=log, stdin=subprocess.DEVNULL)

            def text():
                log.seek(0)
                return log.read()

            try:
                yield process, text
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(60)


# Effects: each gives "" or what is wrong, and a few words about what was seen.


def is_budget(kv: str) -> bool:
    """auto:B, or plan-B.json: at most B bits, and not much less."""
    return kv.startswith(("auto:", "plan-"))


def code_bits(kv: str) -> float:
    """Bits of the codes of a format word; of a budget the least that it may come to."""
    if is_budget(kv):
        return float(kv[5:].removesuffix(".json")) - 0.4
    if kv == "f16" or kv == "raw":
        return 16
    return {"q8_0": 8.5, "q4_0": 4.5}.get(kv) or int(kv[-1])


def wrong_bits(kv: str, bits: float) -> str:
    low, high = code_bits(kv), code_bits(kv) + (0.4 if is_budget(kv) else 0.45)
    return "" if low <= bits <= high else f"{kv} has {bits} bits a value, outside of {low} to {high}"


def kv_words(text: str) -> list:
    """What stands after --kv."""
    words, at = text.split(), None
    for i, w in enumerate(words):
        if w == "--kv":
            at = i + 1
    return [] if at is None else [w for w in words[at:] if not w.startswith("-")] if "--tokens" not in text else words[at:words.index("--tokens")]


def announced(log: str, kv=None):
    """The line that the library logs about a cache it holds: ("" or what is wrong, the line)."""
    lines = re.findall(r"KV cache of \d+ layers.*", log)
    if not lines:
        return "the log has no line about a compressed cache", log[-1500:]
    bits, keys = re.search(r"([\d.]+) bits a value", lines[0]), re.search(r"keys ([a-z0-9]+)", lines[0])
    if not bits or not float(bits[1]) < 6:
        return "the cache is not compressed", lines[0]
    if kv and not (keys and keys[1] == kv) and not (kv.startswith("auto") and f"auto:{kv[4:]}.25" in lines[0]):
        return f"the keys are not in {kv}", lines[0]
    return "", lines[0]


def check_run(_, command, result):
    found = re.search(r"kv cache: +(\S+) .*?([\d.]+) of f16, ([\d.]+) bits/value", result.err)
    if not found or not result.out.strip():
        return "no text, or no line about the cache", result.all[-500:]
    return wrong_bits(found[1], float(found[3])), found[0]


def check_table(_, command, result):
    """A table whose first columns are kv and bits/value."""
    rows = {w[0]: w for w in (line.replace("|", " ").split() for line in result.out.splitlines()) if len(w) > 2}
    for kv in kv_words(command.text):
        if kv not in rows:
            return f"no row for {kv}", result.all[-500:]
        if problem := wrong_bits(kv, float(rows[kv][1])):
            return problem, result.out
    return "", "; ".join(f"{kv} {rows[kv][1]} bits, {rows[kv][2]} MiB" for kv in kv_words(command.text))


def check_plan(workspace, command, _):
    """The file holds formats for every layer, and takes what was asked for."""
    budget, name = re.search(r"--bits (\S+) -o (\S+)", command.text).groups()
    plan = json.loads((workspace.folder / name).read_text())
    bits = plan.get("bits_per_value", 0)
    ok = len(plan["layers"]) == 6 and float(budget) - 0.3 < bits <= float(budget)
    return ("" if ok else f"no plan of 6 layers within {budget} bits"), f"{len(plan['layers'])} layers, {bits} bits"


def check_needle(_, command, result):
    if "keys turbo3, values turbo3" not in result.err:
        return "the configuration does not name turbo3", result.all[-500:]
    rows = [line for line in result.out.splitlines() if re.match(r"\W*(f16|turbo3)\b", line)]
    return ("" if len(rows) >= 2 else "no rows for f16 and turbo3"), "; ".join(rows)[:200]


def check_inspect(_, command, result):
    layers = re.findall(r"(?m)^\W*(\d+)\s+[\d.]+", result.out)
    return ("" if {"0", "5"} <= set(layers) else "no table of 6 layers"), f"{len(layers)} layers"


def check_report(workspace, command, result):
    page = workspace.folder / command.text.split()[-1]
    text = page.read_text() if page.exists() else ""
    ok = "<svg" in text and "turbo4" in text and "bits" in text
    return ("" if ok else "no page with pictures of turbo4"), f"{len(text) >> 10} KiB"


def check_bench(_, command, result):
    rows = [line.replace("|", " ").split() for line in result.out.splitlines()]
    seen = {w for row in rows for w in row[:3]}
    missing = [kv for kv in kv_words(command.text) if kv not in seen]
    return (f"no rows for {missing}" if missing else ""), f"{len(rows)} lines"


def check_demo(workspace, command, _):
    """What `make demo` runs at its end, and that it runs that."""
    dry = workspace.run("make -n demo")
    if "scripts/demo" not in dry.out:
        return "make demo does not run scripts/demo", dry.all[-500:]
    result = workspace.run("scripts/demo build")
    if result.code:
        return f"scripts/demo ended with {result.code}", result.all[-800:]
    return check_table(workspace, Command(0, "--kv f16 q8_0 q4_0 turbo4 turbo3 turbo2", "sh"), Result(0, result.out, ""))


def dry(word):
    """For what a test cannot run as it runs in it, or would change the system: make knows it and it would run `word`."""

    def check(workspace, command, _):
        result = workspace.run(command.text.replace("make ", "make -n ", 1))
        return ("" if result.code == 0 and word in result.out else f"make would not run {word}"), f"would run {word}"

    return check


def check_variable(workspace, command, _):
    if not workspace.args.python:
        return None, "no Python with llama_cpp"
    name, value = command.text.split("=", 1)
    blocks = [c for c in commands_of((ROOT / "README.md").read_text()) if c.language == "python"]
    result = workspace.run_python(blocks[0].text, {name: value})
    return announced(result.err)


def check_server(workspace, command, _):
    with workspace.serve(command) as (process, log):
        deadline = time.time() + 120
        while "listening" not in log() and process.poll() is None and time.time() < deadline:
            time.sleep(0.2)
        text = log()
    return announced(text, re.search(r"-dev (\S+)", command.text)[1]) if "listening" in text else ("does not start", text[-800:])


def check_tool(_, command, result):
    if "perplexity" in command.text and "Final estimate: PPL" not in result.all:
        return "no perplexity", result.all[-500:]
    return announced(result.all, re.search(r"-dev (\S+)", command.text)[1])


def check_cli(workspace, command, _):
    """llama-cli shows errors only, unless it is asked for warnings."""
    result = workspace.run(command.text, command.exports, {"LLAMA_ARG_LOG_VERBOSITY": "2"})
    return check_tool(workspace, command, result) if result.code == 0 else (f"ended with {result.code}", result.all[-1500:])


ELSEWHERE = "runs by hand"
# What a command must match, where it runs ("tools": with --tools), whether the check runs it itself, and the check.
RULES = [
    (r"make demo$", "tools", True, check_demo),
    (r"make test$", "here", True, dry("scripts/test")),
    (r"make test-gpu", "here", True, dry("scripts/test-gpu")),
    (r"make build (LLAMA_PREFIX|CUDA)=", "here", True, dry("cmake --build")),
    (r"make build$", "here", True, dry("cmake --build")),
    (r"make install PREFIX=", "here", True, dry("cmake --install")),
    (r"scripts/(stock-tools|ggml-range|fetch-models|check_readme)", ELSEWHERE, False, None),
    (r"TURBOQUANT_KV=", "here", True, check_variable),
    (r"(build/bin/)?turboquant run ", "here", False, check_run),
    (r"(build/bin/)?turboquant plan ", "tools", False, check_plan),
    (r"(build/bin/)?turboquant eval .*plan-", "tools", False, check_table),
    (r"(build/bin/)?turboquant eval ", "here", False, check_table),
    (r"(build/bin/)?turboquant needle ", "tools", False, check_needle),
    (r"(build/bin/)?turboquant inspect ", "tools", False, check_inspect),
    (r"(build/bin/)?turboquant report ", "tools", False, check_report),
    (r"(build/bin/)?turboquant bench ", "here", False, check_bench),
    (r"llama-server ", "tools", True, check_server),
    (r"llama-cli ", "tools", True, check_cli),
    (r"llama-perplexity ", "tools", False, check_tool),
]


def check(workspace, command, kind):
    """(True, False or None for not run here, text)."""
    if command.language == "python":
        if kind == "tools":
            return None, "a Python block"
        if not workspace.args.python:
            return None, "no Python with llama_cpp"
        result = workspace.run_python(command.text)
        problem, seen = announced(result.err) if result.code == 0 else (f"ended with {result.code}", result.all[-1500:])
        return not problem, problem + ": " + seen if problem else seen
    for pattern, where, runs_itself, rule in RULES:
        if not re.match(pattern, command.text):
            continue
        if where != kind:
            return None, where if where == ELSEWHERE else "runs with --tools" if where == "tools" else "runs without --tools"
        result = None
        if not runs_itself:
            result = workspace.run(command.text, command.exports)
            if result.code:
                return False, f"ended with {result.code}: {result.all[-1500:]}"
        problem, seen = rule(workspace, command, result)
        return (None, seen) if problem is None else (not problem, f"{problem}: {seen}" if problem else seen)
    return False, "no rule knows this command: add one to RULES in scripts/check_readme.py, with a check of its effect"


def results(args):
    """(passed or None, text) of each command; args as main parses them."""
    kind = "tools" if args.tools else "here"
    with tempfile.TemporaryDirectory(prefix="turboquant-readme-") as folder:
        workspace, seen_texts = Workspace(Path(folder), args), set()
        for command in commands_of((ROOT / "README.md").read_text()):
            if (args.only and not re.search(args.only, command.text)) or command.text in seen_texts:
                continue
            seen_texts.add(command.text)
            start = time.time()
            try:
                passed, seen = check(workspace, command, kind)
            except (subprocess.TimeoutExpired, OSError, ValueError, KeyError, TypeError, IndexError) as error:
                passed, seen = False, f"{type(error).__name__}: {error}"
            first = command.text.splitlines()[0] + (" ..." if "\n" in command.text else "")
            yield passed, f"README.md:{command.line}: {first}\n         {seen} ({time.time() - start:.0f} s)"


def options(build=ROOT / "build", python=ROOT / ".venv/bin/python", tools=None, only=None):
    return argparse.Namespace(build=build, python=python, tools=tools, only=only)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build")
    parser.add_argument("--python", default=ROOT / ".venv/bin/python", help="a Python with llama_cpp")
    parser.add_argument("--tools", type=Path, help="folder of llama.cpp's tools")
    parser.add_argument("--only", help="commands that match this regular expression")
    args = parser.parse_args()
    if subprocess.run([args.python, "-c", "import llama_cpp"], capture_output=True).returncode if shutil.which(str(args.python)) else True:
        print("no Python with llama_cpp: Python blocks do not run")
        args.python = None
    counts = {True: 0, False: 0, None: 0}
    for passed, text in results(args):
        counts[passed] += 1
        print({True: "PASS", False: "FAIL", None: "left"}[passed], text, flush=True)
    print(f"{counts[True]} passed, {counts[False]} failed, {counts[None]} left to others")
    return 1 if counts[False] else 0 if counts[True] else 77


if __name__ == "__main__":
    sys.exit(main())
