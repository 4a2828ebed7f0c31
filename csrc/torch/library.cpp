// Opens the torch library `kimi_native`; each csrc/torch/<op>.cpp adds its own schema to it with
// STABLE_TORCH_LIBRARY_FRAGMENT.
#include <torch/csrc/stable/library.h>

#include <string>

// The CUDA kernels in this build: "none", "emulated" (tests/emulator), or the version of nvcc.
static std::string cuda_build() {
#if defined(KIMI_CUDA_EMULATED)
  return "emulated";
#elif defined(KIMI_CUDA)
  return KIMI_CUDA_VERSION;
#else
  return "none";
#endif
}

STABLE_TORCH_LIBRARY(kimi_native, m) {
  m.def("cuda_build() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(kimi_native, CompositeExplicitAutograd, m) {
  m.impl("cuda_build", TORCH_BOX(&cuda_build));
}
