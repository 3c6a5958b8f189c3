// formats.cpp - ops that encode, decode and measure tensors.
#include <climits>
#include <tuple>

#include "common.h"

namespace qg {
namespace {

void check_positive(const Argument &argument, int64_t value) {
    if (value < 1 || value > INT_MAX) {
        refuse(argument, "from 1 to 2147483647", std::to_string(value));
    }
}

qg_weight weight_view(const Tensor &codes, const Tensor &scales, const Tensor &zeros, int64_t group_size) {
    return {codes.data_ptr(), static_cast<float *>(scales.data_ptr()), static_cast<int16_t *>(zeros.data_ptr()), 1,
        codes.numel(), static_cast<int32_t>(group_size), QG_INT8};
}

const ProjectorNames PROJECTOR = {"codes", "scales", "zeros"};

} // namespace

std::tuple<Tensor, Tensor, Tensor> int8_quantize(const Tensor &weight, int64_t group_size) {
    const char *op = "int8_quantize";
    const Device device = weight.device();
    check_tensor({op, "weight"}, weight, device, FLOATS);
    check_positive({op, "group_size"}, group_size);
    auto sizes = weight.sizes();
    const int64_t groups = blocks(weight.numel(), group_size);
    Tensor codes = empty({sizes.begin(), sizes.end()}, ScalarType::Byte, device);
    Tensor scales = empty({groups}, ScalarType::Float, device);
    Tensor zeros = empty({groups}, ScalarType::Short, device);
    const qg_weight view = weight_view(codes, scales, zeros, group_size);
    const Kernels kernels(op, device);
    check_status(op, qg_int8_quantize(&view, weight.data_ptr(), float_format(weight), kernels.backend()));
    return {codes, scales, zeros};
}

Tensor int8_dequantize(
    const Tensor &codes,
    const Tensor &scales,
    const Tensor &zeros,
    int64_t group_size,
    int64_t format) {
    const char *op = "int8_dequantize";
    check_positive({op, "group_size"}, group_size);
    const Device device = codes.device();
    check_tensor({op, "codes"}, codes, device, {ScalarType::Byte});
    const int64_t groups = blocks(codes.numel(), group_size);
    check_tensor({op, "scales"}, scales, device, {ScalarType::Float}, {groups});
    check_tensor({op, "zeros"}, zeros, device, {ScalarType::Short}, {groups});
    const qg_format target = float_format_of({op, "format"}, format, true);
    auto sizes = codes.sizes();
    Tensor out = empty({sizes.begin(), sizes.end()}, scalar_type(target), device);
    const qg_weight view = weight_view(codes, scales, zeros, group_size);
    const Kernels kernels(op, device);
    check_status(op, qg_int8_dequantize(&view, out.data_ptr(), target, kernels.backend()));
    return out;
}

std::tuple<Tensor, Tensor, Tensor> projector_quantize(const Tensor &basis, int64_t number, int64_t block) {
    const char *op = "projector_quantize";
    const qg_format format = format_of({op, "format"}, number);
    const Device device = basis.device();
    check_tensor({op, "basis"}, basis, device, {ScalarType::Float}, {-1, -1});
    check_projector_block({op, "block"}, block);
    const int64_t rank = basis.size(0), dim = basis.size(1);
    const ProjectorLayout layout = projector_layout(format, block, rank, dim);
    Tensor codes = empty(layout.codes, layout.dtype, device);
    Tensor scales = empty(layout.scales, ScalarType::BFloat16, device);
    Tensor zeros = empty(layout.zeros, ScalarType::Byte, device);
    if (basis.numel() == 0) { // the core writes nothing then; with block 0 there is a scale all the same
        torch::stable::zero_(scales);
        torch::stable::zero_(zeros);
    }
    const qg_projector view = projector_of(op, PROJECTOR, -1, device, codes, scales, zeros, format, block, dim);
    const Kernels kernels(op, device);
    check_status(op, qg_projector_quantize(&view, static_cast<const float *>(basis.data_ptr()), kernels.backend()));
    return {codes, scales, zeros};
}

Tensor projector_dequantize(
    const Tensor &codes,
    const Tensor &scales,
    const Tensor &zeros,
    int64_t format,
    int64_t block,
    int64_t dim,
    int64_t target_format) {
    const char *op = "projector_dequantize";
    check_projector_block({op, "block"}, block);
    if (dim < 0) {
        refuse({op, "dim"}, ">= 0", std::to_string(dim));
    }
    const qg_format target = float_format_of({op, "target_format"}, target_format, false);
    const Device device = codes.device();
    const qg_projector view =
        projector_of(op, PROJECTOR, -1, device, codes, scales, zeros, format_of({op, "format"}, format), block, dim);
    Tensor out = empty({view.rank, dim}, scalar_type(target), device);
    const Kernels kernels(op, device);
    check_status(op, qg_projector_dequantize(&view, out.data_ptr(), target, kernels.backend()));
    return out;
}

std::tuple<Tensor, Tensor> dynamic8_quantize(const Tensor &x, bool is_signed, int64_t block) {
    const char *op = "dynamic8_quantize";
    const Device device = x.device();
    check_tensor({op, "x"}, x, device, {ScalarType::Float}, {-1, -1});
    check_positive({op, "block"}, block);
    const int64_t rows = x.size(0), cols = x.size(1);
    Tensor codes = empty({rows, cols}, ScalarType::Byte, device);
    Tensor maxima = empty({rows, blocks(cols, block)}, ScalarType::Float, device);
    const Kernels kernels(op, device);
    check_status(
        op, qg_dynamic8_quantize(
                static_cast<uint8_t *>(codes.data_ptr()), static_cast<float *>(maxima.data_ptr()),
                static_cast<const float *>(x.data_ptr()), rows, cols, static_cast<int32_t>(block), is_signed,
                kernels.backend()));
    return {codes, maxima};
}

Tensor dynamic8_dequantize(const Tensor &codes, const Tensor &maxima, bool is_signed, int64_t block) {
    const char *op = "dynamic8_dequantize";
    const Device device = codes.device();
    check_tensor({op, "codes"}, codes, device, {ScalarType::Byte}, {-1, -1});
    check_positive({op, "block"}, block);
    const int64_t rows = codes.size(0), cols = codes.size(1);
    check_tensor({op, "absmax"}, maxima, device, {ScalarType::Float}, {rows, blocks(cols, block)});
    Tensor out = empty({rows, cols}, ScalarType::Float, device);
    const Kernels kernels(op, device);
    check_status(
        op, qg_dynamic8_dequantize(
                static_cast<float *>(out.data_ptr()), static_cast<const uint8_t *>(codes.data_ptr()),
                static_cast<const float *>(maxima.data_ptr()), rows, cols, static_cast<int32_t>(block), is_signed,
                kernels.backend()));
    return out;
}

Tensor absmax(const Tensors &tensors) {
    const char *op = "absmax";
    if (tensors.empty()) {
        refuse({op, "tensors"}, "a list of at least one", "0");
    }
    const Device device = tensors[0].device();
    std::vector<qg_array> arrays;
    for (size_t i = 0; i < tensors.size(); i++) {
        check_tensor({op, "tensors", static_cast<int64_t>(i)}, tensors[i], device, FLOATS);
        arrays.push_back({tensors[i].data_ptr(), tensors[i].numel(), float_format(tensors[i])});
    }
    const int64_t count = static_cast<int64_t>(arrays.size());
    Tensor out = empty({count}, ScalarType::Float, device);
    const Kernels kernels(op, device);
    check_status(op, qg_absmax(static_cast<float *>(out.data_ptr()), arrays.data(), count, kernels.backend()));
    return out;
}

Tensor noise(const Tensor &like, int64_t seed, int64_t id, int64_t step, int64_t start, int64_t count) {
    const char *op = "noise";
    if (count < 0 || start < 0 || step < 0 || id < 0 || id > UINT32_MAX) {
        refuse(
            {op, "arguments"}, "count, start, step >= 0 and id in 32 bits",
            std::to_string(count) + ", " + std::to_string(start) + ", " + std::to_string(step) + ", " +
                std::to_string(id));
    }
    Tensor out = empty({count}, ScalarType::Int, like.device());
    const Kernels kernels(op, like.device());
    check_status(
        op, qg_noise(
                static_cast<int32_t *>(out.data_ptr()), static_cast<uint64_t>(seed), static_cast<uint32_t>(id),
                static_cast<uint64_t>(step), start, count, kernels.backend()));
    return out;
}

} // namespace qg
