#!/usr/bin/env python3
"""Holds the direction of includes: a file may include its own layer and lower ones only, inside a layer no arrow runs back (x.h and x.cpp are
one), and the core (all below ggml) knows neither ggml nor llama.cpp. A test includes its own layer and lower ones, and helpers of those
layers' tests. Every source, of tests and benchmarks too, is named in its folder's CMakeLists.txt. Files over 400 lines
get a warning. usage: check_layers.py [ROOT]"""

import re
import sys
from fnmatch import fnmatch
from pathlib import Path

# Lowest first. Layers in one row do not include each other.
ROWS = [["codec"], ["spec"], ["attention", "planner"], ["kernels"], ["cuda"], ["cache"], ["ggml"], ["llama"], ["measure"], ["cli"]]
RANK = {layer: rank for rank, row in enumerate(ROWS) for layer in row}
CORE_RANK = RANK["cache"]
# Tests above all layers: whole programs, and the installed package.
TEST_RANK = RANK | dict.fromkeys(("stock", "package", "data"), RANK["cli"]) | {"host": RANK["llama"]}
FOREIGN = re.compile(r"(ggml|gguf|llama)[-\w]*\.h$")
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]')
SOURCES = (".h", ".cpp", ".inc", ".cu", ".cuh")
MAX_LINES = 400


def includes(path: Path):
    """(line number, header, quoted) of every include."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if match := INCLUDE.match(line):
            yield number, match[1], '"' in line


def layer_problems(path: Path, layer: str) -> list[str]:
    found = []
    for number, header, quoted in includes(path):
        where = f"{path}:{number}: {layer} includes {header}"
        parts = header.split("/")
        if parts[0] == "turboquant":
            if len(parts) < 3 or parts[1] not in RANK:
                found.append(f"{where}: not a known layer")
            elif parts[1] != layer and RANK[parts[1]] >= RANK[layer]:
                found.append(f"{where}: a layer may include lower ones only")
        elif RANK[layer] <= CORE_RANK and FOREIGN.search(header):
            found.append(f"{where}: the core must not know ggml or llama.cpp")
        elif quoted and (path.parent / header).exists():
            found.append(f'{where}: write "turboquant/{layer}/{header}"')
    return found


def test_problems(path: Path, root: Path) -> list[str]:
    layer = path.relative_to(root / "tests").parts[0]
    if layer not in TEST_RANK:
        return [f"{path}: tests of '{layer}', which is no layer"]
    found = []
    for number, header, _ in includes(path):
        parts = header.split("/")
        other = parts[1] if parts[0] in ("turboquant", "tests") and len(parts) > 2 else None
        if other and (other not in TEST_RANK or (other != layer and TEST_RANK[other] >= TEST_RANK[layer])):
            found.append(f"{path}:{number}: tests of {layer} include {header}: they may include lower layers only")
    return found


def circles(files: list[Path], root: Path) -> list[str]:
    """Files that include each other in a circle; x.h and x.cpp count as one."""
    graph: dict[str, set[str]] = {}
    for path in files:
        unit = str(path.relative_to(root / "turboquant").with_suffix(""))
        for _, header, _ in includes(path):
            target = header.removeprefix("turboquant/").rsplit(".", 1)[0]
            if header.startswith("turboquant/") and target != unit:
                graph.setdefault(unit, set()).add(target)
    found, state = [], {}

    def visit(name: str, trail: list[str]) -> None:
        state[name] = "open"
        for target in sorted(graph.get(name, ())):
            if state.get(target) == "open":
                found.append("arrow back: " + " -> ".join([*trail[trail.index(target):], target]))
            elif target not in state:
                visit(target, [*trail, target])
        state[name] = "done"

    for name in sorted(graph):
        if name not in state:
            visit(name, [name])
    return found


def built_patterns(folder: Path, root: Path) -> list[str]:
    """Names and patterns of sources in a folder's CMakeLists.txt, relative to the folder; tests have a second list in cmake/."""
    text = (folder / "CMakeLists.txt").read_text()
    more = root / "cmake" / "TqProjectTests.cmake"
    if folder == root / "tests" and more.exists():
        text += more.read_text()
    words = [w for w in re.split(r"[\s()]+", text) if w.endswith((".cpp", ".cu")) and "$" not in w]
    return words + [f"{layer}/*.cpp" for layer in re.findall(r"\btq_test\((\w+)", text)]


def orphans(files: list[Path], root: Path) -> list[str]:
    """Sources that no CMakeLists.txt names: nobody builds them, and tests in them never run."""
    found = []
    for path in files:
        if path.suffix not in (".cpp", ".cu"):
            continue
        folder = next((p for p in path.parents if (p / "CMakeLists.txt").exists()), None)
        if not folder or not any(fnmatch(str(path.relative_to(folder)), pattern) for pattern in built_patterns(folder, root)):
            found.append(f"{path}: named in no CMakeLists.txt, so nobody builds it")
    return found


def main() -> int:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
    files = sorted(p for p in (root / "turboquant").rglob("*") if p.suffix in SOURCES)
    outside = [p for folder in ("tests", "bench") for p in sorted((root / folder).rglob("*")) if p.suffix in SOURCES]
    old = root / "tests" / "data"  # of earlier releases, with the programs that made it: not built
    outside = [p for p in outside if old not in p.parents]
    problems = circles(files, root) + orphans(files + outside, root)
    for path in files:
        layer = path.relative_to(root / "turboquant").parts[0]
        if layer not in RANK:
            problems.append(f"{path}: '{layer}' is no layer; add it to ROWS in scripts/check_layers.py")
            continue
        problems += layer_problems(path, layer)
        if (n := len(path.read_text().splitlines())) > MAX_LINES:
            print(f"warning: {path} has {n} lines, more than {MAX_LINES}")
    for path in outside:
        if path.is_relative_to(root / "tests"):
            problems += test_problems(path, root)
    print("\n".join(problems) or f"{len(files)} files keep to the layers")
    return 1 if problems or not files else 0


if __name__ == "__main__":
    sys.exit(main())
