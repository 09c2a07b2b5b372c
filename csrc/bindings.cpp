// The Python module fused_bce._C: build facts, and the choice of instruction set. Importing it
// registers the operators, unless torch is not the one that they were built for.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include "cpu/isa.h"
#include "device.h"
#include "eager_loss.h"
#include "operands.h"
#include "ops.h"
#include "problem.h"

namespace py = pybind11;

namespace {

std::string torch_at_build() {
  return std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR);
}

// torch keeps its C++ interface within a minor release, not from one to the next.
void check_torch_version() {
  const auto version = py::module_::import("torch").attr("__version__");
  const std::string running = py::str(version);
  if (running.rfind(torch_at_build() + ".", 0) == 0) return;
  throw py::import_error("fused_bce was built for torch " + torch_at_build() +
                         " but this is torch " + running +
                         ". Rebuild it in its source folder: pip install --no-build-isolation "
                         "--no-deps --force-reinstall .");
}

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = kCompiler;
#if defined(FUSED_BCE_CUDA)
  info["cuda_archs"] = py::str(FUSED_BCE_CUDA).attr("split")(";");
#else
  info["cuda_archs"] = py::none();
#endif
  return info;
}

std::vector<std::string> instruction_set_names() {
  std::vector<std::string> names;
  for (const auto& set : fused_bce::instruction_sets()) names.push_back(set.name);
  return names;
}

std::vector<std::string> dtype_names() {
  std::vector<std::string> names;
  for (const auto& dtype : fused_bce::kDTypes) names.push_back(dtype.name);
  return names;
}

// Of each pointwise loss: its name, whether it takes a pos_weight, and of each number of its own
// the name and what the kernels take.
template <class... Formula>
py::list losses(fused_bce::FormulaList<Formula...>) {
  py::list all;
  const auto add = [&](const char* name, bool takes_pos_weight, const auto& parameters) {
    py::list own;
    for (const auto& p : parameters) own.append(py::make_tuple(p.name, p.least, p.most, p.other));
    all.append(py::make_tuple(name, takes_pos_weight, own));
  };
  (add(Formula::kName, Formula::kTakesPosWeight, Formula::kParameters), ...);
  return all;
}

}  // namespace

// Nothing here relies on the interpreter's lock: what is shared is atomic, behind a mutex or never
// written again. A free-threaded Python would turn the lock on for a module that does not say so.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  check_torch_version();
  fused_bce::register_ops();
  m.def("build_info", &build_info);
  m.def("dtypes", &dtype_names);
  m.def("losses", [] { return losses(fused_bce::Formulas()); });
  m.def("instruction_sets", &instruction_set_names);
  m.def("current_instruction_set", [] { return fused_bce::current_instruction_set().name; });
  m.def("use_instruction_set", &fused_bce::use_instruction_set, py::arg("name"));
  if (PyModule_AddFunctions(m.ptr(), fused_bce::kEagerLoss) != 0) throw py::error_already_set();
  if constexpr (fused_bce::kHasCuda) {
    m.def("has_kernels_for_gpu",
          [](c10::DeviceIndex index) { return fused_bce::has_kernels_for({c10::kCUDA, index}); });
    m.def("limit_cuda_blocks", &fused_bce::limit_cuda_blocks, py::arg("most"));
    m.def("add_up_in_last_block", &fused_bce::add_up_in_last_cuda_block, py::arg("choice"));
  }
}
