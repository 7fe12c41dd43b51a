"""Builds the native kernels, for several instruction sets; an install without a compiler goes on without them, and so
does one with FQT_COMPILE=0 in the environment."""

import os
from pathlib import Path
from sysconfig import get_platform

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# No multiply-add may be contracted and no division approximated: codes must equal the reference's bit for bit.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
if os.environ.get("FQT_SANITIZE"):  # `make sanitize`
    FLAGS += ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
FILES = {str(p): p.parent.name for p in sorted(Path("csrc").rglob("*.cpp"))}
ALL = list(FILES)
PRODUCTS = [path for path, room in FILES.items() if room in ("common", "products")]
# Flags and sources of each library. Those of products alone run on top of the others: see fqt/kernels/cpu/library.py.
LIBRARIES: dict[str, tuple[list[str], list[str]]] = {"portable": ([], ALL)}
PLATFORM = get_platform()  # what is built for: with a cross compiler, _PYTHON_HOST_PLATFORM says it
if PLATFORM.endswith(("x86_64", "amd64")):
    AVX2, AVX512 = ["-mavx2"], ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
    LIBRARIES["avx2"] = (AVX2, ALL)
    LIBRARIES["avx2_narrow"] = ([*AVX2, "-DFQT_NARROW"], [path for path in PRODUCTS if "blocked" not in path])
    LIBRARIES["avxvnni"] = ([*AVX2, "-mavxvnni"], PRODUCTS)
    LIBRARIES["avx512"] = (AVX512, ALL)
    LIBRARIES["amx"] = ([*AVX512, "-mamx-tile", "-mamx-int8"], PRODUCTS)
elif PLATFORM == "linux-aarch64":  # no other system is asked what its processor can do
    CALM = "-fno-schedule-insns"  # as on x86: GCC else loads so far ahead that it spills a tile's sums
    LIBRARIES["neon"] = (["-march=armv8.2-a+dotprod", CALM], ALL)
    LIBRARIES["i8mm"] = (["-march=armv8.2-a+dotprod+i8mm", CALM], [path for path in PRODUCTS if "blocked" not in path])
if os.environ.get("FQT_COMPILE") == "0":  # plain torch, at once
    LIBRARIES.clear()


class BuildKernels(build_ext):
    """Each library with its own objects; OpenMP where the compiler has it."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one of them."""
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


headers = sorted(str(p) for p in Path("csrc").rglob("*.h"))
setup(
    ext_modules=[
        Extension(
            f"fqt.kernels.cpu._native_{name}",
            sources,
            depends=headers,
            include_dirs=["csrc"],
            extra_compile_args=[*FLAGS, *flags, "-fopenmp"],
            extra_link_args=["-fopenmp", *(["-fsanitize=address,undefined"] if os.environ.get("FQT_SANITIZE") else [])],
            language="c++",
            optional=True,  # the plain-torch reference runs where this cannot be built
        )
        for name, (flags, sources) in LIBRARIES.items()
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
