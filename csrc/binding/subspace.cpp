// subspace.cpp - the ops that compute bases and judge them.
#include <climits>

#include "common.h"

namespace qg {
namespace {

qg_format compute_format(const char *op, int64_t format) {
    return float_format_of({op, "compute_format"}, format, false);
}

// The number of vectors of a basis, one a row.
int64_t check_basis(const Argument &argument, const Tensor &basis, const Device &device, int64_t dim) {
    check_tensor(argument, basis, device, {ScalarType::Float}, {-1, dim});
    if (basis.size(0) > dim) {
        const std::string length = std::to_string(dim);
        refuse(argument, "at most " + length + " vectors of length " + length, std::to_string(basis.size(0)));
    }
    return basis.size(0);
}

// On the CPU: the core hands its numbers to the host.
Tensor doubles(const std::vector<int64_t> &sizes) {
    return empty(sizes, ScalarType::Double, Device(torch::headeronly::DeviceType::CPU));
}

} // namespace

std::tuple<Tensor, Tensor> subspace_refresh(
    const Tensor &gradient,
    const Tensor &basis,
    int64_t side,
    int64_t steps,
    int64_t format) {
    const char *op = "subspace_refresh";
    if (side != QG_RIGHT && side != QG_LEFT) {
        refuse({op, "side"}, "0 (right) or 1 (left)", std::to_string(side));
    }
    if (steps < 0 || steps > INT_MAX) {
        refuse({op, "steps"}, "from 0 to 2147483647", std::to_string(steps));
    }
    const Device device = gradient.device();
    check_tensor({op, "gradient"}, gradient, device, FLOATS, {-1, -1});
    const int64_t rows = gradient.size(0), cols = gradient.size(1);
    const int64_t rank = check_basis({op, "basis"}, basis, device, side == QG_RIGHT ? cols : rows);

    const qg_subspace_params params = {sizeof params, static_cast<int32_t>(steps), compute_format(op, format)};
    qg_subspace_report report = {};
    report.struct_size = sizeof report;
    const Kernels kernels(op, device, Products::some);
    size_t bytes = 0;
    check_status(
        op,
        qg_subspace_scratch_size(rows, cols, rank, 1, params.gemm_format, kernels.backend(), kernels.linalg(), &bytes));
    const Tensor scratch = kernels.scratch(bytes);
    Tensor found = torch::stable::clone(basis);
    check_status(
        op, qg_subspace_refresh(
                static_cast<float *>(found.data_ptr()), rank, gradient.data_ptr(), float_format(gradient), rows, cols,
                static_cast<qg_side>(side), &params, &report, scratch.data_ptr(), bytes, kernels.backend(),
                kernels.linalg()));
    const Tensor numbers = doubles({5});
    double *out = static_cast<double *>(numbers.data_ptr());
    out[0] = report.kept;
    out[1] = report.power_steps;
    out[2] = report.fallbacks;
    out[3] = report.energy_old;
    out[4] = report.energy_new;
    return {found, numbers};
}

Tensor subspace_random(const Tensor &like, int64_t rank, int64_t dim, int64_t seed, int64_t id, int64_t draw) {
    const char *op = "subspace_random";
    if (id < 0 || id > UINT32_MAX) {
        refuse({op, "id"}, "in 32 bits", std::to_string(id));
    }
    if (draw < 0 || draw > UINT32_MAX) {
        refuse({op, "draw"}, "in 32 bits", std::to_string(draw));
    }
    if (rank < 0 || rank > dim) {
        refuse({op, "rank"}, "from 0 to dim = " + std::to_string(dim), std::to_string(rank));
    }
    const Device device = like.device();
    const Kernels kernels(op, device, Products::some);
    size_t bytes = 0;
    check_status(
        op, qg_subspace_scratch_size(1, dim, rank, 1, QG_FLOAT32, kernels.backend(), kernels.linalg(), &bytes));
    const Tensor scratch = kernels.scratch(bytes);
    const Tensor basis = empty({rank, dim}, ScalarType::Float, device);
    check_status(
        op,
        qg_subspace_random(
            static_cast<float *>(basis.data_ptr()), rank, dim, static_cast<uint64_t>(seed), static_cast<uint32_t>(id),
            static_cast<uint32_t>(draw), scratch.data_ptr(), bytes, kernels.backend(), kernels.linalg()));
    return basis;
}

Tensor captured_energy(const Tensor &gradient, const Tensor &right, const Tensor &left, int64_t format) {
    const char *op = "captured_energy";
    const Device device = gradient.device();
    check_tensor({op, "gradient"}, gradient, device, FLOATS, {-1, -1});
    const int64_t rows = gradient.size(0), cols = gradient.size(1);
    int64_t right_rank = 0, left_rank = 0;
    if (right.numel() > 0) {
        right_rank = check_basis({op, "right"}, right, device, cols);
    }
    if (left.numel() > 0) {
        left_rank = check_basis({op, "left"}, left, device, rows);
    }
    const qg_format gemm_format = compute_format(op, format);
    const int64_t rank = right_rank > left_rank ? right_rank : left_rank;
    const int32_t sides = right_rank > 0 && left_rank > 0 ? 2 : 1;
    const Kernels kernels(op, device, Products::some);
    size_t bytes = 0;
    check_status(
        op,
        qg_subspace_scratch_size(rows, cols, rank, sides, gemm_format, kernels.backend(), kernels.linalg(), &bytes));
    const Tensor scratch = kernels.scratch(bytes);
    const Tensor energy = doubles({});
    check_status(
        op, qg_captured_energy(
                static_cast<double *>(energy.data_ptr()), gradient.data_ptr(), float_format(gradient), rows, cols,
                static_cast<const float *>(right.data_ptr()), right_rank, static_cast<const float *>(left.data_ptr()),
                left_rank, gemm_format, scratch.data_ptr(), bytes, kernels.backend(), kernels.linalg()));
    return energy;
}

} // namespace qg
