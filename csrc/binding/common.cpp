// common.cpp - checks, formats and the choice of kernels; see common.h.
#include "common.h"

#include <atomic>
#include <climits>
#include <cstdlib>
#include <sstream>

namespace qg {

const std::initializer_list<ScalarType> FLOATS = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};

namespace {

const char *dtype_name(ScalarType dtype) {
    switch (dtype) {
    case ScalarType::Float:
        return "float32";
    case ScalarType::BFloat16:
        return "bfloat16";
    case ScalarType::Half:
        return "float16";
    case ScalarType::Double:
        return "float64";
    case ScalarType::Byte:
        return "uint8";
    case ScalarType::Char:
        return "int8";
    case ScalarType::Short:
        return "int16";
    case ScalarType::Int:
        return "int32";
    case ScalarType::Long:
        return "int64";
    case ScalarType::Bool:
        return "bool";
    default:
        return "another dtype";
    }
}

std::string shape(const std::vector<int64_t> &sizes) {
    std::ostringstream out;
    out << '[';
    for (size_t i = 0; i < sizes.size(); i++) {
        out << (i ? ", " : "");
        if (sizes[i] < 0) {
            out << '*';
        } else {
            out << sizes[i];
        }
    }
    out << ']';
    return out.str();
}

std::vector<int64_t> sizes_of(const Tensor &tensor) {
    auto sizes = tensor.sizes();
    return std::vector<int64_t>(sizes.begin(), sizes.end());
}

bool fits(const std::vector<int64_t> &sizes, const std::vector<int64_t> &pattern) {
    if (pattern.size() == 1 && pattern[0] == -1) {
        return true;
    }
    if (sizes.size() != pattern.size()) {
        return false;
    }
    for (size_t i = 0; i < sizes.size(); i++) {
        if (pattern[i] >= 0 && sizes[i] != pattern[i]) {
            return false;
        }
    }
    return true;
}

qg_simd level_from_environment() {
    const char *value = std::getenv("Q_GALORE_SIMD");
    if (value == nullptr || *value == '\0') {
        return qg_cpu_best_simd();
    }
    const std::string name = value;
    if (name == "scalar") {
        return QG_SIMD_SCALAR;
    }
    if (name == "avx2") {
        return QG_SIMD_AVX2;
    }
    if (name == "avx512") {
        return QG_SIMD_AVX512;
    }
    throw std::invalid_argument("Q_GALORE_SIMD must be scalar, avx2 or avx512, got " + name);
}

bool on(const Device &device, const Tensor &tensor) {
    const Device own = tensor.device();
    return own.type() == device.type() && (device.is_cpu() || own.index() == device.index());
}

struct Choice {
    const qg_backend *kernels;
    int64_t level;
};

Choice choose(int64_t level) {
    if (level < QG_SIMD_SCALAR || level > QG_SIMD_AVX512) {
        refuse({"set_simd_level", "level"}, "0 (scalar), 1 (avx2) or 2 (avx512)", std::to_string(level));
    }
    Choice choice = {nullptr, level};
    check_status("simd_level", qg_cpu_backend(static_cast<qg_simd>(level), &choice.kernels));
    return choice;
}

// The process's choice of kernels. One word, so that a change in one thread is seen whole by the others.
std::atomic<int64_t> chosen_level{-1};

// What set_cpu_tables was given.
std::atomic<const qg_backend *> other_backend{nullptr};
std::atomic<const qg_linalg *> other_linalg{nullptr};

} // namespace

void refuse(const Argument &argument, const std::string &expected, const std::string &got) {
    std::ostringstream out;
    out << "q_galore::" << argument.op << ": " << argument.name;
    if (argument.index >= 0) {
        out << '[' << argument.index << ']';
    }
    out << " must be " << expected << ", got " << got;
    throw std::invalid_argument(out.str());
}

std::string describe(const Tensor &tensor) {
    const std::string text = std::string(dtype_name(tensor.scalar_type())) + " " + shape(sizes_of(tensor));
    return tensor.is_contiguous() ? text : text + ", not contiguous";
}

std::string device_name(const Device &device) {
    if (device.is_cpu()) {
        return "cpu";
    }
    return (device.is_cuda() ? "cuda:" : "another device ") + std::to_string(device.index());
}

void check_tensor(
    const Argument &argument,
    const Tensor &tensor,
    const Device &device,
    std::initializer_list<ScalarType> dtypes,
    const std::vector<int64_t> &sizes) {
    const bool here = on(device, tensor);
    bool good = here && tensor.is_contiguous() && fits(sizes_of(tensor), sizes);
    bool known = false;
    std::string names;
    for (ScalarType dtype : dtypes) {
        known = known || tensor.scalar_type() == dtype;
        names += (names.empty() ? "" : " or ") + std::string(dtype_name(dtype));
    }
    if (!good || !known) {
        std::string where = sizes.size() == 1 && sizes[0] == -1 ? "" : " " + shape(sizes);
        const std::string elsewhere = here ? "" : " on " + device_name(tensor.device());
        refuse(argument, "contiguous " + names + where + " on " + device_name(device), describe(tensor) + elsewhere);
    }
}

