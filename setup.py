"""Builds the native kernels, once per instruction set; an install without a compiler goes on without them."""

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# No multiply-add may be contracted and no division approximated: codes must equal the reference's bit for bit.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
if os.environ.get("FQT_SANITIZE"):  # `make sanitize`
    FLAGS += ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
LEVELS = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    LEVELS["avx2"] = ["-mavx2"]
    LEVELS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
    LEVELS["amx"] = [*LEVELS["avx512"], "-mamx-tile", "-mamx-int8"]


class BuildKernels(build_ext):
    """One library per level, each with its own objects; OpenMP where the compiler has it."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one level."""
        shared = self.build_temp
        self.build_temp = os.path.join(shared, ext.name)
        try:
            super().build_extension(ext)
        except Exception as error:
            print(f"{ext.name}: {error}; trying again without OpenMP")
            ext.extra_compile_args.remove("-fopenmp")
            ext.extra_link_args.remove("-fopenmp")
            super().build_extension(ext)
        finally:
            self.build_temp = shared

    def get_ext_filename(self, ext_name: str) -> str:
        """A name without Python's version: the libraries know nothing of Python, ctypes calls them."""
        return os.path.join(*ext_name.split(".")) + (".pyd" if os.name == "nt" else ".so")


class Wheel(bdist_wheel):
    """One wheel per platform, for every version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python 3, no ABI, this platform."""
        return "py3", "none", super().get_tag()[2]


sources = sorted(str(p) for p in Path("csrc").rglob("*.cpp"))
headers = sorted(str(p) for p in Path("csrc").rglob("*.h"))
setup(
    ext_modules=[
        Extension(
            f"fqt.kernels.cpu._native_{level}",
            sources,
            depends=headers,
            include_dirs=["csrc"],
            extra_compile_args=[*FLAGS, *flags, "-fopenmp"],
            extra_link_args=["-fopenmp", *(["-fsanitize=address,undefined"] if os.environ.get("FQT_SANITIZE") else [])],
            language="c++",
            optional=True,  # the plain-torch reference runs where this cannot be built
        )
        for level, flags in LEVELS.items()
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
