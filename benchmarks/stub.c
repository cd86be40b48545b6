// A libcuda.so.1 whose functions succeed at once and do nothing, under Triton's own launcher: what Python and Triton
// spend on a launch can be timed, and what arrives at the driver can be read. Built by stub_driver.py.
#include <stdint.h>
#include <string.h>

typedef int Result;  // CUresult; 0 is success
enum { NOT_FOUND = 500 };

typedef struct {  // CUlaunchConfig, as far as it is read
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned attribute_count;
} Config;

uint64_t launches = 0;  // how many, ever

// For a test: the parameters of the next launch, of these sizes, are copied one after the other.
Config config;
static int count;
static const int *sizes;
static char *values;
void read_parameters(int n, const int *their_sizes, char *into) { count = n; sizes = their_sizes; values = into; }

Result cuLaunchKernelEx(const Config *given, void *function, void **parameters, void **extra) {
  launches++;
  if (!sizes) return 0;
  config = *given;
  char *end = values;
  for (int i = 0; i < count; end += sizes[i++]) memcpy(end, parameters[i], sizes[i]);
  return 0;
}

Result cuPointerGetAttribute(uint64_t *value, int attribute, uint64_t pointer) { *value = pointer; return 0; }

// One device, an H100 in what Triton and fusedres ask: the numbers are those of CUdevice_attribute.
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 10: *value = 32; break;           // lanes of a warp
    case 16: *value = 132; break;          // multiprocessors
    case 75: *value = 9; break;            // compute capability
    case 76: *value = 0; break;
    case 81: *value = 228 * 1024; break;   // shared memory of a multiprocessor
    case 97: *value = 227 * 1024; break;   // ... of a program
    default: *value = 65536;
  }
  return 0;
}
Result cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : 0;  // threads of a program
  return 0;
}

static Result give(void **handle) { *handle = (void *)16; return 0; }
Result cuCtxGetCurrent(void **context) { return give(context); }
Result cuStreamGetCtx(void *stream, void **context) { return give(context); }
Result cuDevicePrimaryCtxRetain(void **context, int device) { return give(context); }
Result cuModuleLoadData(void **module, const void *image) { return give(module); }
Result cuModuleGetFunction(void **function, void *module, const char *name) { return give(function); }

static Result say(int *value, int said) { *value = said; return 0; }
Result cuDriverGetVersion(int *version) { return say(version, 13020); }
Result cuDeviceGet(int *device, int ordinal) { return say(device, 0); }
Result cuCtxGetDevice(int *device) { return say(device, 0); }
Result cuStreamIsCapturing(void *stream, int *status) { return say(status, 0); }
Result cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) { return say(clusters, 1); }
Result cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
Result cuGetErrorString(Result error, const char **text) { *text = "the stub's"; return 0; }

#define SUCCEEDS(name) Result name(void) { return 0; }
SUCCEEDS(cuCtxSetCurrent) SUCCEEDS(cuCtxSetLimit) SUCCEEDS(cuModuleUnload) SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig) SUCCEEDS(cuTensorMapEncodeTiled) SUCCEEDS(cuTensorMapEncodeIm2col)

// CUDA's runtime, which PyTorch asks for devices, finds none.
Result cuInit(unsigned flags) { return 100; }
Result cuDeviceGetCount(int *count) { return say(count, 0); }
Result cuGetProcAddress(void) { return NOT_FOUND; }
Result cuGetProcAddress_v2(void) { return NOT_FOUND; }
Result cuGetExportTable(void) { return NOT_FOUND; }
