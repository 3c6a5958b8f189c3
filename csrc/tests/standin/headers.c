/* headers.c - csrc/cuda/libraries.h against NVIDIA's own headers: it compiles where every prototype and number is the
 * same. tests/test_cuda_libraries.py compiles it where those headers are.
 *
 * cublas_v2.h renames functions by macros (cublasCreate is cublasCreate_v2), but only names that libraries.h does not
 * use: it has the renamed ones. The enums of the headers are compatible with what libraries.h calls them. */
#include <cublas_v2.h>
#include <cusolverDn.h>

#include "cuda/libraries.h"

#define SAME_TYPE(type, name, arguments) \
    _Static_assert(__builtin_types_compatible_p(__typeof__(name), type arguments), #name);
QG_CUBLAS_FUNCTIONS(SAME_TYPE)
QG_CUSOLVER_FUNCTIONS(SAME_TYPE)

#define SAME_NUMBER(ours, theirs) _Static_assert((int)(ours) == (int)(theirs), #ours);
SAME_NUMBER(QG_BLAS_OP_N, CUBLAS_OP_N)
SAME_NUMBER(QG_BLAS_OP_T, CUBLAS_OP_T)
SAME_NUMBER(QG_BLAS_UPPER, CUBLAS_FILL_MODE_UPPER)
SAME_NUMBER(QG_BLAS_NON_UNIT, CUBLAS_DIAG_NON_UNIT)
SAME_NUMBER(QG_BLAS_EXACT_REDUCTION, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)
SAME_NUMBER(QG_BLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F)
SAME_NUMBER(QG_BLAS_COMPUTE_32F_FAST_TF32, CUBLAS_COMPUTE_32F_FAST_TF32)
SAME_NUMBER(QG_BLAS_GEMM_DEFAULT, CUBLAS_GEMM_DEFAULT)
SAME_NUMBER(QG_BLAS_ALLOC_FAILED, CUBLAS_STATUS_ALLOC_FAILED)
SAME_NUMBER(QG_SOLVER_ALLOC_FAILED, CUSOLVER_STATUS_ALLOC_FAILED)
SAME_NUMBER(QG_TYPE_R_32F, CUDA_R_32F)
SAME_NUMBER(QG_TYPE_R_16F, CUDA_R_16F)
SAME_NUMBER(QG_TYPE_R_16BF, CUDA_R_16BF)
