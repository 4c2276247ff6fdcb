#!/usr/bin/env python3
"""scripts/check_layers.py finds what it is there for: a small tree that keeps to the layers, and one fault in it at a time."""

import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

CHECK = Path(__file__).resolve().parents[2] / "scripts" / "check_layers.py"
GOOD = {
    "turboquant/codec/CMakeLists.txt": "target_sources(t PRIVATE a.cpp)",
    "turboquant/codec/a.h": "#include <vector>\n",
    "turboquant/codec/a.cpp": '#include "turboquant/codec/a.h"\n#include "turboquant/codec/b.h"\n',
    "turboquant/codec/b.h": "",
    "turboquant/kernels/CMakeLists.txt": "tq_kernel_level(k.cpp -mavx2)",
    "turboquant/kernels/k.cpp": '#include "turboquant/codec/a.h"\n',
    "turboquant/ggml/CMakeLists.txt": "",
    "turboquant/ggml/x.h": '#include "ggml.h"\n#include "turboquant/kernels/k.h"\n',
    "tests/CMakeLists.txt": "tq_test(codec)\ntq_test(kernels)\nadd_executable(g ggml/*_test.cpp)",
    "tests/codec/a_test.cpp": '#include "turboquant/codec/a.h"\n#include "tests/codec/support.h"\n',
    "tests/codec/support.h": "",
    "tests/kernels/k_test.cpp": '#include "tests/codec/support.h"\n',
    "tests/ggml/x_test.cpp": '#include "turboquant/ggml/x.h"\n',
    "bench/CMakeLists.txt": "add_executable(b b.cpp)",
    "bench/b.cpp": "",
}


def check(**changes: str) -> tuple[int, str]:
    """Runs the check over the good tree with these files added to: {path: text}."""
    with tempfile.TemporaryDirectory() as root:
        for path, text in GOOD.items():
            file = Path(root, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        for path, text in changes.items():
            file = Path(root, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a") as f:
                f.write(text)
        done = subprocess.run([sys.executable, CHECK, root], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


class CheckLayers(unittest.TestCase):
    def test_a_good_tree(self):
        self.assertEqual(check()[0], 0, check()[1])

    def test_faults(self):
        for path, text, said in [
            ("turboquant/codec/a.cpp", '#include "turboquant/kernels/k.h"\n', "lower ones only"),
            ("turboquant/attention/x.h", '#include "turboquant/planner/y.h"\n', "lower ones only"),
            ("turboquant/codec/b.h", '#include "turboquant/codec/a.h"\n', "arrow back: codec/a -> codec/b -> codec/a"),
            ("turboquant/kernels/k.cpp", '#include "ggml.h"\n', "must not know ggml"),
            ("turboquant/kernels/k.cpp", "#include <llama-cpp.h>\n", "must not know ggml"),
            ("turboquant/codec/a.h", '#include "b.h"\n', 'write "turboquant/codec/b.h"'),
            ("turboquant/attic/x.h", "", "is no layer"),
            ("turboquant/codec/a.h", '#include "turboquant/attic/x.h"\n', "not a known layer"),
            ("turboquant/codec/c.cpp", "", "nobody builds it"),
            ("turboquant/kernels/impl/a.cpp", "", "nobody builds it"),
            ("tests/spec/s_test.cpp", "", "nobody builds it"),
            ("tests/ggml/helper.cpp", "", "nobody builds it"),
            ("bench/c.cpp", "", "nobody builds it"),
            ("tests/codec/a_test.cpp", '#include "turboquant/kernels/k.h"\n', "they may include lower layers only"),
            ("tests/codec/a_test.cpp", '#include "tests/kernels/support.h"\n', "they may include lower layers only"),
            ("tests/attic/a_test.cpp", "", "which is no layer"),
        ]:
            code, output = check(**{path: text})
            self.assertEqual(code, 1, f"{path}: {text}")
            self.assertIn(said, output, f"{path}: {text}")

    def test_long_files_get_a_warning(self):
        code, output = check(**{"turboquant/codec/b.h": "\n" * 401})
        self.assertEqual(code, 0)
        self.assertIn("b.h has 401 lines", output)


if __name__ == "__main__":
    unittest.main()
