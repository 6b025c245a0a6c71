#include "driver.h"

#include <dlfcn.h>

#include <fstream>
#include <map>
#include <mutex>
#include <sstream>
#include <type_traits>
#include <utility>

#include "edge_kernels.h"

namespace edge {
namespace {

// Types and numbers as in cuda.h, whose binary interface does not change: a function that does gets a new name (_v2).
using Result = int;
using Context = struct ContextTag*;
using Module = struct ModuleTag*;
using Function = struct FunctionTag*;
using Stream = struct StreamTag*;
using Address = unsigned long long;

constexpr int MULTIPROCESSOR_COUNT = 16;           // CU_DEVICE_ATTRIBUTE_...
constexpr int MAX_DYNAMIC_SHARED = 8;              // CU_FUNC_ATTRIBUTE_...
constexpr int ERROR_LOG = 5, ERROR_LOG_BYTES = 6;  // CU_JIT_...

struct Driver {
    Result (*cuInit)(unsigned);
    Result (*cuCtxGetCurrent)(Context*);
    Result (*cuCtxGetDevice)(int*);
    Result (*cuDeviceGetAttribute)(int*, int attribute, int device);
    Result (*cuModuleLoadDataEx)(Module*, const void* image, unsigned options, int* names, void** values);
    Result (*cuModuleGetFunction)(Function*, Module, const char* name);
    Result (*cuFuncSetAttribute)(Function, int attribute, int value);
    Result (*cuLaunchKernel)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared,
                             Stream, void** arguments, void** extra);
    Result (*cuMemcpyDtoDAsync)(Address to, Address from, size_t bytes, Stream);
    Result (*cuGetErrorString)(Result, const char**);
};

Driver load_driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) throw DriverFault{EDGE_NO_DRIVER, std::string("the CUDA driver cannot be loaded: ") + dlerror()};
    Driver driver;
    const auto load = [&](auto& function, const char* name) {
        void* found = dlsym(library, name);
        if (!found) throw DriverFault{EDGE_NO_DRIVER, std::string("the CUDA driver has no ") + name};
        function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(found);
    };
    load(driver.cuInit, "cuInit");
    load(driver.cuCtxGetCurrent, "cuCtxGetCurrent");
    load(driver.cuCtxGetDevice, "cuCtxGetDevice");
    load(driver.cuDeviceGetAttribute, "cuDeviceGetAttribute");
    load(driver.cuModuleLoadDataEx, "cuModuleLoadDataEx");
    load(driver.cuModuleGetFunction, "cuModuleGetFunction");
    load(driver.cuFuncSetAttribute, "cuFuncSetAttribute");
    load(driver.cuLaunchKernel, "cuLaunchKernel");
    load(driver.cuMemcpyDtoDAsync, "cuMemcpyDtoDAsync_v2");
    load(driver.cuGetErrorString, "cuGetErrorString");
    if (driver.cuInit(0)) throw DriverFault{EDGE_NO_DRIVER, "the CUDA driver finds no device that works (cuInit)"};
    return driver;
}

const Driver& cuda() {
    static const Driver driver = load_driver();
    return driver;
}

void check(Result result, const std::string& what) {
    if (!result) return;
    const char* text = nullptr;
    cuda().cuGetErrorString(result, &text);
    throw DriverFault{EDGE_CUDA, what + ": " + (text ? text : "unknown error") + " (" + std::to_string(result) + ")"};
}

Context current_context() {
    Context context = nullptr;
    check(cuda().cuCtxGetCurrent(&context), "cuCtxGetCurrent");
    if (!context) throw DriverFault{EDGE_CUDA, "this thread has no CUDA context"};
    return context;
}

/// Kernels of all contexts. Modules are never unloaded: a plugin library lives as long as its process.
class Kernels {
public:
    void set(const std::string& path) {
        const std::lock_guard<std::mutex> lock(mutex_);
        std::string text = read(path);
        if (!modules_.empty() && text != ptx_)
            throw DriverFault{EDGE_NO_KERNELS, path + ": other kernels are in use already"};
        path_ = path;
        ptx_ = std::move(text);
    }

