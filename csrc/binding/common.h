// common.h - what every op of the binding needs: tensor checks in one sentence, formats, the chosen kernels.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/layout.h"
#include "q_galore.h"

namespace qg {

using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Which argument of which op a message speaks of; index < 0: not an element of a list.
struct Argument {
    const char *op;
    const char *name;
    int64_t index = -1;
};

// Throws std::invalid_argument ("q_galore::op: argument[i] must be ..., got ..."), which Python sees as ValueError.
[[noreturn]] void refuse(const Argument &argument, const std::string &expected, const std::string &got);

std::string describe(const Tensor &tensor);

// "cpu", "cuda:0".
std::string device_name(const Device &device);

// A contiguous tensor on the device of one of the dtypes and, unless sizes is {-1}, of these sizes; a size of -1 is
// free.
void check_tensor(
    const Argument &argument,
    const Tensor &tensor,
    const Device &device,
    std::initializer_list<ScalarType> dtypes,
    const std::vector<int64_t> &sizes = {-1});

void check_length(const char *op, const char *name, size_t got, size_t expected);

// The storage format of a float tensor (float32, bfloat16, float16) whose dtype has been checked.
qg_format float_format(const Tensor &tensor);

ScalarType scalar_type(qg_format format);

// The format with this number; whether it is known and fits is for the core to say.
qg_format format_of(const Argument &argument, int64_t number);

// The same for a float format: float32, bfloat16 and, where it is wanted, float16.
qg_format float_format_of(const Argument &argument, int64_t number, bool with_float16);

inline int64_t blocks(int64_t count, int64_t block) {
    return (count + block - 1) / block;
}

// What the tensors of a projector are called in messages.
struct ProjectorNames {
    const char *codes;
    const char *scales;
    const char *zeros;
};

// Sizes and dtypes of a projector's tensors; one that the format does not have is empty, [0].
struct ProjectorLayout {
    ScalarType dtype;
    std::vector<int64_t> codes;
    std::vector<int64_t> scales;
    std::vector<int64_t> zeros;
};

ProjectorLayout projector_layout(qg_format format, int64_t block, int64_t rank, int64_t dim);

void check_projector_block(const Argument &argument, int64_t block);

// The projector of any number of vectors of length dim in three tensors, which are checked.
qg_projector projector_of(
    const char *op,
    const ProjectorNames &names,
    int64_t index,
    const Device &device,
    const Tensor &codes,
    const Tensor &scales,
    const Tensor &zeros,
    qg_format format,
    int64_t block,
    int64_t dim);

// Throws what a status means: ValueError for a bad argument, NotImplementedError-like RuntimeError otherwise.
void check_status(const char *op, qg_status status);

Tensor empty(const std::vector<int64_t> &sizes, ScalarType dtype, const Device &device);

// The CPU kernels in use: Q_GALORE_SIMD (scalar, avx2, avx512) or the best this machine has, until set_simd_level.
int64_t simd_level();
int64_t best_simd_level();
void set_simd_level(int64_t level);

// From now on CPU tensors are worked on with the tables (qg_backend, qg_linalg) at these addresses, which are the
// caller's and stay; 0, 0: with the CPU's own. So the tests drive another device's tables through the ordinary ops.
void set_cpu_tables(int64_t backend, int64_t linalg);

// GEMMs by torch, factorisations by the CPU's own.
const qg_linalg *torch_linalg();

struct Gpu; // cuda.cpp

// Whether an op takes products of matrices, for which cuBLAS wants a large workspace.
enum class Products { none, some };

// The tables of the device that an op's tensors are on, for the length of the op. On a GPU they work on torch's current
// stream, and no other thread uses that GPU's tables until this object goes.
class Kernels {
  public:
    Kernels(const char *op, const Device &device, Products products = Products::none);
    ~Kernels();
    Kernels(const Kernels &) = delete;
    Kernels &operator=(const Kernels &) = delete;

    const qg_backend *backend() const { return backend_; }
    const qg_linalg *linalg() const { return linalg_; }

