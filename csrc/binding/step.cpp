// step.cpp - the two list ops of an optimizer step.
#include <algorithm>
#include <climits>

#include "common.h"

namespace qg {
namespace {

const std::initializer_list<ScalarType> WEIGHTS = {
    ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Byte};

const ProjectorNames PROJECTOR = {"proj_codes", "proj_scales", "proj_zeros"};
const ProjectorNames RIGHT_PROJECTOR = {"right_codes", "right_scales", "right_zeros"};

// The lists that both ops share, with the size of a group and of a moment block.
struct Lists {
    const char *op;
    Device device;
    const Tensors &weights;
    const Tensors &scales;
    const Tensors &zeros;
    const Tensors &grads;
    const Tensors &exp_avg;
    const Tensors &exp_avg_sq;
    const Tensors &exp_avg_absmax;
    const Tensors &exp_avg_sq_absmax;
    const std::vector<int64_t> &bias_steps;
    const std::vector<int64_t> &noise_steps;
    const std::vector<int64_t> &ids;
    const Tensor &stats;
    const Tensor &absmax;
    int64_t group_size;
    int64_t block;
};

void check_lists(const Lists &l) {
    const size_t count = l.weights.size();
    check_length(l.op, "scales", l.scales.size(), count);
    check_length(l.op, "zeros", l.zeros.size(), count);
    check_length(l.op, "grads", l.grads.size(), count);
    check_length(l.op, "exp_avg", l.exp_avg.size(), count);
    check_length(l.op, "exp_avg_sq", l.exp_avg_sq.size(), count);
    check_length(l.op, "exp_avg_absmax", l.exp_avg_absmax.size(), count);
    check_length(l.op, "exp_avg_sq_absmax", l.exp_avg_sq_absmax.size(), count);
    check_length(l.op, "bias_steps", l.bias_steps.size(), count);
    check_length(l.op, "noise_steps", l.noise_steps.size(), count);
    check_length(l.op, "ids", l.ids.size(), count);
    check_tensor({l.op, "stats"}, l.stats, l.device, {ScalarType::Long}, {static_cast<int64_t>(count), 2});
    if (l.absmax.numel() > 0) {
        check_tensor({l.op, "absmax"}, l.absmax, l.device, {ScalarType::Float}, {static_cast<int64_t>(count)});
    }
    if (l.group_size < 1 || l.group_size > INT_MAX) {
        refuse({l.op, "group_size"}, "from 1 to 2147483647", std::to_string(l.group_size));
    }
    if (l.block < 1 || l.block > INT_MAX) {
        refuse({l.op, "block"}, "from 1 to 2147483647", std::to_string(l.block));
    }
}

qg_weight weight_of(const Lists &l, size_t i, int64_t rows, int64_t cols) {
    const int64_t index = static_cast<int64_t>(i);
    const Tensor &data = l.weights[i];
    check_tensor({l.op, "weights", index}, data, l.device, WEIGHTS);
    qg_weight weight = {data.data_ptr(), nullptr, nullptr, rows, cols, static_cast<int32_t>(l.group_size), QG_INT8};
    if (data.scalar_type() != ScalarType::Byte) {
        weight.format = float_format(data);
        return weight;
    }
    const int64_t groups = blocks(data.numel(), l.group_size);
    check_tensor({l.op, "scales", index}, l.scales[i], l.device, {ScalarType::Float}, {groups});
    check_tensor({l.op, "zeros", index}, l.zeros[i], l.device, {ScalarType::Short}, {groups});
    weight.scales = static_cast<float *>(l.scales[i].data_ptr());
    weight.zeros = static_cast<int16_t *>(l.zeros[i].data_ptr());
    return weight;
}

// The moments of a rows x cols array; their tensors have the given sizes.
qg_moments moments_of(const Lists &l, size_t i, const std::vector<int64_t> &sizes, int64_t rows, int64_t cols) {
    const int64_t index = static_cast<int64_t>(i);
    check_tensor({l.op, "exp_avg", index}, l.exp_avg[i], l.device, {ScalarType::Float, ScalarType::Byte}, sizes);
    check_tensor({l.op, "exp_avg_sq", index}, l.exp_avg_sq[i], l.device, {l.exp_avg[i].scalar_type()}, sizes);
    qg_moments moments = {l.exp_avg[i].data_ptr(), l.exp_avg_sq[i].data_ptr(), nullptr, nullptr,
        static_cast<int32_t>(l.block), QG_FLOAT32};
    if (l.exp_avg[i].scalar_type() == ScalarType::Byte) {
        const int64_t row_blocks = blocks(cols, l.block);
        std::vector<int64_t> expected = {row_blocks};
        if (rows >= 0) {
            expected = {rows, row_blocks};
        }
        check_tensor({l.op, "exp_avg_absmax", index}, l.exp_avg_absmax[i], l.device, {ScalarType::Float}, expected);
        check_tensor(
            {l.op, "exp_avg_sq_absmax", index}, l.exp_avg_sq_absmax[i], l.device, {ScalarType::Float}, expected);
        moments.exp_avg_absmax = static_cast<float *>(l.exp_avg_absmax[i].data_ptr());
        moments.exp_avg_sq_absmax = static_cast<float *>(l.exp_avg_sq_absmax[i].data_ptr());
        moments.format = QG_DYNAMIC8;
    }
    return moments;
}

void fill_common(const Lists &l, size_t i, qg_step_task &task) {
    const int64_t index = static_cast<int64_t>(i);
    task.gradient = l.grads[i].data_ptr();
    task.grad_format = float_format(l.grads[i]);
    if (l.ids[i] < 0 || l.ids[i] > UINT32_MAX) {
        refuse({l.op, "ids", index}, "in 32 bits", std::to_string(l.ids[i]));
    }
    task.id = static_cast<uint32_t>(l.ids[i]);
    task.noise_step = l.noise_steps[i];
    task.bias_step = l.bias_steps[i];
    if (l.absmax.numel() > 0) {
        task.gradient_absmax = static_cast<const float *>(l.absmax.data_ptr()) + index;
    }
    task.stats = static_cast<int64_t *>(l.stats.data_ptr()) + 2 * index;
}

std::vector<int64_t> sizes_of(const Tensor &tensor) {
    auto sizes = tensor.sizes();
    return {sizes.begin(), sizes.end()};
}

// The device of all tensors of an op.
Device device_of(const Tensors &weights, const Tensor &stats) {
    return weights.empty() ? stats.device() : weights[0].device();
}

} // namespace

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
    int64_t block) {
    const char *op = "adam8_step_";
    const Device device = device_of(weights, stats);
    const Lists lists = {op, device, weights, scales, zeros, grads, exp_avg, exp_avg_sq, exp_avg_absmax,
        exp_avg_sq_absmax, bias_steps, noise_steps, ids, stats, absmax, group_size, block};
    check_lists(lists);
    std::vector<qg_step_task> tasks(weights.size());
    for (size_t i = 0; i < weights.size(); i++) {
        const int64_t count = weights[i].numel();
        qg_step_task &task = tasks[i];
        task = {};
        task.weight = weight_of(lists, i, 1, count);
        check_tensor({op, "grads", static_cast<int64_t>(i)}, grads[i], device, FLOATS, sizes_of(weights[i]));
        task.moments = moments_of(lists, i, sizes_of(weights[i]), -1, count);
        fill_common(lists, i, task);
    }
    const qg_step_params params = {sizeof(qg_step_params), stochastic_round, lr, beta1, beta2, eps, weight_decay, 1.0,
        static_cast<uint64_t>(seed), QG_FLOAT32, 0.0};
    const int64_t count = static_cast<int64_t>(tasks.size());
    const Kernels kernels(op, device);
    size_t bytes = 0;
    check_status(op, qg_adam8_scratch_size(tasks.data(), count, &params, kernels.backend(), &bytes));
    const Tensor scratch = kernels.scratch(bytes);
    check_status(op, qg_adam8_step(tasks.data(), count, &params, scratch.data_ptr(), bytes, kernels.backend()));
}

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
    double norm_growth_limit) {
    const char *op = "galore_step_";
    const Device device = device_of(weights, stats);
    const Lists lists = {op, device, weights, scales, zeros, grads, exp_avg, exp_avg_sq, exp_avg_absmax,
        exp_avg_sq_absmax, bias_steps, noise_steps, ids, stats, absmax, group_size, block};
    check_lists(lists);
    check_length(op, "proj_codes", proj_codes.size(), weights.size());
    check_length(op, "proj_scales", proj_scales.size(), weights.size());
    check_length(op, "proj_zeros", proj_zeros.size(), weights.size());
    check_length(op, "sides", sides.size(), weights.size());
    // The lists of right bases may be left out where no matrix has one.
    const bool two_sided = std::find(sides.begin(), sides.end(), QG_FULL) != sides.end();
    const size_t rights = two_sided || !right_codes.empty() ? weights.size() : 0;
    check_length(op, "right_codes", right_codes.size(), rights);
    check_length(op, "right_scales", right_scales.size(), rights);
    check_length(op, "right_zeros", right_zeros.size(), rights);
    const bool limited = norm_growth_limit != 0.0;
    if (limited) {
        check_tensor({op, "norms"}, norms, device, {ScalarType::Double}, {static_cast<int64_t>(weights.size())});
    }
    check_projector_block({op, "proj_block"}, proj_block);
    const qg_format basis_format = format_of({op, "proj_format"}, proj_format);
    const qg_format gemm_format = float_format_of({op, "compute_format"}, compute_format, false);
    std::vector<qg_step_task> tasks(weights.size());
    for (size_t i = 0; i < weights.size(); i++) {
        const int64_t index = static_cast<int64_t>(i);
        if (sides[i] != QG_RIGHT && sides[i] != QG_LEFT && sides[i] != QG_FULL) {
            refuse({op, "sides", index}, "0 (right), 1 (left) or 2 (full)", std::to_string(sides[i]));
        }
        check_tensor({op, "weights", index}, weights[i], device, WEIGHTS, {-1, -1});
        const bool right = sides[i] == QG_RIGHT, full = sides[i] == QG_FULL;
        const int64_t rows = weights[i].size(0), cols = weights[i].size(1);
        qg_step_task &task = tasks[i];
        task = {};
        task.side = static_cast<qg_side>(sides[i]);
        task.low_rank_gradient = low_rank;
        task.weight = weight_of(lists, i, rows, cols);
        task.projector = projector_of(
            op, PROJECTOR, index, device, proj_codes[i], proj_scales[i], proj_zeros[i], basis_format, proj_block,
            right ? cols : rows);
        const int64_t rank = task.projector.rank, other = right ? rows : full ? rank : cols;
        if (full) {
            task.right_projector = projector_of(
                op, RIGHT_PROJECTOR, index, device, right_codes[i], right_scales[i], right_zeros[i], basis_format,
                proj_block, cols);
            if (task.right_projector.rank != rank) {
                refuse(
                    {op, "right_codes", index}, std::to_string(rank) + " vectors like proj_codes",
                    describe(right_codes[i]));
            }
        }
        task.norm = limited ? static_cast<double *>(norms.data_ptr()) + i : nullptr;

        const std::vector<int64_t> projected = {rank, other};
        check_tensor({op, "grads", index}, grads[i], device, FLOATS, low_rank ? projected : sizes_of(weights[i]));
        task.moments = moments_of(lists, i, projected, rank, other);
        fill_common(lists, i, task);
    }
    const qg_step_params params = {sizeof(qg_step_params), stochastic_round, lr, beta1, beta2, eps, weight_decay, scale,
        static_cast<uint64_t>(seed), gemm_format, norm_growth_limit};
    const int64_t count = static_cast<int64_t>(tasks.size());
    const Kernels kernels(op, device, Products::some);
    size_t bytes = 0;
    check_status(op, qg_galore_scratch_size(tasks.data(), count, &params, kernels.backend(), &bytes));
    const Tensor scratch = kernels.scratch(bytes);
    check_status(
        op,
        qg_galore_step(tasks.data(), count, &params, scratch.data_ptr(), bytes, kernels.backend(), kernels.linalg()));
}

} // namespace qg
