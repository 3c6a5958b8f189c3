// module.cpp - the Python module and the schemas of torch.ops.q_galore.
//
// Formats travel as the numbers of qg_format. An argument marked (x!) is written, every other one is only read. Empty
// tensors stand for what a format does not have (scales of a float weight, absmax of float32 moments).
#include <Python.h>

#include <tuple>

#include "common.h"

STABLE_TORCH_LIBRARY(q_galore, library) {
    library.def("simd_level() -> int");
    library.def("best_simd_level() -> int");
    library.def("set_simd_level(int level) -> ()");
    library.def("set_cpu_tables(int backend, int linalg) -> ()");
    library.def("cuda_version() -> str");
    library.def("noise(Tensor like, int seed, int id, int step, int start, int count) -> Tensor");
    library.def("absmax(Tensor[] tensors) -> Tensor");
    library.def("int8_quantize(Tensor weight, int group_size) -> (Tensor, Tensor, Tensor)");
    library.def(
        "int8_dequantize("
        "Tensor codes, "
        "Tensor scales, "
        "Tensor zeros, "
        "int group_size, "
        "int format) -> Tensor");
    library.def("projector_quantize(Tensor basis, int format, int block) -> (Tensor, Tensor, Tensor)");
    library.def(
        "projector_dequantize("
        "Tensor codes, "
        "Tensor scales, "
        "Tensor zeros, "
        "int format, "
        "int block, "
        "int dim, "
        "int target_format) -> Tensor");
    library.def("dynamic8_quantize(Tensor x, bool is_signed, int block) -> (Tensor, Tensor)");
    library.def("dynamic8_dequantize(Tensor codes, Tensor absmax, bool is_signed, int block) -> Tensor");
    library.def(
        "adam8_step_("
        "Tensor(a!)[] weights, "
        "Tensor(b!)[] scales, "
        "Tensor(c!)[] zeros, "
        "Tensor[] grads, "
        "Tensor(d!)[] exp_avg, "
        "Tensor(e!)[] exp_avg_sq, "
        "Tensor(f!)[] exp_avg_absmax, "
        "Tensor(g!)[] exp_avg_sq_absmax, "
        "int[] bias_steps, "
        "int[] noise_steps, "
        "int[] ids, "
        "Tensor(h!) stats, "
        "Tensor absmax, "
        "float lr, "
        "float beta1, "
        "float beta2, "
        "float eps, "
        "float weight_decay, "
        "int seed, "
        "bool stochastic_round, "
        "int group_size, "
        "int block) -> ()");
    library.def(
        "galore_step_("
        "Tensor(a!)[] weights, "
        "Tensor(b!)[] scales, "
        "Tensor(c!)[] zeros, "
        "Tensor[] grads, "
        "Tensor(d!)[] exp_avg, "
        "Tensor(e!)[] exp_avg_sq, "
        "Tensor(f!)[] exp_avg_absmax, "
        "Tensor(g!)[] exp_avg_sq_absmax, "
        "Tensor[] proj_codes, "
        "Tensor[] proj_scales, "
        "Tensor[] proj_zeros, "
        "Tensor[] right_codes, "
        "Tensor[] right_scales, "
        "Tensor[] right_zeros, "
        "int[] sides, "
        "int[] bias_steps, "
        "int[] noise_steps, "
        "int[] ids, "
        "Tensor(h!) stats, "
        "Tensor(i!) norms, "
        "Tensor absmax, "
        "int proj_format, "
        "int proj_block, "
        "bool low_rank, "
        "float lr, "
        "float beta1, "
        "float beta2, "
        "float eps, "
        "float weight_decay, "
        "float scale, "
        "int seed, "
        "bool stochastic_round, "
        "int group_size, "
        "int block, "
        "int compute_format, "
        "float norm_growth_limit) -> ()");
    library.def(
        "subspace_refresh("
        "Tensor gradient, "
        "Tensor basis, "
        "int side, "
        "int steps, "
        "int compute_format) -> (Tensor, Tensor)");
    library.def("subspace_random(Tensor like, int rank, int dim, int seed, int id, int draw) -> Tensor");
    library.def("captured_energy(Tensor gradient, Tensor right, Tensor left, int compute_format) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(q_galore, CompositeExplicitAutograd, library) {
    library.impl("simd_level", TORCH_BOX(&qg::simd_level));
    library.impl("best_simd_level", TORCH_BOX(&qg::best_simd_level));
    library.impl("set_simd_level", TORCH_BOX(&qg::set_simd_level));
    library.impl("set_cpu_tables", TORCH_BOX(&qg::set_cpu_tables));
    library.impl("cuda_version", TORCH_BOX(&qg::cuda_version));
}

namespace {

// Every device has the same ops: they choose their kernels by the device of their tensors.
void implement(torch::stable::detail::StableLibrary &library) {
    library.impl("noise", TORCH_BOX(&qg::noise));
    library.impl("absmax", TORCH_BOX(&qg::absmax));
    library.impl("int8_quantize", TORCH_BOX(&qg::int8_quantize));
    library.impl("int8_dequantize", TORCH_BOX(&qg::int8_dequantize));
    library.impl("projector_quantize", TORCH_BOX(&qg::projector_quantize));
    library.impl("projector_dequantize", TORCH_BOX(&qg::projector_dequantize));
    library.impl("dynamic8_quantize", TORCH_BOX(&qg::dynamic8_quantize));
    library.impl("dynamic8_dequantize", TORCH_BOX(&qg::dynamic8_dequantize));
    library.impl("adam8_step_", TORCH_BOX(&qg::adam8_step));
    library.impl("galore_step_", TORCH_BOX(&qg::galore_step));
    library.impl("subspace_refresh", TORCH_BOX(&qg::subspace_refresh));
    library.impl("subspace_random", TORCH_BOX(&qg::subspace_random));
    library.impl("captured_energy", TORCH_BOX(&qg::captured_energy));
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(q_galore, CPU, library) {
    implement(library);
}

STABLE_TORCH_LIBRARY_IMPL(q_galore, CUDA, library) {
    implement(library);
}

// Importing the module registers the ops; it holds nothing but the version of the C core.
extern "C" __attribute__((visibility("default"))) PyObject *PyInit__C(void) {
    static PyModuleDef definition = {
        PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
    PyObject *module = PyModule_Create(&definition);
    if (module != nullptr && PyModule_AddStringConstant(module, "core_version", qg_version()) != 0) {
        Py_DECREF(module);
        return nullptr;
    }
    return module;
}
