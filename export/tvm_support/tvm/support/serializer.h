// How values lie in a stream: numbers, enumerations and DLPack's structures as their little-endian bytes,
// sequences and maps as a count of 64 bits and their elements.
#pragma once

#include <dlpack/dlpack.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/string.h>
#include <tvm/support/io.h>

#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

namespace tvm {
namespace support {

template <typename T>
struct Serializer<T, std::enable_if_t<std::is_arithmetic_v<T> || std::is_enum_v<T> ||
                                      std::is_same_v<T, DLDataType> || std::is_same_v<T, DLDevice>>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const T& value) { stream->Write(&value, sizeof(T)); }
  static bool Read(Stream* stream, T* value) { return stream->Read(value, sizeof(T)) == sizeof(T); }
};

/*! \brief A count, then the elements of a container in its own order. */
template <typename Container>
void WriteAll(Stream* stream, const Container& values) {
  stream->Write<uint64_t>(values.size());
  for (const auto& value : values) stream->Write(value);
}

/*! \brief Reads a count and as many elements, each of which `take` receives. */
template <typename Element, typename Take>
bool ReadAll(Stream* stream, Take take) {
  uint64_t count;
  if (!stream->Read(&count)) return false;
  for (uint64_t i = 0; i < count; ++i) {
    Element value;
    if (!stream->Read(&value)) return false;
    take(std::move(value));
  }
  return true;
}

template <typename A, typename B>
struct Serializer<std::pair<A, B>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const std::pair<A, B>& value) {
    stream->Write(value.first);
    stream->Write(value.second);
  }
  static bool Read(Stream* stream, std::pair<A, B>* value) {
    return stream->Read(&value->first) && stream->Read(&value->second);
  }
};

template <>
struct Serializer<std::string> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const std::string& value) { WriteAll(stream, value); }
  static bool Read(Stream* stream, std::string* value) {
    value->clear();
    return ReadAll<char>(stream, [&](char each) { value->push_back(each); });
  }
};

template <>
struct Serializer<ffi::String> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const ffi::String& value) { stream->Write(std::string(value)); }
  static bool Read(Stream* stream, ffi::String* value) {
    std::string text;
    if (!stream->Read(&text)) return false;
    *value = ffi::String(std::move(text));
    return true;
  }
};

template <typename T>
struct Serializer<std::vector<T>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const std::vector<T>& values) { WriteAll(stream, values); }
  static bool Read(Stream* stream, std::vector<T>* values) {
    values->clear();
    return ReadAll<T>(stream, [&](T each) { values->push_back(std::move(each)); });
  }
};

template <typename K, typename V>
struct Serializer<std::unordered_map<K, V>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const std::unordered_map<K, V>& values) {
    stream->Write<uint64_t>(values.size());
    for (const auto& [key, value] : values) {
      stream->Write(key);
      stream->Write(value);
    }
  }
  static bool Read(Stream* stream, std::unordered_map<K, V>* values) {
    values->clear();
    return ReadAll<std::pair<K, V>>(stream, [&](std::pair<K, V> each) { values->insert(std::move(each)); });
  }
};

template <typename T>
struct Serializer<ffi::Array<T>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const ffi::Array<T>& values) {
    stream->Write<uint64_t>(values.size());
    for (const T value : values) stream->Write(value);
  }
  static bool Read(Stream* stream, ffi::Array<T>* values) {
    *values = ffi::Array<T>();
    return ReadAll<T>(stream, [&](T each) { values->push_back(std::move(each)); });
  }
};

template <typename K, typename V>
struct Serializer<ffi::Map<K, V>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const ffi::Map<K, V>& values) {
    stream->Write<uint64_t>(values.size());
    for (const auto& [key, value] : values) {
      stream->Write<K>(key);
      stream->Write<V>(value);
    }
  }
  static bool Read(Stream* stream, ffi::Map<K, V>* values) {
    *values = ffi::Map<K, V>();
    return ReadAll<std::pair<K, V>>(
        stream, [&](std::pair<K, V> each) { values->Set(std::move(each.first), std::move(each.second)); });
  }
};

}  // namespace support
}  // namespace tvm
