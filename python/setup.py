"""Puts the library that `make build` made beside the module, so that `pip install ./python` leaves nothing to name."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithLibrary(build_py):
    def run(self):
        super().run()
        library = Path(__file__).resolve().parent.parent / "build/lib/libggml-turboquant.so"
        if library.exists():
            shutil.copy(library, Path(self.build_lib) / "turboquant")


setup(cmdclass={"build_py": BuildWithLibrary})
