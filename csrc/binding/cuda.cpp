// cuda.cpp - the CUDA library: found beside this module, opened at the first use of a GPU, one set of tables a GPU.
#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>

#include "common.h"

namespace qg {

// One GPU of this process; opened once and never closed, since the driver may be gone before static objects are.
struct Gpu {
    std::mutex mutex;
    qg_cuda *cuda = nullptr;
};

namespace {

const char *const FILE_NAME = "libq_galore_cuda13.so";
const char *const PLACE_VARIABLE = "Q_GALORE_CUDA_LIBRARY";

// For what kernels leave to each other, and for cuBLAS what it likes best on the largest GPUs.
constexpr int64_t WORKSPACE = QG_CUDA_LEAST_WORKSPACE + (32 << 20);

// torch numbers GPUs in 8 bits.
constexpr int32_t MOST_GPUS = 128;

struct Library {
    decltype(&qg_cuda_version) version;
    decltype(&qg_cuda_open) open;
    decltype(&qg_cuda_begin) begin;
    decltype(&qg_cuda_end) end;
    decltype(&qg_cuda_backend) backend;
    decltype(&qg_cuda_linalg) linalg;
    decltype(&qg_cuda_error) error;
};

[[noreturn]] void fail(const std::string &sentence) {
    throw std::runtime_error("q_galore: " + sentence);
}

std::string beside_this_module() {
    Dl_info info;
    if (dladdr(reinterpret_cast<const void *>(&cuda_version), &info) == 0 || info.dli_fname == nullptr) {
        return FILE_NAME;
    }
    const std::string path = info.dli_fname;
    return path.substr(0, path.rfind('/') + 1) + FILE_NAME;
}

std::string library_path() {
    const char *given = std::getenv(PLACE_VARIABLE);
    return given == nullptr || *given == '\0' ? beside_this_module() : given;
}

template <typename Function> void find(void *library, const std::string &path, const char *name, Function *&function) {
    function = reinterpret_cast<Function *>(dlsym(library, name));
    if (function == nullptr) {
        fail(path + " has no " + name + ": it belongs to another version of the package, build both again");
    }
}

Library open_library() {
    const std::string path = library_path();
    if (access(path.c_str(), F_OK) != 0) {
        fail(
            "this installation has no CUDA kernels (" + path +
            " is missing): install it where nvcc is found, with Q_GALORE_CUDA=1, or name the library in " +
            PLACE_VARIABLE);
    }
    void *handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
        fail("the CUDA kernels could not be loaded: " + std::string(dlerror()));
    }
    Library library;
    find(handle, path, "qg_cuda_version", library.version);
    if (std::string(library.version()) != qg_version()) {
        fail(
            path + " must be of version " + qg_version() + ", got " + library.version() +
            ": build the package again with Q_GALORE_CUDA=1");
    }
    find(handle, path, "qg_cuda_open", library.open);
    find(handle, path, "qg_cuda_begin", library.begin);
    find(handle, path, "qg_cuda_end", library.end);
    find(handle, path, "qg_cuda_backend", library.backend);
    find(handle, path, "qg_cuda_linalg", library.linalg);
    find(handle, path, "qg_cuda_error", library.error);
    return library;
}

const Library &library() {
    static const Library opened = open_library();
    return opened;
}

// torch's present stream. Looked up in the library that has made the CUDA tensors, so that a torch without CUDA does.
void *current_stream(int32_t device) {
    using Getter = int32_t(int32_t, void **);
    static Getter *const get = [] {
        void *torch = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
        return torch == nullptr ? nullptr
                                : reinterpret_cast<Getter *>(dlsym(torch, "aoti_torch_get_current_cuda_stream"));
    }();
    void *stream = nullptr;
    if (get == nullptr || get(device, &stream) != 0) {
        fail("torch did not tell its current CUDA stream of device " + std::to_string(device));
    }
    return stream;
}

Gpu &gpu_of(int32_t device) {
    static Gpu *const gpus = new Gpu[MOST_GPUS];
    if (device < 0 || device >= MOST_GPUS) {
        fail("the number of a GPU must be from 0 to 127, got " + std::to_string(device));
    }
    return gpus[device];
}

void open_once(Gpu &gpu, int32_t device) {
    if (gpu.cuda != nullptr) {
        return;
    }
    const qg_cuda_params params = {sizeof params, device, 0};
    char message[512] = "";
    if (library().open(&gpu.cuda, &params, message, sizeof message) != QG_SUCCESS) {
        gpu.cuda = nullptr;
        fail("cuda:" + std::to_string(device) + " cannot be used: " + message);
    }
}

} // namespace

std::string cuda_version() {
    return library().version();
}

void Kernels::open_gpu(const char *op, Products products) {
    const int32_t index = device_.index();
    Gpu &gpu = gpu_of(index);
    // torch's own guard: the library would go back to a GPU by cudaSetDevice, which makes a context there of some hundred
    // megabytes where this process has none.
    guard_.emplace(index);
    lock_ = std::unique_lock<std::mutex>(gpu.mutex);
    open_once(gpu, index);
    const int64_t size = products == Products::some ? WORKSPACE : QG_CUDA_LEAST_WORKSPACE;
    workspace_ = empty({size}, ScalarType::Byte, device_);
    void *const memory = workspace_->data_ptr();
    if (library().begin(gpu.cuda, current_stream(index), memory, static_cast<size_t>(size)) != QG_SUCCESS) {
        throw std::runtime_error(std::string("q_galore::") + op + ": " + library().error(gpu.cuda));
    }
    gpu_ = &gpu;
    backend_ = library().backend(gpu.cuda);
    linalg_ = library().linalg(gpu.cuda);
}

void Kernels::close_gpu() {
    library().end(gpu_->cuda);
}

} // namespace qg
