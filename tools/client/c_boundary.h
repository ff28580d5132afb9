// What both halves of the C interface (kvcast.h) need: no exception leaves, every failure has its sentence.
#pragma once

#include <fmt/format.h>

#include <exception>
#include <new>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "codec/encoder.h"
#include "codec/format/layout.h"
#include "tools/client/kvcast.h"

namespace kvcast::client {

// Keeps the sentence for kvcast_message(), and returns the code.
int told(int code, const char* message) noexcept;

// What a call does: run() returns a Status.
template <typename Run>
int guarded(Run&& run) noexcept {
    try {
        const Status s = run();
        return s.ok() ? KVCAST_OK : told(static_cast<int>(s.code()), s.message().c_str());
    } catch (const std::bad_alloc&) {
        return told(KVCAST_OUT_OF_MEMORY, "out of memory");
    } catch (const std::exception& e) {  // of the system: threads, file descriptors
        return told(KVCAST_SYSTEM, e.what());
    } catch (...) {
        return told(KVCAST_SYSTEM, "unknown");
    }
}

inline Status bad_argument(std::string sentence) {
    return {ErrorCode::kBadArgument, std::move(sentence)};
}

// Whether a structure is there, and of this library's size.
template <typename T>
Status check_struct(const T* given, const char* name) {
    if (given == nullptr) return bad_argument(fmt::format("no {} given", name));
    if (given->struct_bytes != sizeof(T)) {
        return bad_argument(fmt::format("{} of {} bytes, this library's has {}: it is of another version",
                                        name, given->struct_bytes, sizeof(T)));
    }
    return {};
}

inline std::string text_or_none(const char* text) {
    return text != nullptr ? text : "";
}

inline constexpr std::size_t kMostThreads = 1024;

inline Status check_threads(std::size_t threads) {
    return threads <= kMostThreads
               ? Status()
               : bad_argument(fmt::format("{} threads, {} at most", threads, kMostThreads));
}

inline std::size_t threads_or_all(std::size_t threads) {
    return threads != 0 ? threads : std::max(1u, std::thread::hardware_concurrency());
}

// A list is there where it has entries, and has entries where it is there.
template <typename T>
Status check_list(const T* first, std::size_t count, const char* name) {
    if ((first == nullptr) == (count == 0)) return {};
    return bad_argument(
        fmt::format("{}: {} of them{}", name, count, first == nullptr ? ", and none given" : ""));
}

template <typename T>
std::span<const T> span_of(const T* first, std::size_t count) {
    return first != nullptr ? std::span(first, count) : std::span<const T>();
}

inline std::span<const std::uint8_t> octets_of(const void* bytes, std::size_t count) {
    return span_of(static_cast<const std::uint8_t*>(bytes), count);
}

// A layout that was checked: kBadArgument, and check_layout's errors.
Result<Layout> layout_of(const kvcast_layout* given);

// Rows [layer][plane] of such a layout.
Result<std::vector<PlaneRows>> rows_of(const kvcast_rows* given, const Layout& layout);

}  // namespace kvcast::client
