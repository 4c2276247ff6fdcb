"""llama.cpp's test-llama-archs over devices of ours: a tiny model of every architecture, its logits beside the CPU's. Reads what the test prints, and
writes the table of docs/models.md from it."""

import re
import signal
from dataclasses import dataclass, field
from pathlib import Path

BEGIN, END = "<!-- made by scripts/stock-tools models: begin -->", "<!-- end -->"
EXACT = ("raw", "turbo8")  # devices whose logits must be the CPU's within the test's own bound, 1e-4 (NMSE)
# Architectures whose cache cannot be compressed: refused, with the cause, when the context is made.
REFUSED = {"grok"}
# Architectures that llama.cpp's test leaves out, by what their memory is in llama.cpp.
NO_CACHE = {"bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3", "eurobert", "t5encoder", "gemma-embedding",
            "llama-embed", "wavtokenizer-dec", "clip"}
RECURRENT = {"rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"}
OTHERS = {"gemma4": "not in llama.cpp's test; works: [tests/ggml](../tests/ggml/architectures_test.cpp) has a tiny model",
          "gptj": "llama.cpp itself has no graph for it", "chameleon": "not in llama.cpp's test", "plm": "not in llama.cpp's test",
          "gemma4-assistant": "not in llama.cpp's test (a draft model over gemma4's cache)", "graniteswitch": "not in llama.cpp's test",
          "deepseek2-ocr": "not in llama.cpp's test", "eagle3": "not in llama.cpp's test (a draft model)", "dflash": "not in llama.cpp's test (a draft model)"}


def source_of(bin_dir: Path) -> Path:
    """llama.cpp's source, as the build folder remembers it."""
    cache = (bin_dir.resolve().parent / "CMakeCache.txt").read_text()
    return Path(re.search(r"(?m)^CMAKE_HOME_DIRECTORY:INTERNAL=(.+)$", cache)[1])


def architectures(source: Path) -> list:
    table = re.search(r"LLM_ARCH_NAMES = \{(.*?)\};", (source / "src/llama-arch.cpp").read_text(), re.S)[1]
    return [name for name in re.findall(r'"([^"]+)"', table) if name != "(unknown)"]


def cause_in(log: str) -> str:
    """The first line of a log that says what went wrong, one of ours before all others."""
    lines = [line.strip() for line in log.splitlines() if not re.search("KV cache formats|KV cache of|state of layers|NMSE vs. CPU", line)]
    found = [line for pattern in ("turboquant: ", "cannot run the operation|FAIL|error:|NMSE", ".") for line in lines if re.search(pattern, line)]
    return found[0][:300] if found else ""


@dataclass
class Outcome:
    """Of one architecture on one device."""

    verdict: str  # pass, lossy (decodes, beyond the test's bound), refused, fail, skipped
    cause: str = ""  # of refused and fail
    nmse: float = 0  # largest of its configurations (dense, MoE)
    plain: list = field(default_factory=list)  # names of layers' state that stays as it is
    compressed: bool = False  # there is a KV cache


def run(runner, name: str, device: str) -> Outcome:
    """`runner` is llama_tests.Runner."""
    for _ in range(4):
        code, log = runner.run("test-llama-archs", "-a", f"^{re.escape(name)}$", "-b", device, "-s", 1, "-v", 4)
        # The program does not wait for its log when it gives up: on a busy machine the last lines are lost at times.
        if name not in REFUSED or code in (0, None) or "turboquant: " in cause_in(log):
            break
    # A row of the test's table ends with the difference to the CPU's logits, and whether the saved model gives the same ones, bit for bit.
    rows = re.findall(r"(\(toggle\) +)?\((\d\.\d+e[-+]\d+)\)\| *(OK|FAIL|SKIP)", log)
    if code == 0 and not rows and "Summary: no tests executed" in log:
        return Outcome("skipped")
    plain = re.findall(r"that is no KV cache is not compressed: (.*?) \([0-9.]+ MiB\)", log)
    out = Outcome("fail", cause_in(log), max((float(nmse) for _, nmse, _ in rows), default=0), sorted({n for names in plain for n in names.split(", ")}),
                  "turboquant: " + device + ": KV cache of" in log)
    decoded = bool(rows) and all(not toggle and roundtrip != "FAIL" for toggle, _, roundtrip in rows)
    if decoded and code in (0, 1):
        out.verdict, out.cause = "pass" if code == 0 else "lossy", ""
    elif name in REFUSED and code is not None and code > 0 and "turboquant: " in out.cause:
        out.verdict, out.cause = "refused", out.cause[out.cause.find("turboquant: ") + len("turboquant: "):]
    else:
        how = "too long" if code is None else signal.Signals(-code).name if code < 0 else f"exit {code}"
        out.cause = f"{how}: {out.cause}"
    return out