void check_length(const char *op, const char *name, size_t got, size_t expected) {
    if (got != expected) {
        refuse({op, name}, "a list of " + std::to_string(expected), std::to_string(got));
    }
}

qg_format float_format(const Tensor &tensor) {
    switch (tensor.scalar_type()) {
    case ScalarType::Float:
        return QG_FLOAT32;
    case ScalarType::BFloat16:
        return QG_BFLOAT16;
    default:
        return QG_FLOAT16;
    }
}

ScalarType scalar_type(qg_format format) {
    switch (format) {
    case QG_FLOAT32:
        return ScalarType::Float;
    case QG_BFLOAT16:
        return ScalarType::BFloat16;
    case QG_FLOAT16:
        return ScalarType::Half;
    default:
        throw std::invalid_argument("format " + std::to_string(format) + " is not a float format");
    }
}

qg_format format_of(const Argument &argument, int64_t number) {
    if (number < 0 || number > INT_MAX) {
        refuse(argument, "the number of a format", std::to_string(number));
    }
    return static_cast<qg_format>(number);
}

qg_format float_format_of(const Argument &argument, int64_t number, bool with_float16) {
    if (number != QG_FLOAT32 && number != QG_BFLOAT16 && !(with_float16 && number == QG_FLOAT16)) {
        const char *expected =
            with_float16 ? "0 (float32), 1 (bfloat16) or 2 (float16)" : "0 (float32) or 1 (bfloat16)";
        refuse(argument, expected, std::to_string(number));
    }
    return static_cast<qg_format>(number);
}

ProjectorLayout projector_layout(qg_format format, int64_t block, int64_t rank, int64_t dim) {
    const std::vector<int64_t> none = {0}, codes = {rank, qg_projector_row_codes(format, dim)};
    if (qg_projector_is_float(format)) {
        return {scalar_type(format), codes, none, none};
    }
    const std::vector<int64_t> scales = {qg_projector_scale_rows(rank, block), qg_projector_scale_cols(dim, block)};
    return {ScalarType::Byte, codes, scales, qg_projector_is_affine(format) ? scales : none};
}

void check_projector_block(const Argument &argument, int64_t block) {
    if (block < 0 || block > INT_MAX) {
        refuse(argument, "from 0 (one scale for all) to 2147483647", std::to_string(block));
    }
}

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
    int64_t dim) {
    const ProjectorLayout rows = projector_layout(format, block, -1, dim); // any number of them
    check_tensor({op, names.codes, index}, codes, device, {rows.dtype}, rows.codes);
    const ProjectorLayout layout = projector_layout(format, block, codes.size(0), dim);
    check_tensor({op, names.scales, index}, scales, device, {ScalarType::BFloat16}, layout.scales);
    check_tensor({op, names.zeros, index}, zeros, device, {ScalarType::Byte}, layout.zeros);
    return {codes.data_ptr(), static_cast<uint16_t *>(scales.data_ptr()), static_cast<uint8_t *>(zeros.data_ptr()),
        codes.size(0), dim, static_cast<int32_t>(block), format};
}

void check_status(const char *op, qg_status status) {
    if (status == QG_SUCCESS) {
        return;
    }
    const std::string message = std::string("q_galore::") + op + ": " + qg_last_error();
    if (status == QG_INVALID_ARGUMENT || status == QG_UNSUPPORTED) {
        throw std::invalid_argument(message);
    }
    throw std::runtime_error(message);
}

Tensor empty(const std::vector<int64_t> &sizes, ScalarType dtype, const Device &device) {
    return torch::stable::empty({sizes.data(), sizes.size()}, dtype, std::nullopt, device);
}

int64_t simd_level() {
    int64_t level = chosen_level.load();
    if (level < 0) {
        level = choose(level_from_environment()).level;
        chosen_level.store(level);
    }
    return level;
}

int64_t best_simd_level() {
    return qg_cpu_best_simd();
}

void set_simd_level(int64_t level) {
    chosen_level.store(choose(level).level);
}

void set_cpu_tables(int64_t backend, int64_t linalg) {
    if ((backend == 0) != (linalg == 0)) {
        refuse(
            {"set_cpu_tables", "backend, linalg"}, "two addresses or 0, 0",
            std::to_string(backend) + ", " + std::to_string(linalg));
    }
    other_backend.store(reinterpret_cast<const qg_backend *>(backend));
    other_linalg.store(reinterpret_cast<const qg_linalg *>(linalg));
}

Kernels::Kernels(const char *op, const Device &device, Products products) : device_(device) {
    if (!device.is_cpu()) {
        open_gpu(op, products);
        return;
    }
    const qg_backend *other = other_backend.load();
    backend_ = other == nullptr ? choose(simd_level()).kernels : other;
    linalg_ = other == nullptr ? torch_linalg() : other_linalg.load();
}

Kernels::~Kernels() {
    if (gpu_ != nullptr) {
        close_gpu();
    }
}

Tensor Kernels::scratch(size_t bytes) const {
    return empty({static_cast<int64_t>(bytes)}, ScalarType::Byte, device_);
}

} // namespace qg
