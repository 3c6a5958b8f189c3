// linalg.cpp - the linear-algebra table on the CPU: torch's matrix products, our own factorisations over them.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "common.h"

namespace qg {
namespace {

// A tensor over memory that it does not own.
class View {
  public:
    View(const void *data, qg_format format, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
        const int64_t sizes[] = {rows, cols}, strides[] = {row_stride, col_stride};
        const int32_t dtype = format == QG_FLOAT32 ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
        status_ = aoti_torch_create_tensor_from_blob(
            const_cast<void *>(data), 2, sizes, strides, 0, dtype, aoti_torch_device_type_cpu(), 0, &handle_);
    }
    ~View() {
        if (status_ == AOTI_TORCH_SUCCESS) {
            aoti_torch_delete_tensor_object(handle_);
        }
    }
    View(const View &) = delete;
    View &operator=(const View &) = delete;

    bool good() const { return status_ == AOTI_TORCH_SUCCESS; }
    AtenTensorHandle get() const { return handle_; }

  private:
    AtenTensorHandle handle_ = nullptr;
    AOTITorchError status_;
};

qg_status gemm(
    void *,
    qg_format format,
    int32_t accumulate,
    int64_t m,
    int64_t n,
    int64_t k,
    const void *a,
    int64_t a_row_stride,
    int64_t a_col_stride,
    const void *b,
    int64_t b_row_stride,
    int64_t b_col_stride,
    void *c,
    int64_t c_row_stride) {
    View left(a, format, m, k, a_row_stride, a_col_stride);
    View right(b, format, k, n, b_row_stride, b_col_stride);
    View out(c, format, m, n, c_row_stride, 1);
    if (!left.good() || !right.good() || !out.good()) {
        return QG_INTERNAL;
    }
    const AOTITorchError error =
        accumulate == 0 ? aoti_torch_cpu_mm_out(out.get(), left.get(), right.get())
                        : aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), right.get(), 1.0, accumulate);
    return error == AOTI_TORCH_SUCCESS ? QG_SUCCESS : QG_INTERNAL;
}

} // namespace

const qg_linalg *torch_linalg() {
    static const qg_linalg table = {
        sizeof(qg_linalg), nullptr, gemm, qg_cpu_potrf, qg_cpu_trtri, qg_cpu_qr, qg_cpu_work_size};
    return &table;
}

} // namespace qg
