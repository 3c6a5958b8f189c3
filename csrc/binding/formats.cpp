// formats.cpp - ops that encode, decode and measure tensors.
#include <climits>
#include <tuple>

#include "common.h"

namespace qg {
namespace {

Tensor empty(const std::vector<int64_t> &sizes, ScalarType dtype) {
    return torch::stable::empty({sizes.data(), sizes.size()}, dtype);
}

void check_positive(const Argument &argument, int64_t value) {
    if (value < 1 || value > INT_MAX) {
        refuse(argument, "from 1 to 2147483647", std::to_string(value));
    }
}

qg_weight weight_view(const Tensor &codes, const Tensor &scales, const Tensor &zeros, int64_t group_size) {
    return {codes.data_ptr(), static_cast<float *>(scales.data_ptr()), static_cast<int16_t *>(zeros.data_ptr()), 1,
        codes.numel(), static_cast<int32_t>(group_size), QG_INT8};
}

qg_projector projector_view(
    const Tensor &codes,
    const Tensor &scales,
    const Tensor &zeros,
    int64_t format,
    int64_t block,
    int64_t dim) {
    return {codes.data_ptr(), static_cast<uint16_t *>(scales.data_ptr()), static_cast<uint8_t *>(zeros.data_ptr()),
        codes.size(0), dim, static_cast<int32_t>(block), static_cast<qg_format>(format)};
}

} // namespace

std::tuple<Tensor, Tensor, Tensor> int8_quantize(const Tensor &weight, int64_t group_size) {
    const char *op = "int8_quantize";
    check_tensor({op, "weight"}, weight, FLOATS);
    check_positive({op, "group_size"}, group_size);
    auto sizes = weight.sizes();
    const int64_t groups = blocks(weight.numel(), group_size);
    Tensor codes = empty({sizes.begin(), sizes.end()}, ScalarType::Byte);
    Tensor scales = empty({groups}, ScalarType::Float);
    Tensor zeros = empty({groups}, ScalarType::Short);
    const qg_weight view = weight_view(codes, scales, zeros, group_size);
    check_status(op, qg_int8_quantize(&view, weight.data_ptr(), float_format(weight), backend()));
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
    check_tensor({op, "codes"}, codes, {ScalarType::Byte});
    const int64_t groups = blocks(codes.numel(), group_size);
    check_tensor({op, "scales"}, scales, {ScalarType::Float}, {groups});
    check_tensor({op, "zeros"}, zeros, {ScalarType::Short}, {groups});
    auto sizes = codes.sizes();
    Tensor out = empty({sizes.begin(), sizes.end()}, scalar_type(static_cast<qg_format>(format)));
    const qg_weight view = weight_view(codes, scales, zeros, group_size);
    check_status(op, qg_int8_dequantize(&view, out.data_ptr(), static_cast<qg_format>(format), backend()));
    return out;
}

std::tuple<Tensor, Tensor, Tensor> projector_quantize(const Tensor &basis, int64_t format, int64_t block) {
    const char *op = "projector_quantize";
    check_tensor({op, "basis"}, basis, {ScalarType::Float}, {-1, -1});
    check_positive({op, "block"}, block);
    const int64_t rank = basis.size(0), dim = basis.size(1);
    const bool is_float = format == QG_FLOAT32;
    const int64_t row_blocks = blocks(dim, block);
    Tensor codes = is_float ? empty({rank, dim}, ScalarType::Float)
                            : empty({rank, format == QG_INT4 ? (dim + 1) / 2 : dim}, ScalarType::Byte);
    Tensor scales = is_float ? empty({0}, ScalarType::BFloat16) : empty({rank, row_blocks}, ScalarType::BFloat16);
    Tensor zeros = is_float ? empty({0}, ScalarType::Byte) : empty({rank, row_blocks}, ScalarType::Byte);
    const qg_projector view = projector_view(codes, scales, zeros, format, block, dim);
    check_status(op, qg_projector_quantize(&view, static_cast<const float *>(basis.data_ptr()), backend()));
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
    check_positive({op, "block"}, block);
    if (format == QG_FLOAT32) {
        check_tensor({op, "codes"}, codes, {ScalarType::Float}, {-1, dim});
    } else {
        check_tensor({op, "codes"}, codes, {ScalarType::Byte}, {-1, format == QG_INT4 ? (dim + 1) / 2 : dim});
        const std::vector<int64_t> per_block = {codes.size(0), blocks(dim, block)};
        check_tensor({op, "scales"}, scales, {ScalarType::BFloat16}, per_block);
        check_tensor({op, "zeros"}, zeros, {ScalarType::Byte}, per_block);
    }
    const qg_format target = static_cast<qg_format>(target_format);
    Tensor out = empty({codes.size(0), dim}, scalar_type(target));
    const qg_projector view = projector_view(codes, scales, zeros, format, block, dim);
    check_status(op, qg_projector_dequantize(&view, out.data_ptr(), target, backend()));
    return out;
}

std::tuple<Tensor, Tensor> dynamic8_quantize(const Tensor &x, bool is_signed, int64_t block) {
    const char *op = "dynamic8_quantize";
    check_tensor({op, "x"}, x, {ScalarType::Float}, {-1, -1});
    check_positive({op, "block"}, block);
    const int64_t rows = x.size(0), cols = x.size(1);
    Tensor codes = empty({rows, cols}, ScalarType::Byte);
    Tensor maxima = empty({rows, blocks(cols, block)}, ScalarType::Float);
    check_status(
        op,
        qg_dynamic8_quantize(
            static_cast<uint8_t *>(codes.data_ptr()), static_cast<float *>(maxima.data_ptr()),
            static_cast<const float *>(x.data_ptr()), rows, cols, static_cast<int32_t>(block), is_signed, backend()));
    return {codes, maxima};
}

Tensor dynamic8_dequantize(const Tensor &codes, const Tensor &maxima, bool is_signed, int64_t block) {
    const char *op = "dynamic8_dequantize";
    check_tensor({op, "codes"}, codes, {ScalarType::Byte}, {-1, -1});
    check_positive({op, "block"}, block);
    const int64_t rows = codes.size(0), cols = codes.size(1);
    check_tensor({op, "absmax"}, maxima, {ScalarType::Float}, {rows, blocks(cols, block)});
    Tensor out = empty({rows, cols}, ScalarType::Float);
    check_status(
        op, qg_dynamic8_dequantize(
                static_cast<float *>(out.data_ptr()), static_cast<const uint8_t *>(codes.data_ptr()),
                static_cast<const float *>(maxima.data_ptr()), rows, cols, static_cast<int32_t>(block), is_signed,
                backend()));
    return out;
}

Tensor absmax(const Tensors &tensors) {
    const char *op = "absmax";
    Tensor out = empty({static_cast<int64_t>(tensors.size())}, ScalarType::Float);
    float *values = static_cast<float *>(out.data_ptr());
    for (size_t i = 0; i < tensors.size(); i++) {
        check_tensor({op, "tensors", static_cast<int64_t>(i)}, tensors[i], FLOATS);
        check_status(
            op, qg_absmax(&values[i], tensors[i].data_ptr(), float_format(tensors[i]), tensors[i].numel(), backend()));
    }
    return out;
}

Tensor noise(int64_t seed, int64_t id, int64_t step, int64_t start, int64_t count) {
    const char *op = "noise";
    if (count < 0 || start < 0 || step < 0 || id < 0 || id > UINT32_MAX) {
        refuse(
            {op, "arguments"}, "count, start, step >= 0 and id in 32 bits",
            std::to_string(count) + ", " + std::to_string(start) + ", " + std::to_string(step) + ", " +
                std::to_string(id));
    }
    Tensor out = empty({count}, ScalarType::Int);
    check_status(
        op, qg_noise(
                static_cast<int32_t *>(out.data_ptr()), static_cast<uint64_t>(seed), static_cast<uint32_t>(id),
                static_cast<uint64_t>(step), start, count, backend()));
    return out;
}

} // namespace qg