    Function find(const EdgeLaunch& launch) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const Context context = current_context();
        Entry& entry = functions_[{context, launch.kernel}];
        if (!entry.function && cuda().cuModuleGetFunction(&entry.function, module(context), launch.kernel)) {
            functions_.erase({context, launch.kernel});
            throw DriverFault{EDGE_NO_KERNELS, path_ + ": has no kernel " + launch.kernel};
        }
        if (launch.shared_bytes > entry.shared_bytes) {
            check(cuda().cuFuncSetAttribute(entry.function, MAX_DYNAMIC_SHARED, int(launch.shared_bytes)),
                  std::string(launch.kernel) + " with " + std::to_string(launch.shared_bytes) +
                      " bytes of shared memory");
            entry.shared_bytes = launch.shared_bytes;
        }
        return entry.function;
    }

private:
    struct Entry {
        Function function = nullptr;
        unsigned shared_bytes = EDGE_SHARED_DEFAULT;  // its limit so far
    };

    static std::string read(const std::string& path) {
        std::ifstream file(path, std::ios::binary);
        std::stringstream text;
        text << file.rdbuf();
        if (!file || text.str().find(".entry") == std::string::npos)
            throw DriverFault{EDGE_NO_KERNELS, path + ": is not there, or not a PTX file with kernels"};
        return text.str();
    }

    /// Where nothing was set: the file beside this library.
    static std::string beside() {
        Dl_info info;
        const char* name = dladdr(reinterpret_cast<void*>(&beside), &info) ? info.dli_fname : "";
        const std::string library = name ? name : "";
        return library.substr(0, library.find_last_of('/') + 1) + "edge_kernels.ptx";
    }

    Module module(Context context) {
        Module& module = modules_[context];
        if (module) return module;
        try {
            if (ptx_.empty()) ptx_ = read(path_.empty() ? path_ = beside() : path_);
            char log[4096] = "";
            int names[] = {ERROR_LOG, ERROR_LOG_BYTES};
            void* values[] = {log, reinterpret_cast<void*>(sizeof log - 1)};
            const Result result = cuda().cuModuleLoadDataEx(&module, ptx_.c_str(), 2, names, values);
            if (result)
                throw DriverFault{EDGE_NO_KERNELS,
                                  path_ + ": the driver refuses it (" + std::to_string(result) + ") " + log};
        } catch (...) {
            modules_.erase(context);
            throw;
        }
        return module;
    }

    std::mutex mutex_;
    std::string path_, ptx_;
    std::map<Context, Module> modules_;
    std::map<std::pair<Context, std::string>, Entry> functions_;
};

Kernels& kernels() {
    static Kernels* const all = new Kernels;  // outlives every static object that may still run an op
    return *all;
}

}  // namespace

void set_kernels(const std::string& path) { kernels().set(path); }

int multiprocessors() {
    int device = 0, count = 0;
    current_context();
    check(cuda().cuCtxGetDevice(&device), "cuCtxGetDevice");
    check(cuda().cuDeviceGetAttribute(&count, MULTIPROCESSOR_COUNT, device), "cuDeviceGetAttribute");
    return count;
}

void prepare_kernel(const EdgeLaunch& launch) { kernels().find(launch); }

void launch_kernel(const EdgeLaunch& launch, void** arguments, void* stream) {
    const Function function = kernels().find(launch);
    check(cuda().cuLaunchKernel(function, launch.grid[0], launch.grid[1], launch.grid[2], launch.block[0],
                                launch.block[1], launch.block[2], launch.shared_bytes, static_cast<Stream>(stream),
                                arguments, nullptr),
          launch.kernel);
}

void copy_on_device(void* to, const void* from, uint64_t bytes, void* stream) {
    check(cuda().cuMemcpyDtoDAsync(reinterpret_cast<Address>(to), reinterpret_cast<Address>(from), bytes,
                                   static_cast<Stream>(stream)),
          "cuMemcpyDtoDAsync");
}

}  // namespace edge
