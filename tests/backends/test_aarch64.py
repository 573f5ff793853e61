"""The libraries of the wheel for aarch64: cross compiled, and loaded and called under QEMU.

``.ci/run`` installs Debian's g++-aarch64-linux-gnu and qemu-user. An aarch64 machine needs neither.
"""

import platform
import shutil
import subprocess

import pytest
import torch

from tests.backends.test_native import FP32
from tests.support.checks import assert_close
from tools import libraries
from ttt4rec.native import build

HERE = platform.machine() == "aarch64"
COMPILER = "g++" if HERE else "aarch64-linux-gnu-g++"
LAUNCHER = () if HERE else ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")
ROWS, COLUMNS = 5, 1003
PROGRAM = """
#include <dlfcn.h>
#include <cstdint>
#include <cstdio>
#include <string_view>
#include <vector>

struct Call { int64_t columns, stride; float* scores; double* lse; const int64_t* column; const float* grad; };

// PROGRAM SCORES (LIBRARY FUNCTION... ,)...: load libraries, look their functions up, and sum exponentials of rows.
int main(int count, char** words) {
  int (*forward)(const Call*, int64_t, int64_t) = nullptr;
  for (int i = 2; i < count; ++i) {
    void* library = dlopen(words[i], RTLD_NOW);
    if (library == nullptr) return std::fprintf(stderr, "%s", dlerror()), 1;
    for (++i; words[i][0] != ','; ++i) {
      void* found = dlsym(library, words[i]);
      if (found == nullptr) return std::fprintf(stderr, "%s", words[i]), 1;
      if (std::string_view(words[i]) == "softmax_forward") forward = (decltype(forward))found;
    }
  }
  std::vector<float> scores(ROWS * COLUMNS);
  FILE* file = std::fopen(words[1], "rb");
  if (std::fread(scores.data(), sizeof(float), scores.size(), file) != scores.size()) return 1;
  double lse[ROWS];
  const Call call{COLUMNS, COLUMNS, scores.data(), lse, nullptr, nullptr};
  if (forward(&call, 0, ROWS) != 0) return 1;
  for (double x : lse) std::printf("%.17g\\n", x);
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What a wheel brings of the inner loop and the softmax, at one shape; its functions by the library's path."""
    wanted = [COMPILER, *LAUNCHER[:1]]
    absent = [name for name in wanted if shutil.which(name) is None]
    assert not absent, f"needs {absent}: apt-get install g++-aarch64-linux-gnu qemu-user"
    folder = tmp_path_factory.mktemp("libraries")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", COMPILER)
        shapes = [("linear", 16, 0, "float", sources) for sources in (build.INNER_LOOP, build.SOFTMAX)]
        libraries.compile_all(folder, shapes, "aarch64")
    return {
        path: build._FUNCTIONS[build.SOFTMAX if path.stem.startswith("full_softmax") else build.INNER_LOOP]
        for path in sorted(folder.glob("neon/*.so"))
    }


@pytest.mark.slow
def test_libraries_for_aarch64_are_loaded_and_right(compiled, tmp_path):
    assert len(compiled) == 2
    (tmp_path / "main.cpp").write_text(PROGRAM)
    sizes = f"-DROWS={ROWS}", f"-DCOLUMNS={COLUMNS}"
    program = [COMPILER, "-std=c++17", *sizes, "-o", str(tmp_path / "main"), str(tmp_path / "main.cpp"), "-ldl"]
    subprocess.run(program, check=True)
    scores = 9 * torch.randn(ROWS, COLUMNS)
    (tmp_path / "scores").write_bytes(scores.numpy().tobytes())
    words = [word for path, functions in compiled.items() for word in (str(path), *functions, ",")]
    command = [*LAUNCHER, str(tmp_path / "main"), str(tmp_path / "scores"), *words]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lse = torch.tensor([float(line) for line in run.stdout.split()], dtype=torch.float64)
    assert_close(lse, scores.double().logsumexp(1), FP32)


@pytest.mark.slow
def test_a_library_of_another_machine_is_refused(compiled, tmp_path):
    (tmp_path / "neon").mkdir()
    shutil.copy(min(compiled), tmp_path / "neon")
    with pytest.raises(ValueError, match="must be for x86_64, 62; given 183"):
        libraries.compile_all(tmp_path, [], "x86_64")
