// Tensors inside of JSON, which no model library has: these streams are declared and always at their end.
#pragma once

#include <tvm/support/io.h>

namespace tvm {
namespace support {

class Base64OutStream : public Stream {
 public:
  using Stream::Read;
  using Stream::Write;
  explicit Base64OutStream(Stream*) {}
  size_t Read(void*, size_t) override { return 0; }
  size_t Write(const void*, size_t) override { return 0; }
  void Finish() {}
};

class Base64InStream : public Base64OutStream {
 public:
  using Base64OutStream::Base64OutStream;
  void InitPosition() {}
};

}  // namespace support
}  // namespace tvm