    // Memory of the device from torch's allocator. It is taken from the current stream, so that it may be given back
    // before the work that uses it is done.
    Tensor scratch(size_t bytes) const;

  private:
    void open_gpu(const char *op, Products products);
    void close_gpu();

    Device device_;
    const qg_backend *backend_ = nullptr;
    const qg_linalg *linalg_ = nullptr;
    Gpu *gpu_ = nullptr;
    std::optional<torch::stable::accelerator::DeviceGuard> guard_;
    std::unique_lock<std::mutex> lock_;
    std::optional<Tensor> workspace_;
};

// The version of the CUDA library, which is opened for that; no GPU is needed.
std::string cuda_version();

extern const std::initializer_list<ScalarType> FLOATS;

std::tuple<Tensor, Tensor, Tensor> int8_quantize(const Tensor &weight, int64_t group_size);
Tensor int8_dequantize(
    const Tensor &codes,
    const Tensor &scales,
    const Tensor &zeros,
    int64_t group_size,
    int64_t format);
std::tuple<Tensor, Tensor, Tensor> projector_quantize(const Tensor &basis, int64_t format, int64_t block);
Tensor projector_dequantize(
    const Tensor &codes,
    const Tensor &scales,
    const Tensor &zeros,
    int64_t format,
    int64_t block,
    int64_t dim,
    int64_t target_format);
std::tuple<Tensor, Tensor> dynamic8_quantize(const Tensor &x, bool is_signed, int64_t block);
Tensor dynamic8_dequantize(const Tensor &codes, const Tensor &absmax, bool is_signed, int64_t block);
Tensor absmax(const Tensors &tensors);
Tensor noise(const Tensor &like, int64_t seed, int64_t id, int64_t step, int64_t start, int64_t count);
void adam8_step(
    const Tensors &weights,
    const Tensors &scales,
    const Tensors &zeros,
    const Tensors &grads,
    const Tensors &exp_avg,
    const Tensors &exp_avg_sq,
    const Tensors &exp_avg_absmax,
    const Tensors &exp_avg_sq_absmax,
    const std::vector<int64_t> &bias_steps,
    const std::vector<int64_t> &noise_steps,
    const std::vector<int64_t> &ids,
    const Tensor &stats,
    const Tensor &absmax,
    double lr,
    double beta1,
    double beta2,
    double eps,
    double weight_decay,
    int64_t seed,
    bool stochastic_round,
    int64_t group_size,
    int64_t block);
void galore_step(
    const Tensors &weights,
    const Tensors &scales,
    const Tensors &zeros,
    const Tensors &grads,
    const Tensors &exp_avg,
    const Tensors &exp_avg_sq,
    const Tensors &exp_avg_absmax,
    const Tensors &exp_avg_sq_absmax,
    const Tensors &proj_codes,
    const Tensors &proj_scales,
    const Tensors &proj_zeros,
    const Tensors &right_codes,
    const Tensors &right_scales,
    const Tensors &right_zeros,
    const std::vector<int64_t> &sides,
    const std::vector<int64_t> &bias_steps,
    const std::vector<int64_t> &noise_steps,
    const std::vector<int64_t> &ids,
    const Tensor &stats,
    const Tensor &norms,
    const Tensor &absmax,
    int64_t proj_format,
    int64_t proj_block,
    bool low_rank,
    double lr,
    double beta1,
    double beta2,
    double eps,
    double weight_decay,
    double scale,
    int64_t seed,
    bool stochastic_round,
    int64_t group_size,
    int64_t block,
    int64_t compute_format,
    double norm_growth_limit);
std::tuple<Tensor, Tensor> subspace_refresh(
    const Tensor &gradient,
    const Tensor &basis,
    int64_t side,
    int64_t steps,
    int64_t compute_format);
Tensor subspace_random(const Tensor &like, int64_t rank, int64_t dim, int64_t seed, int64_t id, int64_t draw);
Tensor captured_energy(const Tensor &gradient, const Tensor &right, const Tensor &left, int64_t compute_format);

} // namespace qg
