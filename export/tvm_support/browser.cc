// What the JavaScript half of the runtime calls beside TVM's C functions, and what that half defines.
#define TVM_LOG_CUSTOMIZE 1
#define TVM_FFI_ALWAYS_LOG_BEFORE_THROW 1

#include <emscripten.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#include <cstdlib>
#include <string>

extern "C" {

int TVMFFIWasmSafeCall(void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result);
void TVMFFIWasmFunctionDeleter(void* self);

EMSCRIPTEN_KEEPALIVE void* TVMWasmAllocSpace(int size) { return std::malloc(size); }

EMSCRIPTEN_KEEPALIVE void TVMWasmFreeSpace(void* space) { std::free(space); }

/*! \brief A function object of a JavaScript function, which `self` numbers. */
EMSCRIPTEN_KEEPALIVE int TVMFFIWasmFunctionCreate(void* self, TVMFFIObjectHandle* made) {
  return TVMFFIFunctionCreate(self, TVMFFIWasmSafeCall, TVMFFIWasmFunctionDeleter, made);
}

/*! \brief The message of the last call that failed; good until the next one. */
EMSCRIPTEN_KEEPALIVE const char* TVMFFIWasmGetLastError() {
  static std::string message;
  message = ::tvm::ffi::details::MoveFromSafeCallRaised().what();
  return message.c_str();
}
}