def check(runner, source: Path, devices):
    """Yields (passed, text) per device; fills runner.outcomes[device][name]."""
    runner.outcomes = {}
    for device in devices:
        all_of = runner.outcomes[device] = {name: run(runner, name, device) for name in architectures(source)}
        failed = [f"{name}: {o.cause or f'NMSE {o.nmse:.1e}'}" for name, o in all_of.items()
                  if o.verdict == "fail" or (o.verdict == "lossy" and device in EXACT)]
        n = {v: sum(o.verdict == v for o in all_of.values()) for v in ("pass", "lossy", "skipped")}
        refused = [name for name, o in all_of.items() if o.verdict == "refused"]
        yield not failed and n["pass"] + n["lossy"] > 80, (
            f"test-llama-archs -b {device}: {n['pass']} architectures pass" + (f", {n['lossy']} decode with a larger error" if n["lossy"] else "") +
            f"; refused by name: {', '.join(refused) or 'none'}; not in the test: {n['skipped']}" + "".join(f"\n         {line}" for line in failed))


def row(name: str, raw: Outcome, turbo8: Outcome) -> str:
    def cells(verdict, numbers=("", "")):
        return f"| {name} | {verdict} | {numbers[0]} | {numbers[1]} |"

    if raw.verdict == "skipped":
        return cells("no KV cache" if name in NO_CACHE else "recurrent state only, no KV cache" if name in RECURRENT else OTHERS.get(name, "not in the test"))
    if raw.verdict == "refused":
        return cells(f"**refused**: {raw.cause}")
    numbers = (f"{raw.nmse:.0e}", f"{turbo8.nmse:.0e}")
    if raw.verdict == "fail" or turbo8.verdict in ("fail", "lossy"):
        return cells(f"**fails**: {raw.cause or turbo8.cause or 'beyond the bound'}", numbers)
    if not raw.compressed:
        return cells("no KV cache" + (f"; {', '.join(raw.plain)} as llama.cpp keeps it" if raw.plain else ""), numbers)
    return cells(f"in part: {', '.join(raw.plain)} as llama.cpp keeps it" if raw.plain else "works", numbers)


def verdict_of(line: str) -> str:
    """The first word of a row's verdict."""
    return re.sub(r"[^a-z].*", "", line.split("|")[2].strip(" *"))


def table(outcomes, version: str) -> str:
    raw, turbo8 = outcomes["raw"], outcomes["turbo8"]
    lines = [row(name, raw[name], turbo8[name]) for name in sorted(raw)]
    count = {word: sum(verdict_of(line) == word for line in lines) for word in ("works", "in", "refused", "fails", "no", "recurrent")}
    rest = len(lines) - sum(count.values())
    head = (f"{version}: {len(lines)} architectures. {count['works']} work, {count['in']} in part, {count['no'] + count['recurrent']} have no KV cache, "
            f"{count['refused']} refused, {count['fails']} fail, {rest} are not in llama.cpp's test.")
    return "\n".join([head, "", "| architecture | its cache | raw | turbo8 |", "|---|---|---|---|", *lines])


def write(path: Path, text: str):
    """Replaces what is between the marks of a document."""
    document = path.read_text()
    at, end = document.index(BEGIN) + len(BEGIN), document.index(END)
    path.write_text(document[:at] + "\n" + text + "\n" + document[end:])


def verdicts(text: str) -> dict:
    """The rows of the table in a text, of a document those between its marks: architecture -> first word of its verdict."""
    if BEGIN in text:
        text = text[text.index(BEGIN) : text.index(END)]
    lines = [line for line in text.splitlines() if re.fullmatch(r"\|([^|]*\|){4}", line) and "architecture |" not in line and not line.startswith("|--")]
    return {line.split("|")[1].strip(): verdict_of(line) for line in lines}
